"""Thousands of raw WebSocket clients in one thread, each of which checks what it receives."""

from __future__ import annotations

import json
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from harness.embedded import Embedded
from harness.frames import masked
from harness.support import PATIENCE_S, token

HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
RESET = struct.pack("ii", 1, 0)
PUSH = re.compile(rb'"channel":"([^"]+)","type":"(snapshot|update)","epoch":"([^"]+)"')
PREV = re.compile(rb'"prev":(\d+)')
SEQ = re.compile(rb'"seq":(\d+)')
MERGED = re.compile(rb'"merged":(\d+)')

# So many at most come at the same time: the kernel's queue of a listener holds 4096.
AT_ONCE = 1000
# One that will not read asks for small segments and has a small buffer, so that it stalls soon.
SMALL_SEGMENT = 536
SMALL_BUFFER = 2304
# All clients come from one address.
MANY = {"unauthenticated_per_address": 20_000, "connections_per_user": 20_000}


def request(op: str, **fields: Any) -> bytes:
    return masked(0x81, json.dumps({"op": op, **fields}).encode())


class Member:
    """One client."""

    def __init__(self, crowd: Crowd, user: str, channels: Sequence[Any], reads: bool) -> None:
        self.crowd = crowd
        self.user = user
        self.channels = channels
        self.reads = reads
        self.buffer = b""
        self.handshaken = False
        self.ready = False
        self.rude = False
        """Whether it has said what it must not: then it is no fault to be refused."""
        self.pushes = 0
        self.merged = 0
        """How many values came in a later one only."""
        self.bytes = 0
        """Of the frames of all pushes."""
        self.last: dict[str, tuple[str, int]] = {}
        """The epoch and the sequence number of the last value of each channel."""
        self.faults: list[str] = []
        """Gaps, and what else must not be."""
        self.notice: dict[str, Any] | None = None
        self.close: int | None = None
        self.gone = False
        self.connect()

    def connect(self) -> None:
        """Come, or come back with `since`."""
        self.buffer, self.handshaken, self.ready = b"", False, False
        self.notice, self.close, self.gone = None, None, False
        self.socket = socket.socket()
        if not self.reads:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        self.socket.setblocking(False)
        self.socket.connect_ex(("127.0.0.1", self.crowd.port))
        self.crowd.watch(self, select.EPOLLOUT)

    def greet(self) -> None:
        self.socket.send(HANDSHAKE)
        self.crowd.rewatch(self, select.EPOLLIN)

    def subscribe(self) -> None:
        args = []
        for channel in self.channels:
            since = self.last.get(channel)
            args.append(
                channel
                if since is None
                else {"channel": channel, "since": {"epoch": since[0], "seq": since[1]}}
            )
        said = [request("auth", token=self.crowd.token(self.user))]
        self.socket.send(b"".join([*said, request("subscribe", args=args)]))

    def say(self, data: bytes) -> None:
        """Send bytes, if they fit and the server is still there."""
        with suppress(OSError):
            self.socket.send(data)

    def take(self) -> None:
        """Read what has come."""
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.leave()
            return
        data = self.buffer + data
        if not self.handshaken:
            head, found, rest = data.partition(b"\r\n\r\n")
            if not found:
                self.buffer = data
                return
            assert head.startswith(b"HTTP/1.1 101"), head
            self.handshaken = True
            self.subscribe()
            data = rest
        at = 0
        while len(data) - at >= 2:
            length, start = data[at + 1], at + 2
            if length > 125:
                width = 2 if length == 126 else 8
                length = int.from_bytes(data[start : start + width], "big")
                start += width
            if len(data) < start + length:
                break
            self.frame(data[at], data[start : start + length])
            at = start + length
        self.buffer = data[at:]

    def frame(self, head: bytes | int, payload: bytes) -> None:
        if head == 0x89:
            self.say(masked(0x8A, payload))
        elif head == 0x88:
            self.close = int.from_bytes(payload[:2], "big")
            self.say(masked(0x88, payload))
        elif head != 0x81:
            self.faults.append(f"the frame {head!r} {payload[:50]!r}")
        elif (push := PUSH.search(payload)) is not None:
            self.bytes += len(payload) + (2 if len(payload) < 126 else 4)
            self.push(push, payload)
        elif b'"op":' in payload[:10]:
            self.reply(json.loads(payload))

    def push(self, push: re.Match[bytes], payload: bytes) -> None:
        channel, epoch = push[1].decode(), push[3].decode()
        number = SEQ.search(payload)
        assert number is not None
        seq = int(number[1])
        last = self.last.get(channel)
        if push[2] == b"update":
            prev = PREV.search(payload)
            if prev is None or last is None or (epoch, int(prev[1])) != last:
                self.faults.append(f"{payload[:150]!r} after {last}")
            elif seq != last[1] + 1 and b'"merged":' not in payload:
                self.faults.append(f"{last[1]} to {seq} in {payload[:150]!r}")
        if (merged := MERGED.search(payload)) is not None:
            self.merged += int(merged[1]) - 1
        self.last[channel] = epoch, seq
        self.pushes += 1

    def reply(self, message: dict[str, Any]) -> None:
        if message["op"] == "notice":
            self.notice = message
        elif not message["ok"]:
            self.faults.append(str(message))
        elif message["op"] == "subscribe":
            self.ready = True
            if not self.reads:
                self.crowd.forget(self)

    def reset(self) -> None:
        """Gone at once, by RST."""
        if not self.gone:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.leave()

    def leave(self) -> None:
        """Gone, by FIN."""
        if not self.gone:
            self.gone = True
            self.crowd.forget(self)
            self.socket.close()


class Crowd:
    """Clients of a server on this machine; leaves with the `with` block."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.members: list[Member] = []
        self._epoll = select.epoll()
        self._watched: dict[int, Member] = {}
        self._tokens: dict[str, str] = {}

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *error: object) -> None:
        for member in self.members:
            member.leave()
        self._epoll.close()

    def token(self, user: str) -> str:
        return self._tokens.setdefault(user, token(user))

    def watch(self, member: Member, events: int) -> None:
        self._watched[member.socket.fileno()] = member
        self._epoll.register(member.socket.fileno(), events)

    def rewatch(self, member: Member, events: int) -> None:
        self._epoll.modify(member.socket.fileno(), events)

    def forget(self, member: Member) -> None:
        descriptor = member.socket.fileno()
        if self._watched.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def turn(self, timeout_s: float = 0.1) -> None:
        """Take what has come."""
        for descriptor, events in self._epoll.poll(timeout_s, 8192):
            member = self._watched.get(descriptor)
            if member is None:
                continue
            if events & select.EPOLLOUT and not events & (select.EPOLLHUP | select.EPOLLERR):
                member.greet()
            else:
                member.take()

    def until(self, what: Callable[[], Any], why: str, patience_s: float = PATIENCE_S) -> None:
        """Go on reading until it is so."""
        deadline = time.monotonic() + patience_s
        while not what():
            self.turn()
            assert time.monotonic() < deadline, why

    def during(self, seconds: float) -> None:
        """Go on reading for so long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.turn(left)

    def add(self, user: str, *channels: Any, reads: bool = True) -> Member:
        """One more begins to come."""
        member = Member(self, user, channels, reads)
        self.members.append(member)
        return member

    def join(self, count: int, *channels: Any, reads: bool = True, users: int = 0) -> list[Member]:
        """So many clients come and subscribe; each of a user of its own, or of so many users."""
        first = len(self.members)
        for number in range(count):
            self.add(str(number % users if users else first + number), *channels, reads=reads)
            if number % AT_ONCE == AT_ONCE - 1:
                coming = self.members[first:]
                self.until(lambda each=coming: all(m.ready for m in each), "not all are there", 60)
        joined = self.members[first:]
        self.until(lambda: all(member.ready for member in joined), "not all are subscribed", 120)
        return joined


def faults(members: Sequence[Member]) -> list[str]:
    return [fault for member in members for fault in member.faults]


def limits(**more: float) -> str:
    """For the flag `--limits`: those that let a crowd in, and more."""
    return json.dumps({**MANY, **more})


def at_rest(server: Embedded, connections: int = 0) -> dict:
    """What the server sees inside itself once so many connections are left."""
    return server.look_until(
        lambda seen: (
            seen["connections"] == connections
            and (connections or (seen["balanced"] and seen["users_online"] == 0))
        ),
        f"{connections} connections",
    )
