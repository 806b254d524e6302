"""Sources that a test writes to, a service that asks them, and an HTTP service to be asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

from harness.room import by_name

from trading_push import PushService, open_push_service
from trading_push.connections.connection import Connection
from trading_push.settings.schema import Intervals, Settings
from trading_push.testing import MemoryTransport

FAST = Settings(intervals=Intervals(balance=1, positions=1, pnl=1, orders=1))


class Table:
    """A source that a test writes to; `calls` says who was asked."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], Any] = {}
        self.calls: list[tuple[float, str, str]] = []
        self.error: Exception | None = None
        self.stuck: set[str] = set()

    async def fetch(self, user_id: str, data_type: str) -> Any:
        self.calls.append((trio.current_time(), user_id, data_type))
        await trio.lowlevel.checkpoint()
        if user_id in self.stuck:
            await trio.sleep(30)
        if self.error is not None:
            raise self.error
        return self.values.get((user_id, data_type), [])


@asynccontextmanager
async def serving(source: Any, **options: Any) -> AsyncIterator[tuple[PushService, Any]]:
    options.setdefault("settings", FAST)
    async with (
        trio.open_nursery() as nursery,
        open_push_service(source, authenticate=by_name, **options) as service,
    ):

        async def join(user: str, *channels: Any) -> MemoryTransport:
            transport = MemoryTransport()
            nursery.start_soon(
                Connection(service.context, transport, service.context.seats.take()).run
            )
            transport.say("auth", token=user)
            transport.say("subscribe", args=list(channels))
            await transport.next(2)
            return transport

        yield service, join


async def failing_when_cancelled() -> None:
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise OSError("the socket is gone")

        nursery.start_soon(read)
        await trio.sleep_forever()


BALANCE = b'[{"asset": "USDT", "free": 0.10, "total": 12345678901234567890.1234567890}]'


class Service:
    """Answers by `answer`, or by the turns in `turns`; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.turns: list[tuple[int, bytes, dict[str, str]]] = []
        self.answer: Callable[[str], tuple[int, bytes, dict[str, str]]] = lambda path: (
            200,
            BALANCE,
            {},
        )
        self.arrived = trio.Event()
        self.go_on = trio.Event()
        self.go_on.set()
        self.port = 0

    def url(self, path: str = "/users/{user_id}/{data_type}") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def say(self, body: bytes, status: int = 200, **headers: str) -> None:
        """Answer with this from now on; `_` in a header's name stands for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answer = lambda path: (status, body, named)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            assert message["type"] == "lifespan.shutdown"
            await send({"type": "lifespan.shutdown.complete"})
            return
        query = scope["query_string"].decode()
        path = scope["raw_path"].decode() + (f"?{query}" if query else "")
        self.asked.append(path)
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        self.arrived.set()
        await self.go_on.wait()
        status, body, headers = self.turns.pop(0) if self.turns else self.answer(path)
        named = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": named})
        for start in range(0, len(body), 65_536):
            part = body[start : start + 65_536]
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
