"""The ASGI endpoint: an application for Hypercorn's trio worker, and a transport for a WebSocket.

Under guarded Hypercorn (`endpoints.hypercorn`), frames go straight to the connection's PushStream
and the close code is the peer's own. In plain form, under another server or behind a middleware
that wraps `send`, each frame is an ASGI message, and what the server does not tell is not known.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from typing import Any, Final

import trio

from trading_push import logs
from trading_push.connections.connection import Connection
from trading_push.connections.context import Context
from trading_push.connections.seats import NoSeat
from trading_push.endpoints.admission import Refused, Request, admit, unserved
from trading_push.endpoints.hypercorn.websocket import PeerFault, find
from trading_push.errors import CloseCode, SendTimeout, ServiceClosed, TransportClosed
from trading_push.protocol import messages
from trading_push.protocol.frames import REASON_BYTES, payload_of
from trading_push.transport.base import Close, Writer

__all__ = ["AsgiEndpoint", "AsgiTransport"]

Scope = Mapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]


_NO_LOCK: Final = nullcontext()


class AsgiTransport:
    """A `Transport` over an accepted ASGI WebSocket."""

    __slots__ = (
        "_close_sent",
        "_ended",
        "_link",
        "_peer",
        "_receive",
        "_send",
        "_send_timeout_s",
        "_sending",
        "_stream",
        "_told",
        "_turn",
    )

    def __init__(self, peer: str, receive: Receive, send: Send, send_timeout_s: float) -> None:
        self._peer = peer
        self._receive = receive
        self._send = send
        self._send_timeout_s = send_timeout_s
        self._link = find(send)
        self._stream = None if self._link is None else self._link.push_stream
        # Over a stream, which has turns of its own, none is needed.
        self._turn = trio.Lock() if self._stream is None else _NO_LOCK
        self._sending: trio.CancelScope | None = None
        self._ended = False
        self._close_sent = False
        self._told: Close | None = None

    endpoint = "asgi"

    @property
    def peer(self) -> str:
        """The peer's address."""
        return self._peer

    @property
    def peer_close(self) -> Close | None:
        """The close frame that decided, where the server tells."""
        if self._link is not None:
            return self._link.deciding_close
        return self._told

    @property
    def gone(self) -> bool | None:
        """Whether the peer has hung up; None where only the server knows."""
        if self._ended:
            return True
        return None if self._stream is None else self._stream.ended

    @property
    def last_heard(self) -> float | None:
        """When bytes of the peer last came; None in plain form and over HTTP/2."""
        return None if self._stream is None else self._stream.last_heard

    def start(self, nursery: trio.Nursery) -> None:
        """Take the connection's nursery."""
        if self._stream is not None:
            self._stream.start(nursery)

    async def receive(self) -> str | bytes:
        """The next message; TransportClosed, or SendTimeout, when there is none to come."""
        if self._ended:  # asked again, a server may block for ever
            raise TransportClosed("the peer is gone")
        message = await self._receive()
        if message["type"] == "websocket.receive":
            text = message.get("text")
            return text if text is not None else bytes(message.get("bytes") or b"")
        self._ended = True
        code = message.get("code") or CloseCode.NO_STATUS
        if not self._close_sent and code != CloseCode.ABNORMAL:
            self._told = Close(code, message.get("reason") or "")
        if self._stream is not None and self._stream.timed_out:
            raise SendTimeout("the peer did not take a send in time")
        raise TransportClosed("the peer is gone")

    @property
    def writer(self) -> Writer:
        """The stream itself, where the link allows it; else one that never writes at once."""
        return _NEVER if self._stream is None else self._stream

    async def send(self, frames: Sequence[bytes]) -> None:
        """Send some frames in order; raises SendTimeout or TransportClosed."""
        if self._ended or self._close_sent:
            raise TransportClosed("the peer is gone")
        if self._stream is not None:
            await self._stream.send_frames(frames)
            return
        async with self._turn:
            # Shielded: a send that is cancelled half-way corrupts what follows.
            deadline = trio.current_time() + self._send_timeout_s
            with trio.CancelScope(deadline=deadline, shield=True) as self._sending:
                for frame in frames:
                    # After a disconnect a server's send returns at once, without a checkpoint.
                    if self._ended or self._close_sent:
                        raise TransportClosed("the peer is gone")
                    text = payload_of(frame).decode()
                    try:
                        await self._send({"type": "websocket.send", "text": text})
                    except PeerFault as error:
                        raise SendTimeout(str(error)) from error
                    await trio.lowlevel.checkpoint()
            if self._sending.cancelled_caught:
                self.abort()
                raise SendTimeout("the peer did not take a send in time")

    def shorten_deadline(self, grace_s: float) -> None:
        """Give a send that is under way no longer than this."""
        self._send_timeout_s = min(self._send_timeout_s, grace_s)
        if self._sending is not None:
            deadline = trio.current_time() + grace_s
            self._sending.deadline = min(self._sending.deadline, deadline)
        if self._stream is not None:
            self._stream.shorten_deadline(grace_s)

    async def close(self, code: int, reason: str) -> None:
        """Send a close frame, once, and wait for the peer's."""
        if self._ended or self._close_sent:
            return
        async with self._turn:
            self._close_sent = True
            cut = reason.encode()[:REASON_BYTES].decode(errors="ignore")
            await self._send({"type": "websocket.close", "code": code, "reason": cut})
        # Left at once, unread bytes of the peer would reset the stream and lose the close frame.
        while not self._ended:
            try:
                await self.receive()
            except TransportClosed:
                return

    def abort(self) -> None:
        """Drop the peer, where the link allows it; nothing more is sent in any case."""
        self._close_sent = True
        if self._sending is not None:
            self._sending.cancel()
        if self._stream is not None:
            self._stream.abort()


class _Never:
    """A writer that cannot write at once."""

    write_now = None

    def flush_later(self, rest: bytes) -> None:
        raise AssertionError("nothing was written")


_NEVER: Final = _Never()


class AsgiEndpoint:
    """The ASGI application of a service.

    Args:
        context: What the connections share.
        http: Serves what is no WebSocket; None for nothing there.
    """

    def __init__(self, context: Context, http: Application | None = None) -> None:
        self._context = context
        self.http = http
        """What serves that; a Starlette application, where it is a service's."""
        self._said_plain = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "lifespan":
            await lifespan(receive, send)
        elif self.http is not None:
            try:
                await self.http(scope, receive, send)
            except Exception as error:  # Starlette has answered 500; a server's own log is not ours
                logs.emit(logs.traced("internal_error", error, address=_peer(scope)))
        else:
            refused = unserved(self._context, _path(scope), _peer(scope))
            await _answer(send, "http.response", refused)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (await receive())["type"] != "websocket.connect":
            return
        try:
            seat = self._context.seats.take()
        except NoSeat as error:
            await _refuse(scope, send, Refused(503, str(error), "connections"))
            return
        try:
            query = bytes(scope.get("query_string") or b"").decode("latin-1")
            request = Request.of(self._context, _path(scope), query, _headers(scope), _peer(scope))
            try:
                opening = await admit(self._context, seat, request)
            except Refused as refused:
                self._context.registry.tally.refused[refused.reason] += 1
                await _refuse(scope, send, refused)
                return
            link = find(send)
            if link is not None:  # before the first message can come
                link.limit_messages(self._context.limits.message_bytes)
            elif not self._said_plain:
                self._said_plain = True
                server = "no guarded Hypercorn, or a middleware that wraps send"
                logs.emit(logs.line("plain_form", reason=server))
            await send({"type": "websocket.accept", "subprotocol": _subprotocol(scope)})
            peer = request.address
            del request
            if link is not None:
                link.forget_handshake()
            transport = AsgiTransport(peer, receive, send, self._context.limits.send_timeout_s)
            try:
                await Connection(self._context, transport, seat, opening).run()
            except ServiceClosed:
                with trio.move_on_after(self._context.limits.close_timeout_s):
                    await transport.close(CloseCode.SERVICE_RESTART, "service restart")
        finally:
            seat.leave()


async def lifespan(receive: Receive, send: Send) -> None:
    """Answer a server's lifespan; the service's own life is its owner's affair."""
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


def _subprotocol(scope: Scope) -> str | None:
    offered = scope.get("subprotocols") or ()
    return messages.SUBPROTOCOL if messages.SUBPROTOCOL in offered else None


def _path(scope: Scope) -> str:
    path, root = str(scope["path"]), str(scope.get("root_path") or "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    return [(bytes(name).lower(), bytes(value)) for name, value in scope["headers"]]


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "-"


async def _refuse(scope: Scope, send: Send, refused: Refused) -> None:
    if "websocket.http.response" in (scope.get("extensions") or {}):
        await _answer(send, "websocket.http.response", refused)
    else:  # the server says 403
        await send({"type": "websocket.close", "code": CloseCode.NORMAL})


async def _answer(send: Send, kind: str, refused: Refused) -> None:
    length = str(len(refused.body)).encode()
    headers = [*refused.headers, (b"content-length", length)]
    await send({"type": f"{kind}.start", "status": refused.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": refused.body, "more_body": False})
