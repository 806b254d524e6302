"""The load generator: many WebSocket clients in one process, each delivery received and checked.

Run by `run.py`. It reads one JSON command a line and answers each with one JSON line; between two
commands it goes on reading, and answers pings.

- `connect`: clients, connected and subscribed.
- `receive`: until every client that reads has so many more messages. A message of the workload
  carries its symbol and a number that goes up by one; the moment of its making gives the latency.
- `watch`: for some seconds, whatever comes; `prev` must be the `seq` before.
- `cut`: every client is gone at once, by RST.
"""

from __future__ import annotations

import base64
import json
import os
import re
import select
import socket
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any

MESSAGE = re.compile(rb'"symbol":"(SYM\dUSDT)","n":(\d+),"at":(\d+)')
PUSH = re.compile(rb'"channel":"([^"]+)","type":"(update|snapshot)"')
SEQ = re.compile(rb'"seq":(\d+)')
PREV = re.compile(rb'"prev":(\d+)')
MERGED = re.compile(rb'"merged":(\d+)')

# So many handshakes at most wait in the server's backlog, which the kernel bounds at 4096.
AT_ONCE = 4000
QUIET_S = 0.002

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

# A client that will not read has small buffers on both sides, so that it stalls in seconds and not
# in minutes: the server's buffer grows with the segment size that the client asks for.
STALLED_SEGMENT = 536
STALLED_BUFFER = 2304

Step = tuple[bytes, bytes, int]


class Client:
    """One WebSocket: its handshake, what it says then, and what it has received."""

    __slots__ = ("buffer", "hello", "inflater", "numbers", "received", "sock", "stage", "waits")

    def __init__(self, sock: socket.socket, hello: deque[Step]) -> None:
        self.sock = sock
        self.hello = hello
        self.buffer = b""
        self.stage = "handshake"
        self.waits: tuple[bytes, int] = (b"", 0)
        self.received = 0
        self.numbers: dict[bytes, int] = {}
        self.inflater: Any = None

    def inflated(self, data: bytes) -> bytes:
        """A message that the server has compressed."""
        if self.inflater is None:
            self.inflater = zlib.decompressobj(-15)
        text: bytes = self.inflater.decompress(data + b"\0\0\xff\xff")
        return text


def masked(text: bytes, opcode: int = 1) -> bytes:
    length = len(text)
    head = bytes((0x80 | opcode, 0x80 | length))
    if length > 125:
        head = struct.pack("!BBH", 0x80 | opcode, 0xFE, length)
    return head + b"\0\0\0\0" + text


class Load:
    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.epoll.register(0, select.EPOLLIN)
        self.commands = b""
        self.reading: dict[int, Client] = {}
        self.stalled: list[Client] = []
        self.opened = 0
        self.ready = 0
        self.watching = False
        self.expected = 0  # of each client that reads
        self.total = 0  # of all of them
        self.merged = 0  # of these, those that came as part of a later one, which says so
        self.latencies: list[int] = []
        self.room = memoryview(bytearray(262_144))

    # --- commands --------------------------------------------------------------------------

    def command(self) -> dict[str, Any] | None:
        """The next command; the clients are served while it waits."""
        while b"\n" not in self.commands:
            for client, data, now in self.turn(30):
                self.take(client, data, now)
            if self.commands == b"" and self.closed:
                return None
        line, _, self.commands = self.commands.partition(b"\n")
        command: dict[str, Any] = json.loads(line)
        return command

    closed = False

    def connect(
        self,
        *,
        port: int,
        count: int,
        path: str,
        hello: Sequence[tuple[str, str, int]],
        tokens: Sequence[str] = (),
        deflate: bool = False,
        stalled: int = 0,
    ) -> None:
        """Connect `count` clients, each of which says hello.

        Args:
            hello: What is sent, with `TOKEN` in place of the client's own; what must come; how
                often.
            tokens: One for each client, where the hello has a token.
            stalled: How many of them read no more once they are ready.
        """
        target = self.opened + count
        first = self.opened
        while self.ready < target:
            while self.opened < target and self.opened - self.ready < AT_ONCE:
                index = self.opened - first
                token = tokens[index] if tokens else ""
                steps = deque(
                    (masked(said.replace("TOKEN", token).encode()) if said else b"", w.encode(), n)
                    for said, w, n in hello
                )
                self.start(port, path, steps, deflate, index < stalled)
            for client, data, now in self.turn(30):
                self.take(client, data, now)

    def start(self, port: int, path: str, steps: deque[Step], deflate: bool, stalled: bool) -> None:
        sock = socket.socket()
        if stalled:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STALLED_BUFFER)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, STALLED_SEGMENT)
        sock.connect(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = base64.b64encode(os.urandom(16)).decode()
        text = BROWSER.format(path=path, port=port, key=key, deflate=DEFLATE if deflate else "")
        sock.sendall(text.encode())
        sock.setblocking(False)
        client = Client(sock, steps)
        self.opened += 1
        self.reading[sock.fileno()] = client
        if stalled:
            self.stalled.append(client)
        self.epoll.register(sock.fileno(), select.EPOLLIN)

    def stall(self) -> None:
        """Those that were to stall read no more from now on."""
        for client in self.stalled:
            self.epoll.unregister(client.sock.fileno())
            del self.reading[client.sock.fileno()]

    def receive(
        self, messages: int, timeout_s: float, rest_s: float = 0.0, timed: bool = False
    ) -> dict[str, Any]:
        """Until each client that reads has `messages` more.

        Args:
            timeout_s: It is an error when they have not all come by then.
            rest_s: How long to leave a batch alone when its first message has come. A process that
                waits for each message is woken by each send, at the sender's cost, which no client
                at the other end of a network would be.
            timed: Note first when the messages came, and look at them when it is quiet, so that
                the latency is the server's and not this process's own.
        """
        self.expected += messages
        self.latencies = []
        self.merged = 0
        expected = self.expected * len(self.reading)
        until = time.monotonic() + timeout_s
        while self.total < expected:
            if rest_s:
                self.epoll.poll(1, 1)
                time.sleep(rest_s)
            came = self.turn(1)
            if timed:
                while more := self.turn(QUIET_S):
                    came += more
            for client, data, now in came:
                self.take(client, data, now)
            if time.monotonic() > until:
                return {"missing": expected - self.total}
        if self.total > expected or any(
            client.received != self.expected for client in self.reading.values()
        ):
            raise SystemExit("some clients received more than was published")
        answer: dict[str, Any] = {"merged": self.merged}
        return {**answer, "latencies": percentiles(self.latencies)} if timed else answer

    def watch(self, seconds: float) -> dict[str, Any]:
        """Take what comes for so long; how many pushes it was."""
        self.watching = True
        before, until = self.total, time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for client, data, now in self.turn(left):
                self.take(client, data, now)
        return {"pushes": self.total - before}

    def cut(self) -> None:
        for client in [*self.reading.values(), *self.stalled]:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sock.close()
        self.reading, self.stalled = {}, []
        self.opened = self.ready = self.total = self.expected = 0

    # --- the clients -----------------------------------------------------------------------

    def turn(self, timeout_s: float) -> list[tuple[Client, bytes, int]]:
        """What has come: the client, the bytes, and when."""
        came = []
        clock = time.monotonic_ns
        for descriptor, _ in self.epoll.poll(timeout_s, 8192):
            if descriptor == 0:
                text = os.read(0, 1 << 20)
                self.commands += text
                if not text:
                    self.closed = True
                    self.epoll.unregister(0)
                continue
            client = self.reading[descriptor]
            try:
                size = client.sock.recv_into(self.room)
            except BlockingIOError:
                continue
            except ConnectionError:
                size = 0
            if not size:
                raise SystemExit(f"the server has cut a client in stage {client.stage}")
            came.append((client, bytes(self.room[:size]), clock()))
        return came

    def take(self, client: Client, data: bytes, now: int) -> None:
        if client.buffer:
            data = client.buffer + data
        if client.stage == "handshake":
            end = data.find(b"\r\n\r\n")
            if end < 0:
                client.buffer = data
                return
            if not data.startswith(b"HTTP/1.1 101"):
                raise SystemExit(f"the handshake was answered with {data[:200]!r}")
            data = data[end + 4 :]
            client.stage = "hello"
            self.say(client)
        at, size = 0, len(data)
        while size - at >= 2:
            length, start = data[at + 1], at + 2
            if length == 126:
                start = at + 4
                length = int.from_bytes(data[at + 2 : start], "big")
            elif length == 127:
                start = at + 10
                length = int.from_bytes(data[at + 2 : start], "big")
            if size < start + length or size < start:
                break
            opcode = data[at]
            at = start + length
            if opcode in (0x81, 0xC1):
                payload = data[start:at] if opcode == 0x81 else client.inflated(data[start:at])
                if client.stage == "workload":
                    self.message(client, payload, now)
                else:
                    self.heard(client, payload)
            elif opcode == 0x89:
                client.sock.send(masked(data[start:at], 10))
            else:
                raise SystemExit(f"a client got the frame {data[at - length - 2 : at]!r}")
        client.buffer = data[at:]

    def say(self, client: Client) -> None:
        while client.hello:
            said, wanted, times = client.hello.popleft()
            if said:
                client.sock.sendall(said)
            if times:
                client.waits = (wanted, times)
                return
        client.stage = "workload"
        self.ready += 1

    def heard(self, client: Client, payload: bytes) -> None:
        wanted, times = client.waits
        if wanted in payload:
            client.waits = (wanted, times - 1)
            if times == 1:
                self.say(client)

    def message(self, client: Client, payload: bytes, now: int) -> None:
        found = MESSAGE.search(payload)
        if found is None:
            if payload == b"2":  # Engine.IO's ping
                client.sock.send(masked(b"3"))
            elif self.watching:
                self.push(client, payload)
            return
        symbol, number, at = found.groups()
        before = client.numbers.get(symbol, int(number) - 1)
        client.numbers[symbol] = int(number)
        steps = int(number) - before
        if steps != 1:
            merged = MERGED.search(payload)
            if merged is None or int(merged[1]) != steps:
                raise SystemExit(f"after {before} came {payload[:200]!r}")
            self.merged += steps - 1
        client.received += steps
        self.total += steps
        self.latencies.append(now - int(at))

    def push(self, client: Client, payload: bytes) -> None:
        found = PUSH.search(payload)
        if found is None:
            return
        channel, kind = found.groups()
        seq, prev, before = SEQ.search(payload), PREV.search(payload), client.numbers.get(channel)
        if seq is None or (kind == b"update" and prev is None):
            raise SystemExit(f"without a number: {payload[:200]!r}")
        if kind == b"update" and before is not None and prev and int(prev[1]) != before:
            raise SystemExit(f"after {before} came {payload[:200]!r}")
        client.numbers[channel] = int(seq[1])
        self.total += 1


def percentiles(values: list[int]) -> dict[str, float]:
    """In milliseconds."""
    values = sorted(values)
    shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    last = len(values) - 1
    return {
        name: values[min(last, int(len(values) * share))] / 1e6 for name, share in shares.items()
    }


def main() -> None:
    load = Load()
    while (command := load.command()) is not None:
        began = time.monotonic()
        answer = getattr(load, command.pop("do"))(**command) or {}
        answer["seconds"] = time.monotonic() - began
        answer["at"] = time.monotonic()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
