"""A service behind each of its endpoints, and clients that connect the same way to all."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import attrs
import trio
import trio.testing
import trio_websocket

from harness.support import SECRET, TrioClient, hypercorn_serving, token

from trading_push import Channel, JwtAuthenticator, open_push_service
from trading_push.endpoints.hypercorn.server import guard
from trading_push.service import PushService
from trading_push.settings.schema import Auth, Limits, Server, Settings
from trading_push.testing import MemoryTransport, peer

KINDS = ["linked", "plain", "native", "linked-tls", "native-tls"]
EVERY = [*KINDS, "memory"]
RAW = ["linked", "native"]


@attrs.frozen
class Endpoint:
    """A service behind one of its endpoints."""

    kind: str
    service: PushService
    port: int
    connect: Callable[..., AbstractAsyncContextManager[TrioClient]]


@asynccontextmanager
async def served(kind: str, service: PushService, certificates: Any) -> AsyncIterator[int]:
    pem, _ = certificates
    tls = kind.endswith("tls")
    if kind == "memory":
        yield 0
        return
    if kind.startswith("native"):
        context = None
        if tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(pem)
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(
                partial(service.serve_native, "127.0.0.1", 0, ssl_context=context)
            )
            yield listeners[0].socket.getsockname()[1]
            nursery.cancel_scope.cancel()
        return

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def passed_on(message: Any) -> None:
            await send(message)

        await service.asgi_app(scope, receive, passed_on)

    app = wrapped if kind == "plain" else service
    files = {"certfile": str(pem), "keyfile": str(pem)} if tls else {}
    async with hypercorn_serving(app, **files) as port:
        yield port


@asynccontextmanager
async def open_endpoint(
    kind: str,
    certificates: Any,
    *,
    limits: Limits | None = None,
    server: Server | None = None,
    authenticate: Any = None,
    auth: Auth | None = None,
    channels: Sequence[Channel] = (),
) -> AsyncIterator[Endpoint]:
    limits = limits or Limits()
    old, guard.limits = guard.limits, limits
    try:
        async with (
            open_push_service(
                settings=Settings(limits=limits, server=server or Server(), auth=auth or Auth()),
                authenticate=authenticate or JwtAuthenticator(Auth(), SECRET),
                channels=channels,
            ) as service,
            served(kind, service, certificates) as port,
        ):

            @asynccontextmanager
            async def connect(
                user: str | int | None = None, *channels: Any, **options: Any
            ) -> AsyncIterator[TrioClient]:
                if kind == "memory":
                    async with in_memory(service, user, *channels) as made:
                        yield made
                    return
                path = options.pop("path", "/ws")
                tls = certificates[1] if kind.endswith("tls") else False
                async with trio.open_nursery() as nursery:
                    websocket = await trio_websocket.connect_websocket(
                        nursery, "localhost" if tls else "127.0.0.1", port, path,
                        use_ssl=tls, **options
                    )  # fmt: skip
                    made = TrioClient(websocket)
                    try:
                        if user is not None:
                            assert (await made.request("auth", token=token(user)))["ok"]
                        if channels:
                            reply = await made.request("subscribe", args=list(channels))
                            assert reply["ok"], reply
                        yield made
                        with trio.move_on_after(2):
                            await websocket.aclose()
                    finally:
                        await trio.aclose_forcefully(websocket._stream)
                    nursery.cancel_scope.cancel()

            yield Endpoint(kind, service, port, connect)
            with trio.fail_after(10):
                while service.statistics().connections:
                    await trio.sleep(0.01)
            assert service.statistics().ledger.balanced
    finally:
        guard.limits = old


class MemorySocket:
    """The transport in memory, with the few methods of a trio-websocket that the tests use."""

    def __init__(self, transport: MemoryTransport) -> None:
        self._transport = transport

    async def send_message(self, message: str | bytes) -> None:
        self._transport.say_text(message)

    async def get_message(self) -> str:
        while not self._transport.sent:
            if self._transport.closed_with is not None:
                reason = trio_websocket.CloseReason(*self._transport.closed_with)
                raise trio_websocket.ConnectionClosed(reason)
            await trio.sleep(0.001)
        return json.dumps((await self._transport.next())[0])

    async def aclose(self, code: int = 1000, reason: str | None = None) -> None:
        self._transport.leave(code, reason or "")


@asynccontextmanager
async def in_memory(
    service: PushService, user: str | int | None, *channels: Any
) -> AsyncIterator[TrioClient]:
    async with peer(service) as transport:
        made = TrioClient(MemorySocket(transport))
        if user is not None:
            assert (await made.request("auth", token=token(user)))["ok"]
        if channels:
            assert (await made.request("subscribe", args=list(channels)))["ok"]
        yield made
        await made.socket.aclose()


async def status_of(endpoint: Endpoint, request: bytes, certificates: Any) -> int:
    """The status that a handshake is refused with."""
    return int((await answer_of(endpoint, request, certificates)).split(b" ")[1])


async def answer_of(endpoint: Endpoint, request: bytes, certificates: Any) -> bytes:
    """All that a handshake is refused with."""
    stream: Any = await trio.open_tcp_stream("127.0.0.1", endpoint.port)
    if endpoint.kind.endswith("tls"):
        stream = trio.SSLStream(stream, certificates[1], server_hostname="localhost")
    async with stream:
        await stream.send_all(request)
        answer = b""
        with trio.move_on_after(1):  # where the server keeps the connection for another request
            try:
                while data := await stream.receive_some():
                    answer += data
            except trio.BrokenResourceError:
                pass
        if endpoint.kind.endswith("tls"):
            await trio.aclose_forcefully(stream)
    return answer
