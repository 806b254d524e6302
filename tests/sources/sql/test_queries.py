"""What a query may say, and how each type of a column leaves."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from harness.mariadb_server import MariaDbServer
from harness.postgres_server import PostgresServer
from harness.readme import PAGES
from harness.support import PATIENCE_S

from trading_push import ConfigurationError, SourceError, SqlSource
from trading_push.settings import load_settings
from trading_push.settings.sources import Query

BIG = 9_007_199_254_740_993
SQL = f"""
CREATE TABLE numbers (user_id bigint, n bigint, x float8, t text);
INSERT INTO numbers VALUES (4, {BIG}, 1e-7, 'a'), (5, 2, 0.5, 'b'), (6, NULL, NULL, NULL);
CREATE TABLE texts (user_id text, n int);
INSERT INTO texts VALUES ('a "b" \\c, {{d}}', 1), ('NULL', 2), ('价', 3);
"""


@pytest.fixture(scope="module")
def database(postgres: PostgresServer) -> Iterator[str]:
    postgres.create_database("queries", SQL)
    yield postgres.url("queries")
    postgres.admin("DROP DATABASE queries WITH (FORCE)")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "accounts.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SQL)
    return f"sqlite:///{path}"


@pytest.fixture
def make() -> Iterator[Any]:
    made = []

    def make(url: str, query: Query | str, **options: Any) -> SqlSource:
        query = Query(query) if isinstance(query, str) else query
        made.append(SqlSource(url, {"balance": query}, **options))
        return made[-1]

    yield make
    for source in made:
        source.close()


async def fetched(source: SqlSource, *users: str) -> dict[str, Any]:
    await source.check()
    found = await source.fetch_many(users, "balance")
    return {
        user: str(each) if isinstance(each, SourceError) else each and msgspec.json.decode(each)
        for user, each in found.items()
    }


@pytest.mark.parametrize(
    "where",
    [
        "user_id = ANY(:user_ids)",
        "user_id = any ( :user_ids )",
        "user_id = ANY(:user_ids::bigint[])",
        "user_id = ANY(CAST(:user_ids AS bigint[]))",
        "user_id IN (SELECT unnest(:user_ids::bigint[]))",
        "user_id IN (SELECT id::bigint FROM unnest(:user_ids::text[]) AS id)",
        "user_id IN :user_ids AND user_id = ANY(:user_ids)",
        "user_id = :user_id::bigint",
        "user_id::text = (:user_id)::text",
        "user_id = CAST(:user_id AS bigint)",
        "user_id = :user_id ::int",
        "user_id::text = :user_id::varchar(20)",
    ],
)
async def test_ways_to_name_users_in_postgresql(make: Any, database: str, where: str) -> None:
    source = make(database, f"SELECT user_id, t::varchar(9) AS t FROM numbers WHERE {where}")
    expected = {"4": [{"t": "a"}], "5": [{"t": "b"}], "7": []}
    assert await fetched(source, *expected) == expected


async def test_any_text_is_an_element_of_the_array(make: Any, database: str) -> None:
    source = make(database, "SELECT user_id, n FROM texts WHERE user_id = ANY(:user_ids)")
    expected = {'a "b" \\c, {d}': [{"n": 1}], "NULL": [{"n": 2}], "价": [{"n": 3}], "x'; --": []}
    assert await fetched(source, *expected) == expected


@pytest.mark.parametrize("where", ["= :user_ids", "= (:user_ids)", "=:user_ids", "<> :user_ids"])
def test_a_comparison_with_one_user_of_many_is_refused(make: Any, where: str) -> None:
    with pytest.raises(ConfigurationError, match=r"works for one user only: write IN :user_ids"):
        make("sqlite:////x.db", f"SELECT user_id FROM numbers WHERE user_id {where}")


@pytest.mark.parametrize("where", ["user_id LIKE :user_ids", "abs(:user_ids) = user_id"])
async def test_what_can_do_with_one_user_only_is_refused(
    make: Any, database: str, file: str, where: str
) -> None:
    for url in (database, file):
        with pytest.raises(ConfigurationError, match="the query of balance cannot be run"):
            await make(url, f"SELECT user_id FROM numbers WHERE {where}").check()


async def test_numbers_as_texts(make: Any, database: str, file: str) -> None:
    sql = "SELECT user_id, n, x, t FROM numbers WHERE user_id IN :user_ids"
    for url in (database, file, file + "?timeout=5"):
        exact = await fetched(make(url, Query(sql)), "4")
        assert exact["4"][0]["n"] == BIG  # every digit; as_text is for those who cannot read it
        source = make(url, Query(sql, as_text=("n", "x", "t")))
        assert await fetched(source, "4", "5", "6") == {
            "4": [{"n": str(BIG), "x": "0.0000001", "t": "a"}],
            "5": [{"n": "2", "x": "0.5", "t": "b"}],
            "6": [{"n": None, "x": None, "t": None}],
        }
        with pytest.raises(ConfigurationError, match="gives no column price"):
            await make(url, Query(sql, as_text=("price",))).check()
    whole = make(file, Query(sql.replace(" x,", ""), as_text=("n",)))
    assert await fetched(whole, "4") == {"4": [{"n": str(BIG), "t": "a"}]}
    assert whole._whole._queries["balance"][1] is not None


async def test_a_value_that_is_too_long_is_that_user_s_error(make: Any, file: str) -> None:
    sql = "SELECT user_id, printf('%.*c', user_id * 200, 'x') AS t FROM numbers "
    source = make(file, sql + "WHERE user_id IN :user_ids", value_bytes=1_000)
    found = await fetched(source, "4", "5")
    assert found["4"][0]["t"] == "x" * 800
    assert "balance: the value has 1010 bytes" in found["5"]
    assert "database.value_bytes (1000)" in found["5"]


# --- types --------------------------------------------------------------------------------------

POSTGRESQL = {
    "smallint, integer, bigint": ("4::bigint", 4),
    "numeric": ("1e-8::numeric", "0.00000001"),
    "real, double precision": ("0.5::float8", 0.5),
    "boolean": ("true", True),
    "text, varchar, enum": ("'a'::varchar(3)", "a"),
    "char(n)": ("'a'::char(3)", "a  "),
    "uuid": (
        "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'::uuid",
        "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
    ),
    "timestamptz, timestamp": ("'1970-01-01 00:00:01+00'::timestamptz", 1000),
    "date": ("'2025-03-30'::date", "2025-03-30"),
    "time": ("'08:30'::time", "08:30:00"),
    "interval": ("'1 day 2 hours'::interval", "P1DT7200S"),
    "json, jsonb": ("'{\"a\"\\:1.5}'::json", {"a": 1.5}),
    "arrays": ("ARRAY[1.50, NULL]", ["1.50", None]),
    "bytea": ("'\\x00ff'::bytea", "AP8="),
    "inet, cidr": ("'10.0.0.0/8'::cidr", "10.0.0.0/8"),
    "bit(n)": ("B'101'", "101"),
    "money": ("4.5::float8::numeric::money", "$4.50"),
}
MARIADB = {
    "integers": ("CAST(4 AS INTEGER)", 4),
    "DECIMAL": ("CAST(0.00000001 AS DECIMAL(20, 8))", "0.00000001"),
    "FLOAT, DOUBLE": ("0.5e0", 0.5),
    "BOOLEAN": ("TRUE", 1),
    "TIMESTAMP, DATETIME": ("TIMESTAMP'1970-01-01 00:00:01'", 1000),
    "DATE": ("DATE'2025-03-30'", "2025-03-30"),
    "TIME": ("TIME'08:30:00'", "PT30600S"),
    "JSON": ("JSON_ARRAY(1)", "[1]"),
    "BIT": ("b'101'", "BQ=="),
    "BLOB, BINARY": ("x'00ff'", "AP8="),
}


@pytest.mark.parametrize("name", POSTGRESQL)
async def test_how_a_type_of_postgresql_leaves(make: Any, database: str, name: str) -> None:
    expression, expected = POSTGRESQL[name]
    source = make(
        database, f"SELECT user_id, {expression} AS x FROM texts WHERE user_id IN :user_ids"
    )
    assert await fetched(source, "价") == {"价": [{"x": expected}]}


@pytest.mark.parametrize("expression", ["int4range(1, 5)", "ROW(1, int4range(1, 5))"])
async def test_a_type_that_json_has_no_form_for_is_told_by_its_column(
    make: Any, database: str, expression: str
) -> None:
    sql = "SELECT user_id, {} AS x FROM texts WHERE user_id IN :user_ids"
    found = await fetched(make(database, sql.format(expression)), "价", "x")
    assert "column x holds a " in found["价"]
    assert "write CAST(x AS text)" in found["价"]
    assert found["x"] == []
    cast = await fetched(make(database, sql.format(f"({expression})::text")), "价")
    assert "[1,5)" in cast["价"][0]["x"]


async def test_how_the_types_of_mariadb_leave(make: Any, mariadb: MariaDbServer) -> None:
    mariadb.create_database("types", "CREATE TABLE t (user_id int)", "INSERT INTO t VALUES (4)")
    for name, (expression, expected) in MARIADB.items():
        sql = f"SELECT user_id, {expression} AS x FROM t WHERE user_id IN :user_ids"
        found = await fetched(make(mariadb.url("types"), sql), "4")
        assert found == {"4": [{"x": expected}]}, name


async def test_mariadb_compares_in_its_own_way_and_is_only_read(
    make: Any, mariadb: MariaDbServer
) -> None:
    mariadb.create_database(
        "ids",
        "CREATE TABLE t (user_id int, n int)",
        "INSERT INTO t VALUES (4, 1), (5, 2)",
        "CREATE TABLE names (user_id varchar(9), n int)",
        "INSERT INTO names VALUES ('bob', 1)",
    )
    url = mariadb.url("ids")
    for where in ("user_id IN :user_ids", "user_id = :user_id"):
        sql = f"SELECT user_id, n FROM t WHERE {where}"
        found = await fetched(make(url, sql), "4abc", "5", "04")
        assert "user_id 4 when '4abc' was asked for: set database.user_id" in found["4abc"]
        assert "user_id 4 when '04'" in found["04"]
        assert found["5"] == [{"n": 2}]
        found = await fetched(make(url, sql, user_id="integer"), "4abc", "4")
        assert "not an integer" in found["4abc"]
        assert found["4"] == [{"n": 1}]
    names = "SELECT user_id, n FROM names WHERE user_id IN :user_ids"
    assert "user_id 'bob' when 'BOB'" in (await fetched(make(url, names), "BOB"))["BOB"]
    found = await fetched(make(url, names, user_id="caseless"), "BOB")
    assert found["BOB"] == [{"n": 1}]
    delete = make(url, "DELETE FROM t WHERE user_id IN :user_ids RETURNING user_id, n")
    with pytest.raises(SourceError, match="READ ONLY transaction"):
        await delete.fetch("4", "balance")
    assert mariadb.admin("SELECT count(*) FROM t", "ids") == ((2,),)


@pytest.mark.parametrize("before", ["", " ", "\ufeff"])
async def test_a_url_as_others_give_it(make: Any, database: str, before: str) -> None:
    url = before + database.replace("postgresql+psycopg://", "postgres://") + "\n"
    found = await fetched(make(url, "SELECT * FROM texts WHERE user_id IN :user_ids"), "NULL")
    assert found == {"NULL": [{"n": 2}]}
    with pytest.raises(ConfigurationError, match="begin the url with mysql\\+pymysql://"):
        make("mysql+nope://h/d", "SELECT * FROM texts WHERE user_id IN :user_ids")


@pytest.mark.parametrize("where", ["user_id = :user_id", "user_id IN :user_ids"])
async def test_mariadb_ends_a_statement_that_takes_too_long(
    make: Any, mariadb: MariaDbServer, where: str
) -> None:
    mariadb.create_database("slow", "CREATE TABLE t (user_id int)", "INSERT INTO t VALUES (4), (5)")
    sql = f"SELECT user_id, IF(user_id = 4, SLEEP(600), 0) AS n FROM t WHERE {where}"
    source = make(mariadb.url("slow"), sql, statement_timeout_s=0.25, threads=1)
    processes = "SELECT id, info FROM information_schema.processlist WHERE db = 'slow'"
    try:
        with trio.fail_after(PATIENCE_S):
            assert await fetched(source, "5") == {"5": [{"n": 0}]}
            ((session, _),) = mariadb.admin(processes)
            with pytest.raises(SourceError, match="max_statement_time exceeded") as caught:
                await source.fetch_many(["4"], "balance")
        assert caught.value.retryable
        assert mariadb.admin(processes) == ((session, None),)  # idle, and the same as before
        assert await fetched(source, "5") == {"5": [{"n": 0}]}
    finally:
        source.close()
        mariadb.admin("DROP DATABASE slow")


# --- files ----------------------------------------------------------------------------------------


async def test_the_path_of_a_file_starts_where_the_settings_are(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    monkeypatch.delenv("TRADING_PUSH_CONFIG", raising=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = tmp_path / "trading-push.toml"
    query = (
        '[database.queries.balance]\nsql = "SELECT user_id FROM texts WHERE user_id IN :user_ids"'
    )
    for given, expected in (
        ("sqlite:///accounts.db", file),
        ("sqlite+pysqlite:///./elsewhere/../accounts.db", None),
        ("sqlite:///accounts.db?timeout=5", f"{file}?timeout=5"),
        (file, file),
    ):
        config.write_text(f'[database]\nurl = "{given}"\n{query}\nas_text = ["user_id"]')
        settings = load_settings(config=config, flags={})
        assert settings.database.url is not None
        assert expected in (None, settings.database.url)
        await make(settings.database.url, settings.database.queries["balance"]).check()
    config.write_text(query)
    monkeypatch.setenv("TRADING_PUSH_DATABASE_URL", "sqlite:///accounts.db")
    from_environment = load_settings(config=config, flags={}).database.url
    assert from_environment == f"sqlite:///{elsewhere / 'accounts.db'}"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a user who may not write")
def test_a_file_in_wal_mode_that_may_not_be_written_beside_says_so(tmp_path: Path) -> None:
    path = Path("/tmp") / f"trading-push-{os.getpid()}" / "accounts.db"
    path.parent.mkdir()
    try:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(SQL)
        path.parent.chmod(0o555)
        program = f"""
import os, trio
from trading_push import ConfigurationError, SqlSource
from trading_push.settings.sources import Query
query = Query("SELECT user_id FROM texts WHERE user_id IN :user_ids")
source = SqlSource("sqlite:///{path}", {{"balance": query}})
os.setuid(65534)
try:
    trio.run(source.check)
except ConfigurationError as error:
    print(error)
source.close()
"""
        told = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
    finally:
        for each in path.parent.iterdir():
            each.unlink()
        path.parent.rmdir()
    assert "the file is in WAL mode" in told
    assert "let this user write in its directory" in told


@pytest.mark.parametrize(("types", "column"), [(POSTGRESQL, 1), (MARIADB, 2)])
def test_the_page_says_how_each_type_leaves(types: dict[str, Any], column: int) -> None:
    rows = [line.split(" | ") for line in PAGES["docs/sql.md"].splitlines()]
    leaves = {row[column - 1].strip("| "): row[2] for row in rows if len(row) == 3}
    for name, (_, expected) in types.items():
        assert f"`{json.dumps(expected)}`" in leaves[name], name
