"""Which requests are this machine's own, and which came through a proxy or by a foreign name."""

from __future__ import annotations

import pytest

from trading_push.transport.local import is_local_request, is_loopback_origin
from trading_push.transport.proxies import networks


def local(peer="127.0.0.1", host=b"localhost:8000", *more, trusted=""):
    headers = [(b"host", host), (b"user-agent", b"curl"), *more]
    return is_local_request(peer, headers, networks(trusted))


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize(
    "host",
    [b"localhost", b"LocalHost:8000", b"127.0.0.1:8000", b"127.0.0.2", b"[::1]:8000", b"[::1]"],
)
def test_a_program_of_this_machine_is_local(peer, host):
    assert local(peer, host)


@pytest.mark.parametrize(
    "peer", ["-", "", "10.0.0.1", "203.0.113.7", "fe80::1", "::", "0.0.0.0", "localhost", "unix:"]
)
def test_a_peer_elsewhere_or_on_a_unix_socket_is_not(peer):
    assert not local(peer)


@pytest.mark.parametrize(
    "host",
    [
        b"shop.example.com",
        b"evil.example.com:8000",
        b"127.0.0.1.evil.example.com",
        b"localhost.evil.example.com",
        b"evil.localhost",
        b"localhost@evil.example.com",
        b"evil.example.com@localhost",
        b"127.1",
        b"0.0.0.0:8000",
        b"[::]:8000",
        b"::1",
        b"[::1].evil.example.com",
        b"localhost:8000, evil.example.com",
        b"localhost/evil",
        b"localhost:port",
        "lo\u0663alhost".encode(),
        b"",
    ],
)
def test_a_foreign_host_is_not_local(host):
    assert not local(host=host)


def test_one_host_is_needed():
    assert not is_local_request("127.0.0.1", [], ())
    assert not local("127.0.0.1", b"localhost", (b"host", b"evil.example.com"))
    assert not local("127.0.0.1", b"localhost", (b"host", b"localhost"))


@pytest.mark.parametrize(
    "name",
    [
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-forwarded-anything",
        b"x-real-ip",
        b"via",
    ],
)
@pytest.mark.parametrize("value", [b"127.0.0.1", b"203.0.113.7", b""])
def test_a_header_of_a_proxy_is_none_of_a_local_program(name, value):
    assert not local("127.0.0.1", b"localhost", (name, value))


def test_where_proxies_are_configured_nothing_is_local():
    assert not local(trusted="10.0.0.0/8")
    assert not local(trusted="127.0.0.1")


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:5000", True),
        ("https://127.0.0.1", True),
        ("http://[::1]:3000", True),
        ("HTTP://LOCALHOST:5000", True),
        ("http://localhost.evil.example.com", False),
        ("http://evil.localhost:5000", False),
        ("http://127.0.0.1.evil.example.com", False),
        ("http://0.0.0.0:5000", False),
        ("http://192.168.0.7:5000", False),
        ("file://localhost", False),
        ("file://", False),
        ("null", False),
        ("*", False),
        ("http://localhost:5000/path", False),
        ("http://user@localhost:5000", False),
    ],
)
def test_an_origin_of_loopback(origin, expected):
    assert is_loopback_origin(origin) is expected
