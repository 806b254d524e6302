"""The market feed: each symbol's latest value, published at most so many times a second.

A source of tickers may be far faster than anybody reads; all symbols that changed since the last
time go out in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from trading_push import logs
from trading_push.broker.base import Broker, Status
from trading_push.errors import PayloadError
from trading_push.models import Ticker
from trading_push.protocol import encode_data
from trading_push.sources.base import TickerFeed
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
    """

    def __init__(self, feed: TickerFeed, broker: Broker, max_hz: float) -> None:
        self.failures = 0
        """How often the feed has raised since the start."""
        self._feed = feed
        self._broker = broker
        self._period_s = _MARGIN / max_hz
        self._latest: dict[str, Ticker] = {}
        self._changed: dict[str, None] = {}
        self._stale: str | None = None
        self._told_stale: set[str] = set()
        self._told_unusable: set[str] = set()
        self._wake = trio.Event()

    def update(self, tickers: Sequence[Ticker]) -> None:
        """Take the newest value of some symbols."""
        for ticker in tickers:
            self._latest[ticker.symbol] = ticker
            self._changed[ticker.symbol] = None
        self._stale = None
        self._wake.set()

    def stale(self, reason: str) -> None:
        """The market stands still: said of every symbol, after what is still to be published."""
        self._stale = reason
        self._wake.set()

    async def run(self) -> None:
        """Run the feed and publish until cancelled; a feed that fails is started again."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_feed)
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                self._publish()
                await trio.sleep(self._period_s)

    async def _run_feed(self) -> None:
        await keep_running(lambda: self._feed.run(self), self._failed)

    def _failed(self, error: Exception, delay: float) -> None:
        self.failures += 1
        logs.emit(logs.line("feed_failed", error=error, delay=delay))
        self.stale("feed_error")

    def _publish(self) -> None:
        batch: list[tuple[Topic, bytes]] = []
        for symbol in self._changed:
            topic = ticker_topic(symbol)
            try:
                data = encode_data(self._latest[symbol])
            except PayloadError as error:
                self._say_unusable(symbol, error)
                continue
            last = self._broker.snapshot(topic)
            if last is None or last.data != data:
                batch.append((topic, data))
        recovered = self._told_stale.intersection(self._changed)
        self._changed.clear()
        self._told_stale -= recovered
        for symbol in sorted(recovered):
            logs.emit(logs.line("symbol_recovered", symbol=symbol))
        self._broker.mark([ticker_topic(symbol) for symbol in recovered], Status("live"))
        self._broker.publish(batch)
        if self._stale is not None:
            symbols = [symbol for symbol in self._latest if symbol not in self._told_stale]
            self._told_stale.update(symbols)
            topics = [ticker_topic(symbol) for symbol in symbols]
            self._broker.mark(topics, Status("stale", self._stale))
            for symbol in symbols:
                logs.emit(logs.line("symbol_stale", symbol=symbol))

    def _say_unusable(self, symbol: str, error: PayloadError) -> None:
        if symbol not in self._told_unusable:
            self._told_unusable.add(symbol)
            logs.emit(logs.line("ticker_unusable", symbol=symbol, error=error))
