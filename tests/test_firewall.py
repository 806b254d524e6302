"""No request of a stranger ends the service: the inputs that kill a stock Hypercorn, and more."""

from __future__ import annotations

import asyncio
import base64
import operator
import os
import socket
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

import h2.config
import h2.connection
import pytest
from support import PATIENCE_S, Client, client, plain_hypercorn
from websockets.exceptions import ConnectionClosedOK

ROUNDS = 20
HEALTHY = 10


def handshake(*extra: bytes, path: bytes = b"/ws", connection: bytes = b"Upgrade") -> bytes:
    key = base64.b64encode(os.urandom(16))
    lines = [
        b"GET " + path + b" HTTP/1.1",
        b"Host: localhost",
        b"Upgrade: websocket",
        b"Connection: " + connection,
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: " + key,
        *extra,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def utf8_path_over_http2() -> bytes:
    connection = h2.connection.H2Connection(
        h2.config.H2Configuration(
            client_side=True,
            header_encoding=None,
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
    )
    connection.initiate_connection()
    connection.send_headers(
        1,
        [
            (b":method", b"CONNECT"),
            (b":protocol", b"websocket"),
            (b":scheme", b"http"),
            (b":authority", b"localhost"),
            (b":path", "/wß".encode()),
            (b"sec-websocket-version", b"13"),
        ],
    )
    return connection.data_to_send()


FRAME = b"\x81\x84\x00\x00\x00\x00ping"
KILLERS: dict[str, Callable[[], bytes]] = {
    "non-ASCII subprotocol": lambda: handshake(b"Sec-WebSocket-Protocol: \xff"),
    "non-ASCII extension": lambda: handshake(b"Sec-WebSocket-Extensions: \xe9"),
    "non-ASCII connection": lambda: handshake(connection=b"Upgrade, \xff"),
    "bad window bits": lambda: handshake(
        b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits=abc"
    ),
    "upgrade with a body": lambda: handshake(b"Content-Length: 5") + b"hello",
    "upgrade with a chunked body": lambda: (
        handshake(b"Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n"
    ),
    "frames behind the handshake": lambda: handshake() + FRAME * 3,
    "bytes after connection: close": lambda: (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\nGET / HTTP/1.1\r\n\r\n"
    ),
    "raw UTF-8 path over HTTP/2": utf8_path_over_http2,
    "invalid handshake": lambda: handshake(b"Sec-WebSocket-Version: 99"),
    "path that forges a line": lambda: handshake(path=b"/%0d%0aforged"),
}


def attack(port: int, what: bytes) -> None:
    """Send it, and wait for the server to end the connection, or end it ourselves."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(what)
        sock.shutdown(socket.SHUT_WR)
        try:
            while sock.recv(65536):
                pass
        except ConnectionError:
            pass


async def healthy_while(url: str, what: Callable[[], None]) -> None:
    """Ten clients read all the time while `what` goes on; each keeps its chain of `seq`."""
    counts = [0] * HEALTHY

    async def read(number: int, each: Client) -> None:
        last: dict[str, int] = {}
        with suppress(ConnectionClosedOK):  # ours: any other close is the server cutting it
            while True:
                push = await each.push()
                if push["type"] == "update":
                    assert push["prev"] == last[push["channel"]], push
                elif push["type"] == "snapshot":
                    assert push["channel"] not in last
                else:
                    continue
                last[push["channel"]] = push["seq"]
                counts[number] += 1

    async with AsyncExitStack() as stack:
        clients = []
        for user in range(HEALTHY):
            each = await stack.enter_async_context(client(url, user))
            await each.subscribe("ticker.BTCUSDT", "ticker.ETHUSDT", "balance")
            clients.append(each)
        readers = [asyncio.create_task(read(*pair)) for pair in enumerate(clients)]
        await asyncio.get_running_loop().run_in_executor(None, what)
        after = [count + 5 for count in counts]
        async with asyncio.timeout(PATIENCE_S):
            # Every one of them is served on, each at the pace of its worker.
            while any(map(operator.lt, counts, after)) and not any(r.done() for r in readers):
                await asyncio.sleep(0.05)
        for each in clients:
            await each.socket.close(1000, "done")
        await asyncio.gather(*readers)
        assert not any(map(operator.lt, counts, after)), counts


def attack_with_everything(port: int) -> None:
    threads = []
    for what in KILLERS.values():
        for _ in range(ROUNDS):
            threads.append(threading.Thread(target=attack, args=(port, what())))
    for start in range(0, len(threads), 20):
        for thread in threads[start : start + 20]:
            thread.start()
        for thread in threads[start : start + 20]:
            thread.join(60)
            assert not thread.is_alive()


def test_healthy_clients_notice_nothing(embedded):
    before = embedded.look()
    asyncio.run(healthy_while(embedded.url, lambda: attack_with_everything(embedded.port)))
    seen = embedded.look_until(
        lambda seen: seen["connections"] == 0 and seen["tasks"] <= before["tasks"], "the end"
    )
    assert seen["balanced"]
    assert seen["descriptors"] <= before["descriptors"]
    # Each of these makes Hypercorn's protocol code raise; the others are answered.
    assert seen["connections_stopped"] >= 3 * ROUNDS
    assert seen["violations"] == []
    assert embedded.process.traces() == []
    stopped = [line for line in embedded.process.err if line.startswith("⚠️ 已拦截异常连接")]
    assert len(stopped) == seen["connections_stopped"]
    assert not any("forged" in line for line in embedded.process.err)


@pytest.mark.parametrize("name", KILLERS)
def test_each_input_alone_leaves_nothing_behind(embedded, name):
    before = embedded.look()
    attack(embedded.port, KILLERS[name]())
    seen = embedded.look_until(lambda seen: seen["tasks"] <= before["tasks"], "the end")
    assert seen["descriptors"] <= before["descriptors"]
    assert seen["balanced"]
    assert embedded.process.traces() == []


def test_plain_hypercorn_with_two_workers_survives(tmp_path):
    with plain_hypercorn(tmp_path, "-w", "2", app="recorded_app:app") as server:
        port = int(server.url.split(":")[2].split("/")[0])
        server.wait_for_line("启动交易数据WebSocket推送服务", count=2)
        asyncio.run(healthy_while(server.url, lambda: attack_with_everything(port)))
        assert server.popen.poll() is None
        assert not [line for line in server.err if line.startswith("RECORDER")]
        # Both workers are the ones that began.
        assert sum("启动交易数据WebSocket推送服务" in line for line in server.err) == 2
        assert server.stop() == 0
        assert server.traces() == []


def test_a_refused_handshake_is_closed_at_once(embedded):
    with socket.create_connection(("127.0.0.1", embedded.port), timeout=30) as sock:
        sock.sendall(handshake().replace(b"Version: 13", b"Version: 99"))
        answer = b""
        while data := sock.recv(65536):  # ends: stock Hypercorn would leave it open
            answer += data
    assert answer.startswith(b"HTTP/1.1 400")


def test_other_paths_and_plain_requests_are_answered(embedded):
    for request, status in (
        (handshake(path=b"/other"), b"404"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
        (handshake(b"Authorization: Bearer rubbish"), b"401"),
    ):
        with socket.create_connection(("127.0.0.1", embedded.port), timeout=30) as sock:
            sock.sendall(request)
            answer = b""
            while data := sock.recv(65536):
                answer += data
        assert answer.split(b" ")[1] == status
