"""What happens to a symbol, and how its events merge into its ticker; for every source.

An event is a quote, a trade, a kline or an exchange's own window of 24 hours.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Literal, NamedTuple

import attrs

from trading_push.models import Ticker
from trading_push.sources.exchanges.amounts import DECIMALS

__all__ = ["Event", "Kind", "TickerState"]

Kind = Literal["quote", "trade", "window", "kline", "ticker"]


class Event(NamedTuple):
    """One event of a symbol.

    Args:
        due_ns: When it was received, in ns since the epoch; 0 for a live one.
        source_ms: The source's own time, in ms since the epoch; 0 where it gives none.
        symbol: The symbol as clients spell it.
        kind: Which values it has.
        values: Bid and ask of a quote; price and quantity of a trade; open, high, low, close and
            volume of a kline; last, open, high, low, volume, change in percent, bid and ask of a
            window; all amounts of a recorded ticker, in the order of `Ticker`.
    """

    due_ns: int
    source_ms: int
    symbol: str
    kind: Kind
    values: tuple[Decimal | None, ...]


@attrs.define
class TickerState:
    """One symbol as its events have shown it until now."""

    symbol: str
    has_own_window: bool = True
    """Whether trades make a window while the exchange has given none: that of a tape begins with
    it. A live one would be false, because the 24 hours before the first trade are not known."""
    source_ms: int = 0
    """The latest time of a source, in ms since the epoch; 0 where none gave one."""
    last: Decimal | None = None
    bid: Decimal | None = None
    ask: Decimal | None = None
    open: Decimal | None = None
    high: Decimal | None = None
    low: Decimal | None = None
    volume: Decimal | None = None
    stated_change: Decimal | None = None
    """The change of a recorded ticker, until a later event."""
    stated_pct: Decimal | None = None
    """The change in percent as the exchange gave it, until a later trade."""
    rolling: bool = False
    """Whether the exchange itself has given the window (24hrTicker); trades add no volume then."""

    def apply(self, event: Event) -> None:
        """Merge an event; events are to be applied in their order."""
        # The exchange's clock and the recorder's differ: the time must not jump back between them.
        self.source_ms = max(self.source_ms, event.source_ms)
        values = event.values
        self.stated_change = None
        if event.kind == "ticker":
            self.last, self.bid, self.ask, self.open, self.high, self.low = values[:6]
            self.volume, self.stated_change, self.stated_pct = values[6:]
        elif event.kind == "quote":
            self.bid, self.ask = values
        elif event.kind == "trade":
            price, quantity = values
            assert price is not None
            assert quantity is not None
            self._trade(price, price, price, price)
            if self.has_own_window and not self.rolling:
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
            if volume is not None:
                self.rolling = True
                self.open, self.high, self.low, self.volume = open_, high, low, volume
            self.stated_pct = pct
            if bid is not None and ask is not None:
                self.bid, self.ask = bid, ask

    def _trade(self, open_: Decimal, high: Decimal, low: Decimal, last: Decimal) -> None:
        self.last, self.stated_pct = last, None
        if not (self.has_own_window or self.rolling):
            return
        if self.open is None:
            self.open = open_
        if self.high is None or high > self.high:
            self.high = high
        if self.low is None or low < self.low:
            self.low = low

    def ticker(self) -> Ticker:
        """Return what is known now."""
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
            change=change if self.stated_change is None else self.stated_change,
            change_pct=pct if self.stated_pct is None else self.stated_pct,
            source_ts=self.source_ms or None,
        )


_PERCENT = Decimal("0.0001")
_HUNDRED = Decimal(100)

_add = DECIMALS.add
