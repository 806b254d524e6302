"""The floor: a bare loop of non-blocking sends of a ready frame on N sockets, TCP_NODELAY on.

A send that would block, or is short, is an error: then the load generator has not kept up, and the
figure would be worth nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import select
import socket
import sys
import time

from common import SIZE, TOPICS, collect, payload, say

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def frame(text: str) -> bytes:
    data = text.encode()
    return bytes((0x81, 126)) + len(data).to_bytes(2, "big") + data


def main() -> None:
    server = socket.create_server(("127.0.0.1", 0), backlog=4096)
    say(port=server.getsockname()[1])
    clients: list[socket.socket] = []
    while True:
        readable, _, _ = select.select([server, sys.stdin], [], [])
        if server in readable:
            clients.append(welcome(server))
            continue
        line = sys.stdin.readline()
        if not line:
            return
        command = json.loads(line)
        if command.pop("do") == "collect":
            collect()
        else:
            publish(clients, **command)
        say()


def welcome(server: socket.socket) -> socket.socket:
    client, _ = server.accept()
    request = client.recv(65536)
    key = request.split(b"Sec-WebSocket-Key: ")[1].split(b"\r\n")[0]
    accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
    client.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.setblocking(False)
    return client


def publish(
    clients: list[socket.socket], batches: int, topics: int, interval_s: float, bytes: int = SIZE
) -> None:
    due = time.monotonic()
    for _ in range(batches):
        frames = [frame(payload(symbol, bytes)) for symbol in TOPICS[:topics]]
        size = sum(map(len, frames))
        if topics == 1:
            [data] = frames
            for client in clients:
                if client.send(data) != size:
                    raise SystemExit("a short send")
        elif topics:
            for client in clients:
                if client.sendmsg(frames) != size:
                    raise SystemExit("a short send")
        due += interval_s
        time.sleep(max(0.0, due - time.monotonic()))


main()
