"""A process with few descriptors: who has no room is told so, and nobody else notices."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from harness.support import plain_hypercorn, serving

resource = pytest.importorskip("resource")

DESCRIPTORS = 64
CLIENTS = 200
# Runs a module with the limit that a shell's `ulimit -n 64` sets.
LIMITED = (
    "import resource, runpy, sys; "
    f"resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS}, {{hard}})); "
    "runpy.run_module('trading_push', run_name='__main__', alter_sys=True)"
)
ENV = {"TRADING_PUSH_LIMITS_UNAUTHENTICATED_PER_ADDRESS": "1000"}
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def connect(port: int, opened: ExitStack) -> tuple[socket.socket, bytes]:
    """Ask for a WebSocket; the status that comes, empty for none."""
    client = opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
    try:
        client.sendall(HANDSHAKE)
        return client, client.recv(4096)[9:12]
    except (ConnectionError, TimeoutError):
        return client, b""


def is_open(client: socket.socket) -> bool:
    """Whether the server answers a ping of this client."""
    client.sendall(b"\x89\x80\x00\x00\x00\x00")
    return client.recv(4096).endswith(b"\x8a\x00")


def test_who_has_no_descriptor_gets_503(tmp_path):
    program = ("-c", LIMITED.format(hard=DESCRIPTORS))
    with serving(tmp_path, program=program, env=ENV) as server, ExitStack() as opened:
        port = int(server.url.split(":")[2].split("/")[0])
        answers = [connect(port, opened) for _ in range(CLIENTS)]
        statuses = [status for _, status in answers]
        assert statuses[:25] == [b"101"] * 25
        assert set(statuses) <= {b"101", b"503"}
        assert all(is_open(client) for client, status in answers if status == b"101")
        assert server.traces() == []
        too_few = [line for line in server.err if "limits.connections = 10000" in line]
        assert len(too_few) == 1
        assert sum("文件描述符已用尽" in line for line in server.err) == 1


def test_the_soft_limit_is_raised(tmp_path):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 1000:
        pytest.skip("the hard limit of descriptors is below 1,000")
    program = ("-c", LIMITED.format(hard=hard))
    env = {**ENV, "TRADING_PUSH_LIMITS_CONNECTIONS": "150"}
    with serving(tmp_path, program=program, env=env) as server, ExitStack() as opened:
        port = int(server.url.split(":")[2].split("/")[0])
        statuses = [connect(port, opened)[1] for _ in range(CLIENTS)]
        assert statuses[:150] == [b"101"] * 150
        assert set(statuses[150:]) == {b"503"}
        assert not any("文件描述符" in line for line in server.err)


def test_plain_hypercorn_raises_it_too(tmp_path):
    with plain_hypercorn(tmp_path, env=ENV) as server, ExitStack() as opened:
        port = int(server.url.split(":")[2].split("/")[0])
        assert connect(port, opened)[1] == b"101"
