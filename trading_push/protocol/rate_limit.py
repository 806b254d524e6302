"""Limit the messages of one connection by a budget for each window of some seconds."""

from __future__ import annotations

import math
from collections.abc import Callable

from trading_push.settings.schema import Limits

__all__ = ["MessageRate"]


class MessageRate:
    """The budget of one connection.

    It allows `limits.messages_burst` messages at once and `limits.messages_per_s` on average: a
    window is as long as a burst takes at that average. A message that costs more than one counts
    as several.

    Args:
        limits: The two numbers.
        clock: The time in seconds.
    """

    __slots__ = ("_clock", "_ends_at", "_limits", "_refused", "_spent")

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._spent = 0  # of this window's budget; above it, the next windows pay
        self._refused = 0  # messages that this window refused
        self._ends_at = -math.inf  # when this window ends

    def spend(self, cost: int = 1) -> bool:
        """Take the cost of a message from the budget; False if the message must be refused.

        A message that costs more than a whole budget is served at the start of a window.
        """
        burst = self._begin()
        if self._spent and self._spent + cost > burst:
            return False
        self._spent += cost
        return True

    def charge(self, cost: int) -> None:
        """Take from the budget what a message has cost beyond; the next windows may have to pay."""
        self._begin()
        self._spent += cost

    def refuse(self) -> bool:
        """Count a message that is refused; False if the connection must end.

        A window may refuse as many messages as it serves.
        """
        burst = self._begin()
        self._refused += 1
        return self._refused <= burst

    def _begin(self) -> int:
        """Begin a new window if it is time; return the budget of one."""
        limits, now = self._limits, self._clock()
        burst = max(limits.messages_burst, math.ceil(limits.messages_per_s))
        if now >= self._ends_at:
            window_s = math.ceil(burst / limits.messages_per_s)
            # What was charged beyond a budget is paid by the windows that followed.
            ended = 1 if self._spent <= burst else 1 + int((now - self._ends_at) // window_s)
            self._spent = max(0, self._spent - burst * ended)
            self._refused = 0
            self._ends_at = now + window_s
        return burst
