"""Whose `X-Forwarded-For` is believed, and the limit of unauthenticated connections an address."""

from __future__ import annotations

import pytest

from harness.endpoints import open_endpoint, status_of
from harness.room import lines
from harness.support import token, until

from trading_push import ConfigurationError, load_settings
from trading_push.settings.schema import Limits, Server
from trading_push.transport.proxies import client_address, networks

TRUSTED = networks("10.0.0.0/8 2001:db8::1 127.0.0.1")


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("10.0.0.1", ["203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["203.0.113.7, 10.0.0.9"], "203.0.113.7"),
        ("10.0.0.1", ["203.0.113.7", "10.0.0.9"], "203.0.113.7"),
        ("10.0.0.1", ["1.2.3.4, 203.0.113.7"], "203.0.113.7"),  # the client's own invention
        ("10.0.0.1", ["203.0.113.7:4711"], "203.0.113.7"),
        ("10.0.0.1", ["[2001:db8::7]:4711"], "2001:db8::7"),
        ("10.0.0.1", ["2001:DB8::7"], "2001:db8::7"),
        ("2001:db8::1", ["203.0.113.7"], "203.0.113.7"),
        ("::ffff:10.0.0.1", ["203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["10.0.0.2, 10.0.0.3"], "10.0.0.2"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", ["evil\x1b[2J, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("203.0.113.9", ["1.2.3.4"], "203.0.113.9"),  # nobody's proxy
        ("-", ["1.2.3.4"], "-"),
    ],
)
def test_the_clients_address(peer, forwarded, expected):
    headers = [(b"x-forwarded-for", each.encode("latin-1")) for each in forwarded]
    assert client_address(peer, headers, TRUSTED) == expected
    assert client_address(peer, headers, ()) == peer


@pytest.mark.parametrize("wrong", ["proxy.example.com", "10.0.0.0/40", "10.0.0.1, 10.0.0.2"])
def test_what_is_no_network_is_refused_at_the_start(wrong):
    with pytest.raises(ConfigurationError, match="give addresses or networks like"):
        load_settings(config=None, flags={"server.trusted_proxies": wrong})


def handshake(*headers: str) -> bytes:
    lines = [
        "GET /ws HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.parametrize("trusted", ["127.0.0.0/8", ""])
@pytest.mark.parametrize("kind", ["linked", "plain", "native"])
async def test_the_log_names_the_client_and_not_the_proxy(kind, trusted, certificates, caplog):
    caplog.set_level("INFO", "trading_push")
    async with open_endpoint(
        kind, certificates, server=Server(trusted_proxies=trusted)
    ) as endpoint:
        request = handshake("X-Forwarded-For: 203.0.113.7")
        assert await status_of(endpoint, request, certificates) == 101
        await until(lambda: not endpoint.service.statistics().connections)
    address = "203.0.113.7" if trusted else "127.0.0.1"
    assert f"🔌 WebSocket客户端连接 - 来自: {address}" in lines(caplog)


@pytest.mark.parametrize("kind", ["linked", "plain", "native"])
async def test_an_address_may_have_so_many_strangers(kind, certificates):
    limits = Limits(unauthenticated_per_address=2)
    server = Server(trusted_proxies="127.0.0.1")
    async with open_endpoint(kind, certificates, limits=limits, server=server) as endpoint:

        async def status(address: str) -> int:
            request = handshake(f"X-Forwarded-For: {address}")
            return await status_of(endpoint, request, certificates)

        mine = [("X-Forwarded-For", "203.0.113.7")]
        async with (
            endpoint.connect(extra_headers=mine) as first,
            endpoint.connect(extra_headers=mine) as second,
        ):
            for each in (first, second):
                await each.request("ping")
            assert await status("203.0.113.7") == 503
            assert await status("203.0.113.8") == 101
            assert (await first.request("auth", token=token(4)))["ok"]
            assert await status("203.0.113.7") == 101
        await until(lambda: not endpoint.service.statistics().connections)
        assert endpoint.service.context.seats.unauthenticated == {}
