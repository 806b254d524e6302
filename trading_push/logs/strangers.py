"""Bound the lines that anyone who can reach the server can cause."""

from __future__ import annotations

import time
from typing import Final

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

    def emit(self, *lines: Line) -> None:
        """Log lines, or count them."""
        now = time.monotonic()
        if now >= self._since + _WINDOW_S:
            if self._unsaid:
                emit(line("strangers_suppressed", count=self._unsaid))
            self._since, self._said, self._unsaid = now, 0, 0
        if self._said + len(lines) <= _LINES:
            self._said += len(lines)
            emit(*lines)
        else:
            self._unsaid += len(lines)
