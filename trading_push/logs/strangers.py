"""Bound the lines that anyone who can reach the server can cause."""

from __future__ import annotations

import time
from typing import Final

import trio

from trading_push.logs.emitter import emit
from trading_push.logs.lines import Line, line

__all__ = ["StrangerLines"]

_LINES: Final = 10
_WINDOW_S: Final = 60.0


class StrangerLines:
    """Emits at most ten lines a minute, whatever they tell, and counts the others in one."""

    def __init__(self) -> None:
        self._since = 0.0  # when the minute began, on the monotonic clock
        self._said = 0  # lines in this minute
        self._unsaid = 0  # lines that were left out in it
        self._left_out = trio.Event()  # set with the first of these

    def emit(self, *lines: Line) -> None:
        """Log lines, or count them."""
        now = time.monotonic()
        if now >= self._since + _WINDOW_S:
            self.flush()
            self._since, self._said = now, 0
        if self._said + len(lines) <= _LINES:
            self._said += len(lines)
            emit(*lines)
        else:
            self._unsaid += len(lines)
            self._left_out.set()

    def flush(self) -> None:
        """Log now how many lines were left out so far; for the end of a service."""
        if self._unsaid:
            emit(line("strangers_suppressed", count=self._unsaid))
            self._unsaid = 0
            self._left_out = trio.Event()

    async def tell(self) -> None:
        """Log how many lines were left out when their minute is over; runs until cancelled."""
        while True:
            await self._left_out.wait()
            left_s = self._since + _WINDOW_S - time.monotonic()
            if left_s > 0:
                await trio.sleep(left_s)
            else:
                self.flush()
