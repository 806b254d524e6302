"""Opening handshakes as raw bytes, and what is sent behind them."""

from __future__ import annotations

import base64
import os
import socket
from collections.abc import Callable

import h2.config
import h2.connection


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


def raw(url: str) -> socket.socket:
    port = int(url.split(":")[2].split("/")[0])
    sock = socket.create_connection(("127.0.0.1", port), timeout=30)
    sock.sendall(
        b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 101")
    return sock
