"""The tables of the file, and the queries that read users' data from them."""

from __future__ import annotations

from collections.abc import Mapping

from trading_push.settings.sources import Query
from trading_push.sources.paper.engine import CURRENCY

__all__ = ["APPLICATION_ID", "PAPER_QUERIES", "SCHEMA", "SCHEMA_VERSION"]

APPLICATION_ID = 0x54507831
SCHEMA_VERSION = 1

SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE state (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE accounts (
    user_id TEXT PRIMARY KEY, currency TEXT NOT NULL, deposits TEXT NOT NULL, cash TEXT NOT NULL,
    free TEXT NOT NULL, locked TEXT NOT NULL, realized TEXT NOT NULL, unrealized TEXT NOT NULL,
    fees TEXT NOT NULL, total TEXT NOT NULL, by_symbol TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE positions (
    user_id TEXT NOT NULL, symbol TEXT NOT NULL, side TEXT, quantity TEXT NOT NULL,
    cost TEXT NOT NULL, entry_price TEXT, mark_price TEXT, unrealized_pnl TEXT NOT NULL,
    realized TEXT NOT NULL, fees TEXT NOT NULL, PRIMARY KEY (user_id, symbol)
) WITHOUT ROWID;
CREATE TABLE orders (
    order_id INTEGER PRIMARY KEY, user_id TEXT NOT NULL, symbol TEXT NOT NULL, side TEXT NOT NULL,
    type TEXT NOT NULL, price TEXT, quantity TEXT NOT NULL, filled TEXT NOT NULL,
    status TEXT NOT NULL, created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL,
    unit_lock TEXT NOT NULL
);
CREATE INDEX orders_of_user ON orders (user_id);
CREATE TABLE fills (
    fill_id INTEGER PRIMARY KEY, user_id TEXT NOT NULL, order_id INTEGER NOT NULL,
    symbol TEXT NOT NULL, side TEXT NOT NULL, price TEXT NOT NULL, quantity TEXT NOT NULL,
    fee TEXT NOT NULL, fee_asset TEXT NOT NULL, at INTEGER NOT NULL
);
CREATE TABLE tickers (
    symbol TEXT PRIMARY KEY, last TEXT, bid TEXT, ask TEXT, open TEXT, high TEXT, low TEXT,
    volume TEXT, change TEXT, change_pct TEXT, source_ts INTEGER
) WITHOUT ROWID;
"""

_NO_PNL = (
    '{"realized":"0","unrealized":"0","fees":"0","total":"0",'
    f'"currency":"{CURRENCY}","by_symbol":[]}}'
)

PAPER_QUERIES: Mapping[str, Query] = {
    "balance": Query(
        "SELECT user_id, currency AS asset, free, locked, cash AS total FROM accounts "
        "WHERE user_id IN :user_ids"
    ),
    "positions": Query(
        "SELECT user_id, symbol, side, quantity, entry_price, mark_price, unrealized_pnl "
        "FROM positions WHERE user_id IN :user_ids AND side IS NOT NULL ORDER BY symbol"
    ),
    "pnl": Query(
        "SELECT user_id, realized, unrealized, fees, total, currency, by_symbol FROM accounts "
        "WHERE user_id IN :user_ids",
        single=True,
        json_columns=("by_symbol",),
        empty=_NO_PNL,
    ),
    "orders": Query(
        "SELECT user_id, CAST(order_id AS TEXT) AS order_id, symbol, side, type, price, quantity, "
        "filled, status, created_at, updated_at FROM orders WHERE user_id IN :user_ids "
        "ORDER BY orders.order_id"
    ),
}
"""The queries by which an `SqlSource` reads the file of a paper exchange."""
