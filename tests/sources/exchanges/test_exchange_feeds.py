"""The feeds of exchanges, against a loopback exchange: what they ask, merge, lose and recover."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import ssl
from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.exchange_server import Dialect, Exchange, Session, exchange
from harness.feeds import (
    KINDS,
    NOW,
    QUICK,
    Recorder,
    Shown,
    bybit_frame,
    feed_of,
    news,
    numbers,
    quote,
    recorded,
    running,
    shown,
    trade,
    whole,
    window,
)
from harness.support import free_port, until

from trading_push import logs
from trading_push.broker.base import Status
from trading_push.errors import ConfigurationError
from trading_push.models import Ticker
from trading_push.protocol.payloads import encode_data
from trading_push.sources.base import WatchedFeed
from trading_push.sources.exchanges import binance, bybit
from trading_push.sources.exchanges.amounts import UNUSABLE, reason_of
from trading_push.sources.exchanges.binance import BinanceFeed
from trading_push.sources.exchanges.bybit import BybitFeed
from trading_push.sources.exchanges.dialect import Reply, SymbolFrame
from trading_push.sources.exchanges.pacing import ConnectThrottle
from trading_push.sources.exchanges.tape import Tape
from trading_push.sources.paper import open_paper_exchange

both = pytest.mark.parametrize("dialect", KINDS)


# --- what is merged ----------------------------------------------------------------------------


async def test_binances_three_streams_become_one_ticker() -> None:
    async with exchange("binance") as there, running(feed_of(there), "BTCUSDT") as sink:
        await until(lambda: there.has("BTCUSDT"))
        await there.say(window("100", 1, 5), quote("99.5", "100.5", 7), trade("111", 6))
        await until(lambda: sink.last and sink.last["BTCUSDT"].last == Decimal(111))
    assert sink.last["BTCUSDT"] == Ticker(
        symbol="BTCUSDT",
        last=Decimal("111"),
        bid=Decimal("99.5"),
        ask=Decimal("100.5"),
        open=Decimal("95"),
        high=Decimal("111"),
        low=Decimal("90"),
        volume=Decimal("1000"),
        change=Decimal("16"),
        change_pct=Decimal("16.8421"),
        source_ts=NOW + 6,
    )


async def test_the_recorded_tape_ends_with_the_tickers_of_the_tape_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recorded("binance_spot_2024-08-08.jsonl.gz")
    with gzip.open(path, "rt") as lines:
        some = list(itertools.islice(lines, 20_000))
    (tmp_path / "tape.jsonl").write_text("".join(some), encoding="utf-8")
    tape, expected = Tape(tmp_path / "tape.jsonl", speed=100_000), Recorder()
    await tape.run(expected)
    frames = [json.loads(line)["frame"] for line in some]
    async with exchange("binance") as there:
        feed = feed_of(there)
        async with running(feed, "BTCUSDT", "ETHUSDT") as sink:
            await until(lambda: there.has("BTCUSDT", "ETHUSDT"))
            for frame in frames:
                await there.session.send(frame)
            await until(lambda: feed.statistics().used == len(frames))
            await until(
                lambda: sink.last.keys() == expected.last.keys() and not feed._tickers.changed
            )
    assert sink.last.keys() == {"BTCUSDT", "ETHUSDT"}
    for symbol, ticker in sink.last.items():
        # A tape tells the time of receipt where the exchange tells none; a live feed does not.
        events = [frame["data"].get("E", 0) for frame in frames if frame["data"]["s"] == symbol]
        # Nor does it have a window before the exchange has told it; that of a tape is its own.
        unknown = dict.fromkeys(("open", "high", "low", "volume", "change", "change_pct"))
        assert ticker == attrs.evolve(expected.last[symbol], source_ts=max(events), **unknown)


@pytest.mark.parametrize("dialect", ["binance", "linear"])
async def test_every_recorded_frame_is_parsed_or_reported(
    dialect: Dialect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    lines = recorded("exchange_frames.jsonl").read_text(encoding="utf-8").splitlines()
    symbols = ("BTCUSDT", "BNBBTC", "DOGEBNB", "ETHUSDT", "BTCUSD", "BTCUSDU23", "DOGEUSDT")
    async with exchange(dialect) as there:
        feed = feed_of(there)
        async with running(feed, *symbols) as sink:
            watched = [symbol for symbol in symbols if feed.knows(symbol)]
            await until(lambda: there.has(*watched))
            for line in lines:
                await there.session.send(line)
            counted = feed.statistics
            await until(lambda: sum(attrs.astuple(counted())) == len(lines))
            await until(lambda: not feed._tickers.changed)
    counts = feed.statistics()
    told = [m for m in caplog.messages if "无法解析" in m]
    assert len(told) == 1  # at once, and then once a minute
    if dialect == "binance":
        assert (counts.used, counts.outdated, counts.unused, counts.bad) == (12, 3, 14, 36)
        doge = sink.last["DOGEBNB"]
        assert (doge.last, doge.bid, doge.ask, doge.change_pct) == (
            *(Decimal("0.00014360"), Decimal("0.00014365"), Decimal("0.00014498")),
            Decimal("2.068"),
        )
        assert sink.last["BNBBTC"].last == Decimal("0.00219650")
    else:
        assert (counts.used, counts.outdated, counts.unused, counts.bad) == (5, 0, 17, 43)
        coin = sink.last["BTCUSDU23"]
        assert (coin.last, coin.bid, coin.ask) == (
            *(Decimal("29026.00"), Decimal("29025.00"), Decimal("29027.00")),
        )
        assert coin.change_pct == Decimal("2.3231")
        assert coin.source_ts == 1680673822199


async def test_bybits_snapshot_and_deltas_become_one_ticker() -> None:
    async with exchange("linear") as there, running(feed_of(there), "BTCUSDT") as sink:
        await until(lambda: there.has("BTCUSDT"))
        await there.say(
            bybit_frame("snapshot", 10, **whole("100")),
            bybit_frame("delta", 11, bid1Price="100.5"),
            bybit_frame("delta", 12, lastPrice="102", price24hPcnt="0.0736842", ask1Price=""),
        )
        await until(lambda: sink.last and sink.last["BTCUSDT"].last == Decimal(102))
    assert sink.last["BTCUSDT"] == Ticker(
        symbol="BTCUSDT",
        last=Decimal("102"),
        bid=Decimal("100.5"),
        ask=None,
        open=Decimal("95"),
        high=Decimal("110"),
        low=Decimal("90"),
        volume=Decimal("1000"),
        change=Decimal("7"),
        change_pct=Decimal("7.3684200"),
        source_ts=NOW + 12,
    )


async def test_a_spot_ticker_of_bybit_is_a_snapshot_without_a_quote() -> None:
    data = {key: value for key, value in whole("100").items() if "1Price" not in key}
    async with exchange("spot") as there, running(feed_of(there), "BTCUSDT") as sink:
        await until(lambda: there.has("BTCUSDT"))
        await there.say(bybit_frame("snapshot", 10, **data))
        await until(lambda: sink.last)
    ticker = sink.last["BTCUSDT"]
    assert (ticker.last, ticker.bid, ticker.ask) == (Decimal(100), None, None)


async def test_what_is_older_or_twice_there_changes_nothing_on_binance() -> None:
    late = [
        (trade("1", 8), "the trade before"),
        (trade("2", 10), "the same trade"),
        (quote("1", "2", 19), "the quote before"),
        (quote("1", "2", 20), "the same quote"),
        (window("1", 30, 9), "the same window"),
        (window("2", 29, 9), "the window before"),
    ]
    async with exchange("binance") as there:
        feed = feed_of(there)
        async with running(feed, "BTCUSDT") as sink:
            await until(lambda: there.has("BTCUSDT"))
            await there.say(quote("99.5", "100.5", 20), trade("105", 10), window("104", 30, 9))
            await until(lambda: feed.statistics().used == 3)
            await until(lambda: not feed._tickers.changed)
            before = sink.last["BTCUSDT"]
            told = len(sink.told)
            # The window did not know the last trade, and its quote is nobody's to date.
            assert (before.last, before.bid, before.ask) == (
                *(Decimal(105), Decimal("99.5"), Decimal("100.5")),
            )
            assert before.change_pct == Decimal("10.5263")
            await there.say(*(frame for frame, _ in late))
            await until(lambda: feed.statistics().outdated == len(late))
            assert len(sink.told) == told
            await there.say(window("106", 31, 12), trade("1", 11))  # which the window has counted
            await until(lambda: feed.statistics().outdated == len(late) + 1)
            await until(lambda: not feed._tickers.changed)
    after = sink.last["BTCUSDT"]
    assert (after.last, after.bid, after.change_pct) == (
        *(Decimal(106), Decimal("99.5"), Decimal("10.5")),
    )


async def test_what_is_older_or_twice_there_changes_nothing_on_bybit() -> None:
    late = [
        bybit_frame("delta", 11, lastPrice="1"),
        bybit_frame("delta", 12, lastPrice="2"),
        bybit_frame("snapshot", 10, **whole("3")),
        bybit_frame("snapshot", 12, **whole("4")),
    ]
    async with exchange("linear") as there:
        feed = feed_of(there)
        async with running(feed, "BTCUSDT") as sink:
            await until(lambda: there.has("BTCUSDT"))
            await there.say(
                bybit_frame("snapshot", 10, **whole("100")),
                bybit_frame("delta", 12, lastPrice="102"),
                *late,
            )
            await until(lambda: feed.statistics().outdated == len(late))
            await until(lambda: not feed._tickers.changed)
            assert sink.last["BTCUSDT"].last == Decimal(102)
            # The exchange may count anew after a restart; its clock goes on.
            await there.say(
                bybit_frame("snapshot", 1, ts=NOW + 20, **whole("103")),
                bybit_frame("delta", 2, ts=NOW + 21, lastPrice="104"),
                bybit_frame("delta", 2, ts=NOW + 22, lastPrice="105"),
            )
            await until(lambda: sink.last["BTCUSDT"].last == Decimal(105))


# --- what is asked -----------------------------------------------------------------------------


def test_it_knows_the_symbols_that_an_exchange_can_have() -> None:
    assert isinstance(BinanceFeed(), WatchedFeed)
    assert isinstance(BybitFeed(), WatchedFeed)
    for feed in (BinanceFeed(), BybitFeed()):
        assert feed.knows("BTCUSDT")
        for symbol in ("BTC:USDT", "BTC/USDT", "btcusdt", "", "A" * 33, 'A"', "BTCUSDT\n"):
            assert not feed.knows(symbol)
    assert BybitFeed().knows("BTC-26DEC25")


@pytest.mark.parametrize(
    "url", ["http://host/", "ws://", "wss://host:port/", "stream", "ws://a\tb"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        BinanceFeed(url)
    assert "\n" not in str(caught.value)
    assert "host" not in str(caught.value)  # a URL may hold a key


@both
async def test_it_is_connected_only_while_something_is_watched(dialect: Dialect) -> None:
    async with exchange(dialect) as there:
        feed = feed_of(there)
        async with running(feed) as sink:
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert there.opened == 0
            feed.watch("BTCUSDT")
            feed.watch("ETHUSDT")
            feed.watch("A:B")
            await until(lambda: there.has("BTCUSDT", "ETHUSDT"))
            feed.unwatch("ETHUSDT")
            await until(lambda: not there.has("ETHUSDT"))
            await there.say(news(dialect, "100"))
            # What still comes of a symbol that nobody watches is not given.
            await there.session.send(news(dialect, "100", "ETHUSDT"))
            await until(lambda: feed.statistics().unused == 1)
            assert sink.last.keys() == {"BTCUSDT"}
            feed.unwatch("BTCUSDT")
            await until(lambda: not there.sessions)
            feed.watch("ETHUSDT")
            await until(lambda: there.has("ETHUSDT"))
            assert (there.opened, there.has("BTCUSDT")) == (2, False)
            assert sink.stale_calls == [("refused", ["A:B"])]


@both
async def test_nothing_is_given_of_what_is_not_watched_and_not_yet_unsubscribed(
    dialect: Dialect,
) -> None:
    async with exchange(dialect) as there:
        feed = feed_of(there, spacing_s=0.5)
        async with running(feed, "BTCUSDT", "ETHUSDT") as sink:
            await until(lambda: there.has("BTCUSDT", "ETHUSDT"))
            feed.unwatch("ETHUSDT")
            await there.say(news(dialect, "100", "ETHUSDT"), news(dialect, "200"))
            await until(lambda: sink.last)
            assert feed.statistics().used == 2
            assert sink.last.keys() == {"BTCUSDT"}


@both
async def test_a_symbol_watched_again_begins_anew(dialect: Dialect) -> None:
    async with exchange(dialect) as there:
        feed = feed_of(there)
        async with running(feed, "BTCUSDT", "ETHUSDT") as sink:
            await until(lambda: there.has("BTCUSDT", "ETHUSDT"))
            await there.say(news(dialect, "100"))
            await until(lambda: sink.last)
            feed.unwatch("BTCUSDT")
            await until(lambda: not there.has("BTCUSDT"))
            feed.watch("BTCUSDT")
            await until(lambda: there.has("BTCUSDT"))
            sink.told.clear()
            if dialect == "binance":
                await there.say(quote("1", "2", next(numbers)))
            else:
                if dialect == "linear":
                    await there.say(bybit_frame("delta", next(numbers), bid1Price="1"))
                    await until(lambda: feed.statistics().outdated == 1)
                await there.say(news(dialect, "101"))
            await until(lambda: sink.last)
            assert sink.last["BTCUSDT"].last == (None if dialect == "binance" else Decimal(101))


async def test_binances_limits_are_kept() -> None:
    symbols = [f"S{number}USDT" for number in range(700)]
    async with exchange("binance", messages_per_s=5) as there:
        feed = BinanceFeed(there.url)  # with what is kept in earnest
        async with running(feed, *symbols):
            await until(lambda: there.has(*symbols))
            sizes = sorted(len(session.subscribed) for session in there.sessions)
            assert sizes == [18 * 3, 341 * 3, 341 * 3]
            for symbol in symbols[:120]:
                feed.unwatch(symbol)
            await until(lambda: not there.has(symbols[0]) and not there.has(symbols[119]))


async def test_bybits_limits_are_kept() -> None:
    symbols = [f"S{number}USDT" for number in range(25)]
    async with exchange("spot", messages_per_s=5) as there, running(BybitFeed(there.url), *symbols):
        await until(lambda: there.has(*symbols))
        assert [len(request["args"]) for request in there.session.requests] == [10] * 5
    longest = [f"{number:03}" + "A" * 29 for number in range(401)]
    async with exchange("linear") as there, running(feed_of(there), *longest):
        await until(lambda: there.has(*longest))
        assert sorted(len(session.subscribed) for session in there.sessions) == [1, 400]


@both
async def test_connections_are_not_made_faster_than_documented(dialect: Dialect) -> None:
    limits = binance.LIMITS if dialect == "binance" else bybit.LIMITS
    assert 5 * 60 / limits.connect_spacing_s <= 300
    opened: list[float] = []
    async with exchange(dialect) as there:
        there.refuses = True
        feed = feed_of(there, symbols_per_connection=1)
        feed.limits = attrs.evolve(feed.limits, connect_spacing_s=0.1)
        original = ConnectThrottle.wait_for_turn

        async def wait_for_turn(self: ConnectThrottle) -> None:
            await original(self)
            opened.append(trio.current_time())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ConnectThrottle, "wait_for_turn", wait_for_turn)
            async with running(feed, "A", "B", "C"):
                await until(lambda: len(opened) == 7)
    assert all(later - sooner > 0.099 for sooner, later in itertools.pairwise(opened))


@pytest.mark.parametrize(
    ("dialect", "in_part"),
    [("binance", False), ("linear", False), ("linear", True), ("okx", False), ("okx", True)],
)
async def test_a_symbol_that_is_refused_is_told_once_and_the_others_go_on(
    dialect: Dialect, in_part: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    good = ["BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT"]

    def told() -> list[str]:
        return [message for message in caplog.messages if "拒绝订阅" in message]

    async with exchange(dialect) as there:
        there.unknown, there.subscribes_in_part = {"NOPE", "NADA"}, in_part
        there.refuses_whole = not in_part
        feed = feed_of(there)
        symbols = ["BTCUSDT", "NOPE", "ETHUSDT", "SOLUSDT", "NADA", "XRPUSDT"]
        async with running(feed, *symbols) as sink:
            await until(lambda: there.has(*good) and len(told()) == 2)
            for symbol in good:
                await there.say(news(dialect, "100", symbol))
            await until(lambda: sink.last.keys() == set(good))
            await there.session.cut()
            await until(lambda: there.opened == 2 and there.has(*good))
            requests = there.session.requests
            assert not [r for r in requests if "nope" in str(r).lower()]
            assert len(told()) == 2
            feed.watch("NOPE")  # by somebody else, later
            feed.unwatch("NADA")
            await until(lambda: len(told()) == 3)
            there.unknown.clear()
            feed.watch("NOPE")
            await until(lambda: there.has("NOPE", *good))


# --- what goes wrong ---------------------------------------------------------------------------


async def hold_stale(here: Shown, symbols: Iterable[str], until_true: Callable[[], Any]) -> None:
    """Look all the time until something is so: none of the symbols may be shown as live."""
    with trio.fail_after(30):
        while not until_true():
            for symbol in symbols:
                assert not here.is_live(symbol), here.history
            await trio.sleep(0.001)


async def check_recovery(there: Exchange, here: Shown, break_it: Callable[[], Any]) -> None:
    """Live, broken, stale until the next frame of each symbol, and live by that alone."""
    dialect, symbols = there.dialect, ["BTCUSDT", "ETHUSDT"]
    await until(lambda: there.has(*symbols))
    for symbol in symbols:
        await there.say(news(dialect, "100", symbol))
    await until(lambda: all(map(here.is_live, symbols)))
    opened = there.opened
    await break_it()
    await until(lambda: not any(map(here.is_live, symbols)))
    assert here.status("BTCUSDT") == Status("stale", "disconnected")
    await hold_stale(here, symbols, lambda: there.opened == opened + 1 and there.has(*symbols))
    await trio.sleep(0.05)
    await hold_stale(here, symbols, lambda: True)
    await there.say(news(dialect, "200", "ETHUSDT"))
    await hold_stale(here, ["BTCUSDT"], lambda: here.is_live("ETHUSDT"))
    assert here.last("ETHUSDT") == "200"
    if dialect == "binance":
        await there.say(quote("1", "2", next(numbers)))
        await until(lambda: here.is_live("BTCUSDT"))
        assert here.last("BTCUSDT") is None  # and not the last trade of before
    else:
        await there.say(bybit_frame("delta", next(numbers), bid1Price="1"))
        await trio.sleep(0.05)
        assert not here.is_live("BTCUSDT")  # there is no snapshot yet
    await there.say(news(dialect, "300"))
    await until(lambda: here.is_live("BTCUSDT") and here.last("BTCUSDT") == "300")
    for symbol, value in (("BTCUSDT", "300"), ("ETHUSDT", "200")):
        mine = [told for name, told in here.history if name == symbol]
        lost = mine.index("stale")
        assert "100" in mine[:lost]
        assert "100" not in mine[lost:]
        assert mine[-2:] == [value, "live"] or mine[-1] == value


@both
async def test_a_cut_is_told_at_once_and_recovered(dialect: Dialect) -> None:
    async with exchange(dialect) as there, shown(feed_of(there), "BTCUSDT", "ETHUSDT") as here:
        await check_recovery(there, here, lambda: there.session.cut())


@both
async def test_what_came_a_moment_before_a_cut_is_not_given_after_it(dialect: Dialect) -> None:
    async with exchange(dialect) as there:
        feed = feed_of(there)
        async with running(feed, "BTCUSDT") as sink:
            for count in range(1, 6):
                await until(lambda count=count: there.opened == count and there.has("BTCUSDT"))
                sink.told.clear()
                await there.say(news(dialect, "100"))
                await until(lambda: sink.last)
                await there.say(news(dialect, "101"))
                await there.session.cut()
                await until(lambda: sink.stale_calls)
                await trio.sleep(0.05)
                assert sink.told[-1] == ("disconnected", ["BTCUSDT"])


@both
async def test_a_polite_close_is_a_cut(dialect: Dialect, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    async with exchange(dialect) as there, shown(feed_of(there), "BTCUSDT", "ETHUSDT") as here:
        await check_recovery(there, here, lambda: there.session.close(1008, "24 hours\x1b[2J"))
    [told] = [message for message in caplog.messages if "连接中断" in message]
    assert told.endswith(r": 1008 24 hours\x1b[2J - 0.02秒后重连")


@both
async def test_silence_is_a_cut(dialect: Dialect) -> None:
    async with exchange(dialect) as there:
        feed = feed_of(there, ping_s=0.1, silence_s=0.3)
        async with shown(feed, "BTCUSDT", "ETHUSDT") as here:

            async def fall_silent() -> None:
                there.session.fall_silent()

            await check_recovery(there, here, fall_silent)


@both
async def test_who_is_quiet_and_answers_pings_is_not_silent(dialect: Dialect) -> None:
    async with exchange(dialect) as there:
        feed = feed_of(there, ping_s=0.05, silence_s=0.4)
        async with shown(feed, "BTCUSDT") as here:
            await until(lambda: there.has("BTCUSDT"))
            await there.say(news(dialect, "100"))
            await until(lambda: here.is_live("BTCUSDT"))
            seen = len(there.session.arrivals)
            await until(lambda: len(there.session.arrivals) >= seen + 20)
            assert here.is_live("BTCUSDT")
            kind = "ping" if dialect == "binance" else "message"
            assert {kind for _, kind in there.session.arrivals[seen:]} == {kind}
            assert there.opened == 1
            assert there.session.requests[-1].get("op") == (
                None if dialect == "binance" else "ping"
            )


@both
async def test_an_answer_that_never_comes_is_silence_whatever_else_comes(
    dialect: Dialect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    async with exchange(dialect) as there:
        there.acknowledges = lambda session: False
        feed = feed_of(there, ping_s=0.1, silence_s=0.2)
        async with running(feed, "BTCUSDT"):
            with trio.fail_after(10):
                while there.opened < 3:
                    await there.say(news(dialect, "100"))
                    await trio.sleep(0.01)
            there.acknowledges = lambda session: True
            await until(lambda: any("✅" in message for message in caplog.messages))


@both
async def test_a_ping_of_the_exchange_is_answered(dialect: Dialect) -> None:
    async with exchange(dialect) as there, running(feed_of(there), "BTCUSDT"):
        await until(lambda: there.has("BTCUSDT"))
        with trio.fail_after(10):
            await there.session.socket.ping(b"1763600000")
        assert "pong" in {kind for _, kind in there.session.arrivals}


GARBAGE = [
    "",
    "{",
    "null",
    "[]",
    "42",
    '"text"',
    "{}",
    '{"stream":"btcusdt@trade","data":5}',
    '{"stream":"btcusdt@trade","data":{"e":"trade","s":"BTCUSDT","t":"x","p":"1","q":"1"}}',
    '{"stream":"btcusdt@trade","data":{"e":"trade","E":1,"s":"BTCUSDT","t":1,"p":"NaN","q":"1"}}',
    '{"stream":"btcusdt@trade","data":{"e":"trade","E":-1,"s":"BTCUSDT","t":1,"p":"1","q":"1"}}',
    '{"stream":"btcusdt@bookTicker","data":{"u":1e999,"s":"BTCUSDT","b":"1","a":"2"}}',
    '{"topic":"tickers.BTCUSDT","type":"snapshot","ts":1,"cs":1,"data":{"symbol":"ETHUSDT"}}',
    '{"topic":"tickers.BTCUSDT","type":"other","ts":1,"cs":1,"data":{"symbol":"BTCUSDT"}}',
    '{"topic":"tickers.BTCUSDT","type":"delta","ts":1,"cs":1,"data":[]}',
    '{"topic":"tickers.BTCUSDT","type":"snapshot","data":{"symbol":"BTCUSDT","lastPrice":"x"}}',
    '{"op":"subscribe","success":false,"ret_msg":"of nobody\'s request","req_id":"999999"}',
    '{"error":{"code":2,"msg":"of nobody\'s request"},"id":null}',
    "[" * 100_000,
    '{"stream":"btcusdt@trade","data":' * 2000,
    b"\x00binary",
]


@both
async def test_garbage_is_counted_told_once_a_minute_and_ends_nothing(
    dialect: Dialect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    async with exchange(dialect) as there:
        feed = feed_of(there)
        async with shown(feed, "BTCUSDT") as here:
            await until(lambda: there.has("BTCUSDT"))
            for garbage in GARBAGE:
                await there.session.send(garbage)
            await there.say(news(dialect, "100"))
            await until(lambda: here.is_live("BTCUSDT"))
            assert here.last("BTCUSDT") == "100"
        counts = feed.statistics()
        assert there.opened == 1
    assert (counts.used, counts.outdated) == (1, 0)
    # Some of what is garbage for one exchange is well for another kind of client, and unused.
    assert counts.bad + counts.unused in range(len(GARBAGE) - 1, len(GARBAGE) + 1)
    assert counts.bad >= 14
    assert len([message for message in caplog.messages if "无法解析" in message]) == 1


HOSTILE = st.sampled_from(
    ["0", "-1", "1e19", "5e-20", "NaN", "Infinity", "", "1", "9" * 50, "\ud800", None, True, [], {}]
) | (st.integers() | st.floats() | st.text(max_size=5))


@st.composite
def almost_well(draw: st.DrawFn) -> str:
    """A frame, or an answer, with some of its values replaced."""
    price, number = draw(st.sampled_from(["1", "0.5", "1e19", "5e-20"])), draw(st.integers(0, 9))
    message: dict[str, Any] = draw(
        st.sampled_from(
            [
                trade(price, number),
                quote(price, price, number),
                window(price, number, number),
                bybit_frame("snapshot", number, **whole(price)),
                bybit_frame("delta", number, lastPrice=price),
                {"result": None, "id": number},
                {"error": {"code": 2, "msg": "no"}, "id": number},
                {"op": "subscribe", "success": False, "ret_msg": "no", "req_id": str(number)},
            ]
        )
    )
    message = json.loads(json.dumps(message))
    for part in (message, message.get("data", {})):
        replaced = draw(
            st.dictionaries(st.sampled_from(sorted(part) or ["x"]), HOSTILE, max_size=1)
        )
        part.update(replaced)
    return json.dumps(message)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text() | almost_well(), max_size=6))
def test_no_message_raises_what_would_end_a_feed(messages: list[str]) -> None:
    for feed in (BinanceFeed(), BybitFeed()):
        merged = feed.new_symbol("BTCUSDT")
        for message in messages:
            try:
                said = feed.read(message)
            except UNUSABLE as error:
                logs.line("exchange_bad_frames", exchange="", count=1, error=reason_of(error))
                continue
            if isinstance(said, SymbolFrame) and merged.apply(said.event):
                encode_data(merged.ticker())
            assert isinstance(said, SymbolFrame | Reply | None)


async def test_garbage_is_told_again_after_a_minute(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    feed = BinanceFeed()
    for _ in range(121):
        feed._frames.count_bad("a frame\nwithout sense")
        await trio.sleep(1)
    assert [message for message in caplog.messages if "无法解析" in message] == [
        f"⚠️ Binance有{count}条消息无法解析: a frame\\x0awithout sense" for count in (1, 60, 60)
    ]


@both
async def test_an_exchange_that_refuses_for_a_while_is_asked_again(
    dialect: Dialect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")

    def told() -> list[str]:
        return [message for message in caplog.messages if "连接中断" in message]

    async with exchange(dialect) as there:
        there.refuses = True
        async with shown(feed_of(there, last_pause_s=1), "BTCUSDT", "ETHUSDT") as here:
            await until(lambda: len(told()) >= 3)
            pauses = [message.rpartition(" - ")[2] for message in told()]
            assert pauses[:3] == ["0.02秒后重连", "0.04秒后重连", "0.08秒后重连"]
            assert "503" in told()[0]
            there.refuses = False

            async def cut_and_refuse() -> None:
                there.refuses = True
                before = len(told())
                await there.session.cut()
                await until(lambda: len(told()) >= before + 3)
                there.refuses = False

            await check_recovery(there, here, cut_and_refuse)


async def test_a_server_that_is_no_exchange_is_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    answers = [b"HTTP/1.1 200 OK\r\n\r\n", b"\x16\x03\x01 rubbish\r\n\r\n", b""]
    served = 0

    async def handle(stream: trio.SocketStream) -> None:
        nonlocal served
        served += 1
        await stream.receive_some()
        await stream.send_all(answers[served % 3] or b"H")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}/"
        limits = attrs.evolve(binance.LIMITS, **QUICK, connect_timeout_s=0.2)
        async with running(BinanceFeed(url, limits=limits), "BTCUSDT"):
            await until(lambda: served >= 6)
        nursery.cancel_scope.cancel()
    assert len([message for message in caplog.messages if "连接中断" in message]) >= 5


async def test_where_nobody_listens_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    url = f"ws://127.0.0.1:{free_port()}/stream?key=secret"
    async with running(BinanceFeed(url, limits=attrs.evolve(binance.LIMITS, **QUICK)), "BTCUSDT"):
        await until(lambda: caplog.messages)
    assert caplog.messages[0].endswith("Connection refused - 0.02秒后重连")
    assert "secret" not in caplog.messages[0]


async def test_over_tls_and_not_to_whom_nobody_vouches_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)

    def told() -> list[str]:
        return [message for message in caplog.messages if "连接中断" in message]

    async with exchange("binance", ssl_context=context) as there:
        assert there.url.startswith("wss://localhost:")
        async with running(feed_of(there), "BTCUSDT"):
            await until(lambda: len(told()) >= 2)
        assert "certificate" in told()[0]
        assert there.opened == 0
        authority.cert_pem.write_to_path(tmp_path / "authority.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        async with running(feed_of(there), "BTCUSDT") as sink:
            await until(lambda: there.has("BTCUSDT"))
            await there.say(news("binance", "100"))
            await until(lambda: sink.last)


# --- before the 24 hours are over ----------------------------------------------------------------


def first_alone(session: Session) -> bool:
    return session.number == 1


@both
async def test_a_connection_is_replaced_without_a_gap(dialect: Dialect) -> None:
    """Prices go up all the time, and old connections are cut by the exchange; nobody sees it."""
    symbols = ["BTCUSDT", "ETHUSDT"]
    async with exchange(dialect) as there:
        feed = feed_of(there, lifetime_s=0.2)
        async with shown(feed, *symbols) as here:
            await until(lambda: there.has(*symbols))
            price, seen = itertools.count(100), {}
            for symbol in symbols:
                await there.say(news(dialect, "99", symbol))
            await until(lambda: all(map(here.is_live, symbols)))
            with trio.fail_after(30):
                while there.opened < 5:
                    await there.say(news(dialect, str(next(price))))
                    assert here.is_live("BTCUSDT")
                    assert here.is_live("ETHUSDT")  # which is quiet, and acknowledged
                    seen.setdefault(there.opened, len(there.sessions))
                    await trio.sleep(0.002)
            final = str(next(price))
            await there.say(news(dialect, final))
            await until(lambda: here.last("BTCUSDT") == final)
            await until(lambda: len(there.sessions) == 1)
            assert here.is_live("ETHUSDT")
        assert "stale" not in [told for _, told in here.history]
        mine = [int(told) for name, told in here.history if name == "BTCUSDT" and told != "live"]
        assert mine == sorted(mine)
        assert feed.statistics().outdated > 0  # while there were two, each said it


@both
async def test_a_lagging_connection_overwrites_nothing(dialect: Dialect) -> None:
    async with exchange(dialect) as there:
        there.acknowledges = first_alone
        feed = feed_of(there, lifetime_s=0.1)
        async with running(feed, "BTCUSDT") as sink:
            await until(lambda: there.has("BTCUSDT"))
            frames = [news(dialect, str(price)) for price in range(100, 110)]
            # The second is never acknowledged, so that there are two for a while.
            await until(lambda: len(there.sessions) == 2 and there.sessions[1].subscribed)
            old, fresh = there.sessions
            for frame in frames:
                await fresh.send(frame)
            for frame in frames:
                await old.send(frame)
            await until(lambda: sum(attrs.astuple(feed.statistics())) == 20)
            await until(lambda: not feed._tickers.changed)
            assert feed.statistics() == attrs.evolve(feed.statistics(), used=10, outdated=10)
            given = [each.last for each in sink.told if isinstance(each, Ticker)]
            assert given == sorted(given)
            assert given[-1] == Decimal(109)


@both
async def test_what_is_still_under_way_on_the_old_connection_is_heard(dialect: Dialect) -> None:
    async with exchange(dialect) as there:
        feed = feed_of(there, lifetime_s=0.1, overlap_s=20)
        async with running(feed, "BTCUSDT") as sink:
            await until(lambda: there.has("BTCUSDT"))
            await until(lambda: len(there.sessions) == 2 and there.sessions[1].subscribed)
            old = there.sessions[0]
            await until(lambda: feed._shards[0].connections[1].settled.is_set())
            await old.send(news(dialect, "100"))
            await until(lambda: sink.last)


@both
async def test_a_takeover_that_fails_leaves_the_old_one_and_is_tried_again(
    dialect: Dialect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    async with exchange(dialect) as there:
        there.acknowledges = first_alone
        feed = feed_of(there, lifetime_s=0.1, takeover_timeout_s=0.1)
        async with shown(feed, "BTCUSDT") as here:
            await until(lambda: there.has("BTCUSDT"))
            await there.say(news(dialect, "100"))
            await until(lambda: here.is_live("BTCUSDT"))
            first = there.sessions[0]
            await until(lambda: any("were not ack" in message for message in caplog.messages))
            there.refuses = True
            await until(lambda: any("503" in message for message in caplog.messages))
            assert first in there.sessions
            assert here.is_live("BTCUSDT")
            there.refuses, there.acknowledges = False, lambda session: True
            await until(lambda: there.sessions and first not in there.sessions)
            await there.say(news(dialect, "101"))
            await until(lambda: here.last("BTCUSDT") == "101")
        assert "stale" not in [told for _, told in here.history]


@both
async def test_a_cut_during_a_takeover_is_told_of_what_the_new_one_has_not_said(
    dialect: Dialect,
) -> None:
    symbols = ["BTCUSDT", "ETHUSDT"]
    async with exchange(dialect) as there:
        there.acknowledges = first_alone
        feed = feed_of(there, lifetime_s=0.3)
        async with shown(feed, *symbols) as here:
            await until(lambda: there.has(*symbols))
            for symbol in symbols:
                await there.sessions[0].send(news(dialect, "100", symbol))
            await until(lambda: all(map(here.is_live, symbols)))
            await until(
                lambda: len(there.sessions) == 2 and len(there.sessions[1].subscribed) in (2, 6)
            )
            old, fresh = there.sessions
            await fresh.send(news(dialect, "101"))
            await until(lambda: here.last("BTCUSDT") == "101")
            await old.cut()
            await until(lambda: not here.is_live("ETHUSDT"))
            assert here.is_live("BTCUSDT")
            await fresh.send(news(dialect, "102", "ETHUSDT"))
            await until(lambda: here.is_live("ETHUSDT"))
            assert here.last("ETHUSDT") == "102"


# --- its end -----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("state", ["live", "silent", "refused", "unreachable"])
async def test_cancelled_it_leaves_nothing_and_can_run_again(dialect: Dialect, state: str) -> None:
    async with exchange(dialect) as there:
        feed = feed_of(there)
        there.refuses = state == "refused"
        if state == "unreachable":
            feed.address = attrs.evolve(feed.address, port=1)
        async with running(feed, "BTCUSDT", "ETHUSDT"):
            if state in ("live", "silent"):
                await until(lambda: there.has("BTCUSDT", "ETHUSDT"))
                if state == "silent":
                    there.session.fall_silent()
            else:
                await trio.sleep(0.05)
            cancelled_at = trio.current_time()
        assert trio.current_time() - cancelled_at < 1
        for session in there.sessions:
            session._tapped.hears.set()
        await until(lambda: not there.sessions)
        assert all(not shard.connections for shard in feed._shards)
        there.refuses = False
        if state != "unreachable":
            async with running(feed) as sink:
                await until(lambda: there.has("BTCUSDT", "ETHUSDT"))
                await there.say(news(dialect, "100"))
                await until(lambda: sink.last)


async def test_a_close_that_is_not_answered_does_not_hold_the_end_up() -> None:
    async with exchange("binance") as there:
        feed = feed_of(there)
        async with running(feed, "BTCUSDT"):
            await until(lambda: there.has("BTCUSDT"))
            silent = there.session
            silent.fall_silent()
            feed.unwatch("BTCUSDT")
            await until(lambda: not feed._shards[0].connections)
            feed.watch("ETHUSDT")
            await until(lambda: there.has("ETHUSDT"))
            silent._tapped.hears.set()
            await until(lambda: silent not in there.sessions)


# --- the paper exchange on a live market ----------------------------------------------------------


async def test_the_paper_exchange_watches_what_its_users_trade(tmp_path: Path) -> None:
    symbols = ["BNBUSDT", "BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT"]
    async with exchange("binance") as there:
        feed, sink = feed_of(there), Recorder()
        async with open_paper_exchange(tmp_path / "paper.db", market=feed, seed=1) as paper:
            assert all(map(paper.knows, symbols))
            assert not paper.knows("DOGEUSDT")
            assert not isinstance(paper, WatchedFeed)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(paper.run, sink)
                await until(lambda: there.has(*symbols))
                assert len(there.session.subscribed) == 15
                numbers = itertools.count(1)

                async def move() -> None:
                    while True:
                        for number in itertools.islice(numbers, 5):
                            price = 100 + number % 7
                            await there.say(quote(f"{price}", f"{price}.1", number))
                        await trio.sleep(0.02)

                nursery.start_soon(move)
                book = paper._trading.engine
                await until(lambda: any(each.holdings for each in book.accounts.values()))
                await there.session.cut()
                await until(lambda: ("disconnected", ["BTCUSDT"]) in sink.stale_calls)
                await until(lambda: there.has(*symbols))
                nursery.cancel_scope.cancel()
        await until(lambda: not there.sessions)
        assert feed._shard_of == {}
