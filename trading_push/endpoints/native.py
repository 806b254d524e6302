"""The native endpoint: WebSockets for trio applications without ASGI, by trio-websocket.

trio-websocket does the handshake, the control frames and the close, on our PushStream, over
which frames go straight to the socket. Its reader runs in a nursery of its own, outside the one
that a connection cancels: cancelled first, it could not read the peer's close frame any more.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Sequence
from typing import Final

import trio
import trio_websocket
import wsproto
import wsproto.utilities
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Event, Message

from trading_push import logs
from trading_push.connections.connection import Connection
from trading_push.connections.context import Context
from trading_push.connections.seats import NoSeat, Seat
from trading_push.endpoints.admission import Refused, Request, admit, refuse_unread
from trading_push.errors import CloseCode, SendTimeout, ServiceClosed, TransportClosed, innermost
from trading_push.protocol import frames, messages
from trading_push.transport.base import Close, Writer, decoder_of, most_fragments
from trading_push.transport.descriptors import SparingListener
from trading_push.transport.push_stream import PushStream, wrap

__all__ = ["NativeTransport", "handle_stream", "listen", "serve"]

_BACKLOG: Final = 4096


class NativeTransport:
    """A `Transport` over an accepted trio-websocket connection."""

    __slots__ = (
        "_message_bytes",
        "_our_close",
        "_peer",
        "_socket",
        "_stream",
    )

    def __init__(
        self,
        socket: trio_websocket.WebSocketConnection,
        stream: PushStream,
        peer: str,
        message_bytes: int,
    ) -> None:
        self._socket = socket
        self._stream = stream
        self._peer = peer
        self._message_bytes = message_bytes
        self._our_close: Close | None = None

    endpoint = "native"

    @property
    def peer(self) -> str:
        """The peer's address."""
        return self._peer

    @property
    def peer_close(self) -> Close | None:
        """The close frame that decided; a broken frame counts as the one it is answered with."""
        if self._our_close is not None:
            return self._our_close
        told = self._socket.closed
        if told is None or told.code == CloseCode.ABNORMAL:
            return None
        return Close(told.code, told.reason or "")

    @property
    def gone(self) -> bool:
        """Whether the peer has hung up, or its stream broke."""
        return self._stream.ended

    @property
    def last_heard(self) -> float | None:
        """When bytes of the peer last came."""
        return self._stream.last_heard

    def start(self, nursery: trio.Nursery) -> None:
        """Take the connection's nursery."""
        self._stream.start(nursery)

    @property
    def writer(self) -> Writer:
        """The stream itself."""
        return self._stream

    def shorten_deadline(self, grace_s: float) -> None:
        """Give a send that is under way no longer than this."""
        self._stream.shorten_deadline(grace_s)

    def abort(self) -> None:
        """Drop the peer."""
        self._stream.abort()

    async def receive(self) -> str | bytes:
        """The next message; TransportClosed, or SendTimeout, when there is none to come."""
        try:
            message = await self._socket.get_message()
        except trio_websocket.ConnectionClosed:
            if self._stream.timed_out:
                raise SendTimeout("the peer did not take a send in time") from None
            raise TransportClosed("the peer is gone") from None
        if isinstance(message, str) and len(message.encode()) > self._message_bytes:
            # trio-websocket counts characters.
            await self.close(CloseCode.TOO_BIG, "message over the limit")
            raise TransportClosed("message over the limit")
        return message

    async def send(self, frames: Sequence[bytes]) -> None:
        """Send some frames in order; raises SendTimeout or TransportClosed."""
        if self._socket.closed is not None:
            raise TransportClosed("the peer is gone")
        await self._stream.send_frames(frames)

    async def close(self, code: int, reason: str) -> None:
        """Send a close frame, once, and wait for the peer's."""
        if self._socket.closed is not None:
            return
        cut = reason.encode()[: frames.REASON_BYTES].decode(errors="ignore")
        self._our_close = Close(code, cut, ours=True)
        await self._socket.aclose(code, cut)


def _headers(request: trio_websocket.WebSocketRequest) -> list[tuple[bytes, bytes]]:
    # wsproto keeps the Host header to itself, and trio-websocket what wsproto gives it.
    host = getattr(getattr(request, "_event", None), "host", None)
    return [*request.headers, *([] if host is None else [(b"host", host.encode("idna"))])]


class _Done:
    """What is left of a handshake that is over: it has no events any more."""

    def events(self) -> Iterator[Event]:
        return iter(())


_DONE: Final = _Done()


def _past_handshake(
    socket: trio_websocket.WebSocketConnection, stream: PushStream, message_bytes: int
) -> None:
    connection = getattr(socket, "_wsproto", None)
    if isinstance(connection, wsproto.WSConnection):
        # RFC 6455 section 4.1: a client waits for the answer. What it does not wait with, h11 has
        # taken for the body of a request, and no frame of it would ever be read.
        early, _ = connection.handshake._h11_connection.trailing_data
        if early:
            raise wsproto.utilities.RemoteProtocolError("bytes before the handshake was answered")
        # The request and h11's connection are a tenth of what a connection takes, for no use.
        connection.handshake = _DONE  # type: ignore[assignment]
        stream.skip_pongs(decoder_of(connection.connection))
        counted = _Counted(connection, most_fragments(message_bytes))
        socket._wsproto = counted  # type: ignore[assignment]


class _Counted:
    """A wsproto connection that counts the frames of each message.

    trio-websocket keeps every one, also those that are empty: without a limit its list of them
    grows for as long as the peer likes.
    """

    __slots__ = ("_connection", "_fragments", "_most")

    def __init__(self, connection: wsproto.WSConnection, most: int) -> None:
        self._connection = connection
        self._most = most
        self._fragments = 0

    @property
    def client(self) -> bool:
        return self._connection.client

    @property
    def state(self) -> ConnectionState:
        return self._connection.state

    def receive_data(self, data: bytes | None) -> None:
        self._connection.receive_data(data)

    def send(self, event: Event) -> bytes:
        return self._connection.send(event)

    def events(self) -> Iterator[Event]:
        for event in self._connection.events():
            if isinstance(event, Message):
                if event.message_finished:
                    self._fragments = 0
                elif event.frame_finished:
                    self._fragments += 1
                if self._fragments > self._most:
                    # As wsproto tells of what breaks the protocol: the peer is dropped.
                    yield CloseConnection(CloseCode.TOO_BIG, "message over the limit")
                    return
            yield event


async def handle_stream(context: Context, stream: trio.abc.Stream) -> None:
    """Serve one stream, plain or TLS, until its peer is gone or it is stopped; then close it.

    No exception of the peer's or of a handler's making leaves it.
    """
    limits = context.limits
    handshake = trio.CancelScope(deadline=trio.current_time() + limits.handshake_timeout_s)
    push_stream = wrap(
        stream, limits.send_timeout_s, limits.close_timeout_s, on_end=handshake.cancel
    )
    try:
        seat = context.seats.take()
    except NoSeat:
        try:
            await refuse_unread(push_stream)
        finally:
            push_stream.abort()
        return
    try:
        push_stream.set_user_timeout(limits.heartbeat_s)
        async with trio.open_nursery() as reader:
            await _serve(context, push_stream, seat, reader, handshake)
            reader.cancel_scope.cancel()
    except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
        pass  # the peer went during the handshake
    except* wsproto.utilities.LocalProtocolError:
        pass  # trio-websocket answers a ping that comes after our close, and must not
    except* Exception as errors:
        context.connections.count_stopped()
        error, address = innermost(errors), push_stream.peer
        line = logs.line("connection_stopped_by_firewall", address=address, error=error)
        context.strangers.emit(line)
    finally:
        seat.leave()
        push_stream.abort()


async def _serve(
    context: Context,
    stream: PushStream,
    seat: Seat,
    reader: trio.Nursery,
    handshake: trio.CancelScope,
) -> None:
    with handshake:
        if hasattr(stream, "do_handshake"):
            await stream.do_handshake()
        # Nobody else ends this wait when the peer leaves: the stream does, by `on_end`.
        request = await trio_websocket.wrap_server_stream(
            reader, stream, max_message_size=context.limits.message_bytes
        )
        try:
            path, _, query = request.path.partition("?")
            asked = Request.of(context, path, query, _headers(request), stream.peer)
            opening = await admit(context, seat, asked)
        except Refused as refused:
            context.registry.tally.refused[refused.reason] += 1
            await request.reject(refused.status, extra_headers=refused.headers, body=refused.body)
            return
        offered = request.proposed_subprotocols
        subprotocol = messages.SUBPROTOCOL if messages.SUBPROTOCOL in offered else None
        socket = await request.accept(subprotocol=subprotocol)
    if handshake.cancelled_caught:
        return
    peer = asked.address
    del request, asked
    _past_handshake(socket, stream, context.limits.message_bytes)
    transport = NativeTransport(socket, stream, peer, context.limits.message_bytes)
    try:
        await Connection(context, transport, seat, opening).run()
    except ServiceClosed:
        with trio.move_on_after(context.limits.close_timeout_s):
            await transport.close(CloseCode.SERVICE_RESTART, "service restart")


async def listen(host: str, port: int) -> list[trio.SocketListener]:
    """Listen; raises OSError if the address cannot be listened on."""
    return await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG)


async def serve(
    context: Context, listeners: list[trio.SocketListener], ssl_context: ssl.SSLContext | None
) -> None:
    """Serve every connection of some listeners until cancelled, over TLS with `ssl_context`."""

    async def handle(stream: trio.SocketStream) -> None:
        if ssl_context is None:
            await handle_stream(context, stream)
        else:
            await handle_stream(context, trio.SSLStream(stream, ssl_context, server_side=True))

    await trio.serve_listeners(handle, [SparingListener(each.socket) for each in listeners])
