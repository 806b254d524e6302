"""The link to Hypercorn's trio worker: the only file that knows Hypercorn's inside.

Stock Hypercorn runs all connections of a worker in one nursery without a firewall, so that one
malformed request ends the whole service; it tells an application neither the peer's close code nor
that a send is stuck. `install` puts subclasses of three of its classes where it looks them up:

- TCPServer: a firewall and a cancel scope round each connection, over a PushStream; what a handler
  leaves behind is reaped, and connections over the limit are refused before the handshake.
- WSStream: no permessage-deflate, the true close code and reason, an oversize message is the end.
- WorkerContext: the application can end the worker, and say good-bye before Hypercorn cuts.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, Final

import attrs
import hypercorn
import hypercorn.protocol.h2
import hypercorn.protocol.h11
import hypercorn.protocol.ws_stream
import hypercorn.trio.run
import hypercorn.typing
import trio
from hypercorn.events import Closed, RawData, Updated
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.events import Body, Data, Request, StreamClosed
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, StreamBuffer
from hypercorn.protocol.h11 import H11WSConnection
from hypercorn.protocol.ws_stream import FrameTooLargeError, WebsocketBuffer, WSStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import EventWrapper, TrioSingleTask, WorkerContext
from hypercorn.utils import parse_socket_addr
from wsproto.connection import Connection, ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Event, TextMessage

from trading_push import logs
from trading_push.endpoints.admission import refuse_unread
from trading_push.errors import LinkError
from trading_push.settings.schema import Limits
from trading_push.transport.base import Close, decoder_of, most_fragments
from trading_push.transport.push_stream import PushStream, TlsPushStream, wrap

__all__ = ["Guard", "GuardedWSStream", "find", "guard", "install", "worker"]

UNGUARDED: Final = "TRADING_PUSH_UNGUARDED"

# What one read brings is worked through without a pause: ten thousand frames would be a long one.
_CHUNK: Final = 4096


class PeerFault(Exception):
    """The peer does what no client may; its connection is ended by the firewall."""


@attrs.define
class Guard:
    """What the link has seen in this process.

    `connections` are open now, `refused` were over the limit, `stopped` ended at the firewall,
    `reaped` had a handler that outlived its peer or left its bytes unread.
    """

    limits: Limits = attrs.field(factory=Limits)
    installed: bool = False
    connections: int = 0
    refused: int = 0
    stopped: int = 0
    reaped: int = 0


guard = Guard()
_server: ContextVar[GuardedTCPServer | None] = ContextVar("guarded_tcp_server", default=None)
_worker: ContextVar[KnownWorkerContext | None] = ContextVar("guarded_worker", default=None)


class GuardedTCPServer(TCPServer):
    """One TCP connection of Hypercorn, behind a firewall."""

    def __init__(self, app: Any, config: Any, context: Any, state: Any, stream: Any) -> None:
        limits = guard.limits
        self.push_stream = wrap(
            stream,
            limits.send_timeout_s,
            limits.close_timeout_s,
            on_end=self._on_end,
        )
        super().__init__(app, config, context, state, self.push_stream)  # type: ignore[arg-type]
        self._scope = trio.CancelScope()
        self._handshake_until = trio.current_time() + limits.handshake_timeout_s
        self._handler_until = math.inf
        self._waiting = 0
        self._reap_at = math.inf
        self._idle_until = math.inf

    async def run(self) -> None:
        """Serve the connection; no exception of its making gets out."""
        if guard.connections >= guard.limits.connections:
            guard.refused += 1
            await refuse_unread(self.push_stream)
            self.push_stream.abort()
            return
        guard.connections += 1
        _server.set(self)
        try:
            self.push_stream.set_user_timeout(guard.limits.heartbeat_s)
            # A scope of our own: Hypercorn's TaskGroup loses the answer of its nursery, and a
            # cancelled one would end the whole server.
            with self._scope:
                self._limit()
                if isinstance(self.push_stream, TlsPushStream):
                    await super().run()
                else:
                    await self._run_plain()
            late = min(self._handler_until, self._reap_at) <= trio.current_time()
            if self._scope.cancelled_caught and late:
                guard.reaped += 1
        except* Exception as errors:
            guard.stopped += 1
            logs.emit(
                logs.line(
                    "connection_stopped_by_firewall",
                    address=self._peer(),
                    error=_first(errors),
                )
            )
        finally:
            guard.connections -= 1
            if isinstance(self.context, KnownWorkerContext):
                self.context.idle.discard(self)
            self.push_stream.abort()

    async def _run_plain(self) -> None:
        # Hypercorn finds out that a stream has no TLS by an exception that goes through a scope:
        # a twentieth of what an arrival costs.
        bare = self.push_stream.socket
        try:
            client = parse_socket_addr(bare.family, bare.getpeername())
            server = parse_socket_addr(bare.family, bare.getsockname())
            async with TaskGroup() as group:
                self._task_group = group
                self.protocol = ProtocolWrapper(
                    self.app,
                    self.config,
                    self.context,
                    group,
                    hypercorn.typing.ConnectionState(self.state),
                    False,
                    client,
                    server,
                    self.protocol_send,
                    "http/1.1",
                )
                self.idle_task = _Idle(self)  # type: ignore[assignment]
                self.set_idle(True)
                await self.protocol.initiate()
                await self._read_data()
        except OSError:
            return  # the peer was gone before its address was asked for; `run` closes
        await self._close()

    def _peer(self) -> str:
        try:
            return str(self.protocol.client[0])  # type: ignore[index]
        except (AttributeError, TypeError, IndexError):
            return "-"

    async def protocol_send(self, event: Any) -> None:
        """Hypercorn's own; the request's head is complete when it stops being idle."""
        if isinstance(event, Updated) and not event.idle:
            self._handshake_until = math.inf
            self._limit()
        await super().protocol_send(event)

    async def _read_data(self) -> None:
        if self.config.read_timeout:
            await super()._read_data()
            return
        # Without a limit Hypercorn's own would hold a scope, and two generators, for each read.
        data = b"-"
        while data:
            try:
                data = await self.push_stream.receive_some(_CHUNK)
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                break
            await self.protocol.handle(RawData(data))
        await self.protocol.handle(Closed())

    # Deadlines without a task: the scope's is moved when something happens.

    def websocket_begins(self) -> None:
        """The request asks for a WebSocket, which must be accepted in time."""
        self._handshake_until = trio.current_time() + guard.limits.handshake_timeout_s
        self._limit()

    def websocket_accepted(self, connection: Connection) -> None:
        """The handshake is done."""
        self._handshake_until = math.inf
        self._limit()
        if not self.config.read_timeout:  # every byte is to begin that anew
            self.push_stream.skip_pongs(decoder_of(connection))

    async def _idle_timeout(self) -> None:
        # Hypercorn's own, over TLS: as `set_idle`.
        if self._handshake_until < math.inf:
            await self.context.terminated.wait()
        await super()._idle_timeout()

    def set_idle(self, idle: bool) -> None:
        """Between requests: the connection ends after the keep-alive time, or with the server.

        Before the first one, too, but that may take as long as a handshake.
        """
        self._idle_until = math.inf
        if idle:
            if self._handshake_until == math.inf:
                self._idle_until = trio.current_time() + self.config.keep_alive_timeout
            if self.context.terminated.is_set():
                self.cancel()
        if isinstance(self.context, KnownWorkerContext):
            (self.context.idle.add if idle else self.context.idle.discard)(self)
        self._limit()

    def cancel(self) -> None:
        """End the connection now."""
        self._scope.cancel()

    def _limit(self) -> None:
        self._scope.deadline = min(
            self._handshake_until, self._handler_until, self._reap_at, self._idle_until
        )

    @contextmanager
    def waiting_for_handler(self) -> Iterator[None]:
        """Nothing of the peer's is read, not even its end, until a handler takes a message."""
        # The reader may wait, and the handler itself, when a send of its own finds the peer gone.
        self._waiting += 1
        if self._waiting == 1:
            self._handler_until = trio.current_time() + guard.limits.handler_timeout_s
            self._limit()
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._handler_until = math.inf
                self._limit()

    def _on_end(self) -> None:
        self._reap_at = trio.current_time() + guard.limits.reap_after_s
        self._limit()


def _first(errors: BaseException) -> BaseException:
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors


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
        self.server_connection = _server.get()
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
        """Let go of the request, its headers and h11's connection: nobody asks for them again."""
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


class _Idle:
    """In place of a task for each idle connection: a deadline of the connection's scope."""

    def __init__(self, server: GuardedTCPServer) -> None:
        self._server = server

    async def restart(self, group: TaskGroup, action: Callable[[], Any]) -> None:
        self._server.set_idle(True)

    async def stop(self) -> None:
        self._server.set_idle(False)


class _Terminated(EventWrapper):
    """The server's end: idle connections do not wait for it, and it waits for the farewell."""

    def __init__(self, context: KnownWorkerContext) -> None:
        super().__init__()
        self._context = context

    async def set(self) -> None:
        await super().set()
        for server in self._context.idle:
            server.cancel()
        # Hypercorn's graceful timeout, which may be 0, begins when this returns.
        await self._context.farewell()


class KnownWorkerContext(WorkerContext):
    """Hypercorn's worker context, which an application can find with `worker`."""

    def __init__(self, max_requests: int | None) -> None:
        super().__init__(max_requests)
        self.idle: set[GuardedTCPServer] = set()
        self.terminated = _Terminated(self)
        self.farewell: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """Awaited when nobody is accepted any more, before connections are cut; never raises."""
        _worker.set(self)


def worker() -> KnownWorkerContext | None:
    """The worker that the current task runs in; None outside a guarded Hypercorn."""
    return _worker.get()


def find(send: Callable[..., Any]) -> GuardedWSStream | None:
    """The WebSocket behind an ASGI `send`; None where a middleware or another server is."""
    stream = getattr(send, "__self__", None)
    if isinstance(stream, GuardedWSStream) and stream.server_connection is not None:
        return stream
    return None


# What the link leans on: (class, method, its parameters).
_EXPECTED: Final[tuple[tuple[type, str, str], ...]] = (
    (TCPServer, "__init__", "self app config context state stream"),
    (TCPServer, "__await__", "self"),
    (TCPServer, "run", "self"),
    (TCPServer, "protocol_send", "self event"),
    (TCPServer, "_read_data", "self"),
    (TCPServer, "_idle_timeout", "self"),
    (TCPServer, "_close", "self"),
    (TrioSingleTask, "restart", "self task_group action"),
    (TrioSingleTask, "stop", "self"),
    (EventWrapper, "set", "self"),
    (
        ProtocolWrapper,
        "__init__",
        "self app config context task_group state ssl client server send alpn_protocol",
    ),
    (
        WSStream,
        "__init__",
        "self app config context task_group ssl client server send stream_id",
    ),
    (WSStream, "handle", "self event"),
    (WSStream, "app_send", "self message"),
    (WSStream, "_accept", "self message"),
    (WSStream, "_handle_events", "self"),
    (WSStream, "_send_wsproto_event", "self event"),
    (TaskGroup, "spawn_app", "self app config scope send"),
    (WebsocketBuffer, "__init__", "self max_length"),
    (WebsocketBuffer, "extend", "self event"),
    (WorkerContext, "__init__", "self max_requests"),
    (StreamBuffer, "drain", "self"),
    (TextMessage, "__init__", "self data frame_finished message_finished"),
)

_PLACES: Final[tuple[tuple[Any, str, type, type], ...]] = (
    (hypercorn.trio.run, "TCPServer", TCPServer, GuardedTCPServer),
    (hypercorn.trio.run, "WorkerContext", WorkerContext, KnownWorkerContext),
    (hypercorn.protocol.h11, "WSStream", WSStream, GuardedWSStream),
    (hypercorn.protocol.h2, "WSStream", WSStream, GuardedWSStream),
)


def install(limits: Limits) -> bool:
    """Guard every Hypercorn server of this process that starts from now on.

    Returns:
        False where the installed Hypercorn differs and TRADING_PUSH_UNGUARDED=1 bears that.

    Raises:
        LinkError: It differs; the text names the symbol.
    """
    guard.limits = limits
    if guard.installed:
        return True
    try:
        check()
    except LinkError as error:
        if os.environ.get(UNGUARDED) != "1":
            raise
        logs.emit(logs.line("plain_form", reason=str(error)))
        return False
    for module, name, _, guarded in _PLACES:
        setattr(module, name, guarded)
    guard.installed = True
    return True


guard_hypercorn = install
"""What `trading_push` calls it."""


def check() -> None:
    """Compare the installed Hypercorn with what the link was made for.

    Raises:
        LinkError: The text names what differs and what to do.
    """
    hint = f"install hypercorn==0.18.*, or set {UNGUARDED}=1 to run without protection"
    for module, name, stock, _ in _PLACES:
        if getattr(module, name, None) is not stock:
            raise LinkError(f"{module.__name__}.{name} is not Hypercorn's own: {hint}")
    for owner, method, expected in _EXPECTED:
        found = " ".join(inspect.signature(getattr(owner, method, lambda: None)).parameters)
        if found != expected:
            raise LinkError(
                f"{owner.__module__}.{owner.__qualname__}.{method} takes ({found}), "
                f"not ({expected}): {hint}"
            )
