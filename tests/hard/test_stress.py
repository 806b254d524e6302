"""Raw writes, sends that wait, pongs and closes on one socket: every stream stays a valid one.

Tiny buffers force short writes at every turn. The bytes of each client are kept as they came, and
read afterwards by two parsers that share nothing with each other: `websockets` and wsproto.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import hypercorn.config
import hypercorn.trio
import pytest
import trio
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.protocol import OPEN
from websockets.uri import parse_uri
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Ping, Pong, TextMessage

from harness.frames import masked
from harness.handshakes import handshake
from harness.support import SECRET, token

from trading_push import Channel, JwtAuthenticator, PushService, open_push_service
from trading_push.endpoints.hypercorn import link as hypercorn_link
from trading_push.settings.schema import Auth
from trading_push.transport.push_stream import PushStream

CLIENTS = 40
BUFFER = 4096
CHANNELS = [Channel("events", "events", per_user=False), Channel("state", per_user=False)]
DEFLATE = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"


@asynccontextmanager
async def served(kind: str, service: PushService) -> AsyncIterator[int]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    port = listener.getsockname()[1]
    async with trio.open_nursery() as nursery:
        if kind == "native":
            listener.setblocking(False)
            accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
            nursery.start_soon(trio.serve_listeners, service.handle_stream, [accepting])
        else:
            hypercorn_link.install(service.limits)
            config = hypercorn.config.Config.from_mapping(
                {"bind": [f"fd://{listener.detach()}"], "errorlog": None}
            )
            serve = partial(hypercorn.trio.serve, service.asgi_app, config)
            await nursery.start(partial(serve, shutdown_trigger=trio.sleep_forever))
        yield port
        nursery.cancel_scope.cancel()


class Peer:
    """Reads in bits, stalls, pings, throttles and resubscribes, and keeps every byte."""

    def __init__(self, number: int) -> None:
        self.rng = random.Random(number)
        self.bytes = bytearray()
        self.pings = 0

    async def run(self, port: int, until: trio.Event) -> None:
        raw = trio.socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        await raw.connect(("127.0.0.1", port))
        stream = trio.SocketStream(raw)
        extra = (DEFLATE,) if self.rng.random() < 0.5 else ()
        await stream.send_all(handshake(*extra))
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await stream.receive_some(1)
        assert b"101" in head
        assert b"extensions" not in head.lower()
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(self._talk, stream, until)
            while data := await stream.receive_some(self.rng.randrange(1, 3000)):
                self.bytes += data
                if self.rng.random() < 0.02:
                    await trio.sleep(self.rng.random() / 20)
            nursery.cancel_scope.cancel()

    async def _talk(self, stream: trio.SocketStream, until: trio.Event) -> None:
        pace = self.rng.choice(({}, {"max_hz": 50}))
        requests: list[dict[str, Any]] = [
            {"op": "auth", "token": token(4)},
            {"op": "subscribe", "args": [{"channel": "events", **pace}, "state"]},
        ]
        for request in requests:
            await stream.send_all(masked(0x81, json.dumps(request).encode()))
        while not until.is_set():
            await stream.send_all(masked(0x89, b"p" * self.rng.randrange(100)))
            self.pings += 1
            with trio.move_on_after(self.rng.random() / 50):
                await until.wait()
        await stream.send_all(masked(0x88, b"\x0f\xa1bye"))


def by_wsproto(data: bytes) -> tuple[list[str], int, int | None]:
    connection = Connection(ConnectionType.CLIENT)
    connection.receive_data(data)
    texts, pongs, code, text = [], 0, None, ""
    for event in connection.events():
        assert code is None, "something follows the close frame"
        match event:
            case TextMessage():
                text += event.data
                if event.message_finished:
                    texts.append(text)
                    text = ""
            case Pong():
                pongs += 1
            case CloseConnection():
                code = event.code
            case Ping():
                raise AssertionError("the server sends no pings")
    return texts, pongs, code


def by_websockets(data: bytes) -> tuple[list[str], int, int | None]:
    protocol = ClientProtocol(parse_uri("ws://localhost/ws"), state=OPEN, max_size=None)
    protocol.receive_data(data)
    assert protocol.parser_exc is None
    texts, pongs, code = [], 0, None
    for frame in protocol.events_received():
        assert not any((frame.rsv1, frame.rsv2, frame.rsv3))
        if frame.opcode is Opcode.TEXT:
            texts.append(bytes(frame.data).decode())
        elif frame.opcode is Opcode.PONG:
            pongs += 1
        elif frame.opcode is Opcode.CLOSE:
            code = int.from_bytes(frame.data[:2], "big")
    return texts, pongs, code


@pytest.mark.parametrize("kind", ["linked", "native"])
async def test_every_stream_is_valid_complete_and_in_order(kind, monkeypatch):
    ways = {"raw": 0, "short": 0, "waited": 0}
    watch(monkeypatch, ways)
    rng = random.Random(1)
    ended = trio.Event()
    peers = [Peer(number) for number in range(CLIENTS)]
    async with (
        open_push_service(
            authenticate=JwtAuthenticator(Auth(), SECRET), channels=CHANNELS
        ) as service,
        served(kind, service) as port,
    ):
        await service.publish("events", [0, ""])
        await service.publish("state", [0, ""])
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(peer.run, port, ended)
                while service.statistics().ledger.subscriptions_opened < 2 * CLIENTS:
                    await trio.sleep(0.01)
                number = 0
                # Until every way has been taken often enough to show something.
                while number < 300 or min(ways.values()) < 20:
                    number += 1
                    assert number < 5000, ways
                    size = rng.choice((0, 50, 110, 500, 3000))
                    if rng.random() < 0.2:
                        # Into buffers that are empty again, more than they take: a short write.
                        await trio.sleep(0.02 + rng.random() / 20)
                        size = 9000
                    await service.publish_many(
                        [
                            ("events", [number, "x" * rng.choice((0, 50, size))], None),
                            ("state", [number, "x" * size], None),
                        ]
                    )
                await trio.sleep(1)  # what was throttled goes out
                ended.set()
        with trio.fail_after(10):
            while service.statistics().connections:
                await trio.sleep(0.01)
        assert service.statistics().ledger.balanced
    for peer in peers:
        texts, pongs, code = by_wsproto(bytes(peer.bytes))
        assert (texts, pongs, code) == by_websockets(bytes(peer.bytes))
        assert code == 4001
        assert 0 < pongs <= peer.pings
        check(texts, number + 1)


def check(texts: list[str], newest: int) -> None:
    """Each channel's chain of `seq` is whole, and each value is what was published."""
    last: dict[str, int] = {}
    for message in map(json.loads, texts):
        if "op" in message or message["type"] == "status":
            continue
        channel, seq = message["channel"], message["seq"]
        assert message["data"][0] == seq - 1
        assert set(message["data"][1]) <= {"x"}
        if message["type"] == "snapshot":
            if channel in last:
                assert message["dropped"] == seq - last[channel] - 1 > 0
        else:
            assert message["prev"] == last[channel]
            assert seq > last[channel]
            if channel == "events":
                assert seq == last[channel] + 1
            assert message.get("merged", 1) == seq - last[channel]
        last[channel] = seq
    assert last["state"] == newest, "the latest value has not come"


def watch(monkeypatch: pytest.MonkeyPatch, ways: dict[str, int]) -> None:
    originals = PushStream._aim, PushStream.flush_later, PushStream.send_frames

    def aim(self: PushStream) -> None:
        originals[0](self)
        write = self.write_now

        def counted(data: bytes) -> int:
            written = write(data)
            ways["raw"] += 1
            return written

        self.write_now = write and counted

    def flush_later(self: PushStream, rest: bytes) -> None:
        ways["short"] += 1
        originals[1](self, rest)

    async def send_frames(self: PushStream, frames: Any) -> None:
        ways["waited"] += 1
        await originals[2](self, frames)

    monkeypatch.setattr(PushStream, "_aim", aim)
    monkeypatch.setattr(PushStream, "flush_later", flush_later)
    monkeypatch.setattr(PushStream, "send_frames", send_frames)
