"""Log for whom a source fails: a line a cause, at once, and then at most one a minute.

A cause is the text of an error. Users who begin to fail with a cause that was logged a moment ago
are named in its next line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import attrs
import trio

from trading_push import logs
from trading_push.logs.lines import failure

__all__ = ["REPEAT_S", "FailureLog"]

REPEAT_S: Final = 60
"""How often at most a cause is logged."""
_NAMES: Final = 10
"""How many users a line names; the others are counted."""
_CAUSES: Final = 10
"""Causes that have lines of their own at the same time; all further ones share the last one's."""
_GATHER_S: Final = 1.0
"""How long users who have recovered wait for others, after a line has told of some."""


@attrs.define
class _Cause:
    """A cause that was logged: who has begun to fail since, and how many failures were not told."""

    error: Exception
    logged_at: float
    unnamed: dict[str, None] = attrs.field(factory=dict)
    suppressed: int = 0

    @property
    def flushed_at(self) -> float:
        """When it is told or forgotten: what goes on failing is told at the next failure."""
        waits = self.suppressed and not self.unnamed
        return self.logged_at + (2 * REPEAT_S if waits else REPEAT_S)


class FailureLog:
    """The log of one data type's failures and recoveries.

    Args:
        data_type: The channel's name.
    """

    def __init__(self, data_type: str) -> None:
        self._data_type = data_type
        self._causes: dict[str, _Cause] = {}
        # When the last recovery was logged, on trio's clock; and who has recovered since.
        self._recovered_at = -math.inf
        self._recovered: dict[str, None] = {}
        # When hung calls were logged.
        self._hung_at = -math.inf

    def failed(self, users: Mapping[str, bool], error: Exception) -> None:
        """Log a failure, or count it.

        Args:
            users: For whom the source has failed, and whether that is new of each.
            error: What it failed with.
        """
        now = trio.current_time()
        key = failure(error)
        # An outage has another text as it goes on: who was told of as failing is not news.
        is_news = any(users.values()) and len(self._causes) < _CAUSES
        if key not in self._causes and self._causes and not is_news:
            key = next(reversed(self._causes))
        cause = self._causes.get(key)
        if cause is None:
            cause = self._causes[key] = _Cause(error, -math.inf)
        cause.error = error
        if now >= cause.logged_at + REPEAT_S:
            self._tell(cause, {**cause.unnamed, **users})
        else:
            cause.unnamed.update(dict.fromkeys(user for user, new in users.items() if new))
            cause.suppressed += len(users)

    def recovered(self, users: Iterable[str]) -> None:
        """Log that the source answers for users again."""
        self._recovered.update(dict.fromkeys(users))
        for cause in self._causes.values():
            for user in self._recovered:
                cause.unnamed.pop(user, None)
        if trio.current_time() >= self._recovered_at + _GATHER_S:
            self._tell_recovered()

    def hung(self, count: int, limit: int) -> None:
        """Log how many calls go on after their time-out, if that was not said a moment ago."""
        now = trio.current_time()
        if now >= self._hung_at + REPEAT_S:
            self._hung_at = now
            logs.emit(
                logs.line("fetches_hung", data_type=self._data_type, count=count, limit=limit)
            )

    def next_flush(self) -> float:
        """When `flush` has something to do, on trio's clock; infinity for never."""
        # The same sums as in `flush`: a difference may be rounded to the other side.
        at = min((each.flushed_at for each in self._causes.values()), default=math.inf)
        return min(at, self._recovered_at + _GATHER_S) if self._recovered else at

    def flush(self) -> None:
        """Log what was held back long enough, and forget the causes that are over."""
        now = trio.current_time()
        if self._recovered and now >= self._recovered_at + _GATHER_S:
            self._tell_recovered()
        for key, cause in list(self._causes.items()):
            if now < cause.flushed_at:
                continue
            if cause.unnamed:
                self._tell(cause, cause.unnamed)
            else:
                del self._causes[key]

    def _tell(self, cause: _Cause, users: Iterable[str]) -> None:
        names, data_type, error, more = [*users], self._data_type, cause.error, cause.suppressed
        cause.logged_at, cause.suppressed, cause.unnamed = trio.current_time(), 0, {}
        many, count = _listed(names), len(names)
        match count == 1, more > 0:
            case True, False:
                line = logs.line("fetch_failed", user=names[0], data_type=data_type, error=error)
            case True, True:
                line = logs.line(
                    "fetch_failed_again",
                    user=names[0],
                    data_type=data_type,
                    error=error,
                    suppressed=more,
                )
            case False, False:
                line = logs.line(
                    "fetch_failed_for_many",
                    users=many,
                    count=count,
                    data_type=data_type,
                    error=error,
                )
            case _:
                line = logs.line(
                    "fetch_failed_for_many_again",
                    users=many,
                    count=count,
                    data_type=data_type,
                    error=error,
                    suppressed=more,
                )
        logs.emit(line)

    def _tell_recovered(self) -> None:
        names, data_type = [*self._recovered], self._data_type
        self._recovered_at, self._recovered = trio.current_time(), {}
        if len(names) == 1:
            line = logs.line("fetch_recovered", user=names[0], data_type=data_type)
        else:
            line = logs.line(
                "fetch_recovered_for_many",
                users=_listed(names),
                count=len(names),
                data_type=data_type,
            )
        logs.emit(line)


def _listed(users: Sequence[str]) -> str:
    return ", ".join(users[:_NAMES]) + ", …" * (len(users) > _NAMES)
