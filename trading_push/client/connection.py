"""One connection of the trio client: the socket that the core speaks and listens through."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import trio
import trio_websocket
from wsproto.connection import ConnectionState

from trading_push.client import ending
from trading_push.client.core import (
    CONNECT_TIMEOUT_S,
    MESSAGE_BYTES,
    REPLY_TIMEOUT_S,
    ClientCore,
)
from trading_push.client.ending import FINAL, ConnectionLost
from trading_push.client.tokens import Token, next_token
from trading_push.errors import CloseCode
from trading_push.protocol.messages import SUBPROTOCOL
from trading_push.transport.outbound import (
    CONNECTION_ERRORS,
    Address,
    OutboundWebSocket,
    first_of,
)

__all__ = ["ClientConnection"]


class _HeardStream(trio.abc.Stream):
    """The socket below trio-websocket, which does not tell two things that we must know.

    One is when a byte was last heard, pings included. The other is that the peer hung up during the
    handshake, which trio-websocket would wait out.
    """

    def __init__(self, below: trio.abc.Stream) -> None:
        self._below = below
        # When a byte last came, on trio's clock.
        self.heard_at = trio.current_time()
        # Whether the handshake is done.
        self.is_open = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._below.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._below.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._below.receive_some(max_bytes)
        except trio.BrokenResourceError:
            if self.is_open:
                raise
            data = b""
        if not data and not self.is_open:
            raise ConnectionResetError("the server hung up during the handshake")
        self.heard_at = trio.current_time()
        return data

    async def aclose(self) -> None:
        await self._below.aclose()


class ClientConnection:
    """One connection, from its handshake to its end.

    Args:
        address: Where the server is.
        token: The token, or the application's function.
        core: What decides; its state outlives the connection.
        progressed: Called when the core has taken a message.
    """

    def __init__(
        self, address: Address, token: Token, core: ClientCore, progressed: Callable[[], None]
    ) -> None:
        self._token = token
        self._core = core
        self._progressed = progressed
        self._websocket = OutboundWebSocket(
            address,
            connect_timeout_s=CONNECT_TIMEOUT_S,
            message_bytes=MESSAGE_BYTES,
            subprotocols=[SUBPROTOCOL],
        )
        # The socket, once it is open.
        self._stream: _HeardStream | None = None

    @property
    def heard_at(self) -> float:
        """When a byte last came, on trio's clock; minus infinity before there is a socket."""
        return -math.inf if self._stream is None else self._stream.heard_at

    async def run(self, scope: trio.CancelScope) -> None:
        """Live until it is lost, or `scope` is cancelled, which closes it politely.

        Raises:
            AuthenticationError, Refused: The client is over for good.
            ConnectionLost: The connection is over.
            BaseExceptionGroup: A bug, or a cancellation from outside.
        """
        try:
            await self._websocket.run(self._talk, scope)
        except BaseExceptionGroup as group:
            raise _reduced(group, self._websocket.socket, self._core.has_succeeded) from None

    async def _talk(self) -> None:
        """Connect, and let the core speak."""
        token = self._core.check(await next_token(self._token))

        def heard(below: trio.abc.Stream) -> _HeardStream:
            self._stream = _HeardStream(below)
            return self._stream

        socket = await self._websocket.connect(heard)
        stream = self._stream
        assert stream is not None
        stream.is_open = True
        self._core.opened(token, trio.current_time())
        async with trio.open_nursery() as nursery:
            await self._read(socket, stream, nursery)

    async def _read(
        self,
        socket: trio_websocket.WebSocketConnection,
        stream: _HeardStream,
        nursery: trio.Nursery,
    ) -> NoReturn:
        """Hand what the server sends to the core, which ends the connection by raising."""
        core = self._core
        while True:
            await self._send(socket)
            text: str | bytes | None = None
            with trio.move_on_at(core.deadline):
                text = await socket.get_message()
            if text is None:
                core.tick(stream.heard_at, trio.current_time())
                continue
            core.received(text, trio.current_time())
            self._progressed()
            if core.renewal.is_due():
                nursery.start_soon(self._renew, socket)

    async def _renew(self, socket: trio_websocket.WebSocketConnection) -> None:
        """Authenticate again on the living connection, as soon as there is another token."""
        core = self._core
        while True:
            await trio.sleep_until(core.renewal.at)
            core.renewal.asking(trio.current_time())
            try:
                token = await next_token(self._token)
            except ConnectionLost:
                core.renewal.failed(trio.current_time())
            else:
                core.renew(token)
                await self._send(socket)
                return

    async def _send(self, socket: trio_websocket.WebSocketConnection) -> None:
        for message in self._core.outgoing():
            with trio.fail_after(REPLY_TIMEOUT_S):
                await socket.send_message(message)


def _reduced(
    group: BaseExceptionGroup[BaseException],
    socket: trio_websocket.WebSocketConnection | None,
    has_succeeded: bool,
) -> BaseException:
    """Reduce what ended a connection to the one exception that says why.

    The connection's nursery may hold several: what we made of the end, and what trio-websocket's
    reader did. A bug, and a cancellation, stay the group that they are.

    Args:
        group: What the connection raised.
        socket: The connection; None where its handshake was not done.
        has_succeeded: Whether the client has been connected before.
    """
    final = group.subgroup(FINAL)
    if final is not None:
        return first_of(final)
    unknown = group.split((ConnectionLost, *CONNECTION_ERRORS))[1]
    if unknown is not None:
        return unknown
    error = first_of(group.subgroup(ConnectionLost) or group)
    match error:
        case ConnectionLost():
            return error
        case trio_websocket.ConnectionClosed():
            by_server = socket is not None and _has_sent_close(socket)
            code = CloseCode.ABNORMAL if error.reason is None else error.reason.code
            words = "" if error.reason is None else error.reason.reason or ""
            return ending.closed(code, words, by_server=by_server)
        case trio_websocket.ConnectionRejected():
            return ending.rejected(error.status_code, has_succeeded=has_succeeded)
        case trio.TooSlowError():
            return ConnectionLost("the server does not answer")
        case OSError():
            return ConnectionLost(error.strerror or str(error))
        case trio.BrokenResourceError() if isinstance(error.__cause__, OSError):  # of TLS
            return ConnectionLost(error.__cause__.strerror or str(error.__cause__))
        case _:
            return ConnectionLost("the connection was lost")


def _has_sent_close(socket: trio_websocket.WebSocketConnection) -> bool:
    """Whether the peer has sent a close frame.

    trio-websocket gives a reason for any end, made up if need be. Only a close frame brings wsproto
    into these states: after what it cannot parse, or what trio-websocket finds too long, it stays
    open or closing.
    """
    return socket._wsproto.state in (ConnectionState.REMOTE_CLOSING, ConnectionState.CLOSED)
