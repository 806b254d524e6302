"""Tickers of any exchange that ccxt knows, polled while they are watched."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import trio

from trading_push import logs
from trading_push.errors import SourceError
from trading_push.models import Ticker
from trading_push.sources.base import MarketSink
from trading_push.sources.ccxt.conversions import short_symbol
from trading_push.sources.ccxt.exchange import (
    CcxtExchange,
    ExchangeOptions,
    RequestRefused,
    as_decimal,
)

__all__ = ["CcxtFeed"]

PER_REQUEST = 100
"""How many symbols one request names: they are part of its URL."""


class CcxtFeed:
    """Polls the tickers of the symbols that are watched; a `WatchedFeed`.

    A symbol is base and quote (`BTCUSDT`), or ccxt's own (`BTC/USDT`, `BTC/USDT:USDT`). Base and
    quote mean the spot market, if there is one and `market_type` does not say otherwise.

    Args:
        options: Which exchange, and where.
        interval_s: Seconds between two questions; a symbol newly watched is asked for at once.

    Raises:
        ConfigurationError: ccxt cannot be used.
    """

    def __init__(self, options: ExchangeOptions, *, interval_s: float = 1) -> None:
        self._exchange = CcxtExchange(options)
        self._interval_s = interval_s
        # How long a call may take: it connects, reads markets of each kind, and its rate limiter
        # pauses.
        self._call_timeout_s = 6 * options.timeout_s
        # ccxt's symbols, by those of clients; None before the markets are loaded.
        self._symbols: dict[str, str] | None = None
        self._watched: set[str] = set()
        # What the exchange has refused, until it is watched anew.
        self._refused: set[str] = set()
        # Set when a symbol is watched.
        self._wake = trio.Event()

    def knows(self, symbol: str) -> bool:
        """Whether the exchange has the symbol; True until its markets are loaded."""
        return self._symbols is None or symbol in self._symbols

    def symbols(self) -> Collection[str] | None:
        """Return every name that a client may use; None until the exchange's markets are loaded."""
        return None if self._symbols is None else self._symbols.keys()

    def watch(self, symbol: str) -> None:
        """Ask for a symbol whose first watcher has arrived, at once."""
        self._watched.add(symbol)
        self._wake.set()

    def unwatch(self, symbol: str) -> None:
        """Ask no more for a symbol whose last watcher has left."""
        self._watched.discard(symbol)
        self._refused.discard(symbol)

    async def run(self, sink: MarketSink) -> None:
        """Feed the sink until cancelled, which abandons a thread that ends within its time-out.

        Raises:
            SourceError: The exchange refused, or did not answer.
        """
        try:
            with trio.fail_after(self._call_timeout_s):
                await self._exchange.call("load_markets")
            self._symbols = _by_our_name(self._exchange.api)
            while True:
                self._wake = trio.Event()
                if self._watched:
                    sink.update(await self._tickers(self._symbols, sink))
                    with trio.move_on_after(self._interval_s):
                        await self._wake.wait()
                else:
                    await self._wake.wait()
        except trio.TooSlowError:
            raise SourceError(f"{self._exchange.name} did not answer in time") from None

    def close(self) -> None:
        """Close its connections."""
        self._exchange.close()

    async def _tickers(self, symbols: Mapping[str, str], sink: MarketSink) -> list[Ticker]:
        # What was subscribed before the markets were loaded, and is not among them.
        if unknown := self._watched - symbols.keys() - self._refused:
            self._refused |= unknown
            sink.stale("refused", sorted(unknown))
        # Most exchanges answer for the markets of one kind only: by kind, our symbols by ccxt's.
        kinds: dict[object, dict[str, list[str]]] = {}
        for ours in sorted(self._watched & symbols.keys() - self._refused):
            market = self._exchange.api.markets[symbols[ours]]
            kind = kinds.setdefault((market.get("type"), market.get("linear")), {})
            kind.setdefault(symbols[ours], []).append(ours)
        questions = [
            (kind, list(kind)[start : start + PER_REQUEST])
            for kind in kinds.values()
            for start in range(0, len(kind), PER_REQUEST)
        ]
        found = []
        while questions:
            kind, asked = questions.pop()
            try:
                answer = await self._ask(asked)
            except RequestRefused as error:
                # It refuses one of the symbols: halves find which.
                half = len(asked) // 2
                if half:
                    questions += [(kind, asked[:half]), (kind, asked[half:])]
                else:
                    self._refuse(kind[asked[0]], error, sink)
                continue
            for theirs, ticker in answer.items():
                found += [_ticker(ours, ticker) for ours in kind.get(theirs, ())]
        return found

    def _refuse(self, symbols: Iterable[str], error: SourceError, sink: MarketSink) -> None:
        name = self._exchange.name
        for symbol in symbols:
            self._refused.add(symbol)
            logs.emit(logs.line("exchange_refused", exchange=name, symbol=symbol, error=error))
        sink.stale("refused", symbols)

    async def _ask(self, symbols: list[str]) -> Mapping[str, Any]:
        with trio.fail_after(self._call_timeout_s):
            return await self._answer(symbols)

    async def _answer(self, symbols: list[str]) -> Mapping[str, Any]:
        answer: Any
        if self._exchange.api.has.get("fetchTickers"):
            answer = await self._exchange.call("fetch_tickers", symbols)
        else:
            answer = {
                symbol: await self._exchange.call("fetch_ticker", symbol) for symbol in symbols
            }
        if not isinstance(answer, dict):
            raise SourceError(f"{self._exchange.name} gave no tickers that can be read")
        return answer


def _by_our_name(api: Any) -> dict[str, str]:
    """Return ccxt's symbols by every name that a client may use, in upper case."""
    first = api.options.get("defaultType", "spot")
    # A later entry wins: a market of the default type, and before all ccxt's own name.
    markets = sorted(api.markets.values(), key=lambda market: market.get("type") == first)
    return {
        **{short_symbol(market): market["symbol"] for market in markets},
        **{market["symbol"].upper(): market["symbol"] for market in markets},
    }


def _ticker(symbol: str, given: Mapping[str, Any]) -> Ticker:
    numbers = {
        "last": "last",
        "bid": "bid",
        "ask": "ask",
        "open": "open",
        "high": "high",
        "low": "low",
        "volume": "baseVolume",
        "change": "change",
        "change_pct": "percentage",
    }
    return Ticker(
        symbol=symbol,
        **{ours: as_decimal(given.get(theirs)) for ours, theirs in numbers.items()},
        source_ts=given.get("timestamp"),
    )
