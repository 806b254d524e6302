"""The recorded tape: formats told apart by content, bad lines counted, the pace, the values."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from harness.support import DATA

from trading_push.errors import ConfigurationError
from trading_push.models import Ticker
from trading_push.sources.exchanges.tape import Tape

T0 = 1_723_161_254_000  # 2024-08-08 23:54:14 UTC, ms


class Recorder:
    """A sink that keeps what it is given, with the time since it was made."""

    def __init__(self) -> None:
        self.started = trio.current_time()
        self.calls: list[tuple[float, list[Ticker]]] = []
        self.stale_reasons: list[tuple[float, str]] = []
        self.scope = trio.CancelScope()
        """Cancelled by the call number `stop_at`, for a tape that does not end."""
        self.stop_at = 0

    def update(self, tickers: Sequence[Ticker]) -> None:
        assert tickers
        assert len({ticker.symbol for ticker in tickers}) == len(tickers)
        self.calls.append((trio.current_time() - self.started, list(tickers)))
        if len(self.calls) == self.stop_at:
            self.scope.cancel()

    def stale(self, reason: str, symbols: object = None) -> None:
        self.stale_reasons.append((trio.current_time() - self.started, reason))

    @property
    def last(self) -> dict[str, Ticker]:
        return {ticker.symbol: ticker for _, tickers in self.calls for ticker in tickers}


def recorded(ms: int, data: dict[str, Any], stream: str = "x@y") -> str:
    return json.dumps({"recv_ns": ms * 1_000_000, "frame": {"stream": stream, "data": data}})


def quote(bid: str, ask: str, symbol: str = "BTCUSDT") -> dict[str, Any]:
    return {"u": 1, "s": symbol, "b": bid, "B": "1.0", "a": ask, "A": "2.0"}


def trade(price: str, at: int, quantity: str = "0.5", symbol: str = "BTCUSDT") -> dict[str, Any]:
    return {
        "e": "trade",
        "E": at,
        "s": symbol,
        "t": 1,
        "p": price,
        "q": quantity,
        "T": at - 1,
        "m": True,
    }


async def play(path: Path, speed: float = 1.0) -> tuple[Tape, Recorder]:
    tape = Tape(path, speed)
    await tape.open()
    sink = Recorder()
    await tape.run(sink)
    return tape, sink


def write(path: Path, lines: Sequence[str | bytes]) -> Path:
    raw = b"".join((x.encode() if isinstance(x, str) else x) + b"\n" for x in lines)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["tape.jsonl", "tape.gz"])
async def test_recorded_frames(tmp_path: Path, autojump_clock: MockClock, name: str) -> None:
    lines = [
        recorded(T0, quote("61837.63000000", "61837.64000000")),
        recorded(T0 + 500, trade("61837.64", T0 + 1700, "0.02")),
        recorded(T0 + 500, quote("2683.80", "2683.81", "ETHUSDT")),
        recorded(T0 + 1000, trade("61840.00", T0 + 2300, "0.03")),
        recorded(T0 + 2000, trade("61830.00", T0 + 3100, "1")),
        recorded(T0 + 2020, quote("61829.00", "61831.00")),
        recorded(T0 + 4000, quote("61829.00", "61830.00")),
    ]
    tape, sink = await play(write(tmp_path / name, lines), speed=2)
    assert [round(at, 3) for at, _ in sink.calls] == [0, 0.25, 0.5, 1.0, 1.02, 2.0]
    assert [len(tickers) for _, tickers in sink.calls] == [1, 2, 1, 1, 1, 1]
    assert sink.calls[0][1] == [
        Ticker(
            symbol="BTCUSDT",
            bid=Decimal("61837.63000000"),
            ask=Decimal("61837.64000000"),
            source_ts=T0,
        )
    ]
    assert sink.last["BTCUSDT"] == Ticker(
        symbol="BTCUSDT",
        last=Decimal("61830.00"),
        bid=Decimal("61829.00"),
        ask=Decimal("61830.00"),
        open=Decimal("61837.64"),
        high=Decimal("61840.00"),
        low=Decimal("61830.00"),
        volume=Decimal("1.05"),
        change=Decimal("-7.64"),
        change_pct=Decimal("-0.0124"),
        source_ts=T0 + 4000,
    )
    # The exchange's clock runs ahead of the recorder's: its time does not jump back.
    assert [calls[1][0].source_ts for calls in sink.calls[3:]] == [T0 + 3100, T0 + 3100, T0 + 4000]
    assert [reason for _, reason in sink.stale_reasons] == ["tape_ended"]
    assert sink.stale_reasons[0][0] >= 2.0
    assert tape.bad_lines == 0
    assert tape.knows("ETHUSDT")
    assert not tape.knows("SOLUSDT")


async def test_bare_frames_and_bare_events(tmp_path: Path, autojump_clock: MockClock) -> None:
    lines = [
        json.dumps(quote("1", "2")),  # No time anywhere: nobody knows when.
        json.dumps({"stream": "btcusdt@trade", "data": trade("5.1", T0)}),
        json.dumps({"stream": "btcusdt@bookTicker", "data": quote("5.0", "5.2")}),
        json.dumps(trade("5.3", T0 + 1000) | {"e": "aggTrade", "a": 26129, "f": 1, "l": 3}),
        json.dumps({"stream": "btcusdt@depth", "data": {"e": "depthUpdate", "E": T0, "b": []}}),
        json.dumps({"stream": "btcusdt@kline_1m", "data": {"e": "kline", "E": T0, "k": {}}}),
        json.dumps(
            {
                "e": "24hrTicker",
                "E": T0 + 2000,
                "s": "btcusdt",
                "p": "0.2",
                "P": "3.846",
                "c": "5.4",
                "b": "5.35",
                "a": "5.45",
                "o": "5.2",
                "h": "6",
                "l": "4",
                "v": "1000.5",
            }
        ),
        json.dumps(quote("5.36", "5.44") | {"e": "bookTicker", "E": T0 + 3000}),
        json.dumps({"data": trade("6.1", T0 + 4000)}),
    ]
    tape, sink = await play(write(tmp_path / "tape", lines))
    assert [round(at, 3) for at, _ in sink.calls] == [0, 1, 2, 3, 4]
    assert (sink.calls[0][1][0].bid, sink.calls[0][1][0].last) == (Decimal("5.0"), Decimal("5.1"))
    # The exchange's own window, and what it says of it.
    assert sink.calls[-2][1] == [
        Ticker(
            symbol="BTCUSDT",
            last=Decimal("5.4"),
            bid=Decimal("5.36"),
            ask=Decimal("5.44"),
            open=Decimal("5.2"),
            high=Decimal("6"),
            low=Decimal("4"),
            volume=Decimal("1000.5"),
            change=Decimal("0.2"),
            change_pct=Decimal("3.846"),
            source_ts=T0 + 3000,
        )
    ]
    last = sink.last["BTCUSDT"]
    assert (last.last, last.high, last.volume) == (Decimal("6.1"), last.last, Decimal("1000.5"))
    assert (last.change, last.change_pct) == (Decimal("0.9"), Decimal("17.3077"))
    # Other streams, recorded along, are no bad lines.
    assert [line.number for line in tape.bad_examples] == [1]


async def test_bad_lines_are_counted_not_fatal(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    good = recorded(T0, trade("61837.64", T0))
    lines: list[str | bytes] = [
        "{",
        good,
        b"\xff\xfe{}",
        "",
        recorded(T0, trade("NaN", T0)),
        recorded(T0, trade("-1", T0)),
        recorded(T0, trade("1e999", T0)),
        recorded(T0, trade("0", T0)),
        recorded(T0, trade("1", T0, symbol="no*symbol")),
        recorded(T0, {"e": "trade", "s": "BTCUSDT"}),
        recorded(T0, quote("1", "x")),
        '{"recv_ns":1,"frame":' + '{"data":' * 20_000,
        '{"result":null,"id":1}',
        recorded(T0 + 1000, trade("61838.00", T0)),
        good[:50],
    ]
    with caplog.at_level(logging.INFO, "trading_push"):
        tape, sink = await play(write(tmp_path / "tape.jsonl", lines))
    assert tape.bad_lines == 12
    assert [line.number for line in tape.bad_examples] == [1, 3, 5, 6, 7]
    assert sink.last["BTCUSDT"].last == Decimal("61838.00")
    told = [r for r in caplog.records if getattr(r, "event", "") == "tape_bad_lines"]
    assert len(told) == 1
    assert told[0].fields["count"] == 12
    assert told[0].fields["line"] == 1


async def test_bid_and_ask_are_of_one_frame(tmp_path: Path, autojump_clock: MockClock) -> None:
    pairs = [(f"{100 + i}.1", f"{100 + i}.2") for i in range(500)]
    lines = [recorded(T0 + i, quote(*pair)) for i, pair in enumerate(pairs)]
    _, sink = await play(write(tmp_path / "tape.jsonl", lines), speed=2)
    given = [(str(t.bid), str(t.ask)) for _, tickers in sink.calls for t in tickers]
    assert set(given) <= set(pairs)
    assert given[-1] == pairs[-1]
    # 250 ms of frames, and the sink is woken every 20 ms at most.
    assert 10 <= len(given) <= 14
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(sink.calls)]
    assert min(gaps) >= 0.0199


async def test_the_pace_does_not_drift(tmp_path: Path, autojump_clock: MockClock) -> None:
    lines = [recorded(T0 + i * 333, trade(str(1 + i), T0)) for i in range(900)]
    _, sink = await play(write(tmp_path / "tape.jsonl", lines), speed=3)
    assert len(sink.calls) == 900
    for number, (at, _) in enumerate(sink.calls):
        assert at == pytest.approx(number * 0.111, abs=1e-6)


async def test_a_loop_begins_with_a_fresh_window(tmp_path: Path, autojump_clock: MockClock) -> None:
    lines = ["?", recorded(T0, trade("10", T0)), recorded(T0 + 1000, trade("20", T0 + 1000))]
    tape = Tape(write(tmp_path / "tape.jsonl", lines), loop=True)
    await tape.open()
    sink = Recorder()
    sink.stop_at = 6
    with sink.scope:
        await tape.run(sink)
    lasts = [int(t.last or 0) for _, tickers in sink.calls for t in tickers]
    assert lasts == [10, 20, 10, 20, 10, 20]
    windows = {(t.open, t.volume, t.source_ts) for _, tickers in sink.calls for t in tickers}
    assert windows == {
        (Decimal(10), Decimal("0.5"), T0),
        (Decimal(10), Decimal("1.0"), T0 + 1000),
    }
    assert not sink.stale_reasons
    assert tape.bad_lines == 1


async def test_a_looped_tape_of_one_moment_does_not_spin(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    tape = Tape(write(tmp_path / "tape.jsonl", [recorded(T0, trade("10", T0))]), loop=True)
    await tape.open()
    sink = Recorder()
    sink.stop_at = 20
    with sink.scope:
        await tape.run(sink)
    assert sink.calls[-1][0] >= 19 * 0.0199


KLINE = "{},100.5,110,90,105,2.5,{},1,2,3,4,0"


@pytest.mark.parametrize(
    ("times", "first_ms"),
    [
        (("1722470400000", "1722470459999", "1722470519999"), 1_722_470_459_999),
        (("1735689600000000", "1735689659999999", "1735689719999999"), 1_735_689_659_999),
        (("1722470400", "1722470459", "1722470519"), 1_722_470_459_000),
        (
            ("2025-10-29 04:22:00", "2025-10-29 04:22:59.999000+00:00", "2025-10-29T04:23:59.999Z"),
            1_761_711_779_999,
        ),
    ],
)
@pytest.mark.parametrize(
    "header", ["", "open_time,open,high,low,close,volume,close_time,a,b,c,d,e"]
)
async def test_klines(
    tmp_path: Path,
    autojump_clock: MockClock,
    times: tuple[str, ...],
    first_ms: int,
    header: str,
) -> None:
    rows = [KLINE.format(times[0], times[1]), KLINE.format(times[1], times[2])]
    rows[1] = rows[1].replace("105", "120").replace("110", "130")
    path = write(tmp_path / "BTCUSDT_1m.csv", [header, *rows] if header else rows)
    _, sink = await play(path, speed=10)
    # A candle's values are known when it closes.
    assert [round(at, 2) for at, _ in sink.calls] == [0, 6]
    assert sink.calls[0][1][0].source_ts == first_ms
    assert sink.last["BTCUSDT"] == Ticker(
        symbol="BTCUSDT",
        last=Decimal(120),
        open=Decimal("100.5"),
        high=Decimal(130),
        low=Decimal(90),
        volume=Decimal("5.0"),
        change=Decimal("19.5"),
        change_pct=Decimal("19.4030"),
        source_ts=first_ms + 60_000,
    )


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "ETHUSDT-trades-2024-08-08.csv",
            [
                "3735683259,2683.80,0.02,53.676,1723075200000,True,True",
                "3735683260,2684.00,0.03,80.52,1723075201000,False,True",
            ],
        ),
        (
            "ETHUSDT-trades-2025-08-08.csv.gz",
            [
                "id,price,qty,quote_qty,time,is_buyer_maker",
                "1,2683.80,0.02,53.676,1723075200000000,true",
                "2,2684.00,0.03,80.52,1723075201000000,false",
            ],
        ),
        (
            "ETHUSDT-aggTrades-2024-08-08.csv",
            [
                "1,2683.80,0.02,10,12,1723075200000,True,True",
                "2,2684.00,0.03,13,13,1723075201000,False,True",
            ],
        ),
        (
            "ETHUSDT-aggTrades.csv",
            [
                "agg_trade_id,price,quantity,first_trade_id,last_trade_id,transact_time,"
                "is_buyer_maker",
                "1,2683.80,0.02,10,12,1723075200000,true",
                "2,2684.00,0.03,13,13,1723075201000,false",
            ],
        ),
        (
            "anything.csv",
            [
                "\ufefftime,symbol,price,qty",
                "1723075200,ethusdt,2683.80,0.02",
                "1723075201,ETHUSDT,2684.00,0.03",
            ],
        ),
    ],
)
async def test_trades(
    tmp_path: Path, autojump_clock: MockClock, name: str, lines: list[str]
) -> None:
    tape, sink = await play(write(tmp_path / name, [*lines, "", "1,2"]))
    assert [round(at, 3) for at, _ in sink.calls] == [0, 1]
    ticker = sink.last["ETHUSDT"]
    assert (ticker.open, ticker.last) == (Decimal("2683.80"), Decimal("2684.00"))
    assert ticker.volume == Decimal("0.05")
    assert ticker.source_ts == 1_723_075_201_000
    assert tape.bad_examples == [(len(lines) + 2, "too few columns")]
    assert tape.knows("ETHUSDT")
    assert not tape.knows("BTCUSDT")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("none", None, "cannot be read"),
        (".", None, "cannot be read"),
        ("tape", b"", "neither"),
        ("tape", b"hello\nworld\n", "neither"),
        ("tape", bytes(range(256)) * 1000, "neither"),
        ("tape", b"PK\x03\x04 and so on", "broken gzip file or zip archive"),
        ("tape", b"\x1f\x8b\x08\x00 but not gzip at all", "broken gzip"),
        ("tape", b'{"a":1}\n{"b":2}\n', "no usable line .line 1: not a Binance stream frame"),
        ("tape", gzip.compress(b'{"a":1}\n', mtime=0), "no usable line"),
        ("trades.csv", b"1,2683.80,0.02,53.676,1723075200000,True,True\n", "its symbol"),
        ("ETHUSDT.csv", b"1,abc,0.02,53.676,1723075200000,True,True\n", "no number"),
        ("ETHUSDT.csv", b"1,1,0.02,53.676,yesterday,True,True\n", "neither ISO nor"),
    ],
)
async def test_what_is_no_tape(
    tmp_path: Path, name: str, content: bytes | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        await Tape(tmp_path / name).open()
    assert "\n" not in str(caught.value)


async def test_a_gzip_that_breaks_off(tmp_path: Path, autojump_clock: MockClock) -> None:
    lines = [recorded(T0 + i, trade(str(i + 1), T0 + i)) for i in range(20_000)]
    path = write(tmp_path / "tape.gz", lines)
    path.write_bytes(path.read_bytes()[:-2000])
    tape, sink = await play(path)
    assert tape.bad_lines == 1
    assert "compressed file is broken" in tape.bad_examples[0].error
    assert sink.last["BTCUSDT"].open == Decimal(1)


def shared(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"the recorded market data is not there ({name} beside the checkout)")
    return DATA / name


async def test_the_real_recording(autojump_clock: MockClock) -> None:
    path = shared("binance_spot_2024-08-08.jsonl.gz")
    pairs: dict[str, set[tuple[str, str]]] = {"BTCUSDT": set(), "ETHUSDT": set()}
    quotes: dict[str, tuple[str, str]] = {}
    trades: dict[str, str] = {}
    with gzip.open(path) as lines:
        for line in lines:
            data = json.loads(line)["frame"]["data"]
            if "e" in data:
                trades[data["s"]] = data["p"]
            else:
                quotes[data["s"]] = (data["b"], data["a"])
                pairs[data["s"]].add(quotes[data["s"]])
    tape, sink = await play(path, speed=20)
    assert tape.bad_lines == 0
    assert sink.stale_reasons[0][0] == pytest.approx(650.5 / 20, abs=0.1)
    for _, tickers in sink.calls:
        for t in tickers:
            assert t.bid is None or (f"{t.bid:f}", f"{t.ask:f}") in pairs[t.symbol]
    for symbol, ticker in sink.last.items():
        assert (f"{ticker.bid:f}", f"{ticker.ask:f}") == quotes[symbol]
        assert f"{ticker.last:f}" == trades[symbol]
    assert len(sink.calls) > 1000


async def test_the_real_klines(autojump_clock: MockClock) -> None:
    tape, sink = await play(shared("BTCUSDT_1m.csv"), speed=60)
    assert tape.bad_lines == 0
    assert len(sink.calls) == 4320
    assert sink.calls[-1][0] == pytest.approx(4319, abs=0.01)
    assert sink.last["BTCUSDT"].open == Decimal("112731.29")


async def test_single_frames_of_several_exchanges(autojump_clock: MockClock) -> None:
    tape, sink = await play(shared("exchange_frames.jsonl"), speed=100_000)
    doge = sink.last["DOGEBNB"]
    assert (doge.last, doge.bid, doge.ask) == (
        Decimal("0.00014360"),
        Decimal("0.00014365"),
        Decimal("0.00014498"),
    )
    assert (doge.change, doge.change_pct) == (Decimal("0.00000291"), Decimal("2.068"))
    assert tape.bad_lines > 0
