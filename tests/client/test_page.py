"""The page of the clients: its programs run as printed, and what it lists is what the code has."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from harness.readme import PAGES, block
from harness.support import PATIENCE_S, free_port, process

from trading_push.client import ending, mailbox

PRINTED_PORT = "127.0.0.1:8000"
BALANCE = [{"asset": "USDT", "total": "100.00"}]


def programs(folder: Path, *names: str) -> None:
    """Write blocks as programs, as printed but for the port, which may be taken."""
    port = f"127.0.0.1:{free_port()}"
    printed = {
        "embedding": block("embedding"),
        "client_aio": block("client_aio"),
        "client_lifespan": block("client_lifespan"),
        "client_sync": block("client_sync"),
    }
    for name in names:
        assert printed[name].count(PRINTED_PORT) == 1
        (folder / f"{name}.py").write_text(printed[name].replace(PRINTED_PORT, port))


@pytest.mark.parametrize("name", ["client_aio", "client_sync"])
def test_a_program_runs_as_printed(tmp_path: Path, name: str) -> None:
    programs(tmp_path, "embedding", name)
    with process(sys.executable, str(tmp_path / "embedding.py")) as server:
        server.wait_for_line("Running on")
        with process(sys.executable, str(tmp_path / f"{name}.py")) as reader:
            reader.wait_for_line(f"balance snapshot {BALANCE}", reader.out)
            assert server.stop() == 0
            assert server.traces() == reader.traces() == []


def test_an_application_has_a_client_for_as_long_as_it_lives(tmp_path: Path) -> None:
    programs(tmp_path, "embedding", "client_lifespan")
    bind = f"127.0.0.1:{free_port()}"
    command = (sys.executable, "-m", "hypercorn", "--bind", bind, "client_lifespan:app")
    with process(sys.executable, str(tmp_path / "embedding.py")) as server:
        server.wait_for_line("Running on")
        with process(*command, cwd=tmp_path) as application:
            application.wait_for_line("Running on")
            shown: Any = {}
            until_s = time.monotonic() + PATIENCE_S
            while not shown and time.monotonic() < until_s:
                with urllib.request.urlopen(f"http://{bind}/") as response:
                    shown = json.load(response)
            assert shown == {"balance": BALANCE}
            assert application.stop() == 0
            assert application.traces() == []


def test_the_page_s_numbers_are_the_code_s() -> None:
    page = PAGES["docs/clients.md"].replace("\n", " ")
    assert f"up to {mailbox.ORDERED_PUSHES:,} pushes" in page
    assert f"after {ending.BACKOFF_FIRST_S} s at first, {ending.BACKOFF_MOST_S:g} s at most" in page
    assert f"a connection that lasted {ending.LASTING_S:g} s" in page
