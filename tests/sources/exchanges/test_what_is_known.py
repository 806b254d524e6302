"""What is not yet true is not shown as true, and what an exchange announces is heard."""

from __future__ import annotations

import logging
from decimal import Decimal
from typing import Any

import attrs
import pytest

from harness.exchange_server import Dialect, exchange
from harness.feeds import (
    KINDS,
    NOW,
    bybit_frame,
    feed_of,
    news,
    okx_frame,
    okx_whole,
    quote,
    running,
    shown,
    trade,
    whole,
    window,
)
from harness.room import lines
from harness.support import until

from trading_push import BinanceFeed, ConfigurationError, Ticker

both = pytest.mark.parametrize("dialect", KINDS)


def known(ticker: Ticker) -> dict[str, str]:
    values = attrs.asdict(ticker)
    return {name: str(value) for name, value in values.items() if value is not None}


async def test_a_window_is_unknown_until_the_exchange_tells_it() -> None:
    async with exchange("binance") as there, running(feed_of(there), "BTCUSDT") as sink:
        await until(lambda: there.has("BTCUSDT"))
        await there.say(trade("100", 6), trade("120", 7), quote("119", "121", 1))
        await until(lambda: sink.last and sink.last["BTCUSDT"].bid)
        assert known(sink.last["BTCUSDT"]) == {
            **{"symbol": "BTCUSDT", "last": "120", "bid": "119", "ask": "121"},
            "source_ts": str(NOW + 7),
        }
        await there.say(window("100", 8, 6))
        await until(lambda: sink.last["BTCUSDT"].open)
        ticker = sink.last["BTCUSDT"]
        assert (ticker.last, ticker.open, ticker.high, ticker.volume) == (120, 95, 120, 1000)
        await there.say(trade("80", 9))
        await until(lambda: sink.last["BTCUSDT"].low == 80)


def no_trades(symbol: str) -> dict[str, Any]:
    """A 24hrTicker of a pair that nobody has traded yet, but some want to buy."""
    frame = window("0.00000000", 1, -1, symbol)
    zeros = dict.fromkeys("pcQoahlvqxw", "0.00000000")
    frame["data"] |= zeros | {"P": "0.000", "b": "1.50000000", "B": "10", "F": -1, "L": -1, "n": 0}
    return frame


async def test_a_pair_without_a_trade_yet_has_no_price() -> None:
    async with exchange("binance") as there:
        feed = feed_of(there)
        async with running(feed, "NEWUSDT") as sink:
            await until(lambda: there.has("NEWUSDT"))
            await there.say(no_trades("NEWUSDT"), quote("1.5", "0.00000000", 1, "NEWUSDT"))
            await until(lambda: sink.last and sink.last["NEWUSDT"].bid)
            said = known(sink.last["NEWUSDT"])
            assert said.keys() == {"symbol", "bid", "volume", "source_ts"}
            assert feed.statistics().bad == 0
            await there.say(trade("2", 0, "NEWUSDT"))
            await until(lambda: sink.last["NEWUSDT"].last)
            assert sink.last["NEWUSDT"].high == 2


async def test_on_bybit_and_okx_nothing_stands_for_no_price() -> None:
    async with exchange("linear") as there, running(feed_of(there), "X") as sink:
        await until(lambda: there.has("X"))
        data = whole("0") | {"bid1Price": "", "ask1Price": "0", "prevPrice24h": "0"}
        await there.say(bybit_frame("snapshot", 1, "X", **data))
        await until(lambda: sink.last)
        ticker = sink.last["X"]
        assert (ticker.last, ticker.bid, ticker.ask, ticker.open, ticker.change) == (None,) * 5
    async with exchange("okx") as there, running(feed_of(there), "X") as sink:
        await until(lambda: there.has("X"))
        await there.say(okx_frame(1, "X", **dict.fromkeys(okx_whole("1"), "")))
        await until(lambda: sink.last)
        assert known(sink.last["X"]) == {"symbol": "X", "source_ts": str(NOW + 1)}


async def test_okxs_ticker_is_one_frame() -> None:
    async with exchange("okx") as there:
        feed = feed_of(there)
        async with running(feed, "BTC-USDT") as sink:
            await until(lambda: there.has("BTC-USDT"))
            await there.say(okx_frame(5, "BTC-USDT", **okx_whole("100")))
            await until(lambda: sink.last)
            assert sink.last["BTC-USDT"] == Ticker(
                symbol="BTC-USDT",
                last=Decimal(100),
                bid=Decimal(99),
                ask=Decimal(101),
                open=Decimal(95),
                high=Decimal(110),
                low=Decimal(90),
                volume=Decimal(1000),
                change=Decimal(5),
                change_pct=Decimal("5.2632"),
                source_ts=NOW + 5,
            )
            # An older one, the same again, and one that cannot be used.
            await there.say(
                okx_frame(4, "BTC-USDT", **okx_whole("1")),
                okx_frame(5, "BTC-USDT", **okx_whole("100")),
                okx_frame(6, "BTC-USDT", last="NaN"),
            )
            await until(lambda: feed.statistics().bad == 1)
            assert feed.statistics().outdated == 2


def book(kind: str, u: int, ts: int, bids: list[list[str]], asks: list[list[str]]) -> Any:
    data = {"s": "BTCUSDT", "b": bids, "a": asks, "u": u, "seq": u * 10}
    return {"topic": "orderbook.1.BTCUSDT", "type": kind, "ts": ts, "cts": ts, "data": data}


async def test_a_spot_ticker_of_bybit_has_the_best_of_the_order_book() -> None:
    spot = {name: value for name, value in whole("100").items() if "1Price" not in name}
    async with exchange("spot") as there:
        feed = feed_of(there)
        async with running(feed, "BTCUSDT") as sink:
            await until(lambda: there.has("BTCUSDT"))
            frames = [
                book("delta", 1, NOW, [["1", "1"]], []),  # before there is a snapshot
                book("snapshot", 5, NOW + 5, [["99", "2"]], [["101", "1"]]),
                book("delta", 6, NOW + 6, [["99", "0"], ["98", "1"]], []),
                book("delta", 6, NOW + 6, [["1000", "1"]], []),  # again
                bybit_frame("snapshot", 10, **spot),
            ]
            await there.say(*frames)
            await until(lambda: sink.last and sink.last["BTCUSDT"].last)
            ticker = sink.last["BTCUSDT"]
            assert (ticker.last, ticker.bid, ticker.ask) == (100, 98, 101)
            assert ticker.source_ts == NOW + 10
            assert feed.statistics().outdated == 2
            # The exchange counts anew after a restart; an empty side is no price.
            await there.say(book("snapshot", 1, NOW + 20, [], [["102", "1"]]))
            await until(lambda: sink.last["BTCUSDT"].ask == 102)
            assert sink.last["BTCUSDT"].bid is None


async def test_the_frame_of_all_symbols_is_each_of_them() -> None:
    async with exchange("binance") as there:
        feed = feed_of(there)
        async with running(feed, "BTCUSDT", "ETHUSDT") as sink:
            await until(lambda: there.has("BTCUSDT", "ETHUSDT"))
            some = [window("1", 1, 1, each)["data"] for each in ("BTCUSDT", "ETHUSDT", "XRPUSDT")]
            await there.session.send({"stream": "!ticker@arr", "data": some})
            await until(lambda: len(sink.last) == 2)
            counts = feed.statistics()
            assert (counts.used, counts.unused, counts.bad) == (2, 1, 0)


SHUTDOWNS = [
    ("binance", {"e": "serverShutdown", "E": NOW}),
    ("binance", {"stream": "btcusdt@trade", "data": {"e": "serverShutdown", "E": NOW}}),
    ("binance", {"event": {"e": "serverShutdown", "E": NOW}}),
    ("okx", {"event": "notice", "code": "64008", "msg": "The connection will soon be closed"}),
]


@pytest.mark.parametrize(("dialect", "said"), SHUTDOWNS)
async def test_an_announced_end_is_met_without_a_gap(
    dialect: Dialect, said: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    async with exchange(dialect) as there, shown(feed_of(there), "BTCUSDT") as here:
        await until(lambda: there.has("BTCUSDT"))
        await there.say(news(dialect, "100"))
        await until(lambda: here.is_live("BTCUSDT"))
        await until(lambda: any("已连接" in line for line in lines(caplog)))
        old = there.session
        await old.send(said)
        await until(lambda: there.opened == 2 and there.sessions and old not in there.sessions)
        await there.say(news(dialect, "101"))
        await until(lambda: here.last("BTCUSDT") == "101")
        assert "stale" not in [told for _, told in here.history]
    assert len([line for line in lines(caplog) if "更换连接" in line]) == 1


@both
async def test_alive_but_mute_is_connected_anew_less_and_less_often(
    dialect: Dialect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")

    def told() -> list[str]:
        return [line for line in lines(caplog) if "更换连接" in line]

    async with exchange(dialect) as there:
        feed = feed_of(there, mute_s=0.2, ping_s=0.05)
        async with shown(feed, "BTCUSDT") as here:
            await until(lambda: there.has("BTCUSDT"))
            await there.say(news(dialect, "100"))
            await until(lambda: here.is_live("BTCUSDT"))
            await until(lambda: len(told()) >= 2)
            assert [line.rpartition("for ")[2] for line in told()[:2]] == ["0.2 s", "0.4 s"]
            await until(lambda: there.opened >= 3)
            await there.say(news(dialect, "101"))
            await until(lambda: here.last("BTCUSDT") == "101")
            seen = len(told())
            await until(lambda: len(told()) > seen)
            assert told()[seen].endswith("0.2 s")  # as soon as at first
        assert "stale" not in [state for _, state in here.history]


@pytest.mark.parametrize(
    "url",
    [
        "wss://stream.binance.com:9443/ws",
        "wss://stream.binance.com:9443/ws/btcusdt@trade",
        "wss://h/ws?x",
    ],
)
def test_binances_raw_streams_are_refused_with_advice(url: str) -> None:
    with pytest.raises(ConfigurationError, match="end it with /stream"):
        BinanceFeed(url)
