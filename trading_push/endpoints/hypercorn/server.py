"""One TCP connection of Hypercorn behind a firewall, and the worker that the connections run in.

Stock Hypercorn runs all connections of a worker in one nursery without a firewall, so that one
malformed request ends the whole service. Here each connection has a firewall and a cancel scope of
its own, over a PushStream; a handler that outlives its peer is ended, and connections over the
limit are refused before the handshake.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import EventWrapper, WorkerContext
from hypercorn.utils import parse_socket_addr
from wsproto.connection import Connection

from trading_push import logs
from trading_push.connections.seats import Places
from trading_push.endpoints.admission import refuse_unread
from trading_push.errors import innermost
from trading_push.logs.strangers import StrangerLines
from trading_push.settings.schema import Limits
from trading_push.transport.base import decoder_of
from trading_push.transport.push_stream import TlsPushStream, wrap

__all__ = ["Guard", "GuardedTCPServer", "GuardedWorkerContext", "current_server", "guard", "worker"]

# What one read brings is worked through without a pause: ten thousand frames would be a long one.
_CHUNK: Final = 4096


@attrs.define
class Guard:
    """What the link has seen in this process.

    `sockets` are accepted and open: WebSockets, and what is not one or not yet (`connections.seats`
    says why they are counted apart). `stopped` ended at the firewall, `reaped` had a handler that
    outlived its peer or left its bytes unread. `workers` is how many processes Hypercorn runs;
    `strangers` bounds the lines that anyone can cause, and is the service's where there is one.
    """

    limits: Limits = attrs.field(factory=Limits)
    installed: bool = False
    sockets: Places = attrs.field(factory=Places)
    stopped: int = 0
    reaped: int = 0
    workers: int = 1
    strangers: StrangerLines = attrs.field(factory=StrangerLines)


guard = Guard()
current_server: ContextVar[GuardedTCPServer | None] = ContextVar("guarded_tcp_server", default=None)
_worker: ContextVar[GuardedWorkerContext | None] = ContextVar("guarded_worker", default=None)


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
        if not guard.sockets.take(guard.limits):
            await refuse_unread(self.push_stream)
            self.push_stream.abort()
            return
        current_server.set(self)
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
            guard.strangers.emit(
                logs.line(
                    "connection_stopped_by_firewall",
                    address=self._peer(),
                    error=innermost(errors, first=True),
                )
            )
        finally:
            guard.sockets.leave()
            if isinstance(self.context, GuardedWorkerContext):
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
        if isinstance(self.context, GuardedWorkerContext):
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


class _Idle:
    """In place of a task for each idle connection: a deadline of the connection's scope."""

    def __init__(self, server: GuardedTCPServer) -> None:
        self._server = server

    async def restart(self, group: TaskGroup, action: Callable[[], Any]) -> None:
        self._server.set_idle(True)

    async def stop(self) -> None:
        self._server.set_idle(False)


class _Terminated(EventWrapper):
    """The server's end: idle connections do not wait for it, and it waits for the last."""

    def __init__(self, context: GuardedWorkerContext) -> None:
        super().__init__()
        self._context = context

    async def set(self) -> None:
        await super().set()
        for server in self._context.idle:
            server.cancel()
        # Hypercorn's graceful timeout, which may be 0, begins when this returns.
        await self._context.last()


class GuardedWorkerContext(WorkerContext):
    """Hypercorn's worker context, which an application can find with `worker`."""

    def __init__(self, max_requests: int | None) -> None:
        super().__init__(max_requests)
        self.idle: set[GuardedTCPServer] = set()
        self.terminated = _Terminated(self)
        self.last: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """Awaited when no connection is accepted any more, before any is cut; never raises."""
        _worker.set(self)


def worker() -> GuardedWorkerContext | None:
    """The worker that the current task runs in; None outside a guarded Hypercorn."""
    return _worker.get()
