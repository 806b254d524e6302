"""Pace what an exchange is asked: its connections, and the requests of one of them."""

from __future__ import annotations

import math

import trio

from trading_push.sources.exchanges.dialect import ExchangeDialect

__all__ = ["ConnectThrottle", "RequestBudget"]


class ConnectThrottle:
    """Keeps the connections of a feed apart, so that the exchange does not refuse them.

    Args:
        dialect: The exchange, which says how far apart.
    """

    def __init__(self, dialect: ExchangeDialect) -> None:
        self._dialect = dialect
        self._turn = trio.Lock()
        self._connected_at = -math.inf

    async def wait_for_turn(self) -> None:
        """Wait until another connection may be made."""
        async with self._turn:
            spacing_s = self._dialect.limits.connect_spacing_s
            await trio.sleep_until(self._connected_at + spacing_s)
            self._connected_at = trio.current_time()


class RequestBudget:
    """Says when one connection may send its next request, by how many an hour may hold.

    An eighth of them may go out one after another; the rest is spread over the hour, so that no
    sixty minutes hold more than all.

    Args:
        per_hour: How many; None for any number.
    """

    def __init__(self, per_hour: int | None) -> None:
        burst = 0 if per_hour is None else per_hour // 8
        self._spacing_s = 0.0 if per_hour is None else 3600 / (per_hour - burst)
        self._burst_s = max(0, burst - 1) * self._spacing_s
        # When all that was sent would have gone out, evenly spread, on trio's clock.
        self._spread_until = -math.inf

    def ready_at(self) -> float:
        """Return when the next request may be sent, on trio's clock; it may be over."""
        return self._spread_until - self._burst_s

    def spend(self) -> None:
        """Count one request, which is sent now."""
        self._spread_until = max(trio.current_time(), self._spread_until) + self._spacing_s
