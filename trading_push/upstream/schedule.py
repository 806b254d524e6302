"""When each watched user is due: at intervals, at once, or after a change.

All times are those of trio's clock. Nothing here waits or asks; the poller does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Final

import trio

__all__ = ["KEPT_S", "Schedule"]

KEPT_S: Final = 60
"""How long it is remembered that a user was watched."""
_BUCKET_S: Final = 0.25
_BUCKETS: Final = 20
"""Users who are due in the same bucket of time are asked for together, at its beginning.

A bucket is a quarter of a second, the same for all types, or the twentieth part of a short
interval.
"""
_CHANGES_AT_ONCE: Final = 10


class Schedule:
    """The times of one data type's users.

    Args:
        interval_s: Seconds between two questions for the same user.
        change_gap_s: Seconds between two questions for changes of the same user, where there are
            many; the first ten of them are asked for at once.
    """

    def __init__(self, interval_s: float, change_gap_s: float) -> None:
        self._interval_s = interval_s
        self._bucket_s = min(_BUCKET_S, interval_s / _BUCKETS)
        self._change_gap_s = change_gap_s
        # When watched users are due, the next one first.
        self._watched: dict[str, float] = {}
        self.busy_since = math.inf
        """When the first of those who are watched now came; infinite where nobody is."""
        # When the last subscriber of a user went, the first one first; for `KEPT_S`.
        self._left: dict[str, float] = {}
        # Who is to be asked for at once.
        self._now: dict[str, None] = {}
        # Who has changed too often: when they are asked for, the next one first.
        self._later: dict[str, float] = {}
        # By when the changes so far would have been asked for, one each gap; as long as it is not
        # over, and the user watched.
        self._changes_until: dict[str, float] = {}

    def __contains__(self, user: str) -> bool:
        """Whether a user is watched."""
        return user in self._watched

    def __iter__(self) -> Iterator[str]:
        """The users who are watched, the next one due first."""
        return iter(self._watched)

    def watch(self, user: str) -> None:
        """Begin with a user, who is due an interval from now."""
        if not self._watched:
            self.busy_since = trio.current_time()
        self._watched[user] = trio.current_time() + self._interval_s
        self._left.pop(user, None)

    def unwatch(self, user: str) -> None:
        """End with a user, whose times are over."""
        if self._watched.pop(user, None) is not None:
            self._left[user] = trio.current_time()
        if not self._watched:
            self.busy_since = math.inf
        for kept in (self._now, self._later, self._changes_until):
            kept.pop(user, None)

    def ask_at_once(self, users: Iterable[str]) -> None:
        """Have users asked for who are not due."""
        self._now.update(dict.fromkeys(users))

    def changed(self, user: str) -> None:
        """Have a user asked for who has changed: at once, or where that is often, a moment later.

        Changes that come until then are asked for together.
        """
        if user in self._later:
            return
        now = trio.current_time()
        until = max(self._changes_until.get(user, now), now) + self._change_gap_s
        self._changes_until[user] = until
        if until - now > _CHANGES_AT_ONCE * self._change_gap_s:
            self._later[user] = now + self._change_gap_s
        else:
            self._now[user] = None

    def known(self) -> list[str]:
        """Return who is watched, or was a moment ago."""
        return [*self._watched, *self._left]

    def next_turn(self) -> float:
        """Return when somebody is due, or is to be forgotten; infinity for never."""
        return min(
            next(iter(self._later.values()), math.inf),
            next(iter(self._left.values()), math.inf) + KEPT_S,
            self._next_due(),
        )

    def take_asked(self) -> dict[str, None]:
        """Take who is to be asked for at once by now."""
        now = trio.current_time()
        asked, self._now = self._now, {}
        for user in list(itertools.takewhile(lambda user: self._later[user] <= now, self._later)):
            del self._later[user]
            asked[user] = None
        return asked

    def take_due(self) -> list[str]:
        """Take who is due by now, and note when they are due next.

        A time that has passed is not made up for.
        """
        now = trio.current_time()
        if self._next_due() > now:
            return []
        first = next(iter(self._watched.values()))
        bucket = max(self._bucket(first), self._bucket(now))
        due = []
        for user, at in self._watched.items():
            if self._bucket(at) > bucket:
                break
            due.append(user)
        for user in due:
            self._watched[user] = max(self._watched.pop(user) + self._interval_s, now)
        return due

    def take_forgotten(self) -> list[str]:
        """Take who has been gone for long."""
        now = trio.current_time()
        gone = list(itertools.takewhile(lambda user: self._left[user] + KEPT_S <= now, self._left))
        for user in gone:
            del self._left[user]
        return gone

    def _bucket(self, at: float) -> int:
        return math.floor(at / self._bucket_s)  # `//` puts 1.0 into a bucket of 0.1 before its own

    def _next_due(self) -> float:
        """Return when the first bucket of watched users is due; infinity where there is none."""
        for at in self._watched.values():
            return self._bucket(at) * self._bucket_s
        return math.inf
