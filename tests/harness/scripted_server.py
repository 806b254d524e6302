"""A small real WebSocket server that follows a script, for tests of clients."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio
import trio_websocket


class Peer:
    """The server's end of one connection."""

    def __init__(self, websocket: trio_websocket.WebSocketConnection) -> None:
        self.websocket = websocket

    async def receive(self, op: str) -> dict[str, Any]:
        """The next request, which must be an `op`.

        A ping, or a question for what there is, may come before it, and is answered.
        """
        while True:
            request: dict[str, Any] = json.loads(await self.websocket.get_message())
            if request["op"] == op:
                return request
            assert request["op"] in ("ping", "channels"), request
            if request["op"] == "ping":
                await self.send(op="pong", id=request.get("id"), ts=1)
            else:
                await self.send(op="channels", id=request["id"], ok=True, channels=[])

    async def send(self, **message: object) -> None:
        await self.websocket.send_message(json.dumps(message))

    async def authenticate(self, heartbeat_s: float = 15) -> str:
        """Accept whatever token comes."""
        request = await self.receive("auth")
        await self.send(
            op="auth",
            id=request["id"],
            ok=True,
            user="4",
            conn="c",
            expires_in=900,
            heartbeat_s=heartbeat_s,
        )
        return str(request["token"])

    async def subscribe(self, spelled: Callable[[str], str] = str) -> list[Any]:
        """Accept whatever is subscribed; returns the items."""
        request = await self.receive("subscribe")
        names = [item if isinstance(item, str) else item["channel"] for item in request["args"]]
        results = [{"channel": spelled(name), "ok": True} for name in names]
        await self.send(op="subscribe", id=request["id"], ok=True, results=results)
        return list(request["args"])

    async def open(self) -> list[Any]:
        await self.authenticate()
        return await self.subscribe()

    async def push(
        self, seq: int, prev: int | None = None, *, epoch: str = "e", channel: str = "balance"
    ) -> None:
        place = {"type": "snapshot"} if prev is None else {"type": "update", "prev": prev}
        await self.send(channel=channel, **place, epoch=epoch, seq=seq, ts=1, data=[seq])

    async def send_bytes(self, data: bytes) -> None:
        """Write what is no frame that wsproto would make."""
        await self.websocket._stream.send_all(data)

    async def refuse(self, code: str, *, retryable: bool = False, message: str = "no way") -> str:
        """Refuse the token of the next `auth`; returns it."""
        request = await self.receive("auth")
        error = {"code": code, "message": message, "retryable": retryable}
        await self.send(op="error", id=request["id"], ok=False, error=error)
        return str(request["token"])

    async def until_closed(self) -> int:
        """Read on until the client is gone; returns its close code."""
        with suppress(trio_websocket.ConnectionClosed):
            while True:
                await self.websocket.get_message()
        assert self.websocket.closed is not None
        return self.websocket.closed.code


Script = Callable[[Peer, int], Awaitable[None]]
Reject = Callable[[int], int | None]


@asynccontextmanager
async def server(
    script: Script, *, reject: Reject = lambda number: None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """A server that runs `script(peer, n)` for its n-th connection, counted from 0.

    Where `reject(n)` is a status, the handshake is answered with it.
    """
    count = 0

    async def handle(request: trio_websocket.WebSocketRequest) -> None:
        nonlocal count
        number, count = count, count + 1
        if (status := reject(number)) is not None:
            await request.reject(status)
            return
        offered = request.proposed_subprotocols  # browsers insist on the echo
        websocket = await request.accept(subprotocol=next(iter(offered), None))
        with suppress(trio_websocket.ConnectionClosed):
            await script(Peer(websocket), number)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            running = await nursery.start(
                trio_websocket.serve_websocket, handle, "127.0.0.1", 0, tls
            )
            yield f"{'wss' if tls else 'ws'}://127.0.0.1:{running.port}/ws"
            nursery.cancel_scope.cancel()
