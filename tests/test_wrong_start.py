"""What cannot start under the `hypercorn` command says why in one line, and its status says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

QUERY = '[database.queries.pnl]\nsql = "SELECT user_id FROM t WHERE user_id IN :user_ids"\n'
# Python's own complaint that its helper process was not told of the end.
TRACKER = ("resource_tracker", "warnings.warn")


def start(home: Path, *flags: str, **env: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0", *flags]
    done = subprocess.run(
        [*command, "trading_push.asgi:app"],
        env={**os.environ, "XDG_DATA_HOME": str(home), **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if not any(map(line.__contains__, TRACKER))]
    return done.returncode, [line for line in lines if "Running on" not in line]


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("worker_class", [(), ("--worker-class", "asyncio")])
def test_without_the_trio_worker(tmp_path, worker_class, workers):
    status, lines = start(tmp_path, "--workers", workers, *worker_class)
    assert status != 0
    assert len(lines) == 1
    assert "--worker-class trio" in lines[0]


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("limits.connections = 'many'", "limits.connections"),  # before it serves
        (f"[database]\nurl = 'sqlite:///none.db'\n{QUERY}", "none.db"),  # when it begins to
    ],
)
def test_what_is_configured_cannot_be_used(tmp_path, config, named, workers):
    (tmp_path / "c.toml").write_text(config)
    status, lines = start(
        tmp_path, "-k", "trio", "-w", workers, TRADING_PUSH_CONFIG=str(tmp_path / "c.toml")
    )
    assert status != 0
    said = [line for line in lines if named in line]
    assert len(said) == 1
    assert not any("Traceback" in line for line in lines)
