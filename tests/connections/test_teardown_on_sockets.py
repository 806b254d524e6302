"""How connections end on real sockets: a peer that does not read, and a service that is left."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
import trio_websocket

from harness.frames import masked
from harness.handshakes import handshake
from harness.room import Order, lines
from harness.support import SECRET, SIX, hypercorn_serving, token, trio_client, until

from trading_push import JwtAuthenticator, PushService, open_push_service
from trading_push.endpoints.asgi import AsgiTransport
from trading_push.endpoints.native import NativeTransport
from trading_push.errors import CloseCode
from trading_push.settings.schema import Auth, Settings

CLIENTS = 200
ENDPOINTS = ["linked", "native"]
BIG = "x" * 8_000_000  # more than the buffers of both ends hold

open_service = partial(
    open_push_service, settings=Settings(), authenticate=JwtAuthenticator(Auth(), SECRET)
)


@asynccontextmanager
async def serving(endpoint: str, service: PushService) -> AsyncIterator[int]:
    if endpoint == "linked":
        async with hypercorn_serving(service) as port:
            yield port
        return
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(service.serve_native, "127.0.0.1", 0))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def serve_on(
    endpoint: str, service: PushService, *, task_status: trio.TaskStatus[int]
) -> None:
    async with serving(endpoint, service) as port:
        task_status.started(port)
        await trio.sleep_forever()


async def subscribe_and_read_no_more(stream: trio.SocketStream, *args: Any) -> None:
    await stream.send_all(handshake())
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += await stream.receive_some()
    for request in ({"op": "auth", "token": token()}, {"op": "subscribe", "args": list(args)}):
        await stream.send_all(masked(0x81, json.dumps(request).encode()))


@pytest.fixture
async def order(monkeypatch):
    recorder = Order(monkeypatch)
    for kind in (AsgiTransport, NativeTransport):

        async def close(self: Any, code: int, reason: str, close: Any = kind.close) -> None:
            recorder.events.append("transport closed")
            await close(self, code, reason)

        monkeypatch.setattr(kind, "close", close)
    trio.lowlevel.add_instrument(recorder)
    yield recorder
    trio.lowlevel.remove_instrument(recorder)


def stuck_senders() -> int:
    """How many sender tasks are inside a send."""
    task = trio.lowlevel.current_root_task()
    tasks, found = [task], 0
    while tasks:
        task = tasks.pop()
        tasks += [each for nursery in task.child_nurseries for each in nursery.child_tasks]
        frames = [frame.f_code.co_name for frame, _ in task.iter_await_frames()]
        found += task.name.endswith("Subscription.run") and "send_frames" in frames
    return found


@pytest.mark.parametrize("end", ["close frame", "reset", "stopped", "service cancelled"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_the_order_with_senders_stuck_to_a_client_that_does_not_read(order, endpoint, end):
    with trio.fail_after(20), trio.CancelScope() as whole:
        async with open_service() as service, serving(endpoint, service) as port:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            # What is paced is written by its sender; the others wait for the turn to write.
            paced = {"channel": "pnl", "max_hz": 10}
            await subscribe_and_read_no_more(stream, paced, "balance", "ticker.A")
            await until(lambda: service.statistics().ledger.senders_started == 3)
            order.events.clear()
            while stuck_senders() < 2:
                await service.publish("pnl", BIG, user=4)
                await service.publish("balance", BIG, user=4)
                await trio.sleep(0.001)
            began = trio.current_time()
            match end:
                case "close frame":
                    await stream.send_all(masked(0x88, (1000).to_bytes(2, "big")))
                case "reset":
                    await trio.aclose_forcefully(stream)
                case "stopped":
                    [connection] = service.context.connections
                    connection.stop(CloseCode.KICKED, "kicked")
                case "service cancelled":
                    whole.cancel()
            await until(lambda: not service.context.connections)
    await trio.aclose_forcefully(stream)
    order.check(3)
    assert service.statistics().ledger.balanced
    # The deadline of a send is ten seconds; a connection that ends does not wait for it.
    assert trio.current_time() - began < 3


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_leaving_the_service_loses_no_unit(caplog, endpoint, cancelled):
    caplog.set_level(logging.INFO, "trading_push")
    codes: list[int] = []

    async def visit(port: int, user: int) -> None:
        async with trio_client(port, user, *SIX) as each:
            try:
                while True:
                    await each.receive()
            except trio_websocket.ConnectionClosed as error:
                codes.append(error.reason.code)

    with trio.fail_after(60):
        async with trio.open_nursery() as outside:
            with trio.CancelScope() as scope:
                async with open_service() as service:
                    port = await outside.start(serve_on, endpoint, service)
                    visitors = await outside.start(visitors_of, visit, port)
                    every = CLIENTS * len(SIX)
                    await until(lambda: service.statistics().ledger.subscriptions_opened == every)
                    if cancelled:
                        scope.cancel()
            await visitors.wait()
            outside.cancel_scope.cancel()
    assert codes == [1012] * CLIENTS
    found = lines(caplog)
    assert found.count("🔌 连接关闭: code=1012 reason='service restart' (服务重启)") == CLIENTS
    # Nothing stands between the lines of a unit, and each has all of its rooms.
    units = "\n".join(found).split("🔌 连接关闭: ")[1:]
    rooms = [unit.split("当前在线用户数")[0].count("🚪 退出") for unit in units]
    assert rooms == [len(SIX)] * CLIENTS
    assert found[-2:] == ["🔌 当前连接数: 0", "👤 当前在线用户数: 0"]
    assert service.statistics().ledger.balanced
    assert not [record for record in caplog.records if record.exc_info]


async def visitors_of(visit: Any, port: int, *, task_status: trio.TaskStatus[trio.Event]) -> None:
    gone = trio.Event()
    async with trio.open_nursery() as nursery:
        for user in range(CLIENTS):
            nursery.start_soon(visit, port, user)
        task_status.started(gone)
    gone.set()
