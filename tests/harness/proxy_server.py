"""A small proxy: CONNECT, plain HTTP requests, SOCKS5. Every host name is this machine to it."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from urllib.parse import urlsplit

import trio

USER, PASSWORD = "us er", "pa:ss@"


class ProxyServer:
    """What the proxy was asked for, and how it behaves.

    Args:
        secured: Whether it wants `USER` and `PASSWORD`.
    """

    def __init__(self, secured: bool = False) -> None:
        self.secured = secured
        self.port = 0
        self.asked: list[tuple[str, str, int]] = []
        """How it was asked, and for which host and port."""
        self.mute = False
        """Whether it takes connections and says nothing."""
        self.says: bytes | None = None
        """What it says in place of an answer, before it ends the connection."""
        self.in_pieces = False
        """Whether its answer to CONNECT comes byte by byte."""
        self.refuses = False
        """Whether it leads nowhere."""

    def url(self, scheme: str = "http", user: str | None = None) -> str:
        return f"{scheme}://{f'{user}@' if user else ''}127.0.0.1:{self.port}"

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(Exception):
                first = await stream.receive_some(1)
                if self.says is not None:
                    await stream.send_all(self.says)
                    return
                if self.mute:
                    await trio.sleep_forever()
                if first == b"\5":
                    await self._socks(stream)
                elif first:
                    await self._http(stream, first)

    async def _socks(self, stream: trio.SocketStream) -> None:
        methods = await _exactly(stream, (await _exactly(stream, 1))[0])
        method = 2 if self.secured else 0
        if method not in methods:
            await stream.send_all(b"\5\xff")
            return
        await stream.send_all(bytes([5, method]))
        if method == 2:
            await _exactly(stream, 1)
            user = await _exactly(stream, (await _exactly(stream, 1))[0])
            password = await _exactly(stream, (await _exactly(stream, 1))[0])
            good = (user.decode(), password.decode()) == (USER, PASSWORD)
            await stream.send_all(b"\1\0" if good else b"\1\1")
            if not good:
                return
        _, _, _, kind = await _exactly(stream, 4)
        if kind == 3:
            host = (await _exactly(stream, (await _exactly(stream, 1))[0])).decode()
        else:
            host = ".".join(map(str, await _exactly(stream, 4)))
        port = int.from_bytes(await _exactly(stream, 2), "big")
        self.asked.append(("socks5", host, port))
        if self.refuses:
            await stream.send_all(b"\5\4\0\1\0\0\0\0\0\0")
            return
        async with await trio.open_tcp_stream("127.0.0.1", port) as there:
            await stream.send_all(b"\5\0\0\1\0\0\0\0\0\0")
            await _relay(stream, there)

    async def _http(self, stream: trio.SocketStream, head: bytes) -> None:
        head = await _head(stream, head)
        method, target, _ = head.partition(b"\r\n")[0].decode().split(" ")
        wanted = base64.b64encode(f"{USER}:{PASSWORD}".encode())
        if self.secured and b"proxy-authorization: basic " + wanted.lower() not in head.lower():
            await stream.send_all(
                b"HTTP/1.1 407 Proxy Authentication Required\r\n"
                b"Proxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n"
            )
            return
        parts = urlsplit(target if method != "CONNECT" else f"//{target}")
        host, port = parts.hostname or "", parts.port or 80
        self.asked.append((method, host, port))
        if self.refuses:
            await stream.send_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        async with await trio.open_tcp_stream("127.0.0.1", port) as there:
            if method == "CONNECT":
                answer = b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n"
                for start in range(0, len(answer), 1 if self.in_pieces else len(answer)):
                    await stream.send_all(answer[start : start + (1 if self.in_pieces else 99)])
                    await trio.sleep(0.001 if self.in_pieces else 0)
                await _relay(stream, there)
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_copy, there, stream)
                while True:  # a GET has no body, which another head would stand behind
                    _, _, rest = head.partition(b"://")
                    await there.send_all(f"{method} /".encode() + rest.partition(b"/")[2])
                    head = await _head(stream, b"")


async def _exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


async def _head(stream: trio.SocketStream, begin: bytes) -> bytes:
    while not begin.endswith(b"\r\n\r\n"):
        begin += await _exactly(stream, 1)
    return begin


async def _copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    async for data in source:
        await sink.send_all(data)
    raise EOFError


async def _relay(one: trio.SocketStream, other: trio.SocketStream) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_copy, one, other)
        nursery.start_soon(_copy, other, one)


@asynccontextmanager
async def proxy_running(secured: bool = False) -> AsyncIterator[ProxyServer]:
    proxy = ProxyServer(secured)
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, proxy.serve, 0, host="127.0.0.1")
        [listener] = await nursery.start(serve)
        proxy.port = listener.socket.getsockname()[1]
        yield proxy
        nursery.cancel_scope.cancel()
