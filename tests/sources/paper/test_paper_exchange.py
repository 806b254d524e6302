"""The paper exchange: its sums, its orders, its file through kills and restarts."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import URL

from harness.paper import Trader
from harness.support import until

from trading_push.errors import ConfigurationError
from trading_push.models import Fill, Ticker
from trading_push.sources import sqlite
from trading_push.sources.exchanges.simulated_market import SimulatedMarket
from trading_push.sources.paper import (
    PAPER_QUERIES,
    Account,
    MatchingEngine,
    OrderRefused,
    PaperExchange,
    PaperSource,
    audit,
    open_paper_exchange,
)
from trading_push.sources.paper import books as books_module
from trading_push.sources.paper import exchange as exchange_module
from trading_push.sources.paper import source as source_module
from trading_push.sources.paper.books import plain
from trading_push.sources.paper.engine import Holding
from trading_push.sources.paper.exchange import Trading
from trading_push.sources.paper.file import open_file
from trading_push.sources.paper.traders import Traders
from trading_push.sources.sql.source import SqlSource

D = Decimal


# ---- the book


def book_with(deposit: str = "100000") -> tuple[MatchingEngine, Account]:
    book = MatchingEngine()
    book.deposit("1", D(deposit))
    return book, book.accounts["1"]


def meet(
    book: MatchingEngine,
    bid: str,
    ask: str,
    size: str = "1000000",
    now: int = 0,
    symbol: str = "BTCUSDT",
) -> list[Fill]:
    return book.on_price(symbol, D(bid), D(ask), bid_size=D(size), ask_size=D(size), now=now)


def test_a_market_order_pays_the_touch_and_the_takers_fee() -> None:
    book, account = book_with()
    order = book.place("1", "BTCUSDT", "buy", D("0.5"), 7, last=D(60000))
    assert (account.locked, account.free) == (D("31515.75"), D("68484.25"))
    (fill,) = meet(book, "60000.00", "60000.10", now=8)
    assert (fill.order_id, fill.price, fill.quantity) == (
        str(order.number),
        D("60000.10"),
        D("0.5"),
    )
    assert (fill.fee, fill.fee_asset, fill.at) == (D("15.000025"), "USDT", 8)
    assert account.cash == D(100000) - D("30000.05") - D("15.000025")
    assert account.holdings["BTCUSDT"].cost == D("30000.05")
    assert (account.locked, account.orders, account.imbalance()) == (0, {}, 0)


def test_a_limit_order_rests_and_fills_in_parts_at_its_own_price() -> None:
    book, account = book_with()
    order = book.place("1", "BTCUSDT", "buy", D(3), 0, limit=D(100))
    assert meet(book, "101", "102") == []
    (first,) = meet(book, "98", "99", size="1", now=5)
    assert (first.price, first.quantity, first.fee) == (D(100), D(1), D("0.02"))
    assert (order.filled, order.left, order.updated_at) == (1, 2, 5)
    assert account.locked == D("200.1")
    assert meet(book, "100.5", "100.7") == []
    (second,) = meet(book, "99", "100", size="10")
    assert second.quantity == 2
    assert not account.orders
    assert account.holdings["BTCUSDT"].cost == 300


def test_a_limit_order_that_crosses_at_once_pays_the_better_price() -> None:
    book, _ = book_with()
    book.place("1", "BTCUSDT", "sell", D(1), 0, limit=D(90))
    (fill,) = meet(book, "95", "96")
    assert (fill.price, fill.fee) == (D(95), D("0.0475"))


def test_the_size_of_a_side_is_shared_the_oldest_order_first() -> None:
    book, account = book_with()
    for limit in (100, 101):
        book.place("1", "BTCUSDT", "buy", D(2), 0, limit=D(limit))
    book.place("1", "BTCUSDT", "sell", D(1), 0, limit=D(99))
    fills = meet(book, "99", "100", size="3")
    assert [(fill.side, fill.quantity) for fill in fills] == [("buy", 2), ("buy", 1), ("sell", 1)]
    assert [order.left for order in account.orders.values()] == [1]
    assert book.accounts["1"].imbalance() == 0


def test_the_oldest_order_goes_first_after_a_restart_too() -> None:
    book, _ = book_with()
    book.deposit("2", D(100_000))
    for user in ("2", "1"):
        book.place(user, "BTCUSDT", "buy", D(2), 0, limit=D(100))
    kept = MatchingEngine(book.next_number, book.accounts)
    assert [fill.order_id for fill in meet(kept, "99", "100", size="3")] == ["1", "2"]


def test_a_short_has_a_negative_cost_and_one_fill_flips_a_position() -> None:
    _, account = book_with()
    holding = account.holdings.setdefault("X", Holding())
    account.execute("X", D(-2), D(100), D(1))
    assert (holding.quantity, holding.cost, account.cash) == (-2, -200, D(100199))
    account.execute("X", D(5), D(90), D(0))
    assert (holding.quantity, holding.cost, holding.realized) == (3, 270, 20)
    account.execute("X", D(-4), D(95), D(0))
    assert (holding.quantity, holding.cost, holding.realized) == (-1, -95, 35)
    account.execute("X", D(1), D(100), D(0))
    assert (holding.quantity, holding.cost, holding.realized) == (0, 0, 30)
    assert (account.realized, account.fees, account.imbalance()) == (30, 1, 0)


def test_a_partial_close_takes_a_rounded_share_and_the_rest_stays() -> None:
    _, account = book_with()
    account.execute("X", D(3), D("33.333333333333"), D(0))
    account.execute("X", D(-1), D(40), D(0))
    holding = account.holdings["X"]
    assert holding.realized == D("6.66666667")
    assert holding.cost == D("66.666666669999")
    account.execute("X", D(-2), D(40), D(0))
    assert holding.cost == 0
    assert holding.realized == D(120) - D("99.999999999999")
    assert account.imbalance() == 0


def test_an_order_that_the_account_cannot_carry_is_refused() -> None:
    book, account = book_with("1000")
    for arguments in (
        ("1", "X", "buy", D(10), 0, D(100)),  # The fee is not covered.
        ("1", "X", "sell", D(11), 0, D(100)),
        ("1", "X", "buy", D(0), 0, D(100)),
        ("1", "X", "buy", D(-1), 0, D(100)),
        ("1", "X", "buy", D("NaN"), 0, D(100)),
        ("1", "X", "buy", D(1), 0, D("Infinity")),
        ("1", "X", "buy", D(1), 0, D(0)),
        ("9", "X", "buy", D(1), 0, D(1)),
    ):
        *order, limit = arguments
        with pytest.raises(OrderRefused):
            book.place(*order, limit=limit)
    assert (account.free, account.orders) == (1000, {})


def test_a_cancelled_order_is_gone_and_frees_its_lock() -> None:
    book, account = book_with()
    order = book.place("1", "X", "buy", D(10), 0, limit=D(100))
    assert not book.cancel(order.number, "2")
    assert book.cancel(order.number, "1")
    assert not book.cancel(order.number, "1")
    assert (account.free, account.orders) == (100000, {})
    assert meet(book, "1", "2", symbol="X") == []


def test_what_would_be_rounded_is_an_error() -> None:
    _, account = book_with()
    with pytest.raises(ArithmeticError):
        account.execute("X", D("1" * 60), D("1." + "1" * 60), D(0))


prices = st.decimals("0.00000001", "100000", places=8)
quantities = st.decimals("0.00001", "50", places=5)
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("place"),
            st.sampled_from(["1", "2"]),
            st.sampled_from(["AUSDT", "BUSDT"]),
            st.sampled_from(["buy", "sell"]),
            quantities,
            st.none() | prices,
        ),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.just("price"), st.sampled_from(["AUSDT", "BUSDT"]), prices, quantities),
    ),
    min_size=20,
    max_size=60,
)


def test_the_law_over_a_thousand_fills() -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=300,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(steps)
    def check(operations: list[Any]) -> None:
        book = MatchingEngine()
        for user in ("1", "2"):
            book.deposit(user, D(1_000_000))
        for name, *arguments in operations:
            if name == "place":
                user, symbol, side, quantity, limit = arguments
                try:
                    book.place(user, symbol, side, quantity, 0, limit=limit, last=D(1000))
                except OrderRefused:
                    seen["refused"] += 1
            elif name == "cancel":
                numbers = [n for account in book.accounts.values() for n in account.orders]
                if numbers:
                    number = numbers[arguments[0] % len(numbers)]
                    seen["cancelled"] += any(book.cancel(number, user) for user in ("1", "2"))
            else:
                symbol, bid, size = arguments
                before = {u: a.holdings.get(symbol) for u, a in book.accounts.items()}
                signs = {u: h.quantity > 0 for u, h in before.items() if h and h.quantity}
                ask = bid + D("0.01")
                for fill in book.on_price(symbol, bid, ask, bid_size=size, ask_size=size, now=0):
                    seen["fills"] += 1
                    seen[fill.side] += 1
                for user, account in book.accounts.items():
                    holding = account.holdings.get(symbol)
                    if holding and holding.quantity:
                        seen["long" if holding.quantity > 0 else "short"] += 1
                        seen["flipped"] += signs.get(user, holding.quantity > 0) != (
                            holding.quantity > 0
                        )
            for account in book.accounts.values():
                assert account.imbalance() == 0
                for holding in account.holdings.values():
                    assert (holding.cost > 0) == (holding.quantity > 0) or holding.cost == 0
                    assert holding.quantity or not holding.cost
                assert account.realized == sum(h.realized for h in account.holdings.values())
                assert account.fees == sum(h.fees for h in account.holdings.values())
                seen["partial"] += sum(0 < o.filled < o.quantity for o in account.orders.values())

    check()
    assert seen["fills"] >= 1000
    for what in ("buy", "sell", "long", "short", "flipped", "partial", "cancelled"):
        assert seen[what] > 10, (what, seen)


# ---- the file


class Recorder:
    """A sink that lets a test wait for what it is given."""

    def __init__(self) -> None:
        self.last: dict[str, Ticker] = {}
        self.updates = 0
        self.reasons: list[str] = []
        self._news = trio.Event()

    def update(self, tickers: Sequence[Ticker]) -> None:
        self.last |= {ticker.symbol: ticker for ticker in tickers}
        self.updates += 1
        self._wake()

    def stale(self, reason: str, symbols: object = None) -> None:
        self.reasons.append(reason)
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not condition():
                await self._news.wait()


class Exchange:
    """An exchange's file, traded on step by step, without a clock."""

    def __init__(self, path: Path, seed: int = 7) -> None:
        self.path = path
        self.opened = open_file(path)
        assert self.opened.books is not None
        self.market = SimulatedMarket(seed)
        self.book = self.opened.engine
        self.trading = Trading(
            self.opened.books, self.book, Traders(self.book, seed), self.opened.tickers
        )
        self.now = 1_763_600_000_000

    def trade(self, steps: int) -> None:
        for _ in range(steps):
            self.now += 250
            self.trading.step(self.market.step(self.now), self.now)


@pytest.fixture
def exchange(tmp_path: Path) -> Iterator[Exchange]:
    exchange = Exchange(tmp_path / "paper.db")
    yield exchange
    exchange.opened.close()


def rows(path: Path, sql: str) -> list[Any]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def test_the_demo_users_trade_and_the_file_obeys_the_law(
    tmp_path: Path, exchange: Exchange
) -> None:
    path = tmp_path / "paper.db"
    assert [a.deposits for a in exchange.book.accounts.values()] == [D(100_000)] * 5
    seen: Counter[str] = Counter()
    for _ in range(60):
        exchange.trade(25)
        assert audit(path) == []
        for side, kind, status in rows(path, "SELECT side, type, status FROM orders"):
            seen[side] += 1
            seen[kind] += 1
            seen[status] += 1
        for (side,) in rows(path, "SELECT side FROM positions WHERE side IS NOT NULL"):
            seen[side] += 1
    for what in ("buy", "sell", "limit", "new", "partially_filled", "long", "short"):
        assert seen[what] > 5, (what, seen)
    fills = rows(path, "SELECT count(*), count(DISTINCT order_id) FROM fills")[0]
    assert 1000 >= fills[0] > fills[1] > 300
    assert exchange.book.next_number > 1500


def test_a_price_of_nothing_is_passed_over(exchange: Exchange) -> None:
    exchange.trade(20)
    last = exchange.trading.tickers["BTCUSDT"].last
    exchange.trading.step([Ticker("BTCUSDT", last=Decimal(0))], exchange.now + 1)
    assert exchange.trading.tickers["BTCUSDT"].last == last
    exchange.trade(20)


@pytest.mark.parametrize(
    "price", ["NaN", "sNaN", "Infinity", "-1", "1E+50", "1E-50", "0", "1" * 40]
)
@pytest.mark.parametrize("fields", [("last",), ("bid", "ask"), ("bid",), ("last", "bid", "ask")])
def test_no_price_ends_the_trading(exchange: Exchange, price: str, fields: tuple[str, ...]) -> None:
    exchange.trade(20)
    fills = exchange.book.next_number
    for symbol in list(exchange.trading.tickers):
        odd = Ticker(symbol, **dict.fromkeys(fields, Decimal(price)))
        exchange.trading.step([odd], exchange.now + 1)
    exchange.trade(200)
    assert exchange.book.next_number > fills + 50
    assert audit(exchange.path) == []


def test_a_symbol_without_any_price_is_left_alone(exchange: Exchange) -> None:
    exchange.trade(20)
    for symbol in exchange.trading.tickers:
        exchange.trading.step([Ticker(symbol)], exchange.now + 1)
    for _ in range(50):  # no market moves: nothing can be placed, and nothing raises
        exchange.trading.step([], exchange.now + 1)
    exchange.trade(20)


def test_a_clock_that_is_set_back_freezes_no_mark(exchange: Exchange) -> None:
    exchange.trade(200)
    exchange.now -= 3_600_000
    exchange.trade(40)
    marks = dict(
        rows(exchange.path, "SELECT symbol, mark_price FROM positions WHERE quantity != '0'")
    )
    assert marks
    exchange.trade(40)
    again = dict(
        rows(exchange.path, "SELECT symbol, mark_price FROM positions WHERE quantity != '0'")
    )
    assert all(again[symbol] != mark for symbol, mark in marks.items() if symbol in again)


async def test_what_a_fill_changes_is_told_in_the_moment_of_the_fill(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, Any]] = []

    class Sink:
        def publish(self, values: Any) -> None:
            told.extend(("fill", user) for _, _, user in values)

        def changed(self, changes: Any) -> None:
            told.append(("changed", set(changes)))

        def missed(self) -> None:
            raise AssertionError

    monkeypatch.setattr(source_module, "LOOK_S", 0.01)
    types = {"balance", "positions", "pnl", "orders"}
    source = PaperSource(exchange.path, {})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.watch, Sink())
        await until(lambda: told)  # whoever is watched by then is asked for once more
        users = exchange.book.accounts
        assert told[0] == ("changed", {(user, each) for user in users for each in types})
        seen, cancelled = 0, 0
        for _ in range(60):
            told.clear()
            await trio.to_thread.run_sync(exchange.trade, 1)
            await until(lambda: told and told[-1][0] == "changed")
            filled = {user for what, user in told if what == "fill"}
            changed = set().union(*(users for what, users in told if what == "changed"))
            assert {(user, each) for user in filled for each in types} <= changed
            seen += len(filled)
            cancelled += bool({user for user, _ in changed} - filled)
        assert seen > 5
        assert cancelled  # or placed: an order alone is told, too
        nursery.cancel_scope.cancel()
    source.close()


def test_the_same_seed_trades_the_same(tmp_path: Path) -> None:
    tables = []
    for name in ("a.db", "b.db"):
        exchange = Exchange(tmp_path / name)
        exchange.trade(200)
        exchange.opened.close()
        tables.append([rows(tmp_path / name, f"SELECT * FROM {t}") for t in ("accounts", "fills")])
    assert tables[0] == tables[1]


def test_the_newest_fills_are_kept(
    tmp_path: Path, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books_module, "FILLS_KEPT", 20)
    exchange.trade(150)
    ((count, newest),) = rows(tmp_path / "paper.db", "SELECT count(*), max(fill_id) FROM fills")
    assert count == 20
    assert newest > 100


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE accounts SET cash = cash || '1' WHERE user_id = '3'",
        "UPDATE accounts SET realized = '0.00000001' WHERE user_id = '3'",
        "UPDATE positions SET cost = '12' WHERE user_id = '3'",
        "DELETE FROM orders WHERE user_id = '3'",
        "UPDATE accounts SET locked = '0' WHERE user_id = '3'",
    ],
)
def test_the_check_of_the_law_sees_damage(tmp_path: Path, exchange: Exchange, damage: str) -> None:
    exchange.trade(60)
    path = tmp_path / "paper.db"
    assert audit(path) == []
    connection = sqlite3.connect(path)
    connection.execute(damage)
    connection.commit()
    connection.close()
    assert audit(path)
    assert all("user 3" in line for line in audit(path))


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "paper.db"
    exchange = Exchange(path)
    exchange.trade(300)
    before, tickers = exchange.book, exchange.opened.tickers
    exchange.opened.close()
    again = Exchange(path)
    assert again.book.next_number == before.next_number
    assert again.opened.tickers == tickers
    for user, account in again.book.accounts.items():
        for order in before.accounts[user].orders.values():
            order.resting = True
        assert account == before.accounts[user]
    again.trade(300)
    again.opened.close()
    assert audit(path) == []
    assert rows(path, "SELECT count(*) FROM accounts") == [(5,)]


def test_a_step_that_cannot_be_written_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.01)
    path = tmp_path / "paper.db"
    exchange = Exchange(path)
    exchange.trade(100)
    before = rows(path, "SELECT * FROM accounts")
    # No new marks, which would have the accounts written again anyway.
    monkeypatch.setattr(books_module, "MARK_S", 1e9)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for _ in range(20):
        with pytest.raises(sqlite3.OperationalError):
            exchange.trade(1)
    assert rows(path, "SELECT * FROM accounts") == before
    other.close()
    exchange.trade(1)
    assert audit(path) == []
    assert rows(path, "SELECT * FROM accounts") != before
    for account in exchange.book.accounts.values():
        for order in account.orders.values():
            order.resting = True
    exchange.opened.close()
    again = Exchange(path)
    assert again.book.accounts == exchange.book.accounts
    again.opened.close()


def test_the_file_is_consistent_at_each_statement(tmp_path: Path) -> None:
    # What a kill would leave: the files as they are when a statement begins.
    path, copy = tmp_path / "paper.db", tmp_path / "killed.db"
    exchange = Exchange(path)
    assert exchange.opened.books is not None
    exchange.trade(20)
    wrong: list[str] = []
    statements = 0

    def look(statement: str) -> None:
        nonlocal statements
        statements += 1
        copy.with_name("killed.db-shm").unlink(missing_ok=True)
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
        wrong.extend(audit(copy))

    exchange.opened.books._connection.set_trace_callback(look)
    exchange.trade(25)
    exchange.opened.books._connection.set_trace_callback(None)
    exchange.opened.close()
    assert wrong == []
    assert statements > 25 * 5


def test_who_runs_out_of_cash_pays_in_again(exchange: Exchange) -> None:
    account = exchange.book.accounts["1"]
    account.execute("X", D(1), D(95_000), D(0))
    exchange.trade(40)
    assert account.deposits == 200_000
    assert account.imbalance() == 0


KEYS = {
    "balance": ["asset", "free", "locked", "total"],
    "positions": ["symbol", "side", "quantity", "entry_price", "mark_price", "unrealized_pnl"],
    "pnl": ["realized", "unrealized", "fees", "total", "currency", "by_symbol"],
    "orders": [
        "order_id",
        "symbol",
        "side",
        "type",
        "price",
        "quantity",
        "filled",
        "status",
        "created_at",
        "updated_at",
    ],
}


async def test_the_queries_give_the_shapes_of_the_protocol(
    tmp_path: Path, exchange: Exchange
) -> None:
    exchange.trade(400)
    source = SqlSource(f"sqlite:///{tmp_path / 'paper.db'}", PAPER_QUERIES)
    await source.check()
    values = {
        name: {
            user: msgspec.json.decode(bytes(raw or b"null"))
            for user, raw in (await source.fetch_many(["1", "2", "3", "4", "5"], name)).items()
        }
        for name in KEYS
    }
    nobody = {
        name: msgspec.json.decode(bytes(await source.fetch("nobody", name) or b"null"))
        for name in KEYS
    }
    source.close()
    for name, keys in KEYS.items():
        objects = [
            each
            for value in values[name].values()
            for each in (value if name != "pnl" else [value])
        ]
        assert objects
        for each in objects:
            assert list(each) == keys
    decimals = r"-?\d+(\.\d+)?"
    for user in "12345":
        (balance,) = values["balance"][user]
        assert D(balance["total"]) == D(balance["free"]) + D(balance["locked"])
        pnl = values["pnl"][user]
        assert D(pnl["total"]) == D(pnl["realized"]) + D(pnl["unrealized"]) - D(pnl["fees"])
        assert D(pnl["fees"]) == sum(D(each["fees"]) for each in pnl["by_symbol"])
        assert list(pnl["by_symbol"][0]) == ["symbol", "realized", "unrealized", "fees"]
        amounts = [pnl[key] for key in ("realized", "unrealized", "fees", "total")]
        for position in values["positions"][user]:
            assert position["side"] in ("long", "short")
            assert D(position["quantity"]) > 0
            amounts += [position[key] for key in KEYS["positions"][2:]]
            sign = 1 if position["side"] == "long" else -1
            gain = (
                sign
                * D(position["quantity"])
                * (D(position["mark_price"]) - D(position["entry_price"]))
            )
            assert abs(gain - D(position["unrealized_pnl"])) < D("0.001")
        for order in values["orders"][user]:
            assert isinstance(order["order_id"], str)
            assert isinstance(order["created_at"], int)
            assert (order["price"] is None) == (order["type"] == "market")
            amounts += [order["quantity"], order["filled"], order["price"] or "0"]
        assert all(re.fullmatch(decimals, amount) for amount in amounts), amounts
    assert nobody == {
        "balance": [],
        "positions": [],
        "orders": [],
        "pnl": {
            "realized": "0",
            "unrealized": "0",
            "fees": "0",
            "total": "0",
            "currency": "USDT",
            "by_symbol": [],
        },
    }


def test_small_amounts_have_no_exponent() -> None:
    assert plain(D("0E-8")) == "0"
    assert plain(D("1E-8")) == "0.00000001"
    assert plain(D("-1.500E+3")) == "-1500"
    assert plain(D("-0.0")) == "0"


# ---- the exchange as a feed


async def test_it_passes_the_market_on_and_keeps_its_prices(tmp_path: Path, fast: None) -> None:
    path = tmp_path / "paper.db"
    sink = Recorder()
    async with (
        open_paper_exchange(path, market=SimulatedMarket(2), seed=2) as exchange,
        trio.open_nursery() as nursery,
    ):
        assert not exchange.read_only
        assert exchange.knows("BTCUSDT")
        assert not exchange.knows("NOSUCH")
        nursery.start_soon(exchange.run, sink)
        await sink.wait_until(lambda: sink.updates > 100)
        nursery.cancel_scope.cancel()
    assert audit(path) == []
    assert len(sink.last) == 5
    kept = dict(rows(path, "SELECT symbol, last FROM tickers"))
    assert len(rows(path, "SELECT * FROM fills")) > 0
    again = SimulatedMarket(99)
    async with open_paper_exchange(path, market=again, seed=3):
        assert {t.symbol: f"{t.last:f}" for t in again.tickers(0)} == kept


class Ending:
    """A market that ends after one update."""

    def knows(self, symbol: str) -> bool:
        return symbol == "BTCUSDT"

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure

    async def run(self, sink: Any) -> None:
        sink.update([Ticker(symbol="BTCUSDT", last=D("61837.63000000"))])
        if self.failure:
            raise self.failure
        sink.stale("tape_ended")


async def test_a_market_that_ends_ends_it_with_its_prices_kept(tmp_path: Path) -> None:
    path = tmp_path / "paper.db"
    sink = Recorder()
    async with open_paper_exchange(path, market=Ending(), seed=1) as exchange:
        await exchange.run(sink)
    assert sink.reasons == ["tape_ended"]
    assert rows(path, "SELECT symbol, last, bid FROM tickers") == [
        ("BTCUSDT", "61837.63000000", None)
    ]


async def test_the_markets_failure_is_raised_as_it_is(tmp_path: Path) -> None:
    market = Ending(OSError("gone"))
    async with open_paper_exchange(tmp_path / "paper.db", market=market, seed=1) as exchange:
        with pytest.raises(OSError, match="gone"):
            await exchange.run(Recorder())


async def test_an_error_of_the_caller_is_not_taken_for_a_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mine"):
        async with open_paper_exchange(tmp_path / "paper.db", market=Ending(), seed=1):
            raise OSError("mine")


# ---- other processes


def test_a_kill_at_any_moment_leaves_a_consistent_file(tmp_path: Path) -> None:
    path = tmp_path / "paper.db"
    numbers = []
    for seed in range(5):
        trader = Trader(path, seed)
        assert trader.line() == "trading"
        for _ in range(2 + 3 * seed):
            assert trader.line()
        trader.kill()
        assert audit(path) == []
        numbers.append(int(rows(path, "SELECT value FROM state")[0][0]))
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 50
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    exchange = Exchange(path)
    exchange.trade(50)
    exchange.opened.close()
    assert audit(path) == []


def test_a_kill_while_the_file_is_made(tmp_path: Path) -> None:
    path = tmp_path / "paper.db"
    (tmp_path / "paper.db.new").write_bytes(b"half a file")
    (tmp_path / "paper.db-wal").write_bytes(b"of a file that somebody deleted")
    exchange = Exchange(path)
    exchange.opened.close()
    assert names(tmp_path) == {"paper.db", "paper.db.lock"}
    assert audit(path) == []


async def test_two_processes_on_one_file(
    tmp_path: Path, fast: None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "paper.db"
    trader = Trader(path)
    try:
        assert trader.line() == "trading"
        assert trader.line()
        sink = Recorder()
        market = SimulatedMarket(5)
        with caplog.at_level(logging.INFO, "trading_push"):
            async with open_paper_exchange(path, market=market, seed=5) as exchange:
                assert exchange.read_only
                assert exchange.knows("BTCUSDT")
                assert not exchange.knows("NOSUCH")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(exchange.run, sink)
                    await sink.wait_until(lambda: sink.updates > 5 and len(sink.last) == 5)
                    # It serves the other's prices, not its own market's.
                    nursery.cancel_scope.cancel()
        events = [getattr(record, "event", None) for record in caplog.records]
        assert events.count("paper_read_only") == 1
        assert market.tickers(0) == SimulatedMarket(5).tickers(0)
        trader.kill()
        kept = dict(rows(path, "SELECT symbol, last FROM tickers"))
        async with open_paper_exchange(path, market=market, seed=5) as exchange:
            assert not exchange.read_only
        assert {t.symbol: f"{t.last:f}" for t in market.tickers(0)} == kept
    finally:
        if trader.process.poll() is None:
            trader.kill()


async def test_a_reader_says_when_nobody_trades_any_more(
    tmp_path: Path, fast: None, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "STALE_S", 0.05)
    exchange.trade(5)
    sink = Recorder()
    async with (
        open_paper_exchange(tmp_path / "paper.db", market=SimulatedMarket(1), seed=1) as reader,
        trio.open_nursery() as nursery,
    ):
        assert reader.read_only
        nursery.start_soon(reader.run, sink)
        await sink.wait_until(lambda: sink.reasons == ["source_timeout"])
        before = sink.updates
        exchange.trade(5)
        await sink.wait_until(lambda: sink.updates > before)
        assert sink.last == exchange.trading.tickers
        nursery.cancel_scope.cancel()


# ---- files that are none of ours


def names(directory: Path) -> set[str]:
    return {each.name for each in directory.iterdir()}


def foreign(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE precious (x)")
    connection.commit()
    connection.close()


def foreign_wal(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    foreign(path)


def other_version(path: Path) -> None:
    Exchange(path).opened.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: path.write_text("dear diary"), "is no SQLite database"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + b"x" * 4096), "cannot be read"),
        (foreign, "another program's database"),
        (foreign_wal, "another program's database"),
        (other_version, "another version"),
    ],
)
async def test_a_foreign_file_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[Path], None], complaint: str
) -> None:
    path = tmp_path / "accounts.db"
    make(path)
    before = path.read_bytes()
    others = names(tmp_path)
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        async with open_paper_exchange(path, market=SimulatedMarket(1), seed=1):
            pass
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert names(tmp_path) - others <= {
        "accounts.db-wal",
        "accounts.db-shm",
    }


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("", "is a directory"), ("none/paper.db", "no directory"), ("x" * 300, "too long")],
)
async def test_a_path_that_cannot_be_used(tmp_path: Path, name: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        async with open_paper_exchange(tmp_path / name, market=SimulatedMarket(1), seed=1):
            pass
    assert "\n" not in str(caught.value)


async def test_a_directory_that_cannot_be_written() -> None:
    with pytest.raises(ConfigurationError, match="give a path that can be written"):
        async with open_paper_exchange(Path("/proc/paper.db"), market=SimulatedMarket(1), seed=1):
            pass


async def test_an_empty_file_becomes_the_exchange(tmp_path: Path) -> None:
    path = tmp_path / "paper #1?.db"
    path.touch()
    async with open_paper_exchange(path, market=SimulatedMarket(1), seed=1) as exchange:
        assert isinstance(exchange, PaperExchange)
        source = SqlSource(URL.create("sqlite", database=str(path)), PAPER_QUERIES)
        await source.check()
        assert await source.fetch("1", "positions")
        source.close()
    assert audit(path) == []
    assert json.loads(rows(path, "SELECT by_symbol FROM accounts")[0][0]) == []
