"""How many messages a connection may send: the `limits` package over counters of our own.

The package's storage in memory starts a thread again and again, which goes through every key; ours
forgets a connection when it goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from limits import RateLimitItemPerSecond
from limits.storage import Storage
from limits.strategies import FixedWindowRateLimiter

from trading_push.settings import Limits

__all__ = ["MessageRate"]


class _Counters(Storage):
    """For each key, how often it was hit since its window began, and when that ends."""

    STORAGE_SCHEME = None

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[str, tuple[int, float]] = {}

    @property
    def base_exceptions(self) -> type[Exception]:
        return KeyError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        now = self._clock()
        count, ends_at = self._windows.get(key, (0, now))
        if now >= ends_at:
            count, ends_at = 0, now + expiry
        self._windows[key] = count + amount, ends_at
        return count + amount

    def get(self, key: str) -> int:
        count, ends_at = self._windows.get(key, (0, -math.inf))
        return count if self._clock() < ends_at else 0

    def get_expiry(self, key: str) -> float:
        return self._windows.get(key, (0, self._clock()))[1]

    def check(self) -> bool:
        return True

    def reset(self) -> int:
        count = len(self._windows)
        self._windows.clear()
        return count

    def clear(self, key: str) -> None:
        self._windows.pop(key, None)


class MessageRate:
    """Whether a connection may send one more message.

    `limits.messages_burst` of them at once, and on an average `limits.messages_per_s`: as many as
    the burst in a window of so many seconds.

    Args:
        limits: The two numbers.
        clock: The time in seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        burst = max(limits.messages_burst, math.ceil(limits.messages_per_s))
        window_s = math.ceil(burst / limits.messages_per_s)
        self._served = RateLimitItemPerSecond(burst, window_s, namespace="served")
        self._refused = RateLimitItemPerSecond(burst, window_s, namespace="refused")
        self._storage = _Counters(clock)
        self._limiter = FixedWindowRateLimiter(self._storage)

    def serves(self, connection_id: str) -> bool:
        """Count a message; whether it is to be served."""
        return self._limiter.hit(self._served, connection_id)

    def bears(self, connection_id: str) -> bool:
        """Count a message that is refused; False where the connection is to end.

        As many as are served in a window may be refused in it.
        """
        return self._limiter.hit(self._refused, connection_id)

    def forget(self, connection_id: str) -> None:
        """The connection has gone."""
        self._limiter.clear(self._served, connection_id)
        self._limiter.clear(self._refused, connection_id)
