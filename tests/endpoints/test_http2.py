"""WebSockets over HTTP/2 (RFC 8441): what does not depend on raw writes holds there too."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import pytest
import trio
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Message, TextMessage

from harness.support import SECRET, hypercorn_serving, token

from trading_push import JwtAuthenticator, PushService, open_push_service
from trading_push.endpoints.hypercorn.server import guard
from trading_push.settings.schema import Auth, Limits, Settings

STREAM = 1


class Client:
    """One WebSocket on one HTTP/2 connection with prior knowledge."""

    def __init__(self, stream: trio.SocketStream, window: int | None) -> None:
        self._stream = stream
        config = h2.config.H2Configuration(client_side=True, header_encoding=None)
        self._http = h2.connection.H2Connection(config)
        self._websocket = Connection(ConnectionType.CLIENT)
        self._open_window = window is None
        if window is not None:
            self._http.local_settings.update({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self._text = ""
        self.status: int | None = None
        self.messages: list[dict[str, Any]] = []
        self.close: tuple[int, str] | None = None
        self.ended = False

    async def handshake(self) -> None:
        self._http.initiate_connection()
        self._http.send_headers(
            STREAM,
            [
                (b":method", b"CONNECT"),
                (b":protocol", b"websocket"),
                (b":scheme", b"http"),
                (b":authority", b"localhost"),
                (b":path", b"/ws"),
                (b"sec-websocket-version", b"13"),
                (b"sec-websocket-extensions", b"permessage-deflate"),
            ],
        )
        await self._flush()
        while self.status is None:
            await self.read()

    async def _flush(self) -> None:
        await self._stream.send_all(self._http.data_to_send())

    async def say(self, op: str, **fields: Any) -> None:
        await self.send(TextMessage(json.dumps({"op": op, **fields})))

    async def send(self, event: Any) -> None:
        self._http.send_data(STREAM, self._websocket.send(event))
        await self._flush()

    async def read(self) -> None:
        data = await self._stream.receive_some()
        if not data:
            self.ended = True
            return
        for event in self._http.receive_data(data):
            match event:
                case h2.events.ResponseReceived():
                    headers = dict(event.headers)
                    self.status = int(headers[b":status"])
                    assert b"sec-websocket-extensions" not in headers
                case h2.events.DataReceived():
                    if self._open_window:
                        self._http.acknowledge_received_data(event.flow_controlled_length, STREAM)
                    self._websocket.receive_data(event.data)
                    for each in self._websocket.events():
                        if isinstance(each, CloseConnection):
                            self.close = each.code, each.reason or ""
                        elif isinstance(each, Message):
                            self._text += each.data
                            if each.message_finished:
                                self.messages.append(json.loads(self._text))
                                self._text = ""
                case h2.events.StreamEnded() | h2.events.StreamReset():
                    self.ended = True
        await self._flush()

    async def next(self) -> dict[str, Any]:
        while not self.messages:
            assert not self.ended
            await self.read()
        return self.messages.pop(0)


@asynccontextmanager
async def serving(**limits: Any) -> AsyncIterator[tuple[PushService, int]]:
    old, guard.limits = guard.limits, Limits(**limits)
    try:
        async with (
            open_push_service(
                settings=Settings(limits=guard.limits),
                authenticate=JwtAuthenticator(Auth(), SECRET),
            ) as service,
            hypercorn_serving(service) as port,
        ):
            yield service, port
    finally:
        guard.limits = old


@asynccontextmanager
async def connected(port: int, window: int | None = None) -> AsyncIterator[Client]:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        client = Client(stream, window)
        with trio.fail_after(30):
            await client.handshake()
            assert client.status == 200
            yield client


async def gone(service: PushService) -> None:
    with trio.fail_after(10):
        while service.statistics().connections:
            await trio.sleep(0.01)
    assert service.statistics().ledger.balanced


async def test_values_in_order_and_the_peers_own_close_code(caplog):
    caplog.set_level(logging.INFO, "trading_push")
    async with serving() as (service, port):
        async with connected(port) as client:
            await client.say("auth", token=token(4))
            assert (await client.next())["ok"]
            await service.publish("pnl", 0, user=4)
            await client.say("subscribe", args=["pnl"])
            assert (await client.next())["ok"]
            assert (await client.next())["data"] == 0
            seq = 1
            for number in range(1, 50):
                await service.publish("pnl", [number, "x" * 3000], user=4)
            while seq < 50:
                push = await client.next()
                assert push["prev"] == seq
                seq = push["seq"]
            await client.send(CloseConnection(code=4001, reason="bye"))
            while not client.ended:
                await client.read()
            assert client.close == (4001, "bye")
        await gone(service)
    assert any("code=4001 reason='bye'" in message for message in caplog.messages)
    assert not [record for record in caplog.records if record.exc_info]


async def test_our_close_reaches_the_peer():
    async with serving() as (service, port):
        async with connected(port) as client:
            for _ in range(10):
                await client.send(TextMessage("{"))
            while client.close is None:
                await client.read()
            assert client.close[0] == 4501
        await gone(service)


@pytest.mark.parametrize("what", ["pushes", "replies"])
async def test_a_peer_that_keeps_its_window_shut_is_cut(what):
    async with serving(send_timeout_s=0.3) as (service, port):
        async with connected(port, window=600) as client:
            await client.say("auth", token=token(4))
            await client.say("subscribe", args=["pnl"])
            while not service.statistics().subscribers_by_data_type:
                await trio.sleep(0.01)
            sent = 0
            if what == "replies":  # a small request, a large reply
                with pytest.raises(h2.exceptions.FlowControlError):
                    while sent < 1000:
                        await client.say("subscribe", args=["nope"] * 100)
            with trio.fail_after(20):
                while service.statistics().connections:
                    sent += 1
                    assert sent < 5000
                    if what == "pushes":
                        await service.publish("pnl", [sent, "x" * 10_000], user=4)
                    await trio.sleep(0.001)
        await gone(service)
