"""Bound how many symbols are watched upstream: in all, and on account of one user.

A symbol is on account of who asked for it first. When they no longer watch it and another does, it
is on that one's account; this is looked at only before somebody is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Final

import attrs
import trio

from trading_push.errors import ErrorCode, RequestError

__all__ = ["SymbolQuota"]

_LOOK_AGAIN_S: Final = 1.0
"""How long the accounts stand before they are looked at again: a refused client may ask often."""
_UNDER_WAY_S: Final = 10.0
"""How long a symbol may be counted that nobody watches: the subscription is under way."""


@attrs.frozen
class _Entry:
    """On whose account a symbol is, and since when, on trio's clock."""

    user: str
    since: float


class SymbolQuota:
    """Counts the symbols that are watched, or about to be.

    Args:
        most: How many there may be in all; of one user, a quarter of that.
        watchers: The users who watch a symbol.
        is_held: Whether a symbol is watched upstream: also for a while after its last watcher.
    """

    def __init__(
        self,
        most: int,
        watchers: Callable[[str], Collection[str]],
        is_held: Callable[[str], bool],
    ) -> None:
        self._most = most
        self._most_of_user = max(1, most // 4)
        self._watchers = watchers
        self._is_held = is_held
        self._entries: dict[str, _Entry] = {}
        # How many symbols each user has in there.
        self._counts: Counter[str] = Counter()
        self._looked_at = -_LOOK_AGAIN_S

    def admit(self, user: str, symbol: str) -> None:
        """Count a symbol that a user asks for, if it is not watched anyway.

        Raises:
            RequestError: `too_many_subscriptions`, which may be retried.
        """
        if symbol in self._entries:
            return
        if self._is_over(user):
            self._look_again()
        if self._counts[user] >= self._most_of_user:
            raise RequestError(
                ErrorCode.TOO_MANY_SUBSCRIPTIONS,
                f"a user may have {self._most_of_user} symbols watched: unsubscribe some, and try "
                "again a moment later",
                retryable=True,
            )
        if len(self._entries) >= self._most:
            raise RequestError(
                ErrorCode.TOO_MANY_SUBSCRIPTIONS,
                f"this server watches {self._most} symbols at most (market.symbols): try again "
                "later",
                retryable=True,
            )
        self._put(symbol, user)

    def release(self, symbol: str) -> None:
        """Count a symbol no more; it is not watched upstream."""
        entry = self._entries.pop(symbol, None)
        if entry is not None:
            self._uncount(entry.user)

    def _is_over(self, user: str) -> bool:
        return self._counts[user] >= self._most_of_user or len(self._entries) >= self._most

    def _put(self, symbol: str, user: str) -> None:
        self._entries[symbol] = _Entry(user, trio.current_time())
        self._counts[user] += 1

    def _uncount(self, user: str) -> None:
        self._counts[user] -= 1
        if not self._counts[user]:
            del self._counts[user]

    def _look_again(self) -> None:
        """Put symbols on the account of who watches them, and drop those of whom nobody came."""
        now = trio.current_time()
        if now < self._looked_at + _LOOK_AGAIN_S:
            return
        self._looked_at = now
        for symbol, entry in list(self._entries.items()):
            watchers = self._watchers(symbol)
            if watchers and entry.user not in watchers:
                self.release(symbol)
                self._put(symbol, next(iter(watchers)))
            elif not watchers and now > entry.since + _UNDER_WAY_S and not self._is_held(symbol):
                self.release(symbol)
