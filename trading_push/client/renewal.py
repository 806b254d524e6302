"""When the token of a living connection is renewed: at once, and then after pauses that grow."""

from __future__ import annotations

import math
from collections.abc import Callable

from trading_push.client import ending

__all__ = ["Renewal"]


class Renewal:
    """The renewals on one connection; the part of the core that speaks to the driver of them.

    Where `is_due()` is true, the driver waits until `at`, calls `asking`, and asks the application
    for a token. Then it calls `ClientCore.renew`; or, where there is none, `failed`, and waits
    until the new `at`.

    Args:
        is_possible: Whether another token may be had.
        back_off: Computes the wait after so many failures in a row, in seconds.
    """

    def __init__(self, is_possible: bool, back_off: Callable[[int], float]) -> None:
        self._is_possible = is_possible
        self._back_off = back_off
        # Whether the driver is to be told that there is one, and whether it is at it.
        self._is_due = False
        self._is_under_way = False
        # How many have followed each other closely, and when the last one began.
        self._count = 0
        self._asked_at = -math.inf
        self.at = math.inf
        """When the application is to be asked for a token, while a renewal is under way."""

    def want(self, now: float) -> None:
        """Have the token renewed, unless a renewal is under way."""
        if self._is_possible and not self._is_under_way:
            self._is_under_way = self._is_due = True
            self.failed(now)

    def is_due(self) -> bool:
        """Return whether the driver is to renew the token, which it is told once."""
        is_due, self._is_due = self._is_due, False
        return is_due

    def asking(self, now: float) -> None:
        """Take note that the application is asked for a token."""
        self._asked_at = now

    def failed(self, now: float) -> None:
        """Take note that there is no token now; the connection is none the worse for it."""
        # A token that expires soon is due again at once: the pauses grow then, too.
        self._count = self._count + 1 if now - self._asked_at < ending.LASTING_S else 0
        self.at = now + (self._back_off(self._count) if self._count else 0)

    def done(self) -> None:
        """Take note that there is a token."""
        self._is_under_way = False
