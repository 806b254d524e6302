"""What must hold for every source, each against its real part: one suite for all of them."""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import flask
import pytest
import trio
from flask_sqlalchemy import SQLAlchemy

from harness import loopback_exchange
from harness.http_service import HTTP_CLIENT
from harness.pgbouncer import pooling
from harness.room import lines
from harness.sources import Service, serving
from harness.support import PATIENCE_S, until
from harness.support import hypercorn_serving as served_over_http

from trading_push import (
    CcxtSource,
    ExchangeOptions,
    FlaskSource,
    FunctionSource,
    PostgresSource,
    SourceError,
    SqlSource,
)
from trading_push.settings.schema import Intervals, Polling, Settings
from trading_push.settings.sources import Query
from trading_push.sources.ccxt.exchange import CcxtExchange
from trading_push.sources.http.source import HttpSource

TABLE = "CREATE TABLE balances (user_id TEXT, asset TEXT, free TEXT)"
BALANCE = Query("SELECT user_id, asset, free FROM balances WHERE user_id IN :user_ids")
USERS = [str(number) for number in range(1, 21)]
SETTINGS = Settings(
    intervals=Intervals(balance=0.1), polling=Polling(watch_linger_s=0.1, fetch_timeout_s=5)
)


class Upstream:
    """A source and its real part, in which each user has one amount of BTC.

    Args:
        source: What is tried.
        write: Gives a user an amount; plain, and run in a worker thread.
        stop: Makes the upstream fail; plain as well.
        start: Makes it well again.
    """

    def __init__(
        self,
        source: Any,
        write: Callable[[str, str], object],
        stop: Callable[[], object],
        start: Callable[[], object],
    ) -> None:
        self.source = Counting(source)
        self.write = lambda user, free: trio.to_thread.run_sync(write, user, free)
        self.stop = partial(trio.to_thread.run_sync, stop)
        self.start = partial(trio.to_thread.run_sync, start)


class Counting:
    """A source that counts for whom it is asked."""

    def __init__(self, source: Any) -> None:
        self.asked: list[str] = []
        self._source = source
        for name in ("watch", "session"):
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))
        self.fetch = self._counted(source.fetch)
        many = getattr(source, "fetch_many", None)
        self.fetch_many = None if many is None else self._counted(many)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def note(users: str | Sequence[str]) -> None:
            self.asked += [users] if isinstance(users, str) else users

        async def ask(users: Any, data_type: str) -> Any:
            note(users)
            return await function(users, data_type)

        def ask_plainly(users: Any, data_type: str) -> Any:
            note(users)
            return function(users, data_type)

        return ask if inspect.iscoroutinefunction(function) else ask_plainly


def written(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, timeout=PATIENCE_S, isolation_level=None)) as file:
        for statement in statements:
            file.execute(statement)


def amount(user: str, free: str) -> tuple[str, str]:
    return (
        f"DELETE FROM balances WHERE user_id = '{user}'",
        f"INSERT INTO balances VALUES ('{user}', 'BTC', '{free}')",
    )


AWAY = "ALTER TABLE balances RENAME TO gone"
BACK = "ALTER TABLE gone RENAME TO balances"


@asynccontextmanager
async def sqlite(tmp_path: Path, request: Any) -> AsyncIterator[Upstream]:
    path = tmp_path / "accounts.sqlite3"
    written(path, "PRAGMA journal_mode = WAL", TABLE)
    with closing(SqlSource(f"sqlite:///{path}", {"balance": BALANCE})) as source:
        yield Upstream(
            source,
            lambda user, free: written(path, *amount(user, free)),
            lambda: written(path, AWAY),
            lambda: written(path, BACK),
        )


@asynccontextmanager
async def postgresql(tmp_path: Path, request: Any) -> AsyncIterator[Upstream]:
    server = request.getfixturevalue("postgres")
    name = f"source_{tmp_path.name}"[:60]
    server.create_database(name, TABLE.replace("free TEXT", "free numeric"))
    url = server.url(name)
    with closing(PostgresSource(url, {"balance": BALANCE}, "balances", threads=4)) as source:
        try:
            yield Upstream(
                source,
                lambda user, free: server.admin(";".join(amount(user, free)), name),
                server.stop,
                server.start,
            )
        finally:
            server.stop()  # whatever a test has left it in
            server.start()


@asynccontextmanager
async def pgbouncer(tmp_path: Path, request: Any) -> AsyncIterator[Upstream]:
    server = request.getfixturevalue("postgres")
    name = f"pooled_{tmp_path.name}"[:60]
    server.create_database(name, TABLE.replace("free TEXT", "free numeric"))
    with (
        pooling(server) as pooler,
        closing(SqlSource(pooler.url(name), {"balance": BALANCE}, threads=8)) as source,
    ):
        try:
            yield Upstream(
                source,
                lambda user, free: server.admin(";".join(amount(user, free)), name),
                server.stop,
                server.start,
            )
        finally:
            server.stop()  # whatever a test has left it in
            server.start()


@asynccontextmanager
async def mariadb(tmp_path: Path, request: Any) -> AsyncIterator[Upstream]:
    server = request.getfixturevalue("mariadb")
    name = f"source_{tmp_path.name}"[:60]
    server.create_database(name, TABLE)

    def write(user: str, free: str) -> None:
        for statement in amount(user, free):
            server.admin(statement, name)

    with closing(SqlSource(server.url(name), {"balance": BALANCE}, threads=4)) as source:
        try:
            yield Upstream(source, write, server.stop, server.start)
        finally:
            server.stop()
            server.start()


@asynccontextmanager
async def flask_application(tmp_path: Path, request: Any) -> AsyncIterator[Upstream]:
    path = tmp_path / "shop.sqlite3"
    written(path, "PRAGMA journal_mode = WAL", TABLE)
    app = flask.Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{path}"
    db = SQLAlchemy(app)

    def fetch(user_id: str, data_type: str) -> Any:
        if data_type != "balance":
            return None
        assert flask.current_app.name == "shop"
        rows = db.session.execute(
            db.text("SELECT asset, free FROM balances WHERE user_id = :user_id"),
            {"user_id": user_id},
        )
        return [dict(row._mapping) for row in rows]

    yield Upstream(
        FlaskSource(app, fetch),
        lambda user, free: written(path, *amount(user, free)),
        lambda: written(path, AWAY),
        lambda: written(path, BACK),
    )
    with app.app_context():
        assert db.engine.pool.checkedout() == 0
        db.engine.dispose()


@asynccontextmanager
async def function(tmp_path: Path, request: Any) -> AsyncIterator[Upstream]:
    amounts: dict[str, str] = {}
    fails = threading.Event()

    async def fetch_many(user_ids: Sequence[str], data_type: str) -> Any:
        await trio.lowlevel.checkpoint()
        if fails.is_set():
            raise ConnectionError("no back end")
        if data_type != "balance":
            return {}
        return {
            user: [{"asset": "BTC", "free": amounts[user]}] if user in amounts else []
            for user in user_ids
        }

    async def fetch(user_id: str, data_type: str) -> Any:
        return (await fetch_many([user_id], data_type)).get(user_id)

    source = FunctionSource(fetch, fetch_many=fetch_many)
    yield Upstream(source, amounts.__setitem__, fails.set, fails.clear)


@asynccontextmanager
async def http(tmp_path: Path, request: Any) -> AsyncIterator[Upstream]:
    service = Service()
    amounts: dict[str, str] = {}
    fails = threading.Event()

    def answer(path: str) -> tuple[int, bytes, dict[str, str]]:
        _, _, user, data_type = path.split("/")
        if fails.is_set():
            return 500, b"", {}
        if data_type != "balance" or user not in amounts:
            return 200, b'{"data": []}', {}
        etag = f'"{user} {amounts[user]}"'
        if service.headers[-1].get("if-none-match") == etag:
            return 304, b"", {"ETag": etag}
        body = f'{{"data": [{{"asset": "BTC", "free": "{amounts[user]}"}}]}}'
        return 200, body.encode(), {"ETag": etag}

    service.answer = answer
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(served_over_http(service))
        url = f"http://127.0.0.1:{port}/users/{{user_id}}/{{data_type}}"
        source = HttpSource(url, pointer="/data", client=HTTP_CLIENT)
        stack.push_async_callback(source.aclose)
        yield Upstream(source, amounts.__setitem__, fails.set, fails.clear)


@asynccontextmanager
async def ccxt(tmp_path: Path, request: Any) -> AsyncIterator[Upstream]:
    monkeypatch = request.getfixturevalue("monkeypatch")
    users = [*USERS, "4"]
    for user in users:
        monkeypatch.setitem(loopback_exchange.KEYS, f"key-of-{user}", f"secret-of-{user}")
    make = CcxtExchange.__init__

    def hurried(self: CcxtExchange, *args: Any, **named: Any) -> None:
        make(self, *args, **named)
        self.api.rateLimit = 0.1  # it pauses for seconds between two requests of some weight

    monkeypatch.setattr(CcxtExchange, "__init__", hurried)
    with loopback_exchange.running() as exchange:

        def write(user: str, free: str) -> None:
            account = [{"asset": "BTC", "free": free, "locked": "0"}]
            exchange.balances[f"key-of-{user}"] = account

        source = CcxtSource(
            ExchangeOptions("binance", url=exchange.url, timeout_s=4),
            {user: {"apiKey": f"key-of-{user}", "secret": f"secret-of-{user}"} for user in users},
        )
        with closing(source):
            yield Upstream(
                source,
                write,
                lambda: exchange.misbehaves.update({"/api/v3/account": "down"}),
                exchange.misbehaves.clear,
            )


UPSTREAMS = [sqlite, postgresql, pgbouncer, mariadb, flask_application, function, http, ccxt]


@pytest.fixture(params=UPSTREAMS, ids=lambda each: each.__name__)
async def upstream(request: Any, tmp_path: Path) -> AsyncIterator[Upstream]:
    async with request.param(tmp_path, request) as made:
        yield made


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trading_push")


async def free_becomes(peer: Any, free: str | None) -> None:
    with trio.fail_after(PATIENCE_S):
        while True:
            [push] = await peer.next()
            if push["type"] != "status":
                found = push["data"][0]["free"] if push["data"] else None
                if found == free:
                    return


async def state_becomes(peer: Any, state: str) -> None:
    with trio.fail_after(PATIENCE_S):
        while (await peer.next())[0].get("state") != state:
            pass


async def test_a_value_arrives_with_every_digit_and_each_change_follows(
    upstream: Upstream,
) -> None:
    await upstream.write("4", "0.10")
    async with serving(upstream.source, settings=SETTINGS) as (_, join):
        peer = await join("4", "balance")
        await free_becomes(peer, "0.10")
        for free in ("123456789012345678.123456789012", "0.00000001", "5"):
            await upstream.write("4", free)
            await free_becomes(peer, free)


async def test_an_unchanged_value_is_not_pushed_again(upstream: Upstream) -> None:
    await upstream.write("4", "1.50")
    async with serving(upstream.source, settings=SETTINGS) as (_, join):
        peer = await join("4", "balance")
        await free_becomes(peer, "1.50")
        asked = len(upstream.source.asked)
        await until(lambda: len(upstream.source.asked) >= asked + 5)
        assert peer.sent == []


async def test_a_user_without_an_account_has_an_empty_list(upstream: Upstream) -> None:
    async with serving(upstream.source, settings=SETTINGS) as (_, join):
        peer = await join("a-stranger", "balance")
        await free_becomes(peer, None)


async def test_an_upstream_that_fails_is_said_to_and_comes_back_by_itself(
    upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    await upstream.write("4", "1")
    async with serving(upstream.source, settings=SETTINGS) as (service, join):
        peer = await join("4", "balance")
        await free_becomes(peer, "1")
        await upstream.stop()
        await state_becomes(peer, "stale")
        assert service.statistics().failing_fetches == 1
        latest = service.latest("balance", "4")
        assert latest is not None
        assert b'"1"' in bytes(latest.data)
        await upstream.start()
        await upstream.write("4", "2")
        await free_becomes(peer, "2")
        await until(lambda: service.statistics().topics == {"balance": {"live": 1}})
        assert service.statistics().failing_fetches == 0
    told = [line for line in lines(caplog) if "用户4的balance" in line]
    assert len(told) == 2, told
    assert told[0].startswith("❌ 获取用户4的balance数据失败: ")
    assert told[1] == "✅ 用户4的balance数据已恢复"


async def test_nobody_watches_and_nothing_is_asked_and_three_tabs_are_one(
    upstream: Upstream,
) -> None:
    await upstream.write("4", "1")
    asked = upstream.source.asked
    async with serving(upstream.source, settings=SETTINGS) as (_, join):
        await trio.sleep(0.5)
        assert asked == []
        tabs = [await join("4", "balance") for _ in range(3)]
        for tab in tabs:
            await free_becomes(tab, "1")
        del asked[:]
        began = trio.current_time()
        await until(lambda: len(asked) >= 5)
        assert trio.current_time() - began > 0.35  # one asking each 0.1 s, not three
        assert set(asked) == {"4"}
        for tab in tabs:
            tab.leave()
        await trio.sleep(0.3)
        del asked[:]
        await trio.sleep(0.5)
        assert asked == []


async def test_whoever_comes_and_goes_and_cancels_leaves_nothing(upstream: Upstream) -> None:
    for user in USERS:
        await upstream.write(user, user)

    async def once(seconds: float) -> None:
        with trio.move_on_after(seconds):
            async with serving(upstream.source, settings=SETTINGS) as (_, join):
                peers = [await join(user, "balance") for user in USERS]
                for peer, user in zip(peers, USERS, strict=True):
                    await free_becomes(peer, user)
                    peer.leave()
                await trio.sleep_forever()

    await once(0.5)
    before = len(os.listdir("/proc/self/fd"))
    for thousandth in itertools.chain(range(0, 120, 6), (150, 300)):
        await once(thousandth / 1000)
    # Worker threads whose answer nobody waits for any more give back what they have.
    # A pool of 15 connections to a file in WAL mode has 45 descriptors; a leak would have hundreds.
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before + 48)
    async with serving(upstream.source, settings=SETTINGS) as (_, join):
        await free_becomes(await join("7", "balance"), "7")


async def test_an_error_says_whether_to_try_again(upstream: Upstream) -> None:
    await upstream.stop()
    fetch = upstream.source.fetch
    with pytest.raises(Exception) as caught:  # noqa: PT011 - an application's may be any
        if inspect.iscoroutinefunction(fetch):
            await fetch("4", "balance")
        else:
            await trio.to_thread.run_sync(fetch, "4", "balance")
    await upstream.start()
    if type(upstream.source._source) not in (FlaskSource, FunctionSource):
        assert isinstance(caught.value, SourceError)
        assert caught.value.retryable
