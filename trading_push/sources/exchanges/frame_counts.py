"""Count what became of an exchange's frames, and log those that cannot be read."""

from __future__ import annotations

import math
from typing import Final

import attrs
import trio

from trading_push import logs

__all__ = ["FrameCounter", "FrameCounts"]

LOG_EVERY_S: Final = 60.0


@attrs.define
class FrameCounts:
    """What became of the frames since the feed was made.

    Args:
        used: Merged into a ticker.
        outdated: Older than what was merged, or the same again, or a delta without its snapshot.
        unused: Well-formed, but of another stream, or of a symbol that is not subscribed (any
            more).
        bad: Could not be read; reported in the log.
    """

    used: int = 0
    outdated: int = 0
    unused: int = 0
    bad: int = 0


class FrameCounter:
    """Counts the frames of one feed.

    Args:
        exchange: The exchange's name in the log.
    """

    def __init__(self, exchange: str) -> None:
        self._exchange = exchange
        self._unlogged = 0
        self._logged_at = -math.inf
        self.counts = FrameCounts()

    def count_bad(self, why: str) -> None:
        """Count a frame that cannot be read; log it, with those before, once a minute at most."""
        self.counts.bad += 1
        self._unlogged += 1
        now = trio.current_time()
        if now >= self._logged_at + LOG_EVERY_S:
            logs.emit(
                logs.line(
                    "exchange_bad_frames", exchange=self._exchange, count=self._unlogged, error=why
                )
            )
            self._logged_at, self._unlogged = now, 0
