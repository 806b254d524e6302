"""The shapes of the payloads (balance, positions, PnL, orders, fills, tickers), and of their parts.

Frozen attrs classes. Prices, quantities and amounts are `decimal.Decimal`, which `plain_decimal`
writes on the wire; times are integer milliseconds since the epoch, UTC, which `milliseconds` and
`now_ms` give. The classes have no slots because msgspec writes the fields of an attrs class in the
order of its `__dict__`, which slots would lose.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Final, Literal

import attrs

__all__ = [
    "Balance",
    "Candle",
    "Fill",
    "Order",
    "Pnl",
    "Position",
    "SymbolPnl",
    "Ticker",
    "milliseconds",
    "now_ms",
    "plain_decimal",
]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)


def plain_decimal(value: Decimal) -> str:
    """Write a decimal in plain notation, with all of its digits.

    Raises:
        ValueError: It is not finite.
    """
    if not value.is_finite():
        raise ValueError(f"{value} is not a finite number")
    return format(value, "f")


def milliseconds(moment: datetime) -> int:
    """Convert a time to milliseconds since the epoch, rounded down; without a zone it is UTC.

    It counts in integers, because a float of seconds would round the last digit.
    """
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return (aware - _EPOCH) // _MILLISECOND


def now_ms() -> int:
    """Read the clock, in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


@attrs.frozen(slots=False)
class Balance:
    """One asset of an account, in units of that asset; `total` is `free` + `locked`."""

    asset: str
    free: Decimal
    locked: Decimal
    total: Decimal


@attrs.frozen(slots=False)
class Position:
    """One open position; `quantity` is positive on both sides, prices in the quote currency."""

    symbol: str
    side: Literal["long", "short"]
    quantity: Decimal
    entry_price: Decimal
    mark_price: Decimal
    unrealized_pnl: Decimal


@attrs.frozen(slots=False)
class SymbolPnl:
    """Profit and loss of one symbol, in the account's currency; `fees` is what was paid."""

    symbol: str
    realized: Decimal
    unrealized: Decimal
    fees: Decimal


@attrs.frozen(slots=False)
class Pnl:
    """Profit and loss of an account in `currency`; `total` is realized + unrealized - fees."""

    realized: Decimal
    unrealized: Decimal
    fees: Decimal
    total: Decimal
    currency: str
    by_symbol: tuple[SymbolPnl, ...] = ()


@attrs.frozen(slots=False)
class Order:
    """One open order; `price` is null for a market order, `filled` is in units of `quantity`."""

    order_id: str
    symbol: str
    side: Literal["buy", "sell"]
    type: Literal["limit", "market"]
    price: Decimal | None
    quantity: Decimal
    filled: Decimal
    status: Literal["new", "partially_filled"]
    created_at: int
    updated_at: int


@attrs.frozen(slots=False)
class Fill:
    """One execution; `at` is its time, `fee` is in units of `fee_asset`."""

    fill_id: str
    order_id: str
    symbol: str
    side: Literal["buy", "sell"]
    price: Decimal
    quantity: Decimal
    fee: Decimal
    fee_asset: str
    at: int


@attrs.frozen
class Candle:
    """The prices of one symbol over some time that begins at `at`, in ms since the epoch.

    `volume` is what was traded in it, in units of the symbol; None where the source cannot tell.
    """

    at: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal | None = None


@attrs.frozen(slots=False)
class Ticker:
    """The prices of one symbol; what its source does not know is None (null on the wire).

    `open`, `high`, `low`, `volume` and `change` (last - open; `change_pct` in percent of open)
    cover the window that the source knows; `source_ts` is the source's own time.
    """

    symbol: str
    last: Decimal | None = None
    bid: Decimal | None = None
    ask: Decimal | None = None
    open: Decimal | None = None
    high: Decimal | None = None
    low: Decimal | None = None
    volume: Decimal | None = None
    change: Decimal | None = None
    change_pct: Decimal | None = None
    source_ts: int | None = None
