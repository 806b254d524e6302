"""`POST /publish`: who may, what is taken, and that it is delivered once and in order."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import math
import shlex
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from starlette.requests import Request

from harness.readme import block
from harness.room import lines
from harness.sources import Table
from harness.support import (
    PATIENCE_S,
    SECRET,
    TrioClient,
    hypercorn_serving,
    process,
    token,
    trio_client,
    until,
)
from harness.tokens import signed

from trading_push import (
    Channel,
    Principal,
    PushService,
    SourceError,
    issue_token,
    open_push_service,
)
from trading_push.auth.revocation import RevokedTokens
from trading_push.errors import PayloadError, ServiceClosed
from trading_push.settings.schema import Auth, Intervals, Limits, Settings
from trading_push.web.publish import PublishEndpoint


def publisher(claim: Any = True, user: str = "back end") -> str:
    return issue_token(SECRET, user, 3600, {} if claim is None else {"publish": claim})


class BackEnd:
    """Posts over one connection, as a back end in another process does."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        self.token: str | None = publisher()

    async def __call__(
        self, body: Any, *, key: str | None = None, method: str = "POST", path: str = "/publish"
    ) -> tuple[int, Any]:
        """The status and the answer."""
        return await trio.to_thread.run_sync(self.post, body, key, method, path)

    def post(
        self, body: Any, key: str | None = None, method: str = "POST", path: str = "/publish"
    ) -> tuple[int, Any]:
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        if key is not None:
            headers["Idempotency-Key"] = key
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._connection.request(method, path, sent, headers)
        response = self._connection.getresponse()
        self.headers = response.headers
        answer = response.read()
        if response.headers.get_content_type() == "application/json":
            return response.status, json.loads(answer)
        return response.status, answer

    def close(self) -> None:
        self._connection.close()


@asynccontextmanager
async def serving(
    source: Any = None, *, leeway_s: float = 5, **limits: Any
) -> AsyncIterator[tuple[PushService, int, BackEnd]]:
    settings = Settings(
        jwt_secret=SECRET,
        auth=Auth(leeway_s=leeway_s),
        intervals=Intervals(*4 * [0.1]),
        limits=Limits(**limits),
    )
    channels = [Channel("alerts", "events"), Channel("news", per_user=False)]
    async with (
        open_push_service(source, settings=settings, channels=channels) as service,
        hypercorn_serving(service) as port,
    ):
        with contextlib.closing(BackEnd(port)) as post:
            yield service, port, post


async def values(client: TrioClient, count: int) -> list[Any]:
    found: list[Any] = []
    with trio.fail_after(PATIENCE_S):
        while len(found) < count:
            push = await client.push()
            if push["type"] != "status":
                found.append(push["data"])
    return found


async def test_one_and_many_arrive() -> None:
    async with serving() as (_, port, post), trio_client(port, 4, "alerts", "news") as client:
        assert await post({"channel": "alerts", "user": "4", "data": {"n": 1}}) == (
            200,
            {"ok": True, "published": 1},
        )
        many = [
            {"channel": "alerts", "user": 4, "data": {"n": 2}},
            {"channel": "news", "data": None},
            {"channel": "alerts", "user": "5", "data": "of another"},
            {"channel": "alerts", "user": "4", "data": [0.10, 12345678901234567890]},
        ]
        assert await post(many) == (200, {"ok": True, "published": 4})
        # With a byte order mark, and null where nothing is meant.
        marked = b'\xef\xbb\xbf{"channel": "news", "data": [0.30], "user": null}'
        assert await post(marked) == (200, {"ok": True, "published": 1})
        arrived = await values(client, 5)
        assert [0.30] in arrived
        arrived.remove([0.30])
        arrived.remove(None)  # of another channel: there is no order between two
        assert arrived == [{"n": 1}, {"n": 2}, [0.1, 12345678901234567890]]
        assert await post([]) == (200, {"ok": True, "published": 0})


async def test_every_digit_goes_on_as_it_was_sent() -> None:
    async with serving() as (_, port, post), trio_client(port, 4, "alerts") as client:
        body = b'{"channel":"alerts","user":"4","data":{"price":0.10000000000000000001}}'
        assert (await post(body))[0] == 200
        while "0.10000000000000000001" not in (said := await client.socket.get_message()):
            assert '"type":"status"' in said


@pytest.mark.parametrize(
    ("claim", "status"),
    [
        (True, 200),
        (["alerts"], 200),
        (["news", "alerts"], 200),
        (["news"], 403),
        ([], 403),
        (None, 403),
        (False, 403),
        ("true", 403),
        (1, 403),
        ({"alerts": True}, 403),
        ([1], 403),
    ],
)
async def test_who_may_publish(claim: Any, status: int) -> None:
    async with serving() as (service, _, post):
        post.token = publisher(claim)
        answer = await post({"channel": "alerts", "user": "4", "data": 1})
        assert answer[0] == status
        assert (service.latest("alerts", "4") is not None) == (status == 200)
        if status == 403:
            assert answer[1]["error"]["code"] == "forbidden"


async def test_who_cannot_be_authenticated(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    value = {"channel": "alerts", "user": "4", "data": 1}
    async with serving() as (service, _, post):
        expired = issue_token(SECRET, "x", -60, {"publish": True})
        forged = issue_token("another secret of thirty-two bytes", "x", 60, {"publish": True})
        early = signed(SECRET, nbf=int(time.time()) + 60, publish=True)
        for bad, code in (
            (None, "not_authenticated"),
            ("", "bad_token"),
            ("rubbish", "bad_token"),
            (expired, "token_expired"),
            (forged, "bad_token"),
            (early, "bad_token"),
        ):
            post.token = bad
            status, answer = await post(value)
            assert (status, answer["error"]["code"]) == (401, code), bad
        assert answer["error"]["message"] == "the token is not valid yet"
        assert service.latest("alerts", "4") is None
    assert forged not in caplog.text
    assert expired not in caplog.text


@pytest.mark.parametrize(
    ("error", "status"), [(SourceError("no keys"), 503), (RuntimeError("a bug"), 500)]
)
async def test_a_token_that_cannot_be_checked(
    error: Exception, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    def authenticate(token: str) -> Any:
        raise error

    async with (
        open_push_service(authenticate=authenticate) as service,
        hypercorn_serving(service) as port,
    ):
        with contextlib.closing(BackEnd(port)) as post:
            assert (await post({"channel": "pnl", "user": "4", "data": 1}))[0] == status
    assert sum(record.exc_info is not None for record in caplog.records) == (status == 500)


BAD: tuple[tuple[bytes, str], ...] = (
    (b"", "send an object"),
    (b"{", "send an object"),
    (b"5", "send an object"),
    (b'{"channel":"alerts","user":"4"}', "data"),
    (b'{"channel":"alerts","user":"4","data":1,"more":1}', "more"),
    (b'{"channel":"alerts","user":4.5,"data":1}', "user"),
    (b'{"channel":"alerts","data":1}', "give the user"),
    (b'{"channel":"news","user":"4","data":1}', "leave out the user"),
    (b'{"channel":"nope","user":"4","data":1}', "there is no channel"),
    (b'{"channel":"ticker.BTCUSDT","user":"4","data":1}', "leave out the user"),
    (b'{"channel":"alerts","user":"4","data":NaN}', "send an object"),
    (b'{"channel":"alerts","user":"4","data":1e999}', "send an object"),
    (b'{"channel":"alerts","user":"4","data":"\xff"}', "send an object"),
    (b'{"channel":"alerts","user":"4","data":"\\ud800"}', "send an object"),
    (b'{"channel":"alerts","user":"4","data":' + 30_000 * b"[", "send an object"),
    (
        b'[{"channel":"alerts","user":"4","data":1},{"channel":"nope","data":1}]',
        "there is no channel",
    ),
)


async def test_what_cannot_be_published_is_refused_whole() -> None:
    async with serving() as (service, _, post):
        for body, complaint in BAD:
            status, answer = await post(body, key="the same")
            assert status == 400, body
            assert answer["error"]["code"] == "bad_request"
            assert complaint in answer["error"]["message"], answer
        assert service.latest("alerts", "4") is None
        # A key that has published nothing is free.
        good = {"channel": "alerts", "user": "4", "data": 1}
        assert (await post(good, key="the same"))[0] == 200


async def test_a_repeated_key_is_delivered_once() -> None:
    first = {"channel": "alerts", "user": "4", "data": "first"}
    other = {"channel": "alerts", "user": "4", "data": "other"}
    async with serving() as (_, port, post), trio_client(port, 4, "alerts") as client:
        for _ in range(3):
            assert await post(first, key="a") == (200, {"ok": True, "published": 1})
        status, answer = await post(other, key="a")
        assert status == 422
        assert "Idempotency-Key" in answer["error"]["message"]
        assert (await post(other, key="b"))[0] == 200
        post.token = publisher(user="another back end")
        assert (await post(other, key="a"))[0] == 200  # its own
        assert (await post(first))[0] == 200  # without a key each counts
        assert await values(client, 4) == ["first", "other", "other", "first"]
        for bad in ("", 256 * "x"):
            assert (await post(first, key=bad))[0] == 400


async def test_no_key_is_thrown_out_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trading_push.web.publish.KEYS", 2)
    value = {"channel": "alerts", "user": "4", "data": 1}
    async with serving() as (service, _, post):

        def published() -> int:
            return service._broker.snapshot(service._topic("alerts", "4")).seq

        for key in ("a", "b"):
            assert (await post(value, key=key))[0] == 200
        # Neither by the keys of other publishers ...
        for number in range(3):
            post.token = publisher(user=f"another back end {number}")
            for key in ("a", "b"):
                assert (await post(value, key=key))[0] == 200
        assert published() == 8
        # ... nor by more of its own, which must wait.
        post.token = publisher()
        status, answer = await post(value, key="c")
        assert (status, answer["error"]["code"]) == (429, "rate_limited")
        assert 590 <= int(post.headers["Retry-After"]) <= 600
        for key in ("a", "b", "a"):
            assert await post(value, key=key) == (200, {"ok": True, "published": 1})
        assert published() == 8
        assert (await post(value))[0] == 200  # without a key there is nothing to remember
        assert published() == 9


async def test_keys_and_publishers_are_forgotten_in_time(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trading_push.web.publish.KEYS", 2)
    published: list[object] = []

    async def check(token: str, address: str) -> Principal:
        return Principal(token, None, {"publish": True})

    async def publish(values: Any) -> None:
        published.append(list(values))

    endpoint = PublishEndpoint(check, publish, 1000, RevokedTokens(0), 1)

    async def post(user: str, key: str) -> tuple[int, str | None]:
        response = await endpoint.answer(request_of(user, key, b"[]"))
        return response.status_code, response.headers.get("retry-after")

    assert await post("1", "a") == (200, None)
    await trio.sleep(400)
    assert await post("1", "b") == (200, None)
    assert await post("1", "c") == (429, "200")
    await trio.sleep(199.5)
    assert await post("1", "c") == (429, "1")
    assert await post("1", "a") == (200, None)
    assert len(published) == 2
    await trio.sleep(1)
    assert await post("1", "a") == (200, None)  # forgotten: another request
    assert await post("1", "b") == (200, None)
    assert await post("1", "c") == (429, "400")
    assert len(published) == 3
    for number in range(1000):
        assert await post(f"once {number}", "a") == (200, None)
    await trio.sleep(601)
    assert await post("1", "a") == (200, None)
    assert len(endpoint._keys) == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), PayloadError("bad"), ServiceClosed()])
async def test_a_key_is_free_where_nothing_was_published(error: Exception) -> None:
    fails = [error]

    async def check(token: str, address: str) -> Principal:
        return Principal(token, None, {"publish": True})

    async def publish(values: Any) -> None:
        await trio.lowlevel.checkpoint()
        if fails:
            raise fails.pop()

    endpoint = PublishEndpoint(check, publish, 1000, RevokedTokens(0), 1)
    with contextlib.suppress(RuntimeError):
        assert (await endpoint.answer(request_of("1", "a", b"[]"))).status_code in (400, 503)
    other = b'{"channel":"news","data":1}'
    assert (await endpoint.answer(request_of("1", "a", other))).status_code == 200


async def test_a_bug_at_a_route_is_one_trace_of_our_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def publish(self: object, values: object) -> None:
        raise RuntimeError("a bug\n✅ 用户4认证成功")

    monkeypatch.setattr(PushService, "publish_many", publish)
    async with serving() as (_, _, post):
        assert (await post({"channel": "news", "data": 1}))[0] == 500
        await until(lambda: any(record.exc_info for record in caplog.records))
    [record] = [record for record in caplog.records if record.exc_info]
    assert record.name == "trading_push.connection"
    assert "\n✅" not in caplog.text


async def test_a_token_that_ends_while_the_body_comes_publishes_nothing() -> None:
    value = b'{"channel":"alerts","user":"4","data":1}'
    async with serving(leeway_s=0) as (service, port, _):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        ends = issue_token(SECRET, "x", 2, {"publish": True})
        head = f"POST /publish HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ends}\r\n"
        await stream.send_all(head.encode() + b"Content-Length: %d\r\n\r\n" % len(value))
        await trio.sleep(3)
        await stream.send_all(value)
        with trio.fail_after(PATIENCE_S):
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 401")
        await stream.aclose()
        assert service.latest("alerts", "4") is None


def request_of(user: str, key: str, body: bytes) -> Request:
    headers = [(b"authorization", f"Bearer {user}".encode()), (b"idempotency-key", key.encode())]

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


async def test_what_is_too_long_and_what_is_not_there() -> None:
    async with serving(publish_bytes=1000) as (service, _, post):
        status, answer = await post({"channel": "alerts", "user": "4", "data": 1000 * "x"})
        assert (status, answer["error"]["code"]) == (413, "bad_request")
        post.close()
        assert (await post(b"", method="GET"))[0] == 405
        for path in ("/elsewhere", "/ws"):
            # Answered with its body unread, a connection is closed.
            assert (await post({}, path=path))[0] == 404
            post.close()
        service.context.connections.accepting = False
        assert (await post({"channel": "news", "data": 1}))[0] == 503


async def test_a_request_publishes_so_many_values_at_most() -> None:
    async with serving() as (service, _, post):
        many = 1001 * [{"channel": "alerts", "user": "4", "data": 1}]
        status, answer = await post(many)
        assert status == 413
        assert "at most 1000 values" in answer["error"]["message"]
        assert service.latest("alerts", "4") is None
        assert (await post(many[:1000]))[0] == 200


async def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trading_push.web.publish.BODY_S", 0.1)
    async with serving() as (_, port, _):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        head = f"POST /publish HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {publisher()}\r\n"
        await stream.send_all(head.encode() + b"Content-Length: 100\r\n\r\n{")
        with trio.fail_after(PATIENCE_S):
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 408")
        await stream.aclose()


async def test_keys_do_not_keep_their_bodies() -> None:
    async with serving() as (_, _, post):
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for number in range(30):
                body = {"channel": "news", "data": 500_000 * "x"}
                assert (await post(body, key=str(number)))[0] == 200
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept - before < 5_000_000


async def test_a_principal_whose_time_is_over_may_not() -> None:
    def authenticate(token: str) -> Principal:
        return Principal("4", 1.0, {"publish": True})

    async with (
        open_push_service(authenticate=authenticate) as service,
        hypercorn_serving(service) as port,
    ):
        with contextlib.closing(BackEnd(port)) as post:
            status, answer = await post({"channel": "pnl", "user": "4", "data": 1})
            assert (status, answer["error"]["code"]) == (401, "token_expired")


async def test_two_thousand_a_second_are_delivered_in_order() -> None:
    seconds, each = 3, 100
    async with serving() as (_, port, post), trio_client(port, 4, "alerts") as client:
        found: list[int] = []
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                found.extend(await values(client, seconds * 2000))

            nursery.start_soon(read)
            began = time.perf_counter()
            for batch in range(seconds * 2000 // each):
                numbers = range(batch * each, (batch + 1) * each)
                body = [{"channel": "alerts", "user": "4", "data": n} for n in numbers]
                assert (await post(body))[0] == 200
        took_s = time.perf_counter() - began
        assert found == list(range(seconds * 2000))
        assert took_s < seconds
        began = time.perf_counter()
        for number in range(500):
            assert (await post({"channel": "alerts", "user": "4", "data": number}))[0] == 200
        single_s = time.perf_counter() - began
        assert await values(client, 500) == list(range(500))
    print(f"\n{seconds * 2000 / took_s:.0f} a second in hundreds, {500 / single_s:.0f} one by one")


async def test_a_published_value_and_a_polled_one_do_not_fight() -> None:
    source = Table()
    source.values["4", "pnl"] = "source 1"
    async with serving(source) as (_, port, post), trio_client(port, 4, "pnl") as client:
        assert await values(client, 1) == ["source 1"]
        asked = len(source.calls)
        assert (await post({"channel": "pnl", "user": "4", "data": "published"}))[0] == 200
        assert await values(client, 1) == ["published"]
        while len(source.calls) < asked + 5:  # it says "source 1" all the time
            await trio.sleep(0.01)
        source.values["4", "pnl"] = "source 2"
        assert await values(client, 1) == ["source 2"]


async def test_a_request_that_ends_half_way_publishes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    body = b'{"channel":"alerts","user":"4","data":1}'
    async with serving() as (service, port, post):
        for sent in (b"", body[:10]):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(
                b"POST /publish HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
                + publisher().encode()
                + b"\r\nContent-Length: %d\r\n\r\n" % len(body)
                + sent
            )
            await stream.aclose()
        # Those before have been served by now, if they ever are.
        assert (await post({"channel": "news", "data": 1}))[0] == 200
        assert service.latest("alerts", "4") is None
    assert not any(record.exc_info for record in caplog.records)
    assert not any("❌" in line for line in lines(caplog))


async def test_the_readme_s_request_is_taken_as_printed() -> None:
    words = shlex.split(block("publish").replace("\\\n", " "))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/publish"]
    headers = [words[at + 1] for at, word in enumerate(words) if word == "-H"]
    assert headers[0] == "Authorization: Bearer $TOKEN"
    assert headers[1].startswith("Idempotency-Key: ")
    async with serving() as (service, _, post):
        answer = await post(words[words.index("-d") + 1].encode(), key=headers[1].split()[1])
        assert answer == (200, {"ok": True, "published": 2})
        latest = service.latest("pnl", "4")
        assert latest is not None
        assert json.loads(bytes(latest.data)) == {"total": "12.50"}


@pytest.fixture
def demo(tmp_path: Any) -> Iterator[str]:
    with process(
        *("trading-push", "token", "--user", "back end", "--publish"),
        env={"TRADING_PUSH_JWT_SECRET": SECRET},
    ) as made:
        made.popen.wait(PATIENCE_S)
        made.stop()
        yield made.out[0]


async def test_the_command_makes_a_token_that_may_publish(demo: str) -> None:
    async with serving() as (_, _, post):
        post.token = demo
        assert (await post({"channel": "news", "data": 1}))[0] == 200
        post.token = token("4")
        assert (await post({"channel": "news", "data": 1}))[0] == 403


async def test_a_token_that_is_revoked_while_the_body_comes_publishes_nothing() -> None:
    value = b'{"channel":"alerts","user":"4","data":1}'
    asked = trio.Event()
    revoked = RevokedTokens(0)
    published: list[object] = []

    async def check(token: str, address: str) -> Principal:
        return Principal(token, None, {"publish": True}, token_id="mine")

    async def publish(values: Any) -> None:
        published.append(list(values))

    async def receive() -> dict[str, Any]:
        asked.set()
        await trio.testing.wait_all_tasks_blocked()
        return {"type": "http.request", "body": value, "more_body": False}

    endpoint = PublishEndpoint(check, publish, 1000, revoked, 1)
    request = request_of("1", "a", value)
    request._receive = receive

    async def revoke() -> None:
        await asked.wait()
        revoked.add("mine", math.inf)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(revoke)
        response = await endpoint.answer(request)
    assert response.status_code == 401
    assert b"revoked" in response.body
    assert published == []
