"""Healthy clients that read all the time while others misbehave, and a peer of raw bytes."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import operator
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from websockets.exceptions import ConnectionClosedOK

from harness.endpoints import Endpoint
from harness.frames import masked
from harness.handshakes import handshake
from harness.support import PATIENCE_S, Client, client, token, until

from trading_push import Channel

HEALTHY = 10
NEWS = Channel("news", "events", per_user=False)
"""Every value of it is delivered, so that a lost one is seen."""
PERIOD_S = 0.01


def show_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of what was logged is a trace, or an error of ours."""
    records = caplog.get_records("call")
    assert not [record for record in records if record.exc_info]
    assert not [record for record in records if record.levelno >= logging.ERROR]
    lines = [record.getMessage() for record in records]
    assert not [line for line in lines if "Traceback" in line]
    # Behind the handshake nothing is so broken that it takes the firewall to stop it.
    assert not [line for line in lines if "已拦截异常连接" in line]


class Bystanders:
    """Ten healthy clients, and how far each of them has read."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._published = 0
        self.read = [0] * HEALTHY
        self.updated: set[int] = set()
        """Who has been sent an update: the snapshot comes before the server has begun to send."""

    async def publish(self) -> None:
        """Something new, a hundred times a second."""
        while True:
            self._published += 1
            await self._endpoint.service.publish("news", self._published)
            await trio.sleep(PERIOD_S)

    async def stay(self, number: int) -> None:
        """One client: it reads each value, without a gap."""
        last = None
        async with self._endpoint.connect(f"healthy {number}", "news") as client:
            while True:
                push = await client.push()
                if push["type"] != "status":
                    assert push.get("prev") == last, push
                    assert "dropped" not in push
                    assert push["data"] == push["seq"]
                    self.read[number] = last = push["seq"]
                if push["type"] == "update":
                    self.updated.add(number)

    async def caught_up(self) -> None:
        """Each has read what is published by now."""
        goal = self._published
        await until(lambda: min(self.read) >= goal)


@asynccontextmanager
async def bystanders(endpoint: Endpoint) -> AsyncIterator[None]:
    """Ten clients that get every value meanwhile, and afterwards; nobody else is connected then.

    The endpoint has the channel `NEWS`. No task of anybody else's is left either.
    """
    here = Bystanders(endpoint)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.publish)
        for number in range(HEALTHY):
            nursery.start_soon(here.stay, number)
        await until(lambda: len(here.updated) == HEALTHY)
        tasks = trio.lowlevel.current_statistics().tasks_living
        yield
        await until(lambda: endpoint.service.statistics().connections == HEALTHY)
        await until(lambda: trio.lowlevel.current_statistics().tasks_living <= tasks)
        await here.caught_up()
        nursery.cancel_scope.cancel()


# --- a peer that sends raw bytes -----------------------------------------------------------------

_users = itertools.count()


def said(**request: Any) -> bytes:
    """A request as a frame."""
    return masked(0x81, json.dumps(request).encode())


def admission(*channels: str) -> bytes:
    """The frames of a client that authenticates and subscribes."""
    # Each is another user, who may have only so many connections.
    return said(op="auth", token=token(next(_users))) + said(op="subscribe", args=list(channels))


def frames_of(answer: bytes) -> Iterator[tuple[int, bytes]]:
    """The whole frames of a server: the opcode and the payload of each."""
    while len(answer) >= 2:
        opcode, size, start = answer[0] & 0x0F, answer[1], 2
        if size >= 126:
            start = 4 if size == 126 else 10
            size = int.from_bytes(answer[2:start], "big")
        if len(answer) < start + size:
            return
        yield opcode, answer[start : start + size]
        answer = answer[start + size :]


def close_code(answer: bytes) -> int | None:
    """The code of the close frame, after which nothing comes; None without one."""
    found = list(frames_of(answer))
    closes = [payload for opcode, payload in found if opcode == 8]
    assert len(closes) <= 1
    if not closes:
        return None
    assert found[-1][0] == 8, found
    return int.from_bytes(closes[0][:2], "big")


class RawPeer:
    """A client that sends what it likes."""

    def __init__(self, stream: trio.SocketStream, answer: bytes) -> None:
        self.stream = stream
        self.upgrade, _, rest = answer.partition(b"\r\n\r\n")
        self._unread = rest

    async def send(self, data: bytes) -> None:
        """Send, unless the server has gone."""
        with suppress(trio.BrokenResourceError):
            await self.stream.send_all(data)

    async def leave(self) -> None:
        """The end of what it sends."""
        with suppress(trio.BrokenResourceError):
            await self.stream.send_eof()

    async def some(self) -> bytes:
        """What comes next; b"" at the end, also at a reset."""
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        try:
            return await self.stream.receive_some()
        except trio.BrokenResourceError:
            return b""

    async def rest(self) -> bytes:
        """Everything until the server closes."""
        answer = b""
        with trio.fail_after(PATIENCE_S):
            while data := await self.some():
                answer += data
        return answer

    async def until(self, what: Any) -> bytes:
        """What has come when `what` is true of its frames."""
        answer = b""
        with trio.fail_after(PATIENCE_S):
            while not what(list(frames_of(answer))):
                data = await self.some()
                assert data, answer
                answer += data
        return answer

    def reset(self) -> None:
        """Go by RST."""
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()


@asynccontextmanager
async def raw_peer(port: int, *headers: bytes) -> AsyncIterator[RawPeer]:
    """A peer whose handshake is done."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    try:
        await stream.send_all(handshake(*headers))
        answer = b""
        while b"\r\n\r\n" not in answer:
            data = await stream.receive_some()
            assert data, answer
            answer += data
        assert answer.startswith(b"HTTP/1.1 101"), answer
        yield RawPeer(stream, answer)
    finally:
        stream.socket.close()


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
