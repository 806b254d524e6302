"""What runs upstream while somebody watches: sessions of users, and the watch over a source."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import pytest
import trio
import trio.testing

from harness.room import lines
from harness.sources import FAST, Table, failing_when_cancelled, serving

from trading_push.connections.connection import Connection
from trading_push.models import Ticker
from trading_push.settings.schema import Intervals, Polling, Settings
from trading_push.settings.sources import Market
from trading_push.sources.base import ChangeSink, MarketSink
from trading_push.testing import MemoryTransport
from trading_push.topics import Channel, Topic


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
        assert 2.5 < trio.current_time() - began < 4.5  # after 1 and 2 seconds, and jitter
        assert service.statistics().failures == {"user sessions": 2}
    assert [line for line in lines(caplog) if "上游会话" in line] == [
        "❌ 用户4的上游会话出错: OSError: no upstream - 1秒后重试",
        "❌ 用户4的上游会话出错: OSError: no upstream - 2秒后重试",
    ]


async def test_events_are_not_live_while_the_session_that_tells_them_fails(autojump_clock):
    upstream, channels = Upstream(), [Channel("alerts", "events"), Channel("notes")]
    upstream.failures = 3
    async with serving(Table(), user_session=upstream.session, channels=channels) as (
        service,
        join,
    ):
        peer = await join("4", "fills", "notes")
        told = [await peer.next() for _ in range(3)]
        assert [(push["channel"], push["state"], push.get("reason")) for [push] in told] == [
            ("fills", "live", "quiet"),
            ("notes", "down", "no_data"),
            ("fills", "down", "source_error"),
        ]
        late = await join("4", "fills", "alerts")  # between two tries
        state = {}
        for _ in range(3):  # that of alerts is marked when its first watcher is there
            [push] = await late.next()
            state[push["channel"]] = push["state"], push["reason"]
        assert state == dict.fromkeys(("fills", "alerts"), ("down", "source_error"))
        [push] = await peer.next()
        assert (push["channel"], push["state"], push["reason"]) == ("fills", "live", "quiet")
        assert [(await late.next())[0]["reason"] for _ in range(2)] == ["quiet"] * 2
        await service.publish("notes", 1, "4")
        assert [(await peer.next())[0].get("data") for _ in range(2)] == [None, 1]  # live, and 1


async def test_events_of_before_are_stale_until_the_session_is_open_again(autojump_clock):
    cuts = [trio.Event(), trio.Event()]

    @asynccontextmanager
    async def session(user: str) -> AsyncIterator[None]:
        cut = cuts.pop(0)

        async def read() -> None:
            await cut.wait()
            raise ConnectionResetError("cut")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            yield
            nursery.cancel_scope.cancel()

    first = cuts[0]
    async with serving(Table(), user_session=session) as (service, join):
        peer = await join("4", "fills")
        assert (await peer.next())[0]["reason"] == "quiet"
        await service.publish("fills", {"fill_id": 1}, "4")
        assert (await peer.next())[0]["data"] == {"fill_id": 1}
        first.set()
        [status] = await peer.next()
        assert (status["state"], status["reason"]) == ("stale", "source_error")
        [status] = await peer.next()
        assert status["state"] == "live"
        await service.publish("fills", {"fill_id": 2}, "4")
        assert (await peer.next())[0]["data"] == {"fill_id": 2}


async def test_who_comes_after_a_failed_session_finds_events_live(autojump_clock):
    upstream = Upstream()
    upstream.failures = 1000
    async with serving(Table(), user_session=upstream.session) as (_, join):
        peer = await join("4", "fills")
        assert [(await peer.next())[0]["reason"] for _ in range(2)] == ["quiet", "source_error"]
        peer.leave()
        await trio.sleep(120)
        upstream.failures = 0
        assert (await (await join("4", "fills")).next())[0]["reason"] == "quiet"


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
        assert (await peer.next())[0]["data"] == 5
    assert any("nope" in line for line in lines(caplog))
    assert any("nan is not a finite number" in line for line in lines(caplog))


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

    def tell(self, symbol: str, last: int | Decimal) -> None:
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
    settings = Settings(market=Market(stale_after_s=10), polling=Polling(watch_linger_s=1))
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


# --- what one user, or one symbol, must not do to the others ------------------------------------


async def test_a_session_may_close_for_longer_than_its_user_stays_away(autojump_clock):
    running = most = 0

    @asynccontextmanager
    async def session(user: str) -> AsyncIterator[None]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(6)
            running -= 1

    async with serving(Table(), user_session=session) as (_, join):
        for _ in range(4):  # each is cancelled while it waits for the first
            (await join("4", "pnl")).leave()
            await trio.sleep(1.5)
        await trio.sleep(20)
        assert most == 1
        assert (await (await join("5", "pnl")).next())[0]["type"] == "snapshot"


async def test_an_error_beside_a_cancellation_ends_nothing_else(autojump_clock, caplog):
    class Reading(Table):
        async def watch(self, sink: ChangeSink) -> None:
            await failing_when_cancelled()

    @asynccontextmanager
    async def session(user: str) -> AsyncIterator[None]:
        yield
        await failing_when_cancelled()  # the good-bye takes too long

    async with serving(Reading(), user_session=session) as (_, join):
        (await join("4", "pnl")).leave()
        await trio.sleep(5)
        assert (await (await join("5", "pnl")).next())[0]["type"] == "snapshot"
    assert sum("the socket is gone" in line for line in lines(caplog)) >= 2


async def test_a_session_that_ends_by_itself_is_opened_again(autojump_clock):
    source, cut, opened = Table(), trio.Event(), 0
    source.values["4", "pnl"] = 1

    @asynccontextmanager
    async def session(user: str) -> AsyncIterator[None]:
        nonlocal opened
        opened += 1
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                await cut.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(read)
            yield
            nursery.cancel_scope.cancel()

    async with serving(source, user_session=session) as (_, join):
        peer = await join("4", "pnl")
        await peer.next()
        source.values["4", "pnl"] = 2
        cut.set()
        await trio.sleep(0.5)
        cut = trio.Event()
        await trio.sleep(10)
        assert opened == 2
        assert [push.get("state", push.get("data")) for push in peer.sent] == ["stale", "live", 2]


async def test_a_value_that_nobody_watches_is_not_live(autojump_clock):
    source, hangs = Table(), False
    source.values["4", "pnl"] = 1

    @asynccontextmanager
    async def session(user: str) -> AsyncIterator[None]:
        if hangs:
            await trio.sleep_forever()
        yield

    async with serving(source, user_session=session) as (service, join):
        peer = await join("4", "pnl")
        await peer.next()
        peer.leave()
        await trio.sleep(30)
        latest = service.latest("pnl", "4")
        assert latest is not None
        assert latest.status == ("stale", "not_watched")
        hangs = True
        peer = await join("4", "pnl")
        assert states_of_pnl(await peer.next(2)) == [1, "stale"]


def states_of_pnl(pushes: list[dict[str, Any]]) -> list[Any]:
    return [push.get("state") or push["data"] for push in pushes]


async def test_what_changes_while_nobody_watches_is_not_missed(autojump_clock):
    source = Notifying()
    source.values["4", "pnl"] = 0
    async with serving(source, settings=Settings()) as (_, join):
        await join("5", "pnl")
        peer = await join("4", "pnl")
        await peer.next()
        await trio.sleep(0.5)
        peer.leave()
        for number in range(1, 16):
            await trio.sleep(0.1)
            source.write("4", "pnl", number)
        await trio.sleep(0.2)
        began = trio.current_time()
        peer = await join("4", "pnl")
        while states_of_pnl(await peer.next()) != [15]:
            pass
        assert trio.current_time() - began < 1


async def test_a_watch_without_a_linger_runs_for_nobody(autojump_clock):
    source = Notifying()
    settings = Settings(polling=Polling(watch_linger_s=0))
    async with serving(source, settings=settings) as (service, _):
        for _ in range(20):
            topic = Topic("pnl", "4")
            service._watched(topic, True)
            service._watched(topic, False)
            await trio.testing.wait_all_tasks_blocked()
            assert source.sink is None


class Broken(Asked):
    def watch(self, symbol: str) -> None:
        raise OSError("watch")

    def unwatch(self, symbol: str) -> None:
        raise OSError("unwatch")


async def test_a_mistake_of_a_feed_at_one_symbol_ends_nothing(autojump_clock, caplog):
    async with serving(None, feed=Broken()) as (service, join):
        (await join("4", "ticker.BTCUSDT")).leave()
        await trio.sleep(5)
        await join("4", "pnl")
        assert service.statistics().failures == {"feed": 2}
    assert [line for line in lines(caplog) if "行情源" in line] == [
        "❌ 行情源处理BTCUSDT出错: OSError: watch",
        "❌ 行情源处理BTCUSDT出错: OSError: unwatch",
    ]


async def test_a_ticker_that_comes_after_its_last_watcher_is_passed_over(autojump_clock):
    feed = Asked()
    async with serving(None, feed=feed) as (service, join):
        peer = await join("4", "ticker.BTCUSDT")
        feed.tell("BTCUSDT", 1)
        await trio.sleep(1)
        peer.leave()
        await trio.sleep(3)
        feed.tell("BTCUSDT", 2)
        await trio.sleep(1)
        assert service.statistics().topics == {"ticker": {"stale": 1}}
        await trio.sleep(100)
        assert service.statistics().topics == {}


async def test_a_ticker_that_cannot_be_sent_is_not_live(autojump_clock):
    feed = Asked()
    async with serving(None, feed=feed) as (_, join):
        peer = await join("4", "ticker.BTCUSDT")
        feed.tell("BTCUSDT", 1)
        await trio.sleep(1)
        peer.sent.clear()
        for _ in range(100):
            feed.tell("BTCUSDT", Decimal("NaN"))
            await trio.sleep(1)
        assert [(push["state"], push["reason"]) for push in peer.sent] == [("stale", "unusable")]
        feed.tell("BTCUSDT", 2)
        await trio.sleep(1)
        assert sorted(map(str, states(peer.sent[1:]))) == ["2", "live"]


async def test_who_comes_while_the_service_ends_does_not_end_the_registry(autojump_clock, caplog):
    source = Table()
    settings = Settings(polling=Polling(watch_linger_s=0))
    async with (
        trio.open_nursery() as outer,
        serving(source, settings=settings) as (service, join),
    ):
        peer = await join("4", "pnl")
        await peer.next()
        peer.leave()
        await trio.sleep(0.1)
        late = MemoryTransport()
        outer.start_soon(Connection(service.context, late, service.context.seats.take()).run)
        late.say("auth", token="4")
        await late.next()
        # The registry is busy, as with a long fan-out, when the service ends.
        service._registry._command(lambda: iter([None] * 3000))
        late.say("subscribe", args=["pnl"])
        await late.next()
    assert not any(record.exc_info for record in caplog.records)


async def test_a_value_is_kept_while_its_user_s_session_fails_for_long(autojump_clock):
    source, cut, fails = Table(), trio.Event(), False
    source.values["4", "pnl"] = 1

    @asynccontextmanager
    async def session(user: str) -> AsyncIterator[None]:
        if fails:
            await trio.sleep(10)
            raise OSError("no upstream")
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                await cut.wait()
                raise OSError("cut")

            nursery.start_soon(read)
            yield
            nursery.cancel_scope.cancel()

    async with serving(source, user_session=session) as (service, join):
        peer = await join("4", "pnl")
        [first] = await peer.next()
        fails = True
        cut.set()
        await trio.sleep(600)
        latest = service.latest("pnl", "4")
        assert latest is not None
        assert latest.status.state == "stale"
        late = await join("4", "pnl")
        assert (await late.next())[0]["epoch"] == first["epoch"]
