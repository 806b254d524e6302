"""The running exchange: it trades beside the market, or follows the process that does."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Protocol, runtime_checkable

import attrs
import trio

from trading_push import logs
from trading_push.errors import SourceError
from trading_push.models import Candle, Ticker, now_ms
from trading_push.sources.base import HistoryFeed, MarketSink, TickerFeed, WatchedFeed
from trading_push.sources.exchanges.amounts import DECIMALS
from trading_push.sources.paper.books import Books, last_prices, read_tickers
from trading_push.sources.paper.engine import MatchingEngine
from trading_push.sources.paper.file import open_file
from trading_push.sources.paper.traders import SYMBOLS, Traders, tradable
from trading_push.sources.sqlite import open_sqlite

__all__ = ["PaperExchange", "Trading", "open_paper_exchange"]

STEP_S = 0.25
STALE_S = 10.0
"""A reader marks the market as stale when the file has not changed for so long."""


@runtime_checkable
class _Resumable(Protocol):
    """A market that can go on from prices that were kept."""

    def resume(self, prices: Mapping[str, Decimal]) -> None: ...


@attrs.define
class Trading:
    """What the trading process has; used by one worker thread at a time.

    Args:
        books: Write the file.
        engine: Has the accounts, and fills their orders.
        traders: Place the orders.
        tickers: The last of each symbol, as they were kept and as they came.
    """

    books: Books
    engine: MatchingEngine
    traders: Traders
    tickers: dict[str, Ticker]

    def step(self, moved: Sequence[Ticker], now: int) -> None:
        """Fill, place and cancel orders, and write it all.

        Raises:
            sqlite3.Error: It could not be written; the next step writes it as well.
        """
        # An exchange may give 0 for what has never traded: that is not a price to trade at.
        moved = [ticker for ticker in moved if _has_good_prices(ticker)]
        self.tickers |= {ticker.symbol: ticker for ticker in moved}
        with localcontext(DECIMALS):
            self.traders.step(self.tickers, [ticker.symbol for ticker in moved], now)
            self.books.save(self.engine, moved, now)


def _has_good_prices(ticker: Ticker) -> bool:
    """Whether each price that a ticker has is one to trade at; without bid and ask, `last` is."""
    touch = [price for price in (ticker.bid, ticker.ask) if price is not None]
    return (ticker.last is None or tradable(ticker.last)) and all(
        price.is_zero() or tradable(price) for price in touch
    )


class PaperExchange:
    """The exchange of one file; a `TickerFeed`. Made by `open_paper_exchange`.

    On a market that gives only what is watched, the exchange itself watches what its users trade
    and hold, for as long as it runs.
    """

    def __init__(
        self, path: Path, market: TickerFeed, trading: Trading | None, tickers: dict[str, Ticker]
    ) -> None:
        self.path = path
        self._market = market
        # None where another process trades on the file.
        self._trading = trading
        # For a reader: the file's tickers as they were last read.
        self._tickers = tickers
        # What has moved since the last step.
        self._moved: dict[str, Ticker] = {}
        # Where tickers go; None before `run`.
        self._sink: MarketSink | None = None
        # Whether the last step could not be written; it is logged once.
        self._failing = False
        # On a market that gives only what is watched: that market, and what is traded there.
        self._watched: WatchedFeed | None = None
        self._traded: frozenset[str] = frozenset()
        if trading is not None and isinstance(market, WatchedFeed):
            accounts = trading.engine.accounts.values()
            held = (
                symbol for each in accounts for symbol, h in each.holdings.items() if h.quantity
            )
            self._watched = market
            self._traded = frozenset(filter(market.knows, (*SYMBOLS, *held)))

    @property
    def read_only(self) -> bool:
        """Whether another process trades on the file."""
        return self._trading is None

    def knows(self, symbol: str) -> bool:
        """Whether the market has `symbol`; for a reader, whether the file has it.

        On a market that gives only what is watched, whether the users trade it.
        """
        if self._watched is not None:
            return symbol in self._traded
        if self.read_only and self._tickers:
            return symbol in self._tickers
        return self._market.knows(symbol)

    @property
    def counts_volume(self) -> bool:
        """Whether the market's tickers count their volume from a fixed moment."""
        return bool(getattr(self._market, "counts_volume", False))

    def candles(self, symbol: str, until_ms: int, most: int) -> Mapping[str, Sequence[Candle]]:
        """Return what the market has had before, where it is run here and can tell."""
        if self.read_only or not isinstance(self._market, HistoryFeed):
            return {}
        return self._market.candles(symbol, until_ms, most)

    async def run(self, sink: MarketSink) -> None:
        """Run the market and the demo users' trading, or follow the file where another one trades.

        Cancellation waits for a step that is being written; the file is consistent at any moment.

        Raises:
            SourceError: A reader can no longer read the file.
            Exception: What the market raises.
        """
        if self._trading is None:
            await self._follow(sink)
            return
        self._sink = sink
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._trade, self._trading)
            try:
                with self._watching():
                    await self._market.run(self)
            except Exception as error:
                failure = error
            # The market has ended: nothing more can be filled.
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure  # out here, where it does not become a group
        await self._step(self._trading)

    def update(self, tickers: Sequence[Ticker]) -> None:
        """Note what moved for the next step, and pass it on; as the market's sink."""
        self._moved |= {ticker.symbol: ticker for ticker in tickers}
        if self._sink is not None:
            self._sink.update(tickers)

    def stale(self, reason: str, symbols: Iterable[str] | None = None) -> None:
        """Pass on that symbols, or the whole market, stand still; as the market's sink."""
        if self._sink is not None:
            self._sink.stale(reason, symbols)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Watch what is traded, on a market that gives only what is watched."""
        watched, traded = self._watched, sorted(self._traded)
        if watched is None:
            yield
            return
        for symbol in traded:
            watched.watch(symbol)
        try:
            yield
        finally:
            for symbol in traded:
                watched.unwatch(symbol)

    async def _trade(self, trading: Trading) -> None:
        due = trio.current_time()
        while True:
            due = max(due + STEP_S, trio.current_time())
            await trio.sleep_until(due)
            await self._step(trading)

    async def _step(self, trading: Trading) -> None:
        moved, self._moved = list(self._moved.values()), {}
        try:
            # Not abandoned on cancellation: the step owns the connection until it has committed.
            await trio.to_thread.run_sync(trading.step, moved, now_ms())
            self._failing = False
        except sqlite3.Error as error:
            # A full disk, say. The market goes on, and the next step writes this one as well.
            if not self._failing:
                logs.emit(logs.line("paper_failed", error=error))
            self._failing = True

    async def _follow(self, sink: MarketSink) -> None:
        if self._tickers:
            sink.update(list(self._tickers.values()))
        try:
            with closing(await trio.to_thread.run_sync(open_sqlite, self.path, "ro")) as connection:
                await self._read_changes(connection, sink)
        except sqlite3.Error as error:
            raise SourceError(f"{self.path} cannot be read: {error}") from None

    async def _read_changes(self, connection: sqlite3.Connection, sink: MarketSink) -> None:
        changed_at, stale = trio.current_time(), False
        while True:
            await trio.sleep(STEP_S)
            tickers = await trio.to_thread.run_sync(read_tickers, connection)
            changed = [t for t in tickers.values() if t != self._tickers.get(t.symbol)]
            self._tickers = tickers
            if changed:
                changed_at, stale = trio.current_time(), False
                sink.update(changed)
            elif not stale and trio.current_time() - changed_at > STALE_S:
                stale = True
                sink.stale("source_timeout")


@asynccontextmanager
async def open_paper_exchange(
    path: Path, *, market: TickerFeed, seed: int
) -> AsyncIterator[PaperExchange]:
    """Open, or make, the exchange of a file for as long as the context lasts.

    The process that holds the lock `PATH.lock` trades; any other one reads, and logs that it does.
    A market that has `resume(prices)` goes on from the prices in the file.

    Args:
        path: The file. Its directory must be there.
        market: The market whose prices fill the orders.
        seed: The same seed places the same orders, as long as the market is the same.

    Raises:
        ConfigurationError: The path is not that of a paper exchange, and cannot become one.

    Cancellation waits until the file is open. Leaving closes the file; `run` must have ended.
    """
    with closing(await trio.to_thread.run_sync(open_file, path)) as opened:
        if opened.books is None:
            logs.emit(logs.line("paper_read_only", path=path))
            yield PaperExchange(path, market, None, opened.tickers)
            return
        if isinstance(market, _Resumable):
            market.resume(last_prices(opened.tickers))
        traders = Traders(opened.engine, seed)
        trading = Trading(opened.books, opened.engine, traders, opened.tickers)
        yield PaperExchange(path, market, trading, {})
