"""The shapes of the payloads: balance, positions, PnL, orders, fills and tickers.

Frozen attrs classes; prices, quantities and amounts are `decimal.Decimal` (decimal strings in plain
notation on the wire), times are integer milliseconds since the epoch, UTC. They have no slots
because JSON names the fields in the order of `__dict__`, which slots would lose.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

import attrs

__all__ = ["Balance", "Fill", "Order", "Pnl", "Position", "SymbolPnl", "Ticker"]


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


@attrs.frozen(slots=False)
class Ticker:
    """The market of one symbol; what its source does not know is None (null on the wire).

    `open`, `high`, `low`, `volume` and `change` (last - open; `change_pct` in percent of open) are
    over the window that the source knows; `source_ts` is the source's own time.
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
