"""Read a tape's file: exchange frames or public-data CSV, as events in the order of their times.

What the file is, its content says, plain, gzip or zip: JSON lines of Binance stream frames (with
the recorder's `recv_ns`, or bare with a time of their own) or of pushes (`trading-push record`), or
CSV (see `tape_csv`). A line that
cannot be used is reported, and passed over; of a compressed file that is cut, or is still being
written, what is whole is read.
"""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Final, TypeAlias

import attrs
import msgspec

from trading_push.errors import ConfigurationError
from trading_push.sources.exchanges.amounts import (
    UNUSABLE,
    Symbols,
    epoch_ns,
    number,
    percentage,
    reason_of,
)
from trading_push.sources.exchanges.binance_frames import Frame, Payload, is_other_event, values_of
from trading_push.sources.exchanges.recorded_accounts import CHANNELS, AccountPush
from trading_push.sources.exchanges.tape_csv import CsvParser, layout_of, symbol_in
from trading_push.sources.exchanges.ticker_state import Event
from trading_push.topics import TICKER_PREFIX

__all__ = ["SortedTape", "TapeEvent", "TapeReader", "tape_opener", "unreadable"]

CHUNK_BYTES: Final = 1 << 18
"""About how much is read, and parsed, at a time."""
SNIFF_BYTES: Final = 1 << 16
"""How much of a file is looked at to tell what it is."""
_UNPACKED_BYTES: Final = 4096
"""So much of a packed file is read at a time: it is lost where the file is damaged."""
SLACK_NS: Final = 60 * 1_000_000_000
"""By how much the time of a line may lie before that of an earlier one: recorders are not exact."""
SORTED_LINES: Final = 300_000
"""How many lines a tape may have that has to be sorted in memory; about 150 MB."""
CHUNK_EVENTS: Final = 2_000

_Report: TypeAlias = Callable[[int, str], None]
"""Takes the number of a line that cannot be used, and why."""
TapeEvent: TypeAlias = Event | AccountPush
_Parse: TypeAlias = Callable[[bytes], Sequence[TapeEvent]]

_BOM: Final = b"\xef\xbb\xbf"
_UTF16: Final = (b"\xff\xfe", b"\xfe\xff")
_BROKEN: Final = (
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    NotImplementedError,  # a way of packing that zipfile does not know
    RuntimeError,  # an archive with a password
)
"""What unpacking may raise."""


class _Unpacked(io.RawIOBase):
    """An unpacked file that ends where it cannot be unpacked any more, and says why.

    Args:
        file: The file, which raises one of `_BROKEN`.
        most: How much it is read at a time: what a file gives up with its error is lost.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file = file
        self._most = most
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self.error is not None:
            return 0
        try:
            data = self._file.read1(min(len(buffer), self._most))  # type: ignore[attr-defined]
        except _BROKEN as error:
            self.error = error
            return 0
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class TapeReader:
    """Reads a tape's file from the beginning, in chunks; used by one thread at a time.

    Args:
        file: The open file, unpacked.
        parse: Makes the events of a line; none of one that is well-formed, but of no use here.
        report: Called with the number of each bad line, and what is wrong.
    """

    def __init__(self, file: _Unpacked, parse: _Parse, report: _Report) -> None:
        self._unpacked = file
        self._file = io.BufferedReader(file, CHUNK_BYTES)
        self._parse = parse
        self._report = report
        # The time of the last event, and the latest until now.
        self._previous_ns = self._latest_ns = 0
        # How many events are later, and earlier, than the one before.
        self._rises = self._falls = 0
        # Whether an event was passed over because it comes too late.
        self._had_late = False
        self.line = 0
        """The number of the last line that was read."""

    @property
    def is_disordered(self) -> bool:
        """Whether what was read until now has to be sorted."""
        return self._had_late or self._falls > self._rises

    def read(self) -> list[TapeEvent]:
        """Return the next chunk's events; none only at the end."""
        events: list[TapeEvent] = []
        while not events and (parsed := self.read_unordered()) is not None:
            previous_ns, latest_ns = self._previous_ns, self._latest_ns
            for line, event in parsed:
                due_ns = event.due_ns
                if due_ns >= latest_ns:
                    self._rises += due_ns > previous_ns
                    latest_ns = due_ns
                else:
                    self._rises += due_ns > previous_ns
                    self._falls += due_ns < previous_ns
                    if due_ns < latest_ns - SLACK_NS:
                        self._had_late = True
                        self._report(line, "its time lies before that of a line before it")
                        continue
                previous_ns = due_ns
                events.append(event)
            self._previous_ns, self._latest_ns = previous_ns, latest_ns
        return events

    def read_unordered(self) -> list[tuple[int, TapeEvent]] | None:
        """Return the next lines' events in whatever order, with their lines; None at the end."""
        lines = self._lines()
        if not lines:
            return None
        parse, at = self._parse, self.line
        parsed: list[tuple[int, TapeEvent]] = []
        for line in lines:
            at += 1
            try:
                for event in parse(line):
                    parsed.append((at, event))
            except UNUSABLE as error:
                self._report(at, reason_of(error))
        self.line = at
        return parsed

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _lines(self) -> list[bytes]:
        told = self._unpacked.error
        lines = self._file.readlines(CHUNK_BYTES)
        if self.line == 0 and lines:
            lines[0] = lines[0].removeprefix(_BOM)
        if (error := self._unpacked.error) is not None and told is None:
            # The last line breaks off where the file does.
            if lines and not lines[-1].endswith(b"\n"):
                lines.pop()
            self._report(self.line + len(lines) + 1, f"the compressed file is broken: {error}")
        return lines


class SortedTape:
    """A tape whose lines are not in the order of their times, sorted in memory.

    A reader like `TapeReader`. Lines of one time stay in their order; where the tape runs
    backwards, they are turned as well.

    Args:
        path: The tape's, for the error.
        reader: Reads it from its beginning.

    Raises:
        ConfigurationError: It is too long.
    """

    def __init__(self, path: Path, reader: TapeReader) -> None:
        events: list[TapeEvent] = []
        while (parsed := reader.read_unordered()) is not None:
            events += [event for _, event in parsed]
            if reader.line > SORTED_LINES:
                raise ConfigurationError(
                    f"the tape {path} is not in the order of time, and has more than "
                    f"{SORTED_LINES:,} lines: sort it by its times, or give a part of it"
                )
        steps = [later.due_ns - sooner.due_ns for sooner, later in pairwise(events)]
        if sum(step < 0 for step in steps) > sum(step > 0 for step in steps):
            events.reverse()
        events.sort(key=lambda event: event.due_ns)
        self._events = events
        # How many of them have been given.
        self._given = 0
        self.line = 0
        """The number of the last line; none is read after the beginning."""
        self.is_disordered = False
        """Whether it has to be sorted."""

    def read(self) -> list[TapeEvent]:
        """Return the next chunk's events; none only at the end."""
        events = self._events[self._given : self._given + CHUNK_EVENTS]
        self._given += len(events)
        return events

    def close(self) -> None:
        """Forget the events."""
        self._events = []


@attrs.frozen
class _Packed:
    """How a file is packed, by its first bytes.

    Args:
        path: The file.
        member: The file in a zip archive; None for another kind of file.
        is_gzip: Whether it is gzip.
    """

    path: Path
    member: str | None = None
    is_gzip: bool = False

    @classmethod
    def of(cls, path: Path) -> _Packed:
        """Look at a file; raises OSError, ConfigurationError or one of `_BROKEN`."""
        with path.open("rb") as file:
            magic = file.read(4)
        if magic[:2] == b"\x1f\x8b":
            return cls(path, is_gzip=True)
        if magic[:2] != b"PK":
            return cls(path)
        with zipfile.ZipFile(path) as archive:
            names = [
                each.filename
                for each in archive.infolist()
                if not each.is_dir() and not each.filename.startswith("__MACOSX/")
            ]
        if len(names) != 1:
            raise ConfigurationError(
                f"the tape {path} is an archive of {len(names)} files: give one with one file, or "
                "unpack it and give one of them"
            )
        return cls(path, names[0])

    def open(self) -> _Unpacked:
        """Open it from its beginning."""
        if self.is_gzip:
            return _Unpacked(gzip.GzipFile(self.path), _UNPACKED_BYTES)  # type: ignore[arg-type]
        if self.member is None:
            return _Unpacked(self.path.open("rb"), CHUNK_BYTES)
        with zipfile.ZipFile(self.path) as archive:  # what is open of it stays open
            return _Unpacked(archive.open(self.member), _UNPACKED_BYTES)

    def symbol(self) -> str:
        """Read the symbol in its name; raises ConfigurationError."""
        inner = () if self.member is None else (self.member.rpartition("/")[2],)
        return symbol_in(self.path, *inner, self.path.name)


def tape_opener(path: Path, report: _Report) -> Callable[[], TapeReader]:
    """Find out what a file is; return a function that opens it from the beginning.

    Args:
        path: The file.
        report: Called for each line that cannot be used.

    Raises:
        ConfigurationError: It cannot be read, is not a tape, or its symbol cannot be told.
    """
    try:
        packed = _Packed.of(path)
        with packed.open() as unpacked, io.BufferedReader(unpacked) as file:
            head = file.read(SNIFF_BYTES)
            if unpacked.error is not None and not head:
                raise unpacked.error
    except _BROKEN as error:
        raise ConfigurationError(
            f"the tape {path} is a broken gzip file or zip archive ({error}): replace it"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    if head.startswith(_UTF16):
        raise ConfigurationError(f"the tape {path} is text of UTF-16: save it as UTF-8")
    # One object makes it JSON lines; else the first line with a known layout says which CSV.
    lines = head.removeprefix(_BOM).splitlines()
    if any(line.lstrip().startswith((b"{", b"[{")) for line in lines):
        return lambda: TapeReader(packed.open(), _FrameParser().parse, report)
    layout = next(filter(None, map(layout_of, lines)), None)
    if layout is None:
        raise ConfigurationError(
            f"the tape {path} is neither JSON lines of Binance stream frames nor CSV of klines, "
            "trades or aggTrades: give one of these"
        )
    symbol = None if layout.symbol is not None else packed.symbol()
    return lambda: TapeReader(packed.open(), CsvParser(layout, symbol).parse, report)


def unreadable(path: Path, error: OSError) -> ConfigurationError:
    """Make the error of a tape that the system cannot read."""
    return ConfigurationError(
        f"the tape {path} cannot be read ({error.strerror or error}): give the path of a file"
    )


class _RecordedTicker(msgspec.Struct):
    """The payload of a ticker; what it does not have is not known."""

    symbol: str
    last: str | None = None
    bid: str | None = None
    ask: str | None = None
    open: str | None = None
    high: str | None = None
    low: str | None = None
    volume: str | None = None
    change: str | None = None
    change_pct: str | None = None
    source_ts: int | None = None


class _Push(msgspec.Struct):
    """A push of a server of this kind."""

    channel: str
    type: str
    data: msgspec.Raw = msgspec.Raw(b"")


class _Line(Payload):
    """A recorder's line, a bare frame or a bare event, told apart by what is there."""

    recv_ns: int = 0
    user: str = ""
    push: _Push | None = None
    frame: Frame | None = None
    stream: str = ""
    data: Payload | list[Payload] | None = None


_decode = msgspec.json.Decoder(_Line | list[Payload]).decode
_decode_ticker = msgspec.json.Decoder(_RecordedTicker).decode


class _FrameParser:
    """Parses JSON lines, in their order: a frame without a time has that of the one before."""

    def __init__(self) -> None:
        self._symbols = Symbols()
        self._time_ns = 0  # of the last frame with a time

    def parse(self, text: bytes) -> Sequence[TapeEvent]:
        """Read a line: an event, or several of a stream of all symbols, such as !ticker@arr."""
        if text.isspace():
            return ()
        try:
            line = _decode(text)
        except msgspec.ValidationError:
            if is_other_event(text):
                return ()
            raise
        # The event, or the events, whatever they are wrapped in.
        recv_ns, stream = 0, ""
        payloads: Payload | list[Payload]
        if isinstance(line, list):
            payloads = line
        elif line.push is not None:
            return self._pushed(line.push, line.user, line.recv_ns)
        elif line.frame is not None:
            recv_ns, payloads, stream = line.recv_ns, line.frame.data, line.frame.stream
        else:
            recv_ns, payloads, stream = line.recv_ns, line.data or line, line.stream
        if not isinstance(payloads, list):
            event = self._event(payloads, stream, recv_ns)
            return () if event is None else (event,)
        events = [self._event(payload, stream, recv_ns) for payload in payloads]
        return [event for event in events if event is not None]

    def _pushed(self, push: _Push, user: str, recv_ns: int) -> Sequence[TapeEvent]:
        if recv_ns <= 0:
            raise ValueError("the push has no time of receipt")
        if push.type == "status":
            return ()
        if not push.channel.startswith(TICKER_PREFIX):
            is_account = push.channel in CHANNELS and user
            data = bytes(push.data)
            return (AccountPush(recv_ns, user, push.channel, data),) if is_account else ()
        ticker = _decode_ticker(push.data)
        amounts = (ticker.last, ticker.bid, ticker.ask, ticker.open, ticker.high, ticker.low)
        changes = (ticker.change, ticker.change_pct)
        values = (
            *(None if text is None else number(text) for text in (*amounts, ticker.volume)),
            *(None if text is None else percentage(text) for text in changes),
        )
        symbol = self._symbols[push.channel.removeprefix(TICKER_PREFIX)]
        return (Event(recv_ns, ticker.source_ts or 0, symbol, "ticker", values),)

    def _event(self, payload: Payload, stream: str, recv_ns: int) -> Event | None:
        found = values_of(payload, stream)
        if found is None:
            return None
        kind, values = found
        # When it was received, or else the source's own time.
        symbol = self._symbols[payload.symbol]
        source = payload.event_time or payload.trade_time
        if recv_ns > 0:
            self._time_ns = recv_ns
        elif source:
            self._time_ns = epoch_ns(source)
        elif not self._time_ns:
            raise ValueError("the frame has no time, and none stands before it")
        source_ns = epoch_ns(source) if source else self._time_ns
        return Event(self._time_ns, source_ns // 1_000_000, symbol, kind, values)
