"""A proxy that connects by a Unix socket: who its clients are, and that limits are about them."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from harness.room import lines
from harness.support import SECRET, hypercorn_serving

from trading_push import open_push_service
from trading_push.settings.schema import Limits, Server, Settings

HANDSHAKE = (
    "GET /ws HTTP/1.1\r\nHost: push.example.com\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "X-Forwarded-For: {address}\r\n\r\n"
)


async def status(path: Path, address: str, opened: list[trio.SocketStream]) -> bytes:
    stream = await trio.open_unix_socket(str(path))
    opened.append(stream)
    await stream.send_all(HANDSHAKE.format(address=address).encode())
    return bytes(await stream.receive_some())[9:12]


@pytest.mark.parametrize("trusted", ["unix:", "10.0.0.0/8 unix:", "10.0.0.0/8", ""])
async def test_each_client_has_limits_of_its_own(tmp_path, caplog, trusted):
    caplog.set_level("INFO", "trading_push")
    path = tmp_path / "push.socket"
    settings = Settings(
        jwt_secret=SECRET,
        server=Server(trusted_proxies=trusted),
        limits=Limits(unauthenticated_per_address=1),
    )
    opened: list[trio.SocketStream] = []
    async with (
        open_push_service(settings=settings) as service,
        hypercorn_serving(service, bind=["127.0.0.1:0", f"unix:{path}"]),
    ):
        answers = [await status(path, f"192.0.2.{number}", opened) for number in (1, 2, 2)]
        for stream in opened:
            await stream.aclose()
    if "unix:" in trusted:
        assert answers == [b"101", b"101", b"503"]
        assert "🔌 WebSocket客户端连接 - 来自: 192.0.2.2" in lines(caplog)
    else:
        assert answers == [b"101", b"503", b"503"]
        assert "🔌 WebSocket客户端连接 - 来自: -" in lines(caplog)
