"""The floor: a bare loop of non-blocking sends of a ready frame on N sockets, TCP_NODELAY on."""

from __future__ import annotations

import base64
import hashlib
import json
import select
import socket
import sys
import time

from common import TOPICS, answered, listening, payload

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def frame(text: str) -> bytes:
    data = text.encode()
    return bytes((0x81, 126)) + len(data).to_bytes(2, "big") + data


def main() -> None:
    server = socket.create_server(("127.0.0.1", 0), backlog=4096)
    listening(server.getsockname()[1])
    clients: list[socket.socket] = []
    while True:
        readable, _, _ = select.select([server, sys.stdin], [], [])
        if server in readable:
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
            clients.append(client)
            continue
        line = sys.stdin.readline()
        if not line:
            return
        publish(clients, **json.loads(line))
        answered()


def publish(clients: list[socket.socket], batches: int, topics: int, interval_s: float) -> None:
    due = time.monotonic()
    for _ in range(batches):
        frames = [frame(payload(symbol)) for symbol in TOPICS[:topics]]
        if topics == 1:
            [data] = frames
            for client in clients:
                client.send(data)
        else:
            for client in clients:
                client.sendmsg(frames)
        due += interval_s
        time.sleep(max(0.0, due - time.monotonic()))


main()
