"""Real Flask and Flask-SQLAlchemy: each call's own context, and nothing checked out afterwards."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flask
import pytest
import trio
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import IntegrityError

from harness.room import by_name, lines
from harness.sources import serving
from harness.support import PATIENCE_S, trio_client, until
from harness.support import serving as command_serving

from trading_push import BatchSource, ConfigurationError, FlaskSource, FunctionSource, load_settings
from trading_push.factory import open_configured_service
from trading_push.settings.schema import Intervals, Polling, Settings

PUSHES = int(os.environ.get("TESTS_FLASK", "2000"))
USERS = [str(number) for number in range(40)]
OUTSIDE = "outside of application context"  # how what the old service's push threads met begins


class Shop:
    """A Flask application with a database, and what has been seen of its contexts."""

    def __init__(self, url: str) -> None:
        self.app = flask.Flask("shop")
        self.app.config["SQLALCHEMY_DATABASE_URI"] = url
        self.db: Any = SQLAlchemy(self.app)
        self.pushed = 0
        self.torn_down: list[BaseException | None] = []
        db = self.db

        class Account(db.Model):
            user_id = db.Column(db.String, primary_key=True)
            total = db.Column(db.String, nullable=False)

        self.Account: Any = Account
        self.app.teardown_appcontext(self.torn_down.append)
        with self.app.app_context():
            db.create_all()
            db.session.add_all([Account(user_id=user, total=f"{user}.10") for user in USERS])
            db.session.commit()
            self.pool = db.engine.pool
        self.torn_down.clear()
        self.outer: Any = None
        self._calls = itertools.count()
        flask.appcontext_pushed.connect(self._count, self.app)

    def _count(self, _app: object) -> None:
        self.pushed += 1

    def total(self, user_id: str) -> str:
        account = self.db.session.get(self.Account, user_id)
        assert self.db.session() is not self.outer
        return str(account.total)

    def fetch(self, user_id: str, data_type: str) -> Any:
        assert flask.current_app._get_current_object() is self.app
        assert "user" not in flask.g
        flask.g.user = user_id
        return {"total": self.total(user_id), "call": next(self._calls)}

    def rows(self) -> int:
        with self.app.app_context():
            return int(self.db.session.query(self.Account).count())

    def close(self) -> None:
        with self.app.app_context():
            self.db.engine.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'shop.db'}"
    else:
        postgres = request.getfixturevalue("postgres")
        name = f"shop_{len(postgres.admin('SELECT 1 FROM pg_database'))}"
        postgres.create_database(name)
        postgres.admin("GRANT CREATE ON SCHEMA public TO reader", name)
        url = postgres.url(name)
    made = Shop(url)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trading_push")


class Told(FlaskSource):
    """One that a test tells to push."""

    sink: Any = None

    async def watch(self, sink: Any) -> None:
        self.sink = sink
        await trio.sleep_forever()


SLOW = Settings(intervals=Intervals(balance=3600))


async def test_pushes_leave_nothing_checked_out(shop: Shop, caplog: Any) -> None:
    source = Told(shop.app, shop.fetch)
    # A context that is open round the service is nobody's in a thread.
    with shop.app.app_context():
        shop.outer = shop.db.session()
        flask.g.user = "outer"
        # With one thread for each, the context of a call would be another's if it were left there.
        async with serving(source, settings=SLOW) as (_, join):
            peers = {user: await join(user, "balance") for user in USERS}
            seen: set[int] = set()
            began = time.process_time()
            pushes = 0
            while True:
                for user, peer in peers.items():
                    with trio.fail_after(PATIENCE_S):
                        while (push := (await peer.next())[0])["type"] == "status":
                            assert push.get("reason", "no_data") == "no_data"  # slow, not failed
                    assert push["data"]["total"] == f"{user}.10"
                    seen.add(push["data"]["call"])
                    pushes += 1
                if pushes >= PUSHES:
                    break
                source.sink.changed([(user, "balance") for user in USERS])
            spent = time.process_time() - began
        assert flask.g.user == "outer"
        assert shop.db.session() is shop.outer
        shop.outer.close()
    print(f"{pushes} pushes, {spent / pushes * 1e6:.0f} us of CPU each")
    assert len(seen) == pushes
    assert shop.pool.checkedout() == 0
    assert shop.torn_down == [None] * (pushes + 1)  # and the outer one
    assert shop.pushed == pushes + 1
    assert not any(OUTSIDE in line or "❌" in line for line in lines(caplog))


async def test_without_its_context_it_would_be_what_the_old_service_met(shop: Shop, caplog: Any):
    async with serving(FunctionSource(shop.fetch), settings=SLOW) as (_, join):
        peer = await join("4", "balance")
        assert (await peer.next())[0]["state"] == "down"
    assert any(OUTSIDE in line for line in lines(caplog))


async def test_an_exception_rolls_back_and_gives_the_session_back(shop: Shop, caplog: Any) -> None:
    def fetch(user_id: str, data_type: str) -> Any:
        shop.db.session.add(shop.Account(user_id="new", total="1"))
        shop.db.session.flush()
        if user_id == "5":
            shop.db.session.execute(shop.db.text("INSERT INTO account VALUES ('5', '1')"))
        raise ValueError("no such account")

    before = shop.rows()
    async with serving(FlaskSource(shop.app, fetch), settings=SLOW) as (_, join):
        for user in ("4", "5"):
            peer = await join(user, "balance")
            assert (await peer.next())[0]["state"] == "down"
    assert any("ValueError: no such account" in line for line in lines(caplog))
    assert not any(OUTSIDE in line for line in lines(caplog))
    assert shop.pool.checkedout() == 0
    assert shop.rows() == before
    error, integrity = filter(None, shop.torn_down)
    assert isinstance(error, ValueError)
    assert isinstance(integrity, IntegrityError)


async def test_a_thread_that_nobody_waits_for_leaves_its_context(shop: Shop, caplog: Any) -> None:
    go_on = threading.Event()
    after: list[str] = []

    def fetch(user_id: str, data_type: str) -> Any:
        shop.total(user_id)
        go_on.wait(30)
        after.append(shop.total(user_id))
        return []

    settings = Settings(intervals=Intervals(balance=3600), polling=Polling(fetch_timeout_s=0.1))
    async with serving(FlaskSource(shop.app, fetch), settings=settings) as (_, join):
        peer = await join("4", "balance")
        assert (await peer.next())[0]["state"] == "down"
    # The service has ended; the thread has not.
    assert shop.pool.checkedout() == 1
    assert shop.torn_down == []
    go_on.set()
    await until(lambda: shop.torn_down and shop.pool.checkedout() == 0)
    assert after == ["4.10"]
    assert not any(OUTSIDE in line for line in lines(caplog))


async def test_many_users_are_asked_for_together(shop: Shop) -> None:
    asked: list[list[str]] = []

    def fetch_many(user_ids: Any, data_type: str) -> Any:
        asked.append(list(user_ids))
        return {user: {"total": shop.total(user)} for user in user_ids}

    source = FlaskSource(shop.app, shop.fetch, fetch_many=fetch_many)
    assert isinstance(source, BatchSource)
    assert not isinstance(FlaskSource(shop.app, shop.fetch), BatchSource)
    async with serving(source, settings=SLOW) as (_, join):
        peers = {user: await join(user, "balance") for user in USERS[:3]}
        for user, peer in peers.items():
            assert (await peer.next())[0]["data"] == {"total": f"{user}.10"}
    assert sorted(itertools.chain(*asked)) == USERS[:3]
    assert shop.torn_down == [None] * len(asked)
    assert shop.pool.checkedout() == 0


# --- other functions and contexts ---------------------------------------------------------------


class Contexts:
    """Context managers of both kinds, and which function was called in which of them."""

    def __init__(self) -> None:
        self.open: list[int] = []
        self.made = 0
        self.threads: set[int] = set()

    @contextmanager
    def plain(self) -> Iterator[None]:
        self.made += 1
        self.open.append(mine := self.made)
        self.threads.add(threading.get_ident())
        yield
        self.open.remove(mine)

    @asynccontextmanager
    async def asynchronous(self) -> Any:
        await trio.lowlevel.checkpoint()
        with self.plain():
            yield
        await trio.lowlevel.checkpoint()

    def ask(self, user_id: str, data_type: str) -> Any:
        return {"asked": user_id, "open": len(self.open)}

    async def ask_async(self, user_id: str, data_type: str) -> Any:
        await trio.lowlevel.checkpoint()
        return self.ask(user_id, data_type)


class Callable_:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    async def __call__(self, user_id: str, data_type: str) -> Any:
        return await self.function(user_id, data_type)


@pytest.mark.parametrize("context", ["plain", "asynchronous"])
@pytest.mark.parametrize("how", ["plain", "asynchronous", "partial", "object"])
async def test_any_function_in_any_context(how: str, context: str) -> None:
    contexts = Contexts()
    fetch = {
        "plain": contexts.ask,
        "asynchronous": contexts.ask_async,
        "partial": partial(contexts.ask_async),
        "object": Callable_(contexts.ask_async),
    }[how]
    if (how, context) == ("plain", "asynchronous"):
        source = FunctionSource(fetch)
        options = {"fetch_context": contexts.asynchronous}
    else:
        source = FunctionSource(fetch, context=getattr(contexts, context))
        options = {}
    async with serving(source, settings=SLOW, **options) as (_, join):
        for user in ("4", "5"):
            peer = await join(user, "balance")
            assert (await peer.next())[0]["data"] == {"asked": user, "open": 1}
    assert (contexts.made, contexts.open) == (2, [])
    in_thread = (how, context) == ("plain", "plain")
    assert (threading.get_ident() not in contexts.threads) == in_thread


@pytest.mark.parametrize("wrong", [lambda user_id: 1, lambda: 1, lambda a, b, c: 1, 4])
def test_a_function_that_cannot_be_asked_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="give a function of user_id, data_type"):
        FunctionSource(wrong)
    with pytest.raises(ConfigurationError, match="give a function of user_id, data_type"):
        FunctionSource(lambda a, b: 1, fetch_many=wrong)


# --- by configuration ---------------------------------------------------------------------------

MODULES = {
    "shop.py": """
from flask import Flask, current_app, g

app = Flask("shop")
number = 4

def create_app():
    made = Flask("made")
    made.config["CURRENCY"] = "USDT"
    return made

def fetch(user_id, data_type):
    assert "user" not in g
    g.user = user_id
    return [{"app": current_app.name, "user": user_id}] if data_type == "balance" else None

def fetch_many(user_ids, data_type):
    return {user: [{"app": current_app.name, "many": user}] for user in user_ids}

def plain(user_id, data_type):
    return [{"user": user_id}]

def broken():
    raise KeyError("SHOP_URL")

def needy(config):
    pass

def nothing():
    pass
""",
    "raising.py": "import os\nos.environ['NO_SUCH_VARIABLE']\n",
    "leaving.py": "raise SystemExit(3)\n",
    "needing.py": "import no_such_library\n",
    "wrong.py": "def (\n",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def configured(home: Path, *lines: str) -> list[str]:
    file = home / "trading-push.toml"
    file.write_text("\n".join(["[function]", *lines]))
    return ["--config", str(file)]


# As an installed command, whose path of imports does not begin with the current directory.
INSTALLED = ("-P", "-m", "trading_push")


@pytest.mark.parametrize(
    ("lines", "balance"),
    [
        (['fetch = "shop:fetch"', 'flask_app = "shop:app"'], {"app": "shop", "user": "4"}),
        (['fetch = "shop:fetch"', 'flask_app = "shop:create_app"'], {"app": "made", "user": "4"}),
        (
            ['fetch = "shop:fetch"', 'fetch_many = "shop:fetch_many"', 'flask_app = "shop:app"'],
            {"app": "shop", "many": "4"},
        ),
        (['fetch = "shop:plain"'], {"user": "4"}),
    ],
)
async def test_a_configuration_serves_functions(home: Path, lines: list[str], balance: Any) -> None:
    flags = configured(home, *lines)
    with command_serving(home, *flags, program=INSTALLED, cwd=home) as server:
        port = int(server.url.rsplit(":", 1)[1].split("/")[0])
        async with trio_client(port, 4, "balance") as client:
            while (push := await client.push())["type"] == "status":
                pass
            assert push["data"] == [balance]
        assert await trio.to_thread.run_sync(server.stop) == 0
        assert server.traces() == []


@pytest.fixture
def importing(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is imported from the directory is forgotten afterwards."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield
    for name in MODULES:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.usefixtures("importing")
@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['fetch = "shopp:fetch"'], "there is no module 'shopp'"),
        (['fetch = "shop.deep:fetch"'], "there is no module 'shop.deep'"),
        (['fetch = "shop:ftech"'], "there is no 'ftech' in it: did you mean 'fetch'?"),
        (['fetch = "shop:number"'], "which is a int: name a function"),
        (['fetch = "shop:broken"'], "give a function of user_id, data_type"),
        (['fetch = "raising:fetch"'], "KeyError: 'NO_SUCH_VARIABLE' (raising.py, line 2)"),
        (['fetch = "leaving:fetch"'], "SystemExit: 3 (leaving.py, line 1)"),
        (['fetch = "needing:fetch"'], "No module named 'no_such_library' (needing.py, line 1)"),
        (['fetch = "wrong:fetch"'], "SyntaxError: invalid syntax"),
        (['fetch = "shop:fetch"', 'flask_app = "shop:number"'], "which gives a int: name a Flask"),
        (['fetch = "shop:fetch"', 'flask_app = "shop:nothing"'], "gives a NoneType: name a Flask"),
        (['fetch = "shop:fetch"', 'flask_app = "shop:Flask"'], "'shop:Flask' raises TypeError"),
        (['fetch = "shop:fetch"', 'flask_app = "shop:needy"'], "'shop:needy' raises TypeError"),
        (
            ['fetch = "shop:fetch"', 'flask_app = "shop:broken"'],
            "'shop:broken' raises KeyError: 'SHOP_URL' (shop.py, line 24): correct it",
        ),
    ],
)
async def test_what_cannot_be_used_is_said_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], says: str
) -> None:
    for name in [name for name in os.environ if name.startswith("TRADING_PUSH_")]:
        monkeypatch.delenv(name)
    _, file = configured(home, *lines)
    settings = load_settings(config=Path(file), flags={})
    with pytest.raises(ConfigurationError) as error:
        async with open_configured_service(settings, authenticate=by_name):
            pass
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_process_says_it_too(home: Path) -> None:
    flags = configured(home, 'fetch = "shopp:fetch"')
    command = [sys.executable, *INSTALLED, "serve", "--port", "0", *flags]
    ended = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("trading-push: function.fetch is 'shopp:fetch'")
    assert ended.stderr.count("\n") == 1
