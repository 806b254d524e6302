"""What carries the random client's messages, and drives many of them against one service."""

from __future__ import annotations

import json
import math
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import attrs
import trio

from harness.frames import masked
from harness.handshakes import handshake
from harness.random_client import (
    Broken,
    Journal,
    Leave,
    Model,
    RandomClient,
    Rules,
    Say,
    Token,
    Wait,
)

from trading_push import Principal, PushService
from trading_push.connections.connection import Connection
from trading_push.connections.opening import NOTHING_TOLD, Opening
from trading_push.testing import MemoryTransport

BUFFER = 4096
RUBBISH = [
    b"\x83\x80\x00\x00\x00\x00",  # a reserved opcode
    b"\xc1\x80\x00\x00\x00\x00",  # a reserved bit
    b"\x81\x05hello",  # unmasked
    b"\x81\x82\x00\x00\x00\x00\xff\xfe",  # no UTF-8
    b"\x81\x85\x00",  # half a frame, and then others
]


class Refused(Exception):
    """The handshake was answered with something else than 101."""


class Wire(Protocol):
    """One connection, as its client drives it."""

    async def run(self, model: Model) -> None:
        """Carry until the end, of which the model is told."""
        ...

    def say(self, message: str | bytes) -> None: ...

    def read(self, reads: bool) -> None:
        """Go on reading, or stop."""
        ...

    def leave(self, step: Leave) -> None: ...


class MemoryWire:
    """`trading_push.testing`'s peer."""

    def __init__(self, service: PushService, direct: bool, greeted: Token | None) -> None:
        self.transport = MemoryTransport(direct=direct, send_timeout_s=3, pinged=True)
        opening = NOTHING_TOLD
        if greeted is not None:
            opening = Opening(Principal(greeted.user, token_id=greeted.name))
        self._seat = service.context.seats.take()
        self._connection = Connection(service.context, self.transport, self._seat, opening)
        self._alive = True
        self._rude = False

    async def run(self, model: Model) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, model)
            nursery.start_soon(self._answer_pings)
            try:
                await self._connection.run()
            finally:
                self._seat.leave()
            nursery.cancel_scope.cancel()
        while self.transport.sent:
            [message] = await self.transport.next()
            model.receive(message, None, trio.current_time())
        closed = self.transport.closed_with
        came = self.transport.peer_close
        code = int(closed[0]) if closed is not None else came and came.code
        model.end(code, trio.current_time())

    async def _read(self, model: Model) -> None:
        while self.transport.closed_with is None:
            try:
                [message] = await self.transport.next()
            except AssertionError:  # which only says that it has closed
                break
            model.receive(message, None, trio.current_time())

    async def _answer_pings(self) -> None:
        while True:
            await trio.sleep(1)
            if self._alive:
                self.transport.last_heard = trio.current_time()

    def say(self, message: str | bytes) -> None:
        with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            self.transport.say_text(message)

    def read(self, reads: bool) -> None:
        if reads:
            self.transport.reading.set()
        else:
            self.transport.reading = trio.Event()

    def leave(self, step: Leave) -> None:
        match step.how:
            case "dead":
                self._alive = False
            case "binary":
                self.say(b"binary")
            case "close":
                self.transport.leave(step.code)
            case _:
                self.transport.leave()


class SocketWire:
    """A raw WebSocket that may stop reading, break its frames, and fall silent."""

    def __init__(self, stream: trio.SocketStream, dice: Any, bearer: str | None = None) -> None:
        self._stream = stream
        self._dice = dice
        self._bearer = bearer
        self._post, self._outbox = trio.open_memory_channel[bytes](math.inf)
        self._reading = trio.Event()
        self._reading.set()
        self._alive = True
        self._silent = trio.Event()
        self._left = False

    async def run(self, model: Model) -> None:
        async with self._stream, trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            code = await self._read(model)
            nursery.cancel_scope.cancel()
        model.end(code, trio.current_time())

    async def greet(self) -> None:
        """The handshake."""
        extra = () if self._bearer is None else (b"Authorization: Bearer " + self._bearer.encode(),)
        await self._stream.send_all(handshake(*extra))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            some = await self._stream.receive_some(1)
            if not some:
                raise Refused("no answer")
            head += some
        if not head.startswith(b"HTTP/1.1 101"):
            raise Refused(head[:100].decode())

    async def _write(self) -> None:
        async for data in self._outbox:
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def _read(self, model: Model) -> int | None:
        buffer = bytearray()
        while True:
            await self._reading.wait()
            try:
                data = await self._stream.receive_some(self._dice.choice((100, 4000, 65536)))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return None
            if not data:
                return None
            buffer += data
            at = 0
            while (end := self._frame_end(buffer, at)) is not None:
                code = self._frame(model, buffer[at], bytes(buffer[end[0] : end[1]]))
                if code is not None:
                    rest = buffer[end[1] :]
                    if rest:
                        raise Broken("something follows the close", f"{bytes(rest[:100])!r}")
                    return code
                at = end[1]
            del buffer[:at]

    @staticmethod
    def _frame_end(buffer: bytearray, at: int) -> tuple[int, int] | None:
        if len(buffer) - at < 2:
            return None
        length, start = buffer[at + 1], at + 2
        if length > 125:
            width = 2 if length == 126 else 8
            if len(buffer) < start + width:
                return None
            length = int.from_bytes(buffer[start : start + width], "big")
            start += width
        return (start, start + length) if len(buffer) >= start + length else None

    def _frame(self, model: Model, head: int, payload: bytes) -> int | None:
        match head:
            case 0x81:
                message = json.loads(payload)
                _, found, data = payload.partition(b'"data":')
                model.receive(message, data[:-1] if found else None, trio.current_time())
            case 0x89:
                if self._alive:
                    self._put(masked(0x8A, payload))
                    model.heard_at = trio.current_time()
            case 0x88:
                self._put(masked(0x88, payload[:2]))
                return int.from_bytes(payload[:2], "big") if payload else 1005
            case 0x8A:
                if payload != b"are you there":
                    raise Broken("another pong", repr(payload))
            case _:
                raise Broken("a frame of no known form", f"{head:#x} {payload[:100]!r}")
        return None

    def _put(self, data: bytes) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._post.send_nowait(data)

    def say(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            self._put(masked(0x82, message))
            return
        payload = message.encode()
        if self._dice.random() < 0.05:  # in two frames, with a ping between
            middle = len(payload) // 2
            self._put(masked(0x01, payload[:middle]))
            self._put(masked(0x89, b"are you there"))
            self._put(masked(0x80, payload[middle:]))
        else:
            self._put(masked(0x81, payload))

    def read(self, reads: bool) -> None:
        if reads:
            self._reading.set()
        else:
            self._reading = trio.Event()

    def leave(self, step: Leave) -> None:
        match step.how:
            case "dead":
                self._alive = False
            case "binary":
                self.say(b"binary")
            case "close":
                assert step.code is not None
                self._put(masked(0x88, step.code.to_bytes(2, "big") + b"bye"))
            case "rubbish":
                self._put(self._dice.choice(RUBBISH) + masked(0x81, b"more"))
            case "eof":
                with suppress(OSError):
                    self._stream.socket.shutdown(socket.SHUT_WR)
            case "drop":
                self._stream.socket.close()


def socket_pair(
    service: PushService, nursery: trio.Nursery, *, small: bool = True
) -> trio.SocketStream:
    """A stream to the native endpoint, over buffers that may be so small that writes are short."""
    ours, theirs = socket.socketpair()
    if small:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    served = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    nursery.start_soon(service.handle_stream, served)
    return trio.SocketStream(trio.socket.from_stdlib_socket(ours))


async def tcp(port: int, small: bool) -> trio.SocketStream:
    """A TCP connection, whose buffer may be so small that a stall is soon felt."""
    raw = trio.socket.socket()
    if small:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    await raw.connect(("127.0.0.1", port))
    return trio.SocketStream(raw)


@attrs.define(eq=False)
class Visitor:
    """One random client and the connection that it has now."""

    client: RandomClient
    drive: Drive
    model: Model | None = None

    async def run(self) -> None:
        """Come, stay, go, and come back, until the drive is over."""
        while not self.drive.over:
            with collected(self.drive.faults):
                try:
                    await self._visit()
                except* Refused:
                    self.drive.counts["refused handshakes"] += 1
                except* (OSError, trio.BrokenResourceError):
                    self.drive.counts["connections that failed"] += 1
            self.model = None
            await trio.sleep(self.client.rng.choice((0, 0.01, 0.3, 1.5, 4)))

    async def _visit(self) -> None:
        drive, rng = self.drive, self.client.rng
        greeted = rng.random() < 0.15
        model = self.client.begin(drive.rules, drive.journal, trio.current_time(), greeted=greeted)
        wire = await drive.open_wire(self.client, model)
        model.began = trio.current_time()
        self.model = model
        drive.visits += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._act, model, wire)
                nursery.start_soon(self._watch, model)
                await wire.run(model)
                nursery.cancel_scope.cancel()
        finally:
            self.client.remember()
            drive.counts.update(model.counts)

    async def _act(self, model: Model, wire: Wire) -> None:
        client = self.client
        while True:
            now = trio.current_time()
            if self.drive.over:
                step: Any = Leave("close", 1000)
            elif self.drive.is_calm():
                step = client.calm(now)
            else:
                step = client.decide(now)
            match step:
                case Say(messages=messages):
                    for message in messages:
                        wire.say(message)
                        await trio.lowlevel.checkpoint()
                    if self.drive.is_calm():
                        await trio.sleep(1)
                case Wait(seconds=seconds, stall=False):
                    await trio.sleep_until(self.drive.moment(now + seconds))
                case Wait(seconds=seconds):
                    model.stall(now)
                    wire.read(False)
                    await trio.sleep(seconds)
                    model.resume(trio.current_time())
                    wire.read(True)
                case Leave(how=how, code=code):
                    model.leave(how, now, code)
                    if how == "binary":
                        model.condemn(1003, now, surely=True)
                    wire.leave(step)
                    return

    async def _watch(self, model: Model) -> None:
        while True:
            await trio.sleep(0.25)
            now = trio.current_time()
            model.overdue(now)
            self.drive.compare(model, now)


@attrs.define(eq=False)
class Drive:
    """Many visitors at one service, and what they have found."""

    rules: Rules
    journal: Journal
    open_wire: Callable[[RandomClient, Model], Any]
    is_calm: Callable[[], bool] = lambda: False
    compare: Callable[[Model, float], None] = lambda model, now: None
    """Compares what a client knows with what there is."""
    moment: Callable[[float], float] = lambda at: at
    """When that is done which is to be done at some time."""
    over: bool = False
    visits: int = 0
    counts: Counter[str] = attrs.field(factory=Counter)
    faults: list[Broken] = attrs.field(factory=list)
    visitors: list[Visitor] = attrs.field(factory=list)

    def start(self, nursery: trio.Nursery, seed: int, clients: int, pace_s: float) -> None:
        for number in range(clients):
            visitor = Visitor(RandomClient(seed, number, pace_s=pace_s), self)
            self.visitors.append(visitor)
            nursery.start_soon(visitor.run)

    @property
    def models(self) -> list[Model]:
        """The models of those who are connected."""
        found = [visitor.model for visitor in self.visitors]
        return [model for model in found if model is not None and not model.ended]

    def account(self) -> str:
        """What was found."""
        return account(self.faults)


@contextmanager
def collected(faults: list[Broken]) -> Iterator[None]:
    """Collect what is found broken, instead of raising it."""

    def take(errors: BaseExceptionGroup[Broken]) -> None:
        for error in errors.exceptions:
            if isinstance(error, BaseExceptionGroup):
                take(error)
            else:
                faults.append(error)

    try:
        yield
    except* Broken as errors:
        take(errors)


def account(faults: Sequence[Broken]) -> str:
    """What was found: how often each rule was broken, and the first time in full."""
    rules = Counter(fault.rule for fault in faults)
    first = {fault.rule: fault for fault in reversed(faults)}
    lines = [f"{count} times: {rule}" for rule, count in rules.most_common()]
    return "\n\n".join(["\n".join(lines), *map(str, first.values())])
