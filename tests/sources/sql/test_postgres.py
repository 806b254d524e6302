"""PostgreSQL itself: values, deadlines, restarts in mid-flow, and NOTIFY from another program."""

from __future__ import annotations

import json
import logging
import statistics
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import pytest
import trio

from harness.postgres_server import PASSWORD, PostgresServer
from harness.support import PATIENCE_S, SECRET, hypercorn_serving, trio_client, until

from trading_push import ConfigurationError, PostgresSource, SourceError, SqlSource
from trading_push import factory as assembly
from trading_push.settings.schema import Intervals, Polling, Settings
from trading_push.settings.sources import Database, Query
from trading_push.sources.base import ChangeSink, WatchingSource

SQL = """
CREATE TABLE balances (user_id bigint, asset text, free numeric, locked numeric(30, 12));
INSERT INTO balances VALUES
    (4, 'BTC', 0.00000001, 123456789012345678.123456789012), (4, 'USDT', 1e20, 0),
    (5, 'BTC', 5, NULL);
CREATE TABLE notes (user_id text, at timestamptz, day timestamp, body jsonb, raw json,
                    amounts numeric[], flag boolean, ratio float8);
INSERT INTO notes VALUES ('4', '2025-11-20 08:30:00.123999+01', '2025-11-20 07:30:00.5',
    '{"n": 12345678901234567890.12345678901234567890, "a": [1.10]}', '{"b":1.50 }',
    '{0.00000001,2.50}', true, 0.5);
"""
BALANCE = Query(
    "SELECT user_id, asset, free, locked FROM balances WHERE user_id IN :user_ids ORDER BY asset"
)
NOTES = Query("SELECT * FROM notes WHERE user_id = :user_id", single=True, json_columns=("body",))
SLOW = Query("SELECT pg_sleep(600)::text FROM balances WHERE user_id = :user_id AND asset = 'BTC'")
DEADLINE = Query("SELECT current_setting('statement_timeout') AS deadline WHERE :user_id <> ''")
CHANNEL = "trading_push"


@pytest.fixture
def database(postgres: PostgresServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A database of the test's own, by the test's name."""
    name = request.node.name[:50]
    postgres.create_database(name, SQL)
    yield name
    postgres.admin(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def make(postgres: PostgresServer, database: str) -> Iterator[Any]:
    made = []

    def make(**options: Any) -> PostgresSource:
        queries = {"balance": BALANCE, "notes": NOTES, "slow": SLOW}
        source = PostgresSource(postgres.url(database), queries, CHANNEL, **options)
        made.append(source)
        return source

    yield make
    for source in made:
        source.close()


class Sink:
    """Keeps what it is told, and hands it over in the order of its coming."""

    def __init__(self) -> None:
        self._told, self._news = trio.open_memory_channel[Any](1000)

    def changed(self, changes: Iterable[tuple[str, str]]) -> None:
        for change in changes:
            self._told.send_nowait(change)

    def missed(self) -> None:
        self._told.send_nowait("missed")

    def publish(self, values: Iterable[tuple[str, Any, str]]) -> None:
        raise AssertionError("nothing is published without a fetch")

    async def next(self) -> Any:
        with trio.fail_after(PATIENCE_S):
            return await self._news.receive()

    def nothing_more(self) -> bool:
        return self._news.statistics().current_buffer_used == 0


@asynccontextmanager
async def watching(source: WatchingSource) -> AsyncIterator[Sink]:
    """A sink while `watch` runs; it has heard of what was missed."""
    sink = Sink()
    told: ChangeSink = sink
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.watch, told)
        assert await sink.next() == "missed"
        yield sink
        nursery.cancel_scope.cancel()


def notify(postgres: PostgresServer, database: str, *payloads: object) -> None:
    calls = (
        f"pg_notify('{CHANNEL}', $x${each if isinstance(each, str) else json.dumps(each)}$x$)"
        for each in payloads
    )
    postgres.admin("SELECT " + ", ".join(calls), database)


def decoded(values: Any) -> dict[str, Any]:
    return {user: value and msgspec.json.decode(value) for user, value in values.items()}


# --- reading ----------------------------------------------------------------------------------


async def test_numeric_values_keep_every_digit_and_users_are_an_integer_column(make: Any) -> None:
    source = make()
    assert isinstance(source, WatchingSource)
    await source.check()
    assert decoded(await source.fetch_many(["4", "5", "6"], "balance")) == {
        "4": [
            {"asset": "BTC", "free": "0.00000001", "locked": "123456789012345678.123456789012"},
            {"asset": "USDT", "free": "100000000000000000000", "locked": "0.000000000000"},
        ],
        "5": [{"asset": "BTC", "free": "5", "locked": None}],
        "6": [],
    }


async def test_times_json_and_arrays_and_users_are_a_text_column(make: Any) -> None:
    raw = bytes(await make().fetch("4", "notes"))
    # As the server wrote it: a float would have lost the digits.
    assert b'"n": 12345678901234567890.12345678901234567890, "a"' in raw or (
        b'"n": 12345678901234567890.12345678901234567890}' in raw
    )
    assert b'"raw":{"b":1.50 }' in raw
    value = msgspec.json.decode(raw)
    del value["body"], value["raw"]
    assert value == {
        "at": 1_763_623_800_123,
        "day": 1_763_623_800_500,
        "amounts": ["0.00000001", "2.50"],
        "flag": True,
        "ratio": 0.5,
    }


async def test_a_user_whom_the_column_cannot_hold_is_an_error_of_that_batch(make: Any) -> None:
    source = make()
    with pytest.raises(SourceError, match="invalid input syntax for type bigint") as caught:
        await source.fetch_many(["4", "nobody"], "balance")
    assert not caught.value.retryable
    assert decoded(await source.fetch_many(["5"], "balance"))["5"]


async def test_a_statement_ends_at_its_deadline_and_the_connection_is_good_again(
    make: Any, postgres: PostgresServer, database: str
) -> None:
    source = make(threads=1, statement_timeout_s=0.2)
    with trio.fail_after(PATIENCE_S):
        with pytest.raises(SourceError, match="due to statement timeout") as caught:
            await source.fetch("4", "slow")
    assert caught.value.retryable
    assert decoded(await source.fetch_many(["5"], "balance"))["5"]
    assert len(postgres.sessions(database)) == 1


async def test_every_connection_notices_a_server_that_vanishes(
    postgres: PostgresServer, database: str
) -> None:
    url = postgres.url(database) + "?keepalives_count=9"  # the URL goes before our own
    source = PostgresSource(url, {"balance": BALANCE}, CHANNEL)
    with source._engine.connect() as pooled, source._connect() as listening:
        for driver in (pooled.connection.driver_connection, listening):
            parameters = driver.info.get_parameters()
            assert parameters["connect_timeout"] == "10"
            assert parameters["keepalives_idle"] == "10"
            assert parameters["keepalives_count"] == "9"
            assert parameters["tcp_user_timeout"] == "25000"
    source.close()


async def test_no_more_connections_than_threads(
    make: Any, postgres: PostgresServer, database: str
) -> None:
    source = make(threads=3, statement_timeout_s=0.3)
    seen = []

    async def fail() -> None:
        with pytest.raises(SourceError, match="statement timeout"):
            await source.fetch("4", "slow")

    async with trio.open_nursery() as nursery:
        for _ in range(9):
            nursery.start_soon(fail)
        while len(nursery.child_tasks) > 0:
            seen.append(len(await trio.to_thread.run_sync(postgres.sessions, database)))
            await trio.sleep(0.02)
    assert max(seen) == 2  # one type leaves a thread to the others


async def test_a_restart_between_two_fetches_is_not_noticed(
    make: Any, postgres: PostgresServer
) -> None:
    source = make(threads=2)
    before = decoded(await source.fetch_many(["4"], "balance"))
    await trio.to_thread.run_sync(postgres.restart)
    assert decoded(await source.fetch_many(["4"], "balance")) == before


@pytest.mark.parametrize("immediately", [False, True])
async def test_a_restart_in_mid_flow_fails_what_was_under_way_and_nothing_after(
    make: Any, postgres: PostgresServer, database: str, immediately: bool
) -> None:
    source = make(threads=2)
    await source.fetch("4", "balance")
    failed = []

    async def fetch_slowly() -> None:
        with pytest.raises(SourceError) as caught:
            await source.fetch("4", "slow")
        failed.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch_slowly)
        await until(lambda: any("pg_sleep" in query for query in postgres.sessions(database)))
        with trio.fail_after(PATIENCE_S):
            await trio.to_thread.run_sync(lambda: postgres.stop(immediately=immediately))
    assert [error.retryable for error in failed] == [True]
    try:
        with pytest.raises(SourceError, match="refused") as caught:
            await source.fetch("4", "balance")
        assert caught.value.retryable
    finally:
        await trio.to_thread.run_sync(postgres.start)
    for _ in range(5):
        assert decoded(await source.fetch_many(["5"], "balance"))["5"]


# --- being told -------------------------------------------------------------------------------


async def test_a_value_changed_by_another_program_is_fetched(
    make: Any, postgres: PostgresServer, database: str
) -> None:
    source = make()
    before = await source.fetch("4", "balance")
    async with watching(source) as sink:
        payload = '{"user": 4, "type": "balance"}'
        command = postgres.psql(
            f"UPDATE balances SET free = 77.70 WHERE user_id = 4; NOTIFY {CHANNEL}, '{payload}'",
            database,
        )
        await trio.run_process(command)
        assert await sink.next() == ("4", "balance")
    after = await source.fetch("4", "balance")
    assert bytes(before) != bytes(after)
    assert b'"free":"77.70"' in bytes(after)


async def test_each_form_of_a_payload(make: Any, postgres: PostgresServer, database: str) -> None:
    async with watching(make()) as sink:
        notify(
            postgres,
            database,
            {"user": "4", "type": "balance"},
            {"user": 90071992547409931, "type": "of nobody", "more": [1]},
            {"user": "用户"},
        )
        assert [await sink.next() for _ in range(5)] == [
            ("4", "balance"),
            ("90071992547409931", "of nobody"),
            ("用户", "balance"),
            ("用户", "notes"),
            ("用户", "slow"),
        ]


async def test_a_payload_that_is_none_is_logged_once_and_passed_over(
    make: Any, postgres: PostgresServer, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    rubbish = [
        *("balance\x1b[31m of 4", "", "[", "null", '{"type":"balance"}', '{"user":null}'),
        *('{"user":true}', '{"user":1.5}', '{"user":"4","type":1}', '[{"user":"4"}]', "[" * 7000),
        *('{"user":"\\ud800"}', '{"user":1e999}', '{"user":"4"} {"user":"5"}'),
    ]
    async with watching(make()) as sink:
        for each in rubbish:
            notify(postgres, database, each)
        notify(postgres, database, {"user": "4", "type": "balance"})
        assert await sink.next() == ("4", "balance")
        assert sink.nothing_more()
    (line,) = caplog.messages
    assert line.startswith("⚠️ 频道trading_push的通知无法解析")
    assert line.endswith("- 'balance\\x1b[31m of 4'")


async def test_a_storm_is_told_completely_and_in_order(
    make: Any, postgres: PostgresServer, database: str
) -> None:
    count = 20_000
    heard = []

    class Counting(Sink):
        def changed(self, changes: Iterable[tuple[str, str]]) -> None:
            heard.extend(user for user, _ in changes)

    sink = Counting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make().watch, sink)
        assert await sink.next() == "missed"
        storm = f"""SELECT pg_notify('{CHANNEL}', '{{"user":' || n || ',"type":"balance"}}')
            FROM generate_series(1, {count}) AS n"""
        await trio.to_thread.run_sync(postgres.admin, storm, database)
        await until(lambda: len(heard) >= count)
        nursery.cancel_scope.cancel()
    assert heard == [str(number) for number in range(1, count + 1)]


async def test_a_notification_is_told_within_milliseconds(
    make: Any, postgres: PostgresServer, database: str
) -> None:
    source = make()
    took = []
    other = make()
    # Another session, already open: what is measured is the way from NOTIFY to the sink.
    with other._engine.connect() as session:
        async with watching(source) as sink:
            for number in range(101):
                payload = f'{{"user":{number},"type":"balance"}}'
                began = trio.current_time()
                session.exec_driver_sql(f"NOTIFY {CHANNEL}, '{payload}'")
                assert await sink.next() == (str(number), "balance")
                took.append((trio.current_time() - began) * 1000)
    print(f"\nNOTIFY to sink: median {statistics.median(took):.2f} ms, worst {max(took):.2f} ms")
    assert statistics.median(took) < 50


@pytest.mark.parametrize("immediately", [False, True])
async def test_a_lost_connection_ends_the_watch_and_the_next_one_has_missed_something(
    make: Any, postgres: PostgresServer, database: str, immediately: bool
) -> None:
    source = make()
    sink = Sink()
    ended = []

    async def watch_once() -> None:
        with pytest.raises(SourceError) as caught:
            await source.watch(sink)
        ended.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_once)
        assert await sink.next() == "missed"
        await trio.to_thread.run_sync(lambda: postgres.restart(immediately=immediately))
        await until(lambda: ended)
    assert ended[0].retryable
    assert "\n" not in str(ended[0])
    async with watching(source) as again:
        notify(postgres, database, {"user": "4", "type": "balance"})
        assert await again.next() == ("4", "balance")


async def test_without_a_server_the_watch_fails_at_once(
    make: Any, postgres: PostgresServer
) -> None:
    source = make()
    await trio.to_thread.run_sync(postgres.stop)
    try:
        with pytest.raises(SourceError, match="refused") as caught, trio.fail_after(PATIENCE_S):
            await source.watch(Sink())
    finally:
        await trio.to_thread.run_sync(postgres.start)
    assert caught.value.retryable
    assert PASSWORD not in str(caught.value)


async def test_cancellation_leaves_no_connection_behind(
    make: Any, postgres: PostgresServer, database: str
) -> None:
    source = make()
    for _ in range(3):
        async with watching(source):
            assert postgres.sessions(database) == [f'LISTEN "{CHANNEL}"']
        await until(lambda: postgres.sessions(database) == [])


async def test_a_connection_that_is_given_up_while_it_is_opened_is_closed(
    make: Any, postgres: PostgresServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make()
    connect = source._connect
    opened = []

    def slowly() -> Any:
        opened.append(connect())
        trio.from_thread.run_sync(given_up.set, trio_token=token)
        while not left:
            pass
        return opened[0]

    token, given_up, left = trio.lowlevel.current_trio_token(), trio.Event(), []
    monkeypatch.setattr(source, "_connect", slowly)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.watch, Sink())
        await given_up.wait()
        nursery.cancel_scope.cancel()
    assert len(postgres.sessions(database)) == 1
    left.append(True)
    await until(lambda: postgres.sessions(database) == [])
    assert opened[0].closed
    await until(lambda: source._opening.borrowed_tokens == 0)


async def test_a_server_that_accepts_and_says_nothing_is_given_up(make: Any, database: str) -> None:
    async def say_nothing(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, say_nothing, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        port = listener.socket.getsockname()[1]
        # libpq takes no time-out below 2 s.
        url = f"postgresql+psycopg://reader:{PASSWORD}@127.0.0.1:{port}/x?connect_timeout=2"
        source = PostgresSource(url, {"balance": BALANCE}, CHANNEL)
        with trio.fail_after(PATIENCE_S):
            with pytest.raises(SourceError, match="timeout") as caught:
                await source.watch(Sink())
        assert PASSWORD not in str(caught.value)
        nursery.cancel_scope.cancel()


async def test_a_subscriber_sees_another_program_s_change_also_after_a_restart(
    postgres: PostgresServer, database: str
) -> None:
    settings = Settings(
        jwt_secret=SECRET,
        intervals=Intervals(balance=0.1),
        database=Database(
            url=postgres.url(database), queries={"balance": BALANCE}, notify_channel=CHANNEL
        ),
    )
    async with (
        assembly.open_configured_service(settings) as service,
        hypercorn_serving(service) as port,
        trio_client(port, 5, "balance") as client,
    ):

        async def free_becomes(value: str) -> None:
            with trio.fail_after(PATIENCE_S):
                while not (data := (await client.push()).get("data")) or data[0]["free"] != value:
                    pass

        await free_becomes("5")
        for immediately, value in enumerate(("6.50", "7.50")):
            await trio.to_thread.run_sync(partial(postgres.restart, immediately=bool(immediately)))
            change = f"UPDATE balances SET free = {value} WHERE user_id = 5"
            await trio.run_process(postgres.psql(change, database))
            await free_becomes(value)


async def test_a_notified_change_reaches_a_client_within_milliseconds(
    make: Any, postgres: PostgresServer, database: str
) -> None:
    settings = Settings(
        jwt_secret=SECRET,
        intervals=Intervals(balance=600),
        polling=Polling(change_gap_s=0),
        database=Database(
            url=postgres.url(database), queries={"balance": BALANCE}, notify_channel=CHANNEL
        ),
    )
    took = []
    postgres.admin("GRANT UPDATE ON balances TO PUBLIC", database)  # this once, by the reader
    notify = f"""SELECT pg_notify('{CHANNEL}', '{{"user": 5, "type": "balance"}}')"""
    async with (
        assembly.open_configured_service(settings) as service,
        hypercorn_serving(service) as port,
        trio_client(port, 5, "balance") as client,
    ):
        with make()._engine.connect() as session, trio.fail_after(PATIENCE_S):
            await client.push()
            for number in range(101):
                began = trio.current_time()
                session.exec_driver_sql(f"UPDATE balances SET free = {number} WHERE user_id = 5")
                session.exec_driver_sql(notify)
                data = (await client.push())["data"]
                took.append((trio.current_time() - began) * 1000)
                assert data[0]["free"] == str(number)
    print(f"\nUPDATE to client: median {statistics.median(took):.2f} ms, worst {max(took):.2f} ms")
    assert statistics.median(took) < 50


# --- what is wrong is said, without the password --------------------------------------------------


async def test_what_is_wrong_at_the_start(postgres: PostgresServer, database: str) -> None:
    missing = Query("SELECT user_id FROM missing WHERE user_id IN :user_ids")
    for url, query, complaint in (
        (postgres.url(database, password="guessed"), BALANCE, "password authentication failed"),
        (postgres.url("elsewhere"), BALANCE, 'database "elsewhere" does not exist'),
        (postgres.url(database), missing, 'relation "missing" does not exist'),
        (f"postgresql+psycopg://reader:{PASSWORD}@127.0.0.1:1/x", BALANCE, "refused"),
    ):
        source = PostgresSource(url, {"balance": query}, CHANNEL)
        with pytest.raises(ConfigurationError, match=complaint) as caught:
            await source.check()
        source.close()
        assert "guessed" not in str(caught.value)
        assert PASSWORD not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_another_database_has_no_channel() -> None:
    with pytest.raises(ConfigurationError, match="only PostgreSQL has a notify_channel"):
        PostgresSource("sqlite:////x.db", {"balance": BALANCE}, CHANNEL)


def test_without_psycopg_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    url = f"postgresql+psycopg://reader:{PASSWORD}@127.0.0.1:1/x"
    advice = r"pip install 'trading_push\[postgres\]'"
    with pytest.raises(ConfigurationError, match=advice) as caught:
        SqlSource(url, {"balance": BALANCE})
    assert PASSWORD not in str(caught.value)
    with pytest.raises(ConfigurationError, match=advice):
        PostgresSource(url.replace("psycopg", "pg8000"), {"balance": BALANCE}, CHANNEL)


async def test_the_settings_make_the_source(
    postgres: PostgresServer, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Kept(PostgresSource):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(assembly, "PostgresSource", Kept)
    settings = Settings(
        jwt_secret=SECRET,
        database=Database(
            url=postgres.url(database),
            queries={"balance": DEADLINE},
            notify_channel=CHANNEL,
            statement_timeout_s=7,
        ),
    )
    async with assembly.open_configured_service(settings):
        (source,) = made
        assert source._channel == CHANNEL
        assert decoded(await source.fetch_many(["4"], "balance"))["4"] == [{"deadline": "7s"}]
