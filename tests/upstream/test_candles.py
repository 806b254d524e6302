"""The channels `candles.SYMBOL`: bars of a second and of a minute, of kind `keyed`."""

from __future__ import annotations

from decimal import Decimal
from itertools import pairwise

import pytest
import trio
import trio.testing

from harness.room import lines

from trading_push import Principal, open_push_service
from trading_push.models import Candle, Ticker
from trading_push.settings.schema import Polling, Settings
from trading_push.sources.exchanges.simulated_market import SimulatedMarket
from trading_push.testing import peer
from trading_push.upstream import candles

BEGIN = 1_763_600_040_000
"""The begin of a minute."""


@pytest.fixture
def clock(autojump_clock, monkeypatch):
    """The server's clock goes with trio's, and may be set."""
    began = autojump_clock.current_time()
    offset = [BEGIN]

    def now_ms():
        return offset[0] + round((autojump_clock.current_time() - began) * 1000)

    monkeypatch.setattr(candles, "now_ms", now_ms)
    return offset


def opened(feed=None, **polling):
    settings = Settings(polling=Polling(**polling))
    return open_push_service(settings=settings, feed=feed, authenticate=Principal)


async def tick(service, last, symbol="BTCUSDT"):
    await service.publish(f"ticker.{symbol}", {"symbol": symbol, "last": last})


class Market:
    """A feed that is driven by the test; it gives all that it has."""

    def __init__(self):
        self.sink = None
        self.began = trio.Event()

    def knows(self, symbol):
        return True

    async def run(self, sink):
        self.sink = sink
        self.began.set()
        await trio.sleep_forever()


class CountingMarket(Market):
    """One that counts its volume from its begin."""

    counts_volume = True


class AskedMarket(Market):
    """One that gives only what is watched, and notes what that is."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def watch(self, symbol):
        self.asked.append(("watch", symbol))

    def unwatch(self, symbol):
        self.asked.append(("unwatch", symbol))


async def test_bars_of_a_second_and_of_a_minute(autojump_clock, clock):
    async with opened() as service, peer(service, "4") as four:
        await four.subscribe("candles.btcusdt")
        assert (await four.push())["state"] == "down"
        for last in ("10", "12", "9.5", "11"):
            await tick(service, last)
        bar = [BEGIN, "10", "12", "9.5", "11", None]
        await trio.sleep(2)
        pushes = [push for push in four.sent if push["type"] != "status"]
        assert next(push["type"] for push in pushes) == "snapshot"
        assert {push["channel"] for push in pushes} == {"candles.BTCUSDT"}
        assert pushes[-1]["data"] == {"1s": [bar], "1m": [bar]}
        four.sent.clear()
        await trio.sleep(61)
        await tick(service, "13")
        await trio.sleep(2)
        update = four.sent[-1]
        new = ["13", "13", "13", "13", None]
        # The bars that have ended were published with their last price before, and are again.
        assert update["data"] == {
            "1s": [bar, [BEGIN + 63_000, *new]],
            "1m": [bar, [BEGIN + 60_000, *new]],
        }


async def test_a_newcomer_gets_what_was_before(autojump_clock, clock):
    async with opened() as service:
        for number in range(1300):
            await tick(service, str(number))
            await trio.sleep(1)
        async with peer(service, "4") as four:
            await four.subscribe("candles.BTCUSDT")
            snapshot = await four.push()
            assert snapshot["type"] == "snapshot"
            seconds, minutes = snapshot["data"]["1s"], snapshot["data"]["1m"]
            assert [bar[0] for bar in seconds] == [BEGIN + 1000 * n for n in range(700, 1300)]
            assert [bar[4] for bar in seconds] == [str(n) for n in range(700, 1300)]
            assert [bar[0] for bar in minutes] == [BEGIN + 60_000 * n for n in range(22)]
            assert minutes[1] == [BEGIN + 60_000, "60", "119", "60", "119", None]


async def test_the_union_for_who_is_throttled(autojump_clock, clock):
    async with opened() as service, peer(service, "4") as four:
        await tick(service, "1")
        await four.subscribe({"channel": "candles.BTCUSDT", "max_hz": 0.2})
        first = await four.push()
        for number in range(10):
            await trio.sleep(1)
            await tick(service, str(number))
        seen = {bar[0]: bar[4] for bar in first["data"]["1s"]}
        at = first["seq"]
        while len(seen) < 10:
            push = await four.push()
            assert push["prev"] == at
            at = push["seq"]
            seen |= {bar[0]: bar[4] for bar in push["data"]["1s"]}
        assert [seen[BEGIN + 1000 * n] for n in range(1, 10)] == [str(n) for n in range(9)]


async def test_a_clock_that_is_set_back_never_brings_an_older_bar(autojump_clock, clock):
    async with opened() as service, peer(service, "4") as four:
        await four.subscribe("candles.BTCUSDT")
        await four.push()
        await trio.sleep(5)
        await tick(service, "1")
        clock[0] -= 3000
        await tick(service, "2")
        await trio.sleep(2)
        rows = [bar for push in four.sent if push["type"] != "status" for bar in push["data"]["1s"]]
        assert {bar[0] for bar in rows} == {BEGIN + 5000}
        assert rows[-1] == [BEGIN + 5000, "1", "2", "1", "2", None]


async def test_a_feed_is_asked_for_what_only_candles_watch(autojump_clock, clock):
    feed = AskedMarket()
    async with opened(feed, watch_linger_s=1) as service:
        await feed.began.wait()
        async with peer(service, "4") as four:
            await four.subscribe("candles.A", "ticker.A")
            await four.request("unsubscribe", args=["ticker.A"])
            await trio.sleep(5)
            assert feed.asked == [("watch", "A")]
            feed.sink.update([Ticker("A", last=Decimal(1))])
            while (push := await four.push())["type"] == "status":
                pass
            assert push["data"]["1s"][0][1:5] == ["1"] * 4
        await trio.sleep(5)
        assert feed.asked == [("watch", "A"), ("unwatch", "A")]


async def test_candles_are_as_stale_as_their_ticker(autojump_clock, clock):
    feed = Market()
    async with opened(feed) as service, peer(service, "4") as four:
        await feed.began.wait()
        feed.sink.update([Ticker("A", last=Decimal(1))])
        await four.subscribe("candles.A")
        assert (await four.push())["type"] == "snapshot"
        feed.sink.stale("disconnected")
        told = await four.push()
        while told["type"] != "status":
            told = await four.push()
        assert (told["state"], told["reason"]) == ("stale", "disconnected")
        feed.sink.update([Ticker("A", last=Decimal(2))])
        assert (await four.push())["state"] == "live"
        assert (await four.push())["data"]["1s"][-1][4] == "2"


async def test_a_volume_where_the_market_counts_it(autojump_clock, clock):
    feed = CountingMarket()
    async with opened(feed) as service, peer(service, "4") as four:
        await feed.began.wait()
        for volume in ("100", "101.5", "104"):
            feed.sink.update([Ticker("A", last=Decimal(1), volume=Decimal(volume))])
        await four.subscribe("candles.A")
        push = await four.push()
        assert push["data"]["1m"][0][5] == "4.0"


async def test_what_cannot_be_a_price_makes_no_bar(autojump_clock, clock):
    async with opened() as service, peer(service, "4") as four:
        for data in ({"last": None}, {"last": "x"}, [], 7, {"last": "NaN"}, {"last": {}}, {}):
            await service.publish("ticker.A", data)
        await four.subscribe("candles.A")
        assert (await four.push())["state"] == "down"
        await service.publish("ticker.A", {"last": 7})
        while (push := await four.push())["type"] == "status":
            pass
        assert push["data"]["1s"][0][1] == "7"


async def test_bars_of_very_many_symbols_are_not_kept(autojump_clock, clock):
    async with opened(watch_linger_s=1, topic_linger_s=5) as service:
        for number in range(100):
            await tick(service, "1", f"X{number}")
        async with peer(service, "4") as four:
            await four.subscribe(*(f"candles.X{number}" for number in range(100)))
            for number in range(100):
                await tick(service, "2", f"X{number}")
            await trio.sleep(3)
            assert service.statistics().topics["candles"] == {"live": 100}
        await trio.sleep(60)
        assert sum(service.statistics().topics["candles"].values()) == 32


async def test_names_and_lines(autojump_clock, caplog):
    caplog.set_level("INFO", "trading_push")
    async with opened() as service, peer(service, "4") as four:
        for name in ("candles_BTCUSDT_4", "candles.btcusdt"):
            reply = await four.request("subscribe", args=[name])
            assert reply["results"][0]["channel"] == "candles.BTCUSDT"
        for name in ("candles.", "candles.*", "candles. A", "candles_A_5"):
            reply = await four.request("subscribe", args=[name])
            assert reply["results"][0]["error"]["code"] == "unknown_channel", name
        with pytest.raises(ValueError, match="made of the tickers"):
            await service.publish("candles.BTCUSDT", {})
    said = lines(caplog)
    for line in (
        "📊 用户4订阅candles.BTCUSDT行情",
        "   🚪 退出行情房间: candles_BTCUSDT_4",
        "📊 用户4取消订阅candles.BTCUSDT行情 - 剩余订阅者: 0",
        "   candles.BTCUSDT无订阅者，移除",
    ):
        assert line in said


def test_the_simulated_market_has_a_history_that_leads_to_its_price():
    market = SimulatedMarket(3)
    history = market.candles("BTCUSDT", BEGIN + 12_345, 600)
    assert history == SimulatedMarket(3).candles("BTCUSDT", BEGIN + 12_345, 600)
    for name, length in (("1s", 1000), ("1m", 60_000)):
        bars = history[name]
        assert len(bars) == 600
        assert all(later.at - bar.at == length for bar, later in pairwise(bars))
        assert all(bar.at % length == 0 for bar in bars)
        assert all(bar.low <= min(bar.open, bar.close) for bar in bars)
        assert all(bar.high >= max(bar.open, bar.close) for bar in bars)
        assert all(bar.close == later.open for bar, later in pairwise(bars))
        assert bars[-1].close == market.tickers(0)[0].last
    minute = [bar for bar in history["1s"] if BEGIN - 60_000 <= bar.at < BEGIN]
    assert history["1m"][-2] == Candle(
        BEGIN - 60_000,
        minute[0].open,
        max(bar.high for bar in minute),
        min(bar.low for bar in minute),
        minute[-1].close,
        sum((bar.volume for bar in minute), Decimal(0)),
    )


async def test_a_page_that_has_just_been_opened_shows_the_simulated_history(autojump_clock, clock):
    async with opened(SimulatedMarket(1)) as service, peer(service, "4") as four:
        await trio.sleep(0.5)
        await four.subscribe("candles.ETHUSDT")
        push = await four.push()
        assert push["type"] == "snapshot"
        assert len(push["data"]["1m"]) >= 600
        assert len(push["data"]["1s"]) >= 600
        assert all(bar[5] is not None for bar in push["data"]["1s"])
