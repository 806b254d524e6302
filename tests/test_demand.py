"""What runs upstream while somebody watches: sessions of users, and the watch over a source."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from test_poller import FAST, Table, serving
from test_teardown import lines

from trading_push.models import Ticker
from trading_push.settings import Intervals, Limits, Market, Settings
from trading_push.sources.base import ChangeSink, MarketSink


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO, "trading_push")


class Upstream:
    """A session of each user, which notes what happens to it."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.failures = 0
        self.closing_s = 0.0
        self.opening = trio.Event()
        self.opening.set()

    @asynccontextmanager
    async def session(self, user: str) -> AsyncIterator[None]:
        await self.opening.wait()
        if self.failures:
            self.failures -= 1
            raise OSError("no upstream")
        self.events.append(("opened", user))
        try:
            yield
        finally:
            await trio.sleep(self.closing_s)
            self.events.append(("closed", user))


async def test_a_users_session_is_entered_once_and_left_once(autojump_clock):
    upstream = Upstream()
    async with serving(Table(), user_session=upstream.session) as (_, join):
        tabs = [await join("4", "pnl", "balance") for _ in range(3)]
        await join("5", "orders")
        await trio.sleep(5)
        assert upstream.events == [("opened", "4"), ("opened", "5")]
        for tab in tabs:
            tab.leave()
        await trio.sleep(0.9)
        again = await join("4", "orders")  # within the linger
        await trio.sleep(5)
        assert upstream.events == [("opened", "4"), ("opened", "5")]
        again.leave()
        left_at = trio.current_time()
        while len(upstream.events) < 3:
            await trio.sleep(0.01)
        assert upstream.events[2] == ("closed", "4")
        assert trio.current_time() - left_at == pytest.approx(1, abs=0.1)
        await join("4", "pnl")
        await trio.testing.wait_all_tasks_blocked()
        assert upstream.events[3:] == [("opened", "4")]
    assert sorted(upstream.events[4:]) == [("closed", "4"), ("closed", "5")]


async def test_nobody_is_asked_for_while_their_session_is_not_open(autojump_clock):
    source, upstream = Table(), Upstream()
    upstream.opening = trio.Event()
    async with serving(source, user_session=upstream.session) as (_, join):
        peer = await join("4", "pnl")
        [status] = await peer.next()
        assert (status["state"], status["reason"]) == ("down", "no_data")
        await trio.sleep(10)
        assert source.calls == []
        upstream.opening.set()
        [snapshot, status] = sorted(await peer.next(2), key=lambda each: each["type"])
        assert snapshot["data"] == []
        assert status["state"] == "live"


async def test_a_session_that_fails_is_entered_again(autojump_clock, caplog):
    upstream = Upstream()
    upstream.failures = 2
    async with serving(Table(), user_session=upstream.session) as (service, join):
        peer = await join("4", "pnl")
        began = trio.current_time()
        assert [push["type"] for push in await peer.next(3)] == ["status", "status", "snapshot"]
        assert 2.5 < trio.current_time() - began < 3.5  # after 1 and 2 seconds
        assert service.statistics().failures == {"user sessions": 2}
    assert [line for line in lines(caplog) if "上游会话" in line] == [
        "❌ 用户4的上游会话出错: OSError: no upstream - 1秒后重试",
        "❌ 用户4的上游会话出错: OSError: no upstream - 2秒后重试",
    ]


async def test_a_session_that_breaks_stops_the_asking(autojump_clock):
    source = Table()
    broken = trio.Event()
    opened = 0

    @asynccontextmanager
    async def session(user: str) -> AsyncIterator[None]:
        nonlocal opened
        opened += 1
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                await broken.wait()
                raise ConnectionResetError("cut")

            if opened == 1:
                nursery.start_soon(read)
            yield
            nursery.cancel_scope.cancel()

    async with serving(source, user_session=session) as (_, join):
        peer = await join("4", "pnl")
        await peer.next()
        broken.set()
        [status] = await peer.next()
        assert (status["state"], status["reason"]) == ("stale", "source_error")
        source.calls.clear()
        await trio.sleep(0.9)
        assert source.calls == []
        [status] = await peer.next()
        assert status["state"] == "live"
        assert opened == 2


async def test_a_session_that_will_not_close_is_cancelled(autojump_clock):
    upstream = Upstream()
    upstream.closing_s = 60
    began = trio.current_time()
    async with serving(Table(), user_session=upstream.session) as (_, join):
        (await join("4", "pnl")).leave()
        await join("5", "pnl")
        await trio.sleep(1.5)
        again = await join("4", "pnl")  # must wait for the one that is being left
        await trio.testing.wait_all_tasks_blocked()
        assert upstream.events == [("opened", "4"), ("opened", "5")]
        await again.next()
        await trio.sleep(1)
        assert upstream.events == [("opened", "4"), ("opened", "5"), ("opened", "4")]
        began = trio.current_time()
    assert trio.current_time() - began < 6  # of which the drain may take four
    assert len(upstream.events) == 3


class Notifying(Table):
    """A source that tells of what has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.sink: ChangeSink | None = None
        self.watches = 0
        self.ended = 0
        self.broken = trio.Event()

    async def watch(self, sink: ChangeSink) -> None:
        self.sink = sink
        self.watches += 1
        try:
            await self.broken.wait()
            self.broken = trio.Event()
            raise ConnectionResetError("cut")
        finally:
            self.sink = None
            self.ended += 1

    def write(self, user: str, data_type: str, value: Any) -> None:
        self.values[user, data_type] = value
        if self.sink is not None:
            self.sink.changed([(user, data_type)])


SLOW = Settings(intervals=Intervals(balance=60, positions=60, pnl=60, orders=60))


async def test_a_change_is_pushed_at_once(autojump_clock):
    source = Notifying()
    async with serving(source, settings=SLOW) as (_, join):
        assert source.sink is None
        peer = await join("4", "pnl")
        await peer.next()
        began = trio.current_time()
        for value in range(10):
            source.write("4", "pnl", value)
            assert (await peer.next())[0]["data"] == value
        source.write("5", "pnl", 1)  # nobody watches that
        source.write("4", "unheard of", 1)
        await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() == began
        assert {call[1:] for call in source.calls} == {("4", "pnl")}


async def test_a_change_while_it_is_being_fetched_is_fetched_after(autojump_clock):
    source = Notifying()
    async with serving(source, settings=SLOW) as (_, join):
        peer = await join("4", "pnl")
        await peer.next()
        source.stuck.add("4")
        source.write("4", "pnl", 1)
        await trio.sleep(1)
        source.values["4", "pnl"] = 2
        assert source.sink is not None
        source.sink.changed([("4", "pnl")])
        source.stuck.clear()
        assert (await peer.next())[0]["data"] in (1, 2)
        await trio.sleep(1)
        assert len(source.calls) == 3


async def test_the_watch_lasts_while_anybody_watches_and_begins_again_when_it_fails(
    autojump_clock, caplog
):
    source = Notifying()
    async with serving(source, settings=SLOW) as (service, join):
        await trio.sleep(60)
        assert source.watches == 0
        peer, other = await join("4", "pnl"), await join("5", "pnl")
        await trio.testing.wait_all_tasks_blocked()
        assert (source.watches, source.ended) == (1, 0)
        peer.leave()
        await trio.sleep(5)
        assert (source.watches, source.ended) == (1, 0)
        source.broken.set()
        await trio.sleep(1.5)
        assert (source.watches, source.ended) == (2, 1)
        assert service.statistics().failures == {"watch over the source": 1}
        other.leave()
        await trio.sleep(1.5)
        assert (source.watches, source.ended) == (2, 2)
        await join("4", "pnl")
        await trio.testing.wait_all_tasks_blocked()
        assert (source.watches, source.ended) == (3, 2)
    assert source.ended == 3
    assert "❌ 数据源变更监听出错: ConnectionResetError: cut - 1秒后重试" in lines(caplog)


async def test_what_may_have_been_missed_is_fetched_again(autojump_clock):
    source = Notifying()
    async with serving(source, settings=SLOW) as (_, join):
        four, five = await join("4", "pnl"), await join("5", "balance")
        await four.next()
        await five.next()
        source.values |= {("4", "pnl"): 1, ("5", "balance"): 2}
        assert source.sink is not None
        source.sink.missed()
        assert (await four.next())[0]["data"] == 1
        assert (await five.next())[0]["data"] == 2


async def test_what_the_source_publishes_arrives_and_what_it_cannot_is_logged(
    autojump_clock, caplog
):
    source = Notifying()
    async with serving(source, settings=SLOW) as (_, join):
        peer = await join("4", "pnl")
        await peer.next()
        assert source.sink is not None
        source.sink.publish([("pnl", float("nan"), "4"), ("nope", 1, "4"), ("pnl", 5, "4")])
        assert (await peer.next())[0]["data"] is None  # what JSON makes of a NaN
        assert (await peer.next())[0]["data"] == 5
    assert any("nope" in line for line in lines(caplog))


class Asked:
    """A feed that is asked for symbols."""

    def __init__(self) -> None:
        self.symbols: set[str] = set()
        self.sink: MarketSink | None = None

    def knows(self, symbol: str) -> bool:
        return True

    def watch(self, symbol: str) -> None:
        self.symbols.add(symbol)

    def unwatch(self, symbol: str) -> None:
        self.symbols.remove(symbol)

    async def run(self, sink: MarketSink) -> None:
        self.sink = sink
        await trio.sleep_forever()

    def tell(self, symbol: str, last: int) -> None:
        assert self.sink is not None
        self.sink.update([Ticker(symbol, last=last)])


def states(pushes: list[dict[str, Any]]) -> list[Any]:
    return [push.get("state") or push["data"]["last"] for push in pushes]


async def test_a_feed_is_asked_for_what_is_watched_alone(autojump_clock):
    feed = Asked()
    async with serving(None, feed=feed) as (_, join):
        assert feed.symbols == set()
        first, second = await join("4", "ticker.BTCUSDT"), await join("5", "ticker.btcusdt")
        assert feed.symbols == {"BTCUSDT"}
        first.leave()
        await trio.sleep(5)
        assert feed.symbols == {"BTCUSDT"}
        second.leave()
        await trio.sleep(0.9)
        assert feed.symbols == {"BTCUSDT"}
        await trio.sleep(0.2)
        assert feed.symbols == set()


async def test_an_old_ticker_is_never_shown_as_live(autojump_clock):
    feed = Asked()
    async with serving(None, feed=feed) as (_, join):
        peer = await join("4", "ticker.BTCUSDT")
        feed.tell("BTCUSDT", 1)
        assert states(await peer.next(3)) == ["down", "live", 1]
        peer.leave()
        await trio.sleep(5)
        peer = await join("4", "ticker.BTCUSDT")
        assert states(await peer.next(2)) == [1, "stale"]
        feed.tell("BTCUSDT", 1)
        assert states(await peer.next()) == ["live"]


async def test_a_symbol_that_falls_silent_is_stale_and_the_others_are_not(autojump_clock, caplog):
    feed = Asked()
    settings = Settings(market=Market(stale_after_s=10), limits=Limits(watch_linger_s=1))
    async with serving(None, feed=feed, settings=settings) as (service, join):
        silent, lively = await join("4", "ticker.ETHUSDT"), await join("4", "ticker.BTCUSDT")
        await silent.next()
        await lively.next()
        feed.tell("ETHUSDT", 7)
        began = trio.current_time()
        for last in range(1, 30):
            feed.tell("BTCUSDT", last)
            await trio.sleep(1)
            if silent.sent and silent.sent[-1].get("state") == "stale":
                break
        assert 10 <= trio.current_time() - began <= 11.2
        assert silent.sent[-1]["reason"] == "source_timeout"
        assert all(push.get("state") != "stale" for push in lively.sent)
        assert service.statistics().topics == {"ticker": {"live": 1, "stale": 1}}
        silent.sent.clear()
        feed.tell("ETHUSDT", 8)
        assert sorted(map(str, states(await silent.next(2)))) == ["8", "live"]
        feed.sink.stale("disconnected", ["ETHUSDT", "UNHEARD"])
        assert (await silent.next())[0]["reason"] == "disconnected"
    assert [line for line in lines(caplog) if "ETHUSDT行情" in line and "订阅" not in line] == [
        "⚠️ ETHUSDT行情中断",
        "✅ ETHUSDT行情已恢复",
        "⚠️ ETHUSDT行情中断",
    ]


async def test_all_that_runs_upstream_ends_with_the_service(autojump_clock):
    source, upstream = Notifying(), Upstream()
    with trio.move_on_after(10) as scope:
        async with serving(source, user_session=upstream.session, settings=FAST) as (_, join):
            await join("4", "pnl")
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert upstream.events == [("opened", "4"), ("closed", "4")]
    assert (source.watches, source.ended) == (1, 1)
