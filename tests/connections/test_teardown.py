"""How a connection ends: the order of it, whatever began it, and what the log says."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import trio
import trio.testing

from harness.room import Order, Room, by_name, lines, room, unit

from trading_push import (
    AuthenticationError,
    Channel,
    Principal,
    ServiceClosed,
    SourceError,
    open_push_service,
)
from trading_push.connections.connection import Connection
from trading_push.connections.members import Departure, Member
from trading_push.connections.registry import Registry
from trading_push.errors import CloseCode
from trading_push.settings.schema import Limits, Settings
from trading_push.testing import MemoryTransport
from trading_push.topics import Channels
from trading_push.transport.base import Close


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO, "trading_push")


@pytest.fixture
async def order(monkeypatch):
    recorder = Order(monkeypatch)
    trio.lowlevel.add_instrument(recorder)
    return recorder


def peer_leaves(transport: MemoryTransport, connection: Connection) -> None:
    transport.leave(1000, "done")


def peer_vanishes(transport: MemoryTransport, connection: Connection) -> None:
    transport.leave()


def we_stop(transport: MemoryTransport, connection: Connection) -> None:
    connection.stop(CloseCode.KICKED, "kicked")


def ten_bad_messages(transport: MemoryTransport, connection: Connection) -> None:
    for _ in range(10):
        transport.say_text("{")


def a_bug(transport: MemoryTransport, connection: Connection) -> None:
    transport.say("auth", token="bug")


@pytest.mark.parametrize(
    "end", [peer_leaves, peer_vanishes, we_stop, ten_bad_messages, a_bug], ids=lambda f: f.__name__
)
async def test_the_order_of_a_teardown(autojump_clock, order, end):
    async with room() as here:
        transport, connection = await here.subscribed("balance", "pnl", "ticker.A")
        order.watch(transport)
        end(transport, connection)
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(1)
        order.check(3)
        statistics = here.service.statistics()
        assert statistics.connections == statistics.users_online == 0
        assert statistics.ledger.balanced
        assert statistics.ledger.senders_started == 3


@pytest.mark.parametrize("end", [peer_leaves, we_stop], ids=lambda f: f.__name__)
async def test_the_order_with_a_sender_stuck_in_a_send(autojump_clock, order, end):
    async with room() as here:
        transport, connection = await here.subscribed("balance", "pnl", "ticker.A")
        order.watch(transport)
        transport.reading = trio.Event()
        await here.service.publish("pnl", 1, user=4)
        await trio.testing.wait_all_tasks_blocked()
        before = trio.current_time()
        end(transport, connection)
        while here.service.statistics().connections:
            await trio.sleep(0.1)
        order.check(3)
        # The send deadline is ten seconds; a connection that ends does not wait for it.
        assert trio.current_time() - before < 2


async def test_the_order_when_the_whole_service_is_cancelled(autojump_clock, order):
    with trio.CancelScope() as scope:
        async with room() as here:
            transport, _ = await here.subscribed("balance", "pnl", "ticker.A")
            order.watch(transport)
            transport.reading = trio.Event()
            await here.service.publish("pnl", 1, user=4)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep_forever()
    order.check(3)


async def test_a_stuck_send_meets_its_deadline(autojump_clock, caplog):
    async with room() as here:
        transport, _ = await here.subscribed("balance")
        transport.reading = trio.Event()
        began = trio.current_time()
        await here.service.publish("balance", 1, user=4)
        while here.service.statistics().connections:
            await trio.sleep(0.1)
        assert 10 <= trio.current_time() - began < 12
        assert unit(caplog)[0] == "⚠️ 连接关闭: code=4001 reason='too slow' (too slow)"


async def test_where_a_send_finds_the_peer_gone_a_line_says_so(autojump_clock, caplog):
    async with room() as here:
        transport, _ = await here.subscribed("balance", direct=False)
        transport._gone = True  # the peer has gone, and nobody has read that yet
        await here.service.publish("balance", 1, user=4)
        await trio.testing.wait_all_tasks_blocked()
        transport.leave(1001)
        await trio.testing.wait_all_tasks_blocked()
        found = lines(caplog)
        at = found.index("✅ 用户4已断开连接（正常）")
        # The close frame that was on its way is still read.
        assert found[at + 1] == "🔌 连接关闭: code=1001 reason='' (客户端离开页面)"


async def test_an_authenticate_that_raises(autojump_clock, caplog):
    async with room() as here:
        healthy, _ = await here.subscribed("ticker.A")
        transport, _ = here.join()
        transport.say("auth", id=9, token="bug")
        await trio.testing.wait_all_tasks_blocked()
        [reply] = transport.sent
        assert reply["op"] == "error"
        assert reply["id"] == 9
        assert reply["error"]["code"] == "internal"
        assert reply["error"]["retryable"] is True
        assert transport.closed_with == (1011, "internal error")
        traces = [record for record in caplog.records if record.exc_info]
        assert len(traces) == 1
        assert traces[0].levelno == logging.ERROR
        assert unit(caplog)[0].startswith("⚠️ 连接关闭: code=1011")
        await here.service.publish("ticker.A", 1)
        assert (await healthy.next(2))[1]["data"] == 1
        assert healthy.closed_with is None


async def test_a_clean_up_step_that_raises(autojump_clock, caplog):
    def on_leave(member: Member) -> None:
        raise RuntimeError("no clean-up today")

    async with room(on_leave=on_leave) as here:
        transport, _ = await here.subscribed("balance", "ticker.A")
        transport.leave(1000)
        await trio.testing.wait_all_tasks_blocked()
    assert unit(caplog) == [
        "🔌 连接关闭: code=1000 reason='' (正常关闭)",
        "🔌 WebSocket客户端断开连接 - 来自: 10.0.0.1",
        "👤 用户4退出所有房间",
        "   🚪 退出房间: balance_4",
        "📋 用户4取消订阅balance数据 - 剩余订阅者: 0",
        "   🚪 退出行情房间: ticker_A_4",
        "📊 用户4取消订阅A行情 - 剩余订阅者: 0",
        "   A无订阅者，移除",
        "✅ 用户4已退出所有房间并清理订阅",
        "⚠️ 断开连接处理出错: RuntimeError: no clean-up today",
        "用户4断开连接并清理所有订阅",
        "🔌 当前连接数: 0",
        "👤 当前在线用户数: 0",
    ]
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    ("said", "close"),
    [
        ([], (4502, "not authenticated in time")),
        ([{"op": "auth", "token": "hang"}], (4502, "not authenticated in time")),
        ([{"op": "auth", "token": "bad"}], (4500, "bad_token")),
    ],
)
async def test_not_authenticated(autojump_clock, said, close):
    async with room() as here:
        transport, _ = here.join()
        for message in said:
            transport.say(**message)
        began = trio.current_time()
        while transport.closed_with is None:
            await trio.sleep(0.1)
        assert transport.closed_with == close
        assert trio.current_time() - began < 11


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("ended_by", ["deadline", "cancellation"])
async def test_who_hangs_up_while_its_token_is_checked_has_gone(
    autojump_clock, caplog, first, ended_by
):
    """It is no restart of ours, and no token that came too late."""
    async with room() as here, trio.open_nursery() as nursery:
        transport = MemoryTransport()
        connection = Connection(here.service.context, transport, here.service.context.seats.take())
        nursery.start_soon(connection.run)
        if not first:
            transport.say("auth", token="4")
            await transport.next()
        transport.say("auth", token="hang")
        await trio.testing.wait_all_tasks_blocked()
        transport.leave()
        if ended_by == "cancellation":  # as Hypercorn does with what outlives its peer
            nursery.cancel_scope.cancel()
        await trio.sleep(11)
        assert here.service.statistics().connections == 0
    assert unit(caplog)[0] == "⚠️ 连接关闭: code=1006 reason='' (异常断开)" or unit(caplog)[1] == (
        "⚠️ 连接关闭: code=1006 reason='' (异常断开)"
    )


async def test_a_server_that_ends_itself_says_that_it_restarts(autojump_clock, caplog):
    async with room() as here, trio.open_nursery() as nursery:
        transport = MemoryTransport()
        connection = Connection(here.service.context, transport, here.service.context.seats.take())
        nursery.start_soon(connection.run)
        transport.say("auth", token="hang")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert transport.closed_with == (1012, "service restart")
    assert "(服务重启)" in unit(caplog)[0]


async def test_an_expired_token_is_the_end_unless_it_is_renewed(autojump_clock, monkeypatch):
    began = trio.current_time()
    monkeypatch.setattr("time.time", lambda: 1000 + trio.current_time() - began)

    async def until(token: str) -> Principal:
        return Principal("4", expires_at=float(token))

    async with (
        trio.open_nursery() as nursery,
        open_push_service(authenticate=until) as service,
    ):
        transport, _ = Room(service, nursery).join()
        transport.say("auth", token="1060")
        assert (await transport.next())[0]["expires_in"] == 60
        await trio.sleep(50)
        assert (await transport.request("auth", token="1100"))["expires_in"] == 50
        await trio.sleep(54)  # the leeway is five seconds
        assert transport.closed_with is None
        await trio.sleep(2)
        assert transport.closed_with == (4003, "token expired")


async def test_a_tokens_end_is_told_of_once_for_each_token(autojump_clock, monkeypatch):
    began = trio.current_time()
    monkeypatch.setattr("time.time", lambda: 1000 + trio.current_time() - began)

    async def until(token: str) -> Principal:
        return Principal("4", expires_at=float(token))

    async with (
        trio.open_nursery() as nursery,
        open_push_service(authenticate=until) as service,
    ):
        transport, _ = Room(service, nursery).join()
        transport.say("auth", token="1060")
        await transport.next()
        await trio.sleep(29)
        assert transport.sent == []
        await trio.sleep(10)
        [notice] = transport.sent
        assert (notice["op"], notice["code"]) == ("notice", "token_expires")
        assert 28 <= notice["expires_in"] <= 30
        transport.sent.clear()
        transport.say("auth", token="1100")
        await transport.next()
        await trio.sleep(25)
        assert transport.sent == []
        await trio.sleep(10)
        assert len(transport.sent) == 1
        await trio.sleep(40)
        assert transport.closed_with == (4003, "token expired")
        assert len(transport.sent) == 1


async def test_a_renewal_that_came_in_time_is_not_cut_while_it_is_checked(
    autojump_clock, monkeypatch
):
    began = trio.current_time()
    monkeypatch.setattr("time.time", lambda: 1000 + trio.current_time() - began)
    takes = iter((0, 8, 8))

    async def slowly(token: str) -> Principal:
        await trio.sleep(next(takes))
        if token == "bad":
            raise AuthenticationError
        return Principal("4", expires_at=float(token))

    async with (
        trio.open_nursery() as nursery,
        open_push_service(authenticate=slowly) as service,
    ):
        transport, _ = Room(service, nursery).join()
        transport.say("auth", token="1010")
        await transport.next()
        await trio.sleep(12)  # three seconds before the end, with the leeway of five
        assert (await transport.request("auth", token="1022"))["expires_in"] == 2
        await trio.sleep(3)
        assert (await transport.request("auth", token="bad"))["error"]["code"] == "bad_token"
        await trio.sleep(1)
        assert transport.closed_with == (4003, "token expired")


@pytest.mark.parametrize("error", [AuthenticationError(), SourceError("no keys")])
async def test_a_renewal_that_fails_while_the_notice_is_due_does_not_lose_it(
    autojump_clock, monkeypatch, error
):
    began = trio.current_time()
    monkeypatch.setattr("time.time", lambda: 1000 + trio.current_time() - began)

    async def slowly(token: str) -> Principal:
        if token == "renewal":
            await trio.sleep(4)
            raise error
        return Principal("4", expires_at=float(token))

    async with (
        trio.open_nursery() as nursery,
        open_push_service(authenticate=slowly) as service,
    ):
        transport, _ = Room(service, nursery).join()  # one that cannot be pinged, as over HTTP/2
        transport.say("auth", token="1100")
        await transport.next()
        await trio.sleep(68)
        assert (await transport.request("auth", token="renewal"))["op"] == "error"
        with trio.fail_after(1):
            [notice] = await transport.next()
        assert (notice["op"], notice["code"]) == ("notice", "token_expires")
        assert 27 <= notice["expires_in"] <= 28
        await trio.sleep(34)
        assert transport.closed_with == (4003, "token expired")


@pytest.mark.parametrize("cancelled", [False, True])
async def test_leaving_the_service_loses_no_unit(autojump_clock, caplog, cancelled):
    count = 200
    transports = []
    with trio.CancelScope() as scope:
        async with room() as here:
            for number in range(count):
                transport, _ = here.join()
                transport.say("auth", token=str(number))
                transport.say("subscribe", args=["balance", "ticker.A"])
                transports.append(transport)
            await trio.testing.wait_all_tasks_blocked()
            assert here.service.statistics().connections == count
            if cancelled:
                scope.cancel()
                await trio.lowlevel.checkpoint()
    found = lines(caplog)
    assert found.count("🔌 连接关闭: code=1012 reason='service restart' (服务重启)") == count
    assert sum(line.startswith("✅ 用户") and "已退出所有房间" in line for line in found) == count
    assert found[-3:] == [found[-3], "🔌 当前连接数: 0", "👤 当前在线用户数: 0"]
    assert all(transport.closed_with == (1012, "service restart") for transport in transports)
    if not cancelled:
        assert all(
            transport.sent[-1]["op"] == "notice" and transport.sent[-1]["code"] == "shutdown"
            for transport in transports
        )


async def test_a_stalled_peer_does_not_hold_the_drain(autojump_clock):
    settings = Settings(limits=Limits(drain_timeout_s=2))
    began = math.inf
    async with room(settings=settings) as here:
        transport, _ = await here.subscribed("balance")
        transport.reading = trio.Event()
        await here.service.publish("balance", 1, user=4)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
    assert trio.current_time() - began < 2.5


async def test_a_body_that_raises_raises_what_it_raised(autojump_clock):
    with pytest.raises(ZeroDivisionError):
        async with open_push_service(authenticate=by_name):
            raise ZeroDivisionError


async def test_a_registry_that_dies_is_heard(autojump_clock, caplog, monkeypatch):
    def broken(*args: Any) -> None:
        raise RuntimeError("the registry's own mistake")

    with pytest.raises(ExceptionGroup) as caught:
        async with room() as here:
            transport, _ = await here.subscribed("balance")
            monkeypatch.setattr(Registry, "_settled", broken)
            here.service._registry.settle([])
            await trio.sleep_forever()
    assert caught.group_contains(RuntimeError, match="own mistake")
    assert transport.closed_with == (1012, "service restart")
    # The leave that came later is counted all the same.
    assert here.service.statistics().ledger.balanced
    assert sum("❌ 订阅登记任务意外终止" in line for line in lines(caplog)) == 1


async def renewable(token: str) -> Principal:
    if token == "down":
        raise SourceError("the key server does not answer")
    return await by_name(token)


@pytest.mark.parametrize("token", ["hang", "down"])
async def test_a_renewal_that_cannot_be_checked_leaves_the_session(autojump_clock, caplog, token):
    async with (
        trio.open_nursery() as nursery,
        open_push_service(authenticate=renewable) as service,
    ):
        here = Room(service, nursery)
        transport, _ = await here.subscribed("ticker.A")
        transport.say("auth", id=5, token=token)
        [reply] = await transport.next()
        assert (reply["id"], reply["error"]["code"]) == (5, "internal")
        await service.publish("ticker.A", 1)
        assert (await transport.next(2))[1]["data"] == 1
        assert transport.closed_with is None
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_key_server_that_is_away_is_said_once_a_minute(autojump_clock, caplog):
    async with (
        trio.open_nursery() as nursery,
        open_push_service(authenticate=renewable) as service,
    ):
        for _ in range(130):
            transport, _ = Room(service, nursery).join()
            transport.say("auth", token="down")
            [reply] = await transport.next()
            assert reply["error"]["retryable"]
            await trio.sleep(1)
            assert transport.closed_with == (1011, "internal error")
    assert sum("暂时无法验证令牌" in line for line in lines(caplog)) == 3
    assert not [record for record in caplog.records if record.exc_info]


async def test_the_peers_close_frame_counts_where_it_came_first(autojump_clock, caplog):
    async with room() as here:
        transport, connection = await here.subscribed("ticker.A")
        transport.peer_close = Close(1000, "done")
        connection.stop(CloseCode.SERVICE_RESTART, "service restart")
        await trio.testing.wait_all_tasks_blocked()
    assert unit(caplog)[0] == "🔌 连接关闭: code=1000 reason='done' (正常关闭)"


async def test_a_leave_in_the_registrys_last_moment_is_counted_in_its_order(autojump_clock):
    registry = Registry(Channels([]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(registry.run)
        member = registry.connect("10.0.0.1")
        registry.authenticate(member, "4")
        registry.close()
        registry.leave(member, Departure(Close(1000)))
    assert registry.connections == registry.users_online() == 0
    assert registry.ledger.balanced
    with pytest.raises(ServiceClosed):
        registry.connect("10.0.0.1")


async def test_what_is_pending_goes_out_before_the_notice_of_a_drain(autojump_clock):
    channels = [Channel("trades", "events")]
    async with room(channels=channels) as here:
        peer, _ = await here.subscribed(
            {"channel": "ticker.A", "max_hz": 0.01}, {"channel": "trades", "max_hz": 0.01}
        )
        for number in range(1, 4):
            await here.service.publish("ticker.A", {"n": number})
            await here.service.publish("trades", number, user="4")
            await trio.testing.wait_all_tasks_blocked()
        begun = {message["channel"]: message["data"] for message in peer.sent if "data" in message}
        assert begun == {
            "ticker.A": {"n": 1},
            "trades": 1,
        }  # the rest waits for the pace that was asked for
        peer.sent.clear()
        await here.service.drain()
        *pushes, notice = peer.sent
        assert [(each["channel"], each["data"]) for each in pushes] == [
            ("ticker.A", {"n": 3}),
            ("trades", 2),
            ("trades", 3),
        ]
        assert notice["code"] == "shutdown"
        assert peer.closed_with == (1012, "service restart")


async def test_a_frame_that_waits_behind_a_stuck_one_is_not_lost_in_a_drain(autojump_clock):
    async with room() as here:
        peer, _ = await here.subscribed("ticker.A", "ticker.B", direct=False)
        peer.reading = trio.Event()
        await here.service.publish("ticker.A", 1)
        await trio.testing.wait_all_tasks_blocked()  # stuck
        await here.service.publish("ticker.B", 2)
        await trio.testing.wait_all_tasks_blocked()  # waits for its turn
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.service.drain)
            await trio.testing.wait_all_tasks_blocked()
            peer.reading.set()
        assert [message["data"] for message in peer.sent if "data" in message] == [1, 2]
        assert peer.sent[-1]["code"] == "shutdown"
        assert peer.closed_with == (1012, "service restart")
