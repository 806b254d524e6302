"""What anyone who reaches the server can write into its log: why, and how often."""

from __future__ import annotations

import time
import types

import pytest
import trio
import trio_websocket

from harness.endpoints import answer_of, open_endpoint
from harness.handshakes import handshake
from harness.room import lines
from harness.sources import serving
from harness.support import SECRET, token
from harness.tokens import signed

from trading_push import AuthenticationError, JwtAuthenticator
from trading_push.endpoints import native
from trading_push.endpoints.hypercorn import server
from trading_push.logs import notices, strangers
from trading_push.settings.schema import Auth

at_each_endpoint = pytest.mark.parametrize("kind", ["linked", "native"])


@pytest.fixture
def said(caplog):
    caplog.set_level("INFO", "trading_push")
    return lambda mark: [line for line in lines(caplog) if mark in line]


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that the test turns."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(notices, "time", clock)
    monkeypatch.setattr(strangers, "time", clock)
    return clock


def wrong_tokens():
    now = int(time.time())
    return {
        "the token has expired": signed(SECRET, exp=now - 60),
        "the token's signature is not valid": signed("another secret of thirty-two bytes"),
        "the token has no exp": signed(SECRET, exp=None),
        "the token's sub is not a text of 1 to 64 characters": signed(SECRET, sub=4),
        "the token's aud is not the configured one": signed(SECRET, aud="other"),
        "the token is not valid yet": signed(SECRET, iat=now + 60),
        "the token is not a JWT": "rubbish-rubbish-rubbish",
    }


@at_each_endpoint
async def test_why_a_token_is_refused(kind, certificates, said):
    check = JwtAuthenticator(Auth(audience="push"), SECRET)

    async def authenticate(token: str):
        return await check(token)

    for why, bad in wrong_tokens().items():
        if "aud" not in why and bad.count(".") == 2 and "signature" not in why:
            claims = {"exp": None} if "no exp" in why else {}
            claims |= {"exp": 60} if "expired" in why else {}
            claims |= {"sub": 4} if "sub" in why else {}
            claims |= {"iat": int(time.time()) + 60} if "yet" in why else {}
            bad = signed(SECRET, aud="push", **claims)
        async with open_endpoint(kind, certificates, authenticate=authenticate) as endpoint:
            async with endpoint.connect() as client:
                reply = await client.request("auth", token=bad)
                assert reply["error"]["message"] == why
            header = b"Authorization: Bearer " + bad.encode()
            assert why.encode() in await answer_of(endpoint, handshake(header), certificates)
        escaped = why.replace("'", "\\'")
        assert said(escaped) == [f"⚠️ 拒绝令牌: {escaped} - 来自: 127.0.0.1"] * 2
        assert not said(bad)


async def test_a_token_that_an_application_puts_in_its_refusal(certificates, said):
    def authenticate(token: str):
        raise AuthenticationError(f"no session {token!r}")

    async with (
        open_endpoint("linked", certificates, authenticate=authenticate) as endpoint,
        endpoint.connect() as client,
    ):
        await client.request("auth", token="opaque-session-7f3a9")
    assert said("拒绝令牌") == ["⚠️ 拒绝令牌: no session \\'(token)\\' - 来自: 127.0.0.1"]


@at_each_endpoint
async def test_a_path_that_nobody_serves(kind, certificates, said, clock):
    async with open_endpoint(kind, certificates) as endpoint:
        for _ in range(3):
            answer = await answer_of(
                endpoint, handshake(path=b"/socket?token=secret-in-it"), certificates
            )
            assert answer.startswith(b"HTTP/1.1 404")
            assert b"/ws" in answer.partition(b"\r\n\r\n")[2]
        assert said("/socket") == ["⚠️ 请求的路径不存在: /socket - 来自: 127.0.0.1"]
        clock.now += 61
        await answer_of(endpoint, handshake(path=b"/socket"), certificates)
        assert len(said("/socket")) == 2
        # Ten in all, and a count of the others once their minute is over.
        for number in range(80):
            await answer_of(endpoint, handshake(path=b"/scan%d" % number), certificates)
        assert len(said("/scan")) == 9
        assert len(endpoint.service.context.notices) == 64
        clock.now += 61
        await answer_of(endpoint, handshake(path=b"/last"), certificates)
        assert said("另有") == ["⚠️ 另有71条外部请求引起的日志未显示"]


async def test_a_request_for_a_path_that_nobody_serves(certificates, said):
    async with open_endpoint("linked", certificates) as endpoint:
        request = b"GET /%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        for path in (b"wp-login.php", b"wp-login.php"):
            answer = await answer_of(endpoint, request % path, certificates)
            assert answer.startswith(b"HTTP/1.1 404")
            assert b"the WebSocket is at /ws" in answer
        assert said("路径") == ["⚠️ 请求的路径不存在: /wp-login.php - 来自: 127.0.0.1"]
        answer = await answer_of(endpoint, request % b"ws", certificates)
        assert b"this is a WebSocket" in answer
        assert len(said("路径")) == 1


@at_each_endpoint
async def test_a_token_in_the_url_is_not_read(kind, certificates, said):
    good = token(4)
    async with open_endpoint(kind, certificates) as endpoint:
        for _ in range(2):
            async with trio_websocket.open_websocket(
                "127.0.0.1", endpoint.port, f"/ws?token={good}", use_ssl=False
            ) as socket:
                await socket.send_message('{"op":"list"}')
                assert "?token=) is not read" in await socket.get_message()
    assert said("URL") == [
        "⚠️ 不读取URL中的令牌（?token=），请使用Authorization: Bearer或auth请求 - 来自: 127.0.0.1"
    ]
    assert not said(good)


async def test_refused_tokens_are_counted_where_they_are_many(certificates, said, clock):
    async with open_endpoint("linked", certificates) as endpoint:
        header = b"Authorization: Bearer rubbish"
        for _ in range(25):
            await answer_of(endpoint, handshake(header), certificates)
        assert len(said("拒绝令牌")) == 10
        clock.now += 61
        await answer_of(endpoint, handshake(header), certificates)
        assert said("另有") == ["⚠️ 另有15条外部请求引起的日志未显示"]
        assert len(said("拒绝令牌")) == 11


@at_each_endpoint
async def test_connections_that_are_stopped_are_counted_where_they_are_many(
    kind, certificates, said, clock, monkeypatch
):
    async def fail(*args):
        raise RuntimeError("a bug")

    at = {"linked": server.GuardedTCPServer, "native": native}[kind]
    async with open_endpoint(kind, certificates) as endpoint:
        monkeypatch.setattr(at, {"linked": "_run_plain", "native": "_serve"}[kind], fail)
        for _ in range(25):
            assert await answer_of(endpoint, handshake(), certificates) == b""
        address = {"linked": "-", "native": "127.0.0.1"}[kind]  # of which the former knows none yet
        assert said("已拦截") == [f"⚠️ 已拦截异常连接 - 来自: {address}: RuntimeError: a bug"] * 10
        assert endpoint.service.statistics().connections_stopped >= 25
        # Whatever else strangers cause has the same bound.
        endpoint.service.context.notices.unserved("/path", "127.0.0.1")
        assert not said("/path")
        assert not said("另有")
    assert said("另有") == ["⚠️ 另有16条外部请求引起的日志未显示"]


async def test_the_count_is_told_when_the_minute_is_over(autojump_clock, monkeypatch, said):
    monkeypatch.setattr(strangers, "time", types.SimpleNamespace(monotonic=trio.current_time))
    async with serving(None) as (service, _):
        notices, began = service.context.notices, trio.current_time()
        for minute in (0, 1):
            for number in range(12):
                notices.unserved(f"/{minute}/{number}", "127.0.0.1")
            await trio.sleep_until(began + 62 * minute + 59)
            assert len(said("另有")) == minute
            await trio.sleep_until(began + 62 * minute + 62)
        assert said("另有") == ["⚠️ 另有2条外部请求引起的日志未显示"] * 2
    assert len(said("另有")) == 2
