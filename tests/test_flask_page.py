"""docs/flask.md as printed: log in, take a token, connect, see what a view has committed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from harness.browser import BROWSER_FLAGS, BROWSERS, find_browser
from harness.readme import block
from harness.support import PATIENCE_S, Process, free_port, process, serving


class Browser:
    """What the page's script does with `fetch`: cookies are kept."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(CookieJar())
        )

    def fetch(self, path: str, form: dict[str, str] | None = None) -> bytes:
        data = None if form is None else urllib.parse.urlencode(form).encode()
        with self._opener.open(self.origin + path, data, PATIENCE_S) as answer:
            body: bytes = answer.read()
            return body


def environment() -> dict[str, str]:
    exported = re.findall(r'^export (\w+)="([^"]+)"$', block("shop_start"), re.M)
    assert len(exported) == 3
    return dict(exported)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[tuple[Process, Browser]]:
    """The push server, and a browser that has the shop's page."""
    port, own = free_port(), free_port()
    program = block("shop")
    assert program.count("127.0.0.1:8000") == 2
    (tmp_path / "shop.py").write_text(program.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "page.html").write_text(block("shop_page"))
    (tmp_path / "trading-push.toml").write_text(block("shop_configuration"))
    *_, serve, run = block("shop_start").splitlines()
    assert serve == ".venv/bin/trading-push serve --config trading-push.toml"
    assert run == ".venv/bin/flask --app shop run"
    flask = (sys.executable, "-m", "flask", *run.split()[1:], "--port", str(own))
    env = environment()
    flags = ("--config", "trading-push.toml", "--port", str(port))
    with (
        serving(tmp_path, *flags, env=env, cwd=tmp_path) as server,
        process(*flask, env=env, cwd=tmp_path) as running,
    ):
        running.wait_for_line("Running on")
        yield server, Browser(f"http://127.0.0.1:{own}")
        assert running.traces() == []
    assert server.traces() == []


async def total(socket: ClientConnection) -> str:
    """What the page would show next."""
    while "data" not in (push := json.loads(await socket.recv())):
        pass
    return str(push["data"][0]["total"])


async def connected(browser: Browser, **options: Any) -> ClientConnection:
    assert b"new WebSocket(url)" in await asyncio.to_thread(browser.fetch, "/static/page.html")
    await asyncio.to_thread(browser.fetch, "/login", {"user": "4"})
    told = json.loads(await asyncio.to_thread(browser.fetch, "/push-token"))
    options = {"origin": browser.origin, "proxy": None, **options}
    socket = await connect(told["url"], **options)
    await socket.send(json.dumps({"op": "auth", "token": told["token"]}))
    await socket.send(json.dumps({"op": "subscribe", "args": ["balance"]}))
    assert await total(socket) == "0"
    return socket


def test_the_program_has_thirty_lines():
    lines = [line for line in block("shop").splitlines() if line.strip()]
    assert len(lines) <= 32  # two for the secret that both sides have, and what it allows


def test_what_a_view_commits_is_in_the_page(shop):
    server, browser = shop

    async def use() -> None:
        async with asyncio.timeout(PATIENCE_S), await connected(browser) as socket:
            for expected in ("10", "20", "30"):
                await asyncio.to_thread(browser.fetch, "/deposit", {})
                assert await total(socket) == expected

    asyncio.run(use())
    assert server.stop() == 0


def test_a_page_of_another_site_gets_nothing(shop):
    _, browser = shop

    async def use() -> None:
        with pytest.raises(InvalidStatus, match="403"):
            await connected(browser, origin="https://evil.example.com")

    asyncio.run(use())


class Page:
    """The page in a real browser, by the protocol of its developer tools."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._calls = 0

    async def run(self, expression: str) -> Any:
        self._calls += 1
        params = {"expression": expression, "returnByValue": True}
        call = {"id": self._calls, "method": "Runtime.evaluate", "params": params}
        await self._socket.send(json.dumps(call))
        while (answer := json.loads(await self._socket.recv())).get("id") != self._calls:
            pass
        return answer["result"]["result"].get("value")

    async def until_it_shows(self, text: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while await self.run("document.querySelector('output')?.textContent") != text:
                await asyncio.sleep(0.02)


def test_the_page_in_a_browser(shop, tmp_path):
    server, browser = shop
    chromium = find_browser()
    if chromium is None:
        pytest.skip(f"no browser is installed: {', '.join(BROWSERS)}")
    url = f"{browser.origin}/static/page.html"
    profile = f"--user-data-dir={tmp_path / 'profile'}"

    async def use(running: Process) -> None:
        running.wait_for_line("DevTools listening on ws://")
        port = re.findall(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/", "\n".join(running.err))
        tools = Browser(f"http://127.0.0.1:{port[0]}")
        async with asyncio.timeout(PATIENCE_S):
            while not (
                pages := [page for page in json.loads(tools.fetch("/json")) if page["url"] == url]
            ):
                await asyncio.sleep(0.02)
        async with connect(pages[0]["webSocketDebuggerUrl"], proxy=None) as socket:
            page = Page(socket)
            await page.until_it_shows("0")
            for expected in ("10", "20"):
                await page.run("document.querySelector('button').click()")
                await page.until_it_shows(expected)

    with process(chromium, *BROWSER_FLAGS, profile, url) as running:
        asyncio.run(use(running))
    assert server.stop() == 0


def test_a_shop_s_own_test_is_run_as_printed(tmp_path):
    (tmp_path / "shop.py").write_text(block("shop"))
    (tmp_path / "test_shop.py").write_text(block("shop_test"))
    for _ in range(2):  # the second time with what the first has left
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
            cwd=tmp_path,
            env={**os.environ, **environment()},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert "1 passed" in done.stdout, done.stdout


@pytest.mark.soak
def test_how_long_a_commit_takes_to_the_page(shop):
    _, browser = shop
    taken: list[float] = []

    async def use() -> None:
        async with await connected(browser) as socket:
            for expected in range(10, int(os.environ.get("TESTS_COMMITS", "500")) * 10 + 1, 10):
                begin = time.perf_counter()
                posted = asyncio.create_task(asyncio.to_thread(browser.fetch, "/deposit", {}))
                assert await total(socket) == str(expected)
                taken.append((time.perf_counter() - begin) * 1000)
                await posted

    asyncio.run(use())
    cuts = statistics.quantiles(taken, n=100)
    print(f"\nfrom the click to the page: median {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms")
