"""One WebSocket of Hypercorn: the true close code and reason, no compression, bounded messages.

Stock Hypercorn tells an application neither the peer's close code nor that a message was over the
limit, and agrees on a compression that costs each connection a hundred kilobytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final

import trio
from hypercorn.protocol.events import Body, Data, Request, StreamClosed
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER
from hypercorn.protocol.h11 import H11WSConnection
from hypercorn.protocol.ws_stream import FrameTooLargeError, WebsocketBuffer, WSStream
from wsproto.connection import Connection, ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Event

from trading_push.endpoints.hypercorn.server import current_server, guard
from trading_push.transport.base import Close, most_fragments
from trading_push.transport.push_stream import PushStream

__all__ = ["GuardedWSStream", "PeerFault", "find"]


class PeerFault(Exception):
    """The peer does what no client may; its connection is ended by the firewall."""


class _ByteBuffer(WebsocketBuffer):
    """Counts a message in bytes, as its limit is, and its frames; Hypercorn counts characters."""

    overflowed = False
    fragments = 0

    def extend(self, event: Any) -> None:
        data = event.data
        length = self.length + (
            len(data) if isinstance(event, BytesMessage) else _utf8_length(data)
        )
        if event.message_finished:
            self.fragments = 0
        elif event.frame_finished:
            self.fragments += 1
        if length > self.max_length or self.fragments > most_fragments(self.max_length):
            self.overflowed = True
            self.value = None
            raise FrameTooLargeError
        self.length = 0  # Hypercorn adds the characters to it, and compares
        super().extend(event)
        self.length = length


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


class _Observed:
    """A wsproto connection that tells of the close frames it sends and receives."""

    def __init__(self, connection: Connection, stream: GuardedWSStream) -> None:
        self.bare = connection
        self._stream = stream

    @property
    def state(self) -> ConnectionState:
        return self.bare.state

    def receive_data(self, data: bytes | None) -> None:
        self.bare.receive_data(data)

    def send(self, event: Event) -> bytes:
        data = self.bare.send(event)
        if isinstance(event, CloseConnection):
            self._stream.decide(event.code, event.reason, ours=True)
        return data

    def events(self) -> Iterator[Event]:
        for event in self.bare.events():
            if isinstance(event, CloseConnection):
                if self.bare.state in (
                    ConnectionState.OPEN,
                    ConnectionState.LOCAL_CLOSING,
                ):
                    # Not a close frame: wsproto's word for a frame that breaks the protocol.
                    self._stream.fault = event
                    return
                self._stream.decide(event.code, event.reason, ours=False)
            yield event


# What is left of a handshake that is over.
_ACCEPTED: Final = SimpleNamespace(accepted=True)


class GuardedWSStream(WSStream):
    """One WebSocket of Hypercorn; over HTTP/1.1 its frames may be written past it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_connection = current_server.get()
        self.fault: CloseConnection | None = None
        self.deciding_close: Close | None = None
        self._to_app: trio.MemorySendChannel[Any]
        self.buffer: _ByteBuffer = _ByteBuffer(self.config.websocket_max_message_size)
        self._over = False
        self._raw = False

    @property
    def connection(self) -> Any:
        """The wsproto connection, observed."""
        return self._connection

    @connection.setter
    def connection(self, connection: Connection) -> None:
        self._connection = _Observed(connection, self)

    @property
    def push_stream(self) -> PushStream | None:
        """The stream that this WebSocket has to itself; None over HTTP/2, where many share it."""
        return self.server_connection.push_stream if self._raw and self.server_connection else None

    def limit_messages(self, size: int) -> None:
        """A message of more bytes than this is closed with 1009."""
        self.buffer.max_length = size

    def forget_handshake(self) -> None:
        """Let go of the request, its headers and h11's connection, which are not used again."""
        self.scope["headers"] = []
        self.handshake = _ACCEPTED  # type: ignore[assignment]
        connection = getattr(getattr(self.send, "__self__", None), "connection", None)
        if isinstance(connection, H11WSConnection):
            connection.h11_connection = None  # type: ignore[assignment]

    def decide(self, code: int, reason: str | None, *, ours: bool) -> None:
        """A close frame is sent or was received; the first one counts."""
        if self.deciding_close is None:
            self.deciding_close = Close(code, reason or "", ours)

    async def handle(self, event: Any) -> None:
        """Hypercorn's own, for an event of the peer."""
        if isinstance(event, Request):
            self._raw = event.http_version == "1.1"
            if self._raw and self.server_connection is not None:
                self.server_connection.websocket_begins()
            headers = [
                (name, value)
                for name, value in event.headers
                if name.lower() != b"sec-websocket-extensions"
            ]
            await super().handle(dataclasses.replace(event, headers=headers))
            if self.app_put is not None:
                self._to_app = self.app_put.__self__  # type: ignore[attr-defined]
                self.app_put = self._put
            if self.closed and self.app_put is None:
                # Refused: Hypercorn would leave the socket open for as long as the peer likes.
                await self.send(StreamClosed(stream_id=self.stream_id))
        elif isinstance(event, Body | Data) and not self.closed and not self.handshake.accepted:
            raise PeerFault("bytes before the handshake was answered")
        else:
            await super().handle(event)

    async def _put(self, message: Any) -> None:
        try:
            self._to_app.send_nowait(message)
        except trio.WouldBlock:
            if self.server_connection is None:
                await self._to_app.send(message)
            else:
                with self.server_connection.waiting_for_handler():
                    await self._to_app.send(message)

    async def _accept(self, message: Any) -> None:
        await super()._accept(message)
        if self._raw and self.server_connection is not None:
            self.server_connection.websocket_accepted(self._connection.bare)

    async def _send_wsproto_event(self, event: Any) -> None:
        if not (self._raw or isinstance(event, CloseConnection)):
            await self._room()
        await super()._send_wsproto_event(event)

    async def _room(self) -> None:
        # Over HTTP/2 Hypercorn's own high-water mark does not hold: a peer that leaves its window
        # shut makes the buffer of its stream grow without a bound.
        buffers = getattr(getattr(self.send, "__self__", None), "stream_buffers", {})
        buffer = buffers.get(self.stream_id)
        if buffer is not None and len(buffer.buffer) >= BUFFER_HIGH_WATER:
            with trio.move_on_after(guard.limits.send_timeout_s) as scope:
                await buffer.drain()
            if scope.cancelled_caught:
                raise PeerFault("it does not take what it is sent")

    async def _handle_events(self) -> None:
        if self._over:
            return
        await super()._handle_events()
        if self.fault is not None:
            self._over = True
            await self._send_wsproto_event(
                CloseConnection(code=self.fault.code, reason=self.fault.reason)
            )
        elif self.buffer.overflowed:
            self._over = True
        if self._over:
            await self.send(StreamClosed(stream_id=self.stream_id))


def find(send: Callable[..., Any]) -> GuardedWSStream | None:
    """The WebSocket behind an ASGI `send`; None where a middleware or another server is."""
    stream = getattr(send, "__self__", None)
    if isinstance(stream, GuardedWSStream) and stream.server_connection is not None:
        return stream
    return None
