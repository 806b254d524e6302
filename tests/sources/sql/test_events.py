"""Queries of events: each new row once, in order, whatever fails between two reads."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from harness.mariadb_server import MariaDbServer
from harness.pgbouncer import PgBouncer, pooling
from harness.postgres_server import PostgresServer
from harness.support import PATIENCE_S

from trading_push import PostgresSource, Principal, open_push_service
from trading_push.errors import ConfigurationError, SourceError
from trading_push.settings.sources import Query
from trading_push.sources.base import NewEvents
from trading_push.sources.sql import events
from trading_push.sources.sql.source import SqlSource
from trading_push.testing import MemoryTransport, peer
from trading_push.topics import Channel

SQL = (
    "SELECT user_id, fill_id, price FROM fills "
    "WHERE user_id IN :user_ids AND fill_id > :after ORDER BY fill_id"
)
TABLE = "CREATE TABLE fills (user_id {user}, fill_id {cursor}, price numeric)"
ONE = SQL.replace("IN :user_ids", "= :user_id")
Execute = Callable[[str], object]


@pytest.fixture(scope="module")
def pooler(postgres: PostgresServer) -> Iterator[PgBouncer]:
    with pooling(postgres) as running:
        yield running


@pytest.fixture(params=["sqlite", "postgres", "psycopg2", "pgbouncer", "mariadb"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Execute]]:
    """The URL of an empty database, and what runs a statement in it."""
    if request.param == "sqlite":
        connection = sqlite3.connect(tmp_path / "fills.db", isolation_level=None)
        connection.execute("CREATE TABLE other (a)")
        yield f"sqlite:///{tmp_path / 'fills.db'}", connection.execute
        connection.close()
        return
    name = re.sub(r"\W", "_", request.node.name)[:50]
    if request.param == "mariadb":
        mariadb: MariaDbServer = request.getfixturevalue("mariadb")
        mariadb.create_database(name)
        yield mariadb.url(name), lambda sql: mariadb.admin(sql, name)
        mariadb.admin(f"DROP DATABASE `{name}`")
        return
    postgres: PostgresServer = request.getfixturevalue("postgres")
    postgres.create_database(name, "SELECT 1")
    urls = request.getfixturevalue("pooler") if request.param == "pgbouncer" else postgres
    url = urls.url(name)
    if request.param == "psycopg2":
        pytest.importorskip("psycopg2")
        url = url.replace("+psycopg:", "+psycopg2:")
    yield url, lambda sql: postgres.admin(sql, name)
    postgres.admin(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def make(database: tuple[str, Execute]) -> Iterator[Any]:
    made = []

    def make(cursor: str = "bigint", sql: str = SQL, **options: Any) -> tuple[SqlSource, Execute]:
        url, execute = database
        execute(TABLE.format(user="text", cursor=cursor))
        made.append(SqlSource(url, {"fills": Query(sql, cursor="fill_id", **options)}))
        return made[-1], execute

    yield make
    for source in made:
        source.close()


async def read(source: SqlSource, *users: str) -> dict[str, Any]:
    """Read and take the new events: their cursors, or the text of an error."""
    told: dict[str, Any] = {}
    for user, answer in (await source.fetch_many(users, "fills")).items():
        if isinstance(answer, SourceError):
            told[user] = str(answer)
        else:
            assert isinstance(answer, NewEvents)
            assert answer.taken()
            told[user] = [msgspec.json.decode(each)["fill_id"] for each in answer.events]
    return told


async def test_each_new_row_is_one_event_of_its_user(make: Any) -> None:
    source, execute = make()
    await source.check()
    assert source.event_types == ("fills",)
    execute("INSERT INTO fills VALUES ('a', 5, 1), ('a', 9, 1), ('b', 700, 1)")
    assert await read(source, "a", "b", "new") == {"a": [], "b": [], "new": []}
    execute("INSERT INTO fills VALUES ('b', 701, 1), ('a', 702, 1), ('a', 710, 1), ('new', 703, 1)")
    assert await read(source, "b", "a", "new") == {"b": [701], "a": [702, 710], "new": [703]}
    assert await read(source, "b", "a", "new") == {"b": [], "a": [], "new": []}


async def test_cursors_are_kept_of_those_who_were_read_last(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "CURSORS", 2)
    source, execute = make()
    for user in "abac":
        await read(source, user)
    execute("INSERT INTO fills VALUES ('a', 1, 1), ('b', 2, 1), ('c', 3, 1)")
    assert await read(source, "a", "c") == {"a": [1], "c": [3]}
    assert await read(source, "b") == {"b": []}  # begins anew


async def test_history_comes_first(make: Any) -> None:
    source, execute = make(sql=SQL + ";\n", history=2)
    execute("INSERT INTO fills VALUES ('a', 5, 1), ('a', 9, 1), ('a', 10, 1), ('b', 3, 1)")
    assert await read(source, "a", "b") == {"a": [9, 10], "b": [3]}
    execute("INSERT INTO fills VALUES ('a', 11, 1)")
    assert await read(source, "a", "b") == {"a": [11], "b": []}


async def test_an_answer_that_is_not_taken_loses_and_doubles_none(make: Any) -> None:
    source, execute = make()
    await read(source, "a")
    execute("INSERT INTO fills VALUES ('a', 1, 1), ('a', 2, 1)")
    lost = await source.fetch("a", "fills")
    execute("INSERT INTO fills VALUES ('a', 3, 1)")
    assert await read(source, "a") == {"a": [1, 2, 3]}
    assert not lost.taken()  # it comes too late
    assert await read(source, "a") == {"a": []}


async def test_texts_and_equal_cursors(make: Any) -> None:
    source, execute = make("text", as_text=("fill_id",))
    await read(source, "a")
    execute("INSERT INTO fills VALUES ('a', '01A', 1), ('a', '01A', 2), ('a', '01B', 1)")
    assert await read(source, "a") == {"a": ["01A", "01A", "01B"]}
    execute("INSERT INTO fills VALUES ('a', '01B', 2), ('a', '01C', 1)")
    assert await read(source, "a") == {"a": ["01C"]}


@pytest.mark.parametrize("cursor", ["numeric(20)", "numeric(20, 2)", "numeric(30)"])
async def test_a_decimal_cursor_counts_as_a_number(make: Any, cursor: str) -> None:
    source, execute = make(cursor)
    execute("INSERT INTO fills VALUES ('a', 9, 1), ('b', 99, 1)")
    assert await read(source, "a", "b") == {"a": [], "b": []}
    execute("INSERT INTO fills VALUES ('a', 10, 1), ('b', 100, 1), ('a', 101, 1)")
    told = await read(source, "a", "b")
    assert {user: [round(float(each)) for each in cursors] for user, cursors in told.items()} == {
        "a": [10, 101],
        "b": [100],
    }
    assert await read(source, "a", "b") == {"a": [], "b": []}


async def test_a_fraction_is_no_cursor(make: Any) -> None:
    source, execute = make("numeric(20, 2)")
    execute("INSERT INTO fills VALUES ('a', 9.50, 1)")
    assert "a cursor is a whole number or a text" in (await read(source, "a"))["a"]


async def test_a_wrong_cursor_is_an_error_of_its_user(make: Any) -> None:
    sql = SQL.replace("fill_id > :after", "(fill_id > :after OR fill_id IS NULL)")
    source, execute = make(sql=sql)
    await read(source, "a", "b")
    execute("INSERT INTO fills VALUES ('a', 1, 1), ('a', NULL, 1), ('b', 2, 1)")
    told = await read(source, "a", "b")
    assert "cursor fill_id holds NULL" in told["a"]
    assert told["b"] == [2]
    execute("DELETE FROM fills WHERE fill_id IS NULL")
    assert await read(source, "a", "b") == {"a": [1], "b": []}


async def test_rows_out_of_order_are_an_error(make: Any) -> None:
    source, execute = make(sql=SQL.replace("ORDER BY fill_id", "ORDER BY fill_id DESC"))
    await read(source, "a")
    execute("INSERT INTO fills VALUES ('a', 1, 1), ('a', 2, 1)")
    assert "end the query with ORDER BY fill_id" in (await read(source, "a"))["a"]


COLLATIONS = {
    "sqlite": ("text COLLATE NOCASE", "text COLLATE BINARY"),
    "postgresql": ('text COLLATE "en-x-icu"', 'text COLLATE "C"'),
    "mysql": ("varchar(40)", "varchar(40) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"),
}


async def test_texts_that_the_database_sorts_otherwise_are_an_error(
    make: Any, database: tuple[str, Execute]
) -> None:
    otherwise, _ = COLLATIONS[database[0].partition(":")[0].partition("+")[0]]
    source, execute = make(otherwise)
    await read(source, "a", "b", "c")
    execute("INSERT INTO fills VALUES ('a', 'a', 1), ('b', 'x', 1)")
    assert await read(source, "a", "b") == {"a": ["a"], "b": ["x"]}
    execute("INSERT INTO fills VALUES ('a', 'B', 1), ('b', 'xx', 1)")
    for _ in range(2):  # none of them is taken as had
        assert "by its characters (COLLATE" in (await read(source, "a"))["a"]
    assert await read(source, "b") == {"b": ["xx"]}
    execute("INSERT INTO fills VALUES ('c', 'a', 1), ('c', 'B', 1)")
    assert "a text that sorts by its characters" in (await read(source, "c"))["c"]


async def test_texts_that_it_sorts_by_characters_are_right(
    make: Any, database: tuple[str, Execute]
) -> None:
    _, by_characters = COLLATIONS[database[0].partition(":")[0].partition("+")[0]]
    source, execute = make(by_characters)
    await read(source, "a")
    for cursor in ("B", "a", "a-b", "ab", "\u00e9", "\u4e00", "\uffee", "\U0001f600"):
        execute(f"INSERT INTO fills VALUES ('a', '{cursor}', 1)")
        assert await read(source, "a") == {"a": [cursor]}


async def test_a_number_that_is_compared_as_a_text_is_an_error(tmp_path: Path) -> None:
    sql = SQL.replace("fill_id,", "CAST(fill_id AS integer) AS fill_id,")
    sql = sql.replace("BY fill_id", "BY fills.fill_id")
    with sqlite3.connect(tmp_path / "fills.db", isolation_level=None) as connection:
        connection.execute(TABLE.format(user="text", cursor="text"))
        source = SqlSource(
            f"sqlite:///{tmp_path / 'fills.db'}", {"fills": Query(sql, cursor="fill_id")}
        )
        await read(source, "a")
        connection.execute("INSERT INTO fills VALUES ('a', '100', 1)")
        assert await read(source, "a") == {"a": [100]}
        connection.execute("INSERT INTO fills VALUES ('a', '95', 1)")
        assert "cast it to an integer" in (await read(source, "a"))["a"]
        source.close()
    connection.close()


@pytest.mark.parametrize(
    ("query", "advice"),
    [
        (Query("SELECT 1 WHERE user_id IN :user_ids"), "without a cursor: name the column"),
        (Query("SELECT 1 WHERE '' IN :user_ids", cursor="fill_id"), "AND fill_id > :after"),
        (Query(SQL, cursor="fill_id", single=True), "remove single and empty"),
    ],
)
def test_a_query_without_what_it_needs_is_refused(query: Query, advice: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(advice)):
        SqlSource("sqlite:///a.db", {"fills": query})


async def authenticate(token: str) -> Principal:
    return Principal(token)


async def fill_id(client: MemoryTransport) -> int:
    """Wait for the next event."""
    while "data" not in (push := await client.push()):
        pass
    return int(push["data"]["fill_id"])


async def test_events_reach_the_client_once(make: Any) -> None:
    source, execute = make()
    execute("INSERT INTO fills VALUES ('4', 1, 1)")

    fills = Channel("fills", "events", interval_s=0.1)
    with trio.fail_after(PATIENCE_S):
        async with (
            open_push_service(source, authenticate=authenticate, channels=[fills]) as service,
            peer(service, "4") as four,
        ):
            await four.subscribe("fills")
            assert (await four.push())["reason"] == "quiet"  # the source has answered
            execute("INSERT INTO fills VALUES ('4', 2, 1), ('5', 3, 1), ('4', 4, 1)")
            told = [await fill_id(four) for _ in range(2)]
            execute("ALTER TABLE fills RENAME TO away")
            execute("INSERT INTO away VALUES ('4', 5, 1)")
            while (await four.next())[0].get("reason") != "source_error":
                pass
            execute("ALTER TABLE away RENAME TO fills")
            execute("INSERT INTO fills VALUES ('4', 6, 1)")
            told += [await fill_id(four) for _ in range(2)]
    assert told == [2, 4, 5, 6]


@pytest.mark.parametrize(
    ("channel", "advice"),
    [
        (Channel("alerts", "events", interval_s=1), "cannot be polled: only an SQL query"),
        (Channel("fills", "events"), "give it kind"),
    ],
)
async def test_channels_that_do_not_fit_are_refused(
    channel: Channel, advice: str, tmp_path: Path
) -> None:
    source = SqlSource(f"sqlite:///{tmp_path / 'a.db'}", {"fills": Query(SQL, cursor="fill_id")})
    with pytest.raises(ConfigurationError, match=advice):
        async with open_push_service(source, authenticate=authenticate, channels=[channel]):
            pass


async def test_a_notification_has_events_read_at_once(postgres: PostgresServer) -> None:
    name = "notified_events"
    postgres.create_database(name, TABLE.format(user="text", cursor="bigint"))
    queries = {"fills": Query(SQL, cursor="fill_id")}
    source = PostgresSource(postgres.url(name), queries, "trading_push")
    fills = Channel("fills", "events", interval_s=600)
    try:
        with trio.fail_after(PATIENCE_S):
            async with (
                open_push_service(source, authenticate=authenticate, channels=[fills]) as service,
                peer(service, "4") as four,
            ):
                await four.subscribe("fills")
                assert (await four.push())["reason"] == "quiet"
                notify = """SELECT pg_notify('trading_push', '{"user": 4, "type": "fills"}')"""
                postgres.admin(f"INSERT INTO fills VALUES ('4', 1, 1); {notify}", name)
                assert await fill_id(four) == 1
    finally:
        source.close()
        postgres.admin(f'DROP DATABASE "{name}" WITH (FORCE)')


async def test_a_query_of_one_user(make: Any) -> None:
    source, execute = make(sql=ONE)
    await source.check()
    execute("INSERT INTO fills VALUES ('a', 5, 1), ('b', 9, 1)")
    assert await read(source, "a", "b") == {"a": [], "b": []}
    execute("INSERT INTO fills VALUES ('b', 10, 1), ('a', 6, 1), ('a', 11, 1)")
    assert await read(source, "b", "a") == {"b": [10], "a": [6, 11]}
    assert await read(source, "b", "a") == {"b": [], "a": []}
