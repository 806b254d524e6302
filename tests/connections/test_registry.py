"""The registry alone: the order of its commands, what it counts and says, and how it ends."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from harness.room import lines

from trading_push import Channel
from trading_push.broker.base import Publication
from trading_push.connections.members import Departure, Member
from trading_push.connections.registry import Registry
from trading_push.connections.subscription import Siblings, Subscription
from trading_push.connections.tally import Tally
from trading_push.errors import ServiceClosed
from trading_push.testing import MemoryTransport
from trading_push.topics import BUILTIN_CHANNELS, Channels, Topic, symbol_of
from trading_push.transport.base import Close

CHANNELS = Channels([*map(Channel, BUILTIN_CHANNELS), Channel("news", "events", per_user=False)])
DONE = Departure(Close(1000, "done"))


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO, "trading_push")


def subscription(channel: str, user: str = "4") -> Subscription:
    everyone = symbol_of(channel) is not None or channel == "news"
    topic = Topic(channel, None if everyone else user)
    return Subscription(topic, CHANNELS.kind_of(topic), MemoryTransport(), Siblings(1000, Tally()))


def joined(registry: Registry, user: str, *channels: str) -> tuple[Member, list[Subscription]]:
    """A connection that has authenticated and subscribed; nothing is worked on yet."""
    member = registry.connect(f"10.0.0.{user}")
    registry.authenticate(member, user)
    made = [subscription(channel, user) for channel in channels]
    if made:
        registry.subscribe(member, made)
    return member, made


def publish(registry: Registry, topic: Topic, seq: int) -> None:
    registry.deliver([Publication(topic, CHANNELS.kind_of(topic), "e", seq, 0, b"%d" % seq)])


def waiting(made: Subscription) -> list[int]:
    """The publications that wait for the sender task, which does not run here."""
    return [each.seq for each in made._pending]


@asynccontextmanager
async def running(**hooks: Callable[..., Any]) -> AsyncIterator[Registry]:
    """A registry whose task works on what is posted, until it is left."""
    registry = Registry(CHANNELS, **hooks)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(registry.run)
        try:
            yield registry
        finally:
            registry.close()


async def worked_on() -> None:
    await trio.testing.wait_all_tasks_blocked()


def seen(registry: Registry) -> tuple[int, int, dict[str, int]]:
    return registry.connections, registry.users_online(), registry.counts()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines since the last look."""
    found = lines(caplog)
    caplog.clear()
    return found


# --- order --------------------------------------------------------------------------------------


async def test_posting_does_nothing_until_the_task_works_on_it(caplog):
    registry = Registry(CHANNELS)
    _, [made] = joined(registry, "4", "balance")
    assert seen(registry) == (0, 0, {})
    assert lines(caplog) == []
    registry.close()
    await registry.run()
    assert seen(registry) == (1, 1, {"balance": 1})
    assert registry.watched(made.topic)


async def test_commands_are_worked_on_in_the_order_of_posting(caplog):
    async with running() as registry:
        first, _ = joined(registry, "4", "balance")
        second, [pnl] = joined(registry, "5", "pnl")
        registry.unsubscribe(second, [pnl])
        registry.leave(first, DONE)
        await worked_on()
    assert [line for line in lines(caplog) if "房间" not in line] == [
        "🔌 WebSocket客户端连接 - 来自: 10.0.0.4",
        "🔌 当前连接数: 1",
        "✅ 用户4认证成功",
        "📋 用户4订阅balance数据",
        "   当前订阅者: 1",
        "🔌 WebSocket客户端连接 - 来自: 10.0.0.5",
        "🔌 当前连接数: 2",
        "✅ 用户5认证成功",
        "📋 用户5订阅pnl数据",
        "   当前订阅者: 1",
        "📋 用户5取消订阅pnl数据 - 剩余订阅者: 0",
        "🔌 连接关闭: code=1000 reason='done' (正常关闭)",
        "🔌 WebSocket客户端断开连接 - 来自: 10.0.0.4",
        "📋 用户4取消订阅balance数据 - 剩余订阅者: 0",
        "用户4断开连接并清理所有订阅",
        "🔌 当前连接数: 1",
        "👤 当前在线用户数: 1",
    ]


async def test_what_was_posted_before_a_publication_is_in_force_when_it_is_handed_out():
    async with running() as registry:
        leaver, [left] = joined(registry, "4", "balance")
        _, [stays] = joined(registry, "4", "balance")
        publish(registry, stays.topic, 1)
        registry.leave(leaver, DONE)
        publish(registry, stays.topic, 2)
        _, [late] = joined(registry, "4", "balance")
        await worked_on()
        assert waiting(left) == [1]
        assert waiting(stays) == [2]  # of a state, the latest
        assert waiting(late) == []


async def test_a_publication_reaches_its_topic_alone():
    async with running() as registry:
        _, [mine, news] = joined(registry, "4", "balance", "news")
        _, [other] = joined(registry, "5", "balance")
        publish(registry, mine.topic, 1)
        publish(registry, Topic("news"), 7)
        publish(registry, Topic("nobody", "4"), 1)
        await worked_on()
        assert (waiting(mine), waiting(news), waiting(other)) == ([1], [7], [])


async def test_a_first_answer_settles_the_subscriptions_of_its_topics():
    async with running() as registry:
        _, [mine, pnl] = joined(registry, "4", "balance", "pnl")
        registry.settle([mine.topic, Topic("orders", "4")])
        await worked_on()
        assert (mine.settled, pnl.settled) == (True, False)


# --- counts -------------------------------------------------------------------------------------


async def test_users_are_counted_once_however_many_connections_they_have():
    async with running() as registry:
        members = [joined(registry, user, "balance", "ticker.A")[0] for user in "4454"]
        registry.connect("10.0.0.9")
        await worked_on()
        assert seen(registry) == (5, 2, {"balance": 2, "ticker.A": 2})
        registry.leave(members[0], DONE)
        registry.leave(members[2], DONE)
        await worked_on()
        assert seen(registry) == (3, 1, {"balance": 1, "ticker.A": 1})
        registry.leave(members[1], DONE)
        registry.leave(members[3], DONE)
        await worked_on()
        assert seen(registry) == (1, 0, {})


async def test_what_begins_and_ends_is_counted():
    async with running() as registry:
        ledger = registry.ledger
        assert ledger.balanced
        member, [balance, _] = joined(registry, "4", "balance", "pnl")
        await worked_on()
        assert (ledger.connections_opened, ledger.subscriptions_opened) == (1, 2)
        assert not ledger.balanced
        registry.unsubscribe(member, [balance])
        await worked_on()
        assert ledger.subscriptions_closed == 1
        registry.leave(member, DONE)
        await worked_on()
        assert (ledger.connections_closed, ledger.subscriptions_closed) == (1, 2)
        assert ledger.balanced


async def test_members_know_what_they_are():
    async with running() as registry:
        first, [balance, ticker] = joined(registry, "4", "balance", "ticker.A")
        second = registry.connect("10.0.0.9")
        assert (first.address, first.user, second.user) == ("10.0.0.4", None, None)
        assert first.id != second.id
        await worked_on()
        assert (first.user, second.user) == ("4", None)
        assert first.subscriptions == {balance.topic: balance, ticker.topic: ticker}
        registry.unsubscribe(first, [balance])
        await worked_on()
        assert first.subscriptions == {ticker.topic: ticker}


# --- lines --------------------------------------------------------------------------------------


async def test_the_lines_of_subscribing_are_one_unit_in_the_order_of_the_request(caplog):
    async with running() as registry:
        joined(registry, "5", "ticker.A")
        member, _ = joined(registry, "4")
        await worked_on()
        told(caplog)
        registry.subscribe(member, [subscription(each) for each in ("ticker.A", "pnl", "news")])
        await worked_on()
        assert told(caplog) == [
            "📊 用户4订阅A行情",
            "   当前订阅者: 2",
            "📋 用户4订阅pnl数据",
            "   当前订阅者: 1",
            "📋 用户4订阅news数据",
            "   当前订阅者: 1",
        ]


async def test_the_lines_of_unsubscribing_say_who_is_left(caplog):
    async with running() as registry:
        first, [a, balance] = joined(registry, "4", "ticker.A", "balance")
        second, [other] = joined(registry, "5", "ticker.A")
        await worked_on()
        told(caplog)
        registry.unsubscribe(first, [a, balance])
        await worked_on()
        assert told(caplog) == [
            "   🚪 退出行情房间: ticker_A_4",
            "📊 用户4取消订阅A行情 - 剩余订阅者: 1",
            "   🚪 退出房间: balance_4",
            "📋 用户4取消订阅balance数据 - 剩余订阅者: 0",
        ]
        registry.unsubscribe(second, [other])
        await worked_on()
        assert told(caplog) == [
            "   🚪 退出行情房间: ticker_A_5",
            "📊 用户5取消订阅A行情 - 剩余订阅者: 0",
            "   A无订阅者，移除",
        ]


async def test_the_lines_of_leaving_go_by_the_order_of_the_channels_and_symbols_come_last(caplog):
    async with running() as registry:
        channels = ["ticker.B", "news", "orders", "ticker.A", "balance"]
        member, _ = joined(registry, "4", *channels)
        joined(registry, "5", "ticker.A", "balance")
        await worked_on()
        told(caplog)
        registry.leave(member, DONE)
        await worked_on()
        assert told(caplog) == [
            "🔌 连接关闭: code=1000 reason='done' (正常关闭)",
            "🔌 WebSocket客户端断开连接 - 来自: 10.0.0.4",
            "👤 用户4退出所有房间",
            "   🚪 退出房间: balance_4",
            "   🚪 退出房间: orders_4",
            "   🚪 退出房间: news_4",
            "📋 用户4取消订阅balance数据 - 剩余订阅者: 1",
            "📋 用户4取消订阅orders数据 - 剩余订阅者: 0",
            "📋 用户4取消订阅news数据 - 剩余订阅者: 0",
            "   🚪 退出行情房间: ticker_B_4",
            "   🚪 退出行情房间: ticker_A_4",
            "📊 用户4取消订阅B行情 - 剩余订阅者: 0",
            "   B无订阅者，移除",
            "📊 用户4取消订阅A行情 - 剩余订阅者: 1",
            "✅ 用户4已退出所有房间并清理订阅",
            "用户4断开连接并清理所有订阅",
            "🔌 当前连接数: 1",
            "👤 当前在线用户数: 1",
        ]


async def test_the_lines_of_one_that_never_authenticated(caplog):
    async with running() as registry:
        member = registry.connect("10.0.0.9")
        await worked_on()
        told(caplog)
        registry.leave(member, Departure(Close(1006), found_by_send=True))
        await worked_on()
        assert told(caplog) == [
            "✅ 客户端已断开连接（正常）",
            "⚠️ 连接关闭: code=1006 reason='' (异常断开)",
            "🔌 WebSocket客户端断开连接 - 来自: 10.0.0.9",
            "⚠️ 未认证用户断开连接",
            "🔌 当前连接数: 0",
            "👤 当前在线用户数: 0",
        ]


async def test_what_was_unsubscribed_before_is_not_left_again(caplog):
    async with running() as registry:
        member, [balance, _] = joined(registry, "4", "balance", "pnl")
        registry.unsubscribe(member, [balance])
        await worked_on()
        told(caplog)
        registry.leave(member, DONE)
        await worked_on()
        assert not [line for line in told(caplog) if "balance" in line]


async def test_a_push_to_a_user_is_told_and_one_to_everyone_is_not(caplog):
    async with running() as registry:
        _, [balance, news] = joined(registry, "4", "balance", "news")
        await worked_on()
        told(caplog)
        publish(registry, balance.topic, 1)
        publish(registry, news.topic, 1)
        publish(registry, Topic("balance", "5"), 1)  # whom nobody watches
        await worked_on()
        assert told(caplog) == ["📤 推送balance数据给用户4"]


# --- the hooks ----------------------------------------------------------------------------------


async def test_the_first_who_watches_and_the_last_are_told_of_and_no_other():
    watched = []
    async with running(on_watched=lambda *args: watched.append(args)) as registry:
        topic = Topic("ticker.A")
        first, [one] = joined(registry, "4", "ticker.A")
        second, _ = joined(registry, "5", "ticker.A")
        await worked_on()
        assert watched == [(topic, True)]
        registry.unsubscribe(first, [one])
        await worked_on()
        assert watched == [(topic, True)]
        assert registry.watched(topic)
        registry.leave(second, DONE)
        await worked_on()
        assert watched == [(topic, True), (topic, False)]
        assert not registry.watched(topic)
        registry.subscribe(first, [subscription("ticker.A")])
        await worked_on()
        assert watched[2:] == [(topic, True)]


async def test_who_has_left_is_handed_to_the_application():
    left = []
    async with running(on_leave=left.append) as registry:
        member, _ = joined(registry, "4", "balance")
        stranger = registry.connect("10.0.0.9")
        registry.leave(member, DONE)
        registry.leave(stranger, DONE)
        await worked_on()
        assert left == [member, stranger]


async def test_a_hook_that_raises_when_somebody_leaves_is_told_of_and_loses_no_line(caplog):
    def on_watched(topic: Topic, watched: bool) -> None:
        if not watched and topic.channel == "balance":
            raise RuntimeError("no last one")

    def on_leave(member: Member) -> None:
        raise ValueError("no clean-up")

    async with running(on_watched=on_watched, on_leave=on_leave) as registry:
        member, _ = joined(registry, "4", "balance", "pnl")
        await worked_on()
        told(caplog)
        registry.leave(member, DONE)
        await worked_on()
        assert told(caplog) == [
            "🔌 连接关闭: code=1000 reason='done' (正常关闭)",
            "🔌 WebSocket客户端断开连接 - 来自: 10.0.0.4",
            "👤 用户4退出所有房间",
            "   🚪 退出房间: balance_4",
            "   🚪 退出房间: pnl_4",
            "📋 用户4取消订阅balance数据 - 剩余订阅者: 0",
            "📋 用户4取消订阅pnl数据 - 剩余订阅者: 0",
            "✅ 用户4已退出所有房间并清理订阅",
            "⚠️ 断开连接处理出错: RuntimeError: no last one",
            "⚠️ 断开连接处理出错: ValueError: no clean-up",
            "用户4断开连接并清理所有订阅",
            "🔌 当前连接数: 0",
            "👤 当前在线用户数: 0",
        ]
        assert registry.cleanup_failures == 2
        assert seen(registry) == (0, 0, {})
        assert registry.ledger.balanced
        joined(registry, "5", "balance")  # it goes on
        await worked_on()
        assert seen(registry) == (1, 1, {"balance": 1})


# --- the end ------------------------------------------------------------------------------------


def commands(registry: Registry, member: Member) -> dict[str, Callable[[], Any]]:
    made = [subscription("balance")]
    return {
        "connect": partial(registry.connect, "10.0.0.9"),
        "authenticate": partial(registry.authenticate, member, "4"),
        "subscribe": partial(registry.subscribe, member, made),
        "unsubscribe": partial(registry.unsubscribe, member, made),
        "publish": partial(publish, registry, Topic("balance", "4"), 1),
        "settle": partial(registry.settle, [Topic("balance", "4")]),
        "check_running": registry.check_running,
    }


def refused(registry: Registry, member: Member) -> list[str]:
    """The commands that raise ServiceClosed."""
    found = []
    for name, command in commands(registry, member).items():
        try:
            command()
        except ServiceClosed:
            found.append(name)
    return found


async def test_after_the_end_every_command_but_leaving_is_refused():
    async with running() as registry:
        member, _ = joined(registry, "4", "balance")
        registry.check_running()
        registry.close()
        assert refused(registry, member) == list(commands(registry, member))
    assert refused(registry, member) == list(commands(registry, member))


async def test_what_was_posted_before_the_end_is_still_worked_on(caplog):
    registry = Registry(CHANNELS)
    joined(registry, "4", "balance")
    registry.close()
    await registry.run()
    assert seen(registry) == (1, 1, {"balance": 1})
    assert lines(caplog)[-1] == "   当前订阅者: 1"


async def test_who_leaves_while_it_ends_is_counted_behind_what_was_posted_before(caplog):
    registry = Registry(CHANNELS)
    member, _ = joined(registry, "4", "balance")
    registry.close()
    registry.leave(member, DONE)
    assert lines(caplog) == []
    await registry.run()
    assert seen(registry) == (0, 0, {})
    assert registry.ledger.balanced
    assert [line for line in lines(caplog) if "balance" in line] == [
        "📋 用户4订阅balance数据",
        "   🚪 退出房间: balance_4",
        "📋 用户4取消订阅balance数据 - 剩余订阅者: 0",
    ]


async def test_who_leaves_after_the_end_is_counted_at_once(caplog):
    async with running() as registry:
        member, _ = joined(registry, "4", "balance")
        await worked_on()
    told(caplog)
    registry.leave(member, DONE)
    assert seen(registry) == (0, 0, {})
    assert registry.ledger.balanced
    assert told(caplog)[-3:] == [
        "用户4断开连接并清理所有订阅",
        "🔌 当前连接数: 0",
        "👤 当前在线用户数: 0",
    ]


async def test_a_cancellation_does_not_end_it_before_its_inbox_is_worked_off():
    registry = Registry(CHANNELS)
    member, _ = joined(registry, "4", "balance")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(registry.run)
            await worked_on()
            scope.cancel()
            registry.leave(member, DONE)
            registry.close()
    assert seen(registry) == (0, 0, {})
    assert registry.ledger.balanced


def raises_at_the_first(topic: Topic, watched: bool) -> None:
    if watched:
        raise RuntimeError("no first one")


def raises_at_the_last(topic: Topic, watched: bool) -> None:
    if not watched:
        raise RuntimeError("no last one")


@pytest.mark.parametrize("on_watched", [raises_at_the_first, raises_at_the_last])
async def test_a_hook_that_raises_elsewhere_ends_it_loudly(caplog, on_watched):
    registry = Registry(CHANNELS, on_watched=on_watched)
    member, [made] = joined(registry, "4", "balance")
    registry.unsubscribe(member, [made])
    stranger = registry.connect("10.0.0.9")
    with pytest.raises(RuntimeError, match="no"):
        await registry.run()
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert record.getMessage().startswith("❌ 订阅登记任务意外终止: RuntimeError: no")
    assert record.exc_info is not None
    assert refused(registry, member) == list(commands(registry, member))
    told(caplog)
    registry.leave(stranger, DONE)  # who leaves is still told of, and raises nothing
    assert told(caplog)[0] == "🔌 连接关闭: code=1000 reason='done' (正常关闭)"
