"""`trading-push check`: what a server needs is looked at, without serving or writing."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio

from harness import loopback_exchange
from harness.exchange_server import exchange
from harness.feeds import window
from harness.postgres_server import PASSWORD, PostgresServer
from harness.readme import block
from harness.support import PATIENCE_S, SECRET, hypercorn_serving

from trading_push import open_push_service
from trading_push.check.settings import check_settings
from trading_push.cli import commands as cli
from trading_push.settings.schema import Ccxt, Market, Settings

SQL = """
CREATE TABLE balances (user_id bigint, asset text, free numeric, locked numeric);
INSERT INTO balances VALUES (4, 'BTC', 1, 0);
"""
BALANCE = "SELECT user_id, asset, free, locked FROM balances WHERE user_id IN :user_ids"
NOWHERE = "SELECT nope FROM nowhere WHERE user_id IN :user_ids"


def parsed(status: int, out: str) -> dict[str, str]:
    """What is said, by what was checked."""
    found: dict[str, str] = {}
    for line in out.splitlines():
        state, what, text = line[:8].strip(), line[9:21].strip(), line[22:]
        found[what] = f"{state}: {text}"
    is_failed = any(each.startswith("failed: ") for each in found.values())
    assert status == (2 if is_failed else 0)
    return found


@pytest.fixture
def check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Any:
    """Run the command on a configuration: its status and, by what was checked, what is said."""
    for name in list(os.environ):
        if name.startswith("TRADING_PUSH_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shop", raising=False)

    def run(config: str = "", *flags: str) -> tuple[int, dict[str, str]]:
        file = tmp_path / "trading-push.toml"
        file.write_text(textwrap.dedent(config), encoding="utf-8")
        with pytest.raises(SystemExit) as exit_:
            cli.main(["check", "--config", str(file), *flags])
        out, err = capfd.readouterr()
        assert err == ""
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, parsed(exit_.value.code, out)

    return run


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_the_defaults_pass_and_nothing_is_made(tmp_path):
    environment = {n: v for n, v in os.environ.items() if not n.startswith("TRADING_PUSH_")}
    environment["XDG_DATA_HOME"] = str(tmp_path / "data")
    environment["TRADING_PUSH_SERVER_PORT"] = str(free_port())
    done = subprocess.run(
        [sys.executable, "-m", "trading_push", "check"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = parsed(0, done.stdout)
    assert [*found] == [
        *("settings", "tokens", "address", "descriptors", "market", "accounts", "channels")
    ]
    assert {each.partition(":")[0] for each in found.values()} == {"ok"}
    assert not (tmp_path / "data").exists()


def test_it_is_run_as_printed(tmp_path):
    (tmp_path / "trading-push.toml").write_text(f"[server]\nport = {free_port()}\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", block("check")],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "XDG_DATA_HOME": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_settings_that_cannot_be_read_are_the_only_line(check):
    status, found = check("[server]\nport = 70000\n")
    assert (status, [*found]) == (2, ["settings"])
    assert found["settings"].startswith("failed: ")
    assert "server.port" in found["settings"]


def test_one_that_fails_keeps_no_other_from_being_made(check, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = f"""
            [server]
            port = {port}
            [log]
            file = "nowhere/push.log"
            [auth]
            algorithm = "RS256"
            jwks_url = "http://127.0.0.1:{free_port()}/jwks.json"
            [market]
            tape = "no-tape.jsonl"
            [database]
            url = "sqlite:///{tmp_path}/none.db"
            [database.queries.balance]
            sql = "{BALANCE}"
        """
        status, found = check(config.replace('jwks_url = "http', 'jwks_url = "https'))
    assert status == 2
    failed = {what for what, said in found.items() if said.startswith("failed: ")}
    assert failed == {"tokens", "address", "log file", "market", "database"}
    assert f"port {port} of 127.0.0.1 is taken" in found["address"]
    assert "auth.jwks_url" in found["tokens"]
    assert "no-tape.jsonl" in found["market"]
    assert "there is no database file" in found["database"]
    assert found["descriptors"].startswith("ok: ")
    assert found["channels"].startswith("ok: balance")


async def test_where_a_server_runs_already_that_is_said(check):
    async with (
        open_push_service(settings=Settings(jwt_secret=SECRET)) as service,
        hypercorn_serving(service) as port,
    ):
        status, found = await trio.to_thread.run_sync(check, f"[server]\nport = {port}\n")
    assert (status, found["address"]) == (
        0,
        f"warning: a server is running at 127.0.0.1 port {port}",
    )


def test_descriptors_that_do_not_do(check):
    status, found = check("[limits]\nconnections = 100000000\n")
    assert status == 0
    assert found["descriptors"].startswith("warning: enough for ")
    assert "LimitNOFILE=" in found["descriptors"]


def test_a_file_of_the_log_is_looked_at_and_not_made(check, tmp_path):
    assert check('[log]\nfile = "push.log"\n')[1]["log file"].startswith("ok: ")
    assert not (tmp_path / "push.log").exists()
    (tmp_path / "push.log").mkdir()
    assert check('[log]\nfile = "push.log"\n')[1]["log file"].startswith("failed: ")


def test_the_paper_exchange_s_file(check, tmp_path):
    assert check('[database]\npath = "some/where.db"\n')[1]["accounts"].startswith("ok: ")
    (tmp_path / "paper.db").write_bytes(4096 * b"no database ")
    said = check('[database]\npath = "paper.db"\n')[1]["accounts"]
    assert said.startswith("failed: ")
    assert "set database.path" in said


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[str]:
    postgres.create_database("checked", SQL)
    yield "checked"
    postgres.admin('DROP DATABASE "checked" WITH (FORCE)')


def of_database(url: str, **queries: str) -> str:
    tables = [f'[database.queries.{name}]\nsql = "{sql}"' for name, sql in queries.items()]
    return "\n".join([f'[database]\nurl = "{url}"', *tables])


def test_each_query_of_postgresql_is_run(check, postgres, database):
    url = postgres.url(database)
    good = of_database(url, balance=BALANCE)
    status, found = check(good)
    assert (status, found["database"]) == (0, "ok: it answers")
    assert found["balance"].startswith("ok: answered for the made-up user '0' in ")
    assert check(good, "--user", "4")[1]["balance"].startswith("ok: answered for user '4' in ")
    status, found = check(of_database(url, balance=BALANCE, orders=NOWHERE))
    assert status == 2
    assert found["balance"].startswith("ok: ")
    assert found["orders"].startswith("failed: ")
    assert '"nowhere" does not exist' in found["orders"]
    assert '"nowhere" does not exist' in found["database"]


def test_a_made_up_user_is_no_fault_of_a_query(check, postgres, database):
    sql = "SELECT 1 AS realized WHERE CAST(:user_id AS uuid) IS NOT NULL"
    config = of_database(postgres.url(database), pnl=sql).replace(
        "[database.queries.pnl]", "[database.queries.pnl]\nsingle = true"
    )
    status, found = check(config)
    assert status == 0
    assert found["pnl"].startswith("warning: ")
    assert "give --user ID" in found["pnl"]
    assert check(config, "--user", "x")[0] == 2
    status, found = check(config.replace("[database]", '[database]\nuser_id = "uuid"'))
    assert found["pnl"].startswith("ok: ")


def test_no_password_is_printed(check, postgres, database):
    wrong = "a-wrong-password"
    for url in (
        postgres.url(database, password=wrong),
        postgres.url("no-such-database"),
        f"postgresql+psycopg://push:{wrong}@127.0.0.1:{free_port()}/push",
    ):
        status, found = check(of_database(url, balance=BALANCE))
        assert (status, "balance" in found) == (2, False)
        assert found["database"].startswith("failed: the database cannot be opened")
        assert wrong not in str(found)
        assert PASSWORD not in str(found)


def test_each_query_of_sqlite_is_run(check, tmp_path):
    with closing(sqlite3.connect(tmp_path / "shop.db")) as file:
        file.executescript(SQL)
    url = f"sqlite:///{tmp_path}/shop.db"
    status, found = check(of_database(url, balance=BALANCE), "--user", "4")
    assert (status, found["balance"].split(" in ")[0]) == (0, "ok: answered for user '4'")
    status, found = check(of_database(url, balance=BALANCE, orders=NOWHERE))
    assert (status, found["orders"]) == (2, "failed: no such table: nowhere")
    assert found["balance"].startswith("ok: ")


def test_a_channel_of_one_s_own_with_its_query(check, tmp_path):
    with closing(sqlite3.connect(tmp_path / "shop.db")) as file:
        file.executescript(SQL)
    trades = (
        "SELECT user_id, rowid AS n FROM balances WHERE user_id IN :user_ids AND rowid > :after"
    )
    queries = of_database(f"sqlite:///{tmp_path}/shop.db", balance=BALANCE, trades=trades)
    config = f'{queries}\ncursor = "n"\n[channels.trades]\ninterval_s = 2\n'
    status, found = check(config)
    assert (status, [*found]) == (2, ["settings"])
    status, found = check(f'{config}kind = "events"\n', "--user", "4")
    assert (status, found["trades"].split(" in ")[0]) == (0, "ok: answered for user '4'")
    assert found["channels"] == "ok: balance, fills, trades, ticker.SYMBOL, ticker.*"


@contextmanager
def http_service(status: int = 200, hangs: threading.Event | None = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if hangs is not None:
                hangs.wait(PATIENCE_S)
                return  # whoever has asked is gone
            answer = 404 if status == 200 and self.path.startswith("/0/") else status
            self.send_response(answer)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/{{user_id}}/{{data_type}}"
    finally:
        if hangs is not None:
            hangs.set()
        server.shutdown()
        thread.join()
        server.server_close()


TYPES = ("balance", "orders", "pnl", "positions")
TOKEN = "t0p-secret.token"


def of_http(url: str, more: str = "") -> str:
    return f'[http]\nurl = "{url}"\ntoken = "{TOKEN}"\n{more}'


def test_an_http_service_is_asked_for_each_type(check):
    with http_service() as url:
        status, found = check(of_http(url), "--user", "4")
        assert status == 0
        assert all(found[each].startswith("ok: answered for user '4'") for each in TYPES)
        status, found = check(of_http(url))
        assert status == 0
        assert all(found[each].startswith("warning: ") for each in TYPES)
        assert "give --user ID" in found["balance"]
        assert TOKEN not in str(found)
    for answer in (401, 500):
        with http_service(answer) as url:
            status, found = check(of_http(url))
            assert status == 2
            assert all(found[each].startswith("failed: ") for each in TYPES)
            assert f"answered {answer}" in found["pnl"]
            assert TOKEN not in str(found)
    status, found = check(of_http(f"http://127.0.0.1:{free_port()}/{{user_id}}/{{data_type}}"))
    assert status == 2


def test_a_file_of_tls_that_cannot_be_used(check, tmp_path):
    (tmp_path / "ca.pem").write_text("no PEM")
    url = "https://127.0.0.1/{user_id}/{data_type}"
    status, found = check(of_http(url, 'ca_file = "ca.pem"\n'))
    assert status == 2
    assert found["accounts"].startswith("failed: http.ca_file")


def test_each_has_a_deadline(check):
    with http_service(hangs=threading.Event()) as url:
        status, found = check(of_http(url), "--timeout", "0.5", "--user", "4")
    assert status == 2
    assert all(found[each].startswith("failed: ") for each in TYPES)
    assert found["channels"].startswith("ok: ")


def test_a_database_that_never_answers(check):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"postgresql+psycopg://push@127.0.0.1:{mute.getsockname()[1]}/push"
        status, found = check(of_database(url, balance=BALANCE), "--timeout", "0.5")
    assert (status, found["database"]) == (2, "failed: there was no answer within 0.5 s")
    assert found["descriptors"].startswith("ok: ")


def test_functions_of_an_application(check, tmp_path):
    (tmp_path / "shop.py").write_text(
        "import sys\n"
        "def fetch(user, data_type):\n"
        "    if data_type == 'pnl': sys.exit(3)\n"
        "    if data_type == 'orders': raise KeyError(user)\n"
        f"    if data_type == 'positions': raise ValueError({SECRET!r})\n"
        "    return []\n"
    )
    config = f'jwt_secret = "{SECRET}"\n[function]\nfetch = "shop:fetch"\n'
    status, found = check(config, "--user", "4")
    assert status == 2
    assert found["balance"].startswith("ok: ")
    assert found["pnl"].startswith("failed: it asked to end the process")
    assert found["orders"] == "failed: '4'"
    assert found["positions"] == "failed: ***"
    status, found = check(config)
    assert status == 0
    assert found["orders"].startswith("warning: '0' for the made-up user '0'")
    assert check(config.replace("shop:", "shops:"))[1]["accounts"].startswith("failed: ")


def test_a_line_is_one_line_whatever_an_upstream_says(check, tmp_path):
    (tmp_path / "shop.py").write_text(
        "def fetch(user, data_type):\n    raise ValueError('a\\nok       all good \\x1b[2J')\n"
    )
    found = check('[function]\nfetch = "shop:fetch"\n', "--user", "4")[1]
    assert found["balance"] == "failed: a ok all good \\u001b[2J"


async def checked(**settings: Any) -> dict[str, tuple[str, str]]:
    found = await check_settings(Settings(jwt_secret=SECRET, **settings), None, 3)
    return {each.what: (each.state, each.text) for each in found}


async def test_an_exchange_is_asked_for_its_list_and_a_ticker():
    async with exchange("binance") as there:
        market = Market(feed="binance", url=there.url, rest_url=there.rest_url)
        there.listed = ["ETHUSDT", "BTCUSDT"]
        there.greeting = lambda name: [window("100", 8, 6)] if name == "btcusdt@ticker" else []
        found = await checked(market=market)
        assert found["market"] == ("ok", "binance: 2 symbols, BTCUSDT is at 100")
        there.rest_status = 500
        found = await checked(market=market)
        assert found["market"] == ("ok", "binance: BTCUSDT is at 100")
        assert found["symbols"][0] == "warning"
        there.greeting = lambda name: ()
        found = await checked(market=market)
        assert found["market"][0] == "failed"
        assert "no ticker of BTCUSDT within 3 s" in found["market"][1]


async def test_an_exchange_that_cannot_be_reached():
    url = f"ws://127.0.0.1:{free_port()}/stream"
    found = await checked(market=Market(feed="binance", url=url))
    assert found["market"][0] == "failed"
    assert found["log"][0] == "warning"
    assert "ok" in {state for state, _ in found.values()}


async def test_an_exchange_of_ccxt():
    keys = json.dumps({"4": {"apiKey": "key-of-4", "secret": "secret-of-4"}})
    with loopback_exchange.running() as there:
        ccxt = Ccxt(exchange="binance", url=there.url, credentials=keys)
        found = await checked(ccxt=ccxt, market=Market(feed="ccxt"))
        assert found["market"][0] == "ok"
        assert found["exchange"] == ("ok", "it answers")
        assert found["accounts"] == ("warning", "no user's keys are tried: give --user ID")
        settings = Settings(jwt_secret=SECRET, ccxt=ccxt)
        asked = await check_settings(settings, "4", 10)
        assert {each.what: each.state for each in asked}["balance"] == "ok"
        assert "of-4" not in str(asked)
    found = await checked(ccxt=ccxt)
    assert found["exchange"][0] == "failed"
