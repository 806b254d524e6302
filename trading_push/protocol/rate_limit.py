"""How many messages one connection may send: a budget for each window of some seconds."""

from __future__ import annotations

import math
from collections.abc import Callable

from trading_push.settings.schema import Limits

__all__ = ["MessageRate"]


class MessageRate:
    """The budget of one connection.

    `limits.messages_burst` messages at once, and on an average `limits.messages_per_s`: as many as
    the burst in a window of so many seconds. A message that costs more than one counts as several.

    Args:
        limits: The two numbers.
        clock: The time in seconds.
    """

    __slots__ = ("_clock", "_ends_at", "_limits", "_refused", "_spent")

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._spent = 0
        self._refused = 0
        self._ends_at = -math.inf

    def spend(self, cost: int = 1) -> bool:
        """Take the cost of a message from the budget; whether the message is to be served.

        One that costs more than a whole window has is served by a window that is untouched.
        """
        burst = self._begin()
        if self._spent and self._spent + cost > burst:
            return False
        self._spent += cost
        return True

    def charge(self, cost: int) -> None:
        """Take from the budget what has turned out to be more work; the next windows pay, too."""
        self._begin()
        self._spent += cost

    def refuse(self) -> bool:
        """Count a message that is refused; False where the connection is to end.

        As many as are served in a window may be refused in it.
        """
        burst = self._begin()
        self._refused += 1
        return self._refused <= burst

    def _begin(self) -> int:
        """Begin the window that it is time for; the budget of one."""
        limits, now = self._limits, self._clock()
        burst = max(limits.messages_burst, math.ceil(limits.messages_per_s))
        if now >= self._ends_at:
            window_s = math.ceil(burst / limits.messages_per_s)
            # What was charged beyond a window's budget is paid by those that follow.
            ended = 1 if self._spent <= burst else 1 + int((now - self._ends_at) // window_s)
            self._spent = max(0, self._spent - burst * ended)
            self._refused = 0
            self._ends_at = now + window_s
        return burst
