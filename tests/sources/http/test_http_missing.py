"""Without the library that it needs, the HTTP source says exactly how to install it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.support import PATIENCE_S, TESTS

INSTALL = {
    "httpx": "pip install 'trading_push[http]'",
    "asks": "pip install --no-deps asks async_generator h11",
}
SAYS = {
    "httpx": f"the HTTP source needs the library httpx: {INSTALL['httpx']}",
    "asks": f'http.client = "asks" needs the library asks: {INSTALL["asks"]}',
}
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


MISSING = [("httpx", "httpx"), ("httpx", "httpcore"), ("asks", "asks"), ("asks", "async_generator")]


@pytest.mark.parametrize(("client", "module"), MISSING)
def test_making_it_says_how_to_install_it(client: str, module: str) -> None:
    make = f"HttpSource({URL!r}, client={client!r})"
    ended = without(module, f"from trading_push.sources.http import HttpSource; {make}")
    last = ended.stderr.splitlines()[-1]
    assert last == f"trading_push.errors.ConfigurationError: {SAYS[client]}"


@pytest.mark.parametrize("client", SAYS)
def test_serve_says_so_in_one_line(tmp_path: Path, client: str) -> None:
    env = {
        "TRADING_PUSH_HTTP_URL": URL,
        "TRADING_PUSH_HTTP_CLIENT": client,
        "XDG_DATA_HOME": str(tmp_path),
    }
    program = "from trading_push.cli.commands import main; main()"
    ended = without(client, program, "serve", "--port", "0", **env)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [f"trading-push: {SAYS[client]}"]


def test_what_a_socks_proxy_needs_besides_is_told_too() -> None:
    ended = without(
        "socksio",
        "from trading_push.sources.http import HttpSource; "
        "from trading_push.transport.outbound_proxies import OutboundProxies; "
        "P = OutboundProxies('socks5://proxy.test:1080'); "
        "HttpSource('http://accounts.test/{user_id}/{data_type}', proxies=P)",
    )
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("trading_push.errors.ConfigurationError: ")
    assert last.endswith(INSTALL["httpx"])


def test_the_docs_say_the_same() -> None:
    for page in ("README.md", "docs/http.md"):
        text = (TESTS.parent / page).read_text(encoding="utf-8")
        assert INSTALL["asks"] in text, page
        assert "[http]'" in text, page
