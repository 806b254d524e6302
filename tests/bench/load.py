"""The load generator: many WebSocket clients in one process, each delivery received and checked.

Run by `run.py`. It reads one JSON command a line and answers each with one JSON line:

- `{"do": "connect", "count": N, ...}`: N clients, connected and subscribed; seconds taken.
- `{"do": "receive", "messages": M}`: until each client that reads has M more messages; each carries
  `"n":<number>`, which must go up by one; latencies from the `"at":<ns>` that a message carries.
- `{"do": "stall", "share": S}`: that share of the clients reads no more.
- `{"do": "cut"}`: every client is gone at once.
"""

from __future__ import annotations

import base64
import json
import os
import re
import selectors
import socket
import struct
import sys
import time
from collections import deque
from typing import Any

NUMBER = re.compile(rb'"n":(\d+)')
AT = re.compile(rb'"at":(\d+)')
AT_ONCE = 400

# What a browser sends, so that a server keeps as much of it as it would.
BROWSER = """\
GET {path} HTTP/1.1\r
Host: 127.0.0.1:{port}\r
Connection: Upgrade\r
Pragma: no-cache\r
Cache-Control: no-cache\r
User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/130\r
Upgrade: websocket\r
Origin: http://127.0.0.1:{port}\r
Sec-WebSocket-Version: 13\r
Accept-Encoding: gzip, deflate, br, zstd\r
Accept-Language: en-US,en;q=0.9\r
Sec-WebSocket-Key: {key}\r
{deflate}\r
"""
DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"


class Client:
    """One WebSocket: its handshake, what it says then, and what it has received."""

    __slots__ = ("buffer", "hello", "last", "received", "sock", "stage", "stalled", "waits")

    def __init__(self, sock: socket.socket, hello: deque[tuple[bytes, bytes, int]]) -> None:
        self.sock = sock
        self.hello = hello
        self.buffer = bytearray()
        self.stage = "handshake"
        self.waits: tuple[bytes, int] = (b"", 0)
        self.received = 0
        self.last = -1
        self.stalled = False


def masked(text: bytes) -> bytes:
    length = len(text)
    head = bytes((0x81, 0x80 | length)) if length < 126 else struct.pack("!BBH", 0x81, 0xFE, length)
    return head + b"\0\0\0\0" + text


class Load:
    def __init__(self) -> None:
        self.selector = selectors.EpollSelector()
        self.clients: list[Client] = []
        self.ready = 0
        self.latencies: list[int] = []

    def connect(
        self,
        *,
        port: int,
        count: int,
        path: str,
        hello: list[tuple[str, str, int]],
        deflate: bool = False,
        at_once: int = AT_ONCE,
    ) -> None:
        """Connect, and say hello: each is (what is sent, what must come, how often)."""
        steps = [(masked(s.encode()) if s else b"", w.encode(), n) for s, w, n in hello]
        target = len(self.clients) + count
        while self.ready < target:
            while len(self.clients) < target and len(self.clients) - self.ready < at_once:
                self._start(port, path, deque(steps), deflate)
            self._turn()

    def _start(
        self, port: int, path: str, steps: deque[tuple[bytes, bytes, int]], deflate: bool
    ) -> None:
        sock = socket.socket()
        sock.connect(("127.0.0.1", port))
        key = base64.b64encode(os.urandom(16)).decode()
        text = BROWSER.format(path=path, port=port, key=key, deflate=DEFLATE if deflate else "")
        sock.sendall(text.encode())
        sock.setblocking(False)
        client = Client(sock, steps)
        self.clients.append(client)
        self.selector.register(sock, selectors.EVENT_READ, client)

    def _turn(self) -> int:
        """Read what has come; how many messages of the workload were among it."""
        count = 0
        for key, _ in self.selector.select(30):
            count += self._read(key.data)
        return count

    def _read(self, client: Client) -> int:
        try:
            data = client.sock.recv(262_144)
        except BlockingIOError:
            return 0
        if not data:
            raise SystemExit(f"the server has cut a client in stage {client.stage}")
        now = time.monotonic_ns()
        buffer = client.buffer
        buffer += data
        if client.stage == "handshake":
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return 0
            if not buffer.startswith(b"HTTP/1.1 101"):
                raise SystemExit(bytes(buffer[:200]))
            del buffer[: end + 4]
            client.stage = "hello"
            self._say(client)
        at, size, count = 0, len(buffer), 0
        while size - at >= 2:
            length, start = buffer[at + 1], at + 2
            if length == 126:
                if size - at < 4:
                    break
                length, start = int.from_bytes(buffer[at + 2 : at + 4], "big"), at + 4
            elif length == 127:
                if size - at < 10:
                    break
                length, start = int.from_bytes(buffer[at + 2 : at + 10], "big"), at + 10
            if size - start < length:
                break
            opcode, payload = buffer[at] & 15, bytes(buffer[start : start + length])
            at = start + length
            if opcode == 8:
                raise SystemExit(f"a client was closed: {payload!r}")
            if opcode == 9:
                client.sock.send(b"\x8a\x80\0\0\0\0")
            elif client.stage == "hello":
                self._heard(client, payload)
            else:
                count += self._message(client, payload, now)
        del buffer[:at]
        return count

    def _say(self, client: Client) -> None:
        while client.hello:
            said, wanted, times = client.hello.popleft()
            if said:
                client.sock.sendall(said)
            if times:
                client.waits = (wanted, times)
                return
        client.stage = "workload"
        self.ready += 1

    def _heard(self, client: Client, payload: bytes) -> None:
        wanted, times = client.waits
        if wanted in payload:
            client.waits = (wanted, times - 1)
            if times == 1:
                self._say(client)

    def _message(self, client: Client, payload: bytes, now: int) -> int:
        number = NUMBER.search(payload)
        if number is None:  # a ping of the protocol's own, a status
            if payload == b"2":
                client.sock.send(masked(b"3"))
            return 0
        if client.last >= 0 and int(number[1]) != client.last + 1:
            raise SystemExit(f"after {client.last} came {payload!r}")
        client.last = int(number[1])
        client.received += 1
        at = AT.search(payload)
        if at is not None:
            self.latencies.append(now - int(at[1]))
        return 1

    def receive(self, messages: int) -> None:
        reading = [client for client in self.clients if not client.stalled]
        missing = messages * len(reading)
        while missing > 0:
            missing -= self._turn()
        wrong = [client.received for client in reading if client.received != messages]
        if missing or wrong:
            raise SystemExit(f"{missing} deliveries missing, {len(wrong)} clients wrong")
        for client in reading:
            client.received = 0

    def stall(self, share: float) -> None:
        for client in self.clients[: round(len(self.clients) * share)]:
            client.stalled = True
            self.selector.unregister(client.sock)

    def cut(self) -> None:
        for client in self.clients:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sock.close()


def percentile(values: list[int], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))] / 1e6


def main() -> None:
    load = Load()
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        began = time.monotonic()
        answer: dict[str, Any] = {}
        match command.pop("do"):
            case "connect":
                load.connect(**command)
            case "receive":
                load.latencies = []
                load.receive(command["messages"])
                if load.latencies:
                    values = sorted(load.latencies)
                    names = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
                    answer = {name: percentile(values, share) for name, share in names.items()}
            case "stall":
                load.stall(command["share"])
            case "cut":
                load.cut()
        answer["seconds"] = time.monotonic() - began
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
