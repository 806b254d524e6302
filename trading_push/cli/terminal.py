"""Tables on a terminal: drawn again and again, moved by keys, and left on it at the end."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

import trio
from rich.console import Console
from rich.segment import SegmentLines

from trading_push.cli.keys import KeyReader
from trading_push.cli.screen import Screen
from trading_push.cli.tables import Tables
from trading_push.cli.viewport import SegmentLine, Viewport
from trading_push.client.client import Client
from trading_push.errors import TradingPushError

__all__ = ["Terminal"]

REFRESH_S: Final = 0.25
"""How often the tables are drawn anew."""
_HEEDED: Final = (
    signal.SIGWINCH,
    signal.SIGTSTP,
    signal.SIGCONT,
    signal.SIGHUP,
    signal.SIGQUIT,
)


class Terminal:
    """What `trading-push watch` shows on a terminal.

    Args:
        client: Where the pushes come from.
        url: Where the server is.
        channels: What to show, also before it has a value.
        descriptor: The terminal.
    """

    def __init__(self, client: Client, url: str, channels: Sequence[str], descriptor: int) -> None:
        self._client = client
        self._url = url
        # Only writes codes: it would flush the terminal itself, and wait for it.
        self._console = Console(file=io.StringIO(), force_terminal=True, highlight=False)
        self.tables = Tables(channels)
        """What is shown; it takes the pushes."""
        self._screen = Screen(descriptor)
        self._viewport = Viewport(
            has_keys=self._screen.has_keys,
            is_unicode=(sys.stdout.encoding or "utf-8").lower().startswith("utf"),
        )
        # Set when the tables are to be drawn at once.
        self._wake = trio.Event()
        # What ended it, and is raised outside of the nursery, which would put it in a group.
        self._failure: Exception | None = None

    async def run(self, take: Callable[[], Awaitable[None]]) -> None:
        """Show the tables until `take` returns, or `q` is pressed; then leave them in full.

        The terminal is given back whatever ends it.

        Raises:
            TradingPushError: What `take` has raised.
            BrokenPipeError: The terminal has gone.
        """
        # Who started us may want some of these ignored, like `nohup`.
        heeded = [each for each in _HEEDED if signal.getsignal(each) is not signal.SIG_IGN]
        try:
            with trio.open_signal_receiver(*heeded) as signals, self._screen:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._until, nursery, self._draw)
                    nursery.start_soon(self._heed, signals, nursery)
                    if self._screen.has_keys:
                        nursery.start_soon(self._read_keys, nursery)
                    await self._until(nursery, take)
                    nursery.cancel_scope.cancel()
        finally:
            self._leave_all()
        if self._failure is not None:
            raise self._failure

    async def _until(self, nursery: trio.Nursery, run: Callable[[], Awaitable[None]]) -> None:
        try:
            await run()
        except (TradingPushError, OSError) as error:
            self._failure = error
            nursery.cancel_scope.cancel()

    async def _draw(self) -> None:
        while True:
            self._wake = trio.Event()
            self.tables.confirm(self._client)
            width, height = self._screen.size()
            head = self.tables.head(self._client, self._url)
            lines = self._viewport.frame(head, self.tables.sections(), width, height)
            await self._screen.draw(self._coded(lines).split("\n")[: len(lines)])
            with trio.move_on_after(REFRESH_S):
                await self._wake.wait()

    def _coded(self, lines: Sequence[SegmentLine]) -> str:
        """Write lines with the terminal's codes for colours, as far as it has any."""
        with self._console.capture() as captured:
            self._console.print(SegmentLines(lines, new_lines=True), end="", crop=False)
        return captured.get()

    async def _read_keys(self, nursery: trio.Nursery) -> None:
        reader = KeyReader()
        while data := await self._screen.keys():
            for key in reader.feed(data):
                if key == "quit":
                    nursery.cancel_scope.cancel()
                elif key == "redraw":
                    self._screen.forget()
                else:
                    self._viewport.move(key)
            self._wake.set()

    async def _heed(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        async for each in signals:
            if each in (signal.SIGHUP, signal.SIGQUIT):
                nursery.cancel_scope.cancel()
            elif each == signal.SIGTSTP:
                self._screen.suspend()
            elif each == signal.SIGCONT:
                self._screen.resume()
            else:  # a terminal of another size may have moved what it shows
                self._screen.forget()
            self._wake.set()

    def _leave_all(self) -> None:
        """Leave the tables on the terminal, nothing cut: it wraps what is too wide."""
        lines = [self.tables.head(self._client, self._url)]
        lines += [line for section in self.tables.sections() for line in section.lines]
        self._screen.leave(self._coded(lines))
