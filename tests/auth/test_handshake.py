"""Sessions without a token, by what an application's `authenticate` sees in the handshake."""

from __future__ import annotations

import json
import time

import pytest
import trio
import trio_websocket

from harness.endpoints import open_endpoint, served, status_of
from harness.handshakes import handshake
from harness.readme import block
from harness.room import lines

from trading_push import (
    AuthenticationError,
    ConfigurationError,
    Handshake,
    Principal,
    open_push_service,
)
from trading_push.settings.schema import Auth, Server, Settings

at_each_endpoint = pytest.mark.parametrize("kind", ["linked", "plain", "native"])
COOKIE = ("Cookie", "theme=dark; session=f3b9c1; session=tossed")


def as_printed():
    namespace = {}
    exec(compile(block("cookie_sessions"), "embedding.md", "exec"), namespace)
    return namespace["authenticate"]


def encoded(*headers):
    return [(name.encode(), value.encode()) for name, value in headers]


async def first_word(endpoint, *headers, url="/ws"):
    """What a client is told first that asks for its subscriptions, or the status of a refusal."""
    extra = encoded(*headers)
    raw = handshake(*(name + b": " + value for name, value in extra), path=url.encode())
    raw = raw.replace(b"Host: localhost", b"Host: 127.0.0.1:%d" % endpoint.port)
    status = await status_of(endpoint, raw, (None, None))
    if status != 101:
        return status
    async with trio_websocket.open_websocket(
        "127.0.0.1", endpoint.port, url, use_ssl=False, extra_headers=extra
    ) as socket:
        await socket.send_message(json.dumps({"op": "list"}))
        with trio.fail_after(5):
            reply = json.loads(await socket.get_message())
    return reply.get("user") or reply["error"]["code"]


def own(endpoint) -> tuple[str, str]:
    return ("Origin", f"http://127.0.0.1:{endpoint.port}")


@at_each_endpoint
async def test_a_session_by_cookie_as_printed(kind, certificates, caplog):
    async with open_endpoint(kind, certificates, authenticate=as_printed()) as endpoint:
        port = endpoint.port
        assert await first_word(endpoint, COOKIE, own(endpoint)) == "4"
        assert await first_word(endpoint, own(endpoint)) == "not_authenticated"
        assert await first_word(endpoint, ("Cookie", "session=x"), own(endpoint)) == (
            "not_authenticated"
        )
        # Missing: it goes on unauthenticated. Null, foreign, another port, a sibling: not at all.
        assert await first_word(endpoint, COOKIE) == "not_authenticated"
        assert "⚠️ 未采用Cookie会话: 请求没有唯一且受信的Origin - 来自: 127.0.0.1" in lines(caplog)
        for origin in (
            "null",
            "http://evil.example.com",
            f"http://127.0.0.1:{port + 1}",
            "http://127.0.0.1",
            f"http://localhost:{port}",
            f"http://sub.127.0.0.1:{port}",
            f"http://127.0.0.1:{port}.evil.example.com",
            "file://",
        ):
            assert await first_word(endpoint, COOKIE, ("Origin", origin)) == 403, origin
        twice = (own(endpoint), own(endpoint))
        assert await first_word(endpoint, COOKIE, *twice) == "not_authenticated"


@at_each_endpoint
async def test_pages_that_are_listed_by_name(kind, certificates):
    server = Server(origins="https://app.example.com")
    async with open_endpoint(
        kind, certificates, authenticate=as_printed(), server=server
    ) as endpoint:
        for origin, word in (
            ("https://app.example.com", "4"),
            ("https://app.example.com:8443", 403),
            ("https://evil.app.example.com", 403),
            ("https://example.com", 403),
            ("http://app.example.com", 403),
        ):
            assert await first_word(endpoint, COOKIE, ("Origin", origin)) == word, origin


@pytest.mark.parametrize("origins", ["*", "null", "https://app.example.com null"])
async def test_origins_that_let_any_page_in_are_refused_at_start(origins):
    settings = Settings(server=Server(origins=origins))
    with pytest.raises(ConfigurationError, match="name the pages that may"):
        async with open_push_service(settings=settings, authenticate=as_printed()):
            pass
    async with open_push_service(settings=settings, authenticate=Principal):
        pass  # tokens are no cookies


@at_each_endpoint
async def test_what_it_is_called_with(kind, certificates):
    calls: list[tuple[str | None, Handshake]] = []

    def authenticate(token, handshake):
        calls.append((token, handshake))
        if token == "bad":
            raise AuthenticationError("no such session")
        return None if token is None else Principal(token)

    async with open_endpoint(kind, certificates, authenticate=authenticate) as endpoint:
        bearer = ("Authorization", "Bearer 7")
        assert await first_word(endpoint, bearer, url="/ws?a=1&a=2&b=%C3%9F&c") == "7"
        token, seen = calls[-1]
        assert (token, seen.address, seen.origin) == ("7", "127.0.0.1", None)
        assert dict(seen.query) == {"a": "1", "b": "ß", "c": ""}
        assert seen.headers["authorization"] == "Bearer 7"
        assert "Bearer" not in repr(seen)
        with pytest.raises((AttributeError, TypeError)):
            seen.address = "10.0.0.1"
        with pytest.raises(TypeError):
            seen.cookies["session"] = "x"
        assert await first_word(endpoint, ("Authorization", "Bearer bad")) == 401
        calls.clear()
        # Later, by a message: with the token, and the handshake that opened the connection.
        async with trio_websocket.open_websocket(
            "127.0.0.1", endpoint.port, "/ws", use_ssl=False, extra_headers=encoded(COOKIE)
        ) as socket:
            await socket.send_message(json.dumps({"op": "auth", "token": "4"}))
            assert json.loads(await socket.get_message())["user"] == "4"
        assert [token for token, _ in calls] == [None, "4"]
        assert calls[1][1].cookies["session"] == "f3b9c1"


async def test_it_ends_after_cookie_session_s(certificates):
    ends = time.time() + 60

    def authenticate(token, handshake):
        return Principal("4", ends if "end" in handshake.query else None)

    settings = Settings(auth=Auth(cookie_session_s=120))
    async with (
        open_push_service(settings=settings, authenticate=authenticate) as service,
        served("linked", service, certificates) as port,
    ):
        for url, expected in (("/ws", 120), ("/ws?end", 60)):
            async with trio_websocket.open_websocket(
                "127.0.0.1",
                port,
                url,
                use_ssl=False,
                extra_headers=encoded(("Origin", f"http://127.0.0.1:{port}")),
            ) as socket:
                left = json.loads(await socket.get_message())["expires_in"]
                assert expected - 10 < left <= expected


async def test_a_cookie_publishes_nothing(certificates):
    def authenticate(token, handshake):
        assert not handshake.cookies
        return Principal("4", claims={"publish": True}) if token == "good" else None

    async with open_endpoint("linked", certificates, authenticate=authenticate) as endpoint:
        body = b'{"channel":"balance","user":"4","data":1}'
        for headers, status in (
            (b"Cookie: session=f3b9c1", 401),
            (b"Cookie: session=f3b9c1\r\nAuthorization: Bearer bad", 401),
            (b"Cookie: session=f3b9c1\r\nAuthorization: Bearer good", 200),
        ):
            request = (
                b"POST /publish HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nOrigin: http://127.0.0.1:%d\r\n"
                b"Content-Length: %d\r\n%s\r\n\r\n%s"
            ) % (endpoint.port, endpoint.port, len(body), headers, body)
            assert await status_of(endpoint, request, certificates) == status


async def test_an_authenticate_whose_second_parameter_is_its_own(certificates):
    def authenticate(token, store=None):
        return Principal(token)

    async with open_endpoint("linked", certificates, authenticate=authenticate) as endpoint:
        assert await first_word(endpoint, ("Authorization", "Bearer 7")) == "7"
        assert await first_word(endpoint, COOKIE, own(endpoint)) == "not_authenticated"
