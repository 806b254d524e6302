"""What holds at every door, by the same tests: linked, plain, native, over TLS and in memory."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import trio.testing
import trio_websocket
import trustme
from support import PATIENCE_S, SECRET, TrioClient, hypercorn_serving, token
from test_firewall import KILLERS, attack, handshake

from trading_push import (
    AuthenticationError,
    Channel,
    JwtAuthenticator,
    Principal,
    open_push_service,
)
from trading_push.endpoints.hypercorn.link import guard
from trading_push.service import PushService
from trading_push.settings.schema import Auth, Limits, Server, Settings
from trading_push.testing import MemoryTransport, peer

KINDS = ["linked", "plain", "native", "linked-tls", "native-tls"]
EVERY = [*KINDS, "memory"]
RAW = ["linked", "native"]


@attrs.frozen
class Door:
    """A service behind one of its doors."""

    kind: str
    service: PushService
    port: int
    connect: Callable[..., AbstractAsyncContextManager[TrioClient]]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    authority = trustme.CA()
    pem = tmp_path_factory.mktemp("tls") / "chain.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    return pem, trust


@asynccontextmanager
async def served(kind: str, service: PushService, certificates: Any) -> AsyncIterator[int]:
    pem, _ = certificates
    tls = kind.endswith("tls")
    if kind == "memory":
        yield 0
        return
    if kind.startswith("native"):
        context = None
        if tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(pem)
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(
                partial(service.serve_native, "127.0.0.1", 0, ssl_context=context)
            )
            yield listeners[0].socket.getsockname()[1]
            nursery.cancel_scope.cancel()
        return

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def passed_on(message: Any) -> None:
            await send(message)

        await service.asgi_app(scope, receive, passed_on)

    app = wrapped if kind == "plain" else service
    files = {"certfile": str(pem), "keyfile": str(pem)} if tls else {}
    async with hypercorn_serving(app, **files) as port:
        yield port


@asynccontextmanager
async def open_door(
    kind: str,
    certificates: Any,
    *,
    limits: Limits | None = None,
    server: Server | None = None,
    authenticate: Any = None,
    channels: Sequence[Channel] = (),
) -> AsyncIterator[Door]:
    limits = limits or Limits()
    old, guard.limits = guard.limits, limits
    try:
        async with (
            open_push_service(
                settings=Settings(limits=limits, server=server or Server()),
                authenticate=authenticate or JwtAuthenticator(Auth(), SECRET),
                channels=channels,
            ) as service,
            served(kind, service, certificates) as port,
        ):

            @asynccontextmanager
            async def connect(
                user: str | int | None = None, *channels: Any, **options: Any
            ) -> AsyncIterator[TrioClient]:
                if kind == "memory":
                    async with in_memory(service, user, *channels) as made:
                        yield made
                    return
                path = options.pop("path", "/ws")
                tls = certificates[1] if kind.endswith("tls") else False
                async with trio.open_nursery() as nursery:
                    websocket = await trio_websocket.connect_websocket(
                        nursery, "localhost" if tls else "127.0.0.1", port, path,
                        use_ssl=tls, **options
                    )  # fmt: skip
                    made = TrioClient(websocket)
                    try:
                        if user is not None:
                            assert (await made.request("auth", token=token(user)))["ok"]
                        if channels:
                            reply = await made.request("subscribe", args=list(channels))
                            assert reply["ok"], reply
                        yield made
                        with trio.move_on_after(2):
                            await websocket.aclose()
                    finally:
                        await trio.aclose_forcefully(websocket._stream)
                    nursery.cancel_scope.cancel()

            yield Door(kind, service, port, connect)
            with trio.fail_after(10):
                while service.statistics().connections:
                    await trio.sleep(0.01)
            assert service.statistics().ledger.balanced
    finally:
        guard.limits = old


class MemorySocket:
    """The transport in memory, with the few methods of a trio-websocket that the tests use."""

    def __init__(self, transport: MemoryTransport) -> None:
        self._transport = transport

    async def send_message(self, message: str | bytes) -> None:
        self._transport.say_text(message)

    async def get_message(self) -> str:
        while not self._transport.sent:
            if self._transport.closed_with is not None:
                reason = trio_websocket.CloseReason(*self._transport.closed_with)
                raise trio_websocket.ConnectionClosed(reason)
            await trio.sleep(0.001)
        return json.dumps((await self._transport.next())[0])

    async def aclose(self, code: int = 1000, reason: str | None = None) -> None:
        self._transport.leave(code, reason or "")


@asynccontextmanager
async def in_memory(
    service: PushService, user: str | int | None, *channels: Any
) -> AsyncIterator[TrioClient]:
    async with peer(service) as transport:
        made = TrioClient(MemorySocket(transport))
        if user is not None:
            assert (await made.request("auth", token=token(user)))["ok"]
        if channels:
            assert (await made.request("subscribe", args=list(channels)))["ok"]
        yield made
        await made.socket.aclose()


async def status_of(door: Door, request: bytes, certificates: Any) -> int:
    """The status that a handshake is refused with."""
    return int((await answer_of(door, request, certificates)).split(b" ")[1])


async def answer_of(door: Door, request: bytes, certificates: Any) -> bytes:
    """All that a handshake is refused with."""
    stream: Any = await trio.open_tcp_stream("127.0.0.1", door.port)
    if door.kind.endswith("tls"):
        stream = trio.SSLStream(stream, certificates[1], server_hostname="localhost")
    async with stream:
        await stream.send_all(request)
        answer = b""
        with trio.move_on_after(1):  # where the server keeps the connection for another request
            try:
                while data := await stream.receive_some():
                    answer += data
            except trio.BrokenResourceError:
                pass
        if door.kind.endswith("tls"):
            await trio.aclose_forcefully(stream)
    return answer


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Nothing that a peer does shows a trace; what a handler does is said in its test."""
    caplog.set_level(logging.INFO, "trading_push")
    yield
    expected = 1 if "a_bug" in os.environ["PYTEST_CURRENT_TEST"] else 0
    records = caplog.get_records("call")
    assert len([record for record in records if record.exc_info]) == expected


every_door = pytest.mark.parametrize("kind", EVERY)
every_server = pytest.mark.parametrize("kind", KINDS)


@every_door
async def test_values_arrive_whole_and_in_order(kind, certificates):
    async with open_door(kind, certificates) as door:
        await door.service.publish("pnl", [0, ""], user=4)
        async with door.connect(4, "pnl") as client:
            assert (await client.push())["data"] == [0, ""]
            seq = 1
            for number in range(1, 300):
                size = (10, 200, 70_000)[number % 3]
                await door.service.publish("pnl", [number, "x" * size], user=4)
            while True:
                push = await client.push()
                assert push["prev"] == seq
                assert push.get("merged", 1) == push["seq"] - push["prev"]
                seq = push["seq"]
                assert push["data"] == [seq - 1, "x" * (10, 200, 70_000)[(seq - 1) % 3]]
                if seq == 300:
                    break


@every_server
async def test_handshake_subprotocol_token_and_path(kind, certificates):
    async with open_door(kind, certificates) as door:
        bearer = [(b"authorization", b"Bearer " + token(4).encode())]
        options = {"extra_headers": bearer, "subprotocols": ["trading-push.v1", "other"]}
        async with door.connect(**options) as client:
            assert client.socket.subprotocol == "trading-push.v1"
            opening = await client.receive()
            assert (opening["op"], opening["user"]) == ("auth", "4")
            assert "id" not in opening
        async with door.connect(path="/ws?a=b") as client:
            assert client.socket.subprotocol is None
            assert (await client.request("ping", id=1))["op"] == "pong"
        wrong = handshake(b"Authorization: Bearer rubbish")
        assert await status_of(door, wrong, certificates) == 401
        assert await status_of(door, handshake(path=b"/other"), certificates) == 404


@every_door
@pytest.mark.parametrize(("code", "reason"), [(1000, "done"), (1001, None), (4001, "bye")])
async def test_the_close_code_and_reason_are_the_peers(kind, certificates, caplog, code, reason):
    async with open_door(kind, certificates) as door:
        async with door.connect(4, "ticker.A") as client:
            await client.socket.aclose(code, reason)
        with trio.fail_after(5):
            while door.service.statistics().connections:
                await trio.sleep(0.01)
    [line] = [m for m in caplog.messages if "连接关闭" in m]
    if kind == "plain":  # the server does not tell
        assert "code=1006 reason=''" in line
    else:
        assert f"code={code} reason='{reason or ''}'" in line


@every_door
async def test_our_close_reaches_the_peer(kind, certificates):
    async with open_door(kind, certificates) as door:
        async with door.connect() as client:
            await client.socket.send_message(b"binary")
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                await client.receive()
            assert closed.value.reason.code == 1003
        async with door.connect(4) as client:
            for _ in range(10):
                await client.socket.send_message("{")
            replies = [await client.receive() for _ in range(10)]
            assert {reply["error"]["code"] for reply in replies} == {"bad_json"}
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                await client.receive()
            assert closed.value.reason.code == 4501


@every_server
async def test_a_message_over_the_limit(kind, certificates):
    async with open_door(kind, certificates, limits=Limits(message_bytes=1000)) as door:
        for text in ("x" * 1001, "é" * 501):
            async with door.connect(4) as client:
                await client.socket.send_message(text)
                if kind == "plain":  # the server's own limit is what holds there
                    assert (await client.receive())["error"]["code"] == "bad_json"
                    continue
                with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                    await client.receive()
                assert closed.value.reason.code in (1009, 1006)


@every_door
async def test_a_bug_in_a_handler_is_one_trace_and_nobody_elses(kind, certificates):
    async def authenticate(given: str) -> Principal:
        if given == "bug":
            raise RuntimeError("the application's own mistake")
        return Principal("4")

    async with (
        open_door(kind, certificates, authenticate=authenticate) as door,
        door.connect(4, "ticker.A") as healthy,
    ):
        async with door.connect() as client:
            reply = await client.request("auth", id=5, token="bug")
            assert (reply["id"], reply["error"]["code"]) == (5, "internal")
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                await client.receive()
            assert closed.value.reason.code == 1011
        await door.service.publish("ticker.A", 1)
        while "data" not in (push := await healthy.push()):
            pass
        assert push["data"] == 1


@pytest.mark.parametrize("timeout_s", [None, 0, -1, math.nan])
@every_door
async def test_the_drain_tells_everyone(kind, certificates, timeout_s):
    async with (
        open_door(kind, certificates) as door,
        door.connect(4, "ticker.A") as client,
        door.connect() as nobody,
    ):
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + PATIENCE_S
            nursery.start_soon(door.service.drain, timeout_s)
            for each in (client, nobody):
                while "op" not in (notice := await each.receive()):
                    pass
                assert notice["code"] == "shutdown"
                with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                    await each.receive()
                assert closed.value.reason.code == 1012
        assert not nursery.cancel_scope.cancelled_caught
        if kind != "memory":
            assert await status_of(door, handshake(), certificates) == 503


def raw_client(port: int) -> socket.socket:
    from test_close_codes import raw

    return raw(f"ws://127.0.0.1:{port}/ws")


def say(sock: socket.socket, **request: Any) -> None:
    payload = json.dumps(request).encode().ljust(126)
    sock.sendall(b"\x81\xfe" + len(payload).to_bytes(2, "big") + b"\x00" * 4 + payload)


@pytest.mark.parametrize("kind", RAW)
async def test_a_peer_that_does_not_read_is_cut_and_the_others_lose_nothing(
    kind, certificates, caplog
):
    async with open_door(kind, certificates, limits=Limits(send_timeout_s=0.5)) as door:
        with await trio.to_thread.run_sync(raw_client, door.port) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            say(sock, op="auth", token=token(4))
            say(sock, op="subscribe", args=["balance"])
            while not door.service.statistics().subscribers_by_data_type:
                await trio.sleep(0.01)
            async with door.connect(4, "balance") as healthy:
                seq = None
                with trio.fail_after(30):
                    while door.service.statistics().connections == 2:
                        data = os.urandom(25_000).hex()
                        await door.service.publish("balance", data, user=4)
                        while "data" not in (push := await healthy.push()):
                            pass
                        assert push.get("prev") == seq
                        seq = push["seq"]
        assert any("连接关闭: code=4001" in message for message in caplog.messages)


@pytest.mark.parametrize("kind", RAW)
async def test_rude_ends_leave_nothing_behind(kind, certificates, caplog):
    half = b"\x81\xfe\x00\x80"
    ends: list[tuple[str, bytes]] = [
        ("reset", b""),
        ("fin", b""),
        ("reset", half),
        ("fin", half),
        ("fin", b"\x88\x82\x00\x00\x00\x00\x03\xe8" + b"\x89\x80\x00\x00\x00\x00"),
        ("fin", b"\xff" * 100),
        ("fin", b"\x82\x82\x00\x00\x00\x00xx" + b"\x89\x80\x00\x00\x00\x00" * 50),
    ]
    async with open_door(kind, certificates) as door:
        await trio.testing.wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        for how, last in ends * 5:
            sock = await trio.to_thread.run_sync(raw_client, door.port)
            say(sock, op="auth", token=token(4))
            say(sock, op="subscribe", args=["balance"])
            if last:
                sock.sendall(last)
            if how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                sock.shutdown(socket.SHUT_WR)
            await door.service.publish("balance", os.urandom(4).hex(), user=4)
            sock.close()
        with trio.fail_after(10):
            while (
                door.service.statistics().connections
                or trio.lowlevel.current_statistics().tasks_living > tasks
            ):
                await trio.sleep(0.01)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("kind", ["native"])
async def test_no_input_ends_the_native_door(kind, certificates):
    async with open_door(kind, certificates) as door:
        async with door.connect(4, "ticker.A") as healthy:
            await trio.testing.wait_all_tasks_blocked()
            tasks = trio.lowlevel.current_statistics().tasks_living
            for make in KILLERS.values():
                for _ in range(5):
                    await trio.to_thread.run_sync(attack, door.port, make())
                await door.service.publish("ticker.A", os.urandom(4).hex())
                assert "channel" in await healthy.push()
            with trio.fail_after(10):
                while trio.lowlevel.current_statistics().tasks_living > tasks:
                    await trio.sleep(0.01)
        assert door.service.statistics().connections_stopped > 0


@pytest.mark.parametrize("kind", ["linked", "plain", "native"])
async def test_frames_that_come_with_the_handshake_do_not_vanish_but_end_it(kind, certificates):
    async with open_door(kind, certificates) as door:
        stopped = door.service.statistics().connections_stopped
        async with await trio.open_tcp_stream("127.0.0.1", door.port) as stream:
            ping = b'{"op":"ping"}'
            frame = bytes((0x81, 0x80 | len(ping))) + b"\x00" * 4 + ping
            await stream.send_all(handshake() + frame)
            with trio.fail_after(PATIENCE_S):
                while await stream.receive_some():
                    pass
        assert door.service.statistics().connections_stopped == stopped + 1


@pytest.mark.parametrize("kind", ["native", "native-tls", "linked"])
async def test_a_handshake_that_is_not_finished_is_given_up(kind, certificates):
    async with open_door(kind, certificates, limits=Limits(handshake_timeout_s=0.3)) as door:
        await trio.testing.wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        for begun in (b"", b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgr"):
            stream = await trio.open_tcp_stream("127.0.0.1", door.port)
            async with stream:
                if begun:
                    await stream.send_all(begun)
                with trio.fail_after(5):
                    try:
                        while await stream.receive_some():
                            pass
                    except trio.BrokenResourceError:
                        pass
        for begun in (b"", b"GET / HT"):  # and where the peer leaves first
            stream = await trio.open_tcp_stream("127.0.0.1", door.port)
            await stream.send_all(begun)
            await stream.aclose()
        with trio.fail_after(5):
            while trio.lowlevel.current_statistics().tasks_living > tasks:
                await trio.sleep(0.01)


async def test_an_application_that_raises_in_the_handshake_a_bug(certificates):
    async def authenticate(given: str) -> Principal:
        if given == "no":
            raise AuthenticationError("no")
        raise RuntimeError("the application's own mistake")

    async with open_door("native", certificates, authenticate=authenticate) as door:
        for status, given in ((401, b"no"), (500, b"bug")):
            request = handshake(b"Authorization: Bearer " + given)
            assert await status_of(door, request, certificates) == status
