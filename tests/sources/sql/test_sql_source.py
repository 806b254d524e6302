"""The SQL source: shapes, conversions, errors without secrets, and connections given back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from sqlalchemy.dialects.postgresql import psycopg

from trading_push.errors import ConfigurationError, SourceError
from trading_push.settings.sources import Query
from trading_push.sources.base import NO_VALUE, BatchSource
from trading_push.sources.sql.source import SqlSource

ORDERS = Query(
    "SELECT symbol, user_id, price, quantity FROM orders WHERE user_id IN :user_ids ORDER BY id"
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(tmp_path / "accounts.db", isolation_level=None)
    connection.executescript(
        """
        PRAGMA journal_mode = WAL;
        CREATE TABLE orders (id INTEGER PRIMARY KEY, user_id TEXT, symbol TEXT, price TEXT,
                             quantity INTEGER);
        INSERT INTO orders (user_id, symbol, price, quantity) VALUES
            ('1', 'BTCUSDT', '61837.63000000', 2), ('2', 'ETHUSDT', '2683.80', 1),
            ('1', 'ETHUSDT', NULL, 3);
        CREATE TABLE pnl (user_id INTEGER PRIMARY KEY, total TEXT, by_symbol TEXT);
        INSERT INTO pnl VALUES (1, '5.10', '[{"symbol":"BTCUSDT"}]'), (2, '0', NULL);
        """
    )
    yield connection
    connection.close()


def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'accounts.db'}"


@pytest.fixture
def make(tmp_path: Path, database: sqlite3.Connection) -> Iterator[Any]:
    made = []

    def make(options: str = "", threads: int = 2, **queries: Query) -> SqlSource:
        made.append(SqlSource(url(tmp_path) + options, queries, threads=threads))
        return made[-1]

    yield make
    for source in made:
        source.close()


def decoded(values: Any) -> dict[str, Any]:
    assert all(value is None or isinstance(value, msgspec.Raw) for value in values.values())
    return {user: value and msgspec.json.decode(value) for user, value in values.items()}


def readable(values: Any) -> dict[str, Any]:
    """Values that can be compared: errors have no equality."""
    return {
        user: repr(each) if isinstance(each, SourceError) else each for user, each in values.items()
    }


async def test_many_users_in_one_query(make: Any) -> None:
    source = make(orders=ORDERS)
    assert isinstance(source, BatchSource)
    await source.check()
    values = await source.fetch_many(["2", "1", "no such user"], "orders")
    assert bytes(values["1"]) == (
        b'[{"symbol":"BTCUSDT","price":"61837.63000000","quantity":2},'
        b'{"symbol":"ETHUSDT","price":null,"quantity":3}]'
    )
    assert decoded(values)["2"] == [{"symbol": "ETHUSDT", "price": "2683.80", "quantity": 1}]
    assert decoded(values)["no such user"] == []
    assert bytes(await source.fetch("2", "orders")) == bytes(values["2"])


@pytest.mark.parametrize(
    "where", ["user_id IN (:user_ids)", "user_id IN :user_ids", "user_id = :user_id"]
)
async def test_each_way_to_name_the_users(make: Any, where: str) -> None:
    source = make(orders=Query(f"SELECT user_id, symbol FROM orders WHERE {where} ORDER BY id"))
    await source.check()
    assert decoded(await source.fetch_many(["1", "2", "3"], "orders")) == {
        "1": [{"symbol": "BTCUSDT"}, {"symbol": "ETHUSDT"}],
        "2": [{"symbol": "ETHUSDT"}],
        "3": [],
    }


def test_user_ids_are_bound_without_a_type(make: Any) -> None:
    # A cast to text would refuse a PostgreSQL column of integers.
    statement = make(orders=ORDERS)._plans["orders"].statement
    assert "::" not in str(
        statement.bindparams(user_ids=["4", "5"]).compile(
            dialect=psycopg.dialect(), compile_kwargs={"render_postcompile": True}
        )
    )


async def test_a_single_row_with_json_and_users_of_an_integer_column(make: Any) -> None:
    sql = "SELECT * FROM pnl WHERE user_id IN :user_ids"
    source = make(
        pnl=Query(sql, single=True, json_columns=("by_symbol",), empty='{"total":"0"}'),
        bare=Query(sql, single=True),
    )
    await source.check()
    assert decoded(await source.fetch_many(["1", "2", "3"], "pnl")) == {
        "1": {"total": "5.10", "by_symbol": [{"symbol": "BTCUSDT"}]},
        "2": {"total": "0", "by_symbol": None},
        "3": {"total": "0"},
    }
    assert await source.fetch("3", "bare") is NO_VALUE
    assert decoded({"1": await source.fetch("1", "bare")})["1"]["by_symbol"].startswith("[{")


async def test_a_type_without_a_query_has_nothing_to_say(make: Any) -> None:
    source = make(orders=ORDERS)
    assert await source.fetch_many(["1"], "balance") == {}
    assert await source.fetch("1", "balance") is None
    assert await source.fetch_many([], "orders") == {}


async def test_rows_of_users_who_were_not_asked_for_stay_out(make: Any) -> None:
    source = make(
        orders=Query("SELECT user_id, symbol FROM orders WHERE 1 OR user_id IN :user_ids")
    )
    assert list(await source.fetch_many(["2"], "orders")) == ["2"]


# Whatever SQLite can hold: what it makes JSON of itself has to read the same as what Python makes.
KEPT = "(1, 'a \"quoted\" \\ text', 'é 价格 \U0001f4c8', NULL, 9007199254740993)"
TEXTS = f"SELECT user_id, text, more, empty, number FROM kept WHERE user_id IN :user_ids -- {KEPT}"


@pytest.fixture
def kept(database: sqlite3.Connection) -> sqlite3.Connection:
    database.execute("CREATE TABLE kept (user_id INTEGER, text, more, empty, number)")
    database.execute(f"INSERT INTO kept VALUES {KEPT}")
    database.execute(
        "INSERT INTO kept VALUES (2, ?, '[1, 2]', NULL, -1)", ("line\nfeed\ttab\x01\x7f\u2028",)
    )
    return database


def forms(make: Any, query: Query) -> tuple[SqlSource, SqlSource]:
    """A source that asks SQLite for JSON, and one that reads row by row (a URL with options)."""
    return make(kept=query), make("?timeout=5", kept=query)


@pytest.mark.parametrize(
    "sql",
    [
        TEXTS,
        'SELECT user_id, text AS "it\'s", more AS "a ""b""\\:c", number AS \'x\\y\' FROM kept '
        "WHERE user_id IN :user_ids",
        "WITH mine AS (SELECT * FROM kept WHERE user_id IN :user_ids) "
        "SELECT more, user_id FROM mine ORDER BY number DESC",
        "SELECT user_id FROM kept WHERE user_id IN :user_ids",
        "SELECT user_id, json_array(number, text) AS made FROM kept WHERE user_id IN :user_ids",
        "SELECT user_id, CASE WHEN number > 1 THEN json_array(text) END AS made, "
        "(SELECT json_group_array(more) FROM kept) AS all_of_them FROM kept "
        "WHERE user_id IN :user_ids",
        "SELECT user_id, text AS b, more AS B, number AS c FROM kept WHERE user_id IN :user_ids",
        "SELECT user_id, text FROM kept WHERE user_id IN :user_ids UNION ALL "
        "SELECT user_id, number FROM kept WHERE user_id IN :user_ids ORDER BY 2",
    ],
)
async def test_json_that_sqlite_makes_is_what_python_would_make(
    make: Any, kept: sqlite3.Connection, sql: str
) -> None:
    whole, rows = forms(make, Query(sql))
    users = ["2", "1", "3"]
    assert await whole.fetch_many(users, "kept") == await rows.fetch_many(users, "kept")
    assert whole._whole._queries["kept"][1] is not None


async def test_a_column_that_is_added_later_is_there(make: Any, kept: sqlite3.Connection) -> None:
    whole, rows = forms(make, Query("SELECT * FROM kept WHERE user_id IN :user_ids"))
    before = await whole.fetch_many(["1"], "kept")
    kept.execute("ALTER TABLE kept ADD COLUMN later DEFAULT 'new'")
    after = await whole.fetch_many(["1"], "kept")
    assert after == await rows.fetch_many(["1"], "kept") != before


@pytest.mark.parametrize(
    "script",
    [
        "ALTER TABLE kept RENAME COLUMN text TO renamed",
        "ALTER TABLE kept DROP COLUMN more",
        "CREATE TABLE new AS SELECT text AS more, user_id, more AS text, empty, number FROM kept; "
        "DROP TABLE kept; ALTER TABLE new RENAME TO kept",
        "ALTER TABLE kept RENAME TO other; CREATE VIEW kept AS SELECT more, user_id FROM other",
    ],
)
async def test_columns_that_change_have_their_own_names(
    make: Any, kept: sqlite3.Connection, script: str
) -> None:
    whole, rows = forms(make, Query("SELECT * FROM kept WHERE user_id IN :user_ids"))
    before = await whole.fetch_many(["1", "2"], "kept")
    kept.executescript(script)
    after = await whole.fetch_many(["1", "2"], "kept")
    assert after == await rows.fetch_many(["1", "2"], "kept") != before
    assert whole._whole._queries["kept"][1] is not None


async def test_a_file_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    path, new = tmp_path / "accounts.db", tmp_path / "new.db"

    def write(at: Path, number: int) -> None:
        with closing(sqlite3.connect(at)) as connection:
            connection.execute("CREATE TABLE t (user_id TEXT, n INTEGER)")
            connection.execute(f"INSERT INTO t VALUES ('4', {number})")
            connection.commit()

    write(path, 1)
    source = SqlSource(
        f"sqlite:///{path}", {"n": Query("SELECT * FROM t WHERE user_id IN :user_ids")}
    )
    try:
        assert await source.fetch("4", "n") == msgspec.Raw(b'[{"n":1}]')
        write(new, 2)
        new.replace(path)
        assert await source.fetch("4", "n") == msgspec.Raw(b'[{"n":2}]')
        path.unlink()
        with pytest.raises(SourceError, match="unable to open"):
            await source.fetch("4", "n")
        write(path, 3)
        assert await source.fetch("4", "n") == msgspec.Raw(b'[{"n":3}]')
    finally:
        source.close()


@pytest.mark.parametrize("value", ["NULL", "5", "'[1]'", "x'5b315d'", "1.5", "'{a:1}'", "'NaN'"])
async def test_a_column_of_json_is_json_or_an_error(
    make: Any, kept: sqlite3.Connection, value: str
) -> None:
    kept.execute(f"INSERT INTO kept (user_id, more) VALUES (3, {value})")
    query = Query(
        "SELECT user_id, more FROM kept WHERE user_id IN :user_ids", json_columns=("more",)
    )
    told: list[Any] = []
    for source in forms(make, query):
        told.append(readable(await source.fetch_many(["3"], "kept")))
    assert told[0] == told[1]


@pytest.mark.parametrize("value", ["0.1 + 0.2", "1e300", "-2.0"])
async def test_a_float_keeps_its_digits(make: Any, kept: sqlite3.Connection, value: str) -> None:
    kept.execute(f"INSERT INTO kept (user_id, number) VALUES (3, {value})")
    whole, rows = forms(make, Query(TEXTS))
    found = await whole.fetch_many(["1", "2", "3"], "kept")
    assert found == await rows.fetch_many(["1", "2", "3"], "kept")
    assert decoded(found)["3"][0]["number"] == eval(value)


@pytest.mark.parametrize("value", ["x'00ff'", "CAST(x'ff' AS TEXT)", "9e999"])
async def test_what_sqlite_has_no_json_for_is_told_as_ever(
    make: Any, kept: sqlite3.Connection, value: str
) -> None:
    kept.execute(f"INSERT INTO kept (user_id, text) VALUES (3, {value})")
    told: list[Any] = []
    for source in forms(make, Query(TEXTS)):
        try:
            told.append(readable(await source.fetch_many(["1", "3"], "kept")))
        except SourceError as error:
            told.append(str(error))
    assert told[0] == told[1]


async def test_a_query_that_is_no_part_of_another_is_read_row_by_row(
    make: Any, kept: sqlite3.Connection
) -> None:
    whole, rows = forms(make, Query("SELECT user_id, text FROM kept WHERE user_id IN :user_ids;"))
    for _ in range(2):
        assert await whole.fetch_many(["1"], "kept") == await rows.fetch_many(["1"], "kept")
    assert whole._whole._queries["kept"][1] is None


async def test_more_users_than_one_statement_names(make: Any, database: sqlite3.Connection) -> None:
    users = [str(number) for number in range(1, 1_301)]
    database.executemany("INSERT INTO orders (user_id, symbol) VALUES (?, 'X')", zip(users[2:]))
    source = make(orders=Query("SELECT user_id, symbol FROM orders WHERE user_id IN :user_ids"))
    values = await source.fetch_many(users, "orders")
    assert len(values) == 1_300
    assert {bytes(value) for value in list(values.values())[2:]} == {b'[{"symbol":"X"}]'}


@pytest.fixture
def converters() -> Iterator[None]:
    """SQLite has no decimals and times of its own; this driver's converters make some."""
    before = dict(sqlite3.converters)
    sqlite3.register_converter("AMOUNTTEXT", lambda raw: Decimal(raw.decode()))
    sqlite3.register_converter("MOMENT", lambda raw: datetime.fromisoformat(raw.decode()))
    yield
    sqlite3.converters.clear()
    sqlite3.converters.update(before)


async def test_decimals_and_times(
    make: Any, database: sqlite3.Connection, converters: None
) -> None:
    database.executescript(
        """
        CREATE TABLE t (user_id TEXT, amount AMOUNTTEXT, at MOMENT, plain AMOUNTTEXT);
        INSERT INTO t VALUES ('1', '1E-8', '2025-11-20 07:30:00.123999', NULL),
                             ('1', '-1.50E+3', '2025-11-20T08:30:00.123+01:00', '0E-8'),
                             ('2', 'NaN', NULL, NULL);
        """
    )
    query = Query("SELECT * FROM t WHERE user_id IN :user_ids")
    source = make("?detect_types=1", t=query)
    at = 1_763_623_800_123
    assert decoded(await source.fetch_many(["1"], "t")) == {
        "1": [
            {"amount": "0.00000001", "at": at, "plain": None},
            {"amount": "-1500", "at": at, "plain": "0.00000000"},
        ]
    }
    with pytest.raises(SourceError, match="t: column amount holds NaN"):
        await source.fetch("2", "t")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [("1e999", "column x holds inf"), ("'[1'", "column x is not JSON"), ("'1 2'", "not JSON")],
)
async def test_values_that_cannot_stand_in_json(make: Any, value: str, complaint: str) -> None:
    source = make(t=Query(f"SELECT {value} AS x, :user_id AS user", json_columns=("x",)))
    with pytest.raises(SourceError, match=complaint):
        await source.fetch("1", "t")


async def test_several_rows_where_one_was_promised(make: Any) -> None:
    source = make(orders=Query(ORDERS.sql, single=True))
    assert decoded({"2": await source.fetch("2", "orders")})["2"]["symbol"] == "ETHUSDT"
    with pytest.raises(SourceError, match="several rows"):
        await source.fetch("1", "orders")


async def test_an_error_is_one_line_without_parameters_and_goes_by(
    make: Any, database: sqlite3.Connection
) -> None:
    source = make(orders=ORDERS)
    await source.check()
    database.execute("ALTER TABLE orders RENAME TO hidden")
    with pytest.raises(SourceError) as caught:
        await source.fetch("the secret user", "orders")
    assert str(caught.value) == "no such table: orders"
    assert caught.value.__cause__ is None
    database.execute("ALTER TABLE hidden RENAME TO orders")
    assert bytes(await source.fetch("none", "orders")) == b"[]"


async def test_a_reader_cannot_write(make: Any, database: sqlite3.Connection) -> None:
    source = make(
        orders=Query("DELETE FROM orders WHERE user_id IN :user_ids RETURNING user_id, symbol")
    )
    with pytest.raises(SourceError, match="readonly"):
        await source.fetch("1", "orders")
    assert database.execute("SELECT count(*) FROM orders").fetchone() == (3,)


async def test_a_reader_does_not_wait_for_the_writer(
    make: Any, database: sqlite3.Connection
) -> None:
    source = make(orders=ORDERS)
    database.execute("BEGIN IMMEDIATE")
    database.execute("UPDATE orders SET symbol = 'NEW'")
    assert "ETHUSDT" in bytes(await source.fetch("2", "orders")).decode()
    database.execute("COMMIT")
    assert "NEW" in bytes(await source.fetch("2", "orders")).decode()


async def test_nothing_is_held_between_calls_nor_after_a_cancellation(make: Any) -> None:
    slow = Query(
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 2000000) "
        "SELECT max(n) AS n, :user_id AS user FROM c"
    )
    source = make(threads=1, slow=slow, orders=ORDERS)
    with trio.move_on_after(0.02) as scope:
        await source.fetch("1", "slow")
    assert scope.cancelled_caught
    assert source._limiter.borrowed_tokens == 1  # The thread goes on, and counts.
    assert decoded(await source.fetch_many(["2"], "orders"))["2"]
    assert source._limiter.borrowed_tokens == 0
    assert source._engine.pool.checkedout() == 0


async def test_a_statement_ends_at_its_deadline(tmp_path: Path, database: Any) -> None:
    endless = Query(
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) "
        "SELECT max(n) AS n FROM c WHERE :user_id IS NOT NULL"
    )
    queries = {"endless": endless, "orders": ORDERS}
    source = SqlSource(url(tmp_path), queries, threads=1, statement_timeout_s=0.1)
    with trio.fail_after(30):
        with pytest.raises(SourceError, match="interrupted") as caught:
            await source.fetch("1", "endless")
    assert caught.value.retryable
    assert decoded(await source.fetch_many(["2"], "orders"))["2"]
    source.close()


async def test_more_fetches_than_threads(make: Any) -> None:
    source = make(threads=2, orders=ORDERS)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(source.fetch_many, ["1", "2"], "orders")
        await trio.testing.wait_all_tasks_blocked()
        assert source._limiter.borrowed_tokens <= 2
    assert source._engine.pool.checkedout() == 0


async def test_a_slow_type_leaves_a_thread_to_the_others(make: Any) -> None:
    endless = Query(
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 3000000) "
        "SELECT max(n) AS n, :user_id AS user FROM c"
    )
    source = make(threads=2, slow=endless, orders=ORDERS)
    ended: list[str] = []

    async def fetch(user: str, data_type: str) -> None:
        await source.fetch(user, data_type)
        ended.append(data_type)

    async with trio.open_nursery() as nursery:
        for user in range(3):
            nursery.start_soon(fetch, str(user), "slow")
        await trio.testing.wait_all_tasks_blocked()
        await fetch("1", "orders")
        with trio.move_on_after(0):  # waits for a thread of its type, and leaves none taken
            await source.fetch("1", "slow")
    assert ended == ["orders", "slow", "slow", "slow"]
    assert source._limiter.borrowed_tokens == 0
    with trio.fail_after(30):
        await source.fetch("1", "slow")


def test_how_many_users_a_call_may_name(make: Any) -> None:
    one = Query("SELECT user_id FROM orders WHERE user_id = :user_id")
    source = make(orders=ORDERS, pnl=one)
    assert source.batch_size("orders") is source.batch_size("balance") is None
    assert source.batch_size("pnl") == 1
    assert source.data_types == ("orders", "pnl")


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ("sekrit nonsense", "cannot be read"),
        ("sqlite://", "names no file"),
        ("nosuch+sekrit://u:sekrit@h/d", "no driver"),
        ("postgresql+nosuchdriver://u:sekrit@h/d", "no driver"),
        ("sqlite:////no/such/file.db", "no database file"),
        ("sqlite:////tmp", "no database file"),
    ],
)
async def test_a_wrong_url(bad: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        await SqlSource(bad, {"orders": ORDERS}).check()
    assert "u:sekrit" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "accounts.db").write_bytes(b"not a database, but long enough for one" * 100)
    source = SqlSource(url(tmp_path), {"orders": ORDERS})
    with pytest.raises(ConfigurationError, match="not a database"):
        await source.check()
    source.close()


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        (Query("SELECT :user_id, :user_ids"), "must name :user_ids"),
        (Query("SELECT user_id FROM orders WHERE user_id = :user_id AND id = :id"), "must name"),
        (Query("SELECT symbol FROM orders WHERE user_id IN :user_ids"), "no column user_id"),
        (Query(ORDERS.sql, json_columns=("details",)), "no column details"),
        (Query("SELECT * FROM balances WHERE user_id IN :user_ids"), "no such table: balances"),
        (Query("SELECT user_id, symbol, symbol FROM orders WHERE user_id IN :user_ids"), "two col"),
    ],
)
async def test_a_wrong_query(make: Any, query: Query, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        await make(orders=query).check()
    assert "the query of orders" in str(caught.value)


async def test_a_password_never_shows(make: Any) -> None:
    source = make(orders=ORDERS)
    source._url = source._url.set(password="orders")
    with pytest.raises(ConfigurationError) as caught:
        await make(balance=Query("SELECT user_id FROM sekrit WHERE user_id = :user_id")).check()
    assert "sekrit" in str(caught.value)
    bad = make(balance=Query("SELECT user_id FROM sekrit WHERE user_id = :user_id"))
    bad._url = bad._url.set(password="sekrit")
    with pytest.raises(ConfigurationError) as caught:
        await bad.check()
    assert "no such table: ***" in str(caught.value)
