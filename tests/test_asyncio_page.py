"""docs/asyncio.md as printed: publishing, subscribing, and trio as a guest of asyncio's loop."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from harness.readme import block
from harness.support import PATIENCE_S, SECRET, client, free_port, process, serving, token

from trading_push import issue_token

fastapi = pytest.importorskip("fastapi", reason="FastAPI is not installed")

PRINTED = "127.0.0.1:8000"
PUBLISHER = issue_token(SECRET, "shop", 3600, {"publish": True})


def run_block(program: str, address: str, printed: str = PRINTED) -> dict[str, Any]:
    """Execute a printed program for a server at another address; its names."""
    assert program.count(printed) == 1
    names: dict[str, Any] = {"__name__": "shop"}
    exec(compile(program.replace(printed, address), "asyncio.md", "exec"), names)
    return names


def asking(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop")


def test_a_view_publishes_as_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("TRADING_PUSH_JWT_SECRET", SECRET)

    async def use(url: str, address: str) -> None:
        shop = run_block(block("asyncio_publisher"), address)
        post = run_block(block("asyncio_post"), address)
        async with (
            asyncio.timeout(PATIENCE_S),
            client(url, 4) as four,
            asking(shop["app"]) as browser,
            httpx.AsyncClient(trust_env=False) as plain,
        ):
            await four.subscribe("pnl", "balance")
            assert (await browser.post("/deposit/4")).status_code == 200
            await four.until(
                lambda push: push.get("data") == [{"asset": "USDT", "total": "110.00"}]
            )
            await post["publish"](plain, PUBLISHER, "pnl", {"total": "1.50"}, "4")
            await four.until(lambda push: push.get("data") == {"total": "1.50"})
            with pytest.raises(httpx.HTTPStatusError):
                await post["publish"](plain, PUBLISHER, "nope", 1, "4")
        shop["publisher"].close()

    with serving(tmp_path) as server:
        asyncio.run(use(server.url, server.url.removeprefix("ws://").removesuffix("/ws")))
        assert server.traces() == []


def test_a_client_comes_back_and_goes_when_it_is_told_as_printed(tmp_path):
    port = free_port()
    program = block("asyncio_client").replace(PRINTED, f"127.0.0.1:{port}")
    (tmp_path / "reader.py").write_text(program)
    reader = (sys.executable, str(tmp_path / "reader.py"))
    flags = ("--port", str(port))
    env = {"TRADING_PUSH_TOKEN": token(4)}
    operator = issue_token(SECRET, "ops", 60, {"admin": True})
    with serving(tmp_path, *flags) as server, process(*reader, env=env) as running:
        running.wait_for_line("'type': 'snapshot'", running.out)
        assert server.stop() == 0
        with serving(tmp_path, *flags):
            running.wait_for_line("'type': 'snapshot'", running.out, count=2)
            kick = httpx.post(
                f"http://127.0.0.1:{port}/kick",
                json={"user": "4"},
                headers={"Authorization": f"Bearer {operator}"},
                trust_env=False,
            )
            assert kick.json() == {"ok": True, "closed": 1}
            running.wait_for_line("4503")
            assert running.popen.wait(PATIENCE_S)


def test_trio_is_a_guest_as_printed():
    port = free_port()

    async def use() -> None:
        shop = run_block(block("asyncio_guest"), f'127.0.0.1", {port}', '127.0.0.1", 8000')
        app = shop["app"]
        async with asyncio.timeout(PATIENCE_S), asking(app) as browser:
            async with app.router.lifespan_context(app):
                socket = await connect(f"ws://127.0.0.1:{port}/ws", proxy=None)
                await socket.send(json.dumps({"op": "auth", "token": "4"}))
                await socket.send(json.dumps({"op": "subscribe", "args": ["balance"]}))
                assert (await browser.post("/deposit/4")).status_code == 200
                while "data" not in (push := json.loads(await socket.recv())):
                    pass
                assert push["data"] == [{"asset": "USDT", "total": "110.00"}]
            await socket.wait_closed()
            assert socket.close_code == 1012

    asyncio.run(use())


def test_a_guest_that_cannot_begin_says_so_as_printed():
    async def use() -> None:
        taken = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = taken.sockets[0].getsockname()[1]
        shop = run_block(block("asyncio_guest"), f'127.0.0.1", {port}', '127.0.0.1", 8000')
        app = shop["app"]
        with pytest.raises((OSError, ExceptionGroup)) as error:
            async with asyncio.timeout(PATIENCE_S), app.router.lifespan_context(app):
                pass
        assert "in use" in repr(error.value) or "98" in repr(error.value)
        taken.close()

    asyncio.run(use())
