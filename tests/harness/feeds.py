"""Feeds of a loopback exchange: one of each kind, what it is told, and frames as documented."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from harness.exchange_server import Dialect, Exchange
from harness.support import DATA

from trading_push.broker.base import Publication, Status
from trading_push.broker.memory import MemoryBroker
from trading_push.models import Ticker
from trading_push.sources.exchanges import binance, bybit, okx
from trading_push.sources.exchanges.binance import BinanceFeed
from trading_push.sources.exchanges.bybit import BybitFeed
from trading_push.sources.exchanges.okx import OkxFeed
from trading_push.sources.exchanges.stream import ExchangeFeed
from trading_push.topics import Channels, ticker_topic
from trading_push.upstream.market_feed import MarketFeed

QUICK: dict[str, float] = {
    "spacing_s": 0.002,
    "connect_spacing_s": 0.002,
    "first_pause_s": 0.02,
    "last_pause_s": 0.1,
    "jitter_s": 0.01,
    "overlap_s": 0.02,
}
KINDS: list[Dialect] = ["binance", "linear", "okx"]


def feed_of(there: Exchange, *, listed: bool = False, **limits: float) -> ExchangeFeed:
    """A feed of the loopback exchange, without the patience that a real one needs.

    Args:
        there: The exchange.
        listed: Whether the feed reads the exchange's list of symbols.
        limits: Other limits than the exchange's own.
    """
    rest_url = there.rest_url if listed else None
    if there.dialect == "binance":
        return BinanceFeed(
            there.url, limits=attrs.evolve(binance.LIMITS, **(QUICK | limits)), rest_url=rest_url
        )
    if there.dialect == "okx":
        return OkxFeed(
            there.url, limits=attrs.evolve(okx.LIMITS, **(QUICK | limits)), rest_url=rest_url
        )
    return BybitFeed(
        there.url, limits=attrs.evolve(bybit.LIMITS, **(QUICK | limits)), rest_url=rest_url
    )


class Recorder:
    """A sink that keeps what it is told, in its order."""

    def __init__(self) -> None:
        self.told: list[Ticker | tuple[str, list[str]]] = []

    def update(self, tickers: Sequence[Ticker]) -> None:
        assert len({ticker.symbol for ticker in tickers}) == len(tickers) > 0
        self.told += tickers

    def stale(self, reason: str, symbols: Iterable[str] | None = None) -> None:
        self.told.append((reason, list(symbols or ())))

    @property
    def last(self) -> dict[str, Ticker]:
        return {each.symbol: each for each in self.told if isinstance(each, Ticker)}

    @property
    def stale_calls(self) -> list[tuple[str, list[str]]]:
        return [each for each in self.told if not isinstance(each, Ticker)]


@asynccontextmanager
async def running(feed: ExchangeFeed, *symbols: str) -> AsyncIterator[Recorder]:
    """A feed that runs while the context is open, with some symbols watched."""
    sink = Recorder()
    for symbol in symbols:
        feed.watch(symbol)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run, sink)
        yield sink
        nursery.cancel_scope.cancel()


class Shown:
    """What a client of the service would be shown of the market of a feed."""

    def __init__(self, feed: ExchangeFeed) -> None:
        self.history: list[tuple[str, str | None]] = []
        """Each publication's `last` price, and each status, by symbol, in their order."""
        self.broker = MemoryBroker(Channels(()), self._deliver)
        self.market = MarketFeed(feed, self.broker, max_hz=1000, stale_after_s=60)

    def _deliver(self, messages: Iterable[Any]) -> None:
        for message in messages:
            symbol = message.topic.channel.removeprefix("ticker.")
            if isinstance(message, Publication):
                self.history.append((symbol, json.loads(message.data)["last"]))
            else:
                self.history.append((symbol, message.status.state))

    def status(self, symbol: str) -> Status:
        return self.broker.status(ticker_topic(symbol))

    def is_live(self, symbol: str) -> bool:
        return self.status(symbol).state == "live"

    def last(self, symbol: str) -> str | None:
        snapshot = self.broker.snapshot(ticker_topic(symbol))
        return None if snapshot is None else json.loads(snapshot.data)["last"]


@asynccontextmanager
async def shown(feed: ExchangeFeed, *symbols: str) -> AsyncIterator[Shown]:
    made = Shown(feed)
    for symbol in symbols:
        made.market.watch(symbol)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.market.run)
        yield made
        nursery.cancel_scope.cancel()


# --- frames as the exchanges document them -----------------------------------------------------

NOW = 1_763_600_000_000
numbers = itertools.count(1)


def trade(price: str, number: int, symbol: str = "BTCUSDT", quantity: str = "1") -> dict[str, Any]:
    data = {"e": "trade", "E": NOW + number, "s": symbol, "t": number, "p": price, "q": quantity}
    return {
        "stream": f"{symbol.lower()}@trade",
        "data": data | {"T": NOW + number, "m": True, "M": True},
    }


def quote(bid: str, ask: str, number: int, symbol: str = "BTCUSDT") -> dict[str, Any]:
    data = {"u": number, "s": symbol, "b": bid, "B": "1", "a": ask, "A": "2"}
    return {"stream": f"{symbol.lower()}@bookTicker", "data": data}


def window(last: str, number: int, last_trade: int, symbol: str = "BTCUSDT") -> dict[str, Any]:
    data = {
        **{"e": "24hrTicker", "E": NOW + number, "s": symbol, "p": "10", "P": "10.5", "w": "1"},
        **{"x": "1", "c": last, "Q": "1", "b": "99", "B": "1", "a": "101", "A": "1", "o": "95"},
        **{"h": "110", "l": "90", "v": "1000", "q": "1", "O": NOW, "C": NOW, "F": 0},
        **{"L": last_trade, "n": 1},
    }
    return {"stream": f"{symbol.lower()}@ticker", "data": data}


def bybit_frame(
    kind: str, number: int, symbol: str = "BTCUSDT", ts: int | None = None, **data: str
) -> dict[str, Any]:
    return {
        "topic": f"tickers.{symbol}",
        "type": kind,
        "data": {"symbol": symbol, **data},
        "cs": number,
        "ts": NOW + number if ts is None else ts,
    }


def whole(price: str) -> dict[str, str]:
    return {
        **{"lastPrice": price, "bid1Price": "99", "ask1Price": "101", "prevPrice24h": "95"},
        **{"highPrice24h": "110", "lowPrice24h": "90", "volume24h": "1000"},
        **{"price24hPcnt": "0.105", "turnover24h": "1"},
    }


def okx_frame(
    number: int, symbol: str = "BTCUSDT", ts: int | None = None, **data: str
) -> dict[str, Any]:
    data = {
        "instType": "SPOT",
        "instId": symbol,
        "ts": str(NOW + number if ts is None else ts),
    } | data
    return {"arg": {"channel": "tickers", "instId": symbol}, "data": [data]}


def okx_whole(price: str) -> dict[str, str]:
    return {
        **{"last": price, "lastSz": "1", "bidPx": "99", "bidSz": "1", "askPx": "101", "askSz": "1"},
        **{"open24h": "95", "high24h": "110", "low24h": "90", "vol24h": "1000", "volCcy24h": "1"},
    }


def news(dialect: Dialect, price: str, symbol: str = "BTCUSDT") -> dict[str, Any]:
    """A frame that says the price, newer than all before, from which alone a ticker can be made."""
    number = next(numbers)
    if dialect == "binance":
        return trade(price, number, symbol)
    if dialect == "okx":
        return okx_frame(number, symbol, **okx_whole(price))
    return bybit_frame("snapshot", number, symbol, **whole(price))


def recorded(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"the recorded market data is not there ({name} beside the checkout)")
    return DATA / name
