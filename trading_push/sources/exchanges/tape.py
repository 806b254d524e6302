"""Play a recorded tape as the market, at a chosen speed; `tape_file` has the formats.

1. A line that cannot be used is counted, and the first few are kept with their numbers. A tape
   without a usable line is a configuration error before anything is served.
2. Reading and decoding run in a worker thread, a chunk at a time. All frames due at one moment are
   applied together and given to the sink in one call, with a ticker for each symbol that changed.
3. Bid and ask always come from one frame: each pair that is given has stood in the tape.
4. The pace is that of the recorded times of receipt, counted from the start, so that delays do not
   add up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import trio

from trading_push import logs
from trading_push.errors import ConfigurationError
from trading_push.sources.base import MarketSink
from trading_push.sources.exchanges.recorded_accounts import AccountPush, RecordedAccounts
from trading_push.sources.exchanges.tape_file import (
    SortedTape,
    TapeReader,
    tape_opener,
    unreadable,
)
from trading_push.sources.exchanges.ticker_state import TickerState

__all__ = ["BadLine", "Tape"]

WAKE_S = 0.02
"""The sink is updated at most this often."""
SCAN_LINES = 200_000
"""How far a tape is read before it is played, for its symbols and its first usable line."""
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
        loop: Whether to begin again at the end, with a fresh window of 24 hours.
    """

    def __init__(self, path: Path | str, speed: float = 1.0, loop: bool = False) -> None:
        self.path = Path(path)
        self.bad_lines = 0
        """How many lines could not be used, each counted once however often the tape is played."""
        self.bad_examples: list[BadLine] = []
        """The first few of them."""
        self.accounts: RecordedAccounts | None = None
        """The account channels, where the tape is a recording that has some; after `open`."""
        self._speed = speed
        self._loop = loop
        # Opens the file from the beginning; None before `open`.
        self._open: Callable[[], TapeReader | SortedTape] | None = None
        # The symbols met until now, and whether those are all.
        self._symbols: set[str] = set()
        self._complete = False
        # The last bad line that was counted: those up to it are not counted again.
        self._judged = 0

    async def open(self) -> None:
        """Find out what the file is, and read its beginning, in a worker thread.

        A tape of up to 200,000 lines is read to its end once, so that all its symbols are known.
        Cancellation waits for the thread (about a second at most).

        Raises:
            ConfigurationError: There is no such file, it is not a tape, no line of it can be used,
                or its symbol cannot be told.
        """
        await trio.to_thread.run_sync(self._scan)
        self._report_bad_lines(0)

    def knows(self, symbol: str) -> bool:
        """Whether the tape holds `symbol`, or may: in a part that has not been read yet."""
        return symbol in self._symbols or not self._complete

    async def run(self, sink: MarketSink) -> None:
        """Play the tape; at its end, without `loop`, mark the market as stale and return.

        Cancellation waits for the chunk that is being read (milliseconds).

        Raises:
            ConfigurationError: As from `open`, where that was not called before.
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

    async def _play_from(self, reader: TapeReader | SortedTape, sink: MarketSink) -> None:
        states: dict[str, TickerState] = {}
        changed: dict[str, TickerState] = {}
        # On trio's clock: when the tape began, and when the sink was last updated.
        started = woke = trio.current_time()
        # On the tape's: its first event, and how far it may be played by now.
        first_ns = now_ns = -1

        def update_sink() -> None:
            if changed:
                sink.update([state.ticker() for state in changed.values()])
                changed.clear()

        def advance() -> None:
            """Compute how far the tape may be played by now."""
            nonlocal woke, now_ns
            woke = trio.current_time()
            now_ns = max(now_ns, first_ns + round((woke - started) * self._speed * 1e9))

        while events := await trio.to_thread.run_sync(reader.read):
            if first_ns < 0:
                first_ns = now_ns = events[0].due_ns
            elif trio.current_time() >= woke + WAKE_S:
                # At a very high speed there is nothing to wait for within a chunk.
                update_sink()
                advance()
            for event in events:
                if event.due_ns > now_ns:
                    update_sink()
                    due = started + (event.due_ns - first_ns) / 1e9 / self._speed
                    await trio.sleep_until(max(woke + WAKE_S, due))
                    # A rounded clock must not wake again and again for the same frame.
                    now_ns = event.due_ns
                    advance()
                if isinstance(event, AccountPush):
                    if self.accounts is not None:
                        self.accounts.play(event)
                    continue
                state = states.get(event.symbol)
                if state is None:
                    state = states[event.symbol] = TickerState(event.symbol)
                    self._symbols.add(event.symbol)
                state.apply(event)
                changed[event.symbol] = state
        self._complete = True
        update_sink()
        # A tape of one moment, looped, must not spin.
        await trio.sleep_until(woke + WAKE_S)

    def _scan(self) -> None:
        """Read the beginning, for the symbols and a usable line; in a worker thread."""
        in_file_order = tape_opener(self.path, self._bad_line)
        self._open = in_file_order
        try:
            if self._read_symbols(in_file_order()):
                # Not in the order of time: begin again, with what is sorted.
                self.bad_lines, self._judged = 0, 0
                self.bad_examples.clear()
                self._open = lambda: SortedTape(self.path, in_file_order())
                self._read_symbols(self._open())
        except OSError as error:
            raise unreadable(self.path, error) from None
        if not self._symbols and self.accounts is None:
            why = f" (line {self.bad_examples[0][0]}: {self.bad_examples[0][1]})"
            raise ConfigurationError(
                f"the tape {self.path} has no usable line{why if self.bad_lines else ''}: give one "
                "of Binance stream frames (JSON lines) or klines, trades or aggTrades (CSV)"
            )

    def _read_symbols(self, reader: TapeReader | SortedTape) -> bool:
        """Read the beginning; say whether it has to be sorted."""
        try:
            while reader.line < SCAN_LINES and (events := reader.read()):
                for event in events:
                    if not isinstance(event, AccountPush):
                        self._symbols.add(event.symbol)
                    elif self.accounts is None:
                        self.accounts = RecordedAccounts()
            self._complete = reader.line < SCAN_LINES
            return reader.is_disordered
        finally:
            reader.close()

    def _bad_line(self, number: int, error: str) -> None:
        if number <= self._judged:
            return  # counted before, in the scan or in an earlier round
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
