"""Which web pages may connect."""

from __future__ import annotations

import pytest

from harness.endpoints import open_endpoint, status_of
from harness.room import lines
from harness.support import until

from trading_push import ConfigurationError, load_settings
from trading_push.settings.schema import Server
from trading_push.transport.origin import is_allowed

APP = {"https://app.example.com", "http://localhost:3000"}


@pytest.mark.parametrize(
    ("origin", "host", "allowed", "expected"),
    [
        ("http://push.example.com", "push.example.com", (), True),
        ("https://push.example.com", "push.example.com", (), True),
        ("https://push.example.com:443", "push.example.com", (), True),
        ("https://PUSH.example.com", "push.Example.com", (), True),
        ("http://push.example.com:8000", "push.example.com:8000", (), True),
        ("http://[::1]:8000", "[::1]:8000", (), True),
        ("http://push.example.com", "push.example.com:8000", (), False),
        ("http://push.example.com.evil.net", "push.example.com", (), False),
        ("http://evilpush.example.com", "push.example.com", (), False),
        ("http://push.example.com@evil.net", "push.example.com", (), False),
        ("http://evil.net/push.example.com", "push.example.com", (), False),
        ("http://evil.net?push.example.com", "push.example.com", (), False),
        ("http://push.example.com/", "push.example.com", (), False),
        ("http://push.example.com:99999", "push.example.com", (), False),
        ("http://push.example.com", None, (), False),
        ("null", "push.example.com", (), False),
        ("null", "null", (), False),
        ("", "push.example.com", (), False),
        ("push.example.com", "push.example.com", (), False),
        ("http://p\xfcsh.example.com", "p\xfcsh.example.com", (), False),
        ("https://app.example.com", "push.example.com", APP, True),
        ("https://app.example.com:443", "push.example.com", APP, True),
        ("http://localhost:3000", "push.example.com", APP, True),
        ("http://app.example.com", "push.example.com", APP, False),
        ("https://app.example.com:8443", "push.example.com", APP, False),
        ("https://app.example.com.evil.net", "push.example.com", APP, False),
        ("https://push.example.com", "push.example.com", APP, False),
        ("null", "push.example.com", {"null"}, True),
        ("null", "push.example.com", {"*"}, True),
        ("whatever", None, {"*"}, True),
        ("file://", "push.example.com", {"file://"}, True),
        ("FILE://", "push.example.com", {"file://"}, True),
        ("tauri://localhost", "push.example.com", {"tauri://localhost"}, True),
        ("app://.", "push.example.com", {"app://."}, True),
        ("capacitor://localhost", "push.example.com", {"tauri://localhost"}, False),
        ("file:///etc", "push.example.com", {"file://"}, False),
        ("file://", "push.example.com", APP, False),
        ("file://", "", (), False),
        ("app://", "push.example.com", {"file://"}, False),
        ("http://", "push.example.com", {"file://"}, False),
        # A page of a desktop shell is of no server, however its host is called.
        ("tauri://localhost", "localhost", (), False),
        ("app://push.example.com", "push.example.com", (), False),
    ],
)
def test_an_origin(origin, host, allowed, expected):
    assert is_allowed([origin], host, allowed) is expected


def test_two_origins_must_both_be_allowed():
    assert not is_allowed(["http://a", "http://b"], "a", ())
    assert is_allowed([], "a", ())


@pytest.mark.parametrize(
    "wrong",
    [
        *("app.example.com", "https://a/b", "https://a, https://b", "//a"),
        *("http://", "https://", "file:///", "file:", "://"),
    ],
)
def test_what_is_no_origin_is_refused_at_the_start(wrong):
    with pytest.raises(ConfigurationError, match="give origins like"):
        load_settings(config=None, flags={"server.origins": wrong, "jwt_secret": "x" * 32})


def handshake(port: int, *origin: str) -> bytes:
    headers = "".join(f"Origin: {each}\r\n" for each in origin)
    return (
        f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    ).encode()


@pytest.mark.parametrize("kind", ["linked", "plain", "native"])
async def test_at_every_endpoint(kind, certificates, caplog):
    caplog.set_level("INFO", "trading_push")
    async with open_endpoint(kind, certificates) as endpoint:
        for origin, status in (
            ((f"http://127.0.0.1:{endpoint.port}",), 101),
            ((), 101),
            (("null",), 403),
            (("http://127.0.0.1",), 101),  # another port of this machine
            (("http://localhost:5000",), 101),
            (("http://localhost:5000", "http://localhost:5000"), 403),
            (("file://",), 403),
            (("http://evil.net\x1b[2J",), 403),
            (("http://evil.net",), 403),
            ((f"http://127.0.0.1:{endpoint.port}", "http://evil.net"), 403),
        ):
            assert (
                await status_of(endpoint, handshake(endpoint.port, *origin), certificates) == status
            )
        refused = [line for line in lines(caplog) if "拒绝来源" in line]
        assert (
            "⚠️ 拒绝来源: http://evil.net - 来自: 127.0.0.1"
            ' - 如需允许，请设置 server.origins = "http://evil.net"'
        ) in refused
        assert "⚠️ 拒绝来源: http://evil.net\\x1b[2J - 来自: 127.0.0.1" in refused
        assert len(refused) == 6
        await until(lambda: not endpoint.service.statistics().connections)


async def test_a_missing_origin_by_policy(certificates):
    server = Server(origin_required=True, origins="https://app.example.com")
    async with open_endpoint("linked", certificates, server=server) as endpoint:
        assert await status_of(endpoint, handshake(endpoint.port), certificates) == 403
        good = handshake(endpoint.port, "https://app.example.com")
        assert await status_of(endpoint, good, certificates) == 101


DESKTOP = "file:// tauri://localhost"


@pytest.mark.parametrize("kind", ["linked", "native"])
async def test_desktop_shells_where_listed(kind, certificates):
    server = Server(origins=DESKTOP)
    async with open_endpoint(kind, certificates, server=server) as endpoint:
        for origin, status in (("file://", 101), ("tauri://localhost", 101), ("app://x", 403)):
            request = handshake(endpoint.port, origin)
            assert await status_of(endpoint, request, certificates) == status


async def stood_before(endpoint, certificates, *more: str, host: str = "localhost") -> int:
    """The status that a page of loopback gets."""
    request = handshake(endpoint.port, "http://localhost:5000")
    request = request.replace(f"127.0.0.1:{endpoint.port}".encode(), host.encode())
    added = "".join(f"{line}\r\n" for line in more).encode()
    return await status_of(endpoint, request[:-2] + added + b"\r\n", certificates)


@pytest.mark.parametrize("kind", ["linked", "plain", "native"])
async def test_a_page_of_loopback_that_is_not_of_this_machine(kind, certificates):
    """What a proxy of the same machine passes on for anyone; and DNS rebinding."""
    async with open_endpoint(kind, certificates) as endpoint:
        assert await stood_before(endpoint, certificates) == 101
        for header in ("X-Forwarded-For: 127.0.0.1", "Forwarded: for=127.0.0.1", "Via: 1.1 proxy"):
            assert await stood_before(endpoint, certificates, header) == 403
        assert await stood_before(endpoint, certificates, host="evil.example.com") == 403
    behind = Server(trusted_proxies="10.0.0.0/8", origins="https://app.example.com")
    async with open_endpoint(kind, certificates, server=behind) as endpoint:
        assert await stood_before(endpoint, certificates) == 403
    listed = Server(origins="https://app.example.com")
    async with open_endpoint(kind, certificates, server=listed) as endpoint:
        assert await stood_before(endpoint, certificates) == 101  # beside those listed
