"""What a source of users' data, and a feed of tickers, have to offer.

Required are only `fetch` of a source, and `knows` and `run` of a feed. The rest is for those that
can do more, and is found by its name. A source or feed that fails is called again, after a growing
delay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Protocol, runtime_checkable

import attrs

from trading_push.models import Candle, Ticker

__all__ = [
    "NO_VALUE",
    "BatchSource",
    "ChangeSink",
    "HistoryFeed",
    "ListedFeed",
    "MarketSink",
    "NewEvents",
    "NoValue",
    "SessionSource",
    "Source",
    "TickerFeed",
    "WatchedFeed",
    "WatchingSource",
]


class NoValue:
    """The type of `NO_VALUE`."""

    def __repr__(self) -> str:
        return "NO_VALUE"


NO_VALUE: Final = NoValue()
"""What a source returns for a user who has no value, and none any more: the last one is dropped."""


@attrs.frozen
class NewEvents:
    """What a source returns for a user of a polled channel of kind `events`: those that are new.

    Args:
        events: Each as an object that msgspec can encode, in order.
        taken: Called where they are about to be published. False where they are no longer new: an
            other answer has been taken since these were read; none of them is published then.
    """

    events: Sequence[Any]
    taken: Callable[[], bool]


class Source(Protocol):
    """Gives users' data, for one user and data type at a time.

    A source may be used by many tasks at the same time. A `fetch` that is a plain function (not a
    coroutine function) is run in a worker thread.

    It may say what it offers by an attribute `data_types`, an iterable of names; without it, or if
    it is None, it offers balance, positions, pnl and orders, and whatever it is asked for besides.
    Those of `event_types`, if it has that attribute, it answers with `NewEvents`.
    """

    async def fetch(self, user_id: str, data_type: str) -> Any | None:
        """Return the current value, as an object that msgspec can encode, or as `msgspec.Raw` JSON.

        Returns:
            None where there is nothing to say; the last value stands then. `NO_VALUE` where there
            is none, nor the last one any more.

        Raises:
            SourceError: Its `retryable` says whether the next poll may succeed.
            Exception: Anything else is logged, and the next poll tries again.

        Cancellation must leave nothing behind. It comes when a fetch takes too long, and when the
        service ends.
        """
        ...


@runtime_checkable
class BatchSource(Source, Protocol):
    """A source that answers for many users at once."""

    async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any | None]:
        """Return the current values by user id; a user left out, or None, keeps the last value.

        An exception in place of a value is a failure for that user alone.

        Raises:
            SourceError: Its `pause_s` is heeded: for these users, or for `everyone`.
            Exception: The call has failed. The users are asked for in smaller batches then, to find
                out for whom, unless the source answers for nobody.
        """
        ...


class ChangeSink(Protocol):
    """What a `WatchingSource` reports to; synchronous, never blocks."""

    def changed(self, changes: Iterable[tuple[str, str]]) -> None:
        """Have what has changed fetched at once, if it is watched.

        Args:
            changes: Pairs of a user id and a data type.
        """
        ...

    def missed(self) -> None:
        """Have everything that is watched fetched at once: changes may have been missed."""
        ...

    def publish(self, values: Iterable[tuple[str, Any, str]]) -> None:
        """Publish values, or events, without a fetch.

        Args:
            values: Channel, data and user id of each, as for `PushService.publish`. A value that
                cannot be published is logged; the others are published.
        """
        ...

    def mark(self, channel: str, user_id: str, reason: str | None) -> None:
        """Say whether what is published here can be told at the moment, of a user who is watched.

        Args:
            channel: A channel that is not polled, such as `fills`.
            user_id: Whose.
            reason: A word for programs, such as `source_error`; None if it can be told.
        """
        ...


@runtime_checkable
class WatchingSource(Source, Protocol):
    """A source whose upstream tells what has changed; polling goes on as the safety net."""

    async def watch(self, sink: ChangeSink) -> None:
        """Tell the sink of changes until cancelled.

        Called when the first user is watched; cancelled when no user has been watched for
        `polling.watch_linger_s`.

        Raises:
            Exception: It is logged, and `watch` is called again after a growing delay.
        """
        ...


@runtime_checkable
class SessionSource(Source, Protocol):
    """A source that holds something open for each user: an upstream session, a login."""

    def session(self, user_id: str) -> AbstractAsyncContextManager[Any]:
        """Make the context manager that is open while a user is watched.

        It is entered when the user's first watcher arrives, before the first fetch. It is left
        `polling.watch_linger_s` after the last one has left, and when the service ends. What it
        raises is logged, and it is entered again after a growing delay.
        """
        ...


class MarketSink(Protocol):
    """What a feed reports to; synchronous, never blocks."""

    def update(self, tickers: Sequence[Ticker]) -> None:
        """Publish the newest value of some symbols, which are live from now on.

        A symbol may be spelled in lower case. One that nobody can subscribe to is logged once.
        """
        ...

    def stale(self, reason: str, symbols: Iterable[str] | None = None) -> None:
        """Mark some symbols, or the whole market, as standing still.

        The last values are kept, and are stale until the next `update` of their symbol.

        Args:
            reason: A word for programs, such as `disconnected` or `source_timeout`. `refused` says
                that there is no such symbol (any more): it is down, not stale.
            symbols: Which symbols; None for all.
        """
        ...


class TickerFeed(Protocol):
    """Gives the tickers of a market.

    One whose tickers count their volume from a fixed moment on, and not over a window that moves,
    may say so by an attribute `counts_volume`; the candles have a volume then.
    """

    def knows(self, symbol: str) -> bool:
        """Whether a symbol (upper case) may exist; if not, the client is told `unknown_channel`."""
        ...

    async def run(self, sink: MarketSink) -> None:
        """Feed the sink until cancelled, or return when nothing more will come.

        Raises:
            SourceError: The upstream failed; `run` is called again after a growing delay.
        """
        ...


@runtime_checkable
class WatchedFeed(TickerFeed, Protocol):
    """A feed that asks its upstream only for the symbols that are watched."""

    def watch(self, symbol: str) -> None:
        """Begin with a symbol, whose first watcher has arrived; synchronous, maybe before `run`."""
        ...

    def unwatch(self, symbol: str) -> None:
        """End with a symbol, `polling.watch_linger_s` after its last watcher left; synchronous."""
        ...


@runtime_checkable
class HistoryFeed(TickerFeed, Protocol):
    """A feed that can tell what was before it began."""

    def candles(self, symbol: str, until_ms: int, most: int) -> Mapping[str, Sequence[Candle]]:
        """Return bars by their length, `1s` and `1m`, the oldest first; synchronous, never blocks.

        Args:
            symbol: One that it knows.
            until_ms: No bar begins later, in ms since the epoch.
            most: How many of each there may be.
        """
        ...


@runtime_checkable
class ListedFeed(TickerFeed, Protocol):
    """A feed that can say which symbols there are."""

    def symbols(self) -> Collection[str] | None:
        """Return all symbols that clients can name; None where they are not known (yet)."""
        ...
