"""An HTTP source that is tried, by either of its libraries, and services that break the rules."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio

from trading_push import SourceError
from trading_push.sources.http.source import HttpSource

HTTP_CLIENT: Any = os.environ.get("TESTS_HTTP_CLIENT", "httpx")
"""The library that the source is tried with."""

TOKEN = "t0p-secret.token"


@asynccontextmanager
async def reading(url: str, **options: Any) -> AsyncIterator[HttpSource]:
    async with aclosing(HttpSource(url, client=HTTP_CLIENT, **options)) as source:
        yield source


Script = Callable[["Peer"], Awaitable[None]]


class Peer:
    """One connection of a service that breaks the rules."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.send = stream.send_all

    async def request(self) -> bytes:
        """The head of the next request; nothing at the end."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                return b""
            if not data:
                return b""
            head += data
        return head

    def reset(self) -> None:
        """Cut the connection as a crash does."""
        linger = b"\1\0\0\0\0\0\0\0"
        self.stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, linger)
        self.stream.socket.close()


def ok(body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *headers, b"", body]
    return b"\r\n".join(lines)


@asynccontextmanager
async def scripted(
    *scripts: Script, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Any]:
    """Serve each connection by the next script, the last one again and again; URL and count."""
    count = 0

    async def handle(stream: trio.SocketStream) -> None:
        nonlocal count
        count += 1
        script = scripts[min(count, len(scripts)) - 1]
        if tls is None:
            async with stream:
                await script(Peer(stream))
            return
        held = HeldStream(stream)
        secured = trio.SSLStream(held, tls, server_side=True, https_compatible=True)
        async with secured:
            peer = Peer(secured)
            peer.held = held
            await script(peer)

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, handle, 0, host=host))
        scheme = "https" if tls else "http"
        port = listener.socket.getsockname()[1]
        yield f"{scheme}://localhost:{port}/{{user_id}}/{{data_type}}", lambda: count
        nursery.cancel_scope.cancel()


class HeldStream(trio.abc.Stream):
    """A stream that sends, while it is held, nothing; and then all at once."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._waiting = bytearray()
        self.hold = False

    async def send_all(self, data: Any) -> None:
        self._waiting += data
        if not self.hold:
            waiting, self._waiting = self._waiting, bytearray()
            await self._stream.send_all(waiting)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


async def answering(peer: Peer) -> None:
    """What a good service does: the path as JSON, on a connection that is kept."""
    while head := await peer.request():
        await peer.send(ok(json.dumps(head.split()[1].decode()).encode()))


async def failure(source: HttpSource, user: str = "4") -> SourceError:
    with pytest.raises(SourceError) as caught:
        await source.fetch(user, "balance")
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value
