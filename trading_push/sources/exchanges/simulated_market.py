"""A simulated market: seeded random walks that return to their mean, for a handful of symbols.

Its tickers depend only on its seed, on the prices that it starts from and on the number of steps;
only their `source_ts` is read from the clock.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from decimal import Decimal, localcontext

import attrs
import trio

from trading_push.models import Candle, Ticker, now_ms
from trading_push.sources.base import MarketSink
from trading_push.sources.exchanges.amounts import DECIMALS

__all__ = ["SimulatedMarket"]

STEP_S = 0.2
MOVES = 0.7
"""The probability that a symbol moves in one step."""
SIGMA = 0.00025
"""The standard deviation of one move, as a share of the price: about 1 % in ten minutes."""
PULL = 0.0005
"""The share of its distance from the mean that a price loses in one move."""
FURTHEST = 0.15
"""How far the logarithm of a price strays from that of its mean at most."""

_ZERO = Decimal(0)
_PERCENT = Decimal("0.0001")


@attrs.define
class _Symbol:
    """The walk of one symbol."""

    name: str
    tick: Decimal
    """The step of its prices."""
    lot: Decimal
    """The step of its quantities."""
    typical_lots: float
    """The mean size of a trade, in lots."""
    mean: float
    """The price that the walk returns to, in ticks."""
    away: float = 0.0
    """The logarithm of the price over the mean."""
    last: Decimal = _ZERO
    bid: Decimal = _ZERO
    ask: Decimal = _ZERO
    open: Decimal = _ZERO
    high: Decimal = _ZERO
    low: Decimal = _ZERO
    volume: Decimal = _ZERO

    def begin(self, price: Decimal) -> None:
        """Open the window at `price`, which becomes the mean."""
        with localcontext(DECIMALS):
            ticks = max(2, round(price / self.tick))
            self.mean, self.away, self.volume = float(ticks), 0.0, _ZERO
            self.last = self.open = self.high = self.low = self.bid = ticks * self.tick
            self.ask = self.bid + self.tick

    def move(self, rng: random.Random) -> None:
        """Move the price once, by a trade at it."""
        away = self.away * (1 - PULL) + rng.gauss(0, SIGMA)
        self.away = max(-FURTHEST, min(FURTHEST, away))
        bid = max(1, round(self.mean * math.exp(self.away)))
        with localcontext(DECIMALS):
            self.bid = bid * self.tick
            self.ask = (bid + rng.choice((1, 1, 1, 2, 3))) * self.tick
            self.last = rng.choice((self.bid, self.ask))
            self.high = max(self.high, self.last)
            self.low = min(self.low, self.last)
            self.volume += max(1, round(rng.expovariate(1 / self.typical_lots))) * self.lot

    def ticker(self, at_ms: int) -> Ticker:
        with localcontext(DECIMALS):
            change = self.last - self.open
            change_pct = (change * 100 / self.open).quantize(_PERCENT)
        return Ticker(
            symbol=self.name,
            last=self.last,
            bid=self.bid,
            ask=self.ask,
            open=self.open,
            high=self.high,
            low=self.low,
            volume=self.volume,
            change=change,
            change_pct=change_pct,
            source_ts=at_ms,
        )

    def before(self, rng: random.Random, until_ms: int, most: int) -> dict[str, list[Candle]]:
        """Make up what has led to the present price: the same walk, backwards."""
        away, close = self.away, self.last
        seconds: list[Candle] = []
        moves = max(1, round(MOVES / STEP_S))
        at = until_ms - until_ms % 1000
        with localcontext(DECIMALS):

            def bar(begin: int, length_s: int, trades: int, sigma: float) -> Candle:
                nonlocal away, close
                prices = [close]
                for _ in range(trades):
                    away = max(-FURTHEST, min(FURTHEST, away * (1 - PULL) + rng.gauss(0, sigma)))
                    prices.append(max(1, round(self.mean * math.exp(away))) * self.tick)
                lots = rng.gammavariate(length_s * MOVES / STEP_S, self.typical_lots)
                close = prices[-1]
                return Candle(
                    begin, close, max(prices), min(prices), prices[0], round(lots) * self.lot
                )

            # The last minutes are the sum of their seconds; the first of them is to be whole.
            while len(seconds) < most or at % 60_000:
                at -= 1000
                seconds.append(bar(at, 1, moves, SIGMA))
            minutes = _joined(seconds)
            while len(minutes) < most:
                at -= 60_000
                minutes.append(bar(at, 60, 15, SIGMA * math.sqrt(60 / 15 * MOVES / STEP_S)))
        return {"1s": seconds[:most][::-1], "1m": minutes[:most][::-1]}


def _joined(seconds: Sequence[Candle]) -> list[Candle]:
    """Join bars of seconds, the newest first, into those of their minutes."""
    minutes: list[Candle] = []
    for bar in seconds:
        at = bar.at - bar.at % 60_000
        if minutes and minutes[-1].at == at:
            last = minutes[-1]
            volume = None
            if last.volume is not None and bar.volume is not None:
                volume = last.volume + bar.volume
            minutes[-1] = Candle(
                at, bar.open, max(last.high, bar.high), min(last.low, bar.low), last.close, volume
            )
        else:
            minutes.append(attrs.evolve(bar, at=at))
    return minutes


# Symbol: first price, tick, lot, the size of a typical trade in lots.
_SYMBOLS = {
    "BTCUSDT": ("68000", "0.01", "0.00001", 4000.0),
    "ETHUSDT": ("3500", "0.01", "0.0001", 8000.0),
    "SOLUSDT": ("165", "0.01", "0.001", 12000.0),
    "BNBUSDT": ("600", "0.1", "0.001", 3000.0),
    "XRPUSDT": ("0.6", "0.0001", "0.1", 15000.0),
}


class SimulatedMarket:
    """A market of five symbols that moves several times a second; a `TickerFeed` with a history.

    Args:
        seed: The same seed gives the same market.
    """

    counts_volume = True
    """Its tickers count their volume from where the market began."""

    def __init__(self, seed: int = 1) -> None:
        self._seed = seed
        self._rng = random.Random(seed)
        self._symbols = {
            name: _Symbol(name, Decimal(tick), Decimal(lot), typical, 0.0)
            for name, (_, tick, lot, typical) in _SYMBOLS.items()
        }
        for name, (price, *_) in _SYMBOLS.items():
            self._symbols[name].begin(Decimal(price))

    def resume(self, prices: Mapping[str, Decimal]) -> None:
        """Go on from these last prices, by symbol; symbols that it does not have are ignored."""
        for name, price in prices.items():
            if name in self._symbols and price.is_finite() and price > 0:
                self._symbols[name].begin(price)

    def knows(self, symbol: str) -> bool:
        """Whether `symbol` is one of the market's."""
        return symbol in self._symbols

    def candles(self, symbol: str, until_ms: int, most: int) -> Mapping[str, Sequence[Candle]]:
        """Make up a history that ends in the symbol's present price; by the seed, as all of it."""
        rng = random.Random(f"{self._seed} {symbol}")
        return self._symbols[symbol].before(rng, until_ms, most)

    def tickers(self, at_ms: int) -> list[Ticker]:
        """Return every symbol as it stands, at the time `at_ms`."""
        return [symbol.ticker(at_ms) for symbol in self._symbols.values()]

    def step(self, at_ms: int) -> list[Ticker]:
        """Move the market by one step, at the time `at_ms`; return the symbols that moved."""
        moved = []
        for symbol in self._symbols.values():
            if self._rng.random() < MOVES:
                symbol.move(self._rng)
                moved.append(symbol.ticker(at_ms))
        return moved

    async def run(self, sink: MarketSink) -> None:
        """Feed the sink until cancelled: every symbol at first, then what each step moved.

        Cancellation leaves the market between two steps.
        """
        sink.update(self.tickers(now_ms()))
        due = trio.current_time()
        while True:
            # Counted from when the last step was due; after a long halt, missed steps are left out.
            due = max(due + STEP_S, trio.current_time())
            await trio.sleep_until(due)
            if moved := self.step(now_ms()):
                sink.update(moved)
