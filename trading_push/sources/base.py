"""What a source is: where a user's data, and the market's tickers, come from.

Only `fetch` (of a source) and `knows` and `run` (of a feed) must be there; the rest is for those
that can do more, and is found by its name. A source or feed that fails is called again, with a
growing delay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, runtime_checkable

from trading_push.models import Ticker

__all__ = [
    "BatchSource",
    "ChangeSink",
    "MarketSink",
    "SessionSource",
    "Source",
    "TickerFeed",
    "WatchedFeed",
    "WatchingSource",
]


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
            SourceError: It says whether the next poll may succeed (`retryable`).
            Exception: Anything else is logged, and the next poll tries again.

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


class ChangeSink(Protocol):
    """What a source that watches its upstream speaks to; synchronous, never blocks."""

    def changed(self, changes: Iterable[tuple[str, str]]) -> None:
        """These users' data types have changed: they are fetched at once, where watched.

        Args:
            changes: A user id and a data type each.
        """
        ...

    def missed(self) -> None:
        """Changes may have been missed: everything that is watched is fetched again, at once."""
        ...

    def publish(self, values: Iterable[tuple[str, Any, str]]) -> None:
        """Publish values, or events, without a fetch.

        Args:
            values: Channel, data and user id of each, as `PushService.publish` takes them. What
                cannot be published is logged, and the rest is.
        """
        ...


@runtime_checkable
class WatchingSource(Source, Protocol):
    """A source whose upstream says what has changed; polling goes on as the safety net."""

    async def watch(self, sink: ChangeSink) -> None:
        """Tell the sink of changes until cancelled.

        Called when the first user is watched; cancelled when nobody has been for
        `polling.watch_linger_s`.

        Raises:
            Exception: It is logged, and `watch` is called again after a growing delay.
        """
        ...


@runtime_checkable
class SessionSource(Source, Protocol):
    """A source that holds something open for each user: an upstream session, a login."""

    def session(self, user_id: str) -> AbstractAsyncContextManager[Any]:
        """Entered when a user's first watcher comes, before the first fetch for them; left when the
        last one has gone, after `polling.watch_linger_s`, and when the service ends.

        What it raises is logged; it is entered again after a growing delay.
        """
        ...


class MarketSink(Protocol):
    """What a feed speaks to; synchronous, never blocks."""

    def update(self, tickers: Sequence[Ticker]) -> None:
        """Take the newest value of some symbols, which are live from now on."""
        ...

    def stale(self, reason: str, symbols: Iterable[str] | None = None) -> None:
        """Some symbols, or the whole market, stand still from now on.

        The last values are kept, and said to be stale until an `update` of theirs comes.

        Args:
            reason: A word for programs: `disconnected`, `source_timeout`.
            symbols: Which; None for all.
        """
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


@runtime_checkable
class WatchedFeed(TickerFeed, Protocol):
    """A feed that asks its upstream only for the symbols that somebody watches."""

    def watch(self, symbol: str) -> None:
        """A symbol's first watcher has come; synchronous. May come before `run`."""
        ...

    def unwatch(self, symbol: str) -> None:
        """Its last watcher has gone, and `polling.watch_linger_s` is over; synchronous."""
        ...
