"""What the README and the pages print is run as printed; the table of settings is the settings."""

from __future__ import annotations

import asyncio
import re
import signal
import sqlite3
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import msgspec
import trio

from harness import loopback_exchange
from harness.exchange_server import exchange
from harness.readme import PAGES, PRINTED, block
from harness.support import (
    PATIENCE_S,
    SECRET,
    SIX,
    TESTS,
    client,
    free_port,
    process,
    serving,
    trio_client,
    until,
)

from trading_push import (
    PostgresSource,
    Principal,
    SqlSource,
    load_settings,
)
from trading_push.factory import open_configured_service
from trading_push.settings.schema import Settings
from trading_push.sources.exchanges import binance
from trading_push.testing import peer

PRINTED_PORT = "127.0.0.1:8000"


def test_every_marked_block_is_tested_here():
    marked = re.findall(r"^<!-- tested: (\w+) -->$", PRINTED, re.M)
    source = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    assert len(marked) == len(set(marked)) > 0
    assert [name for name in marked if f'block("{name}")' not in source] == []


def test_embedding_and_client_run_as_printed(tmp_path):
    # As printed but for the port, which may be taken.
    port = f"127.0.0.1:{free_port()}"
    programs = {"embedding": block("embedding"), "client": block("client")}
    for name, program in programs.items():
        assert program.count(PRINTED_PORT) == 1
        (tmp_path / f"{name}.py").write_text(program.replace(PRINTED_PORT, port))
    with process(sys.executable, str(tmp_path / "embedding.py")) as server:
        server.wait_for_line("Running on")
        with process(sys.executable, str(tmp_path / "client.py")) as reader:
            push = "balance snapshot [{'asset': 'USDT', 'total': '100.00'}]"
            reader.wait_for_line(push, reader.out)
            assert server.stop(signal.SIGTERM) == 0
            assert server.traces() == reader.traces() == []


TABLES = """
CREATE TABLE balances (user_id INTEGER, asset TEXT, free TEXT, locked TEXT);
CREATE TABLE positions (user_id INTEGER, symbol TEXT, side TEXT, quantity TEXT, entry_price TEXT,
    mark_price TEXT, unrealized_pnl TEXT);
CREATE TABLE pnl (user_id INTEGER, realized TEXT, unrealized TEXT, fees TEXT, total TEXT,
    currency TEXT, by_symbol TEXT);
CREATE TABLE orders (user_id INTEGER, order_id TEXT, symbol TEXT, side TEXT, type TEXT, price TEXT,
    quantity TEXT, filled TEXT, status TEXT, created_at INTEGER, updated_at INTEGER);
INSERT INTO positions VALUES (4, 'BTCUSDT', 'long', '0.5', '61000', '61500.10', '250.05');
"""


async def test_configuration_loads_and_its_queries_run(tmp_path, monkeypatch):
    monkeypatch.delenv("TRADING_PUSH_CONFIG", raising=False)
    file = tmp_path / "trading-push.toml"
    file.write_text(block("configuration"), encoding="utf-8")
    settings = load_settings(config=file, flags={})
    assert settings.intervals.balance == 2
    path = tmp_path / "accounts.sqlite3"
    database = sqlite3.connect(path)
    database.executescript(TABLES)
    database.close()
    source = SqlSource(f"sqlite:///{path}", settings.database.queries)
    try:
        await source.check()
        read = await source.fetch_many(["4", "5"], "positions")
        (position,) = msgspec.json.decode(read["4"])
        assert position["unrealized_pnl"] == "250.05"
        assert msgspec.json.decode(read["5"]) == []
        assert msgspec.json.decode(await source.fetch("4", "pnl"))["total"] == "0"
        assert msgspec.json.decode(await source.fetch("4", "orders")) == []
    finally:
        source.close()


async def test_events_are_read_as_printed(tmp_path, monkeypatch):
    monkeypatch.delenv("TRADING_PUSH_CONFIG", raising=False)
    file = tmp_path / "trading-push.toml"
    file.write_text(block("events"), encoding="utf-8")
    settings = load_settings(config=file, flags={})
    assert settings.channels["fills"].named("fills").kind == "events"
    path = tmp_path / "accounts.sqlite3"
    database = sqlite3.connect(path)
    database.executescript(
        "CREATE TABLE fills (fill_id INTEGER PRIMARY KEY, user_id, order_id, symbol, side, price,"
        " quantity, fee, fee_asset, at);"
        "CREATE TABLE alerts (alert_id INTEGER PRIMARY KEY, user_id TEXT, text TEXT)"
    )
    source = SqlSource(f"sqlite:///{path}", settings.database.queries)
    try:
        await source.check()
        assert (await source.fetch("4", "alerts")).taken()
        database.execute("INSERT INTO alerts VALUES (7, '4', 'margin call')")
        database.commit()
        (alert,) = (await source.fetch("4", "alerts")).events
        assert msgspec.json.decode(alert) == {"alert_id": 7, "text": "margin call"}
    finally:
        source.close()
        database.close()


async def test_a_trigger_tells_as_printed(tmp_path, monkeypatch, postgres):
    monkeypatch.delenv("TRADING_PUSH_CONFIG", raising=False)
    file = tmp_path / "trading-push.toml"
    file.write_text(block("notify"), encoding="utf-8")
    database = load_settings(config=file, flags={}).database
    postgres.create_database(
        "as_printed", "CREATE TABLE balances (user_id bigint, asset text, free numeric, locked int)"
    )
    postgres.admin(block("trigger"), "as_printed")
    told, news = trio.open_memory_channel(100)

    class Sink:
        def missed(self):
            told.send_nowait("missed")

        def changed(self, changes):
            for change in changes:
                told.send_nowait(change)

    url = postgres.url("as_printed")
    source = PostgresSource(url, database.queries, database.notify_channel)
    await source.check()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.watch, Sink())
        with trio.fail_after(PATIENCE_S):
            assert await news.receive() == "missed"
            for change, value in (
                ("INSERT INTO balances VALUES (4, 'BTC', 0.10, 1)", b'"total":"1.10"'),
                ("UPDATE balances SET free = 2.50 WHERE user_id = 4", b'"total":"3.50"'),
                ("DELETE FROM balances WHERE user_id = 4", b"[]"),
            ):
                await trio.to_thread.run_sync(postgres.admin, change, "as_printed")
                assert await news.receive() == ("4", "balance")
                assert value in bytes(await source.fetch("4", "balance"))
        nursery.cancel_scope.cancel()
    source.close()


def test_http_configuration_loads(tmp_path, monkeypatch):
    # test_http_source.py serves it.
    monkeypatch.delenv("TRADING_PUSH_CONFIG", raising=False)
    file = tmp_path / "trading-push.toml"
    file.write_text(block("http"), encoding="utf-8")
    http = load_settings(config=file, flags={}).http
    assert (http.pointer, http.headers) == ("/data", {"X-Api-Version": "2"})


async def test_live_market_data_is_configured_as_printed(tmp_path, monkeypatch):
    monkeypatch.delenv("TRADING_PUSH_CONFIG", raising=False)
    monkeypatch.setenv("TRADING_PUSH_JWT_SECRET", SECRET)
    samples = {"binance": block("binance"), "linear": block("bybit")}
    symbols = ["BTCUSDT", "ETHUSDT", "SOLUSDT", "BNBUSDT", "XRPUSDT"]
    for dialect, sample in samples.items():
        file = tmp_path / f"{dialect}.toml"
        file.write_text(sample, encoding="utf-8")
        printed = load_settings(config=file, flags={}).market.url
        assert (printed or binance.URL).endswith(("/stream", "/linear"))
        async with exchange(dialect) as there:
            flags = {"market.url": there.url, "database.path": str(tmp_path / f"{dialect}.db")}
            settings = load_settings(config=file, flags=flags)
            frame = {
                "binance": {
                    "stream": "btcusdt@bookTicker",
                    "data": {"u": 1, "s": "BTCUSDT", "b": "61500.10", "a": "61500.20"},
                },
                "linear": {
                    "topic": "tickers.BTCUSDT",
                    "type": "snapshot",
                    "data": {"symbol": "BTCUSDT", "bid1Price": "61500.10"},
                    "cs": 1,
                    "ts": 1,
                },
            }[dialect]
            async with open_configured_service(settings) as service:
                await until(lambda there=there: there.has(*symbols))
                async with peer(service, "4") as four:
                    await four.subscribe("ticker.BTCUSDT")
                    await there.say(frame)
                    while (push := await four.push())["type"] != "snapshot":
                        pass
                    assert push["data"]["bid"] == "61500.10"
                    reply = await four.request("subscribe", args=["ticker.DOGEUSDT"])
                    assert reply["results"][0]["error"]["code"] == "unknown_channel"


SHOP_MODELS = """
from flask_sqlalchemy import SQLAlchemy

db = SQLAlchemy()


class Holding(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    user_id = db.Column(db.String)
    asset = db.Column(db.String)
    total = db.Column(db.String)
"""
SHOP_APP = """
from flask import Flask

from shop.models import Holding, db


def create_app():
    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///THERE"
    db.init_app(app)
    with app.app_context():
        db.create_all()
        db.session.add(Holding(user_id="4", asset="BTC", total="0.50"))
        db.session.commit()
        db.engine.dispose()
    return app
"""
# In place of what the library's program is served by, a look at what it serves.
SHOP_LIBRARY = """
import trio

from trading_push import Principal
from trading_push.testing import peer


async def serve(service, config):
    async with peer(service, "4") as four:
        await four.subscribe("balance")
        print((await four.push("balance"))["data"], flush=True)


trio.run(main, Principal, Config())
"""


def test_a_flask_application_is_served_as_printed(tmp_path):
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "__init__.py").touch()
    (shop / "models.py").write_text(SHOP_MODELS)
    (shop / "app.py").write_text(SHOP_APP.replace("THERE", str(tmp_path / "shop.db")))
    (shop / "push.py").write_text(block("flask_function"))
    (tmp_path / "trading-push.toml").write_text(block("flask_configuration"))

    async def balance(url: str) -> Any:
        async with client(url, 4) as four:
            await four.subscribe("balance")
            return (await four.until(lambda push: push["type"] == "snapshot"))["data"]

    expected = [{"asset": "BTC", "total": "0.50"}]
    with serving(tmp_path, "--config", "trading-push.toml", cwd=tmp_path) as server:
        assert asyncio.run(balance(server.url)) == expected
        assert server.stop() == 0
        assert server.traces() == []
    (tmp_path / "shop.db").unlink()
    (tmp_path / "program.py").write_text(block("flask_library") + SHOP_LIBRARY)
    with process(sys.executable, "program.py", cwd=tmp_path) as running:
        running.wait_for_line(str(expected), running.out)


async def test_an_exchange_is_read_as_printed(tmp_path):
    (tmp_path / "keys.toml").write_text(block("ccxt_keys"))
    (tmp_path / "keys.toml").chmod(0o600)
    file = tmp_path / "trading-push.toml"
    with loopback_exchange.running() as exchange:
        file.write_text(block("ccxt").replace("[ccxt]", f'[ccxt]\nurl = "{exchange.url}"'))
        with serving(tmp_path, "--config", str(file)) as server:
            port = int(server.url.rsplit(":", 1)[1].split("/")[0])
            async with trio_client(port, 4, "positions", "ticker.BTCUSDT") as four:
                seen = {}
                with trio.fail_after(PATIENCE_S):
                    while len(seen) < 2:
                        if (push := await four.push())["type"] == "snapshot":
                            seen[push["channel"]] = push["data"]
            assert await trio.to_thread.run_sync(server.stop) == 0
            assert server.traces() == []
    assert seen["positions"][0]["entry_price"] == "61450.5"
    assert seen["ticker.BTCUSDT"]["last"] == loopback_exchange.SWAP_PRICE


class Silent:
    async def fetch(self, user_id: str, data_type: str) -> None:
        return None


def names_of(program: str) -> dict[str, Any]:
    """What a printed program defines."""
    names: dict[str, Any] = {"__name__": "__main__"}  # where dataclasses look
    exec(compile(program, "printed.py", "exec"), names)
    return names


async def test_channels_are_published_as_printed(capsys):
    await names_of(block("channels"))["main"](Silent(), Principal)
    assert capsys.readouterr().out == "0\n"


@asynccontextmanager
async def native(program: str, *arguments: Any) -> AsyncIterator[int]:
    """Run the `main` of a printed program that serves without ASGI; its port."""
    port = free_port()
    assert program.count("8000") == 1
    names = names_of(program.replace("8000", str(port)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(names["main"], *arguments)
        with trio.fail_after(PATIENCE_S):
            while True:
                try:
                    stream = await trio.open_tcp_stream("127.0.0.1", port)
                    break
                except OSError:
                    await trio.sleep(0.05)
        await stream.aclose()
        yield port
        nursery.cancel_scope.cancel()


def as_four(token: str) -> Principal:
    return Principal("4")


async def test_streams_are_sent_as_printed():
    async with (
        native(block("streams"), as_four) as port,
        trio_client(port, 4, "spread") as four,
    ):
        arrived = [await four.push() for _ in range(4)]
    prices = [push["data"]["price"] for push in arrived[:3]]
    assert prices == ["61500.10", "61501.10", "61502.10"]
    assert arrived[3]["reason"] == "ended"


async def test_native_is_served_as_printed():
    async with native(block("native"), Silent(), as_four) as port, trio_client(port, 4) as four:
        assert (await four.request("list"))["ok"]


def test_disconnect_is_logged_as_printed(tmp_path):
    async def come_and_go(url: str) -> None:
        async with client(url, 4) as each:
            await each.subscribe(*SIX)
            await each.until_snapshots(SIX)
            await each.socket.close(1000, "done")

    expected = block("disconnect").replace("192.168.100.172", "127.0.0.1").splitlines()
    with serving(tmp_path) as server:
        asyncio.run(come_and_go(server.url))
        server.wait_for_line(expected[-1])
        assert server.stop() == 0
    assert server.err[-len(expected) :] == expected


def settings_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in attrs.fields(type(tree)):
        value = getattr(tree, field.name)
        if attrs.has(type(value)):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value or None if isinstance(value, dict) else value


def unit_of(setting: str) -> str:
    if setting.endswith(("_per_s", "_hz")):
        return "1/s"
    if setting.endswith("_s") or setting.startswith("intervals."):
        return "s"
    return "bytes" if setting.endswith("_bytes") else ""


def test_table_of_settings_is_complete_and_right():
    page = PAGES["docs/configuration.md"]
    [table] = re.findall(r"<!-- settings -->\n(.*?)\n<!-- end of settings -->", page, re.S)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    printed = {}
    for name, default, unit, meaning in rows:
        assert meaning
        setting = name.strip("`")
        assert unit == unit_of(setting), setting
        value = default.strip("`")
        printed[setting] = None if default == "not set" else tomllib.loads(f"x = {value}")["x"]
    assert printed == dict(settings_of(Settings()))
    assert list(printed) == [name for name, _ in settings_of(Settings())]
