"""Accounts for the workloads with users' data: two rows each of balance, positions and orders.

Every value changes with every reading: in memory by a counter, in a database by `random()`, so that
nothing has to write while the reading is measured.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import sqlalchemy

from trading_push import SqlSource
from trading_push.settings.sources import Query

DATA_TYPES = ("balance", "positions", "pnl", "orders")
_SYMBOLS = ("BTCUSDT", "ETHUSDT")
_count = itertools.count(100_000)


def value(data_type: str, user: str) -> Any:
    """A user's value, another one each time."""
    amount = f"{next(_count)}.50"
    match data_type:
        case "balance":
            return [
                {"asset": asset, "free": amount, "locked": "250.00", "total": amount}
                for asset in ("USDT", "BTC")
            ]
        case "positions":
            return [
                {
                    "symbol": symbol,
                    "side": "long",
                    "quantity": "0.25",
                    "entry_price": "61837.63",
                    "mark_price": amount,
                    "unrealized_pnl": "12.75",
                }
                for symbol in _SYMBOLS
            ]
        case "pnl":
            by_symbol = [
                {"symbol": symbol, "realized": "12.75", "unrealized": amount, "fees": "1.25"}
                for symbol in _SYMBOLS
            ]
            return {
                "realized": "25.50",
                "unrealized": amount,
                "fees": "2.50",
                "total": amount,
                "currency": "USDT",
                "by_symbol": by_symbol,
            }
        case _:
            return [
                {
                    "order_id": f"{user}-{number}",
                    "symbol": "BTCUSDT",
                    "side": "buy",
                    "type": "limit",
                    "price": "61000.00",
                    "quantity": "0.10",
                    "filled": amount,
                    "status": "partially_filled",
                    "created_at": 1763600000123,
                    "updated_at": 1763600000456,
                }
                for number in range(2)
            ]


class MemorySource:
    """Answers for many users at once, from memory."""

    async def fetch(self, user_id: str, data_type: str) -> Any:
        return value(data_type, user_id)

    async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any]:
        return {user: value(data_type, user) for user in user_ids}


_CHANGING = "(100000 + abs(random()) % 900000) || '.50'"
_QUERIES = {
    "balance": Query(
        f"SELECT user_id, asset, {_CHANGING} AS free, locked, total FROM balances "
        "WHERE user_id IN :user_ids"
    ),
    "positions": Query(
        f"SELECT user_id, symbol, side, quantity, entry_price, {_CHANGING} AS mark_price, "
        "unrealized_pnl FROM positions WHERE user_id IN :user_ids"
    ),
    "pnl": Query(
        f"SELECT user_id, realized, {_CHANGING} AS unrealized, fees, total, currency, by_symbol "
        "FROM pnl WHERE user_id IN :user_ids",
        single=True,
        json_columns=("by_symbol",),
    ),
    "orders": Query(
        f"SELECT user_id, order_id, symbol, side, type, price, quantity, {_CHANGING} AS filled, "
        "status, created_at, updated_at FROM orders WHERE user_id IN :user_ids"
    ),
}
_SCHEMA = """\
CREATE TABLE balances (user_id TEXT, asset TEXT, locked TEXT, total TEXT);
CREATE TABLE positions (user_id TEXT, symbol TEXT, side TEXT, quantity TEXT, entry_price TEXT,
                        unrealized_pnl TEXT);
CREATE TABLE pnl (user_id TEXT, realized TEXT, fees TEXT, total TEXT, currency TEXT,
                  by_symbol TEXT);
CREATE TABLE orders (user_id TEXT, order_id TEXT, symbol TEXT, side TEXT, type TEXT, price TEXT,
                     quantity TEXT, status TEXT, created_at BIGINT, updated_at BIGINT);
"""
_BY_SYMBOL = (
    '[{"symbol":"BTCUSDT","realized":"12.75","unrealized":"61837.63","fees":"1.25"},'
    '{"symbol":"ETHUSDT","realized":"12.75","unrealized":"61837.63","fees":"1.25"}]'
)


def sqlite_source(path: Path, users: int) -> SqlSource:
    """A file of so many accounts, indexed by user, and the source that reads it."""
    connection = sqlite3.connect(path)
    with connection:

        def insert(table: str, rows: list[tuple[Any, ...]]) -> None:
            marks = ",".join("?" * len(rows[0]))
            connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)

        fill(connection.execute, insert, users)
    connection.close()
    return SqlSource(f"sqlite:///{path}", _QUERIES)


def postgres_source(url: str, users: int) -> SqlSource:
    """The same in a database of PostgreSQL, whose tables of these names are replaced."""
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:

        def insert(table: str, rows: list[tuple[Any, ...]]) -> None:
            marks = ",".join(["%s"] * len(rows[0]))
            with connection.connection.cursor() as cursor:  # psycopg's own, which is fast at it
                cursor.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)

        fill(connection.exec_driver_sql, insert, users)
    engine.dispose()
    changing = "(100000 + floor(random() * 900000))::int || '.50'"
    return SqlSource(
        url,
        {
            name: attrs.evolve(query, sql=query.sql.replace(_CHANGING, changing))
            for name, query in _QUERIES.items()
        },
    )


def fill(
    execute: Callable[[str], Any],
    insert: Callable[[str, list[tuple[Any, ...]]], None],
    users: int,
) -> None:
    ids = [str(user) for user in range(users)]
    for statement in _SCHEMA.split(";")[:-1]:
        execute(f"DROP TABLE IF EXISTS {statement.split()[2]}")
        execute(statement)
    insert("balances", [(i, a, "250.00", "900.00") for i in ids for a in "UB"])
    insert(
        "positions", [(i, s, "long", "0.25", "61837.63", "12.75") for i in ids for s in _SYMBOLS]
    )
    insert("pnl", [(i, "25.50", "2.50", "900.00", "USDT", _BY_SYMBOL) for i in ids])
    order = ("BTCUSDT", "buy", "limit", "61000.00", "0.10", "new", 1763600000123, 1763600000456)
    insert("orders", [(i, f"{i}-{n}", *order) for i in ids for n in range(2)])
    for table in ("balances", "positions", "pnl", "orders"):
        execute(f"CREATE INDEX {table}_user ON {table} (user_id)")
