"""The link to Hypercorn: what it leans on is there, and what a handler leaves behind is reaped."""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import ssl
import struct
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import hypercorn.config
import hypercorn.trio
import pytest
import trio
import trustme

from harness.frames import masked
from harness.handshakes import raw
from harness.support import PATIENCE_S, SECRET, hypercorn_serving, token, trio_client, until

from trading_push import JwtAuthenticator, open_push_service
from trading_push.endpoints.asgi import lifespan
from trading_push.endpoints.hypercorn import link as hypercorn_link
from trading_push.endpoints.hypercorn.server import guard
from trading_push.settings.schema import Auth, Limits, Settings


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


def test_the_installed_hypercorn_is_the_one_the_link_was_made_for():
    done = run("from trading_push.endpoints.hypercorn import link; link.check()")
    assert done.returncode == 0, done.stderr


OTHER = """
import hypercorn.protocol.ws_stream as w
async def handle(self, event, more): ...
w.WSStream.handle = handle
"""


def test_another_hypercorn_is_refused_by_name():
    code = OTHER + "import trading_push.asgi"
    done = run(code, TRADING_PUSH_JWT_SECRET=SECRET)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "WSStream.handle takes (self event more), not (self event)" in line
    assert "TRADING_PUSH_UNGUARDED=1" in line


def test_unguarded_is_said_once():
    code = OTHER + "import logging; logging.basicConfig(); import trading_push.asgi"
    done = run(code, TRADING_PUSH_JWT_SECRET=SECRET, TRADING_PUSH_UNGUARDED="1")
    assert done.returncode == 0
    assert done.stderr.count("以普通ASGI方式运行") == 1


def test_importing_the_package_patches_nothing():
    code = (
        "import trading_push, hypercorn.trio.run as r, hypercorn.trio.tcp_server as t;"
        "assert r.TCPServer is t.TCPServer"
    )
    assert run(code).returncode == 0


@asynccontextmanager
async def limited(**limits: Any):
    old = guard.limits
    settings = Settings(limits=Limits(**limits))
    hypercorn_link.install(settings.limits)
    try:
        async with open_push_service(
            settings=settings, authenticate=JwtAuthenticator(Auth(), SECRET)
        ) as service:
            yield service
    finally:
        guard.limits = old


async def answer_of(stream: trio.SocketStream) -> bytes:
    answer = b""
    with trio.fail_after(10):
        while data := await stream.receive_some():
            answer += data
    return answer


async def test_behind_a_middleware_it_runs_in_plain_form_and_says_so_once(caplog):
    closes: list[Any] = []
    async with limited() as service:

        async def middleware(scope: Any, receive: Any, send: Any) -> None:
            async def wrapped(message: Any) -> None:
                closes.append(message) if message["type"] == "websocket.close" else None
                await send(message)

            await service.asgi_app(scope, receive, wrapped)

        async with hypercorn_serving(middleware) as port:
            for user in (4, 5):
                async with trio_client(port, user, "balance") as peer:
                    assert (await peer.push())["state"] == "down"
                    await service.publish("balance", user, user=user)
                    while "data" not in (push := await peer.push()):
                        pass
                    assert push["data"] == user
            async with trio_client(port) as peer:
                await peer.socket.send_message(b"binary")
                with pytest.raises(Exception, match="1003"):
                    await peer.receive()
    assert [message["code"] for message in closes] == [1003]
    warned = [r for r in caplog.records if getattr(r, "event", "") == "plain_form"]
    assert len(warned) == 1
    assert service.statistics().ledger.balanced


async def test_a_handler_that_outlives_its_peer_is_reaped():
    old, guard.limits = guard.limits, Limits(reap_after_s=0.2)
    reaped = guard.reaped
    started, ended = trio.Event(), trio.Event()

    async def stubborn(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        await receive()
        await send({"type": "websocket.accept"})
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    try:
        async with hypercorn_serving(stubborn) as port:
            sock = await trio.to_thread.run_sync(raw, f"ws://127.0.0.1:{port}/ws")
            await started.wait()
            sock.close()
            with trio.fail_after(5):
                await ended.wait()
                while guard.reaped == reaped:
                    await trio.sleep(0.01)
    finally:
        guard.limits = old


async def test_a_handler_that_never_receives_does_not_hide_the_peers_end():
    old, guard.limits = guard.limits, Limits(handler_timeout_s=1)
    ended = trio.Event()

    async def deaf(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        await receive()
        await send({"type": "websocket.accept"})
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    try:
        async with hypercorn_serving(deaf) as port:
            sock = await trio.to_thread.run_sync(raw, f"ws://127.0.0.1:{port}/ws")
            sock.sendall(b"\x81\x82\x00\x00\x00\x00{}" * 40)  # Hypercorn stops reading at ten
            sock.close()
            with trio.fail_after(5):
                await ended.wait()
    finally:
        guard.limits = old


async def test_a_handshake_that_is_never_finished_is_given_up():
    async with limited(handshake_timeout_s=0.3) as service, hypercorn_serving(service) as port:
        for begun in (b"", b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgr"):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                if begun:
                    await stream.send_all(begun)
                with suppress(trio.BrokenResourceError):
                    assert await answer_of(stream) == b""


async def test_between_requests_a_connection_is_kept_for_a_while():
    async with (
        limited() as service,
        hypercorn_serving(service, keep_alive_timeout=0.3) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
    ):
        reaped = guard.reaped
        for _ in range(2):
            await stream.send_all(b"GET /other HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"/ws\n"):
                part = await stream.receive_some()
                assert part, answer
                answer += part
            assert answer.startswith(b"HTTP/1.1 404")
        with trio.fail_after(5):
            while await stream.receive_some():
                pass
        await until(lambda: not guard.sockets.taken)
        assert guard.reaped == reaped


@pytest.mark.parametrize("secure", [False, True])
async def test_the_first_request_has_the_handshake_s_time(secure, tmp_path):
    authority, files, trust = trustme.CA(), {}, ssl.create_default_context()
    if secure:
        pem = tmp_path / "chain.pem"
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
        authority.configure_trust(trust)
        files = {"certfile": str(pem), "keyfile": str(pem)}
    async with (
        limited(handshake_timeout_s=20) as service,
        hypercorn_serving(service, keep_alive_timeout=0.1, **files) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as plain,
    ):
        reaped = guard.reaped
        stream: Any = trio.SSLStream(plain, trust, server_hostname="localhost") if secure else plain
        for part in (b"", b"GET /other HTTP/1.1\r\n", b"Host: x\r\n\r\n"):
            await trio.sleep(0.3)
            if part:
                await stream.send_all(part)
            elif secure:
                await stream.do_handshake()
        with trio.fail_after(PATIENCE_S):
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 404")
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some():  # the next one has that to keep alive
                    pass
        await until(lambda: not guard.sockets.taken)
        assert guard.reaped == reaped


async def test_a_request_that_does_not_come_ends_its_connection_and_is_no_handler_s_fault():
    async with (
        limited(handshake_timeout_s=0.1) as service,
        hypercorn_serving(service) as port,
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
    ):
        reaped = guard.reaped
        with trio.fail_after(PATIENCE_S), suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass
        await until(lambda: not guard.sockets.taken)
        assert guard.reaped == reaped


async def test_an_idle_connection_does_not_hold_the_servers_end():
    config = hypercorn.config.Config.from_mapping(
        {
            "bind": ["127.0.0.1:0"],
            "errorlog": None,
            "graceful_timeout": 20,
            "keep_alive_timeout": 60,
        }
    )
    the_end = trio.Event()
    async with limited(handshake_timeout_s=60) as service, trio.open_nursery() as nursery:
        serve = partial(
            hypercorn.trio.serve, service.asgi_app, config, shutdown_trigger=the_end.wait
        )
        [url] = await nursery.start(serve)
        async with await trio.open_tcp_stream("127.0.0.1", int(url.rsplit(":", 1)[1])) as stream:
            await until(lambda: guard.sockets.taken)
            the_end.set()
            with trio.fail_after(5):
                while await stream.receive_some():
                    pass


async def test_over_the_limit_the_handshake_is_refused():
    async with limited(connections=2) as service, hypercorn_serving(service) as port:
        await until(lambda: not guard.sockets.taken)
        refused = guard.sockets.refused
        async with trio_client(port, 4), trio_client(port, 4):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with stream:
                await stream.send_all(b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n")
                await stream.send_eof()
                assert (await answer_of(stream)).startswith(b"HTTP/1.1 503")
        assert guard.sockets.refused == refused + 1
        await until(lambda: not guard.sockets.taken)
        async with trio_client(port, 4):
            pass


async def test_a_client_that_does_not_read_is_cut_at_the_send_deadline(caplog):
    caplog.set_level(logging.INFO, "trading_push")
    async with limited(send_timeout_s=0.5) as service, hypercorn_serving(service) as port:
        sock = await trio.to_thread.run_sync(raw, f"ws://127.0.0.1:{port}/ws")
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for request in (
                {"op": "auth", "token": token(4)},
                {"op": "subscribe", "args": ["balance"]},
            ):
                payload = json.dumps(request).encode().ljust(126)
                head = b"\x81\xfe" + len(payload).to_bytes(2, "big") + b"\x00" * 4
                sock.sendall(head + payload)
            await until(lambda: service.statistics().subscribers_by_data_type)
            async with trio_client(port, 4, "balance") as healthy:
                began = None
                with trio.fail_after(30):
                    while service.statistics().connections == 2:
                        await service.publish("balance", "x" * 50_000 + os.urandom(2).hex(), user=4)
                        push = await healthy.push()
                        while "data" not in push:
                            push = await healthy.push()
                        began = began or trio.current_time()
        assert any("连接关闭: code=4001" in r.getMessage() for r in caplog.records)
        assert not [r for r in caplog.records if r.exc_info]


async def test_permessage_deflate_is_never_taken():
    async with limited() as service, hypercorn_serving(service) as port:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(
                b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
            )
            answer = await stream.receive_some()
            assert answer.startswith(b"HTTP/1.1 101")
            assert b"extensions" not in answer.lower()


async def test_over_tls(tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    pem = tmp_path / "chain.pem"
    certificate.private_key_and_cert_chain_pem.write_to_path(str(pem))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with (
        limited() as service,
        hypercorn_serving(service, certfile=str(pem), keyfile=str(pem)) as port,
    ):
        import trio_websocket

        async with trio.open_nursery() as nursery:
            socket = await trio_websocket.connect_websocket(
                nursery, "localhost", port, "/ws", use_ssl=context
            )
            await socket.send_message(json.dumps({"op": "auth", "token": token(4)}))
            assert json.loads(await socket.get_message())["ok"]
            await socket.send_message('{"op":"subscribe","args":["pnl"]}')
            assert json.loads(await socket.get_message())["ok"]
            for number in range(200):
                await service.publish("pnl", [number, "x" * 1000], user=4)
            seen = -1
            while seen != 199:
                push = json.loads(await socket.get_message())
                if "data" in push:
                    assert push["data"][0] > seen
                    seen = push["data"][0]
            with trio.move_on_after(2):
                await socket.aclose(4001, "bye")
            nursery.cancel_scope.cancel()
        await until(lambda: not service.statistics().connections)


async def test_a_reset_in_the_middle_of_a_push_is_no_trace(caplog):
    async with limited() as service, hypercorn_serving(service) as port:
        for _ in range(20):
            sock = await trio.to_thread.run_sync(raw, f"ws://127.0.0.1:{port}/ws")
            payload = json.dumps({"op": "auth", "token": token(4)}).encode().ljust(126)
            sock.sendall(masked(0x81, payload))
            payload = b'{"op":"subscribe","args":["balance"]}'
            sock.sendall(masked(0x81, payload))
            await until(lambda: service.statistics().subscribers_by_data_type)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            while service.statistics().connections:
                await service.publish("balance", os.urandom(4).hex(), user=4)
    gc.collect()
    assert not [r for r in caplog.records if r.exc_info or r.levelno >= logging.ERROR]
    assert service.statistics().ledger.balanced
