"""A service with peers in memory, and what its log tells of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from trading_push import AuthenticationError, Principal, PushService, open_push_service
from trading_push.connections.connection import Connection
from trading_push.connections.registry import Registry
from trading_push.testing import MemoryTransport


async def by_name(token: str) -> Principal:
    """A token names its user, and itself after a blank; some stand for what goes wrong."""
    await trio.lowlevel.checkpoint()
    if token == "bug":
        raise RuntimeError("the application's own mistake")
    if token == "hang":
        await trio.sleep_forever()
    if token == "bad":
        raise AuthenticationError
    user, _, token_id = token.partition(" ")
    return Principal(user, token_id=token_id or None)


class Room:
    """A service with peers in memory."""

    def __init__(self, service: PushService, nursery: trio.Nursery) -> None:
        self.service = service
        self._nursery = nursery

    def join(self, **options: Any) -> tuple[MemoryTransport, Connection]:
        transport = MemoryTransport(**options)
        seat = self.service.context.seats.take()
        connection = Connection(self.service.context, transport, seat)
        self._nursery.start_soon(connection.run)
        return transport, connection

    async def subscribed(
        self, *channels: str, **options: Any
    ) -> tuple[MemoryTransport, Connection]:
        transport, connection = self.join(**options)
        transport.say("auth", token="4")
        transport.say("subscribe", args=list(channels))
        await transport.next(2)
        await trio.testing.wait_all_tasks_blocked()
        transport.sent.clear()
        return transport, connection


@asynccontextmanager
async def room(**options: Any) -> AsyncIterator[Room]:
    options.setdefault("authenticate", by_name)
    async with trio.open_nursery() as nursery, open_push_service(**options) as service:
        yield Room(service, nursery)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def unit(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the one connection that has left."""
    found = lines(caplog)
    [start] = [i for i, line in enumerate(found) if "连接关闭" in line]
    end = next(i for i, line in enumerate(found) if "当前在线用户数" in line)
    return found[start : end + 1]


class Order(trio.abc.Instrument):
    """Records in which order a connection's end goes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        original = Connection.stop_sending
        leave = Registry.leave

        def flag_closed(connection: Connection) -> None:
            if not connection.closed:
                self.events.append("flagged closed")
            original(connection)

        def left(registry: Registry, *args: Any) -> None:
            self.events.append("leave posted")
            leave(registry, *args)

        monkeypatch.setattr(Connection, "stop_sending", flag_closed)
        monkeypatch.setattr(Registry, "leave", left)

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        if task.name.endswith("Subscription.run"):
            self.events.append("sender ended")

    def watch(self, transport: MemoryTransport) -> None:
        original = transport.close

        async def close(code: int, reason: str) -> None:
            self.events.append("transport closed")
            await original(code, reason)

        transport.close = close

    def check(self, senders: int) -> None:
        assert self.events == [
            "flagged closed",
            *["sender ended"] * senders,
            "leave posted",
            "transport closed",
        ]
