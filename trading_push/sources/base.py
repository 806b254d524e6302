"""What a source is: where a user's data, and the market's tickers, come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from trading_push.models import Ticker

__all__ = ["BatchSource", "MarketSink", "Source", "TickerFeed"]


class Source(Protocol):
    """Where a user's data come from, one user and data type at a time.

    A source may be used by many tasks at the same time. A `fetch` that is a plain function (not a
    coroutine function) is run in a worker thread.
    """

    async def fetch(self, user_id: str, data_type: str) -> Any | None:
        """The current value, as an object that msgspec can encode, or `msgspec.Raw` JSON.

        Returns:
            None where there is nothing to say: the last value stands.

        Raises:
            Exception: Anything: it is logged, and the next poll tries again.

        Cancellation must leave nothing behind. It comes when the fetch took too long or the service
        ends.
        """
        ...


@runtime_checkable
class BatchSource(Source, Protocol):
    """A source that answers for many users in one go."""

    async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any | None]:
        """The current values by user id; a user left out, or None, keeps the last value.

        Raises:
            SourceError: Not `retryable`: what one of the users has cannot be given. They are asked
                for in smaller batches then, so that the others have theirs.
            Exception: Anything else is a failure for all of them until the next poll.
        """
        ...


class MarketSink(Protocol):
    """What a feed speaks to."""

    def update(self, tickers: Sequence[Ticker]) -> None:
        """Take the newest value of some symbols; synchronous, never blocks."""
        ...

    def stale(self, reason: str) -> None:
        """The market stands still from now on: the last values are kept and said to be stale."""
        ...


class TickerFeed(Protocol):
    """Where the market's tickers come from."""

    def knows(self, symbol: str) -> bool:
        """Whether a symbol (upper case) may exist; False is an `unknown_channel` for the client."""
        ...

    async def run(self, sink: MarketSink) -> None:
        """Feed the sink until cancelled, or return when there is nothing more to come.

        Raises:
            SourceError: The upstream failed for good.
        """
        ...
