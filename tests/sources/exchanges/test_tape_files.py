"""Tapes as they are found: cut, packed, out of order, of other exchanges, with odd times."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
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
from trading_push.sources.exchanges import tape_file
from trading_push.sources.exchanges.tape import Tape

DAY = 1_743_292_800  # 2025-03-30 UTC
BINANCE = "1,{price},0.5,1,{ms},True,True"


class Played:
    """A sink that keeps the last price and the time of the source of each call."""

    def __init__(self) -> None:
        self.prices: list[tuple[str, str]] = []
        self.at: list[tuple[float, int | None]] = []
        self.last: dict[str, Ticker] = {}

    def update(self, tickers: Sequence[Ticker]) -> None:
        for ticker in tickers:
            self.prices.append((ticker.symbol, str(ticker.last)))
            self.at.append((trio.current_time(), ticker.source_ts))
            self.last[ticker.symbol] = ticker

    def stale(self, reason: str, symbols: object = None) -> None: ...


async def play(path: Path) -> tuple[Tape, Played]:
    tape, sink = Tape(path), Played()
    await tape.open()
    await tape.run(sink)
    return tape, sink


def rows(*prices: int, step_ms: int = 1000) -> list[str]:
    return [
        BINANCE.format(price=price, ms=DAY * 1000 + number * step_ms)
        for number, price in enumerate(prices)
    ]


def text(lines: Sequence[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


def zipped(*files: tuple[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return made.getvalue()


# --- cut, or still being written ----------------------------------------------------------------


def still_being_written(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(content) + packer.flush(zlib.Z_SYNC_FLUSH)


async def test_a_gzip_that_is_still_being_written_plays_what_is_whole(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    path = tmp_path / "BTCUSDT.csv.gz"
    path.write_bytes(still_being_written(text(rows(*range(1, 40_001), step_ms=10)) + b"1,777,0."))
    tape, sink = await play(path)
    assert sink.prices[-1] == ("BTCUSDT", "40000")
    [(number, error)] = tape.bad_examples
    assert number == 40_001
    assert "the compressed file is broken" in error


@pytest.mark.parametrize("cut", [1, 9, 100, 2000])
async def test_of_a_gzip_that_was_cut_nothing_whole_is_lost(
    tmp_path: Path, autojump_clock: MockClock, cut: int
) -> None:
    packed = gzip.compress(text(rows(*range(1, 30_001), step_ms=10)))[:-cut]
    there = zlib.decompressobj(wbits=31).decompress(packed).rpartition(b"\n")[0]
    path = tmp_path / "BTCUSDT.csv.gz"
    path.write_bytes(packed)
    tape, sink = await play(path)
    assert sink.prices[-1][1] == there.splitlines()[-1].split(b",")[1].decode()
    assert tape.bad_lines == 1


@pytest.mark.parametrize("count", [200, 3000, 30_000])
async def test_of_a_gzip_that_is_damaged_what_is_before_the_damage_is_played(
    tmp_path: Path, autojump_clock: MockClock, count: int
) -> None:
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(text(rows(*range(1, count + 1), step_ms=10)))
    path = tmp_path / "BTCUSDT.csv.gz"
    path.write_bytes(packed + packer.flush(zlib.Z_FULL_FLUSH) + b"\x07no such block" * 100)
    tape, sink = await play(path)
    assert count - 4096 // 30 <= int(sink.prices[-1][1]) <= count
    assert tape.bad_lines == 1


async def test_gzip_members_one_after_another_and_rubbish_behind_them(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    path = tmp_path / "BTCUSDT.csv.gz"
    first, second = rows(1, 2, 3, 4)[:2], rows(1, 2, 3, 4)[2:]
    path.write_bytes(gzip.compress(text(first)) + gzip.compress(text(second)) + b"rubbish")
    tape, sink = await play(path)
    assert [price for _, price in sink.prices] == ["1", "2", "3", "4"]
    assert tape.bad_lines == 1


# --- archives -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "inner", "header"),
    [
        ("BTCUSDT-trades-2025-03-30.zip", "BTCUSDT-trades-2025-03-30.csv", []),
        ("download.zip", "data/BTCUSDT-trades-2025-03-30.csv", []),
        (
            "BTCUSDT-trades-2025-03-30.zip",
            "trades.csv",
            ["id,price,qty,quote_qty,time,is_buyer_maker,is_best_match"],
        ),
    ],
)
async def test_an_archive_as_it_is_downloaded(
    tmp_path: Path, autojump_clock: MockClock, name: str, inner: str, header: list[str]
) -> None:
    (tmp_path / name).write_bytes(zipped((inner, text([*header, *rows(1, 2, 3)]))))
    tape, sink = await play(tmp_path / name)
    assert sink.prices == [("BTCUSDT", "1"), ("BTCUSDT", "2"), ("BTCUSDT", "3")]
    assert tape.bad_lines == 0
    assert tape.knows("BTCUSDT")


def with_password() -> bytes:
    packed = bytearray(zipped(("BTCUSDT.csv", text(rows(1)))))
    packed[6] |= 1  # the flag in the file's own header, and in the directory
    packed[packed.index(b"PK\x01\x02") + 8] |= 1
    return bytes(packed)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (zipped(), "an archive of 0 files"),
        (zipped(("a.csv", b""), ("b.csv", b"")), "an archive of 2 files"),
        (zipped(("BTCUSDT.csv", text(rows(*range(1, 99)))))[:-30], "broken"),
        (with_password(), "broken"),
        (text(["x"] * 3).decode().encode("utf-16"), "UTF-16"),
    ],
)
async def test_what_cannot_be_unpacked_is_refused(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "BTCUSDT.zip"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        await Tape(path).open()
    assert "\n" not in str(caught.value)


async def test_of_an_archive_whose_data_are_broken_the_good_part_is_played(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    packed = bytearray(zipped(("BTCUSDT.csv", text(rows(*range(1, 5001))))))
    packed[len(packed) // 2] ^= 0xFF
    path = tmp_path / "BTCUSDT.zip"
    path.write_bytes(packed)
    tape, sink = await play(path)
    assert [price for _, price in sink.prices[:1000]] == [str(each) for each in range(1, 1001)]
    assert tape.bad_lines >= 1


# --- order --------------------------------------------------------------------------------------


async def test_a_tape_that_runs_backwards_is_turned(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Two rows of one moment are turned as well: the last price is the last one."""
    lines = [
        BINANCE.format(price=price, ms=DAY * 1000 + second * 1000)
        for price, second in ((1, 0), (2, 100), (3, 100), (4, 200), (5, 300))
    ]
    path = tmp_path / "BTCUSDT.csv"
    path.write_bytes(text(lines[::-1]))
    tape, sink = await play(path)
    assert [price for _, price in sink.prices] == ["1", "3", "4", "5"]
    times = [at for at, _ in sink.at]
    assert [round(at - times[0]) for at in times] == [0, 100, 200, 300]
    assert sink.last["BTCUSDT"].volume == Decimal("2.5")
    assert tape.bad_lines == 0


async def test_one_symbol_after_another_is_played_together(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    lines = ["time,symbol,price,qty"]
    for symbol in ("BTCUSDT", "ETHUSDT"):
        lines += [f"{DAY + 90 * i},{symbol},{i + 1},1" for i in range(3)]
    (tmp_path / "both.csv").write_bytes(text([*lines, "x,BTCUSDT,1,1"]))
    tape, sink = await play(tmp_path / "both.csv")
    assert [price for _, price in sink.prices] == ["1", "1", "2", "2", "3", "3"]
    assert tape.bad_lines == 1


async def test_what_is_too_long_to_be_sorted_is_refused_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tape_file, "SORTED_LINES", 100)
    path = tmp_path / "BTCUSDT.csv"
    path.write_bytes(text(rows(*range(1, 30_000))[::-1]))
    with pytest.raises(ConfigurationError, match="sort it by its times"):
        await Tape(path).open()


async def test_a_little_disorder_is_a_recorders_own(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    lines = rows(1, 2, 3, 4)
    lines[1], lines[2] = lines[2], lines[1]
    (tmp_path / "BTCUSDT.csv").write_bytes(text(lines))
    tape, sink = await play(tmp_path / "BTCUSDT.csv")
    assert sink.prices[-1][1] == "4"
    assert tape.bad_lines == 0


# --- layouts ------------------------------------------------------------------------------------

BYBIT = "timestamp,symbol,side,size,price,tickDirection,trdMatchID,grossValue,homeNotional,f"
OKX = "trade_id,side,size,price,created_time"
OKX_OLD = "trade_id/交易id,side/交易方向,size/数量,price/价格,created_time/成交时间".encode("gbk")


@pytest.mark.parametrize(
    ("name", "lines", "symbol"),
    [
        (
            "BTCUSDT2025-03-30.csv.gz",
            [
                BYBIT,
                *(f"{DAY + i}.0647,BTCUSDT,Sell,0.5,{i + 1}.5,P,a-b,1,1,1" for i in (2, 1, 0)),
            ],
            "BTCUSDT",
        ),
        (
            "BTCUSDT_2025-03-30.csv",
            ["id,timestamp,price,volume,side,rpi"]
            + [f"{i},{DAY + i}065,{i + 1}.5,0.5,sell,0" for i in range(3)],
            "BTCUSDT",
        ),
        (
            "BTC-USDT-trades-2025-03-30.zip",
            [OKX, *(f"1,sell,0.5,{i + 1}.5,{DAY + i}065" for i in range(3))],
            "BTC-USDT",
        ),
        (
            "BTC-USD-250926-aggtrades-2025-03-30.csv",
            [OKX, *(f"1,sell,0.5,{i + 1}.5,{DAY + i}065" for i in range(3))],
            "BTC-USD-250926",
        ),
        (
            "anything.csv",
            ["instrument_name,trade_id,side,price,size,created_time"]
            + [f"BTC-USDT-SWAP,1,sell,{i + 1}.5,0.5,{DAY + i}065" for i in range(3)],
            "BTC-USDT-SWAP",
        ),
        (
            "币安人生USDT-trades-2025-10-08.csv",
            [BINANCE.format(price=f"{i + 1}.5", ms=f"{DAY + i}065") for i in range(3)],
            "币安人生USDT",
        ),
    ],
)
async def test_public_data_of_each_exchange(
    tmp_path: Path, autojump_clock: MockClock, name: str, lines: list[str], symbol: str
) -> None:
    path = tmp_path / name
    content = text(lines)
    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".zip"):
        content = zipped((name.replace(".zip", ".csv"), b"\xef\xbb\xbf" + content))
    path.write_bytes(content)
    tape, sink = await play(path)
    assert tape.bad_lines == 0
    # Of seconds, a falling tape of less than the slack is turned, too.
    assert sink.prices == [(symbol, "1.5"), (symbol, "2.5"), (symbol, "3.5")]
    assert [at // 1000 - DAY for _, at in sink.at if at] == [0, 1, 2]
    assert [round(at - sink.at[0][0], 3) for at, _ in sink.at] == [0, 1, 2]


async def test_a_header_in_two_languages(tmp_path: Path, autojump_clock: MockClock) -> None:
    path = tmp_path / "BTC-USDT-trades-2022-01-01.csv"
    path.write_bytes(OKX_OLD + b"\n" + text([f"1,sell,0.5,7,{DAY}000"]))
    tape, sink = await play(path)
    assert (sink.prices, tape.bad_lines) == ([("BTC-USDT", "7")], 0)


@pytest.mark.parametrize(
    ("time", "ms"),
    [
        ("20250330", DAY * 1000),
        ("20250330010203", (DAY + 3723) * 1000),
        ("202503300102", (DAY + 3720) * 1000),
        ("2025-03-30", DAY * 1000),
        ("2025/03/30 01:02:03", (DAY + 3723) * 1000),
        ("2025-03-30T01:02:03+08:00", (DAY + 3723 - 8 * 3600) * 1000),
        ("2025-03-30 01:02:03 UTC", (DAY + 3723) * 1000),
        (f"{DAY}", DAY * 1000),
        (f"{DAY}.5", DAY * 1000 + 500),
        (f"{DAY}123.5", DAY * 1000 + 123),
        ("1.7432928E9", DAY * 1000),
        (f"{DAY}123", DAY * 1000 + 123),
        (f"{DAY}123456", DAY * 1000 + 123),
        (f"{DAY}123456789", DAY * 1000 + 123),
    ],
)
async def test_times_of_all_kinds(
    tmp_path: Path, autojump_clock: MockClock, time: str, ms: int
) -> None:
    path = tmp_path / "tape.csv"
    path.write_bytes(text(["date,symbol,price,qty", f"{time},BTCUSDT,1,1"]))
    _, sink = await play(path)
    assert [at for _, at in sink.at] == [ms]


@pytest.mark.parametrize("time", ["20251330", "123", "-5", "1e400", "nan", "12:30", "99999999999"])
async def test_a_time_that_cannot_be_is_a_bad_line(tmp_path: Path, time: str) -> None:
    path = tmp_path / "tape.csv"
    path.write_bytes(text(["date,symbol,price,qty", f"{time},BTCUSDT,1,1"]))
    with pytest.raises(ConfigurationError, match=r"line 2: a time is"):
        await Tape(path).open()


def frame(symbol: str, last: str, at: int) -> dict[str, Any]:
    zeros = dict.fromkeys("ohlvqpwxQbBaA", "1")
    return {"e": "24hrTicker", "E": at, "s": symbol, "c": last, "P": "1.5", **zeros}


async def test_frames_of_all_symbols(tmp_path: Path, autojump_clock: MockClock) -> None:
    at = DAY * 1000
    some = [frame("BTCUSDT", "1", at), frame("ETHUSDT", "2", at)]
    wrapped = {"stream": "!ticker@arr", "data": [frame("BTCUSDT", "3", at + 1000)]}
    mini = {"stream": "!miniTicker@arr", "data": [{"e": "24hrMiniTicker", "E": 1, "s": "X"}]}
    lines = [
        json.dumps(some),
        json.dumps(wrapped),
        json.dumps({"recv_ns": (at + 2000) * 10**6, "frame": wrapped | {"data": some[1:]}}),
        json.dumps(mini),
        "[5]",
    ]
    (tmp_path / "tape.jsonl").write_bytes(b"\xef\xbb\xbf" + text(lines))
    tape, sink = await play(tmp_path / "tape.jsonl")
    assert sink.prices == [
        *(("BTCUSDT", "1"), ("ETHUSDT", "2"), ("BTCUSDT", "3"), ("ETHUSDT", "2")),
    ]
    assert [each.number for each in tape.bad_examples] == [5]


async def test_real_klines_from_the_back_are_the_same(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    if not (DATA / "BTCUSDT_1m.csv").exists():
        pytest.skip("the recorded market data is not there (BTCUSDT_1m.csv beside the checkout)")
    lines = (DATA / "BTCUSDT_1m.csv").read_text(encoding="utf-8").splitlines()[:500]
    (tmp_path / "forth.csv").write_bytes(text(lines))
    (tmp_path / "back.csv").write_bytes(text([lines[0], *lines[:0:-1]]))
    _, forth = await play(tmp_path / "forth.csv")
    _, back = await play(tmp_path / "back.csv")
    assert forth.prices == back.prices
    assert forth.last == back.last
