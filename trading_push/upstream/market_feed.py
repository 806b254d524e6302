"""The market feed: each symbol's latest value, published at most so many times a second.

A source of tickers may be far faster than anybody reads; all symbols that changed since the last
time go out in one batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import trio

from trading_push import logs
from trading_push.broker.base import Broker, Status
from trading_push.errors import PayloadError
from trading_push.models import Ticker
from trading_push.protocol.payloads import encode_data
from trading_push.sources.base import TickerFeed, WatchedFeed
from trading_push.supervision import keep_running
from trading_push.topics import Topic, ticker_topic

__all__ = ["MarketFeed"]

# Ten publications must not fall into one second even where they are not evenly delivered.
_MARGIN = 1.03


class MarketFeed:
    """Runs a `TickerFeed` and publishes its tickers; the sink that the feed speaks to.

    Args:
        feed: Where tickers come from.
        broker: Where they are published.
        max_hz: How often a second a symbol is published at most.
        stale_after_s: After how long without an update a symbol is said to be stale.
    """

    def __init__(
        self, feed: TickerFeed, broker: Broker, max_hz: float, stale_after_s: float
    ) -> None:
        self.failures = 0
        """How often the feed has raised since the start."""
        self._feed = feed
        self._watched_feed = feed if isinstance(feed, WatchedFeed) else None
        self._watched: set[str] = set()
        self._broker = broker
        self._period_s = _MARGIN / max_hz
        self._stale_after_s = stale_after_s
        self._latest: dict[str, Ticker] = {}
        self._changed: dict[str, None] = {}
        self._heard: dict[str, float] = {}  # when each live symbol was last updated, oldest first
        self._to_tell: dict[str, str] = {}  # which symbols are stale from now on, and why
        self._told_stale: set[str] = set()
        self._told_unusable: set[str] = set()
        self._wake = trio.Event()

    def watch(self, symbol: str) -> None:
        """A symbol's first watcher has come."""
        if self._watched_feed is not None:
            self._watched.add(symbol)
            self._tell_feed(self._watched_feed.watch, symbol)

    def unwatch(self, symbol: str) -> bool:
        """A symbol's last watcher has gone; who comes next is told that the value is old.

        Returns:
            Whether nothing more comes of the symbol.
        """
        if self._watched_feed is None:
            return False
        self._watched.discard(symbol)
        self._tell_feed(self._watched_feed.unwatch, symbol)
        for kept in (self._changed, self._heard, self._to_tell):
            kept.pop(symbol, None)
        self._told_stale.discard(symbol)
        if self._latest.pop(symbol, None) is not None:
            self._broker.mark([ticker_topic(symbol)], Status("stale", "not_watched"))
        return True

    def _tell_feed(self, tell: Callable[[str], None], symbol: str) -> None:
        try:
            tell(symbol)
        except Exception as error:  # an application's own code: nobody else is to suffer
            self.failures += 1
            logs.emit(logs.traced("feed_failed_at", error, symbol=symbol))

    def update(self, tickers: Sequence[Ticker]) -> None:
        """Take the newest value of some symbols."""
        now = trio.current_time()
        for ticker in tickers:
            symbol = ticker.symbol
            if self._watched_feed is not None and symbol not in self._watched:
                continue  # on its way when it was unwatched
            self._latest[symbol] = ticker
            self._changed[symbol] = None
            self._heard.pop(symbol, None)
            self._heard[symbol] = now
            self._to_tell.pop(symbol, None)
        self._wake.set()

    def stale(self, reason: str, symbols: Iterable[str] | None = None) -> None:
        """Symbols stand still: said of each, after what is still to be published."""
        for symbol in list(self._latest) if symbols is None else symbols:
            if symbol in self._latest:
                self._to_tell[symbol] = reason
                self._heard.pop(symbol, None)
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
        logs.emit(logs.line("feed_failed", error=error, delay=delay))
        self.stale("feed_error")

    def _publish(self) -> None:
        batch: list[tuple[Topic, bytes]] = []
        unchanged: list[Topic] = []
        for symbol in self._changed:
            topic = ticker_topic(symbol)
            try:
                data = encode_data(self._latest[symbol])
            except PayloadError as error:
                self._say_unusable(symbol, error)
                self._to_tell[symbol] = "unusable"
                continue
            last = self._broker.snapshot(topic)
            if last is None or last.data != data:
                batch.append((topic, data))
            else:
                unchanged.append(topic)
        recovered = self._told_stale.intersection(self._changed) - self._to_tell.keys()
        self._told_stale -= recovered
        for symbol in sorted(recovered):
            logs.emit(logs.line("symbol_recovered", symbol=symbol))
        self._changed.clear()
        self._broker.mark(unchanged, Status("live"))
        self._broker.publish(batch)
        for symbol, reason in self._to_tell.items():
            self._broker.mark([ticker_topic(symbol)], Status("stale", reason))
            if symbol not in self._told_stale:
                logs.emit(logs.line("symbol_stale", symbol=symbol))
        self._told_stale.update(self._to_tell)
        self._to_tell.clear()

    def _say_unusable(self, symbol: str, error: PayloadError) -> None:
        if symbol not in self._told_unusable:
            self._told_unusable.add(symbol)
            logs.emit(logs.line("ticker_unusable", symbol=symbol, error=error))
