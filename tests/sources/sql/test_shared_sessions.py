"""Reads leave nothing on a connection: through PgBouncer, across ALTER TABLE, and read-only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import psycopg
import pytest
import trio
from sqlalchemy import make_url

from harness.pgbouncer import PgBouncer, pooling
from harness.postgres_server import PostgresServer
from harness.support import PATIENCE_S

from trading_push import ConfigurationError, PostgresSource, SourceError, SqlSource
from trading_push.settings.sources import Query

SQL = """
CREATE TABLE balances (user_id bigint, asset text, free numeric);
INSERT INTO balances SELECT n, 'BTC', n FROM generate_series(1, 50) AS n;
"""
BALANCE = Query("SELECT * FROM balances WHERE user_id IN :user_ids")
SLOW = Query("SELECT user_id, pg_sleep(600)::text FROM balances WHERE user_id = :user_id")


@pytest.fixture(scope="module")
def pooler(postgres: PostgresServer) -> Iterator[PgBouncer]:
    with pooling(postgres) as pooler:
        yield pooler


@pytest.fixture
def database(postgres: PostgresServer, request: pytest.FixtureRequest) -> Iterator[str]:
    name = "".join(filter(str.isalnum, request.node.name))[-50:].lower()
    postgres.create_database(name, SQL)
    yield name
    postgres.admin(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def make() -> Iterator[Any]:
    made = []

    def make(url: str, **queries: Query) -> SqlSource:
        queries = queries or {"balance": BALANCE, "slow": SLOW}
        made.append(SqlSource(url, queries, threads=8, statement_timeout_s=1))
        return made[-1]

    yield make
    for source in made:
        source.close()


def free(value: Any) -> str:
    (row,) = msgspec.json.decode(value)
    return str(row["free"])


async def test_every_poll_through_a_pooler_is_answered(
    make: Any, pooler: PgBouncer, database: str
) -> None:
    source = make(pooler.url(database))
    await source.check()
    answered = []

    async def poll(first: int) -> None:
        for number in range(first, first + 10):
            found = await source.fetch_many([str(number), str(number + 1)], "balance")
            answered.append((number, free(found[str(number)])))

    with trio.fail_after(PATIENCE_S):
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                for first in (1, 11, 21, 31):
                    nursery.start_soon(poll, first)
    assert len(answered) == 120
    assert all(str(number) == amount for number, amount in answered)


async def test_nothing_is_left_on_the_sessions_of_other_applications(
    make: Any, pooler: PgBouncer, database: str
) -> None:
    source = make(pooler.url(database))
    with pytest.raises(SourceError, match="statement timeout"):
        await source.fetch("4", "slow")
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(source.fetch, str(number), "balance")
    url = pooler.url(database).replace("+psycopg", "")
    for _ in range(4):
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as other:
            assert other.execute("SHOW statement_timeout").fetchone() == ("0",)
            assert other.execute("SHOW transaction_read_only").fetchone() == ("off",)
            assert other.execute("SELECT name FROM pg_prepared_statements").fetchall() == []


@pytest.mark.parametrize("pooled", [False, True])
async def test_a_table_that_is_altered_fails_no_poll(
    make: Any, pooler: PgBouncer, postgres: PostgresServer, database: str, pooled: bool
) -> None:
    source = make((pooler if pooled else postgres).url(database))
    for number in range(12):
        assert free(await source.fetch("4", "balance")) == "4"
        if number % 4 == 3:
            postgres.admin(f"ALTER TABLE balances ADD COLUMN added_{number} int", database)
    found = await source.fetch("4", "balance")
    assert b"added_11" in bytes(found)
    postgres.admin("ALTER TABLE balances ALTER COLUMN asset TYPE varchar(9)", database)
    assert free(await source.fetch("4", "balance")) == "4"


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000"])
async def test_a_query_that_writes_fails_and_writes_nothing(
    make: Any, postgres: PostgresServer, database: str, driver: str
) -> None:
    pytest.importorskip(driver)
    postgres.admin("GRANT ALL ON balances TO PUBLIC", database)
    url = postgres.url(database).replace("+psycopg", f"+{driver}")
    delete = Query("DELETE FROM balances WHERE user_id IN :user_ids RETURNING user_id, free")
    source = make(url, balance=BALANCE, deletes=delete)
    for _ in range(2):
        with pytest.raises(SourceError, match="read-only transaction"):
            await source.fetch("4", "deletes")
        assert free(await source.fetch("4", "balance")) == "4"
    with pytest.raises(ConfigurationError, match=r"query of deletes .*read-only transaction"):
        await source.check()
    assert source._engine.pool.checkedout() == 0


async def test_the_url_may_ask_for_prepared_statements(
    make: Any, postgres: PostgresServer, database: str
) -> None:
    names = Query("SELECT name, :user_id AS asked FROM pg_prepared_statements")
    for options, prepared in (
        ("", False),
        ("?prepare_threshold=0", True),
        ("?prepare_threshold=none", False),
    ):
        source = make(postgres.url(database) + options, names=names)
        for _ in range(7):
            found = await source.fetch("4", "names")
        assert bool(msgspec.json.decode(found)) is prepared
    with pytest.raises(ConfigurationError, match="prepare_threshold in the database's url"):
        make(postgres.url(database) + "?prepare_threshold=often")


async def test_an_option_that_the_driver_does_not_know_is_told_in_a_line(
    make: Any, postgres: PostgresServer, database: str
) -> None:
    source = make(postgres.url(database) + "?no_such_option=1")
    with pytest.raises(ConfigurationError, match="no_such_option"):
        await source.check()
    with pytest.raises(SourceError, match="no_such_option"):
        await source.fetch("4", "balance")


async def test_a_database_in_sql_ascii_gives_texts(make: Any, postgres: PostgresServer) -> None:
    postgres.admin("DROP DATABASE IF EXISTS ascii")
    postgres.admin("CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII'")
    postgres.admin(
        "CREATE TABLE notes (user_id text, note text); GRANT SELECT ON notes TO PUBLIC; "
        "INSERT INTO notes VALUES ('4', convert_from('\\xc3a920e4bbb7e6a0bc', 'SQL_ASCII'))",
        "ascii",
    )
    notes = Query("SELECT user_id, note FROM notes WHERE user_id IN :user_ids")
    for options in ("", "?client_encoding=latin1"):
        source = make(postgres.url("ascii") + options, notes=notes)
        await source.check()
        found = msgspec.json.decode(await source.fetch("4", "notes"))
        assert found == [{"note": "é 价格"}]


def test_a_password_with_an_at_sign_is_told_to_be_encoded() -> None:
    url = "postgresql+psycopg://reader:p@ssword@127.0.0.1/x"
    with pytest.raises(ConfigurationError, match="percent-encoded, as %40") as caught:
        SqlSource(url, {"balance": BALANCE})
    assert "127.0.0.1" not in str(caught.value)
    encoded = make_url(url.replace("p@ss", "p%40ss"))
    source = SqlSource(encoded, {"balance": BALANCE})
    assert source._url.password == "p@ssword"
    source.close()


# --- LISTEN -----------------------------------------------------------------------------------


class Sink:
    """Hears that it may have missed something once LISTEN is confirmed."""

    def __init__(self) -> None:
        self.confirmed = trio.Event()

    def missed(self) -> None:
        self.confirmed.set()


@pytest.mark.parametrize("mode", ["transaction", "session"])
async def test_listen_through_a_pooler_works_or_says_that_it_cannot(
    postgres: PostgresServer, database: str, mode: str
) -> None:
    with pooling(postgres, mode=mode) as pooler:
        source = PostgresSource(pooler.url(database), {"balance": BALANCE}, "changes", threads=1)
        sink: Any = Sink()
        try:
            with trio.fail_after(PATIENCE_S):
                if mode == "transaction":
                    with pytest.raises(SourceError, match="pooler in transaction mode"):
                        await source.watch(sink)
                    assert not sink.confirmed.is_set()
                    return
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(source.watch, sink)
                    await sink.confirmed.wait()
                    nursery.cancel_scope.cancel()
        finally:
            source.close()
