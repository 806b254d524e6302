"""The feed of an exchange by WebSocket: connections that live, and recover, for what is watched.

1. A connection is open only while a symbol is watched. The symbols are spread over shards, each as
   many as one connection may carry.
2. Messages to the exchange are spaced out, so that no second holds more than it allows; a request
   names as many symbols as it may.
3. Pings of the exchange are answered by trio-websocket. Ours go out as the exchange documents, and
   prove that a connection lives: it is lost after `silence_s` without a message, as it is when a
   request stays without its reply for so long.
4. The symbols of a lost connection are marked stale at once, until their next frame. Another
   connection comes after a back-off with jitter, and subscribes anew. Nothing that was merged
   before is used again.
5. Before the exchange ends a connection of its own accord another one takes over, a moment after
   all of its subscriptions have been acknowledged. While there are two, each frame is merged once:
   an older one never overwrites a newer.
6. What the exchange does not have, by its list of symbols, is not asked for until a list has it.
   Without a list, what nobody has asked for yet goes before what was refused.
7. A connection that answers, and brings nothing of its symbols for `mute_s`, is replaced like one
   whose time is over, and so is one that the exchange says it will end.
8. What cannot be read is counted, and logged once a minute at most.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import attrs
import trio

from trading_push import logs
from trading_push.sources.base import MarketSink
from trading_push.sources.exchanges.coalescer import TickerCoalescer
from trading_push.sources.exchanges.connection import FeedContext
from trading_push.sources.exchanges.dialect import ExchangeDialect, ExchangeLimits
from trading_push.sources.exchanges.frame_counts import FrameCounter, FrameCounts
from trading_push.sources.exchanges.pacing import ConnectThrottle
from trading_push.sources.exchanges.rest import RestService
from trading_push.sources.exchanges.shard import Shard
from trading_push.sources.exchanges.symbol_list import SymbolList
from trading_push.transport.outbound_proxies import OutboundProxies

__all__ = ["ExchangeFeed"]


class ExchangeFeed(ExchangeDialect):
    """A `WatchedFeed` of an exchange; what a kind of exchange adds stands in its subclass.

    Args:
        url: Where to connect, `wss://` or `ws://`.
        limits: What is allowed there.
        rest_url: Where its list of symbols is read; None to take them as they are asked for.

    Raises:
        ConfigurationError: A URL is not one of a WebSocket, or of a REST service.
    """

    def __init__(self, url: str, limits: ExchangeLimits, rest_url: str | None) -> None:
        super().__init__(url, limits)
        self._list: SymbolList | None = None
        # Where the list is read; None where there is none.
        self._rest: RestService | None = None
        if rest_url is not None:
            self._rest = RestService(rest_url)
            load = partial(self.load_symbols, self._rest)
            self._list = SymbolList(self.name, load, self._heed_list)
        self._tickers = TickerCoalescer()
        self._frames = FrameCounter(self.name)
        self._context = FeedContext(
            dialect=self,
            tickers=self._tickers,
            frames=self._frames,
            throttle=ConnectThrottle(self),
            numbers=itertools.count(1),
            refuse=self._refuse,
        )
        self._shards: list[Shard] = []
        # The shard of each symbol that is watched.
        self._shard_of: dict[str, Shard] = {}
        # What is watched and not in the list: it may be in the next one.
        self._unlisted: set[str] = set()
        # Where the shards run; None while the feed does not.
        self._nursery: trio.Nursery | None = None

    def reach_through(self, proxies: OutboundProxies) -> None:
        """Connect through the proxies that lead to the exchange; synchronous, before it runs.

        Raises:
            ConfigurationError: A proxy needs a library that is not installed.
        """
        super().reach_through(proxies)
        if self._rest is not None:
            self._rest.reach_through(proxies)

    def knows(self, symbol: str) -> bool:
        """Whether the exchange has `symbol`: by its list, before that by the characters."""
        listed = None if self._list is None else self._list.has(symbol)
        return self.symbol_pattern.fullmatch(symbol) is not None if listed is None else listed

    def symbols(self) -> Sequence[str] | None:
        """Return all symbols of the exchange, sorted; None where they are not known (yet)."""
        return None if self._list is None else self._list.sorted()

    def watch(self, symbol: str) -> None:
        """Subscribe a symbol as soon as the feed runs; one that was refused is tried again."""
        if symbol in self._shard_of:
            return
        if not self.knows(symbol):  # the list has come since it was subscribed
            self._unlisted.add(symbol)
            self._tickers.mark_stale("refused", [symbol])
            return
        for shard in self._shards:
            if len(shard.symbols) < self.limits.symbols_per_connection:
                break
        else:
            shard = Shard(self._context)
            self._shards.append(shard)
            if self._nursery is not None:
                self._nursery.start_soon(shard.run)
        self._shard_of[symbol] = shard
        shard.watch(symbol)

    def unwatch(self, symbol: str) -> None:
        """Unsubscribe a symbol; nothing more is given of it."""
        self._unlisted.discard(symbol)
        shard = self._shard_of.pop(symbol, None)
        if shard is not None:
            shard.unwatch(symbol)
            self._tickers.discard(symbol)

    async def run(self, sink: MarketSink) -> None:
        """Feed the sink until cancelled.

        Cancelled, it drops its connections at once; what is watched stays so for the next run.

        Raises:
            ExceptionGroup: A bug.
        """
        self._tickers.attach(sink)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self._list is not None:
                    nursery.start_soon(self._list.run)
                for shard in self._shards:
                    nursery.start_soon(shard.run)
                await self._tickers.run()
        finally:
            self._nursery = None
            self._tickers.detach()

    def statistics(self) -> FrameCounts:
        """Return what became of the frames until now; synchronous."""
        return attrs.evolve(self._frames.counts)

    def _heed_list(self) -> None:
        """Take leave of what the exchange turns out not to have, and take up what it has again."""
        unknown = sorted(symbol for symbol in self._shard_of if not self.knows(symbol))
        if unknown:
            words = ", ".join(unknown)
            logs.emit(
                logs.line("exchange_unknown", exchange=self.name, count=len(unknown), symbols=words)
            )
            self._tickers.mark_stale("refused", unknown)
            for symbol in unknown:
                self.unwatch(symbol)
        listed = sorted(filter(self.knows, self._unlisted))
        self._unlisted.difference_update(listed)
        self._unlisted.update(unknown)
        for symbol in listed:
            self.watch(symbol)

    def _refuse(self, symbol: str, error: str) -> None:
        """Log a symbol that the exchange does not have, and treat it as unwatched."""
        logs.emit(logs.line("exchange_refused", exchange=self.name, symbol=symbol, error=error))
        self._tickers.mark_stale("refused", [symbol])
        self.unwatch(symbol)
