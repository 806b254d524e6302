"""Rows reach the user whose they are, or are an error; one user's trouble is that user's alone."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from sqlalchemy import event

from harness.postgres_server import PostgresServer

from trading_push import ConfigurationError, SourceError, SqlSource
from trading_push.settings.sources import Query
from trading_push.sources.base import NewEvents

UUID = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
SQL = f"""
CREATE EXTENSION citext;
CREATE TABLE padded (user_id char(10), n int);
INSERT INTO padded VALUES ('bob', 1), ('carol', 2);
CREATE TABLE uuids (user_id uuid, n int);
INSERT INTO uuids VALUES ('{UUID}', 1);
CREATE TABLE caseless (user_id citext, n int);
INSERT INTO caseless VALUES ('bob', 1), ('Élan', 2);
CREATE TABLE numbers (user_id bigint, n int);
INSERT INTO numbers VALUES (4, 1), (5, 2), (6, 3), (7, 4);
CREATE TABLE amounts (user_id numeric(10, 2), n int);
INSERT INTO amounts VALUES (4, 1);
CREATE TABLE moments (user_id bigint, at timestamptz, day date);
INSERT INTO moments VALUES (4, '2025-11-20 08:30:00+00', '2025-11-20'),
    (5, '12025-01-01 00:00:00+00', NULL), (6, 'infinity', NULL), (7, NULL, '-infinity'),
    (8, '4000-01-01 00:00:00+00 BC', NULL);
CREATE FUNCTION strict(who bigint) RETURNS int LANGUAGE plpgsql AS $$
BEGIN IF who = 5 THEN RAISE EXCEPTION 'no account %', who; END IF; RETURN who; END $$;
"""


def read(table: str, columns: str = "n", **options: Any) -> Query:
    return Query(f"SELECT user_id, {columns} FROM {table} WHERE user_id IN :user_ids", **options)


@pytest.fixture(scope="module")
def database(postgres: PostgresServer) -> Iterator[str]:
    postgres.create_database("whose", SQL)
    yield "whose"
    postgres.admin("DROP DATABASE whose WITH (FORCE)")


@pytest.fixture
def make(postgres: PostgresServer, database: str) -> Iterator[Any]:
    made = []

    def make(query: Query | str, **options: Any) -> SqlSource:
        query = query if isinstance(query, Query) else read(query)
        made.append(SqlSource(postgres.url(database), {"balance": query}, threads=2, **options))
        return made[-1]

    yield make
    for source in made:
        source.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Any]:
    """A source over an SQLite file that was made by a script."""
    made = []

    def make(script: str, query: Query, **options: Any) -> SqlSource:
        path = tmp_path / "accounts.db"
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(script)
        url = f"sqlite:///{path}" + options.pop("url", "")
        made.append(SqlSource(url, {"balance": query}, **options))
        return made[-1]

    yield make
    for source in made:
        source.close()


def told(values: Any) -> dict[str, Any]:
    return {
        user: str(each) if isinstance(each, SourceError) else each and msgspec.json.decode(each)
        for user, each in values.items()
    }


async def fetched(source: SqlSource, *users: str) -> dict[str, Any]:
    return told(await source.fetch_many(users, "balance"))


# --- ids --------------------------------------------------------------------------------------


async def test_ids_that_a_column_spells_in_its_own_way(make: Any) -> None:
    for table, kind, expected in (
        ("padded", "text", {"bob": [{"n": 1}], "carol": [{"n": 2}], "dora": []}),
        ("uuids", "text", {UUID: [{"n": 1}]}),
        ("uuids", "uuid", {UUID.upper(): [{"n": 1}]}),
        ("uuids", "uuid", {UUID.replace("-", ""): [{"n": 1}]}),
        ("caseless", "caseless", {"BOB": [{"n": 1}], "bob": [{"n": 1}], "ÉLAN": [{"n": 2}]}),
        ("numbers", "text", {"4": [{"n": 1}], "10": []}),
        ("numbers", "integer", {"4": [{"n": 1}], "10": []}),
        ("amounts", "text", {"4": [{"n": 1}]}),
    ):
        assert await fetched(make(table, user_id=kind), *expected) == expected


async def test_rows_of_an_id_that_is_spelt_otherwise_are_an_error_of_whoever_has_none(
    make: Any,
) -> None:
    found = await fetched(make("caseless"), "BOB", "ÉLAN", "zoë")
    assert "user_id 'bob' when 'BOB' was asked for: set database.user_id" in found["BOB"]
    assert "user_id 'Élan' when 'ÉLAN' was asked for" in found["ÉLAN"]
    assert found["zoë"] == []
    found = await fetched(make("numbers"), "04", "5")
    assert "user_id 4 when '04' was asked for" in found["04"]
    assert found["5"] == [{"n": 2}]


async def test_rows_of_an_id_like_no_other_are_an_error_of_all_without_rows(make: Any) -> None:
    query = "SELECT 'someone' AS user_id, n FROM numbers WHERE user_id IN :user_ids AND n = 1"
    found = await fetched(make(Query(query)), "4", "5")
    assert "user_id 'someone' when '4'" in found["4"]
    assert "user_id 'someone' when '5'" in found["5"]
    null = Query("SELECT NULL::text AS user_id, n FROM numbers WHERE user_id IN :user_ids")
    assert "user_id None when '4'" in (await fetched(make(null), "4"))["4"]
    array = Query("SELECT ARRAY[user_id] AS user_id FROM numbers WHERE user_id IN :user_ids")
    assert "user_id '[4]' when '4'" in (await fetched(make(array), "4"))["4"]


async def test_a_query_for_one_user_is_verified_too(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    alike = "FROM caseless WHERE user_id = :user_id"
    source = make(Query(f"SELECT user_id, n {alike}"))
    await source.check()
    assert caplog.messages == []
    assert await fetched(source, "bob", "nobody") == {"bob": [{"n": 1}], "nobody": []}
    with pytest.raises(SourceError, match="user_id 'bob' when 'BOB' was asked for"):
        await source.fetch("BOB", "balance")
    source = make(Query(f"SELECT n {alike}"))
    await source.check()
    assert len(caplog.messages) == 1
    assert "balance的查询结果没有user_id列" in caplog.messages[0]
    assert await fetched(source, "BOB") == {"BOB": [{"n": 1}]}


async def test_an_id_that_is_refused_reaches_no_database() -> None:
    for kind, users in (
        ("integer", ["4abc", " 4", "04", "4.0", "-1", "", "٤"]),
        ("uuid", ["4", UUID[:-1], UUID + "0", "g" + UUID[1:]]),
    ):
        nowhere = "postgresql+psycopg://reader@127.0.0.1:1/x"
        source = SqlSource(nowhere, {"balance": read("numbers")}, user_id=kind)  # type: ignore[arg-type]
        found = await source.fetch_many(users, "balance")
        assert list(found) == users
        for error in found.values():
            assert isinstance(error, SourceError)
            assert (error.reason, error.retryable) == ("refused", False)
        with pytest.raises(SourceError, match="as the ids of this source are"):
            await source.fetch(users[0], "balance")
        source.close()


@pytest.mark.parametrize("kind", ["text", "caseless"])
async def test_an_id_that_no_driver_can_send_is_refused_alone(make: Any, kind: str) -> None:
    source = make("caseless", user_id=kind)
    bad = ["a\0", "\0", "\ud800", "bob\0"]
    found = await source.fetch_many(["bob", *bad, "nobody"], "balance")
    assert told(found) == {
        **dict.fromkeys(bad, "the user's id holds a NUL, or half a surrogate pair"),
        **{"bob": [{"n": 1}], "nobody": []},
    }
    assert {found[user].reason for user in bad} == {"refused"}
    assert list(await source.fetch_many(bad, "balance")) == bad  # without a query


def test_a_kind_of_ids_that_there_is_not() -> None:
    with pytest.raises(ConfigurationError, match="'number' is not a kind of user ids"):
        SqlSource("sqlite:////x.db", {}, user_id="number")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", ["", "?timeout=5"])
async def test_a_file_compares_in_its_own_way_too(file: Any, options: str) -> None:
    script = """
        CREATE TABLE t (user_id TEXT COLLATE NOCASE, n INTEGER);
        INSERT INTO t VALUES ('bob', 1), ('carol', 2);
    """
    found = await fetched(file(script, read("t"), url=options), "BOB", "carol")
    assert "user_id 'bob' when 'BOB'" in found["BOB"]
    assert found["carol"] == [{"n": 2}]


TOGETHER = [
    # How the column compares; who has rows; who are asked for together.
    ("sqlite", "text COLLATE NOCASE", "bob", ["bob", "BOB", "Bob", "carol"]),
    ("sqlite", "text COLLATE RTRIM", "bob", ["bob", "bob ", "bob  ", "carol"]),
    ("sqlite", "integer", "4", ["4", "04", " 4", "4.0", "4e0", "5"]),
    ("postgres", "citext", "bob", ["BOB", "bob", "carol"]),
    ("postgres", "char(10)", "bob", ["bob", "bob ", "carol"]),
    ("postgres", "bigint", "4", ["4", "04", " 4", "+4", "5"]),
    ("postgres", "numeric", "4", ["4", "4.0", "40e-1", "5"]),
    ("postgres", "text", "bob", ["bob", "BOB", "bob ", "carol"]),
    ("mariadb", "varchar(20)", "bob", ["bob", "BOB", "bob ", "b\u00f3b", "B\u00d3B ", "carol"]),
    ("mariadb", "varchar(20)", "stra\u00dfe", ["stra\u00dfe", "strase", "STRASE", "carol"]),
    ("mariadb", "varchar(20)", "\U0001f600", ["\U0001f600", "\U0001f408", "carol"]),
    ("mariadb", "int", "4", ["4", "4abc", "04", "4.0", "4e0", "5"]),
    ("mariadb", "bigint", "9007199254740992", ["9007199254740992", "9007199254740993"]),
]


@pytest.mark.parametrize(("kind", "column", "owner", "users"), TOGETHER)
async def test_ids_that_a_column_takes_for_the_same_are_as_if_asked_for_alone(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
    column: str,
    owner: str,
    users: list[str],
) -> None:
    tables = [
        f"CREATE TABLE t (user_id {column}, fill_id int)",
        f"INSERT INTO t VALUES ('{owner}', 1)",
    ]
    if kind == "sqlite":
        with closing(sqlite3.connect(tmp_path / "t.db")) as connection:
            connection.executescript(";".join(tables))
        url = f"sqlite:///{tmp_path / 't.db'}"
    elif kind == "postgres":
        postgres = request.getfixturevalue("postgres")
        postgres.create_database("t", ";".join(("CREATE EXTENSION citext", *tables)))
        url = postgres.url("t")
    else:
        mariadb = request.getfixturevalue("mariadb")
        tables[0] += " CHARSET utf8mb4 COLLATE utf8mb4_general_ci"
        mariadb.create_database("t", *tables)
        url = mariadb.url("t")
    events = "SELECT * FROM t WHERE user_id IN :user_ids AND fill_id > :after ORDER BY fill_id"
    queries = {"orders": read("t", "fill_id"), "fills": Query(events, cursor="fill_id", history=1)}
    source = SqlSource(url, queries)

    async def answers(data_type: str, *users: str) -> dict[str, Any]:
        return {
            user: told({0: each.events[0] if each.events else None})[0]
            if isinstance(each, NewEvents)
            else told({0: each})[0]
            for user, each in (await source.fetch_many(users, data_type)).items()
        }

    try:
        for data_type in queries:
            alone: dict[str, Any] = {}
            for user in users:
                alone |= await answers(data_type, user)
            for order in (users, users[::-1]):
                assert await answers(data_type, *order) == alone, data_type
            assert alone[owner]
            assert not alone[users[-1]]
    finally:
        source.close()
        if kind == "postgres":
            postgres.admin("DROP DATABASE t WITH (FORCE)")
        elif kind == "mariadb":
            mariadb.admin("DROP DATABASE t")


async def test_users_without_rows_are_not_read_twice(make: Any) -> None:
    source = make("numbers")
    statements: list[str] = []
    event.listen(source._engine, "before_cursor_execute", lambda *its: statements.append(its[2]))
    for users, selects in ((["4", "5", "10", "44"], 1), (["4", "04", "10"], 2)):
        statements.clear()
        await source.fetch_many(users, "balance")
        assert sum("SELECT" in each for each in statements) == selects


# --- one user's trouble -------------------------------------------------------------------------


async def test_what_one_user_has_wrong_is_that_user_s_error(make: Any) -> None:
    single = Query(read("(VALUES (4, 1), (5, 2), (5, 3)) AS t(user_id, n)").sql, single=True)
    found = await fetched(make(single), "4", "5")
    assert found["4"] == {"n": 1}
    assert "several rows for one user" in found["5"]
    for column, complaint in (
        ("CASE user_id WHEN 5 THEN 'NaN'::numeric ELSE 1 END", "holds NaN"),
        ("CASE user_id WHEN 5 THEN 'NaN'::float8 ELSE 1 END", "holds nan"),
        ("CASE user_id WHEN 5 THEN '-infinity'::float8 ELSE 1 END", "holds -inf"),
        ("CASE user_id WHEN 5 THEN ARRAY['NaN'::float8] ELSE ARRAY[1.5] END", "holds nan"),
        ("CASE user_id WHEN 5 THEN '[1' ELSE '[1]' END", "is not JSON"),
    ):
        query = read("numbers", f"{column} AS x")
        json = Query(query.sql, json_columns=("x",))
        found = await fetched(make(json if "JSON" in complaint else query), "4", "5", "6")
        assert complaint in found["5"], column
        assert found["4"] == found["6"] != []
        assert len(found["4"]) == 1


async def test_a_row_that_psycopg_cannot_read_is_that_user_s_error(make: Any) -> None:
    found = await fetched(make(read("moments", "at, day")), "4", "5", "6", "7", "8", "9")
    assert found["4"] == [{"at": 1_763_627_400_000, "day": "2025-11-20"}]
    for user, complaint in (("5", "too large"), ("6", "infinity"), ("7", "small"), ("8", "BC")):
        assert "balance: a row cannot be read" in found[user]
        assert complaint in found[user].lower() or complaint in found[user], found[user]
    assert found["9"] == []
    alone = Query("SELECT at FROM moments WHERE user_id = :user_id")
    found = await fetched(make(alone), "4", "5")
    assert found["4"] == [{"at": 1_763_627_400_000}]
    assert "cannot be read" in found["5"]


async def test_infinity_is_no_time_with_psycopg2_either(postgres: Any, database: str) -> None:
    pytest.importorskip("psycopg2")
    url = postgres.url(database).replace("+psycopg", "+psycopg2")
    source = SqlSource(url, {"balance": read("moments", "at")})
    try:
        found = await fetched(source, "4", "6")
        assert found["4"] == [{"at": 1_763_627_400_000}]
        assert "column at holds an infinity" in found["6"]
        with pytest.raises(SourceError, match="year"):
            await source.fetch_many(["4", "5"], "balance")
    finally:
        source.close()


async def test_text_that_is_not_utf_8_is_an_error_of_the_call(
    make: Any, postgres: PostgresServer
) -> None:
    postgres.admin("DROP DATABASE IF EXISTS bytes")
    postgres.admin("CREATE DATABASE bytes TEMPLATE template0 ENCODING 'SQL_ASCII'")
    postgres.admin(
        "CREATE TABLE notes (user_id text, note text); GRANT SELECT ON notes TO PUBLIC; "
        "INSERT INTO notes VALUES ('4', 'good'), ('5', convert_from('\\xff', 'SQL_ASCII'))",
        "bytes",
    )
    source = SqlSource(postgres.url("bytes"), {"balance": read("notes", "note")})
    try:
        with pytest.raises(SourceError, match='invalid byte sequence for encoding "UTF8"'):
            await fetched(source, "4", "5")
        assert await fetched(source, "4") == {"4": [{"note": "good"}]}
    finally:
        source.close()


@pytest.mark.parametrize(
    ("column", "complaint"),
    [
        ("(SELECT n FROM numbers AS o WHERE numbers.user_id = 5)", "more than one row"),
        ("strict(user_id)", "no account 5"),
        ("1 / (user_id - 5)", "division by zero"),
        ("CASE user_id WHEN 5 THEN 'x' ELSE '1' END::int", "invalid input syntax"),
        ("CASE user_id WHEN 5 THEN pg_sleep(9)::text ELSE '1' END", "statement timeout"),
        ("sqrt(4 - user_id)", "square root of a negative number"),
    ],
)
async def test_a_statement_that_fails_for_one_user_is_an_error_of_the_call(
    make: Any, column: str, complaint: str
) -> None:
    source = make(read("numbers", f"{column} AS x"), statement_timeout_s=0.2)
    with pytest.raises(SourceError, match=complaint):
        await source.fetch_many(["4", "5"], "balance")
    assert len((await fetched(source, "4"))["4"]) == 1
    assert source._engine.pool.checkedout() == 0


async def test_a_driver_that_raises_anything_is_an_error_in_one_line(
    file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[BaseException] = []

    def convert(raw: bytes) -> object:
        raise raised[0]

    monkeypatch.setitem(sqlite3.converters, "ODD", convert)
    script = "CREATE TABLE t (user_id TEXT, x ODD); INSERT INTO t VALUES ('4', 'text')"
    source = file(script, read("t", "x"), url="?detect_types=1")
    for error in (
        *(TypeError("an odd\ntype"), ValueError("a year of 12025"), OverflowError(), KeyError("x")),
        *(RecursionError("deep"), MemoryError("much"), UnicodeDecodeError("utf-8", b"x", 0, 1, "")),
    ):
        raised[:] = [error]
        with pytest.raises(SourceError) as caught:
            await source.fetch_many(["4"], "balance")
        assert "\n" not in str(caught.value)
        assert str(caught.value)
    await trio.lowlevel.checkpoint()
    assert source._engine.pool.checkedout() == 0
