"""What holds at every endpoint: linked, plain, native, over TLS and in memory."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import struct
from typing import Any

import pytest
import trio
import trio.testing
import trio_websocket

from harness.endpoints import EVERY, KINDS, RAW, open_endpoint, status_of
from harness.frames import masked
from harness.handshakes import KILLERS, attack, handshake
from harness.support import PATIENCE_S, token

from trading_push import AuthenticationError, Principal
from trading_push.settings.schema import Limits


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Nothing that a peer does shows a trace; what a handler does is said in its test."""
    caplog.set_level(logging.INFO, "trading_push")
    yield
    expected = 1 if "a_bug" in os.environ["PYTEST_CURRENT_TEST"] else 0
    records = caplog.get_records("call")
    assert len([record for record in records if record.exc_info]) == expected


every_endpoint = pytest.mark.parametrize("kind", EVERY)
every_server = pytest.mark.parametrize("kind", KINDS)


@every_endpoint
async def test_values_arrive_whole_and_in_order(kind, certificates):
    async with open_endpoint(kind, certificates) as endpoint:
        await endpoint.service.publish("pnl", [0, ""], user=4)
        async with endpoint.connect(4, "pnl") as client:
            assert (await client.push())["data"] == [0, ""]
            seq = 1
            for number in range(1, 300):
                size = (10, 200, 70_000)[number % 3]
                await endpoint.service.publish("pnl", [number, "x" * size], user=4)
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
    async with open_endpoint(kind, certificates) as endpoint:
        bearer = [(b"authorization", b"Bearer " + token(4).encode())]
        options = {"extra_headers": bearer, "subprotocols": ["trading-push.v1", "other"]}
        async with endpoint.connect(**options) as client:
            assert client.socket.subprotocol == "trading-push.v1"
            opening = await client.receive()
            assert (opening["op"], opening["user"]) == ("auth", "4")
            assert "id" not in opening
        async with endpoint.connect(path="/ws?a=b") as client:
            assert client.socket.subprotocol is None
            assert (await client.request("ping", id=1))["op"] == "pong"
        wrong = handshake(b"Authorization: Bearer rubbish")
        assert await status_of(endpoint, wrong, certificates) == 401
        assert await status_of(endpoint, handshake(path=b"/other"), certificates) == 404


@every_endpoint
@pytest.mark.parametrize(("code", "reason"), [(1000, "done"), (1001, None), (4001, "bye")])
async def test_the_close_code_and_reason_are_the_peers(kind, certificates, caplog, code, reason):
    async with open_endpoint(kind, certificates) as endpoint:
        async with endpoint.connect(4, "ticker.A") as client:
            await client.socket.aclose(code, reason)
        with trio.fail_after(5):
            while endpoint.service.statistics().connections:
                await trio.sleep(0.01)
    [line] = [m for m in caplog.messages if "连接关闭" in m]
    if kind == "plain":  # the server does not tell
        assert "code=1006 reason=''" in line
    else:
        assert f"code={code} reason='{reason or ''}'" in line


@every_endpoint
async def test_our_close_reaches_the_peer(kind, certificates):
    async with open_endpoint(kind, certificates) as endpoint:
        async with endpoint.connect() as client:
            await client.socket.send_message(b"binary")
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                await client.receive()
            assert closed.value.reason.code == 1003
        async with endpoint.connect(4) as client:
            for _ in range(10):
                await client.socket.send_message("{")
            replies = [await client.receive() for _ in range(10)]
            assert {reply["error"]["code"] for reply in replies} == {"bad_json"}
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                await client.receive()
            assert closed.value.reason.code == 4501


@every_server
async def test_a_message_over_the_limit(kind, certificates):
    async with open_endpoint(kind, certificates, limits=Limits(message_bytes=1000)) as endpoint:
        for text in ("x" * 1001, "é" * 501):
            async with endpoint.connect(4) as client:
                await client.socket.send_message(text)
                if kind == "plain":  # the server's own limit is what holds there
                    assert (await client.receive())["error"]["code"] == "bad_json"
                    continue
                with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                    await client.receive()
                assert closed.value.reason.code in (1009, 1006)


@every_endpoint
async def test_a_bug_in_a_handler_is_one_trace_and_nobody_elses(kind, certificates):
    async def authenticate(given: str) -> Principal:
        if given == "bug":
            raise RuntimeError("the application's own mistake")
        return Principal("4")

    async with (
        open_endpoint(kind, certificates, authenticate=authenticate) as endpoint,
        endpoint.connect(4, "ticker.A") as healthy,
    ):
        async with endpoint.connect() as client:
            reply = await client.request("auth", id=5, token="bug")
            assert (reply["id"], reply["error"]["code"]) == (5, "internal")
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                await client.receive()
            assert closed.value.reason.code == 1011
        await endpoint.service.publish("ticker.A", 1)
        while "data" not in (push := await healthy.push()):
            pass
        assert push["data"] == 1


@pytest.mark.parametrize("timeout_s", [None, 0, -1, math.nan])
@every_endpoint
async def test_the_drain_tells_everyone(kind, certificates, timeout_s):
    async with (
        open_endpoint(kind, certificates) as endpoint,
        endpoint.connect(4, "ticker.A") as client,
        endpoint.connect() as nobody,
    ):
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + PATIENCE_S
            nursery.start_soon(endpoint.service.drain, timeout_s)
            for each in (client, nobody):
                while "op" not in (notice := await each.receive()):
                    pass
                assert notice["code"] == "shutdown"
                with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                    await each.receive()
                assert closed.value.reason.code == 1012
        assert not nursery.cancel_scope.cancelled_caught
        if kind != "memory":
            assert await status_of(endpoint, handshake(), certificates) == 503


def raw_client(port: int) -> socket.socket:
    from harness.handshakes import raw

    return raw(f"ws://127.0.0.1:{port}/ws")


def say(sock: socket.socket, **request: Any) -> None:
    payload = json.dumps(request).encode().ljust(126)
    sock.sendall(b"\x81\xfe" + len(payload).to_bytes(2, "big") + b"\x00" * 4 + payload)


@pytest.mark.parametrize("kind", RAW)
async def test_a_peer_that_does_not_read_is_cut_and_the_others_lose_nothing(
    kind, certificates, caplog
):
    async with open_endpoint(kind, certificates, limits=Limits(send_timeout_s=0.5)) as endpoint:
        with await trio.to_thread.run_sync(raw_client, endpoint.port) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            say(sock, op="auth", token=token(4))
            say(sock, op="subscribe", args=["balance"])
            while not endpoint.service.statistics().subscribers_by_data_type:
                await trio.sleep(0.01)
            async with endpoint.connect(4, "balance") as healthy:
                seq = None
                with trio.fail_after(30):
                    while endpoint.service.statistics().connections == 2:
                        data = os.urandom(25_000).hex()
                        await endpoint.service.publish("balance", data, user=4)
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
    async with open_endpoint(kind, certificates) as endpoint:
        await trio.testing.wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        for how, last in ends * 5:
            sock = await trio.to_thread.run_sync(raw_client, endpoint.port)
            say(sock, op="auth", token=token(4))
            say(sock, op="subscribe", args=["balance"])
            if last:
                sock.sendall(last)
            if how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                sock.shutdown(socket.SHUT_WR)
            await endpoint.service.publish("balance", os.urandom(4).hex(), user=4)
            sock.close()
        with trio.fail_after(10):
            while (
                endpoint.service.statistics().connections
                or trio.lowlevel.current_statistics().tasks_living > tasks
            ):
                await trio.sleep(0.01)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("kind", ["native"])
async def test_no_input_ends_the_native_endpoint(kind, certificates):
    async with open_endpoint(kind, certificates) as endpoint:
        async with endpoint.connect(4, "ticker.A") as healthy:
            await trio.testing.wait_all_tasks_blocked()
            tasks = trio.lowlevel.current_statistics().tasks_living
            for make in KILLERS.values():
                for _ in range(5):
                    await trio.to_thread.run_sync(attack, endpoint.port, make())
                await endpoint.service.publish("ticker.A", os.urandom(4).hex())
                assert "channel" in await healthy.push()
            with trio.fail_after(10):
                while trio.lowlevel.current_statistics().tasks_living > tasks:
                    await trio.sleep(0.01)
        assert endpoint.service.statistics().connections_stopped > 0


@pytest.mark.parametrize("kind", ["linked", "plain", "native"])
async def test_frames_that_come_with_the_handshake_do_not_vanish_but_end_it(kind, certificates):
    async with open_endpoint(kind, certificates) as endpoint:
        stopped = endpoint.service.statistics().connections_stopped
        async with await trio.open_tcp_stream("127.0.0.1", endpoint.port) as stream:
            ping = b'{"op":"ping"}'
            await stream.send_all(handshake() + masked(0x81, ping))
            with trio.fail_after(PATIENCE_S):
                while await stream.receive_some():
                    pass
        assert endpoint.service.statistics().connections_stopped == stopped + 1


@pytest.mark.parametrize("kind", ["native", "native-tls", "linked"])
async def test_a_handshake_that_is_not_finished_is_given_up(kind, certificates):
    async with open_endpoint(
        kind, certificates, limits=Limits(handshake_timeout_s=0.3)
    ) as endpoint:
        await trio.testing.wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        for begun in (b"", b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgr"):
            stream = await trio.open_tcp_stream("127.0.0.1", endpoint.port)
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
            stream = await trio.open_tcp_stream("127.0.0.1", endpoint.port)
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

    async with open_endpoint("native", certificates, authenticate=authenticate) as endpoint:
        for status, given in ((401, b"no"), (500, b"bug")):
            request = handshake(b"Authorization: Bearer " + given)
            assert await status_of(endpoint, request, certificates) == status
