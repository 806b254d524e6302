"""What happens on a market, and how a symbol's events merge into its ticker; for every source.

An event is a quote, a trade, a kline or an exchange's own window of 24 hours. Amounts are checked
here: what is no amount of any market is a ValueError, from whatever source it comes.
"""

from __future__ import annotations

from decimal import (
    ROUND_HALF_EVEN,
    Context,
    Decimal,
    DivisionByZero,
    InvalidOperation,
    Overflow,
)
from typing import Literal, NamedTuple

import attrs
import msgspec

from trading_push.errors import RequestError
from trading_push.models import Ticker
from trading_push.topics import Channels, symbol_of

__all__ = [
    "DECIMALS",
    "UNUSABLE",
    "Event",
    "Kind",
    "Market",
    "Symbols",
    "epoch_ns",
    "number",
    "percentage",
    "price",
    "reason_of",
]

Kind = Literal["quote", "trade", "window", "kline"]


class Event(NamedTuple):
    """One event; times are ns (of receipt) and ms (the source's own, 0 where it tells none)."""

    due_ns: int
    source_ms: int
    symbol: str
    kind: Kind
    values: tuple[Decimal | None, ...]


@attrs.define
class Market:
    """One symbol as its events have shown it until now."""

    symbol: str
    source_ms: int = 0
    last: Decimal | None = None
    bid: Decimal | None = None
    ask: Decimal | None = None
    open: Decimal | None = None
    high: Decimal | None = None
    low: Decimal | None = None
    volume: Decimal | None = None
    stated_pct: Decimal | None = None
    """The change in percent as the exchange gave it, until a later trade."""
    rolling: bool = False
    """Whether the exchange itself gives the window (24hrTicker); trades then add no volume."""

    def apply(self, event: Event) -> None:
        """Merge an event; events are applied in their order."""
        # The exchange's clock and the recorder's differ: the time must not jump back between them.
        self.source_ms = max(self.source_ms, event.source_ms)
        values = event.values
        if event.kind == "quote":
            self.bid, self.ask = values
        elif event.kind == "trade":
            price, quantity = values
            assert price is not None
            assert quantity is not None
            self._trade(price, price, price, price)
            if not self.rolling:
                self.volume = quantity if self.volume is None else _add(self.volume, quantity)
        elif event.kind == "kline":
            open_, high, low, close, volume = values
            assert open_ is not None
            assert high is not None
            assert low is not None
            assert close is not None
            assert volume is not None
            self._trade(open_, high, low, close)
            self.volume = volume if self.volume is None else _add(self.volume, volume)
        else:
            last, open_, high, low, volume, pct, bid, ask = values
            self.last = last
            if open_ is not None:
                self.rolling = True
                self.open, self.high, self.low, self.volume = open_, high, low, volume
            self.stated_pct = pct
            if bid is not None and ask is not None:
                self.bid, self.ask = bid, ask

    def _trade(self, open_: Decimal, high: Decimal, low: Decimal, last: Decimal) -> None:
        self.last, self.stated_pct = last, None
        if self.open is None:
            self.open = open_
        if self.high is None or high > self.high:
            self.high = high
        if self.low is None or low < self.low:
            self.low = low

    def ticker(self) -> Ticker:
        """What is known now."""
        change = pct = None
        if self.last is not None and self.open is not None:
            change = DECIMALS.subtract(self.last, self.open)
            if self.open:
                share = DECIMALS.divide(DECIMALS.multiply(change, _HUNDRED), self.open)
                pct = DECIMALS.quantize(share, _PERCENT)
        return Ticker(
            symbol=self.symbol,
            last=self.last,
            bid=self.bid,
            ask=self.ask,
            open=self.open,
            high=self.high,
            low=self.low,
            volume=self.volume,
            change=change,
            change_pct=pct if self.stated_pct is None else self.stated_pct,
            source_ts=self.source_ms or None,
        )


_PERCENT = Decimal("0.0001")
_HUNDRED = Decimal(100)

DECIMALS = Context(
    60,
    ROUND_HALF_EVEN,
    Emin=-999_999,
    Emax=999_999,
    capitals=1,
    clamp=0,
    traps=[DivisionByZero, InvalidOperation, Overflow],
)
"""How a source reckons: the context of the thread is the application's own."""

_add = DECIMALS.add

UNUSABLE = (msgspec.MsgspecError, ValueError, ArithmeticError, RecursionError, IndexError)
"""What decoding a line or frame, and reading its amounts, may raise."""


def reason_of(error: Exception) -> str:
    """Why a line or frame is not usable, in words."""
    if isinstance(error, InvalidOperation):
        return "a price or quantity is no number"
    if isinstance(error, IndexError):
        return "too few columns"
    return str(error)


def number(text: str | int | None) -> Decimal:
    """An amount of any market's size, zero included."""
    if not isinstance(text, str) or len(text) > 40:
        raise ValueError("a price or quantity is missing or no decimal string")
    value = Decimal(text)
    if value.is_signed() or not value.is_finite() or not -20 < value.adjusted() < 20:
        raise ValueError("a price or quantity is out of range")
    return value


def price(text: str | int | None) -> Decimal:
    """An amount that is not zero."""
    value = number(text)
    if not value:
        raise ValueError("a price is zero")
    return value


def percentage(text: str) -> Decimal:
    """A change in percent, or as a share; of either sign."""
    value = Decimal(text[:40])
    if not (value.is_finite() and -20 < value.adjusted() < 20):
        raise ValueError("a percentage is out of range")
    return value


def epoch_ns(value: int) -> int:
    """Seconds, ms, µs or ns since the epoch, told apart by magnitude (for 1973 to 5138), in ns."""
    if value <= 0:
        raise ValueError("a time is not positive")
    if value < 10**11:
        return value * 1_000_000_000
    if value < 10**14:
        return value * 1_000_000
    return value * 1000 if value < 10**17 else value


class Symbols(dict[str, str]):
    """The spelling that clients use for each symbol of a tape."""

    def __missing__(self, name: str) -> str:
        try:
            topic = Channels(()).resolve(f"ticker.{name}", "")
        except RequestError:
            raise ValueError("the symbol is missing or cannot name a ticker") from None
        self[name] = symbol = symbol_of(topic.channel) or name
        return symbol
