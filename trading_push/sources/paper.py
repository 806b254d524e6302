"""The paper exchange: demo users whose orders fill against a market, kept in an SQLite file.

The law, to the last decimal, for every user and after every committed transaction::

    deposits = cash + cost of open positions - realized PnL + fees

1. Cost is kept as a signed total (a short's is negative), not as an average; a partial close takes
   a quantized share of it, and what rounding left stays in the cost.
2. All arithmetic is exact: a result that would have to be rounded is an error (EXACT traps it),
   but for the two amounts that are defined by rounding, that share and a fee.
3. The `Book` trades in memory, without I/O; the `_Ledger` writes everything that one step changed
   in one transaction, so that a kill at any moment leaves a file that obeys the law.
4. Decimals are TEXT in plain notation, computed here; SQL does no arithmetic.
5. One process trades on a file (a lock beside it says which); another one only reads.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import sqlite3
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from decimal import (
    ROUND_DOWN,
    ROUND_HALF_EVEN,
    ROUND_UP,
    Context,
    Decimal,
    DivisionByZero,
    Inexact,
    InvalidOperation,
    Overflow,
    localcontext,
)
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import attrs
import trio

from trading_push import logs
from trading_push.errors import ConfigurationError, SourceError
from trading_push.models import Fill, Ticker
from trading_push.settings import Query
from trading_push.sources.base import MarketSink, TickerFeed

__all__ = [
    "PAPER_QUERIES",
    "Account",
    "Book",
    "OrderRefused",
    "PaperExchange",
    "check_law",
    "open_paper_exchange",
]

CURRENCY = "USDT"
DEMO_USERS = ("1", "2", "3", "4", "5")
DEPOSIT = Decimal(100_000)

STEP_S = 0.25
MARK_S = 1.0
"""Positions follow the market at most this often."""
STALE_S = 10.0
"""A reader says that the market stands still when the file has not changed for so long."""
BUSY_TIMEOUT_S = 5.0
FILLS_KEPT = 1000
"""How many of the newest fills stay in the file."""

TAKER_FEE = Decimal("0.0005")
MAKER_FEE = Decimal("0.0002")
QUANTUM = Decimal("0.00000001")
"""What a fee, and the share of the cost that a partial close takes, is rounded to."""
MARKET_MARGIN = Decimal("1.05")
"""A market order locks this much of its value at the last price."""

_ZERO = Decimal(0)
_ERRORS = [DivisionByZero, InvalidOperation, Overflow]
EXACT = Context(prec=100, traps=[Inexact, *_ERRORS])
_ROUNDING = Context(prec=100, traps=_ERRORS)

OrderSide = Literal["buy", "sell"]
OrderType = Literal["limit", "market"]


# ---- the book: accounts, orders and their fills, without I/O


class OrderRefused(ValueError):
    """An order that the account cannot carry, or whose numbers make no sense."""


@attrs.define
class OpenOrder:
    """A resting order; `unit_lock` is what each unit left of it locks, fee included."""

    number: int
    user: str
    symbol: str
    side: OrderSide
    type: OrderType
    price: Decimal | None
    quantity: Decimal
    created_at: int
    updated_at: int
    unit_lock: Decimal
    filled: Decimal = _ZERO
    resting: bool = False
    """Whether the market has met it before: from then on it is filled at its own price."""

    @property
    def left(self) -> Decimal:
        return EXACT.subtract(self.quantity, self.filled)

    @property
    def locked(self) -> Decimal:
        return EXACT.multiply(self.left, self.unit_lock)


@attrs.define
class Holding:
    """What an account has of one symbol: signed quantity and signed total cost, both exact."""

    quantity: Decimal = _ZERO
    cost: Decimal = _ZERO
    realized: Decimal = _ZERO
    fees: Decimal = _ZERO


@attrs.define
class Account:
    """One user's account, in one currency."""

    user: str
    deposits: Decimal = _ZERO
    cash: Decimal = _ZERO
    realized: Decimal = _ZERO
    fees: Decimal = _ZERO
    holdings: dict[str, Holding] = attrs.field(factory=dict)
    orders: dict[int, OpenOrder] = attrs.field(factory=dict)

    @property
    def locked(self) -> Decimal:
        """What the open orders hold back of the cash."""
        with localcontext(EXACT):
            return sum((order.locked for order in self.orders.values()), _ZERO)

    @property
    def free(self) -> Decimal:
        return EXACT.subtract(self.cash, self.locked)

    def imbalance(self) -> Decimal:
        """By how much the law is broken: zero, always."""
        with localcontext(EXACT):
            cost = sum((holding.cost for holding in self.holdings.values()), _ZERO)
            return self.deposits - (self.cash + cost - self.realized + self.fees)

    def execute(self, symbol: str, signed: Decimal, price: Decimal, fee: Decimal) -> None:
        """Buy (`signed` above zero) or sell at `price`; closes first, then opens what is left."""
        holding = self.holdings.setdefault(symbol, Holding())
        with localcontext(EXACT):
            held = holding.quantity
            closing = _ZERO
            if held and (held > 0) != (signed > 0):
                closing = signed if abs(signed) <= abs(held) else -held
                share = holding.cost
                if closing != -held:
                    share = _share(holding.cost, abs(closing), abs(held))
                profit = -closing * price - share
                holding.cost -= share
                holding.realized += profit
                self.realized += profit
            holding.cost += (signed - closing) * price
            holding.quantity = held + signed
            holding.fees += fee
            self.fees += fee
            self.cash -= signed * price + fee


def _positive(value: Decimal) -> bool:
    return value.is_finite() and value > 0


def _share(total: Decimal, part: Decimal, whole: Decimal) -> Decimal:
    exact = _ROUNDING.divide(_ROUNDING.multiply(total, part), whole)
    return exact.quantize(QUANTUM, ROUND_HALF_EVEN, _ROUNDING)


class Book:
    """Accounts and their open orders; fills them as the market moves. Not for several threads.

    Times (`now`) are ms since the epoch. What changed since the last `take_changes` is noted.

    Args:
        next_number: The number of the next order or fill.
    """

    def __init__(self, next_number: int = 1) -> None:
        self.accounts: dict[str, Account] = {}
        self.next_number = next_number
        self.changed_users: set[str] = set()
        self.changed_orders: dict[int, OpenOrder | None] = {}
        """By number; None for an order that is no longer open."""
        self.fills: list[tuple[str, Fill]] = []
        """The new fills, with their users."""
        self._by_symbol: dict[str, dict[int, OpenOrder]] = {}

    def deposit(self, user: str, amount: Decimal) -> None:
        """Pay in; the account is opened by its first deposit."""
        account = self.accounts.setdefault(user, Account(user))
        account.deposits = EXACT.add(account.deposits, amount)
        account.cash = EXACT.add(account.cash, amount)
        self.changed_users.add(user)

    def restore(self, account: Account) -> None:
        """Take an account, with its orders, as it was kept."""
        self.accounts[account.user] = account
        for order in account.orders.values():
            self._by_symbol.setdefault(order.symbol, {})[order.number] = order

    def place(
        self,
        user: str,
        symbol: str,
        side: OrderSide,
        quantity: Decimal,
        now: int,
        *,
        limit: Decimal | None = None,
        last: Decimal | None = None,
    ) -> OpenOrder:
        """Place a limit order (`limit`) or a market order (by the `last` price it is secured).

        It is filled when the market moves next, as far as the market's size goes.

        Raises:
            OrderRefused: Nothing was placed.
        """
        account = self.accounts.get(user)
        price = limit if limit is not None else last
        if account is None or price is None or not (_positive(quantity) and _positive(price)):
            raise OrderRefused("an order needs an account, a quantity and a price above zero")
        unit = price if limit is not None else EXACT.multiply(price, MARKET_MARGIN)
        order = OpenOrder(
            number=self.next_number,
            user=user,
            symbol=symbol,
            side=side,
            type="market" if limit is None else "limit",
            price=limit,
            quantity=quantity,
            created_at=now,
            updated_at=now,
            unit_lock=EXACT.multiply(unit, EXACT.add(1, TAKER_FEE)),
        )
        if order.locked > account.free:
            raise OrderRefused(f"user {user} has not enough free {CURRENCY} for that order")
        self.next_number += 1
        account.orders[order.number] = order
        self._by_symbol.setdefault(symbol, {})[order.number] = order
        self._note(order)
        return order

    def cancel(self, number: int, user: str) -> bool:
        """Cancel what is left of an order; False where the user has none of that number open."""
        account = self.accounts.get(user)
        order = account.orders.get(number) if account else None
        if order is None:
            return False
        self._close(order)
        return True

    def on_price(
        self,
        symbol: str,
        bid: Decimal,
        ask: Decimal,
        *,
        bid_size: Decimal,
        ask_size: Decimal,
        now: int,
    ) -> list[Fill]:
        """Fill the symbol's orders, the oldest first, up to the sizes at bid and ask.

        An order that meets its market at once pays the market's price and the taker's fee; one that
        rested before is filled at its own price and pays the maker's.
        """
        sizes: dict[OrderSide, Decimal] = {"buy": ask_size, "sell": bid_size}
        fills = []
        for order in list(self._by_symbol.get(symbol, {}).values()):
            touch = ask if order.side == "buy" else bid
            if order.price is None:
                meets = True
            else:
                meets = order.price >= touch if order.side == "buy" else order.price <= touch
            quantity = min(order.left, sizes[order.side])
            if meets and quantity > 0:
                sizes[order.side] = EXACT.subtract(sizes[order.side], quantity)
                maker = order.resting and order.price is not None
                price = order.price if maker and order.price is not None else touch
                fills.append(self._fill(order, quantity, price, maker=maker, now=now))
            order.resting = True
        return fills

    def take_changes(self) -> tuple[set[str], dict[int, OpenOrder | None], list[tuple[str, Fill]]]:
        """What changed since the last call: users, orders by number, fills; and forget it."""
        changes = (self.changed_users, self.changed_orders, self.fills)
        self.changed_users, self.changed_orders, self.fills = set(), {}, []
        return changes

    def _fill(
        self, order: OpenOrder, quantity: Decimal, price: Decimal, *, maker: bool, now: int
    ) -> Fill:
        rate = MAKER_FEE if maker else TAKER_FEE
        value = EXACT.multiply(quantity, price)
        fee = EXACT.multiply(value, rate).quantize(QUANTUM, ROUND_UP, _ROUNDING)
        signed = quantity if order.side == "buy" else quantity.copy_negate()
        self.accounts[order.user].execute(order.symbol, signed, price, fee)
        order.filled = EXACT.add(order.filled, quantity)
        order.updated_at = now
        fill = Fill(
            fill_id=str(self.next_number),
            order_id=str(order.number),
            symbol=order.symbol,
            side=order.side,
            price=price,
            quantity=quantity,
            fee=fee,
            fee_asset=CURRENCY,
            at=now,
        )
        self.next_number += 1
        self.fills.append((order.user, fill))
        if order.left:
            self._note(order)
        else:
            self._close(order)
        return fill

    def _note(self, order: OpenOrder) -> None:
        self.changed_orders[order.number] = order
        self.changed_users.add(order.user)

    def _close(self, order: OpenOrder) -> None:
        del self.accounts[order.user].orders[order.number]
        del self._by_symbol[order.symbol][order.number]
        self.changed_orders[order.number] = None
        self.changed_users.add(order.user)


# ---- the demo users' trading


class _Traders:
    """Places and cancels the demo users' orders, and says how much the market takes; seeded."""

    ORDERS = 6
    """How many orders a user leaves open at most."""
    CAP = Decimal("0.15")
    """How much of the deposits one position may cost before the user only reduces it."""

    def __init__(self, book: Book, seed: int) -> None:
        self._book = book
        self._rng = random.Random(f"{seed}:{book.next_number}")
        self._tick_exponents: dict[str, int] = {}

    def step(self, markets: Mapping[str, Ticker], moved: Iterable[str], now: int) -> None:
        """One step of everybody: fill against the symbols that moved, then place and cancel."""
        for symbol in moved:
            ticker = markets[symbol]
            bid, ask = _touch(ticker)
            if symbol.endswith(CURRENCY) and _tradable(bid) and _tradable(ask):
                self._learn_tick(symbol, (bid, ask))
                self._book.on_price(
                    symbol,
                    bid,
                    ask,
                    bid_size=self._quantity(bid, 200, 3000),
                    ask_size=self._quantity(ask, 200, 3000),
                    now=now,
                )
        for account in self._book.accounts.values():
            if not account.orders or self._rng.random() < 0.15:
                self._act(account, markets, now)

    def _act(self, account: Account, markets: Mapping[str, Ticker], now: int) -> None:
        if account.free < account.deposits / 5:
            self._book.deposit(account.user, DEPOSIT)
        symbols = [symbol for symbol in self._tick_exponents if symbol in markets]
        if not symbols:
            return
        rng = self._rng
        orders = list(account.orders.values())
        if orders and (len(orders) >= self.ORDERS or rng.random() < 0.1):
            self._book.cancel(rng.choice(orders).number, account.user)
            return
        symbol = rng.choice(symbols)
        bid, ask = _touch(markets[symbol])
        side: OrderSide = rng.choice(("buy", "sell"))
        holding = account.holdings.get(symbol, Holding())
        if abs(holding.cost) > account.deposits * self.CAP:
            side = "sell" if holding.quantity > 0 else "buy"
        quantity = self._quantity(bid, 100, 4000)
        with suppress(OrderRefused):
            if rng.random() < 0.35:
                self._book.place(account.user, symbol, side, quantity, now, last=ask)
                return
            away = Decimal(rng.randint(0, 20)) / 10_000
            price = bid * (1 - away) if side == "buy" else ask * (1 + away)
            tick = Decimal(1).scaleb(self._tick_exponents[symbol])
            self._book.place(
                account.user,
                symbol,
                side,
                quantity,
                now,
                limit=price.quantize(tick, ROUND_DOWN if side == "buy" else ROUND_UP),
            )

    def _quantity(self, price: Decimal, low: int, high: int) -> Decimal:
        """A quantity worth about `low` to `high`, in lots of about a cent to ten cents."""
        lot = Decimal(1).scaleb(min(0, -price.adjusted() - 2))
        lots = Decimal(self._rng.randint(low, high)) / price / lot
        return max(lots.to_integral_value(), Decimal(1)) * lot

    def _learn_tick(self, symbol: str, prices: Iterable[Decimal]) -> None:
        for price in prices:
            exponent = price.normalize().as_tuple().exponent
            if isinstance(exponent, int):
                known = self._tick_exponents.get(symbol, 0)
                self._tick_exponents[symbol] = min(known, exponent)


def _touch(ticker: Ticker) -> tuple[Decimal, Decimal]:
    """Bid and ask; a tape of trades alone has neither, and the last price stands for both."""
    last = ticker.last or _ZERO
    return ticker.bid or last, ticker.ask or last


def _tradable(price: Decimal) -> bool:
    return price > 0 and -12 < price.adjusted() < 12 and len(price.as_tuple().digits) < 25


# ---- the file

APPLICATION_ID = 0x54507831
SCHEMA_VERSION = 1

_SCHEMA = """
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
"""The queries with which an `SqlSource` reads a paper exchange's file."""


def plain(value: Decimal) -> str:
    """A decimal in plain notation, as short as it goes."""
    return format(value.normalize(EXACT), "f") if value else "0"


def _text(value: Decimal | None) -> str | None:
    """A market's decimal in plain notation, with the digits that the market gave."""
    return None if value is None else format(value, "f")


def _decimal(text: str | None) -> Decimal | None:
    return None if text is None else Decimal(text)


def _connect(path: Path, mode: Literal["ro", "rw", "rwc"]) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{urllib.parse.quote(str(path))}?mode={mode}",
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        # Used by one worker thread at a time, but not always by the same.
        check_same_thread=False,
        isolation_level=None,
    )


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        # It fails where the error has rolled back already.
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _refuse_other_files(path: Path) -> bool:
    """See that the file is ours, without writing; whether it holds the exchange already.

    Raises:
        ConfigurationError: It is something else, or cannot be read.
    """
    hint = "give another path, or one where there is no file yet"
    try:
        if path.is_dir():
            raise ConfigurationError(f"{path} is a directory: give the path of a file")
        if not path.parent.is_dir():
            raise ConfigurationError(f"there is no directory {path.parent}: make it, or {hint}")
        if not path.exists() or path.stat().st_size == 0:
            return False
        with path.open("rb") as file:
            if file.read(16) != b"SQLite format 3\0":
                raise ConfigurationError(f"{path} is no SQLite database: {hint}")
        connection = _connect(path, "ro")
        try:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): {hint}") from None
    if application == APPLICATION_ID and version == SCHEMA_VERSION:
        return True
    if application == APPLICATION_ID:
        raise ConfigurationError(
            f"{path} was written by another version of the paper exchange: {hint}"
        )
    if application or version or tables:
        raise ConfigurationError(f"{path} is another program's database: {hint}")
    return False


def _lock(path: Path) -> int | None:
    """The descriptor that holds the file's lock; None where another process trades on it."""
    descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _read_tickers(connection: sqlite3.Connection) -> dict[str, Ticker]:
    rows = connection.execute(
        "SELECT symbol, last, bid, ask, open, high, low, volume, change, change_pct, source_ts "
        "FROM tickers"
    )
    tickers = {}
    for symbol, *amounts, source_ts in rows:
        last, bid, ask, open_, high, low, volume, change, change_pct = map(_decimal, amounts)
        tickers[symbol] = Ticker(
            symbol=symbol,
            last=last,
            bid=bid,
            ask=ask,
            open=open_,
            high=high,
            low=low,
            volume=volume,
            change=change,
            change_pct=change_pct,
            source_ts=source_ts,
        )
    return tickers


class _Ledger:
    """The file as its one writer has it: loads the book, and writes what changed in it."""

    def __init__(self, path: Path) -> None:
        self._connection = _connect(path, "rw")
        self._marks: dict[str, Decimal] = {}
        self._marked_at = 0
        self._unwritten_users: set[str] = set()
        self._unwritten_orders: dict[int, OpenOrder | None] = {}
        self._unwritten_fills: list[tuple[str, Fill]] = []
        self._unwritten_tickers: dict[str, Ticker] = {}
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def load(self) -> tuple[Book, dict[str, Ticker]]:
        """The book and the market as they were kept."""
        ask = self._connection.execute
        ((number,),) = ask("SELECT value FROM state WHERE name = 'next_number'")
        accounts = {}
        for user, *amounts in ask("SELECT user_id, deposits, cash, realized, fees FROM accounts"):
            deposits, cash, realized, fees = map(Decimal, amounts)
            accounts[user] = Account(user, deposits, cash, realized, fees)
        for user, symbol, side, quantity, *amounts in ask(
            "SELECT user_id, symbol, side, quantity, cost, realized, fees FROM positions"
        ):
            signed = Decimal(f"-{quantity}" if side == "short" else quantity)
            accounts[user].holdings[symbol] = Holding(signed, *map(Decimal, amounts))
        for row in ask(
            "SELECT order_id, user_id, symbol, side, type, price, quantity, created_at, "
            "updated_at, unit_lock, filled FROM orders ORDER BY order_id"
        ):
            order = OpenOrder(
                number=row[0],
                user=row[1],
                symbol=row[2],
                side=row[3],
                type=row[4],
                price=_decimal(row[5]),
                quantity=Decimal(row[6]),
                created_at=row[7],
                updated_at=row[8],
                unit_lock=Decimal(row[9]),
                filled=Decimal(row[10]),
                resting=True,
            )
            accounts[order.user].orders[order.number] = order
        book = Book(int(number))
        for account in accounts.values():
            book.restore(account)
        tickers = _read_tickers(self._connection)
        self._marks = {t.symbol: t.last for t in tickers.values() if t.last is not None}
        return book, tickers

    def save(self, book: Book, tickers: Iterable[Ticker], now: int) -> None:
        """Write what changed, and new marks once a second, in one transaction.

        Raises:
            sqlite3.Error: Nothing was written; the next call writes that too.
        """
        users, orders, fills = book.take_changes()
        self._unwritten_users |= users
        self._unwritten_orders |= orders
        # The bound on the fills holds here too, should the file refuse for long.
        self._unwritten_fills = [*self._unwritten_fills, *fills][-FILLS_KEPT:]
        self._unwritten_tickers |= {ticker.symbol: ticker for ticker in tickers}
        self._mark(book, now)
        with _transaction(self._connection):
            self._write(
                book,
                self._unwritten_users,
                self._unwritten_orders,
                self._unwritten_fills,
                self._unwritten_tickers,
            )
        self._unwritten_users, self._unwritten_orders = set(), {}
        self._unwritten_fills, self._unwritten_tickers = [], {}

    def _mark(self, book: Book, now: int) -> None:
        due = now - self._marked_at >= MARK_S * 1000
        marked = set()
        for ticker in self._unwritten_tickers.values():
            if ticker.last is not None and (due or ticker.symbol not in self._marks):
                if self._marks.get(ticker.symbol) != ticker.last:
                    marked.add(ticker.symbol)
                self._marks[ticker.symbol] = ticker.last
        if due:
            self._marked_at = now
        for account in book.accounts.values():
            if any(account.holdings[symbol].quantity for symbol in marked & set(account.holdings)):
                self._unwritten_users.add(account.user)

    def create(self) -> None:
        """Make the tables and the demo users' accounts, all in one transaction."""
        book = Book()
        for user in DEMO_USERS:
            book.deposit(user, DEPOSIT)
        with _transaction(self._connection):
            # Not executescript, which would commit first.
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._write(book, DEMO_USERS, {}, [], {})

    def _write(
        self,
        book: Book,
        users: Iterable[str],
        orders: Mapping[int, OpenOrder | None],
        fills: Sequence[tuple[str, Fill]],
        tickers: Mapping[str, Ticker],
    ) -> None:
        write = self._connection.executemany
        for user in users:
            self._write_account(book.accounts[user])
        write(
            "REPLACE INTO orders VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [_order_row(order) for order in orders.values() if order is not None],
        )
        gone = [(number,) for number, order in orders.items() if order is None]
        write("DELETE FROM orders WHERE order_id = ?", gone)
        if fills:
            write(
                "INSERT INTO fills VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [_fill_row(user, fill) for user, fill in fills],
            )
            # The newest that are kept; the numbers have gaps, since orders take some too.
            write(
                "DELETE FROM fills WHERE fill_id <= (SELECT fill_id FROM fills "
                "ORDER BY fill_id DESC LIMIT 1 OFFSET ?)",
                [(FILLS_KEPT,)],
            )
        write(
            "REPLACE INTO tickers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [_ticker_row(ticker) for ticker in tickers.values()],
        )
        write("REPLACE INTO state VALUES ('next_number', ?)", [(str(book.next_number),)])

    def _write_account(self, account: Account) -> None:
        by_symbol = []
        positions = []
        with localcontext(EXACT):
            unrealized = _ZERO
            for symbol, holding in sorted(account.holdings.items()):
                mark = self._marks.get(symbol)
                gain = _ZERO if mark is None else holding.quantity * mark - holding.cost
                unrealized += gain
                by_symbol.append(
                    {
                        "symbol": symbol,
                        "realized": plain(holding.realized),
                        "unrealized": plain(gain),
                        "fees": plain(holding.fees),
                    }
                )
                positions.append(_position_row(account.user, symbol, holding, mark, gain))
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


def _position_row(
    user: str, symbol: str, holding: Holding, mark: Decimal | None, gain: Decimal
) -> tuple[str | None, ...]:
    side = entry = None
    if holding.quantity:
        side = "long" if holding.quantity > 0 else "short"
        entry = plain(_share(holding.cost, Decimal(1), holding.quantity))
    return (
        user,
        symbol,
        side,
        plain(abs(holding.quantity)),
        plain(holding.cost),
        entry,
        _text(mark),
        plain(gain),
        plain(holding.realized),
        plain(holding.fees),
    )


def _order_row(order: OpenOrder) -> tuple[str | int | None, ...]:
    return (
        order.number,
        order.user,
        order.symbol,
        order.side,
        order.type,
        _text(order.price),
        _text(order.quantity),
        plain(order.filled),
        "partially_filled" if order.filled else "new",
        order.created_at,
        order.updated_at,
        plain(order.unit_lock),
    )


def _fill_row(user: str, fill: Fill) -> tuple[str | int | None, ...]:
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


def _ticker_row(ticker: Ticker) -> tuple[str | int | None, ...]:
    amounts = (
        ticker.last,
        ticker.bid,
        ticker.ask,
        ticker.open,
        ticker.high,
        ticker.low,
        ticker.volume,
        ticker.change,
        ticker.change_pct,
    )
    return (ticker.symbol, *map(_text, amounts), ticker.source_ts)


def check_law(path: Path) -> list[str]:
    """Check a file, in one consistent reading, against the law and its own sums.

    Returns:
        What is wrong, a line each; nothing in a file that obeys the law.
    """
    connection = _connect(path, "ro")
    try:
        connection.execute("BEGIN")
        accounts = connection.execute(
            "SELECT user_id, deposits, cash, free, locked, realized, unrealized, fees, total "
            "FROM accounts"
        ).fetchall()
        positions = connection.execute(
            "SELECT user_id, cost, unrealized_pnl, realized, fees FROM positions"
        ).fetchall()
        orders = connection.execute(
            "SELECT user_id, quantity, filled, unit_lock FROM orders"
        ).fetchall()
    finally:
        connection.close()
    wrong = []
    with localcontext(EXACT):
        for user, *texts in accounts:
            deposits, cash, free, locked, realized, unrealized, fees, total = map(Decimal, texts)
            held = [tuple(map(Decimal, row[1:])) for row in positions if row[0] == user]
            cost, gain, made, paid = (
                sum(column, _ZERO) for column in zip(*held, (_ZERO,) * 4, strict=True)
            )
            resting = [tuple(map(Decimal, row[1:])) for row in orders if row[0] == user]
            kept = sum(((quantity - done) * unit for quantity, done, unit in resting), _ZERO)
            for name, left, right in (
                ("law", deposits, cash + cost - realized + fees),
                ("cash", cash, free + locked),
                ("locked", locked, kept),
                ("realized", realized, made),
                ("unrealized", unrealized, gain),
                ("fees", fees, paid),
                ("total", total, realized + unrealized - fees),
            ):
                if left != right:
                    wrong.append(f"user {user}: {name}: {left} is not {right}")
    return wrong


# ---- the exchange


@runtime_checkable
class _Resumable(Protocol):
    """A market that can go on from kept prices."""

    def resume(self, prices: Mapping[str, Decimal]) -> None: ...


@attrs.define
class _Trading:
    """What the trading process has; used by one worker thread at a time."""

    ledger: _Ledger
    book: Book
    traders: _Traders
    markets: dict[str, Ticker]

    def step(self, moved: Sequence[Ticker], now: int) -> None:
        """One step: fill, place, cancel, and write it all.

        Raises:
            sqlite3.Error: It could not be written; the next step writes it too.
        """
        self.markets |= {ticker.symbol: ticker for ticker in moved}
        self.traders.step(self.markets, [ticker.symbol for ticker in moved], now)
        self.ledger.save(self.book, moved, now)


class PaperExchange:
    """The exchange of one file; a `TickerFeed`. Made by `open_paper_exchange`."""

    def __init__(
        self, path: Path, market: TickerFeed, trading: _Trading | None, tickers: dict[str, Ticker]
    ) -> None:
        self.path = path
        self._market = market
        self._trading = trading
        self._tickers = tickers
        self._moved: dict[str, Ticker] = {}
        self._sink: MarketSink | None = None
        self._failing = False

    @property
    def read_only(self) -> bool:
        """Whether another process trades on the file."""
        return self._trading is None

    def knows(self, symbol: str) -> bool:
        """Whether the market has `symbol`; for a reader, whether the file has."""
        if self.read_only and self._tickers:
            return symbol in self._tickers
        return self._market.knows(symbol)

    async def run(self, sink: MarketSink) -> None:
        """Run the market and the demo users' trading, or follow the file of the one who does.

        Cancellation waits for a step that is being written; the file is consistent at any moment.

        Raises:
            SourceError: A reader can no longer read the file.
            Exception: What the market raises.
        """
        if self._trading is None:
            await self._follow(sink)
            return
        self._sink = sink
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._trade, self._trading)
            try:
                await self._market.run(self)
            except Exception as error:
                failure = error
            # The market is over: nothing more can be filled.
            nursery.cancel_scope.cancel()
        if failure is not None:
            # Raised here, as what it is and not as a group.
            raise failure
        await self._step(self._trading)

    def update(self, tickers: Sequence[Ticker]) -> None:
        """Take the market's news, for the next step and for the service; as its sink."""
        for ticker in tickers:
            self._moved[ticker.symbol] = ticker
        if self._sink is not None:
            self._sink.update(tickers)

    def stale(self, reason: str) -> None:
        """Pass on that the market stands still."""
        if self._sink is not None:
            self._sink.stale(reason)

    async def _trade(self, trading: _Trading) -> None:
        due = trio.current_time()
        while True:
            due = max(due + STEP_S, trio.current_time())
            await trio.sleep_until(due)
            await self._step(trading)

    async def _step(self, trading: _Trading) -> None:
        moved, self._moved = list(self._moved.values()), {}
        try:
            # Not abandoned on cancellation: the step owns the connection until it has committed.
            await trio.to_thread.run_sync(trading.step, moved, _now_ms())
            self._failing = False
        except sqlite3.Error as error:
            # A full disk, say. The market goes on, and the next step writes this one too.
            if not self._failing:
                logs.emit(logs.line("paper_failed", error=error))
            self._failing = True

    async def _follow(self, sink: MarketSink) -> None:
        if self._tickers:
            sink.update(list(self._tickers.values()))
        changed_at, stale = trio.current_time(), False
        connection = await trio.to_thread.run_sync(_connect, self.path, "ro")
        try:
            while True:
                await trio.sleep(STEP_S)
                tickers = await trio.to_thread.run_sync(_read_tickers, connection)
                changed = [t for t in tickers.values() if t != self._tickers.get(t.symbol)]
                self._tickers = tickers
                if changed:
                    changed_at, stale = trio.current_time(), False
                    sink.update(changed)
                elif not stale and trio.current_time() - changed_at > STALE_S:
                    stale = True
                    sink.stale("source_timeout")
        except sqlite3.Error as error:
            raise SourceError(f"{self.path} cannot be read: {error}") from None
        finally:
            connection.close()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@asynccontextmanager
async def open_paper_exchange(
    path: Path, *, market: TickerFeed, seed: int
) -> AsyncIterator[PaperExchange]:
    """Open, or make, the exchange of a file for as long as the context lasts.

    The one process that holds the lock `PATH.lock` trades; another reads, and logs that. A market
    that has `resume(prices)` goes on from the prices that the file has.

    Args:
        path: The file. Its directory must be there.
        market: What the orders fill against.
        seed: The same seed places the same orders, as long as the market is the same.

    Raises:
        ConfigurationError: The path is not of a paper exchange, and cannot become one.

    Cancellation waits for the file to be opened. Leaving closes the file; `run` must have ended.
    """
    path = Path(path)
    opened = await trio.to_thread.run_sync(_open, path)
    try:
        if opened.ledger is None:
            logs.emit(logs.line("paper_read_only", path=path))
            yield PaperExchange(path, market, None, opened.tickers)
            return
        prices = {t.symbol: t.last for t in opened.tickers.values() if t.last is not None}
        if isinstance(market, _Resumable):
            market.resume(prices)
        book = opened.book
        trading = _Trading(opened.ledger, book, _Traders(book, seed), opened.tickers)
        yield PaperExchange(path, market, trading, {})
    finally:
        opened.close()


@attrs.define
class _Opened:
    """An exchange's file as it was found; without a ledger another process trades on it."""

    tickers: dict[str, Ticker] = attrs.field(factory=dict)
    book: Book = attrs.field(factory=Book)
    ledger: _Ledger | None = None
    lock: int | None = None

    def close(self) -> None:
        if self.ledger is not None:
            self.ledger.close()
        if self.lock is not None:
            os.close(self.lock)


def _open(path: Path) -> _Opened:
    _refuse_other_files(path)
    opened = _Opened()
    try:
        opened.lock = _lock(path)
        if opened.lock is None:
            opened.tickers = _wait_for_tickers(path)
            return opened
        # Once more: another process may have made the file before it gave up the lock.
        if not _refuse_other_files(path):
            _make(path)
        opened.ledger = _Ledger(path)
        opened.book, opened.tickers = opened.ledger.load()
    except (OSError, sqlite3.Error) as error:
        opened.close()
        raise ConfigurationError(
            f"{path} cannot be used for the accounts ({error}): give a path that can be written"
        ) from None
    except BaseException:
        opened.close()
        raise
    return opened


def _make(path: Path) -> None:
    """Make the file, beside and then in its place: it is there whole, or not at all."""
    path = path.resolve()
    new = path.with_name(path.name + ".new")
    # What a kill has left, or somebody who deleted the file alone.
    for leftover in (new, f"{new}-wal", f"{new}-shm", f"{path}-wal", f"{path}-shm"):
        with suppress(FileNotFoundError):
            os.unlink(leftover)
    new.touch(mode=0o600)
    ledger = _Ledger(new)
    try:
        ledger.create()
    finally:
        ledger.close()
    new.replace(path)


def _wait_for_tickers(path: Path) -> dict[str, Ticker]:
    """The file's tickers, as soon as the process that trades on it has made the file."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while not _refuse_other_files(path) and time.monotonic() < deadline:
        time.sleep(0.02)
    connection = _connect(path, "ro")
    try:
        return _read_tickers(connection)
    finally:
        connection.close()
