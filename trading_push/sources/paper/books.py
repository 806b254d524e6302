"""The books: load the accounts and the tickers from the file, and write what changed in them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from decimal import Decimal, localcontext
from typing import Any

import attrs

from trading_push.models import Fill, Ticker, plain_decimal
from trading_push.sources.paper.engine import (
    CURRENCY,
    EXACT,
    ZERO,
    Account,
    Holding,
    MatchingEngine,
    OpenOrder,
)

__all__ = ["Books", "last_prices", "plain", "read_tickers"]

MARK_S = 1.0
"""How often, at most, positions are valued at new prices."""
FILLS_KEPT = 1000
"""How many fills, the newest, stay in the file."""

_TICKER = ", ".join(field.name for field in attrs.fields(Ticker))
_Row = tuple[str | int | None, ...]


def plain(value: Decimal) -> str:
    """Write a decimal in plain notation, as short as possible."""
    return plain_decimal(value.normalize(EXACT)) if value else "0"


def last_prices(tickers: Mapping[str, Ticker]) -> dict[str, Decimal]:
    """Return the last prices by symbol, of the symbols that have one."""
    return {symbol: ticker.last for symbol, ticker in tickers.items() if ticker.last is not None}


def read_tickers(connection: sqlite3.Connection) -> dict[str, Ticker]:
    """Read the tickers that were kept, by symbol."""
    tickers = {}
    for symbol, *texts, source_ts in connection.execute(f"SELECT {_TICKER} FROM tickers"):
        fields: list[Any] = [symbol, *map(_decimal, texts), source_ts]
        tickers[symbol] = Ticker(*fields)
    return tickers


class Books:
    """The file as its one writer has it. Not for several threads at the same time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        # The prices that positions are valued at, and when that was last done, in ms.
        self._marks: dict[str, Decimal] = {}
        self._marked_at = 0
        # The tickers that are not in the file yet.
        self._unwritten: dict[str, Ticker] = {}
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")

    def load(self) -> tuple[MatchingEngine, dict[str, Ticker]]:
        """Read the accounts and the tickers as they were kept."""
        query = self._connection.execute
        # The accounts, and what they hold, by the same names as in `schema`.
        ((next_number,),) = query("SELECT value FROM state WHERE name = 'next_number'")
        accounts = {}
        for user, *amounts in query("SELECT user_id, deposits, cash, realized, fees FROM accounts"):
            deposits, cash, realized, fees = map(Decimal, amounts)
            accounts[user] = Account(user, deposits, cash, realized, fees)
        for user, symbol, side, quantity, *amounts in query(
            "SELECT user_id, symbol, side, quantity, cost, realized, fees FROM positions"
        ):
            signed = Decimal(f"-{quantity}" if side == "short" else quantity)
            accounts[user].holdings[symbol] = Holding(signed, *map(Decimal, amounts))
        for number, user, symbol, side, price, *amounts, created_at, updated_at in query(
            "SELECT order_id, user_id, symbol, side, price, quantity, unit_lock, filled, "
            "created_at, updated_at FROM orders ORDER BY order_id"
        ):
            quantity, unit_lock, filled = map(Decimal, amounts)
            accounts[user].orders[number] = OpenOrder(
                number=number,
                user=user,
                symbol=symbol,
                side=side,
                price=_decimal(price),
                quantity=quantity,
                created_at=created_at,
                updated_at=updated_at,
                unit_lock=unit_lock,
                filled=filled,
                resting=True,
            )
        tickers = read_tickers(self._connection)
        self._marks = last_prices(tickers)
        return MatchingEngine(int(next_number), accounts), tickers

    def save(self, engine: MatchingEngine, tickers: Iterable[Ticker], now: int) -> None:
        """Write what changed, and new marks once a second, in one transaction.

        Raises:
            sqlite3.Error: Nothing was written; the next call writes this as well.
        """
        self._unwritten |= {ticker.symbol: ticker for ticker in tickers}
        self._mark(engine, now)
        # The bound on fills holds in memory too, where the file cannot be written for long.
        del engine.fills[:-FILLS_KEPT]
        with _transaction(self._connection):
            self._write(engine)
        engine.forget_changes()
        self._unwritten = {}

    def _mark(self, engine: MatchingEngine, now: int) -> None:
        """Take over the new prices, if it is time, and note whose positions they change."""
        # Also when the clock was set back, or no mark would come until it is where it was.
        due = not 0 <= now - self._marked_at < MARK_S * 1000
        if due:
            self._marked_at = now
        marked = {
            symbol: last
            for symbol, last in last_prices(self._unwritten).items()
            if symbol not in self._marks or (due and self._marks[symbol] != last)
        }
        self._marks |= marked
        for account in engine.accounts.values():
            held = {symbol for symbol, each in account.holdings.items() if each.quantity}
            if held & marked.keys():
                engine.changed_users.add(account.user)

    def _write(self, engine: MatchingEngine) -> None:
        write = self._connection.executemany
        for user in engine.changed_users:
            self._write_account(engine.accounts[user])
        orders = engine.changed_orders.items()
        write(
            "REPLACE INTO orders VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [_order_row(order) for _, order in orders if order is not None],
        )
        write(
            "DELETE FROM orders WHERE order_id = ?",
            [(number,) for number, order in orders if order is None],
        )
        if engine.fills:
            write(
                "INSERT INTO fills VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [_fill_row(user, fill) for user, fill in engine.fills],
            )
            # Counted, since the numbers have gaps: orders are numbered along with fills.
            write(
                "DELETE FROM fills WHERE fill_id <= (SELECT fill_id FROM fills "
                "ORDER BY fill_id DESC LIMIT 1 OFFSET ?)",
                [(FILLS_KEPT,)],
            )
        write(
            f"REPLACE INTO tickers ({_TICKER}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            map(_ticker_row, self._unwritten.values()),
        )
        write("REPLACE INTO state VALUES ('next_number', ?)", [(str(engine.next_number),)])

    def _write_account(self, account: Account) -> None:
        # Its positions, and their sum, at the marks.
        unrealized = ZERO
        by_symbol, positions = [], []
        for symbol, holding in sorted(account.holdings.items()):
            mark = self._marks.get(symbol)
            gain = holding.unrealized(mark)
            unrealized = EXACT.add(unrealized, gain)
            by_symbol.append(
                {
                    "symbol": symbol,
                    "realized": plain(holding.realized),
                    "unrealized": plain(gain),
                    "fees": plain(holding.fees),
                }
            )
            positions.append(_position_row(account.user, symbol, holding, mark, gain))
        with localcontext(EXACT):
            total = account.realized + unrealized - account.fees
        amounts = (
            account.deposits,
            account.cash,
            account.free,
            account.locked,
            account.realized,
            unrealized,
            account.fees,
            total,
        )
        self._connection.execute(
            "REPLACE INTO accounts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                account.user,
                CURRENCY,
                *map(plain, amounts),
                json.dumps(by_symbol, separators=(",", ":")),
            ),
        )
        self._connection.executemany(
            "REPLACE INTO positions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", positions
        )


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        # This fails where the error has rolled back already.
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _text(value: Decimal | None) -> str | None:
    """Write a decimal of the market in plain notation, with all the digits that it came with."""
    return None if value is None else plain_decimal(value)


def _decimal(text: str | None) -> Decimal | None:
    return None if text is None else Decimal(text)


def _position_row(
    user: str, symbol: str, holding: Holding, mark: Decimal | None, gain: Decimal
) -> _Row:
    entry = holding.entry_price
    return (
        user,
        symbol,
        holding.side,
        plain(abs(holding.quantity)),
        plain(holding.cost),
        None if entry is None else plain(entry),
        _text(mark),
        plain(gain),
        plain(holding.realized),
        plain(holding.fees),
    )


def _order_row(order: OpenOrder) -> _Row:
    return (
        order.number,
        order.user,
        order.symbol,
        order.side,
        "market" if order.price is None else "limit",
        _text(order.price),
        _text(order.quantity),
        plain(order.filled),
        "partially_filled" if order.filled else "new",
        order.created_at,
        order.updated_at,
        plain(order.unit_lock),
    )


def _fill_row(user: str, fill: Fill) -> _Row:
    return (
        int(fill.fill_id),
        user,
        int(fill.order_id),
        fill.symbol,
        fill.side,
        _text(fill.price),
        _text(fill.quantity),
        plain(fill.fee),
        fill.fee_asset,
        fill.at,
    )


def _ticker_row(ticker: Ticker) -> _Row:
    symbol, *amounts, source_ts = attrs.astuple(ticker)
    return (symbol, *map(_text, amounts), source_ts)
