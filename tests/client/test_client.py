"""The trio client against a small real WebSocket server that follows a script."""

from __future__ import annotations

import json
import socket
import ssl
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from harness.scripted_server import Peer, server
from harness.support import SECRET, hypercorn_serving, token, until
from harness.tokens import signed

from trading_push import JwtAuthenticator, Principal, open_push_service
from trading_push.client import Client, connection, ending
from trading_push.client.client import open_client
from trading_push.client.ending import Refused, Unreachable
from trading_push.client.messages import Push
from trading_push.errors import AuthenticationError, ConfigurationError
from trading_push.settings.schema import Auth, Limits, Settings
from trading_push.transport import outbound


@pytest.fixture(autouse=True)
def _quick_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "BACKOFF_FIRST_S", 0.01)


async def take(client: Client, count: int) -> list[Push]:
    return [await anext(client) for _ in range(count)]


async def test_pushes_come_in_order_with_all_they_hold() -> None:
    async def script(peer: Peer, number: int) -> None:
        assert await peer.authenticate() == "the-token"
        assert await peer.subscribe() == ["balance"]
        await peer.push(7)
        await peer.send(
            channel="balance",
            type="update",
            epoch="e",
            prev=7,
            seq=9,
            merged=2,
            ts=5,
            data={"a": "1"},
        )
        await peer.send(channel="balance", type="status", state="stale", reason="why", ts=6)
        await peer.until_closed()

    async with server(script) as url, open_client(url, "the-token", channels=["balance"]) as client:
        assert client.user == "4"
        assert client.is_connected
        snapshot, update, status = await take(client, 3)
    assert (snapshot.type, snapshot.epoch, snapshot.seq, snapshot.data) == ("snapshot", "e", 7, [7])
    assert (update.prev, update.seq, update.merged, update.data) == (7, 9, 2, {"a": "1"})
    assert json.loads(update.json)["data"] == {"a": "1"}
    assert (status.type, status.state, status.reason) == ("status", "stale", "why")


async def test_after_a_cut_it_resubscribes_where_it_left_off() -> None:
    items: list[Any] = []

    async def script(peer: Peer, number: int) -> None:
        items.append(await peer.open())
        if number == 0:
            await peer.push(3, epoch="e1")
            await peer.push(4, 3, epoch="e1")
            await trio.aclose_forcefully(peer.websocket._stream)
        else:
            await peer.push(6, 4, epoch="e1")
            await peer.until_closed()

    async with (
        server(script) as url,
        open_client(url, "t", channels=["balance", "pnl"]) as client,
    ):
        pushes = await take(client, 3)
    assert [push.seq for push in pushes] == [3, 4, 6]
    assert items[0] == ["balance", "pnl"]
    assert items[1] == [{"channel": "balance", "since": {"epoch": "e1", "seq": 4}}, "pnl"]


async def test_a_channel_goes_by_the_servers_spelling() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.authenticate()
        await peer.subscribe(str.upper)
        await peer.push(1, channel="X")
        await peer.until_closed()

    async with server(script) as url, open_client(url, "t", channels=["x"]) as client:
        assert (await anext(client)).channel == "X"


@pytest.mark.parametrize("code", ["bad_token", "token_expired", "forbidden"])
async def test_a_refused_token_ends_it_at_the_first_try(code: str) -> None:
    connections = 0

    async def script(peer: Peer, number: int) -> None:
        nonlocal connections
        connections += 1
        request = await peer.receive("auth")
        error = {"code": code, "message": "no way", "retryable": False}
        await peer.send(op="auth", id=request["id"], ok=False, error=error)
        await peer.websocket.aclose(4500)

    expected = Refused if code == "forbidden" else AuthenticationError
    async with server(script) as url:
        with pytest.raises(expected, match="no way") as caught:
            async with open_client(url, "t", channels=["balance"]):
                pytest.fail("it must not get in")
    assert getattr(caught.value, "expired", False) == (code == "token_expired")
    assert connections == 1


async def test_an_expired_token_is_replaced_where_one_can_be_had() -> None:
    tokens = ["old", "new"]
    seen = []

    async def script(peer: Peer, number: int) -> None:
        if number == 0:
            request = await peer.receive("auth")
            seen.append(request["token"])
            error = {"code": "token_expired", "message": "late", "retryable": False}
            await peer.send(op="auth", id=request["id"], ok=False, error=error)
            await peer.websocket.aclose(4003)
        else:
            seen.append(await peer.authenticate())
            await peer.until_closed()

    async def next_token() -> str:
        return tokens.pop(0)

    async with server(script) as url, open_client(url, next_token):
        assert seen == ["old", "new"]


async def test_the_same_expired_token_again_is_refused() -> None:
    async def script(peer: Peer, number: int) -> None:
        assert number == 0
        request = await peer.receive("auth")
        error = {"code": "token_expired", "message": "late", "retryable": False}
        await peer.send(op="auth", id=request["id"], ok=False, error=error)
        await peer.until_closed()

    async with server(script) as url:
        with pytest.raises(AuthenticationError) as caught:
            async with open_client(url, lambda: "old"):
                pytest.fail("it must not get in")
    assert caught.value.expired


async def test_a_token_that_is_not_valid_yet_is_tried_again() -> None:
    seen: list[str] = []

    async def script(peer: Peer, number: int) -> None:
        if number < 2:
            seen.append(await peer.refuse("bad_token", retryable=True))
            await peer.websocket.aclose(4003, "not valid yet")
        else:
            seen.append(await peer.authenticate())
            await peer.until_closed()

    async with server(script) as url, open_client(url, "early"):
        assert seen == ["early"] * 3


async def test_a_server_whose_clock_is_behind_lets_it_in_at_last() -> None:
    check = JwtAuthenticator(Auth(leeway_s=0), SECRET)
    outcomes: list[str] = []

    async def authenticate(text: str) -> Principal:
        try:
            principal = await check(text)
        except AuthenticationError as error:
            outcomes.append(error.message)
            raise
        outcomes.append("good")
        return principal

    early = signed(SECRET, iat=int(time.time()) + 2)
    async with (
        open_push_service(settings=Settings(), authenticate=authenticate) as service,
        hypercorn_serving(service) as port,
        open_client(f"ws://127.0.0.1:{port}/ws", early, attempts=1000) as client,
    ):
        assert client.user == "4"
    assert set(outcomes[:-1]) == {"the token is not valid yet"}
    assert outcomes[-1] == "good"


async def test_a_token_that_cannot_be_had_costs_one_try() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(number)
        if number:
            await peer.until_closed()
        else:
            await trio.aclose_forcefully(peer.websocket._stream)

    answers: list[Any] = [LookupError("a"), OSError("b"), "t", LookupError("c"), ValueError(), "t"]

    async def next_token() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    async with server(script) as url, open_client(url, next_token, channels=["balance"]) as client:
        assert [push.seq for push in await take(client, 2)] == [0, 1]
    assert not answers


async def test_a_token_that_can_never_be_had_is_said_after_the_first_tries() -> None:
    def next_token() -> str:
        raise LookupError("no account")

    with pytest.raises(Unreachable, match="gives the token failed: LookupError: no account"):
        async with open_client("ws://127.0.0.1:1/", next_token):
            pytest.fail("it must not get in")


@pytest.mark.parametrize("error", [Refused("signed out"), AuthenticationError("signed out")])
async def test_a_function_that_refuses_a_token_ends_it(error: Exception) -> None:
    async def script(peer: Peer, number: int) -> None:
        assert number == 0
        await peer.open()
        await trio.aclose_forcefully(peer.websocket._stream)

    answers: list[Any] = ["t", error]

    def next_token() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    async with server(script) as url, open_client(url, next_token, channels=["balance"]) as client:
        with pytest.raises(type(error), match="signed out"):
            await anext(client)


async def test_a_token_is_renewed_on_the_living_connection() -> None:
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

    answers: list[Any] = ["a", LookupError("none now"), "b", "c", LookupError("none now"), "d"]

    async def next_token() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    async with server(script) as url, open_client(url, next_token, channels=["balance"]) as client:
        assert [push.seq for push in await take(client, 3)] == [1, 2, 3]
        assert client.is_connected
    assert seen == ["b", "c", "d"]


async def test_a_function_that_takes_its_time_holds_no_push_up() -> None:
    asked = trio.Event()
    answers = iter(["a"])

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.send(op="notice", code="token_expires", expires_in=29)
        await asked.wait()
        await peer.push(1)
        await peer.until_closed()

    async def next_token() -> str:
        for answer in answers:
            return answer
        asked.set()
        await trio.sleep_forever()
        raise AssertionError

    async with server(script) as url, open_client(url, next_token, channels=["balance"]) as client:
        assert (await anext(client)).seq == 1


async def test_a_function_that_refuses_a_renewal_ends_it() -> None:
    async def script(peer: Peer, number: int) -> None:
        assert number == 0
        await peer.open()
        await peer.send(op="notice", code="token_expires", expires_in=29)
        await peer.until_closed()

    answers = iter(["a"])

    def next_token() -> str:
        for answer in answers:
            return answer
        raise Refused("signed out")

    async with server(script) as url, open_client(url, next_token, channels=["balance"]) as client:
        with pytest.raises(Refused, match="signed out"):
            await anext(client)


async def test_one_connection_outlives_its_tokens() -> None:
    limits = Limits(expiry_notice_s=2)
    given: list[str] = []

    def next_token() -> str:
        given.append(token(ttl_s=3))
        return given[-1]

    async with (
        open_push_service(
            settings=Settings(limits=limits, auth=Auth(leeway_s=0)),
            authenticate=JwtAuthenticator(Auth(leeway_s=0), SECRET),
        ) as service,
        hypercorn_serving(service) as port,
        open_client(f"ws://127.0.0.1:{port}/ws", next_token) as client,
    ):
        [connection] = service.context.connections
        until_s = time.time() + 5
        await until(lambda: time.time() > until_s)  # two tokens have expired by then
        assert list(service.context.connections) == [connection]
        assert client.is_connected
    assert 3 <= len(given) <= 20  # and nobody was pestered


async def test_the_back_off_begins_anew_after_a_connection_that_lasted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("LASTING_S", "BACKOFF_MOST_S"):
        monkeypatch.setattr(ending, name, 0.5)
    waited: list[int] = []
    back_off = ending.back_off

    def counted(failures: int) -> float:
        waited.append(failures)
        return back_off(failures) / 10

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(number)
        if number == 3:
            await trio.sleep(0.6)  # of use for so long
        if number < 5:
            await peer.websocket.aclose(1011)
        else:
            await peer.until_closed()

    async def next_token() -> str:
        if len(waited) < 3:
            await trio.sleep(0.6)  # which makes no connection a lasting one
        return "t"

    monkeypatch.setattr(ending, "back_off", counted)
    async with server(script) as url, open_client(url, next_token, channels=["balance"]) as client:
        await take(client, 6)
        assert waited == [1, 2, 3, 1, 2]


FINAL_AT_FIRST = [200, 301, 302, 307, 400, 401, 403, 404, 421]
TRIED_AGAIN = [405, 408, 425, 426, 429, 460, 500, 502, 503, 504]


@pytest.mark.parametrize("status", [*FINAL_AT_FIRST, *TRIED_AGAIN])
async def test_a_handshake_refused_before_the_first_success(status: int) -> None:
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
            async with open_client(url, "t", attempts=4):
                pytest.fail("it must not get in")
    assert len(handshakes) == (4 if status in TRIED_AGAIN else 1)


@pytest.mark.parametrize("status", [*FINAL_AT_FIRST, *TRIED_AGAIN])
async def test_a_handshake_refused_after_the_first_success_is_weather(status: int) -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(number)
        if number:
            await peer.until_closed()
        else:
            await trio.aclose_forcefully(peer.websocket._stream)

    def reject(number: int) -> int | None:
        return status if 0 < number < 5 else None  # more often than `attempts`

    async with (
        server(script, reject=reject) as url,
        open_client(url, "t", channels=["balance"]) as client,
    ):
        assert [push.seq for push in await take(client, 2)] == [0, 5]


def made_by(*contexts: ssl.SSLContext) -> ssl.SSLContext:
    """A context that takes another one for each handshake, and stays with the last."""
    left = list(contexts)

    def choose(each: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
        each.context = left.pop(0) if len(left) > 1 else left[0]

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = choose
    return context


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts of servers: one whose certificate is trusted here, and one whose is not."""
    contexts = []
    for name in ("trusted", "other"):
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        authority.cert_pem.write_to_path(tmp_path / f"{name}.pem")
        contexts.append(context)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "trusted.pem"))
    return contexts[0], contexts[1]


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_certificate_that_is_not_to_be_trusted(tls: Any, is_first: bool) -> None:
    trusted, other = tls
    contexts = [other] if is_first else [trusted, other, other, other, other, trusted]

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(number)
        if number:
            await peer.until_closed()
        else:
            await trio.aclose_forcefully(peer.websocket._stream)

    async with server(script, tls=made_by(*contexts)) as url:
        url = url.replace("127.0.0.1", "localhost")
        if is_first:
            with pytest.raises(Unreachable, match="certificate verify failed"):
                async with open_client(url, "t"):
                    pytest.fail("it must not get in")
            return
        async with open_client(url, "t", channels=["balance"]) as client:
            assert [push.seq for push in await take(client, 2)] == [0, 1]


async def test_nobody_there_is_unreachable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        url = f"ws://127.0.0.1:{taken.getsockname()[1]}/ws"
        with pytest.raises(Unreachable, match="cannot reach"):
            async with open_client(url, "t"):
                pytest.fail("it must not get in")


BAD_ACCEPT = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: nope\r\n\r\n"
)


@pytest.mark.parametrize(
    ("answer", "hangs_up"),
    [
        (b"", True),
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"SSH-2.0-hello\r\n", True),
        (b"SSH-2.0-hello\r\n\r\n", False),
        (BAD_ACCEPT, False),
    ],
)
async def test_what_is_no_websocket_server_fails_at_once(answer: bytes, hangs_up: bool) -> None:
    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            with suppress(trio.BrokenResourceError):
                await stream.send_all(answer)
            if not hangs_up:
                await trio.sleep_forever()

    started_at = trio.current_time()
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        with pytest.raises((Unreachable, Refused)):
            async with open_client(f"ws://127.0.0.1:{port}/", "t"):
                pytest.fail("it must not get in")
        nursery.cancel_scope.cancel()
    assert trio.current_time() - started_at < connection.CONNECT_TIMEOUT_S


@pytest.mark.parametrize(
    "url", ["", "http://127.0.0.1/", "ws://", "ws://x:99999/", "ws://[::1/", "ws://h/\r\nX: y"]
)
async def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigurationError, match="no WebSocket URL"):
        async with open_client(url, "t"):
            pytest.fail("it must not get in")


async def test_an_unknown_channel_is_refused() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.authenticate()
        request = await peer.receive("subscribe")
        error = {"code": "unknown_channel", "message": "there is none", "retryable": False}
        results = [{"channel": "nope", "ok": False, "error": error}]
        await peer.send(op="subscribe", id=request["id"], ok=False, results=results)
        await peer.until_closed()

    async with server(script) as url:
        with pytest.raises(Refused, match="nope: there is none"):
            async with open_client(url, "t", channels=["nope"]):
                pytest.fail("it must not get in")


async def test_a_notice_says_when_to_come_back() -> None:
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

    async with server(script) as url, open_client(url, "t", channels=["balance"]) as client:
        await anext(client)
    assert times[2] - times[1] >= 0.4


async def test_a_gap_is_resubscribed_and_not_passed_on() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        await peer.push(5, 4)  # 2 to 4 are lost
        await peer.push(6, 5)  # and this one belongs to the stream that is given up
        assert (await peer.receive("unsubscribe"))["args"] == ["balance"]
        since = {"channel": "balance", "since": {"epoch": "e", "seq": 1}}
        assert await peer.subscribe() == [since]
        await peer.push(2, 1)
        await peer.push(2, 1)  # twice
        await peer.push(6, 2)
        await peer.until_closed()

    async with server(script) as url, open_client(url, "t", channels=["balance"]) as client:
        assert [push.seq for push in await take(client, 3)] == [1, 2, 6]


@pytest.mark.parametrize("epoch", ["e", "other"])
async def test_only_a_snapshot_helps_after_a_second_gap_or_a_new_epoch(epoch: str) -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        if epoch == "e":
            await peer.push(5, 4)
            await peer.receive("unsubscribe")
            assert isinstance((await peer.subscribe())[0], dict)
        await peer.push(5, 4, epoch=epoch)
        await peer.receive("unsubscribe")
        assert await peer.subscribe() == ["balance"]
        await peer.push(5, epoch=epoch)
        await peer.until_closed()

    async with server(script) as url, open_client(url, "t", channels=["balance"]) as client:
        pushes = await take(client, 2)
    assert [(push.type, push.seq) for push in pushes] == [("snapshot", 1), ("snapshot", 5)]


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012, 4001, 4002, 4003, 4499])
async def test_closes_that_it_comes_back_after(code: int) -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(number + 1)
        if number == 0:
            await peer.websocket.aclose(code)
        else:
            await peer.until_closed()

    async with server(script) as url, open_client(url, "t", channels=["balance"]) as client:
        assert [push.seq for push in await take(client, 2)] == [1, 2]


def frame(opcode: int, payload: bytes) -> bytes:
    assert len(payload) < 65536
    head = bytes([0x80 | opcode])
    if len(payload) < 126:
        return head + bytes([len(payload)]) + payload
    return head + b"\x7e" + len(payload).to_bytes(2, "big") + payload


def close_frame(code: int) -> bytes:
    return frame(8, code.to_bytes(2, "big"))


MADE_UP = {
    "a proxy's 1014 is no code to wsproto": close_frame(1014),
    "nor is 1015": close_frame(1015),
    "nor is 5000": close_frame(5000),
    "half a code": frame(8, b"\x03"),
    "a close reason that is no UTF-8": frame(8, b"\x03\xe8\xff"),
    "a reserved bit": b"\xc1\x00",
    "a masked frame": b"\x81\x80\x00\x00\x00\x00",
    "HTTP": b"HTTP/1.1 504 Gateway Time-out\r\nContent-Length: 0\r\n\r\n",
    "bad UTF-8": frame(1, b"\xff"),
    "a message that is too long": frame(1, b'"' + b"x" * 60_000 + b'"'),
    "a binary message": frame(2, b"{}"),
}


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("what", MADE_UP)
async def test_what_our_own_library_makes_of_it_is_not_the_servers_word(
    monkeypatch: pytest.MonkeyPatch, what: str, is_first: bool
) -> None:
    monkeypatch.setattr(connection, "MESSAGE_BYTES", 50_000)

    async def script(peer: Peer, number: int) -> None:
        if number or not is_first:
            await peer.open()
            await peer.push(number)
        if number:
            await peer.until_closed()
        else:
            await peer.send_bytes(MADE_UP[what])
            await peer.until_closed()

    async with server(script) as url, open_client(url, "t", channels=["balance"]) as client:
        assert (await anext(client)).seq == is_first
        if not is_first:
            assert (await anext(client)).seq == 1


@pytest.mark.parametrize("code", [1002, 1003, 1007, 1009, 4500, 4501, 4503, 4505, 4999])
async def test_closes_that_end_it(code: int) -> None:
    async def script(peer: Peer, number: int) -> None:
        assert number == 0
        await peer.open()
        await peer.websocket.aclose(code, "bye")

    async with server(script) as url, open_client(url, "t", channels=["balance"]) as client:
        with pytest.raises(AuthenticationError if code == 4500 else Refused, match="bye") as caught:
            await anext(client)
    assert code == 4500 or getattr(caught.value, "code", None) == code


async def test_a_silent_server_is_left_for_a_new_connection() -> None:
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

    async with server(script) as url, open_client(url, "t", channels=["balance"]) as client:
        assert [push.seq for push in await take(client, 2)] == [1, 2]
        assert pinged


@pytest.mark.parametrize(
    "message", ["", "nonsense", "[" * 100_000, '{"op":5}', '{"seq":"x"}', '{"channel":"\\ud800"}']
)
async def test_nonsense_from_the_server_costs_one_connection(message: str) -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        if number == 0:
            await peer.websocket.send_message(message)
        await peer.push(number)
        await peer.until_closed()

    async with server(script) as url, open_client(url, "t", channels=["balance"]) as client:
        assert (await anext(client)).seq == 1


async def test_leaving_is_polite_and_lets_the_bodys_own_exception_through() -> None:
    codes: list[int] = []
    closed = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        codes.append(await peer.until_closed())
        closed.set()

    async with server(script) as url:
        with pytest.raises(LookupError, match="mine"):
            async with open_client(url, "t", channels=["balance"]):
                raise LookupError("mine")
        await closed.wait()
    assert codes == [1000]


async def test_leaving_does_not_wait_for_a_server_that_does_not_answer() -> None:
    is_stuck = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        await peer.push(5, 4)  # a gap makes the client say more than is read here
        while not peer.websocket._send_channel.statistics().tasks_waiting_send:
            await trio.sleep(0.01)
        is_stuck.set()
        await trio.sleep_forever()

    async with server(script) as url:
        async with open_client(url, "t", channels=["balance"]):
            await is_stuck.wait()
            started_at = trio.current_time()
        seconds = trio.current_time() - started_at
    assert outbound.CLOSE_TIMEOUT_S * 0.9 < seconds < outbound.CLOSE_TIMEOUT_S + 2


@pytest.mark.parametrize("point", ["connecting", "authenticating", "reading"])
async def test_cancellation_leaves_nothing_behind(point: str) -> None:
    reached = trio.Event()
    gone = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        if point == "authenticating":
            await peer.receive("auth")
        else:
            await peer.open()
        reached.set()
        await peer.until_closed()
        gone.set()

    async def run(url: str, scope: trio.CancelScope) -> None:
        with scope:
            async with open_client(url, "t", channels=["balance"]) as client:
                await anext(client)
        assert scope.cancelled_caught

    async def hold(stream: trio.SocketStream) -> None:
        reached.set()
        with suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass
        gone.set()

    tasks_before = trio.lowlevel.current_statistics().tasks_living
    async with server(script) as url, trio.open_nursery() as nursery:
        if point == "connecting":
            (listener,) = await nursery.start(partial(trio.serve_tcp, hold, 0, host="127.0.0.1"))
            url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}/"
        scope = trio.CancelScope()
        nursery.start_soon(run, url, scope)
        await reached.wait()
        started_at = trio.current_time()
        scope.cancel()
        await gone.wait()
        assert trio.current_time() - started_at < 2
        nursery.cancel_scope.cancel()
    assert trio.lowlevel.current_statistics().tasks_living == tasks_before


def test_the_back_off_grows_to_a_bound_and_is_never_the_same_for_all() -> None:
    waits = [ending.back_off(n) for n in range(1, 5000)]
    assert all(0 < wait <= ending.BACKOFF_MOST_S for wait in waits)
    assert waits[0] <= ending.BACKOFF_FIRST_S
    assert len(set(waits[-20:])) > 1
    assert min(waits[-20:]) >= ending.BACKOFF_MOST_S / 2
