"""The pauses that an HTTP service has asked for, by Retry-After.

The poller heeds them too. This is the guard behind it: no request leaves in a pause, whoever asks.

1. A pause that one user's request is answered with is for that user only.
2. One that a batch is answered with is for everyone, and so is one that `REFUSALS` users in a row
   have been answered with: then it is the service that is asked too much.
"""

from __future__ import annotations

import math
from typing import Final

import trio

from trading_push.errors import SourceError

__all__ = ["REFUSALS", "Pauses"]

REFUSALS: Final = 3
"""After so many users in a row who were asked to pause, everyone does."""


class Pauses:
    """Until when a service wants to be left alone."""

    def __init__(self) -> None:
        # All on trio's clock.
        self._everyone_until = -math.inf
        # By user; those whose pause is over are removed when another is added.
        self._until: dict[str, float] = {}
        # The users that were asked to pause since the last request that was not.
        self._in_a_row: set[str] = set()

    def check(self, user: str | None) -> None:
        """Refuse a request in a pause.

        Args:
            user: Whose it is; None for a batch.

        Raises:
            SourceError: With what is left of the pause.
        """
        now = trio.current_time()
        everyone_s = self._everyone_until - now
        user_s = 0.0 if user is None else self._until.get(user, now) - now
        left_s = max(everyone_s, user_s)
        if left_s > 0:
            raise SourceError(
                f"the HTTP service asked for a pause, of which {math.ceil(left_s)} s are left",
                pause_s=left_s,
                everyone=everyone_s >= user_s,
            )

    def ask(self, user: str | None, pause_s: float) -> bool:
        """Note a pause that was asked for, and return whether it is everyone's."""
        now = trio.current_time()
        if user is not None:
            self._in_a_row.add(user)
            if len(self._in_a_row) < REFUSALS:
                self._until = {each: at for each, at in self._until.items() if at > now}
                self._until[user] = max(self._until.get(user, now), now + pause_s)
                return False
        self._in_a_row.clear()
        self._everyone_until = max(self._everyone_until, now + pause_s)
        return True

    def answered(self) -> None:
        """Note that a request was answered without a pause."""
        self._in_a_row.clear()
