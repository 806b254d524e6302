"""The HTTP source against real services: by Hypercorn, and some that break the rules on purpose."""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import trio
import trio.testing
import trustme

from harness.http_service import HTTP_CLIENT, TOKEN, Peer, answering, failure, ok, reading, scripted
from harness.readme import block
from harness.sources import BALANCE, Service
from harness.support import client, free_port, hypercorn_serving, serving

from trading_push import ConfigurationError, SourceError
from trading_push.sources.http import body as http_body
from trading_push.sources.http import source as http
from trading_push.sources.http.source import HttpSource

# --- what is asked, and what is made of the answer ----------------------------------------------


@pytest.mark.parametrize(
    ("pointer", "answer"),
    [
        ("", b" \r\n" + BALANCE + b"\n"),
        ("/data", b'{"ok": true, "data" : ' + BALANCE + b' , "x": 1}'),
        ("/result/1/a~1b~0/ü", '{"result":[0,{"a/b~":{"ü":'.encode() + BALANCE + b"}}]}"),
        ("/", b'{"":' + BALANCE + b"}"),
    ],
)
async def test_data_go_on_as_they_were_written(
    service: Service, pointer: str, answer: bytes
) -> None:
    service.say(answer, content_type="text/html")
    async with reading(service.url(), pointer=pointer) as source:
        value = await source.fetch("4", "balance")
        assert isinstance(value, msgspec.Raw)
        assert bytes(value) == BALANCE


@pytest.mark.parametrize(
    ("user", "piece"),
    [
        ("4", "4"),
        ("a/b?c#d", "a%2Fb%3Fc%23d"),
        ("../../admin", "..%2F..%2Fadmin"),
        ("%2e%2e", "%252e%252e"),
        ("...", "..."),
        ("ü \r\n\t\0", "%C3%BC%20%0D%0A%09%00"),
        ("{data_type}", "%7Bdata_type%7D"),
        ("a;b,c&d=e+f", "a%3Bb%2Cc%26d%3De%2Bf"),
        ("\\@:", "%5C%40%3A"),
    ],
)
async def test_a_user_id_is_one_piece_of_the_url(service: Service, user: str, piece: str) -> None:
    template = service.url("/v1/users/{user_id}/{data_type}?of={user_id}&x=%20y")
    async with reading(template) as source:
        await source.fetch(user, "balance")
    assert service.asked == [f"/v1/users/{piece}/balance?of={piece}&x=%20y"]


@pytest.mark.parametrize("user", ["", ".", "..", "\ud800"])
async def test_a_user_id_that_no_url_can_hold(service: Service, user: str) -> None:
    async with reading(service.url()) as source:
        error = await failure(source, user)
    assert (error.retryable, "no URL can hold" in str(error)) == (False, True)
    assert service.asked == []


async def test_token_and_headers_are_sent_and_told_nobody(service: Service) -> None:
    headers = {"X-Key": "k3y", "user-agent": "mine"}
    async with reading(service.url(), token=TOKEN, headers=headers) as source:
        await source.fetch("4", "balance")
        for secret in (TOKEN, "k3y"):
            assert secret not in repr(source)
    [sent] = service.headers
    assert sent["authorization"] == f"Bearer {TOKEN}"
    assert (sent["x-key"], sent["user-agent"]) == ("k3y", "mine")
    assert sent["host"] == f"127.0.0.1:{service.port}"


async def test_nothing_to_say(service: Service) -> None:
    async with reading(service.url(), pointer="/data") as source:
        service.say(b"", 204)
        assert await source.fetch("4", "balance") is None
        service.say(b'{"data": null}')
        assert await source.fetch("4", "balance") is None


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b'{"data": NaN}',
        b'{"data": [1, 2',
        b'{"data": [1]} x',
        b'{"data": "\xff"}',
        b'{"data": "\\ud800"}',
        b'{"data": 1e999}',
        b'{"data": 1, "other": -Infinity}',
        b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"data": 1' + b"0" * 5_000 + b"}",
    ],
    ids=range(11),
)
async def test_what_is_not_json(service: Service, answer: bytes) -> None:
    service.say(answer, content_type="application/json", etag='"1"')
    async with reading(service.url(), pointer="/data") as source:
        error = await failure(source)
        assert (error.retryable, "is not JSON" in str(error)) == (False, True)
        service.say(b'{"data": 1}')
        assert bytes(await source.fetch("4", "balance")) == b"1"
    assert "if-none-match" not in service.headers[1]


@pytest.mark.parametrize(
    ("pointer", "answer"),
    [
        ("/data", b'{"error": "no"}'),
        ("/data/x", b'{"data": [1]}'),
        ("/data/01", b'{"data": [1, 2]}'),
        ("/data/-", b'{"data": [1, 2]}'),
        ("/data/2", b'{"data": [1, 2]}'),
        ("/data/0", b'{"data": "text"}'),
    ],
)
async def test_a_pointer_to_nothing(service: Service, pointer: str, answer: bytes) -> None:
    service.say(answer)
    async with reading(service.url(), pointer=pointer) as source:
        error = await failure(source)
    assert (error.retryable, "has nothing where" in str(error)) == (False, True)


# --- ETags --------------------------------------------------------------------------------------


async def test_304_is_the_value_that_the_etag_is_of(service: Service) -> None:
    service.turns = [
        (200, b'{"data": [0.10]}', {"etag": 'W/"1"'}),
        (304, b"", {"etag": 'W/"1"'}),
        (200, b'{"data": [0.20]}', {"etag": '"2"'}),
        (304, b"", {}),
        (200, b'{"data": [0.30]}', {}),
        (200, b'{"data": [0.40]}', {}),
    ]
    async with reading(service.url(), pointer="/data") as source:
        got = [bytes(await source.fetch("4", "balance")) for _ in range(6)]
    assert got == [b"[0.10]", b"[0.10]", b"[0.20]", b"[0.20]", b"[0.30]", b"[0.40]"]
    sent = [headers.get("if-none-match") for headers in service.headers]
    assert sent == [None, 'W/"1"', 'W/"1"', '"2"', '"2"', None]


async def test_an_etag_is_of_one_user_and_type(service: Service) -> None:
    service.say(BALANCE, etag='"1"')
    async with reading(service.url()) as source:
        for user, data_type in (("4", "balance"), ("5", "balance"), ("4", "orders")):
            await source.fetch(user, data_type)
    assert not any("if-none-match" in headers for headers in service.headers)


@pytest.mark.parametrize("etag", ["1", '"1', 'w/"1"', '"a b"', '"' + "x" * 300 + '"'])
async def test_what_is_no_etag_is_not_sent_back(service: Service, etag: str) -> None:
    service.say(BALANCE, etag=etag)
    async with reading(service.url()) as source:
        await source.fetch("4", "balance")
        await source.fetch("4", "balance")
        service.say(b"", 304)
        assert "answered 304" in str(await failure(source))
    assert not any("if-none-match" in headers for headers in service.headers)


async def test_etags_are_kept_within_bounds(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "KNOWN_BYTES", 1_500)  # room for two
    service.say(BALANCE, etag='"1"')
    async with reading(service.url()) as source:
        for user in ("1", "2", "1", "3", "1", "2", "3"):
            await source.fetch(user, "balance")
        service.say(b"1" * 3_000, etag='"1"')
        await source.fetch("1", "balance")
        assert source._known._left == 1_500
    sent = ["if-none-match" in headers for headers in service.headers]
    assert sent == [False, False, True, False, True, False, False, False]


# --- other answers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "retryable", "says"),
    [
        (202, False, "answered 202"),
        (206, False, "answered 206"),
        (301, False, "redirects are not followed: correct http.url"),
        (307, False, "redirects are not followed"),
        (400, False, "answered 400"),
        (401, False, "answered 401: look after http.token"),
        (403, False, "answered 403: look after http.token"),
        (404, False, "answered 404"),
        (408, True, "answered 408"),
        (429, True, "answered 429"),
        (500, True, "answered 500"),
        (502, True, "answered 502"),
        (503, True, "answered 503"),
    ],
)
async def test_each_status_for_what_it_is(
    service: Service, status: int, retryable: bool, says: str
) -> None:
    async with scripted(answering) as (elsewhere, connections):
        service.say(b"<html>sorry", status, location=elsewhere.replace("{", "").replace("}", ""))
        async with reading(service.url(), token=TOKEN) as source:
            error = await failure(source)
            assert error.retryable is retryable
            assert says in str(error)
            service.say(BALANCE)
            assert bytes(await source.fetch("4", "balance")) == BALANCE
        assert connections() == 0
    assert len(service.asked) == 2


# --- time ---------------------------------------------------------------------------------------


async def test_an_answer_that_takes_too_long(
    service: Service, mock_clock: trio.testing.MockClock
) -> None:
    service.go_on = trio.Event()
    async with reading(service.url(), timeout_s=5) as source, trio.open_nursery() as nursery:

        async def fail() -> None:
            error = await failure(source)
            assert error.retryable
            assert isinstance(error, trio.TooSlowError)  # told as `source_timeout`
            assert str(error) == "the HTTP service did not answer within 5 s"

        nursery.start_soon(fail)
        await service.arrived.wait()
        mock_clock.jump(5.1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        service.go_on.set()


async def test_a_body_that_comes_byte_by_byte(mock_clock: trio.testing.MockClock) -> None:
    ended = trio.Event()

    async def drip(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await peer.send(b"1")
                mock_clock.jump(1)
                await trio.testing.wait_all_tasks_blocked(0.001)
        ended.set()

    async with scripted(drip) as (url, _), reading(url, timeout_s=10) as source:
        assert isinstance(await failure(source), trio.TooSlowError)
        await ended.wait()


async def test_waiting_for_a_connection_is_not_on_the_clock(
    service: Service, mock_clock: trio.testing.MockClock
) -> None:
    service.go_on = trio.Event()
    async with reading(service.url(), timeout_s=5, connections=1) as source:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.fetch, "1", "balance")
            await service.arrived.wait()
            nursery.start_soon(source.fetch, "2", "balance")
            await trio.testing.wait_all_tasks_blocked(0.01)
            mock_clock.jump(3)
            service.arrived = trio.Event()
            service.go_on.set()
            service.go_on = trio.Event()
            await service.arrived.wait()
            mock_clock.jump(3)
            service.go_on.set()
        assert len(service.asked) == 2


# --- connections --------------------------------------------------------------------------------


async def test_connections_are_kept_and_bounded(service: Service) -> None:
    async with reading(service.url(), connections=3) as source:
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                for user in range(20):
                    nursery.start_soon(source.fetch, str(user), "balance")
        assert len(service.asked) == 60
        assert len(connections_to(service.port)) == 3
        with trio.CancelScope() as scope:
            scope.cancel()
            await source.aclose()
        assert connections_to(service.port) == []


def connections_to(port: int) -> list[int]:
    """Our sockets that are connected to a port."""
    return [
        each.fd
        for each in psutil.Process().net_connections("tcp")
        if each.raddr and each.raddr.port == port
    ]


async def test_a_cancelled_answer_is_never_the_next_one() -> None:
    half_sent, go_on = trio.Event(), trio.Event()

    async def stop_halfway(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok(b'"first of all"')[:-5])
        half_sent.set()
        await go_on.wait()
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(100):
                await peer.send(b' all"' + ok(b'"wrong"'))
                await trio.sleep(0.01)

    async with scripted(stop_halfway, answering) as (url, connections), reading(url) as source:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.fetch, "1", "balance")
            await half_sent.wait()
            nursery.cancel_scope.cancel()
        go_on.set()
        assert bytes(await source.fetch("2", "balance")) == b'"/2/balance"'
        assert bytes(await source.fetch("3", "balance")) == b'"/3/balance"'
        assert connections() == 2


async def test_two_answers_in_one_piece() -> None:
    async def answer_twice(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok(b'"/1/balance"') + ok(b'"wrong"'))
        await answering(peer)

    async with scripted(answer_twice, answering) as (url, _), reading(url) as source:
        assert bytes(await source.fetch("1", "balance")) == b'"/1/balance"'
        assert bytes(await source.fetch("2", "balance")) == b'"/2/balance"'
        assert bytes(await source.fetch("3", "balance")) == b'"/3/balance"'


@pytest.mark.parametrize("secured", [False, True])
async def test_an_answer_too_many_is_never_the_next_one(secured: bool) -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if secured else None
    trusting = ssl.create_default_context()
    if tls is not None:
        authority.issue_cert("localhost").configure_cert(tls)
        authority.configure_trust(trusting)

    async def answer_twice(peer: Peer) -> None:
        await peer.request()
        if secured:  # both arrive together, in two records
            peer.held.hold = True
            await peer.send(ok(b'"/1/balance"'))
            peer.held.hold = False
            await peer.send(ok(b'"wrong"'))
        else:
            await peer.send(ok(b'"/1/balance"'))
            await first.wait()
            await peer.send(ok(b'"wrong"'))
        sent.set()
        await answering(peer)

    first, sent = trio.Event(), trio.Event()
    async with (
        scripted(answer_twice, answering, tls=tls) as (url, connections),
        reading(url, ssl_context=trusting) as source,
    ):
        assert bytes(await source.fetch("1", "balance")) == b'"/1/balance"'
        first.set()
        await sent.wait()
        assert bytes(await source.fetch("2", "balance")) == b'"/2/balance"'
        assert bytes(await source.fetch("3", "balance")) == b'"/3/balance"'
        assert connections() == 2


async def test_a_service_that_closes_idle_connections() -> None:
    closed = trio.Event()

    async def close_when_idle(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok(b"1"))
        await peer.stream.aclose()
        closed.set()

    async with scripted(close_when_idle, answering) as (url, connections), reading(url) as source:
        assert bytes(await source.fetch("1", "balance")) == b"1"
        await closed.wait()
        assert bytes(await source.fetch("2", "balance")) == b'"/2/balance"'
        assert connections() == 2


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_connection_that_ends_just_as_it_is_used_again(how: str) -> None:
    asked = []

    async def end_at_the_second(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok(b"1"))
        asked.append(await peer.request())
        if how == "reset":
            peer.reset()

    async with scripted(end_at_the_second, answering) as (url, connections):
        async with reading(url) as source:
            assert bytes(await source.fetch("1", "balance")) == b"1"
            assert bytes(await source.fetch("2", "balance")) == b'"/2/balance"'
        assert connections() == 2
    assert asked[0].startswith(b"GET /2/balance")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_body_that_breaks_off(how: str, chunked: bool) -> None:
    async def break_off(peer: Peer) -> None:
        await peer.request()
        head = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 100"
        start = b"5\r\n[1, 2\r\n" if chunked else b"[1, 2]"
        await peer.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + start)
        if how == "reset":
            await trio.testing.wait_all_tasks_blocked(0.05)  # it shall have read this much
            peer.reset()

    async with scripted(break_off, answering) as (url, connections), reading(url) as source:
        error = await failure(source)
        assert (error.retryable, "broke the connection" in str(error)) == (True, True)
        assert connections() == 1  # what has begun is not asked for again
        assert bytes(await source.fetch("2", "balance")) == b'"/2/balance"'


GARBAGE = {
    "not HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n11",
    "a bad length": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n1",
    "a bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}

# What only httpx can read.
ODD = {
    "a header that is not UTF-8": ok(b"1", b"X: \xff"),
    "a cookie without a value": ok(b"1", b"Set-Cookie: x"),
    "a cookie of odd characters": ok(b"1", b'Set-Cookie: \xe4=\xff"; path=", ;;'),
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + ok(b"1"),
    "three answers 1xx": b"HTTP/1.1 102 Processing\r\n\r\n" * 3 + ok(b"1"),
}
READ = {
    "no reason phrase": b"HTTP/1.1 200\r\nContent-Length: 1\r\n\r\n1",
    "a byte order mark": ok(b"\xef\xbb\xbf1"),
    "a cookie": ok(b"1", b"Set-Cookie: a=b; path=/"),
}
(GARBAGE if HTTP_CLIENT == "asks" else READ).update(ODD)


@pytest.mark.parametrize("what", READ)
async def test_what_is_odd_and_is_read(what: str) -> None:
    async def answer_oddly(peer: Peer) -> None:
        while head := await peer.request():
            heads.append(head)
            await peer.send(READ[what])

    heads: list[bytes] = []
    async with scripted(answer_oddly) as (url, connections), reading(url) as source:
        for _ in range(2):
            assert bytes(await source.fetch("4", "balance")) == b"1"
        assert connections() == 1
    assert b"cookie" not in heads[1].lower()


@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage(what: str) -> None:
    async def garbage(peer: Peer) -> None:
        with suppress(trio.BrokenResourceError):  # it need not hear us out
            while await peer.request():
                await peer.send(GARBAGE[what])

    async with scripted(garbage) as (url, connections), reading(url, token=TOKEN) as source:
        error = await failure(source)
        assert error.retryable
        assert "is not HTTP" in str(error) or "cannot be read" in str(error)
        assert connections() <= 2


async def test_nobody_there() -> None:
    async with reading(f"http://127.0.0.1:{free_port()}/{{user_id}}/{{data_type}}") as source:
        error = await failure(source)
        assert str(error) == "the HTTP service cannot be reached: Connection refused"
        assert error.retryable
    async with reading("http://nowhere.invalid/{user_id}/{data_type}") as source:
        error = await failure(source)
        assert "cannot be reached" in str(error)
        assert error.retryable


async def test_an_ipv6_address() -> None:
    heads = []

    async def remember(peer: Peer) -> None:
        heads.append(await peer.request())
        await peer.send(ok(b"1"))

    try:
        async with scripted(remember, host="::1") as (url, _):
            url = url.replace("localhost", "[::1]")
            async with reading(url) as source:
                await source.fetch("4", "balance")
    except* OSError:
        pytest.skip("there is no IPv6 here")
    authority = url.split("/")[2]
    assert f"\r\nHost: {authority}\r\n".encode() in heads[0]


async def test_certificates() -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async def refuse(peer: Peer) -> None:
        with suppress(trio.BrokenResourceError):
            assert not await peer.stream.receive_some()

    async with scripted(refuse, answering, tls=tls) as (url, _):
        async with reading(url) as source:
            error = await failure(source)
            assert (error.retryable, "certificate is not one to trust" in str(error)) == (
                False,
                True,
            )
        async with reading(url, ssl_context=trusting) as source:
            for _ in range(2):
                assert bytes(await source.fetch("4", "balance")) == b'"/4/balance"'

    async def speak_plainly(peer: Peer) -> None:
        await peer.stream.receive_some()
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with (
        scripted(speak_plainly) as (url, _),
        reading(url.replace("http", "https"), ssl_context=trusting) as source,
    ):
        error = await failure(source)
        assert (error.retryable, "cannot be reached: no TLS" in str(error)) == (True, True)


# --- size, and gzip -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_answer_that_is_too_long(service: Service, chunked: bool) -> None:
    body = b"[" + b"1," * (http_body.BODY_BYTES // 2) + b"1]"
    service.say(body, **({} if chunked else {"content_length": str(len(body))}))
    async with reading(service.url()) as source:
        error = await failure(source)
        assert (error.retryable, "is longer than 8388608 bytes" in str(error)) == (False, True)
        service.say(b"1")
        assert bytes(await source.fetch("4", "balance")) == b"1"


async def test_gzip(service: Service) -> None:
    async with reading(service.url()) as source:
        for packed in (
            gzip.compress(BALANCE),
            gzip.compress(BALANCE[:9]) + gzip.compress(BALANCE[9:]),  # two members
            gzip.compress(b"") * 50 + gzip.compress(BALANCE) + bytes(7),
            gzip.compress(b"\xef\xbb\xbf" + BALANCE),
        ):
            service.say(packed, content_encoding="gzip")
            assert bytes(await source.fetch("4", "balance")) == BALANCE
        assert service.headers[0]["accept-encoding"] == "gzip"
        for body, encoding, says in (
            # Its checksum is wrong: who unpacks it to the end says so instead.
            (gzip.compress(b"1" * 50_000_000)[:-8] + bytes(8), "gzip", "is longer than 8388608"),
            (gzip.compress(b"1" * 5_000_000) * 2, "gzip", "is longer than 8388608"),
            (gzip.compress(b"") * 400_000, "gzip", "cannot be unpacked"),
            (gzip.compress(BALANCE) + gzip.compress(b"")[:-1], "gzip", "cannot be unpacked"),
            (gzip.compress(BALANCE)[:-3], "gzip", "cannot be unpacked"),
            (gzip.compress(BALANCE) + b"x", "gzip", "cannot be unpacked"),
            (BALANCE, "gzip", "cannot be unpacked"),
            (BALANCE, "br", "not by gzip"),
            (gzip.compress(gzip.compress(BALANCE)), "gzip, gzip", "not by gzip"),
        ):
            service.say(body, content_encoding=encoding)
            error = await failure(source)
            assert (error.retryable, says in str(error)) == (False, True), str(error)


# --- the whole ----------------------------------------------------------------------------------


async def test_nothing_is_left_open(service: Service) -> None:
    def descriptors() -> int:
        return psutil.Process().num_fds()

    async def misbehave(peer: Peer) -> None:
        while head := await peer.request():
            match head[5:6]:
                case b"0":
                    await trio.sleep_forever()
                case b"1":
                    await peer.send(b"garbage\r\n\r\n")
                case b"2":
                    peer.reset()
                    return
                case b"3":
                    await peer.send(ok(b"1" * 100)[:-10])
                    await trio.sleep_forever()
                case b"4":
                    await peer.send(ok(b"1", b"X: \xff"))
                case b"5":
                    await peer.send(ok(b"1", b"Connection: close"))
                case _:
                    await peer.send(ok(b"1"))

    async def fetch(source: HttpSource, user: str) -> None:
        try:
            await source.fetch(user, "balance")
        except SourceError:
            failed.add(user)

    before = descriptors()
    failed: set[str] = set()
    async with scripted(misbehave) as (url, _):
        async with (
            reading(url, timeout_s=0.3, connections=4) as source,
            trio.open_nursery() as nursery,
        ):
            for user in range(24):
                nursery.start_soon(fetch, source, str(user % 8))
        # What asks cannot read, httpx can: a header that is not UTF-8.
        assert failed == set("0123" if HTTP_CLIENT == "httpx" else "01234")
    with trio.fail_after(10):
        while descriptors() > before:
            await trio.sleep(0.01)


def test_the_readme_configuration_is_served_as_printed(tmp_path: Path) -> None:
    # As printed, but for where the service is.
    async def serve_accounts(*, task_status: Any) -> None:
        accounts = Service()
        accounts.answer = lambda path: (200, b'{"data": {"4": ' + BALANCE + b"}}", {})
        async with hypercorn_serving(accounts) as port:
            task_status.started((accounts, port))
            await trio.sleep_forever()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            accounts, port = await nursery.start(serve_accounts)
            file = tmp_path / "trading-push.toml"
            printed = block("http")
            assert printed.count("https://accounts.example.com") == 2
            here = f"http://127.0.0.1:{port}"
            file.write_text(printed.replace("https://accounts.example.com", here))
            await trio.to_thread.run_sync(talk, file)
            sent = accounts.headers[0]
            assert sent["authorization"] == f"Bearer {TOKEN}"
            assert sent["x-api-version"] == "2"
            nursery.cancel_scope.cancel()

    def talk(file: Path) -> None:
        environment = {"TRADING_PUSH_HTTP_TOKEN": TOKEN, "TRADING_PUSH_HTTP_CLIENT": HTTP_CLIENT}
        with serving(tmp_path, "--config", str(file), env=environment) as server:
            asyncio.run(subscribe(server.url))
            assert server.stop() == 0
            assert TOKEN not in "".join(server.err + server.out)
            assert server.traces() == []

    async def subscribe(url: str) -> None:
        async with client(url, 4) as each:
            await each.subscribe("balance")
            push = await each.until(lambda message: message.get("channel") == "balance")
            assert push["data"] == json.loads(BALANCE)

    trio.run(run)


OPTIONS: Sequence[dict[str, Any]] = (
    {"token": "two words"},
    {"token": "line\r\nX: y"},
    {"token": ""},
    {"headers": {"X": "a\r\nY: b"}},
    {"headers": {"X: y\r\nZ": "b"}},
    {"headers": {"X": "ü"}},
    {"headers": {"Host": "elsewhere"}},
    {"headers": {"content-length": "5"}},
    {"pointer": "data"},
    {"pointer": "/a~2"},
    {"timeout_s": 0},
    {"connections": 0},
)


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_options_that_cannot_be_used(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        HttpSource("http://host/{user_id}/{data_type}", **options)
    assert "two words" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:pa55@host/{user_id}/{data_type}",
        "http://{user_id}.host/{user_id}/{data_type}",
        "http://host{user_id}/{data_type}",
        "http://host/{user_id}",
        "http://host/{user_id}/{data_typ}",
        "http://host/{user_id}/{data_type}/{user_ids}",
        "http://host/{user_id}/{data_type}#x",
        "http://host/../{user_id}/{data_type}",
        "http://host/%2E%2e/{user_id}/{data_type}",
        "http://host/%zz/{user_id}/{data_type}",
        "http://host:0/{user_id}/{data_type}",
        "http://host:65536/{user_id}/{data_type}",
        "http://host/ /{user_id}/{data_type}",
        "http://höst/{user_id}/{data_type}",
        "http:///{user_id}/{data_type}",
        "ftp://host/{user_id}/{data_type}",
        "",
    ],
)
def test_urls_that_cannot_be_used(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        HttpSource(url)
    assert "pa55" not in str(caught.value)
