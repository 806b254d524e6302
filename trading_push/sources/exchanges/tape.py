"""A recorded tape as the market: exchange frames or public-data CSV, played at a chosen speed.

1. What the file is, its content says, plain or gzip: JSON lines of Binance stream frames (with the
   recorder's `recv_ns`, or bare with a time of their own), or CSV of klines, trades or aggTrades,
   with a header or without.
2. A line that cannot be used is counted, and the first few are kept with their numbers; a tape
   without a usable one is a configuration error before anything is served.
3. Reading and decoding run in a worker thread, a chunk at a time. All frames due at one moment are
   applied together and given to the sink in one call, a ticker for each symbol that changed.
4. Bid and ask always come from one frame: each pair that is given has stood in the tape.
5. The pace is the recorded time of receipt, from an absolute start, so that nothing adds up.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal, NamedTuple, TypeAlias, cast

import attrs
import msgspec
import trio

from trading_push import logs
from trading_push.errors import ConfigurationError
from trading_push.sources.base import MarketSink
from trading_push.sources.exchanges.binance_frames import Frame, Payload, is_other_event, values_of
from trading_push.sources.exchanges.ticker_state import (
    UNUSABLE,
    Event,
    Market,
    Symbols,
    epoch_ns,
    number,
    price,
    reason_of,
)

__all__ = ["BadLine", "Tape"]

WAKE_S = 0.02
"""The sink is given something at most this often."""
CHUNK_BYTES = 1 << 18
SCAN_LINES = 200_000
"""How far a tape is read before it is played, for its symbols and its first usable line."""
SNIFF_BYTES = 1 << 16
BAD_LINES_KEPT = 5


class BadLine(NamedTuple):
    """A line that could not be used, and why."""

    number: int
    error: str


class Tape:
    """A recorded tape; a `TickerFeed`.

    Args:
        path: The file.
        speed: How many recorded seconds go by in one second.
        loop: Whether to begin again at the end, with a fresh window.
    """

    def __init__(self, path: Path | str, speed: float = 1.0, loop: bool = False) -> None:
        self.path = Path(path)
        self.bad_lines = 0
        self.bad_examples: list[BadLine] = []
        self._speed = speed
        self._loop = loop
        self._open: Callable[[], _Reader] | None = None
        self._symbols: set[str] = set()
        self._complete = False
        self._judged = 0

    async def open(self) -> None:
        """Find out what the file is and read its beginning, in a worker thread.

        A tape of up to 200,000 lines is read to its end once, so that all its symbols are known.
        Cancellation waits for the thread (about a second at most).

        Raises:
            ConfigurationError: There is no such file, it is no tape, no line of it can be used, or
                its symbol cannot be told.
        """
        await trio.to_thread.run_sync(self._scan)
        self._report_bad_lines(0)

    def knows(self, symbol: str) -> bool:
        """Whether the tape holds `symbol`; for a part that has not been read yet: it may."""
        return symbol in self._symbols or not self._complete

    async def run(self, sink: MarketSink) -> None:
        """Play the tape; at its end, without `loop`, say that the market is stale and return.

        Cancellation waits for the chunk that is being read (milliseconds).

        Raises:
            ConfigurationError: As `open`, where that was not called before.
        """
        if self._open is None:
            await self.open()
        while True:
            before = self.bad_lines
            await self._play(sink)
            self._report_bad_lines(before)
            if not self._loop:
                break
        logs.emit(logs.line("tape_ended", path=self.path))
        sink.stale("tape_ended")

    async def _play(self, sink: MarketSink) -> None:
        assert self._open is not None
        reader = await trio.to_thread.run_sync(self._open)
        try:
            await self._play_from(reader, sink)
        finally:
            reader.close()

    async def _play_from(self, reader: _Reader, sink: MarketSink) -> None:
        markets: dict[str, Market] = {}
        changed: dict[str, Market] = {}
        started = woke = trio.current_time()
        first_ns = now_ns = -1

        def give() -> None:
            """Give what has changed."""
            if changed:
                sink.update([market.ticker() for market in changed.values()])
                changed.clear()

        def look() -> None:
            """See how far the tape may have gone by now."""
            nonlocal woke, now_ns
            woke = trio.current_time()
            now_ns = max(now_ns, first_ns + round((woke - started) * self._speed * 1e9))

        while events := await trio.to_thread.run_sync(reader.read):
            if first_ns < 0:
                first_ns = now_ns = events[0].due_ns
            elif trio.current_time() >= woke + WAKE_S:
                give()  # At a very high speed nothing has to be waited for within a chunk.
                look()
            for event in events:
                if event.due_ns > now_ns:
                    give()
                    due = started + (event.due_ns - first_ns) / 1e9 / self._speed
                    await trio.sleep_until(max(woke + WAKE_S, due))
                    # A rounded clock must not wake again and again for the same frame.
                    now_ns = event.due_ns
                    look()
                market = markets.get(event.symbol)
                if market is None:
                    market = markets[event.symbol] = Market(event.symbol)
                    self._symbols.add(event.symbol)
                market.apply(event)
                changed[event.symbol] = market
        self._complete = True
        give()
        # A tape of one moment, looped, must not spin.
        await trio.sleep_until(woke + WAKE_S)

    def _scan(self) -> None:
        self._open = _opener(self.path, self._bad_line)
        try:
            reader = self._open()
            try:
                while reader.line < SCAN_LINES and (events := reader.read()):
                    self._symbols.update({event.symbol for event in events})
                else:
                    self._complete = reader.line < SCAN_LINES
            finally:
                reader.close()
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if not self._symbols:
            why = f" (line {self.bad_examples[0][0]}: {self.bad_examples[0][1]})"
            raise ConfigurationError(
                f"the tape {self.path} has no usable line{why if self.bad_lines else ''}: give one "
                "of Binance stream frames (JSON lines) or klines, trades or aggTrades (CSV)"
            )

    def _bad_line(self, number: int, error: str) -> None:
        if number <= self._judged:
            return  # Met before: in the scan, or in an earlier round.
        self._judged = number
        self.bad_lines += 1
        if len(self.bad_examples) < BAD_LINES_KEPT:
            self.bad_examples.append(BadLine(number, error))

    def _report_bad_lines(self, before: int) -> None:
        if self.bad_lines > before:
            number, error = self.bad_examples[0]
            logs.emit(
                logs.line(
                    "tape_bad_lines",
                    path=self.path,
                    count=self.bad_lines,
                    line=number,
                    error=error,
                )
            )


_Report: TypeAlias = Callable[[int, str], None]
_Parse: TypeAlias = Callable[[bytes], Event | None]


class _Reader:
    """Reads a tape's file from the beginning, in chunks; used by one thread at a time.

    Args:
        file: The open file, unpacked.
        parse: Makes an event of a line; None for a line that is well, but of no use here.
        report: Is told the number of each bad line and what is wrong.
    """

    def __init__(self, file: IO[bytes], parse: _Parse, report: _Report) -> None:
        self._file = file
        self._parse = parse
        self._report = report
        self.line = 0

    def read(self) -> list[Event]:
        """The next chunk's events; none at the end only."""
        events: list[Event] = []
        parse = self._parse
        while not events and (lines := self._lines()):
            for line in lines:
                self.line += 1
                try:
                    if (event := parse(line)) is not None:
                        events.append(event)
                except UNUSABLE as error:
                    self._report(self.line, reason_of(error))
        return events

    def close(self) -> None:
        self._file.close()

    def _lines(self) -> list[bytes]:
        try:
            return self._file.readlines(CHUNK_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self._report(self.line + 1, f"the compressed file is broken: {error}")
            return []


def _opener(path: Path, report: _Report) -> Callable[[], _Reader]:
    """Tell by its content what the file is; opens it from the beginning each time it is called."""
    packed = b""

    def unpack() -> IO[bytes]:
        if packed[:2] == b"\x1f\x8b":
            return cast("IO[bytes]", io.BufferedReader(gzip.GzipFile(path)))
        return path.open("rb")

    try:
        with path.open("rb") as file:
            packed = file.read(4)
        if packed == b"PK\x03\x04":
            raise ConfigurationError(f"the tape {path} is a zip archive: unpack it first")
        with unpack() as unpacked:
            head = unpacked.read(SNIFF_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ConfigurationError(f"the tape {path} is a broken gzip file: replace it") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    lines = head.removeprefix(_BOM).splitlines()
    if any(line.lstrip().startswith(b"{") for line in lines):
        return lambda: _Reader(unpack(), _FrameParser().parse, report)
    layout = next(filter(None, map(_layout, lines)), None)
    if layout is None:
        raise ConfigurationError(
            f"the tape {path} is neither JSON lines of Binance stream frames nor CSV of klines, "
            "trades or aggTrades: give one of these"
        )
    symbol = None if layout.symbol is not None else _symbol_in(path)
    return lambda: _Reader(unpack(), _CsvParser(layout, symbol).parse, report)


_BOM = b"\xef\xbb\xbf"


def _unreadable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"the tape {path} cannot be read ({error.strerror or error}): give the path of a file"
    )


# ---- values


def _time_ns(text: str) -> int:
    """The time of a CSV's cell: an epoch or ISO 8601 (UTC where it says nothing else), in ns."""
    if text.isdecimal() and text.isascii():
        return epoch_ns(int(text[:20]))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("a time is neither ISO nor an epoch") from None
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


# ---- JSON lines


class _Line(Payload):
    """A recorder's line, a bare frame or a bare event, told apart by what is there."""

    recv_ns: int = 0
    frame: Frame | None = None
    stream: str = ""
    data: Payload | None = None


_decode = msgspec.json.Decoder(_Line).decode


class _FrameParser:
    """Parses JSON lines, in their order: a frame without any time stands at the one before."""

    def __init__(self) -> None:
        self._symbols = Symbols()
        self._time_ns = 0

    def parse(self, text: bytes) -> Event | None:
        if text.isspace():
            return None
        try:
            line = _decode(text)
        except msgspec.ValidationError:
            if is_other_event(text):
                return None
            raise
        payload: Payload
        if line.frame is not None:
            payload, stream = line.frame.data, line.frame.stream
        else:
            payload, stream = line.data or line, line.stream
        found = values_of(payload, stream)
        if found is None:
            return None
        kind, values = found
        symbol = self._symbols[payload.symbol]
        source = payload.event_time or payload.trade_time
        if line.recv_ns > 0:
            self._time_ns = line.recv_ns
        elif source:
            self._time_ns = epoch_ns(source)
        elif not self._time_ns:
            raise ValueError("the frame has no time, and none stands before it")
        source_ns = epoch_ns(source) if source else self._time_ns
        return Event(self._time_ns, source_ns // 1_000_000, symbol, kind, values)


# ---- CSV


@attrs.frozen
class _Layout:
    """Which column is what; `values` are price and quantity, or open, high, low, close, volume."""

    kind: Literal["trade", "kline"]
    time: int
    values: tuple[int, ...]
    symbol: int | None
    header: bytes | None


def _cells(line: bytes) -> list[str]:
    return line.removeprefix(_BOM).decode().strip().replace('"', "").split(",")


def _layout(line: bytes) -> _Layout | None:
    """The layout that a line shows: by its names where it is a header, else by its cells."""
    try:
        cells = [cell.strip() for cell in _cells(line)]
    except UnicodeDecodeError:
        return None
    if not cells[0][:1].isdecimal():
        return _named_layout(cells, line)
    flags = [cell.lower() in ("true", "false") for cell in cells]
    if len(cells) in (12, 13) and not any(flags):
        return _Layout("kline", 6, (1, 2, 3, 4, 5), 12 if len(cells) == 13 else None, None)
    # trades: id, price, quantity, quote quantity, time, maker; aggTrades: id, price, quantity,
    # first id, last id, time, maker. Both may have a last column for "best match".
    if len(cells) in (6, 7) and flags[5]:
        return _Layout("trade", 4, (1, 2), None, None)
    if len(cells) in (7, 8) and flags[6]:
        return _Layout("trade", 5, (1, 2), None, None)
    return None


def _named_layout(cells: Sequence[str], line: bytes) -> _Layout | None:
    at = {cell.lower().replace("_", "").replace(" ", ""): i for i, cell in enumerate(cells)}

    def first(*names: str) -> int | None:
        return next((at[name] for name in names if name in at), None)

    time = first("closetime", "time", "transacttime", "timestamp", "opentime")
    if time is None:
        return None
    candles = [at[name] for name in ("open", "high", "low", "close", "volume") if name in at]
    at_price, at_quantity = at.get("price"), first("qty", "quantity")
    if len(candles) == 5:
        return _Layout("kline", time, tuple(candles), at.get("symbol"), line.strip())
    if at_price is not None and at_quantity is not None:
        return _Layout("trade", time, (at_price, at_quantity), at.get("symbol"), line.strip())
    return None


class _CsvParser:
    """Parses the rows of a CSV; `symbol` is the one of all rows where no column holds it."""

    def __init__(self, layout: _Layout, symbol: str | None) -> None:
        self._layout = layout
        self._symbol = symbol
        self._symbols = Symbols()

    def parse(self, line: bytes) -> Event | None:
        layout = self._layout
        if line.isspace() or (layout.header and line.removeprefix(_BOM).strip() == layout.header):
            return None
        cells = _cells(line)
        due_ns = _time_ns(cells[layout.time])
        symbol = self._symbol or self._symbols[cells[layout.symbol or 0]]
        if layout.kind == "trade":
            at_price, at_quantity = layout.values
            values = (price(cells[at_price]), number(cells[at_quantity]))
            return Event(due_ns, due_ns // 1_000_000, symbol, "trade", values)
        *prices, volume = layout.values
        candle = (*(price(cells[i]) for i in prices), number(cells[volume]))
        return Event(due_ns, due_ns // 1_000_000, symbol, "kline", candle)


_FILE_NAME = re.compile(r"([A-Z0-9]{5,24}(?:_(?:\d{6}|PERP))?)(?:[-_.].*)?")


def _symbol_in(path: Path) -> str:
    match = _FILE_NAME.fullmatch(path.name)
    if match is None or not re.search("[A-Z]{3}", match[1]):
        raise ConfigurationError(
            f"the tape {path} does not tell its symbol: give it a column 'symbol', or a file name "
            "that begins with it (BTCUSDT-trades-2024-08-08.csv)"
        )
    return match[1]
