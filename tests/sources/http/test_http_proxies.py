"""The HTTP source through real proxies, and by HTTP/2."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

import psutil
import pytest
import trio
import trio.testing
import trustme

from harness.http_service import HTTP_CLIENT, answering, failure, reading, scripted
from harness.proxy_server import PASSWORD, ProxyServer, proxy_running
from harness.sources import BALANCE, Service
from harness.support import hypercorn_serving

from trading_push import ConfigurationError
from trading_push.sources.http.source import HttpSource
from trading_push.transport.outbound_proxies import OutboundProxies

httpx_only = pytest.mark.skipif(HTTP_CLIENT == "asks", reason="asks knows no proxies, nor HTTP/2")
CREDENTIALS = "us%20er:pa%3Ass%40"


def through(proxy: ProxyServer, scheme: str, user: str | None = None) -> OutboundProxies:
    return OutboundProxies(proxy.url(scheme, user), environment={})


@httpx_only
@pytest.mark.parametrize("scheme", ["http", "socks5", "socks5h"])
@pytest.mark.parametrize("secured", [False, True])
@pytest.mark.parametrize("tls", [False, True])
async def test_a_proxy_leads_to_the_service(scheme: str, secured: bool, tls: bool) -> None:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
    trusting = ssl.create_default_context()
    if server is not None:
        authority.issue_cert("accounts.test").configure_cert(server)
        authority.configure_trust(trusting)
    async with scripted(answering, tls=server) as (url, _), proxy_running(secured) as proxy:
        url = url.replace("localhost", "accounts.test")
        proxies = through(proxy, scheme, CREDENTIALS if secured else None)
        async with reading(url, proxies=proxies, ssl_context=trusting) as source:
            for user in ("4", "5"):
                got = bytes(await source.fetch(user, "balance"))
                assert got == f'"/{user}/balance"'.encode()
    method = "socks5" if scheme != "http" else "CONNECT" if tls else "GET"
    assert {(how, host) for how, host, _ in proxy.asked} == {(method, "accounts.test")}


@httpx_only
@pytest.mark.parametrize("scheme", ["http", "socks5"])
@pytest.mark.parametrize("fault", ["refuses", "password", "away"])
async def test_a_proxy_that_does_not_lead_there(scheme: str, fault: str) -> None:
    url = f"http{'s' if scheme == 'http' else ''}://accounts.test/{{user_id}}/{{data_type}}"
    async with proxy_running(secured=fault == "password") as proxy:
        proxy.refuses = fault == "refuses"
        if fault == "away":
            proxy.port = 9
        user = "4:s3cret" if fault == "password" else None
        async with reading(url, proxies=through(proxy, scheme, user)) as source:
            error = await failure(source)
    assert error.retryable
    assert "s3cret" not in str(error)
    assert "prox" in str(error) or "cannot be reached" in str(error)


@httpx_only
@pytest.mark.parametrize("scheme", ["http", "socks5"])
async def test_a_proxy_that_says_nothing(scheme: str, mock_clock: trio.testing.MockClock) -> None:
    before = psutil.Process().num_fds()
    async with proxy_running() as proxy:
        proxy.mute = True
        url = "https://accounts.test/{user_id}/{data_type}"
        async with (
            reading(url, proxies=through(proxy, scheme), timeout_s=5) as source,
            trio.open_nursery() as nursery,
        ):

            async def fail() -> None:
                assert str(await failure(source)) == "the HTTP service did not answer within 5 s"

            nursery.start_soon(fail)
            await trio.testing.wait_all_tasks_blocked(0.05)
            mock_clock.jump(5.1)
    with trio.fail_after(10):
        while psutil.Process().num_fds() > before:
            await trio.sleep(0.01)


async def test_this_machine_needs_no_proxy(service: Service) -> None:
    async with reading(service.url(), proxies=OutboundProxies("http://127.0.0.1:9")) as source:
        assert bytes(await source.fetch("4", "balance")) == BALANCE


def test_what_asks_cannot_do_is_refused() -> None:
    pytest.importorskip("asks", reason="asks is installed by the session `asks` only")
    url = "https://accounts.test/{user_id}/{data_type}"
    wanted: tuple[Mapping[str, Any], ...] = (
        {"http2": True},
        {"proxies": OutboundProxies("http://proxy.test:3128", environment={})},
    )
    for options in wanted:
        with pytest.raises(ConfigurationError, match=r'set http\.client = "httpx"'):
            HttpSource(url, client="asks", **options)
    HttpSource(url, client="asks", proxies=OutboundProxies("http://p:1", "accounts.test"))


@httpx_only
@pytest.mark.parametrize("http2", [False, True])
async def test_http2_is_spoken_where_it_is_wanted(tmp_path: Any, http2: bool) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    key, cert, ca_file = (tmp_path / name for name in ("key.pem", "cert.pem", "ca.pem"))
    issued.private_key_pem.write_to_path(key)
    issued.cert_chain_pems[0].write_to_path(cert)
    authority.cert_pem.write_to_path(ca_file)
    versions: list[str] = []

    class Noting(Service):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            versions.append(scope.get("http_version", ""))
            await super().__call__(scope, receive, send)

    tls = {"certfile": str(cert), "keyfile": str(key)}
    async with hypercorn_serving(Noting(), **tls) as port:
        url = f"https://localhost:{port}/{{user_id}}/{{data_type}}"
        async with reading(url, http2=http2, ca_file=ca_file) as source:
            for _ in range(3):
                async with trio.open_nursery() as nursery:
                    for user in range(20):
                        nursery.start_soon(source.fetch, str(user), "balance")
            assert bytes(await source.fetch("4", "balance")) == BALANCE
    assert {each for each in versions if each} == {"2" if http2 else "1.1"}


def test_no_password_of_a_proxy_is_shown() -> None:
    proxies = OutboundProxies(f"http://u:{PASSWORD.replace('@', '%40')}@proxy.test", environment={})
    proxy = proxies.of("https://accounts.test/")
    assert proxy is not None
    assert "pa" not in repr(proxy)
