"""The table of behaviours, a row a test, for every Python client and a scripted server."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from functools import partial
from typing import Any

import pytest
import trio
import trustme

from harness.python_clients import CLIENTS, opened
from harness.scripted_server import Peer, server

from trading_push.client import connection, core, ending, websockets_link
from trading_push.client.ending import Refused, Unreachable
from trading_push.client.mailbox import ORDERED_PUSHES
from trading_push.errors import AuthenticationError, ConfigurationError

pytestmark = pytest.mark.parametrize("kind", CLIENTS)
BALANCE = {"channels": ["balance"]}


@pytest.fixture(autouse=True)
def _quick_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "BACKOFF_FIRST_S", 0.01)


async def cut(peer: Peer) -> None:
    await trio.aclose_forcefully(peer.websocket._stream)


def giving(*answers: Any) -> Any:
    """A function that gives tokens, or raises them, one after another."""
    left = iter(answers)

    def next_token() -> str:
        answer = next(left)
        if isinstance(answer, BaseException):
            raise answer
        return str(answer)

    return next_token


# --- how a connection ends ------------------------------------------------------------------------


@pytest.mark.parametrize("code", [1002, 1003, 1007, 1009, 4500, 4501, 4503, 4505, 4999])
async def test_closes_that_end_it(kind: str, code: int) -> None:
    async def script(peer: Peer, number: int) -> None:
        assert number == 0
        await peer.open()
        await peer.websocket.aclose(code, "bye")

    async with server(script) as url, opened(kind, url, "t", **BALANCE) as client:
        with pytest.raises(AuthenticationError if code == 4500 else Refused, match="bye") as caught:
            await client.next()
        assert not client.client.is_connected
    assert code == 4500 or getattr(caught.value, "code", None) == code


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 1013, 3000, 4001, 4002, 4003, 4499])
async def test_closes_that_it_comes_back_after(kind: str, code: int) -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(number + 1)
        if number == 0:
            await peer.websocket.aclose(code)
        else:
            await peer.until_closed()

    async with server(script) as url, opened(kind, url, "t", **BALANCE) as client:
        assert [push.seq for push in await client.take(2)] == [1, 2]


def frame(opcode: int, payload: bytes) -> bytes:
    head = bytes([0x80 | opcode])
    if len(payload) < 126:
        return head + bytes([len(payload)]) + payload
    return head + b"\x7e" + len(payload).to_bytes(2, "big") + payload


NOT_THE_SERVERS_WORD = {
    "a proxy's 1014": frame(8, (1014).to_bytes(2, "big")),
    "1015": frame(8, (1015).to_bytes(2, "big")),
    "half a code": frame(8, b"\x03"),
    "a reserved bit": b"\xc1\x00",
    "a masked frame": b"\x81\x80\x00\x00\x00\x00",
    "HTTP": b"HTTP/1.1 504 Gateway Time-out\r\nContent-Length: 99\r\n\r\n" + 99 * b"x",
    "bad UTF-8": frame(1, b"\xff"),
    "a message that is too long": frame(1, b'"' + b"x" * 60_000 + b'"'),
    "a binary message": frame(2, b"{}"),
    "nonsense": frame(1, b"nonsense"),
}


@pytest.mark.parametrize("what", NOT_THE_SERVERS_WORD)
async def test_what_our_own_library_makes_of_it_is_weather(
    monkeypatch: pytest.MonkeyPatch, kind: str, what: str
) -> None:
    monkeypatch.setattr(connection, "MESSAGE_BYTES", 50_000)
    monkeypatch.setattr(websockets_link, "MESSAGE_BYTES", 50_000)

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(number)
        if number == 0:
            await peer.send_bytes(NOT_THE_SERVERS_WORD[what])
        await peer.until_closed()

    async with server(script) as url, opened(kind, url, "t", **BALANCE) as client:
        assert [push.seq for push in await client.take(2)] == [0, 1]


async def test_a_lasting_connection_lets_the_back_off_begin_anew(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(ending, "back_off", lambda n: waited.append(n) or 0.0)

    async def script(peer: Peer, number: int) -> None:
        if number == 3:
            monkeypatch.setattr(ending, "LASTING_S", 0)
        await peer.open()
        await peer.push(number)
        if number < 3:
            await peer.websocket.aclose(1011)
        elif number == 3:
            await cut(peer)
        else:
            await peer.until_closed()

    async with server(script) as url, opened(kind, url, "t", **BALANCE) as client:
        await client.take(5)
    assert waited == [1, 2, 3, 1]


# --- the handshake --------------------------------------------------------------------------------

FINAL_AT_FIRST = [200, 301, 302, 307, 400, 401, 403, 404, 421]
TRIED_AGAIN = [405, 408, 425, 429, 460, 500, 502, 503, 504]


@pytest.mark.parametrize("status", [*FINAL_AT_FIRST, *TRIED_AGAIN])
async def test_a_handshake_refused_before_the_first_success(kind: str, status: int) -> None:
    handshakes: list[int] = []

    async def script(peer: Peer, number: int) -> None:
        raise AssertionError

    def reject(number: int) -> int:
        handshakes.append(number)
        return status

    expected: type[Exception] = Refused
    if status in TRIED_AGAIN:
        expected = Unreachable
    elif status in (401, 403):
        expected = AuthenticationError
    async with server(script, reject=reject) as url:
        with pytest.raises(expected, match=str(status)):
            async with opened(kind, url, "t", attempts=2):
                pytest.fail("it must not get in")
    assert len(handshakes) == (2 if status in TRIED_AGAIN else 1)


async def test_a_redirect_is_not_followed(kind: str) -> None:
    """The token would go where the application has not sent it."""
    asked = []

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            asked.append(await stream.receive_some())
            await stream.send_all(
                b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"
            )

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        with pytest.raises(Refused, match="HTTP 302"):
            async with opened(kind, f"ws://127.0.0.1:{port}/", "t"):
                pytest.fail("it must not get in")
        nursery.cancel_scope.cancel()
    assert len(asked) == 1


async def test_after_the_first_success_every_status_is_weather(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(ending, "back_off", lambda failures: 0.0)
    statuses = [*FINAL_AT_FIRST, *TRIED_AGAIN]

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(number)
        if number:
            await peer.until_closed()
        else:
            await cut(peer)

    def reject(number: int) -> int | None:
        return statuses[number - 1] if 0 < number <= len(statuses) else None

    async with (
        server(script, reject=reject) as url,
        opened(kind, url, "t", **BALANCE) as client,
    ):
        assert [push.seq for push in await client.take(2)] == [0, len(statuses) + 1]


async def test_nobody_there_is_unreachable(kind: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        with pytest.raises(Unreachable, match=r"cannot reach ws://127\.0\.0\.1"):
            async with opened(kind, f"ws://127.0.0.1:{taken.getsockname()[1]}/ws", "t"):
                pytest.fail("it must not get in")


async def test_what_hangs_up_in_the_handshake_is_no_server(kind: str) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"SSH-2.0-hello\r\n")

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        with pytest.raises(Unreachable):
            url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}/"
            async with opened(kind, url, "t", attempts=2):
                pytest.fail("it must not get in")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("url", ["", "http://127.0.0.1/", "ws://", "ws://x:99999/", "ws://[::1/"])
async def test_a_url_that_is_none(kind: str, url: str) -> None:
    with pytest.raises(ConfigurationError, match="no WebSocket URL"):
        async with opened(kind, url, "t"):
            pytest.fail("it must not get in")


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_tls(kind: str, is_trusted: bool, monkeypatch: Any, tmp_path: Any) -> None:
    trusted, other = trustme.CA(), trustme.CA()
    trusted.cert_pem.write_to_path(tmp_path / "trusted.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "trusted.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (trusted if is_trusted else other).issue_cert("localhost").configure_cert(context)

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        await peer.until_closed()

    async with server(script, tls=context) as url:
        url = url.replace("127.0.0.1", "localhost")
        if is_trusted:
            async with opened(kind, url, "t", **BALANCE) as client:
                assert (await client.next()).seq == 1
        else:
            with pytest.raises(Unreachable, match="certificate verify failed"):
                async with opened(kind, url, "t", attempts=2):
                    pytest.fail("it must not get in")


# --- tokens ---------------------------------------------------------------------------------------


async def test_an_expired_token_is_replaced_where_one_can_be_had(kind: str) -> None:
    seen = []

    async def script(peer: Peer, number: int) -> None:
        if number == 0:
            seen.append(await peer.refuse("token_expired", message="late"))
            await peer.websocket.aclose(4003)
        else:
            seen.append(await peer.authenticate())
            await peer.until_closed()

    async with server(script) as url, opened(kind, url, giving("old", "new")):
        assert seen == ["old", "new"]


@pytest.mark.parametrize("token", ["old", giving(*["old"] * 9)], ids=["string", "function"])
async def test_the_same_expired_token_again_ends_it(kind: str, token: Any) -> None:
    token = token if isinstance(token, str) else giving(*["old"] * 2)

    async def script(peer: Peer, number: int) -> None:
        assert number == 0
        await peer.refuse("token_expired", message="late")
        await peer.until_closed()

    async with server(script) as url:
        with pytest.raises(AuthenticationError) as caught:
            async with opened(kind, url, token):
                pytest.fail("it must not get in")
    assert caught.value.expired


async def test_a_token_that_is_not_valid_yet_is_tried_again(kind: str) -> None:
    seen: list[str] = []

    async def script(peer: Peer, number: int) -> None:
        if number < 2:
            seen.append(await peer.refuse("bad_token", retryable=True))
            await peer.websocket.aclose(4003, "not valid yet")
        else:
            seen.append(await peer.authenticate())
            await peer.until_closed()

    async with server(script) as url, opened(kind, url, "early"):
        assert seen == ["early"] * 3


async def test_a_function_that_raises_costs_one_try(kind: str) -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(number)
        if number:
            await peer.until_closed()
        else:
            await cut(peer)

    token = giving(LookupError("a"), OSError("b"), "t", LookupError("c"), TimeoutError(), "t")
    async with server(script) as url, opened(kind, url, token, **BALANCE) as client:
        assert [push.seq for push in await client.take(2)] == [0, 1]


async def test_a_function_that_never_gives_a_token_is_told(kind: str) -> None:
    with pytest.raises(Unreachable, match="gives the token failed: LookupError: no account"):
        async with opened(kind, "ws://127.0.0.1:1/", giving(*[LookupError("no account")] * 3)):
            pytest.fail("it must not get in")


@pytest.mark.parametrize("is_renewal", [True, False])
@pytest.mark.parametrize("error", [Refused("signed out"), AuthenticationError("signed out")])
async def test_a_function_that_refuses_ends_it(
    kind: str, error: Exception, is_renewal: bool
) -> None:
    async def script(peer: Peer, number: int) -> None:
        assert number == 0
        await peer.open()
        if is_renewal:
            await peer.send(op="notice", code="token_expires", expires_in=29)
            await peer.until_closed()
        else:
            await cut(peer)

    token = giving("t", error)
    async with server(script) as url, opened(kind, url, token, **BALANCE) as client:
        with pytest.raises(type(error), match="signed out"):
            await client.next()


async def test_a_token_is_renewed_on_the_living_connection(kind: str) -> None:
    seen: list[str] = []

    async def script(peer: Peer, number: int) -> None:
        assert number == 0
        await peer.open()
        await peer.push(1)
        await peer.send(op="notice", code="token_expires", expires_in=29)
        # Not yet: the same again. Refused for good: the session is as it was.
        seen.append(await peer.refuse("bad_token", retryable=True))
        seen.append(await peer.refuse("bad_token"))
        await peer.push(2, 1)
        await peer.send(op="notice", code="token_expires", expires_in=9)
        seen.append(await peer.authenticate())
        await peer.push(3, 2)
        await peer.until_closed()

    token = giving("a", LookupError("none now"), "b", "c", LookupError("none now"), "d")
    async with server(script) as url, opened(kind, url, token, **BALANCE) as client:
        assert [push.seq for push in await client.take(3)] == [1, 2, 3]
        assert client.client.is_connected
    assert seen == ["b", "c", "d"]


async def test_a_function_that_takes_its_time_holds_no_push_up(kind: str) -> None:
    asked, released = threading.Event(), threading.Event()
    answers = iter(["a"])

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.send(op="notice", code="token_expires", expires_in=29)
        await trio.to_thread.run_sync(asked.wait, 10)
        await peer.push(1)
        await peer.until_closed()

    def next_token() -> Any:
        for answer in answers:
            return answer
        asked.set()
        if kind == "sync":
            released.wait(10)
            return "b"
        return forever()

    async def forever() -> str:
        if kind == "trio":
            await trio.sleep_forever()
        await asyncio.Event().wait()
        raise AssertionError

    async with server(script) as url, opened(kind, url, next_token, **BALANCE) as client:
        assert (await client.next()).seq == 1
        released.set()


# --- notices, gaps, silence -----------------------------------------------------------------------


async def test_a_notice_says_when_to_come_back(kind: str) -> None:
    times: list[float] = []

    async def script(peer: Peer, number: int) -> None:
        times.append(trio.current_time())
        await peer.open()
        if number == 0:
            await peer.send(op="notice", code="shutdown", reconnect_after_ms=400)
            times.append(trio.current_time())
            await peer.websocket.aclose(1012)
        else:
            await peer.push(1)
            await peer.until_closed()

    async with server(script) as url, opened(kind, url, "t", **BALANCE) as client:
        await client.next()
    assert times[2] - times[1] >= 0.4


async def test_after_a_cut_it_resubscribes_where_it_left_off(kind: str) -> None:
    items: list[Any] = []

    async def script(peer: Peer, number: int) -> None:
        items.append(await peer.open())
        if number == 0:
            await peer.push(3, epoch="e1")
            await peer.push(4, 3, epoch="e1")
            await cut(peer)
        else:
            await peer.push(6, 4, epoch="e1")
            await peer.until_closed()

    async with server(script) as url, opened(kind, url, "t", channels=["balance", "pnl"]) as client:
        assert [push.seq for push in await client.take(3)] == [3, 4, 6]
    since = {"channel": "balance", "since": {"epoch": "e1", "seq": 4}}
    assert items == [["balance", "pnl"], [since, "pnl"]]


async def test_a_gap_is_told_and_closed(kind: str) -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        await peer.push(5, 4)  # 2 to 4 are lost
        await peer.push(6, 5)  # and this one belongs to the stream that is given up
        assert (await peer.receive("unsubscribe"))["args"] == ["balance"]
        since = {"channel": "balance", "since": {"epoch": "e", "seq": 1}}
        assert await peer.subscribe() == [since]
        await peer.push(6, 4)  # that has not helped
        await peer.receive("unsubscribe")
        assert await peer.subscribe() == ["balance"]
        await peer.push(6)
        await peer.push(7, 6)
        await peer.until_closed()

    async with server(script) as url, opened(kind, url, "t", **BALANCE) as client:
        pushes = await client.take(3)
    assert [(push.seq, push.gap) for push in pushes] == [(1, False), (6, True), (7, False)]


async def test_a_silent_server_is_pinged_and_left(kind: str) -> None:
    pinged = False

    async def script(peer: Peer, number: int) -> None:
        nonlocal pinged
        await peer.authenticate(heartbeat_s=0.15)
        await peer.subscribe()
        await peer.push(number + 1)
        if number == 0:
            await peer.receive("ping")
            pinged = True
        await peer.until_closed()

    async with server(script) as url, opened(kind, url, "t", **BALANCE) as client:
        assert [push.seq for push in await client.take(2)] == [1, 2]
        assert pinged


async def test_a_ping_frame_of_the_server_is_no_silence(kind: str) -> None:
    async def script(peer: Peer, number: int) -> None:
        assert number == 0
        await peer.authenticate(heartbeat_s=0.4)
        await peer.subscribe()
        for _ in range(12):
            await peer.websocket.ping()
            await trio.sleep(0.1)
        await peer.push(1)
        await peer.until_closed()

    async with server(script) as url, opened(kind, url, "t", **BALANCE) as client:
        assert (await client.next()).seq == 1


async def test_a_server_that_owes_a_reply_is_left(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(core, "REPLY_TIMEOUT_S", 0.2)

    async def script(peer: Peer, number: int) -> None:
        if number:
            await peer.authenticate()
        await peer.until_closed()

    async with server(script) as url, opened(kind, url, "t") as client:
        assert client.client.user == "4"


# --- an application that is slow ------------------------------------------------------------------


async def until_taken(peer: Peer) -> None:
    """Wait until the client has taken in what it was sent: a gap in `pnl` makes it answer."""
    await peer.push(5, 4, channel="pnl")
    assert (await peer.receive("unsubscribe"))["args"] == ["pnl"]
    await peer.subscribe()


async def test_who_is_slow_gets_the_latest_value_and_stays_connected(kind: str) -> None:
    is_flooded = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        for seq in range(2, 3001):
            await peer.push(seq, seq - 1)
        await until_taken(peer)
        is_flooded.set()
        await peer.until_closed()

    async with server(script) as url, opened(kind, url, "t", channels=["balance", "pnl"]) as client:
        await is_flooded.wait()
        assert (await client.next()).seq == 3000


async def test_events_keep_their_order_up_to_a_bound(kind: str) -> None:
    full, taken, over_full = trio.Event(), trio.Event(), trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1, channel="fills")
        for seq in range(2, ORDERED_PUSHES + 1):
            await peer.push(seq, seq - 1, channel="fills")
        await until_taken(peer)
        full.set()
        await taken.wait()
        for seq in range(ORDERED_PUSHES + 1, 2 * ORDERED_PUSHES + 2):
            await peer.push(seq, seq - 1, channel="fills")
        assert (await peer.receive("unsubscribe"))["args"] == ["fills"]
        since = {"channel": "fills", "since": {"epoch": "e", "seq": ORDERED_PUSHES}}
        assert await peer.subscribe() == [since]
        await peer.push(9000, channel="fills")
        await peer.push(9001, 9000, channel="fills")
        over_full.set()
        await peer.until_closed()

    async with server(script) as url, opened(kind, url, "t", channels=["fills", "pnl"]) as client:
        await full.wait()
        seqs = [push.seq for push in await client.take(ORDERED_PUSHES)]
        assert seqs == list(range(1, ORDERED_PUSHES + 1))
        taken.set()
        await over_full.wait()
        pushes = await client.take(2)
    assert [(push.seq, push.gap) for push in pushes] == [(9000, True), (9001, False)]


# --- leaving --------------------------------------------------------------------------------------


async def test_leaving_is_polite(kind: str) -> None:
    codes: list[int] = []
    closed = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        codes.append(await peer.until_closed())
        closed.set()

    async with server(script) as url:
        async with opened(kind, url, "t", **BALANCE):
            pass
        await closed.wait()
    assert codes == [1000]


async def test_leaving_does_not_wait_for_the_next_try(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(ending, "back_off", lambda failures: 3600.0)

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await cut(peer)

    async with server(script) as url, opened(kind, url, "t", **BALANCE) as client:
        while client.client.trouble is None:
            await trio.sleep(0.001)


async def test_an_unknown_channel_is_refused(kind: str) -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.authenticate()
        request = await peer.receive("subscribe")
        error = {"code": "unknown_channel", "message": "there is none", "retryable": False}
        results = [{"channel": "nope", "ok": False, "error": error}]
        await peer.send(op="subscribe", id=request["id"], ok=False, results=results)
        await peer.until_closed()

    async with server(script) as url:
        with pytest.raises(Refused, match="nope: there is none"):
            async with opened(kind, url, "t", channels=["nope"]):
                pytest.fail("it must not get in")
