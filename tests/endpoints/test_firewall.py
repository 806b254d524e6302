"""No request of a stranger ends the service: the inputs that kill a stock Hypercorn, and more."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from harness.bystanders import healthy_while
from harness.handshakes import KILLERS, attack, handshake
from harness.support import plain_hypercorn

ROUNDS = 20


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
    assert 0 < len(stopped) <= seen["connections_stopped"] // 2  # ten a minute have a line
    assert not any(line.startswith("forged") for line in embedded.process.err)


@pytest.mark.parametrize("name", KILLERS)
def test_each_input_alone_leaves_nothing_behind(embedded, name):
    before = embedded.look()
    attack(embedded.port, KILLERS[name]())
    seen = embedded.look_until(lambda seen: seen["tasks"] <= before["tasks"], "the end")
    assert seen["descriptors"] <= before["descriptors"]
    assert seen["balanced"]
    assert embedded.process.traces() == []


def test_plain_hypercorn_with_two_workers_survives(tmp_path):
    with plain_hypercorn(tmp_path, "-w", "2", app="harness.recorded_app:app") as server:
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
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"200"),
        (b"GET /none HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
        (handshake(b"Authorization: Bearer rubbish"), b"401"),
    ):
        with socket.create_connection(("127.0.0.1", embedded.port), timeout=30) as sock:
            sock.sendall(request)
            answer = b""
            while data := sock.recv(65536):
                answer += data
        assert answer.split(b" ")[1] == status
