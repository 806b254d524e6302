"""Publish the latest ticker of each symbol, at most so many times a second.

A source of tickers may be far faster than anyone can read. All symbols that have changed since the
last time go out in one batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

import attrs
import trio

from trading_push import logs
from trading_push.broker.base import Broker, State, Status
from trading_push.errors import PayloadError
from trading_push.models import Ticker
from trading_push.protocol.payloads import encode_data
from trading_push.sources.base import ListedFeed, TickerFeed, WatchedFeed
from trading_push.supervision import exits_are_errors, keep_running
from trading_push.topics import SYMBOL_RULE, Topic, canonical_symbol, ticker_topic
from trading_push.upstream.candles import Candles
from trading_push.upstream.symbol_quota import SymbolQuota

__all__ = ["MarketFeed", "OpenMarket"]

_UNUSABLE_LOGGED = 1000
"""Of how many symbols at most it is logged that they cannot be used."""
_MARGIN = 1.03
"""Lengthens the period, so that uneven delivery brings no publication too many into a second."""


_PUBLISHED: Final = 10_000
"""Of how many symbols at most it is remembered that somebody has published them."""


class OpenMarket:
    """A market without a feed: any symbol may be subscribed, and its tickers are published."""

    def __init__(self) -> None:
        self._published: dict[str, None] = {}

    def knows(self, symbol: str) -> bool:
        """Whether a symbol may exist: any may."""
        return True

    def admit(self, user: str, symbol: str) -> None:
        """Let a user subscribe to a symbol."""

    def published(self, symbol: str) -> None:
        """Remember that somebody has published a symbol's ticker."""
        if len(self._published) < _PUBLISHED:
            self._published[symbol] = None

    def symbols(self) -> tuple[Collection[str], bool]:
        """Return the symbols that were published; there may be others."""
        return self._published, False


class MarketFeed:
    """Runs a `TickerFeed` and publishes its tickers; the sink that the feed speaks to.

    Args:
        feed: Where tickers come from.
        broker: Where they are published.
        max_hz: How often a second a symbol is published at most.
        stale_after_s: How long a symbol may go without an update before it is stale.
        symbols: How many a feed that asks upstream for what is watched may be asked for.
        watchers: The users who watch a symbol.
    """

    def __init__(
        self,
        feed: TickerFeed,
        broker: Broker,
        max_hz: float,
        stale_after_s: float,
        symbols: int = 1000,
        watchers: Callable[[str], Collection[str]] = lambda symbol: (),
    ) -> None:
        self.failures = 0
        """How often the feed has raised since the start."""
        self.is_up = True
        """Whether it gives tickers, as far as is known."""
        self.candles: Candles | None = None
        """Told each price that comes; none before it is set."""
        self._feed = feed
        # The feed again, where it wants to be told what is watched; and what is.
        self._watched_feed = feed if isinstance(feed, WatchedFeed) else None
        self._watched: set[str] = set()
        self._quota = SymbolQuota(symbols, watchers, self._watched.__contains__)
        self._broker = broker
        self._period_s = _MARGIN / max_hz
        self._stale_after_s = stale_after_s
        # The last ticker of each symbol, and which are still to be published.
        self._latest: dict[str, Ticker] = {}
        # Every symbol that had one since the start.
        self._seen: dict[str, None] = {}
        self._changed: dict[str, None] = {}
        # When each live symbol was last updated, on trio's clock, the oldest first.
        self._heard: dict[str, float] = {}
        # Which symbols are to be marked stale at the next publication, and the reason.
        self._newly_stale: dict[str, str] = {}
        # Which were logged as stale, until they are live again.
        self._logged_stale: set[str] = set()
        # Which were logged as unusable, once for the life of the service.
        self._logged_unusable: set[str] = set()
        # Set when there is something to publish.
        self._wake = trio.Event()

    @property
    def name(self) -> str:
        """What kind of feed it is."""
        return type(self._feed).__name__

    def knows(self, symbol: str) -> bool:
        """Whether a symbol may exist."""
        return self._feed.knows(symbol)

    def admit(self, user: str, symbol: str) -> None:
        """Let a user subscribe to a symbol.

        Raises:
            RequestError: `too_many_subscriptions`, which may be retried.
        """
        if self._watched_feed is not None:
            self._quota.admit(user, symbol)

    def symbols(self) -> tuple[Collection[str], bool]:
        """Return the symbols that are known, and whether those are all that there are."""
        if isinstance(self._feed, ListedFeed) and (listed := self._feed.symbols()) is not None:
            return listed, True
        return self._seen, self._watched_feed is None

    def published(self, symbol: str) -> None:
        """Remember that somebody has published a symbol's ticker."""
        self._seen[symbol] = None

    def watch(self, symbol: str) -> None:
        """Tell the feed that a symbol's first watcher has arrived."""
        if self._watched_feed is not None:
            self._watched.add(symbol)
            self._tell_feed(self._watched_feed.watch, symbol)

    def unwatch(self, symbol: str) -> bool:
        """Tell the feed that a symbol's last watcher has left; from now on the value is stale.

        Returns:
            Whether nothing more comes of the symbol: False for a feed that gives all it has.
        """
        if self._watched_feed is None:
            return False
        self._watched.discard(symbol)
        self._quota.release(symbol)
        self._tell_feed(self._watched_feed.unwatch, symbol)
        for kept in (self._changed, self._heard, self._newly_stale):
            kept.pop(symbol, None)
        self._logged_stale.discard(symbol)
        if self._latest.pop(symbol, None) is not None:
            self._broker.mark([ticker_topic(symbol)], Status("stale", "not_watched"))
        return True

    def _tell_feed(self, tell: Callable[[str], None], symbol: str) -> None:
        try:
            with exits_are_errors():
                tell(symbol)
        except Exception as error:  # the application's own code must not end anything else
            self.failures += 1
            logs.emit(logs.traced("feed_failed_at", error, symbol=symbol))

    def update(self, tickers: Sequence[Ticker]) -> None:
        """Take the newest value of some symbols, in whatever spelling; the channel's is published.

        A symbol that nobody can subscribe to is logged once. The others are published.
        """
        now = trio.current_time()
        for ticker in tickers:
            symbol = canonical_symbol(ticker.symbol)
            if symbol is None:
                self._log_unusable(ticker.symbol, PayloadError(SYMBOL_RULE))
                continue
            if symbol != ticker.symbol:
                ticker = attrs.evolve(ticker, symbol=symbol)
            if self._watched_feed is not None and symbol not in self._watched:
                continue  # it was under way when the symbol was unwatched
            self._latest[symbol] = ticker
            if self.candles is not None:
                self.candles.trade(symbol, ticker.last, ticker.volume)
            self._seen[symbol] = None
            self._changed[symbol] = None
            self._heard.pop(symbol, None)
            self._heard[symbol] = now
            self._newly_stale.pop(symbol, None)
            self.is_up = True
        self._wake.set()

    def stale(self, reason: str, symbols: Iterable[str] | None = None) -> None:
        """Mark symbols that stand still, after what is still to be published of them.

        The reason `refused` says that there is no such symbol: it is down.
        """
        self.is_up = self.is_up and symbols is not None
        given = list(self._latest) if symbols is None else map(canonical_symbol, symbols)
        for symbol in given:
            if symbol in self._latest:
                self._newly_stale[symbol] = reason
                self._heard.pop(symbol, None)
            elif symbol in self._watched and reason == "refused":
                self._broker.mark([ticker_topic(symbol)], Status("down", reason))
        self._wake.set()

    async def run(self) -> None:
        """Run the feed and publish until cancelled; a feed that fails is started again."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_feed)
            while True:
                with trio.move_on_at(self._silent_at()):
                    await self._wake.wait()
                self._wake = trio.Event()
                self._find_silent()
                self._publish()
                await trio.sleep(self._period_s)

    def _silent_at(self) -> float:
        return next(iter(self._heard.values()), math.inf) + self._stale_after_s

    def _find_silent(self) -> None:
        now = trio.current_time()
        self.stale(
            "source_timeout",
            list(
                itertools.takewhile(
                    lambda symbol: self._heard[symbol] + self._stale_after_s <= now, self._heard
                )
            ),
        )

    async def _run_feed(self) -> None:
        await keep_running(lambda: self._feed.run(self), self._failed)

    def _failed(self, error: Exception, delay: float) -> None:
        self.failures += 1
        self.is_up = False
        logs.emit(logs.line("feed_failed", error=error, delay=delay))
        self.stale("feed_error")

    def _publish(self) -> None:
        # What has changed since the last time, encoded.
        batch: list[tuple[Topic, bytes]] = []
        unchanged: list[Topic] = []
        for symbol in self._changed:
            topic = ticker_topic(symbol)
            try:
                data = encode_data(self._latest[symbol])
            except PayloadError as error:
                self._log_unusable(symbol, error)
                self._newly_stale[symbol] = "unusable"
                continue
            last = self._broker.snapshot(topic)
            if last is None or last.data != data:
                batch.append((topic, data))
            else:
                unchanged.append(topic)
        # Values first, then what is stale after them; each turn is logged once.
        recovered = self._logged_stale.intersection(self._changed) - self._newly_stale.keys()
        self._logged_stale -= recovered
        for symbol in sorted(recovered):
            logs.emit(logs.line("symbol_recovered", symbol=symbol))
        self._changed.clear()
        self._broker.mark(unchanged, Status("live"))
        self._broker.publish(batch)
        for symbol, reason in self._newly_stale.items():
            state: State = "down" if reason == "refused" else "stale"
            self._broker.mark([ticker_topic(symbol)], Status(state, reason))
            if symbol not in self._logged_stale:
                logs.emit(logs.line("symbol_stale", symbol=symbol))
        self._logged_stale.update(self._newly_stale)
        self._newly_stale.clear()

    def _log_unusable(self, symbol: str, error: PayloadError) -> None:
        if symbol not in self._logged_unusable and len(self._logged_unusable) < _UNUSABLE_LOGGED:
            self._logged_unusable.add(symbol)
            logs.emit(logs.line("ticker_unusable", symbol=symbol, error=error))
