"""Without the library that it needs, the HTTP source says exactly how to install it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.support import PATIENCE_S, TESTS

INSTALL = "pip install --no-deps asks async_generator h11"
URL = "http://127.0.0.1:9/{user_id}/{data_type}"


def without(module: str, program: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program where a module is not installed, whether it is here or not."""
    program = f"import sys; sys.modules[{module!r}] = None; {program}"
    return subprocess.run(
        [sys.executable, "-c", program, *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.parametrize("module", ["asks", "async_generator"])
def test_importing_it_says_how_to_install_it(module: str) -> None:
    ended = without(module, "from trading_push.sources.http import HttpSource")
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("trading_push.errors.ConfigurationError: the HTTP source needs")
    assert last.endswith(INSTALL)


def test_serve_says_so_in_one_line(tmp_path: Path) -> None:
    env = {"TRADING_PUSH_HTTP_URL": URL, "XDG_DATA_HOME": str(tmp_path)}
    program = "from trading_push.cli.commands import main; main()"
    ended = without("asks", program, "serve", "--port", "0", **env)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        f"trading-push: the HTTP source needs the library asks: {INSTALL}"
    ]


def test_the_readme_says_the_same() -> None:
    readme = (TESTS.parent / "README.md").read_text(encoding="utf-8")
    assert INSTALL in readme
