"""What ccxt answers, as the payloads of the channels.

What the exchange does not tell is null: nothing is computed that only the exchange can know. A
symbol is base and quote (`BTCUSDT`) for spot and linear perpetual contracts, and ccxt's own
(`BTC/USD:BTC`) for others.

Each function raises AttributeError, KeyError, TypeError or ValueError for what it cannot read.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from trading_push.sources.ccxt.exchange import as_decimal

__all__ = ["UNREADABLE", "balance", "fill", "order", "pnl", "position", "short_symbol"]

UNREADABLE = (AttributeError, KeyError, TypeError, ValueError)


def short_symbol(market: Mapping[str, Any]) -> str:
    """Return a market's symbol as clients name it."""
    if market.get("spot") or (market.get("swap") and market.get("linear")):
        return f"{market['base']}{market['quote']}".upper()
    return str(market["symbol"]).upper()


def _symbol(symbol: str, api: Any) -> str:
    market = api.markets.get(symbol)
    return symbol if market is None else short_symbol(market)


def balance(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Convert a balance; assets of which there is nothing are left out."""
    free, used, total = answer["free"], answer["used"], answer["total"]
    rows = [
        {
            "asset": asset,
            "free": as_decimal(free.get(asset)),
            "locked": as_decimal(used.get(asset)),
            "total": as_decimal(total.get(asset)),
        }
        for asset in sorted({*free, *used, *total})
    ]
    return [row for row in rows if row["free"] or row["locked"] or row["total"]]


def position(given: Mapping[str, Any], api: Any) -> dict[str, Any]:
    """Convert a position, from contracts to units of the base."""
    contracts, size = as_decimal(given["contracts"]), as_decimal(given.get("contractSize"))
    return {
        "symbol": _symbol(given["symbol"], api),
        "side": given.get("side"),
        "quantity": None if contracts is None or size is None else abs(contracts * size),
        "entry_price": as_decimal(given.get("entryPrice")),
        "mark_price": as_decimal(given.get("markPrice")),
        "unrealized_pnl": as_decimal(given.get("unrealizedPnl")),
    }


def pnl(positions: list[Mapping[str, Any]], api: Any) -> dict[str, Any]:
    """Convert the PnL that positions have."""
    by_symbol = [
        {
            "symbol": _symbol(each["symbol"], api),
            "realized": as_decimal(each.get("realizedPnl")),
            "unrealized": as_decimal(each.get("unrealizedPnl")),
            "fees": None,
        }
        for each in positions
    ]
    currencies = {api.markets.get(each["symbol"], {}).get("settle") for each in positions}
    currency = currencies.pop() if len(currencies) == 1 else None
    amounts = [row["unrealized"] for row in by_symbol]
    known = [each for each in amounts if each is not None]
    # There is no sum of several currencies, nor of amounts that are not known.
    summed = len(known) == len(amounts) and (currency is not None or not amounts)
    return {
        "realized": None,
        "unrealized": sum(known, Decimal(0)) if summed else None,
        "fees": None,
        "total": None,
        "currency": currency,
        "by_symbol": by_symbol,
    }


def order(given: Mapping[str, Any], api: Any) -> dict[str, Any]:
    """Convert an open order."""
    filled = as_decimal(given.get("filled"))
    return {
        "order_id": given["id"],
        "symbol": _symbol(given["symbol"], api),
        "side": given.get("side"),
        "type": given.get("type"),
        "price": as_decimal(given.get("price")),
        "quantity": as_decimal(given.get("amount")),
        "filled": filled,
        "status": "partially_filled" if filled else "new",
        "created_at": given.get("timestamp"),
        "updated_at": given.get("lastUpdateTimestamp") or given.get("lastTradeTimestamp"),
    }


def _text(value: object) -> str:
    if value is None:
        raise ValueError("there is none")
    return str(value)


def fill(given: Mapping[str, Any], api: Any) -> dict[str, Any]:
    """Convert a fill.

    Raises:
        ValueError: It has no id, without which it cannot be told from others.
    """
    fee = given.get("fee") or {}
    return {
        "fill_id": _text(given["id"]),
        "order_id": given.get("order"),
        "symbol": _symbol(given["symbol"], api),
        "side": given.get("side"),
        "price": as_decimal(given.get("price")),
        "quantity": as_decimal(given.get("amount")),
        "fee": as_decimal(fee.get("cost")),
        "fee_asset": fee.get("currency"),
        "at": int(given["timestamp"]),
    }
