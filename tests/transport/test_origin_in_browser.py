"""Which web pages a real browser lets connect, and we; see `test_origin.py` for every other way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from harness.browser import BROWSER_FLAGS, BROWSERS, find_browser
from harness.room import lines
from harness.support import SECRET, free_port, hypercorn_serving, process, until

from trading_push import JwtAuthenticator, PushService, open_push_service
from trading_push.settings.schema import Auth, Server, Settings

# It asks for an image by the name of what came of it, which a page of any origin may.
PAGE = """\
<!doctype html><title>-</title><script>
const told = what => {{
  document.title = what;
  new Image().src = "http://127.0.0.1:{port}/told/" + what;
}};
const socket = new WebSocket("ws://127.0.0.1:{port}/ws");
socket.onopen = () => told("open");
socket.onerror = () => told("refused");
</script>"""
FRAME = '<!doctype html><iframe sandbox="allow-scripts" src="/page"></iframe>'


@pytest.fixture(scope="module")
def browser() -> str:
    found = find_browser()
    if found is None:
        pytest.skip(f"no browser is installed: {', '.join(BROWSERS)}")
    return found


class Site:
    """Pages beside the service, on the same port; `told` is what the browser has come to."""

    def __init__(self, service: PushService) -> None:
        self._service = service
        self.told: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._service.asgi_app(scope, receive, send)
            return
        path: str = scope["path"]
        body = {"/page": PAGE.format(port=scope["server"][1]), "/frame": FRAME}.get(path, "")
        if path.startswith("/told/"):
            self.told.append(path.removeprefix("/told/"))
        headers = [(b"content-type", b"text/html"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body.encode()})


@asynccontextmanager
async def site(origins: str, port: int) -> AsyncIterator[Site]:
    async with open_push_service(
        settings=Settings(server=Server(origins=origins)),
        authenticate=JwtAuthenticator(Auth(), SECRET),
    ) as service:
        made = Site(service)
        async with hypercorn_serving(made, bind=[f"127.0.0.1:{port}"]):
            yield made


SAME_HOST = "http://127.0.0.1:{port}/page"
OTHER_HOST = "http://localhost:{port}/page"
FRAMED = "http://127.0.0.1:{port}/frame"


@pytest.mark.parametrize(
    ("url", "origins", "refused"),
    [
        (SAME_HOST, "", None),
        (OTHER_HOST, "", None),
        (FRAMED, "", "null"),
        (OTHER_HOST, "http://localhost:{port}", None),
        (SAME_HOST, "https://app.example.com", None),
    ],
    ids=["same host", "other host", "sandboxed", "other host, listed", "not listed, of loopback"],
)
async def test_a_page_in_a_browser(browser, url, origins, refused, tmp_path, caplog):
    caplog.set_level("INFO", "trading_push")
    port = free_port()
    async with site(origins.format(port=port), port) as served:
        with process(browser, *BROWSER_FLAGS, f"--user-data-dir={tmp_path}", url.format(port=port)):
            await until(lambda: served.told)
    said = [line for line in lines(caplog) if "拒绝来源" in line]
    if refused is None:
        assert served.told == ["open"]
        assert said == []
    else:  # by us, and not by the browser itself
        assert served.told == ["refused"]
        assert said == [f"⚠️ 拒绝来源: {refused.format(port=port)} - 来自: 127.0.0.1"]
