"""The stream below an endpoint: whole frames in order, a deadline on each send, the close."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.frame_protocol import FrameProtocol

from trading_push.errors import SendTimeout, TransportClosed
from trading_push.protocol import frames
from trading_push.transport.base import try_write
from trading_push.transport.push_stream import PushStream


@asynccontextmanager
async def pair(
    send_timeout_s: float = 5, buffer_bytes: int = 4096
) -> AsyncIterator[tuple[PushStream, trio.SocketStream, trio.Nursery]]:
    """A PushStream and its peer over real TCP, with small buffers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.socket()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        near.connect(server.getsockname())
        far, _ = server.accept()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    ours = trio.SocketStream(trio.socket.from_stdlib_socket(far))
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(near))
    async with peer, trio.open_nursery() as nursery:
        stream = PushStream(ours, send_timeout_s, 1)
        stream.start(nursery)
        yield stream, peer, nursery
        nursery.cancel_scope.cancel()
        stream.abort()


class Reader:
    """Reads a WebSocket's bytes as a client does; anything that is not a valid stream raises."""

    def __init__(self, peer: trio.SocketStream) -> None:
        self._peer = peer
        self._protocol = Connection(ConnectionType.CLIENT)
        self._text = ""
        self.messages: list[str] = []
        self.pongs = 0
        self.close: int | None = None
        self.news = trio.Event()

    async def run(self, rng: random.Random, most: int = 3000) -> None:
        while data := await self._peer.receive_some(rng.randrange(1, most)):
            assert self.close is None, "bytes after the close frame"
            self._protocol.receive_data(data)
            for event in self._protocol.events():
                match event:
                    case TextMessage():
                        self._text += event.data
                        if event.message_finished:
                            self.messages.append(self._text)
                            self._text = ""
                    case Pong():
                        self.pongs += 1
                    case CloseConnection():
                        assert event.code == 1000, event.reason
                        self.close = event.code
                    case BytesMessage() | Ping():
                        raise AssertionError(event)
            self.news.set()
            self.news = trio.Event()
            if rng.random() < 0.05:
                await trio.sleep(rng.random() / 100)  # stalls, so that writes come up short

    async def wait_for(self, count: int) -> None:
        with trio.fail_after(30):
            while len(self.messages) < count:
                await self.news.wait()


def message(number: int, size: int) -> bytes:
    return frames.frame(f"{number}:".encode() + b"x" * size)


async def test_frames_of_many_senders_arrive_whole_and_in_order():
    rng = random.Random(7)
    count = 3000
    async with pair() as (stream, peer, nursery):
        reader = Reader(peer)
        nursery.start_soon(reader.run, rng)
        server = FrameProtocol(client=False, extensions=[])
        raw = sent = 0

        async def pongs() -> None:
            # As Hypercorn's own: they may stand between frames, never within one.
            while True:
                await stream.send_all(server.pong(b"p" * rng.randrange(100)))
                await trio.sleep(rng.random() / 500)

        nursery.start_soon(pongs)
        while sent < count:
            batch = [message(sent + i, rng.choice((0, 100, 200, 5000))) for i in range(3)]
            if try_write(stream, b"".join(batch)):
                raw += 1
            else:
                await stream.send_frames(batch)
            sent += 3
            if rng.random() < 0.2:
                await trio.lowlevel.checkpoint()
        await reader.wait_for(count)
        numbers = [int(text.split(":")[0]) for text in reader.messages]
        assert numbers == list(range(count))
        assert reader.pongs > 0
        # Both ways were taken, or this has shown nothing.
        assert 100 < raw < count / 3


async def test_nothing_of_ours_follows_a_close():
    async with pair() as (stream, peer, nursery):
        reader = Reader(peer)
        assert try_write(stream, message(0, 10))
        blocked = 0
        while try_write(stream, message(1, 2000)):
            blocked += 1
        server = FrameProtocol(client=False, extensions=[])
        waiting: list[str] = []

        async def late() -> None:
            try:
                await stream.send_frames([message(2, 10)])
            except TransportClosed:
                waiting.append("refused")

        nursery.start_soon(stream.send_all, server.close(1000, "bye"))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(late)  # waits for its turn, behind the close frame
        await trio.testing.wait_all_tasks_blocked()
        assert not try_write(stream, message(3, 1))
        nursery.start_soon(reader.run, random.Random(1))
        with trio.fail_after(10):
            while reader.close is None or not waiting:
                await trio.sleep(0.01)
        assert waiting == ["refused"]
        with pytest.raises(TransportClosed):
            await stream.send_frames([message(4, 1)])
        assert reader.messages[-1].startswith("1:")


async def fill(stream: PushStream) -> None:
    # Far more than the buffers take: what the write leaves over is being flushed from now on.
    assert try_write(stream, message(0, 1_000_000))
    await trio.testing.wait_all_tasks_blocked()


async def test_a_send_that_is_not_taken_meets_its_deadline():
    async with pair(send_timeout_s=0.3) as (stream, _, _):
        await fill(stream)
        began = trio.current_time()
        with pytest.raises(SendTimeout):
            await stream.send_frames([message(1, 10)])
        assert 0.25 < trio.current_time() - began < 2
        assert stream.timed_out
        # What Hypercorn sees, even inside its shield: an error that it knows, and soon.
        with trio.CancelScope(shield=True), pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")


async def test_waiting_for_a_turn_counts_against_the_deadline():
    async with pair(send_timeout_s=0.3) as (stream, _, nursery):
        await fill(stream)
        outcomes: list[str] = []

        async def send() -> None:
            try:
                await stream.send_frames([message(1, 10)])
            except TransportClosed as error:
                outcomes.append(type(error).__name__)

        began = trio.current_time()
        for _ in range(5):
            nursery.start_soon(send)
        with trio.fail_after(5):
            while len(outcomes) < 5:
                await trio.sleep(0.01)
        assert trio.current_time() - began < 2
        assert outcomes == ["SendTimeout"] * 5


async def test_a_cancelled_wait_for_a_turn_writes_nothing():
    async with pair() as (stream, peer, nursery):
        await fill(stream)
        nursery.start_soon(stream.send_frames, [message(1, 10)])
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.05) as scope:
            await stream.send_frames([message(2, 10)])
        assert scope.cancelled_caught
        reader = Reader(peer)
        nursery.start_soon(reader.run, random.Random(1))
        with trio.fail_after(10):
            while not reader.messages or not reader.messages[-1].startswith("1:"):
                await trio.sleep(0.01)
        await stream.send_frames([message(3, 10)])
        with trio.fail_after(10):
            while not reader.messages[-1].startswith("3:"):
                await trio.sleep(0.01)
        assert not any(text.startswith("2:") for text in reader.messages)


async def test_a_cancelled_write_is_finished_first():
    async with pair() as (stream, peer, nursery):
        scope = trio.CancelScope()
        done = trio.Event()

        async def send() -> None:
            with scope:
                await stream.send_frames([message(1, 1_000_000)])
            done.set()

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert not done.is_set()
        reader = Reader(peer)
        nursery.start_soon(reader.run, random.Random(1), 100_000)
        await reader.wait_for(1)
        with trio.fail_after(10):
            await done.wait()
        assert reader.messages[0].startswith("1:")


async def test_hurry_shortens_a_write_that_is_under_way():
    async with pair(send_timeout_s=30) as (stream, _, nursery):
        await fill(stream)
        ended = trio.Event()

        async def send() -> None:
            with pytest.raises(TransportClosed):
                await stream.send_frames([message(1, 10)])
            ended.set()

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        stream.shorten_deadline(0.1)
        with trio.fail_after(2):
            await ended.wait()


async def test_a_closed_streams_descriptor_is_never_written_to():
    async with pair() as (stream, _, _):
        read, write = os.pipe()
        descriptor = stream.socket.fileno()
        stream.socket.close()  # below the stream, whose seal would hide a descriptor that is kept
        try:
            # Whoever opens something next gets the number of the one that was closed.
            os.dup2(write, descriptor)
            assert not try_write(stream, message(1, 10))
            with pytest.raises(TransportClosed):
                await stream.send_frames([message(1, 10)])
            os.set_blocking(read, False)
            with pytest.raises(BlockingIOError):
                os.read(read, 1)
        finally:
            for each in (read, write, descriptor):
                os.close(each)


async def test_while_a_send_is_under_way_eof_is_refused_as_hypercorn_expects():
    async with pair() as (stream, _, nursery):
        await fill(stream)
        nursery.start_soon(stream.send_frames, [message(1, 10)])
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await stream.send_eof()
        with pytest.raises(trio.BusyResourceError):
            await stream.wait_send_all_might_not_block()


async def test_what_is_heard_is_timed_and_the_end_is_told_once():
    ended: list[float] = []
    async with pair() as (stream, peer, _):
        stream._on_end = lambda: ended.append(trio.current_time())
        before = stream.last_heard
        await trio.sleep(0.01)
        await peer.send_all(b"x")
        assert await stream.receive_some() == b"x"
        assert stream.last_heard > before
        await peer.send_eof()
        assert await stream.receive_some() == b""
        assert await stream.receive_some() == b""
        assert len(ended) == 1


async def test_a_rest_that_nobody_is_left_to_send_ends_the_stream_and_raises_nothing():
    async with pair() as (stream, peer, _):
        async with trio.open_nursery() as ended:
            stream.start(ended)
        stream.flush_later(b"rest")
        assert stream.ended
        assert stream.write_now is None
        with trio.fail_after(5), pytest.raises(TransportClosed):
            await stream.send_frames([b"more"])
        assert await peer.receive_some() == b""
