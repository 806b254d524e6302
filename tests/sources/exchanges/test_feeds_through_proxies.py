"""The exchange feeds through real proxies: CONNECT and SOCKS5."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trustme

from harness.exchange_server import Exchange, exchange
from harness.proxy_server import ProxyServer, proxy_running
from harness.room import lines
from harness.support import until

from trading_push import ConfigurationError
from trading_push.factory import open_configured_service
from trading_push.settings.schema import Market, Proxy, Settings
from trading_push.sources.exchanges import binance
from trading_push.sources.exchanges.binance import BinanceFeed
from trading_push.transport import outbound, tunnel
from trading_push.transport.outbound_proxies import OutboundProxies

CREDENTIALS = "us%20er:pa%3Ass%40"
QUICK: dict[str, float] = {"spacing_s": 0.002, "connect_spacing_s": 0.002, "first_pause_s": 0.02}
TRADE = {"e": "trade", "E": 1, "T": 1, "s": "BTCUSDT", "t": 1, "p": "61500.10", "q": "1"}


class Sink:
    def __init__(self) -> None:
        self.last: list[str] = []

    def update(self, tickers: Iterable[Any]) -> None:
        self.last += [str(ticker.last) for ticker in tickers]

    def stale(self, reason: str, symbols: Any = None) -> None:
        pass


@asynccontextmanager
async def running(url: str, proxies: OutboundProxies, **limits: float) -> AsyncIterator[Sink]:
    feed = BinanceFeed(url, limits=attrs.evolve(binance.LIMITS, **(QUICK | limits)))
    feed.reach_through(proxies)
    feed.watch("BTCUSDT")
    sink = Sink()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run, sink)
        yield sink
        nursery.cancel_scope.cancel()


def through(proxy: ProxyServer, scheme: str, user: str | None = None) -> OutboundProxies:
    return OutboundProxies(proxy.url(scheme, user), environment={})


async def trade_arrives(there: Exchange, sink: Sink) -> None:
    await until(lambda: bool(there.sessions) and there.has("BTCUSDT"))
    await there.say({"stream": "btcusdt@trade", "data": TRADE})
    await until(lambda: sink.last == ["61500.10"])


@pytest.mark.parametrize("scheme", ["http", "socks5", "socks5h"])
@pytest.mark.parametrize("secured", [False, True])
@pytest.mark.parametrize("tls", [False, True])
async def test_a_proxy_leads_to_the_exchange(
    scheme: str, secured: bool, tls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    server = None
    if tls:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("exchange.test").configure_cert(server)
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        monkeypatch.setattr(outbound.ssl, "create_default_context", lambda: trusting)
    async with exchange("binance", ssl_context=server) as there, proxy_running(secured) as proxy:
        url = there.url.replace("localhost", "exchange.test").replace("127.0.0.1", "exchange.test")
        proxies = through(proxy, scheme, CREDENTIALS if secured else None)
        async with running(url, proxies) as sink:
            await trade_arrives(there, sink)
    port = int(url.split(":")[2].split("/")[0])
    assert proxy.asked == [("CONNECT" if scheme == "http" else "socks5", "exchange.test", port)]


@pytest.mark.parametrize(
    ("fault", "by_http", "by_socks"),
    [
        ("refuses", "does not lead there: it answered 502", "does not lead there: it answered 4"),
        ("password", "asks for another user or password", "asks for another user or password"),
        ("away", "the proxy cannot be reached", "the proxy cannot be reached"),
        ("garbage", "broke the connection, or is none", "or asks for another|or is none"),
        ("end", "broke the connection, or is none", "or asks for another|or is none"),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "socks5"])
async def test_a_proxy_that_does_not_lead_there(
    scheme: str, fault: str, by_http: str, by_socks: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    async with proxy_running(secured=fault == "password") as proxy:
        proxy.refuses = fault == "refuses"
        proxy.says = {"garbage": b"220 smtp.test ESMTP\r\n" * 9, "end": b""}.get(fault)
        if fault == "away":
            proxy.port = 9
        proxies = through(proxy, scheme, "4:s3cret")
        async with running("ws://exchange.test:80/stream", proxies):
            await until(lambda: "the proxy" in caplog.text)
    [told] = {line for line in lines(caplog) if "proxy" in line}
    assert any(part in told for part in (by_http if scheme == "http" else by_socks).split("|"))
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("scheme", ["http", "socks5"])
async def test_a_proxy_that_says_nothing_is_given_up(
    scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    async with proxy_running() as proxy:
        proxy.mute = True
        proxies = through(proxy, scheme)
        async with running("ws://exchange.test/stream", proxies, connect_timeout_s=0.2):
            await until(lambda: any("in time" in line for line in lines(caplog)))


async def test_an_answer_in_pieces_is_read() -> None:
    async with exchange("binance") as there, proxy_running() as proxy:
        proxy.in_pieces = True
        url = there.url.replace("localhost", "exchange.test").replace("127.0.0.1", "exchange.test")
        async with running(url, through(proxy, "http")) as sink:
            await trade_arrives(there, sink)


@pytest.mark.parametrize("place", ["setting", "environment"])
async def test_the_service_goes_where_the_settings_say(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    async with proxy_running() as proxy:
        url = proxy.url() if place == "setting" else None
        monkeypatch.setenv("ALL_PROXY", proxy.url("socks5"))
        settings = Settings(
            jwt_secret="x" * 32,
            market=Market(feed="binance", url="wss://exchange.test/stream"),
            proxy=Proxy(url=url),
        )
        async with open_configured_service(settings):
            await until(lambda: bool(proxy.asked))  # the paper exchange watches the market
    how = "CONNECT" if place == "setting" else "socks5"
    assert {each[:2] for each in proxy.asked} == {(how, "exchange.test")}


def test_without_the_library_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel.importlib.util, "find_spec", lambda name: None)
    feed = BinanceFeed()
    with pytest.raises(ConfigurationError, match=r"pip install 'trading_push\[proxy\]'"):
        feed.reach_through(OutboundProxies("socks5://proxy.test", environment={}))
    feed.reach_through(OutboundProxies("http://proxy.test", environment={}))


async def test_the_list_of_symbols_comes_through_the_proxy() -> None:
    async with exchange("binance") as there, proxy_running() as proxy:
        there.listed = ["BTCUSDT"]
        rest_url = there.rest_url.replace("127.0.0.1", "rest.test")
        feed = BinanceFeed(there.url, rest_url=rest_url)
        feed.reach_through(through(proxy, "http"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed.run, Sink())
            await until(feed.symbols)
            nursery.cancel_scope.cancel()
    assert feed.symbols() == ("BTCUSDT",)
    assert [host for _, host, _ in proxy.asked] == ["rest.test"]
