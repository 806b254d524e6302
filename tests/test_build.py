"""The wheel: it carries the chart library if that is there, and never other bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHART = "trading_push/web/static/lightweight-charts.js"


def build(tree: Path, chart: Path | None) -> subprocess.CompletedProcess[str]:
    """Build the wheel as an environment does that has no package with the library."""
    env = {**os.environ, "PYTHONPATH": ""}
    env.pop("TRADING_PUSH_CHART_FILE", None)
    if chart is not None:
        env["TRADING_PUSH_CHART_FILE"] = str(chart)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a wheel is built of, in a place of its own."""
    there = tmp_path / "tree"
    there.mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, there)
    for name in ("trading_push", "LICENSES"):
        ignored = shutil.ignore_patterns("__pycache__", "lightweight-charts*")
        shutil.copytree(ROOT / name, there / name, ignore=ignored)
    return there


def test_other_bytes_than_those_recorded_are_never_built(tree, tmp_path):
    chart = tmp_path / "chart.js"
    chart.write_text("alert(1)")
    done = build(tree, chart)
    assert done.returncode != 0
    assert "do not build with it" in done.stderr + done.stdout
    assert not (tree / "out").exists() or not list((tree / "out").glob("*.whl"))


def test_without_the_library_a_wheel_is_built_that_has_none(tree):
    done = build(tree, None)
    assert done.returncode == 0, done.stderr
    assert "draws by itself" in done.stderr + done.stdout
    (wheel,) = (tree / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        names = built.namelist()
    assert CHART not in names
    assert "trading_push/web/static/page.html" in names
    assert any(name.endswith("licenses/LICENSES/Apache-2.0.txt") for name in names)
