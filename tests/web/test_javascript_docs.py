"""What docs/javascript.md prints: its examples run, and its lists are those of the module."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest

from harness import browser
from harness.javascript import CLIENT, node_modules
from harness.readme import PAGES, block
from harness.support import SECRET, free_port, hypercorn_serving, process, token, until

from trading_push import Ticker, open_push_service
from trading_push.errors import may_reconnect
from trading_push.settings.schema import Settings

PAGE = PAGES["docs/javascript.md"]
MODULE = CLIENT.read_text("utf-8")

# It tells what the page shows, whenever that changes.
SPY = """
<script type="module">
  const told = (body) => fetch("/told", { method: "POST", body });
  const tell = () => told(document.body.innerText);
  new MutationObserver(tell).observe(document, { childList: true, subtree: true });
  addEventListener("unhandledrejection", ({ reason }) => told(reason));
</script>
"""


def test_the_events_are_those_of_the_module():
    table = PAGE.split("| event | `detail` |")[1].split("\n\n")[0]
    typed = MODULE.split("@typedef {object} ClientEvents")[1].split("*/")[0]
    names = re.findall(r"@property \{.*?\}+ (\w+) ", typed.replace("\n *  ", " "))
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == names
    assert names == ["state", "gap", "refused", "notice", "rtt"]


def test_the_codes_that_end_it_are_the_protocols():
    [final] = re.findall(r"FINAL_CODES = new Set\(\[(.*?)\]\)", MODULE)
    ends = {int(code) for code in final.split(",")}
    assert ends == {code for code in range(1000, 4000) if not may_reconnect(code)}
    assert {code: may_reconnect(code) for code in (4499, 4500, 4999)} == {
        4499: True,
        4500: False,
        4999: False,
    }


class Site:
    """A shop's own page, in front of the service."""

    def __init__(self, service: Any, page: str) -> None:
        self._service = service
        self._page = page
        self.told = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path")
        if path not in ("/", "/token", "/told"):
            await self._service.asgi_app(scope, receive, send)
            return
        if path == "/told":
            message = await receive()
            self.told += message["body"].decode()  # one may overtake another
        body = {"/": self._page + SPY, "/token": token(4)}.get(path, "")
        headers = [(b"content-type", b"text/html"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body.encode()})


@pytest.mark.browser
async def test_the_page_as_printed(tmp_path):
    program = browser.find_browser()
    if program is None:
        pytest.skip(f"no browser is installed: {', '.join(browser.BROWSERS)}")
    port = free_port()
    page = block("javascript_page").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    async with open_push_service(settings=Settings(jwt_secret=SECRET)) as service:
        site = Site(service, page)
        async with hypercorn_serving(site, bind=[f"127.0.0.1:{port}"]):
            # By another name than that of the module: an import from another origin.
            url = f"http://localhost:{port}/"
            with process(program, *browser.BROWSER_FLAGS, f"--user-data-dir={tmp_path}", url):
                await until(lambda: "open" in site.told)
                await service.publish("positions", [{"symbol": "BTCUSDT"}], user="4")
                await service.publish("ticker.BTCUSDT", Ticker("BTCUSDT", "61500.10"))
                await until(lambda: "61500.10" in site.told and '"symbol"' in site.told)


@pytest.mark.browser
async def test_the_program_as_printed(tmp_path):
    modules, node = node_modules(), shutil.which("node")
    if modules is None or node is None or not (modules / "ws").is_dir():
        pytest.skip("Node, or npm's package `ws` in $TESTS_NODE_MODULES, is not installed")
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "ws").symlink_to(modules / "ws")
    (tmp_path / "node_modules" / "trading-push").symlink_to(CLIENT.parent)
    async with (
        open_push_service(settings=Settings(jwt_secret=SECRET)) as service,
        hypercorn_serving(service) as port,
    ):
        program = block("javascript_node").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        (tmp_path / "program.mjs").write_text(program, "utf-8")
        await service.publish("balance", [{"free": "1.10"}], user="4")
        with process(node, "program.mjs", env={"TOKEN": token(4)}, cwd=tmp_path) as running:
            await until(lambda: any("balance snapshot" in line for line in running.out))
            assert running.err == []
    assert 'balance snapshot [{"free":"1.10"}]' in running.out
