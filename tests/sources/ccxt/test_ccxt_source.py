"""ccxt itself against an exchange on loopback: shapes, digits, failures, and no secret anywhere."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import ccxt
import pytest
import trio

from harness import loopback_exchange
from harness.loopback_exchange import LoopbackExchange
from harness.proxy_server import proxy_running
from harness.room import by_name, lines
from harness.sources import serving
from harness.support import PATIENCE_S, until

from trading_push import (
    CcxtFeed,
    CcxtSource,
    ConfigurationError,
    ExchangeOptions,
    SessionSource,
    SourceError,
    Ticker,
    WatchedFeed,
    load_settings,
)
from trading_push.factory import open_configured_service
from trading_push.settings.schema import Intervals, Polling, Settings
from trading_push.sources.ccxt.credentials import (
    CredentialsFile,
    credentials_of_file,
    credentials_of_json,
)
from trading_push.sources.ccxt.exchange import CcxtExchange, RequestRefused
from trading_push.transport.outbound_proxies import OutboundProxies

CREDENTIALS = {
    user: {"apiKey": f"key-of-{user}", "secret": f"secret-of-{user}"} for user in ("4", "5")
}
SECRETS = ("key-of", "secret-of", "signature", "127.0.0.1")
FAST = Settings(intervals=Intervals(balance=0.2, positions=0.2, pnl=0.2, orders=0.2))


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """ccxt's rate limiter pauses for seconds between two requests of some weight."""
    make = CcxtExchange.__init__

    def made(self: CcxtExchange, *args: Any, **named: Any) -> None:
        make(self, *args, **named)
        self.api.rateLimit = 0.1

    monkeypatch.setattr(CcxtExchange, "__init__", made)


@pytest.fixture
def exchange() -> Iterator[LoopbackExchange]:
    with loopback_exchange.running() as running:
        yield running


def options(there: LoopbackExchange, **more: Any) -> ExchangeOptions:
    return ExchangeOptions(**{"exchange": "binance", "url": there.url, "timeout_s": 5, **more})


@asynccontextmanager
async def opened(there: LoopbackExchange, *users: str, **more: Any) -> Any:
    source = CcxtSource(options(there, **more), CREDENTIALS)
    assert isinstance(source, SessionSource)
    async with trio.open_nursery() as nursery:

        async def hold(user: str, *, task_status: Any) -> None:
            async with source.session(user):
                task_status.started()
                await trio.sleep_forever()

        for user in users or ("4",):
            await nursery.start(hold, user)
        yield source
        nursery.cancel_scope.cancel()
    source.close()


# --- accounts -----------------------------------------------------------------------------------


async def test_a_spot_account_with_every_digit(exchange: LoopbackExchange) -> None:
    async with opened(exchange, "4", "5") as source:
        assert await source.fetch("4", "balance") == [
            {
                "asset": "BTC",
                "free": Decimal("0.12345678901234567890"),
                "locked": Decimal("0.5"),
                "total": Decimal("0.6234567890123456789"),
            },
            {
                "asset": "USDT",
                "free": Decimal("100.10"),
                "locked": Decimal(0),
                "total": Decimal("100.10"),
            },
        ]
        assert [row["asset"] for row in await source.fetch("5", "balance")] == ["ETH"]
        first, second = await source.fetch("4", "orders")
        assert first == {
            "order_id": "1",
            "symbol": "BTCUSDT",
            "side": "buy",
            "type": "limit",
            "price": Decimal("60000.10"),
            "quantity": Decimal("1"),
            "filled": Decimal(0),
            "status": "new",
            "created_at": 1763600000000,
            "updated_at": 1763600000500,
        }
        assert (second["status"], second["filled"]) == ("partially_filled", Decimal("0.5"))
        # A spot account has no positions, and what is no channel of an exchange's is not asked for.
        for data_type in ("positions", "pnl", "margin"):
            assert await source.fetch("4", data_type) is None
    assert exchange.calls["/api/v3/exchangeInfo"] == 1  # the markets, once for both
    assert ("/api/v3/account", "key-of-5") in exchange.keys_seen
    assert not [path for path, _ in exchange.keys_seen if path.startswith(("/fapi", "/dapi"))]


@pytest.mark.parametrize("name", ["binance", "binanceusdm"])
async def test_positions_and_pnl_say_what_the_exchange_says(
    exchange: LoopbackExchange, name: str
) -> None:
    market_type = "swap" if name == "binance" else None
    async with opened(exchange, exchange=name, market_type=market_type) as source:
        assert await source.fetch("4", "positions") == [
            {
                "symbol": "BTCUSDT",
                "side": "short",
                "quantity": Decimal("0.25"),
                "entry_price": Decimal("61450.5"),
                "mark_price": Decimal("61499.88888888"),
                "unrealized_pnl": Decimal("-12.345678"),
            }
        ]
        unrealized = Decimal("-12.345678")
        assert await source.fetch("4", "pnl") == {
            "realized": None,
            "unrealized": unrealized,
            "fees": None,
            "total": None,
            "currency": "USDT",
            "by_symbol": [
                {"symbol": "BTCUSDT", "realized": None, "unrealized": unrealized, "fees": None}
            ],
        }
        assert [order["order_id"] for order in await source.fetch("4", "orders")] == ["3"]


async def test_who_has_no_keys_has_an_empty_account(exchange: LoopbackExchange) -> None:
    async with opened(exchange, "9") as source:
        for data_type in ("balance", "positions", "orders"):
            assert await source.fetch("9", data_type) == []
        assert await source.fetch("9", "pnl") is None
        with pytest.raises(SourceError, match="session is not open"):
            await source.fetch("4", "balance")
    assert exchange.calls == {}


async def test_the_calls_of_a_user_go_one_at_a_time(exchange: LoopbackExchange) -> None:
    exchange.misbehaves = dict.fromkeys(["/api/v3/account", "/api/v3/openOrders"], "a little slow")
    async with opened(exchange, "4", "5") as source, trio.open_nursery() as nursery:
        for user in ("4", "5", "4", "5"):
            nursery.start_soon(source.fetch, user, "balance")
            nursery.start_soon(source.fetch, user, "orders")
    assert exchange.most_together["key-of-4"] == exchange.most_together["key-of-5"] == 1
    assert exchange.calls["/api/v3/account"] == 4


@pytest.mark.parametrize(
    ("how", "says", "retryable"),
    [
        ("rate limited", "binance: DDoSProtection, code -1003", True),
        ("down", "binance: ExchangeNotAvailable", True),
        ("garbage", "binance: BadResponse", True),
        ("slow", "binance: RequestTimeout", True),
        ("an error in words", "code -1000", True),
    ],
)
async def test_a_failure_is_told_without_secrets(
    exchange: LoopbackExchange, how: str, says: str, retryable: bool
) -> None:
    async with opened(exchange, timeout_s=0.3) as source:
        exchange.misbehaves["/api/v3/account"] = how
        with pytest.raises(SourceError) as error:
            await source.fetch("4", "balance")
        exchange.go_on.set()
        assert says in str(error.value)
        assert error.value.retryable == retryable
        assert not [secret for secret in SECRETS if secret in str(error.value)]
        exchange.misbehaves.clear()
        if error.value.pause_s:
            source._options.pause._until = -math.inf  # its own test is below
        assert await source.fetch("4", "balance")


@pytest.mark.parametrize(("retry_after", "pause_s"), [("60", 60), (None, 10), ("100000", 300)])
async def test_a_pause_that_the_exchange_asks_for_is_everyones(
    exchange: LoopbackExchange,
    mock_clock: trio.testing.MockClock,
    retry_after: str | None,
    pause_s: float,
) -> None:
    async with opened(exchange, "4", "5") as source:
        exchange.misbehaves["/api/v3/account"] = "rate limited"
        exchange.retry_after = retry_after
        errors: list[SourceError] = []

        async def fail(user: str) -> None:
            with pytest.raises(SourceError) as caught:
                await source.fetch(user, "balance")
            errors.append(caught.value)

        # Those that wait for the user's object are held back as well.
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(fail, "4")
        assert exchange.calls["/api/v3/account"] == 1
        await fail("5")
        mock_clock.jump(pause_s - 1)
        await fail("4")
        assert exchange.calls["/api/v3/account"] == 1
        assert errors[0].pause_s == pause_s
        assert errors[-1].pause_s == pytest.approx(1)
        assert all(error.everyone and error.retryable for error in errors)
        exchange.misbehaves.clear()
        mock_clock.jump(1.1)
        assert await source.fetch("4", "balance")


async def test_open_orders_of_one_market_at_a_time(
    exchange: LoopbackExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def orders(**symbols: Any) -> list[str]:
        with closing(CcxtSource(options(exchange), CREDENTIALS, **symbols)) as source:
            async with source.session("4"):
                try:
                    return [each["order_id"] for each in await source.fetch("4", "orders")]
                except SourceError as error:
                    refused = error  # and not out of the session's nursery, as a group
        raise refused

    assert await orders() == ["1", "2"]
    assert await orders(order_symbols=["ETH/USDT"]) == ["9"]
    assert await orders(order_symbols=["BTC/USDT", "ETH/USDT"]) == ["1", "2", "9"]
    with pytest.raises(SourceError, match=r"no market 'NO/USDT': correct ccxt\.order_symbols"):
        await orders(order_symbols=["NO/USDT"])

    # An exchange that needs one, as 21 of ccxt's do.
    real = ccxt.binance.fetch_open_orders

    def needs_symbol(self: Any, symbol: Any = None, *args: Any) -> Any:
        if symbol is None:
            raise ccxt.ArgumentsRequired("a symbol, and a s3cret")
        return real(self, symbol, *args)

    monkeypatch.setattr(ccxt.binance, "fetch_open_orders", needs_symbol)
    with pytest.raises(SourceError, match=r"name the markets in ccxt\.order_symbols") as caught:
        await orders()
    assert not caught.value.retryable
    assert await orders(fill_symbols=["ETH/USDT"]) == ["9"]
    assert await orders(fill_symbols=["BTC/USDT"], order_symbols=["ETH/USDT"]) == ["9"]


def test_a_market_type_that_the_exchange_does_not_have() -> None:
    for name, wanted, has in (("kraken", "swap", "spot"), ("binance", "nope", "spot or swap")):
        with pytest.raises(ConfigurationError, match=f"{name} has no {wanted} markets .*{has}"):
            CcxtExchange(ExchangeOptions(name, market_type=wanted))
    CcxtExchange(ExchangeOptions("kraken", market_type="spot"))


async def test_keys_are_added_without_a_restart(
    exchange: LoopbackExchange,
    tmp_path: Path,
    mock_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "keys.toml"

    def write(text: str) -> None:
        new = tmp_path / "new"
        new.write_text(text)
        new.chmod(0o600)
        new.replace(path)

    four, five = (
        f'[users.{user}]\napi_key = "key-of-{user}"\nsecret = "secret-of-{user}"\n' for user in "45"
    )
    write("\ufeff" + four)
    with closing(CcxtSource(options(exchange), CredentialsFile(path))) as source:
        async with source.session("4"), source.session("5"):
            assert await source.fetch("5", "balance") == []
            # What cannot be used changes nothing.
            write("[users.5]\nnope = 1\n")
            assert await source.fetch("5", "balance") == []
            assert len(await source.fetch("4", "balance")) == 2
            assert caplog.text.count("there is no credential 'nope'") == 1
            write(four + five)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(5.1)
            with trio.fail_after(PATIENCE_S):
                while "5" not in source._open:
                    await trio.testing.wait_all_tasks_blocked(0.01)
            assert [row["asset"] for row in await source.fetch("5", "balance")] == ["ETH"]
        assert source._open == {}


class Told:
    """A sink that keeps whose data have changed."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str]] = []

    def changed(self, changes: Any) -> None:
        self.changes += changes

    def mark(self, channel: str, user: str, reason: str | None) -> None:
        assert (channel, user, reason) == ("fills", "4", None)


async def test_keys_that_have_changed_count_while_their_user_is_watched(
    exchange: LoopbackExchange, mock_clock: trio.testing.MockClock
) -> None:
    keys: dict[str, dict[str, str]] = {"4": {"apiKey": "revoked", "secret": "x"}}
    sink = Told()

    async def later(changed: int) -> None:
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(5.1)
        with trio.fail_after(PATIENCE_S):
            while len(sink.changes) < changed:
                await trio.testing.wait_all_tasks_blocked(0.01)

    with closing(CcxtSource(options(exchange), keys)) as source:
        types = len(source.data_types)
        async with trio.open_nursery() as nursery, source.session("4"):
            nursery.start_soon(source.watch, sink)
            with pytest.raises(SourceError, match="AuthenticationError"):
                await source.fetch("4", "balance")
            keys["4"] = CREDENTIALS["4"]
            await later(types)
            assert len(await source.fetch("4", "balance")) == 2
            # Others, which cannot be used: those of before go on.
            keys["4"] = {"apiKey": "no secret"}
            await later(types)
            assert len(await source.fetch("4", "balance")) == 2
            keys["4"] = CREDENTIALS["5"]
            await later(2 * types)
            assert [row["asset"] for row in await source.fetch("4", "balance")] == ["ETH"]
            del keys["4"]
            await later(3 * types)
            assert source._open == {}
            assert await source.fetch("4", "balance") == []
            keys["4"] = CREDENTIALS["4"]
            await later(4 * types)
            assert len(await source.fetch("4", "balance")) == 2
            nursery.cancel_scope.cancel()
        assert source._open == source._keys == {}
    assert set(sink.changes) == {("4", data_type) for data_type in source.data_types}


def test_ccxts_own_options() -> None:
    given = {"recvWindow": 12_345, "defaultType": "spot"}
    api = CcxtExchange(ExchangeOptions("binance", options=given, market_type="swap")).api
    assert (api.options["recvWindow"], api.options["defaultType"]) == (12_345, "swap")


@pytest.mark.parametrize("scheme", ["http", "socks5"])
@pytest.mark.parametrize("secured", [False, True])
async def test_a_proxy_leads_to_the_exchange(
    exchange: LoopbackExchange, scheme: str, secured: bool
) -> None:
    async with proxy_running(secured) as proxy:
        url = proxy.url(scheme, "us%20er:pa%3Ass%40" if secured else None)
        there = {
            "url": exchange.url.replace("127.0.0.1", "exchange.test"),
            "proxies": OutboundProxies(url, environment={}),
        }
        async with opened(exchange, "4", "5", **there) as source:
            assert len(await source.fetch("5", "balance")) == 1
            assert len(await source.fetch("4", "balance")) == 2
        assert {(how, host) for how, host, _ in proxy.asked} == {
            ("GET" if scheme == "http" else "socks5", "exchange.test")
        }
        proxy.refuses = True
        feed = CcxtFeed(options(exchange, **there))
        with closing(feed), pytest.raises(SourceError) as caught:
            await feed.run(None)  # type: ignore[arg-type]
        assert caught.value.retryable
        assert "pa" not in str(caught.value)


async def test_keys_that_are_refused_are_not_tried_on_and_on(exchange: LoopbackExchange) -> None:
    wrong = {
        "4": {"apiKey": "key-of-nobody", "secret": "x"},
        "5": {"apiKey": "key-of-5", "secret": "wrong"},
    }
    source = CcxtSource(options(exchange), wrong)
    async with source.session("4"), source.session("5"):
        for user, code in (("4", -2015), ("5", -1022)):
            with pytest.raises(SourceError, match=f"AuthenticationError, code {code}") as error:
                await source.fetch(user, "balance")
            assert not error.value.retryable
            assert "key-of" not in str(error.value)
    source.close()


async def test_nothing_is_logged_of_a_request(
    exchange: LoopbackExchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    logger = logging.getLogger("ccxt")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    logging.getLogger("ccxt.base.exchange")._cache.clear()
    async with opened(exchange) as source:
        await source.fetch("4", "balance")
    assert said == []


async def test_a_thread_that_was_given_up_still_counts(exchange: LoopbackExchange) -> None:
    async with opened(exchange, timeout_s=15) as source:
        exchange.misbehaves["/api/v3/account"] = "slow"
        with trio.move_on_after(0.2):
            await source.fetch("4", "balance")
        with trio.move_on_after(0.2):
            await source.fetch("4", "orders")
        assert exchange.calls["/api/v3/openOrders"] == 0
        exchange.go_on.set()
        assert len(await source.fetch("4", "orders")) == 2
    assert exchange.most_together["key-of-4"] == 1


async def test_a_service_opens_an_exchange_for_who_is_watched(
    exchange: LoopbackExchange, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    closed: list[CcxtExchange] = []
    close = CcxtExchange.close
    monkeypatch.setattr(CcxtExchange, "close", lambda each: (closed.append(each), close(each)))
    source = CcxtSource(options(exchange), CREDENTIALS)
    settings = Settings(intervals=FAST.intervals, polling=Polling(watch_linger_s=0))
    async with serving(source, settings=settings) as (_, join):
        peer = await join("4", "balance")
        while (push := (await peer.next())[0])["type"] == "status":
            pass
        assert push["data"][0]["free"] == "0.12345678901234567890"
        exchange.misbehaves["/api/v3/account"] = "down"
        assert (await peer.next())[0]["state"] == "stale"
        exchange.misbehaves.clear()
        assert (await peer.next())[0]["state"] == "live"
        assert closed == []
        peer.leave()
        await until(lambda: closed)
        asked = exchange.calls["/api/v3/account"]
        await trio.sleep(0.5)
        assert exchange.calls["/api/v3/account"] == asked
    source.close()
    assert {key for _, key in exchange.keys_seen} == {"key-of-4"}
    assert any("binance: ExchangeNotAvailable" in line for line in lines(caplog))


# --- tickers ------------------------------------------------------------------------------------


class Sink:
    def __init__(self) -> None:
        self.tickers: dict[str, Ticker] = {}
        self.updates = 0
        self.stales: list[tuple[str, list[str]]] = []

    def update(self, tickers: Any) -> None:
        self.updates += 1
        self.tickers.update({ticker.symbol: ticker for ticker in tickers})

    def stale(self, reason: str, symbols: Any = None) -> None:
        self.stales.append((reason, list(symbols)))


async def test_watched_tickers_are_asked_for(exchange: LoopbackExchange) -> None:
    feed, sink = CcxtFeed(options(exchange), interval_s=0.1), Sink()
    assert isinstance(feed, WatchedFeed)
    assert feed.knows("ANYTHING")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run, sink)
        await until(lambda: not feed.knows("NOPE"))
        assert all(map(feed.knows, ("BTCUSDT", "BTC/USDT", "BTC/USDT:USDT", "ETHUSDT")))
        await trio.sleep(0.3)
        assert exchange.calls["/api/v3/ticker/24hr"] == 0
        for symbol in ("BTCUSDT", "BTC/USDT", "BTC/USDT:USDT", "NOPE"):
            feed.watch(symbol)
        await until(lambda: len(sink.tickers) == 3)
        assert sink.tickers["BTCUSDT"] == Ticker(
            symbol="BTCUSDT",
            last=Decimal("61500.12345678"),
            bid=Decimal("61500.00"),
            ask=Decimal("61500.20"),
            open=Decimal("61595.12345679"),
            high=Decimal(62000),
            low=Decimal(61000),
            volume=Decimal("8913.3"),
            change=Decimal("-95.00000001"),
            change_pct=Decimal("-0.96"),
            source_ts=1763600000123,
        )
        assert sink.tickers["BTC/USDT:USDT"].last == Decimal(loopback_exchange.SWAP_PRICE)
        exchange.price = "61500.99999999"
        await until(lambda: sink.tickers["BTC/USDT"].last == Decimal("61500.99999999"))
        for symbol in ("BTCUSDT", "BTC/USDT", "BTC/USDT:USDT", "NOPE"):
            feed.unwatch(symbol)
        await trio.sleep(0.3)
        asked = exchange.calls.copy()
        await trio.sleep(0.3)
        assert exchange.calls == asked
        nursery.cancel_scope.cancel()
    feed.close()


async def test_swaps_are_meant_where_it_is_said(exchange: LoopbackExchange) -> None:
    feed, sink = CcxtFeed(options(exchange, market_type="swap"), interval_s=0.1), Sink()
    feed.watch("BTCUSDT")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run, sink)
        await until(lambda: sink.tickers)
        nursery.cancel_scope.cancel()
    feed.close()
    assert sink.tickers["BTCUSDT"].last == Decimal(loopback_exchange.SWAP_PRICE)
    assert exchange.calls["/api/v3/ticker/24hr"] == 0


async def test_a_market_that_fails_is_stale_and_comes_back(exchange: LoopbackExchange) -> None:
    feed = CcxtFeed(options(exchange), interval_s=0.1)
    async with serving(None, feed=feed) as (_, join):
        peer = await join("4", "ticker.BTCUSDT")
        while (push := (await peer.next())[0])["type"] == "status":
            pass
        assert push["data"]["last"] == "61500.12345678"
        exchange.misbehaves["/api/v3/ticker/24hr"] = "down"
        assert (await peer.next())[0]["state"] == "stale"
        exchange.misbehaves.clear()
        assert (await peer.next())[0]["state"] == "live"
    feed.close()


# --- settings and credentials -------------------------------------------------------------------


def test_what_is_not_to_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="no exchange 'binanse': did you mean binance"):
        CcxtExchange(ExchangeOptions("binanse"))
    with pytest.raises(ConfigurationError, match="no test network of kraken"):
        CcxtExchange(ExchangeOptions("kraken", sandbox=True))
    with pytest.raises(ConfigurationError, match="user 4 have no secret, which binance asks for"):
        CcxtSource(ExchangeOptions("binance"), {"4": {"apiKey": "key-of-4"}})
    with pytest.raises(ConfigurationError, match="have no password, which okx"):
        CcxtSource(ExchangeOptions("okx"), CREDENTIALS)
    monkeypatch.setitem(__import__("sys").modules, "ccxt", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'trading_push\[ccxt\]'"):
        CcxtExchange(ExchangeOptions("binance"))


@pytest.mark.parametrize("name", ["binance", "bybit", "okx", "kraken", "bitget", "gate", "htx"])
def test_every_url_of_an_exchange_is_moved(name: str) -> None:
    moved = CcxtExchange(ExchangeOptions(name, url="http://127.0.0.1:1/")).api.urls["api"]
    texts = json.dumps(moved)
    assert "http://127.0.0.1:1" in texts
    assert not [rest for rest in ("https://", "{hostname}") if rest in texts]
    assert "127.0.0.1:1//" not in texts


TABLE = '[users.4]\napi_key = "key-of-4"\nsecret = "secret-of-4"\n'


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text(TABLE)
    file.chmod(0o600)
    return file


def test_credentials_come_from_a_file_of_the_owners(keys: Path) -> None:
    only_four = {"4": CREDENTIALS["4"]}
    assert credentials_of_file(keys) == only_four
    text = '{"4": {"apiKey": "key-of-4", "secret": "secret-of-4"}}'
    assert credentials_of_json(text) == only_four
    for mode in (0o640, 0o604, 0o620, 0o610):
        keys.chmod(mode)
        with pytest.raises(ConfigurationError, match=f"chmod 600 {keys}"):
            credentials_of_file(keys)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("secret-of-4", "it is not TOML"),
        ("", "write a table"),
        ("[users]", "names no user"),
        ("[users]\n4 = 'secret-of-4'", "user 4 has no table"),
        ("[users.4]\napikey = 'secret-of-4'", "no credential 'apikey' (user 4): use some of api_"),
        ("[users.4]\nsecret = 5", "secret of user 4 is no text"),
        ("[users.4]\nsecret = ''", "secret of user 4 is no text"),
        (TABLE + "[others]", "write a table [users.ID] for each user, and nothing else"),
    ],
)
def test_what_a_file_of_credentials_may_not_hold(keys: Path, text: str, says: str) -> None:
    keys.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        credentials_of_file(keys)
    assert says in str(error.value)
    assert "secret-of" not in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigurationError, match=r"ccxt\.credentials_file .* No such file"):
        credentials_of_file(keys.with_name("nope"))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"4": 5}', '{"4": {"secret": 5}}', "{}"])
def test_json_of_credentials(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"ccxt\.credentials"):
        credentials_of_json(text)


async def test_by_configuration(
    exchange: LoopbackExchange, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRADING_PUSH_CONFIG", raising=False)
    file = keys.with_name("trading-push.toml")
    file.write_text(
        f'[ccxt]\nexchange = "binance"\ncredentials_file = "keys.toml"\nurl = "{exchange.url}"\n'
        '[market]\nfeed = "ccxt"\n'
    )
    settings = load_settings(config=file, flags={})
    async with open_configured_service(settings, by_name) as service:
        from trading_push.testing import peer

        async with peer(service, "4") as four:
            await four.subscribe("balance", "ticker.ETHUSDT")
            seen = {}
            while len(seen) < 2:
                if (push := await four.push())["type"] == "snapshot":
                    seen[push["channel"]] = push["data"]
    assert seen["balance"][0]["asset"] == "BTC"
    assert seen["ticker.ETHUSDT"]["last"] == exchange.price


def test_ccxt_keeps_the_names_that_are_relied_on() -> None:
    for name in ("AuthenticationError", "BadRequest", "NetworkError", "NotSupported"):
        assert issubclass(getattr(ccxt, name), ccxt.BaseError)
    assert issubclass(ccxt.PermissionDenied, ccxt.AuthenticationError)
    assert issubclass(ccxt.BadSymbol, ccxt.BadRequest)


# --- fills --------------------------------------------------------------------------------------


def follow(there: LoopbackExchange, *symbols: str) -> CcxtSource:
    return CcxtSource(options(there), CREDENTIALS, fill_symbols=symbols, fills_interval_s=0.05)


async def fills(peer: Any, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with trio.fail_after(PATIENCE_S):
        while len(found) < count:
            [push] = await peer.next()
            if push["type"] != "status":
                found.append(push)
    return found


async def test_each_fill_is_published_once_and_in_order_also_across_a_cut(
    exchange: LoopbackExchange,
) -> None:
    now = time.time_ns() // 1_000_000 + 60_000
    exchange.trade("key-of-4", 1, now - 3_600_000)  # before anybody watched
    with closing(follow(exchange, "BTC/USDT", "ETH/USDT")) as source:
        polling = Polling(watch_linger_s=0.05)
        async with serving(source, settings=Settings(polling=polling)) as (service, join):
            peer = await join("4", "fills")
            await until(lambda: exchange.calls["/api/v3/myTrades"] >= 4)
            exchange.trade("key-of-4", 3, now + 3)
            exchange.trade("key-of-5", 4, now + 3)
            [first] = await fills(peer, 1)
            assert first["data"] == {
                "fill_id": "3",
                "order_id": "1003",
                "symbol": "BTCUSDT",
                "side": "buy",
                "price": "61500.10000000",
                "quantity": "0.00100000",
                "fee": "0.00000100",
                "fee_asset": "BTC",
                "at": now + 3,
            }
            exchange.trade("key-of-4", 2, now + 2)  # told of late
            exchange.trade("key-of-4", 5, now + 3)  # at the same time as another
            exchange.trade("key-of-4", 1, now + 4, "ETHUSDT")  # ids are a market's own
            numbers = [(p["data"]["symbol"], p["data"]["fill_id"]) for p in await fills(peer, 3)]
            assert sorted(numbers) == [("BTCUSDT", "2"), ("BTCUSDT", "5"), ("ETHUSDT", "1")]
            peer.leave()
            await until(lambda: service.statistics().connections == 0)
            asked = 0
            while asked != exchange.calls["/api/v3/myTrades"]:  # until it is not asked any more
                asked = exchange.calls["/api/v3/myTrades"]
                await trio.sleep(0.3)
            exchange.trade("key-of-4", 6, now + 60_000)
            since = {"epoch": first["epoch"], "seq": 4}
            peer = await join("4", {"channel": "fills", "since": since})
            [missed] = await fills(peer, 1)
            assert (missed["data"]["fill_id"], missed["prev"], missed["seq"]) == ("6", 4, 5)
            asked = exchange.calls["/api/v3/myTrades"]
            await until(lambda: exchange.calls["/api/v3/myTrades"] >= asked + 6)
            assert peer.sent == []


async def test_an_exchange_that_does_not_tell_of_fills_is_logged_and_asked_again(
    exchange: LoopbackExchange, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    exchange.misbehaves["/api/v3/myTrades"] = "down"
    with closing(follow(exchange, "BTC/USDT")) as source:
        async with serving(source) as (_, join):
            peer = await join("4", "fills")
            with trio.fail_after(PATIENCE_S):
                while (push := (await peer.next())[0])["state"] != "down":
                    assert push["reason"] == "quiet"
            assert push["reason"] == "source_error"
            await until(lambda: exchange.calls["/api/v3/myTrades"] >= 3)
            exchange.misbehaves.clear()
            with trio.fail_after(PATIENCE_S):
                [push] = await peer.next()
            assert (push["state"], push["reason"]) == ("live", "quiet")
            asked = exchange.calls["/api/v3/myTrades"]
            await until(lambda: exchange.calls["/api/v3/myTrades"] >= asked + 3)
            exchange.trade("key-of-4", 1, time.time_ns() // 1_000_000 + 1000)
            assert (await fills(peer, 1))[0]["data"]["fill_id"] == "1"
    told = [line for line in lines(caplog) if "fills数据" in line and "获取" in line]
    assert told == ["❌ 获取用户4的fills数据失败: BTC/USDT: binance: ExchangeNotAvailable"]
    assert "✅ 用户4的fills数据已恢复" in lines(caplog)


async def test_one_market_that_is_refused_does_not_stop_the_fills_of_the_others(
    exchange: LoopbackExchange, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    now = time.time_ns() // 1_000_000
    with closing(follow(exchange, "BAD/USDT", "BTC/USDT")) as source:
        async with serving(source) as (_, join):
            peer = await join("4", "fills")
            await until(lambda: exchange.calls["/api/v3/myTrades"] >= 1)
            exchange.trade("key-of-4", 1, now)
            exchange.trade("key-of-4", 2, now)
            del exchange.trades["key-of-4"][-1]["id"]  # which fill, nobody knows
            exchange.trade("key-of-4", 3, now - 3_600_000)  # whatever the clocks say
            assert [each["data"]["fill_id"] for each in await fills(peer, 2)] == ["3", "1"]
    told = [line for line in lines(caplog) if "fills数据失败" in line]
    assert any("BAD/USDT: binance: BadSymbol" in line for line in told)
    assert any("1 fills that cannot be read" in line for line in told)
    assert len(told) == 2


async def test_a_symbol_that_is_refused_does_not_stop_the_others(
    exchange: LoopbackExchange, caplog: pytest.LogCaptureFixture
) -> None:
    feed, sink = CcxtFeed(options(exchange), interval_s=0.05), Sink()
    ask = feed._exchange.call

    async def call(method: str, *args: Any) -> Any:
        if method == "fetch_tickers" and "ETH/USDT" in args[0]:
            await trio.lowlevel.checkpoint()
            raise RequestRefused("binance: BadRequest", retryable=False)
        return await ask(method, *args)

    feed._exchange.call = call
    feed.watch("BTCUSDT")
    feed.watch("ETHUSDT")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run, sink)
        await until(lambda: sink.updates >= 3)
        nursery.cancel_scope.cancel()
    feed.close()
    assert set(sink.tickers) == {"BTCUSDT"}
    assert sink.stales == [("refused", ["ETHUSDT"])]
    assert sum("ETHUSDT" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("status", [401, 407, 511])
async def test_a_proxy_s_refusal_is_no_symbol_s(exchange: LoopbackExchange, status: int) -> None:
    feed, sink = CcxtFeed(options(exchange), interval_s=0.05), Sink()
    feed.watch("BTCUSDT")
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed.run, sink)
            await until(lambda: sink.updates)
            nursery.cancel_scope.cancel()
        exchange.misbehaves["/api/v3/ticker/24hr"] = f"status {status}"
        with pytest.raises(SourceError):
            await feed.run(sink)
        exchange.misbehaves.clear()
        updates = sink.updates
        async with trio.open_nursery() as nursery:  # as the service starts it again
            nursery.start_soon(feed.run, sink)
            await until(lambda: sink.updates > updates)
            nursery.cancel_scope.cancel()
    feed.close()
    assert sink.stales == []
