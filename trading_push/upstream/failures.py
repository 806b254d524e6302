"""For whom a source fails, and when they may be asked for again.

1. Where one call for many users fails while the source answers, it is found out whom it fails for
   (see `search`). They are asked for alone from then on, after pauses that grow, and all of them
   together at most once for several calls for others.
2. Where the source answers for nobody, one call after another tries whether it does again, after
   pauses that grow. Once it does, everybody is asked for at once.
3. Where the source says how long it wants to be left alone, it is: for the users asked for, or
   altogether.

All times are those of trio's clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Final

import attrs
import trio

from trading_push.errors import SourceError
from trading_push.logs.lines import failure
from trading_push.supervision import back_off
from trading_push.upstream.schedule import Schedule

__all__ = ["Failures", "Outage", "by_cause", "reason_of", "told_pause_s"]

_FRESH_S: Final = 1.0
"""A user whose own call has failed is not asked for again before, whoever comes."""
_LONGEST_PAUSE_S: Final = 60.0
"""The longest pause before a user who is asked for alone is tried again."""
_FIRST_OUTAGE_PAUSE_S: Final = 1.0
_LONGEST_OUTAGE_PAUSE_S: Final = 10.0
_LONGEST_TOLD_PAUSE_S: Final = 3600.0
"""The longest pause that a source's own wish is heeded for."""
_CREDIT: Final = 0.15
_CREDIT_EVERY_S: Final = 20.0
_MOST_CREDIT: Final = 5.0
"""How many users who are asked for alone may be tried again: so many for each call that succeeds,
one for so many seconds besides, and so many at most at once. It bounds what they add to the work of
the source."""


@attrs.define
class _Failure:
    """A source that fails for a user.

    Args:
        at: When it last failed.
        alone_times: How often it has failed since the user was found to be the one whom a call for
            many failed for; 0 for a user who was not.
        until: Until when the user is not tried again, if alone.
        told_until: Until when the source wants to be left alone.
    """

    at: float
    alone_times: int
    until: float
    told_until: float


@attrs.define
class Outage:
    """A source that answers for nobody.

    Args:
        error: What it fails with.
        until: When it is tried next.
        tries: How often it has been tried.
        trying: Whether a call that tries it is under way.
    """

    error: Exception
    until: float
    tries: int = 0
    trying: bool = False

    def goes_on(self) -> None:
        """Note that the try has failed: the next one comes later."""
        self.trying = False
        self.tries += 1
        pause_s = back_off(self.tries, _FIRST_OUTAGE_PAUSE_S, _LONGEST_OUTAGE_PAUSE_S)
        self.until = max(self.until, trio.current_time() + pause_s)


class Failures:
    """The failures of one data type's users.

    Args:
        interval_s: Seconds between two questions for the same user.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._by_user: dict[str, _Failure] = {}
        # Who is asked for alone, the one who was tried longest ago first.
        self._alone: dict[str, None] = {}
        # How many of them may be tried by now.
        self._credit = _MOST_CREDIT
        self._credited_at = -math.inf
        self.outage: Outage | None = None
        """While the source answers for nobody."""

    def __contains__(self, user: str) -> bool:
        """Whether the source fails for a user."""
        return user in self._by_user

    def __bool__(self) -> bool:
        """Whether it fails for anybody."""
        return bool(self._by_user)

    def __iter__(self) -> Iterator[str]:
        """The users for whom it fails."""
        return iter(self._by_user)

    def is_alone(self, user: str) -> bool:
        """Whether a user is to be asked for alone, for the call for many has failed for them."""
        known = self._by_user.get(user)
        return known is not None and known.alone_times > 0

    def may_be_asked(self, user: str) -> bool:
        """Whether a user may be asked for who is not due."""
        known = self._by_user.get(user)
        return known is None or trio.current_time() >= max(
            known.at + (_FRESH_S if known.alone_times else 0), known.told_until
        )

    def may_be_due(self, user: str) -> bool:
        """Whether a user who is due is asked for now, and together with others."""
        known = self._by_user.get(user)
        return known is None or not (known.alone_times or trio.current_time() < known.told_until)

    def take_alone(self, users: Schedule) -> list[str]:
        """Take those of some users who are to be tried again alone, as many as may be by now.

        Who was tried longest ago is the first.
        """
        now, taken = trio.current_time(), []
        self._earn((now - self._credited_at) / _CREDIT_EVERY_S)
        self._credited_at = now
        for user in self._alone:
            if self._credit < 1:
                break
            known = self._by_user[user]
            if user in users and now >= max(known.until, known.told_until):
                self._credit -= 1
                taken.append(user)
        return taken

    def add(self, user: str, error: Exception, *, alone: bool) -> bool:
        """Note that the source has failed for a user; return whether that is new.

        Args:
            user: For whom.
            error: What it failed with.
            alone: Whether the user was found to be the one whom a call for many failed for.
        """
        known, now = self._by_user.get(user), trio.current_time()
        times, until = 0 if known is None else known.alone_times, now
        if alone or times:
            times += 1
            longest_s = max(_LONGEST_PAUSE_S, self._interval_s)
            until += back_off(times, self._interval_s, longest_s)
            self._alone.pop(user, None)
            self._alone[user] = None
        self._by_user[user] = _Failure(now, times, until, now + told_pause_s(error))
        return known is None

    def discard(self, user: str) -> bool:
        """Forget that the source fails for a user; return whether it did."""
        if user in self._alone:
            del self._alone[user]
            self._earn(1)  # the others may be well again, too
        return self._by_user.pop(user, None) is not None

    def next_try(self) -> float:
        """Return when a source that answers for nobody is tried next; infinity for never."""
        if self.outage is None or self.outage.trying:
            return math.inf
        return self.outage.until

    def answered(self, *, anybody: bool) -> bool:
        """Note that a call has succeeded; return whether that ends an outage.

        Args:
            anybody: Whether the source has answered for one user at least.
        """
        self._earn(_CREDIT)
        ends = anybody and self.outage is not None
        if ends:
            self.outage = None
        return ends

    def _earn(self, credit: float) -> None:
        self._credit = min(self._credit + credit, _MOST_CREDIT)

    def begin_outage(self, error: Exception) -> None:
        """Note that the source answers for nobody, and until when it is left alone."""
        pause_s = told_pause_s(error) or min(self._interval_s, _FIRST_OUTAGE_PAUSE_S)
        until = trio.current_time() + pause_s
        if self.outage is None:
            self.outage = Outage(error, until)
        self.outage.error, self.outage.until = error, max(self.outage.until, until)


def by_cause(failures: Iterable[tuple[str, Exception]]) -> Iterator[tuple[Exception, list[str]]]:
    """Group users by what the source has failed with for them."""
    groups: dict[str, tuple[Exception, list[str]]] = {}
    for user, error in failures:
        groups.setdefault(failure(error), (error, []))[1].append(user)
    yield from groups.values()


def told_pause_s(error: Exception) -> float:
    """Return how long the source wants to be left alone; 0 if it did not say so."""
    if isinstance(error, SourceError) and math.isfinite(error.pause_s):
        return min(max(error.pause_s, 0.0), _LONGEST_TOLD_PAUSE_S)
    return 0.0


def reason_of(error: Exception) -> str:
    """Return what subscribers are told of an error, a word for programs."""
    if isinstance(error, trio.TooSlowError):
        return "source_timeout"
    return error.reason if isinstance(error, SourceError) else "source_error"
