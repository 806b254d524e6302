"""Read a tape's file: exchange frames or public-data CSV, as events in the order of the file.

What the file is, its content says, plain or gzip: JSON lines of Binance stream frames (with the
recorder's `recv_ns`, or bare with a time of their own), or CSV of klines, trades or aggTrades, with
a header or without. A line that cannot be used is reported, and passed over.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal, TypeAlias, cast

import attrs
import msgspec

from trading_push.errors import ConfigurationError
from trading_push.sources.exchanges.amounts import (
    UNUSABLE,
    Symbols,
    epoch_ns,
    number,
    price,
    reason_of,
)
from trading_push.sources.exchanges.binance_frames import Frame, Payload, is_other_event, values_of
from trading_push.sources.exchanges.ticker_state import Event

__all__ = ["TapeReader", "tape_opener", "unreadable"]

CHUNK_BYTES = 1 << 18
"""About how much is read, and parsed, at a time."""
SNIFF_BYTES = 1 << 16
"""How much of a file is looked at to tell what it is."""

_Report: TypeAlias = Callable[[int, str], None]
"""Takes the number of a line that cannot be used, and why."""
_Parse: TypeAlias = Callable[[bytes], Event | None]


class TapeReader:
    """Reads a tape's file from the beginning, in chunks; used by one thread at a time.

    Args:
        file: The open file, unpacked.
        parse: Makes an event of a line; None for one that is well-formed, but of no use here.
        report: Called with the number of each bad line, and what is wrong.
    """

    def __init__(self, file: IO[bytes], parse: _Parse, report: _Report) -> None:
        self._file = file
        self._parse = parse
        self._report = report
        self.line = 0
        """The number of the last line that was read."""

    def read(self) -> list[Event]:
        """Return the next chunk's events; none only at the end."""
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
        """Close the file."""
        self._file.close()

    def _lines(self) -> list[bytes]:
        try:
            return self._file.readlines(CHUNK_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self._report(self.line + 1, f"the compressed file is broken: {error}")
            return []


def tape_opener(path: Path, report: _Report) -> Callable[[], TapeReader]:
    """Find out what a file is; return a function that opens it from the beginning.

    Args:
        path: The file.
        report: Called for each line that cannot be used.

    Raises:
        ConfigurationError: It cannot be read, is not a tape, or its symbol cannot be told.
    """
    magic = b""

    def unpack() -> IO[bytes]:
        if magic[:2] == b"\x1f\x8b":
            return cast("IO[bytes]", io.BufferedReader(gzip.GzipFile(path)))
        return path.open("rb")

    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"PK\x03\x04":
            raise ConfigurationError(f"the tape {path} is a zip archive: unpack it first")
        with unpack() as unpacked:
            head = unpacked.read(SNIFF_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise ConfigurationError(f"the tape {path} is a broken gzip file: replace it") from None
    except OSError as error:
        raise unreadable(path, error) from None
    # One object makes it JSON lines; else the first line with a known layout says which CSV.
    lines = head.removeprefix(_BOM).splitlines()
    if any(line.lstrip().startswith(b"{") for line in lines):
        return lambda: TapeReader(unpack(), _FrameParser().parse, report)
    layout = next(filter(None, map(_layout, lines)), None)
    if layout is None:
        raise ConfigurationError(
            f"the tape {path} is neither JSON lines of Binance stream frames nor CSV of klines, "
            "trades or aggTrades: give one of these"
        )
    symbol = None if layout.symbol is not None else _symbol_in(path)
    return lambda: TapeReader(unpack(), _CsvParser(layout, symbol).parse, report)


_BOM = b"\xef\xbb\xbf"


def unreadable(path: Path, error: OSError) -> ConfigurationError:
    """Make the error of a tape that the system cannot read."""
    return ConfigurationError(
        f"the tape {path} cannot be read ({error.strerror or error}): give the path of a file"
    )


# ---- values


def _time_ns(text: str) -> int:
    """Read the time in a cell of a CSV, in ns: an epoch, or ISO 8601 (UTC unless it says more)."""
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
    """Parses JSON lines, in their order: a frame without a time has that of the one before."""

    def __init__(self) -> None:
        self._symbols = Symbols()
        self._time_ns = 0  # of the last frame with a time

    def parse(self, text: bytes) -> Event | None:
        if text.isspace():
            return None
        try:
            line = _decode(text)
        except msgspec.ValidationError:
            if is_other_event(text):
                return None
            raise
        # The event, whatever it is wrapped in.
        payload: Payload
        if line.frame is not None:
            payload, stream = line.frame.data, line.frame.stream
        else:
            payload, stream = line.data or line, line.stream
        found = values_of(payload, stream)
        if found is None:
            return None
        kind, values = found
        # When it was received, or else the source's own time.
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
    """Tell the layout by a line: by its names where it is a header, else by its cells."""
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
    """Parses the rows of a CSV.

    Args:
        layout: Which column is what.
        symbol: The symbol of all rows, where no column holds it.
    """

    def __init__(self, layout: _Layout, symbol: str | None) -> None:
        self._layout = layout
        self._symbol = symbol
        self._symbols = Symbols()

    def parse(self, line: bytes) -> Event | None:
        layout = self._layout
        # A header may stand in the midst of files that were joined.
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
