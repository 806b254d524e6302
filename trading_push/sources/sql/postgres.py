"""PostgreSQL as a source that tells what has changed: LISTEN on a channel, in trio.

1. A notification's payload is a JSON object: `{"user": 4, "type": "balance"}`, the user as a string
   or a number; without `type` all of the user's data have changed. Other keys are passed over.
2. Notifications sent while no one listens are lost for good (PostgreSQL's manual, LISTEN). So after
   each connect, once LISTEN has been confirmed, the sink is told that changes may have been missed.
3. One connection besides those of the pool is held while a user is watched. It is opened in a
   worker thread, because libpq blocks while it looks up a name; from then on it is read through its
   file descriptor, without a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import trio
from sqlalchemy.engine import URL

from trading_push import logs
from trading_push.errors import ConfigurationError, SourceError
from trading_push.settings.sources import Query
from trading_push.sources.base import ChangeSink
from trading_push.sources.sql.engine import parse
from trading_push.sources.sql.source import SqlSource

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.pq.abc import PGconn

__all__ = ["PostgresSource"]

LISTEN_TIMEOUT_S = 10
"""How long the server may take to confirm LISTEN."""

_POOLED = (
    "nothing is heard of notify_channel through a pooler in transaction mode (PgBouncer): give the "
    "url of PostgreSQL itself or of a pool in session mode, or remove notify_channel"
)


class _Changed(msgspec.Struct):
    """What a notification says."""

    user: str | int
    type: str | None = None


_decode = msgspec.json.Decoder(_Changed).decode


class PostgresSource(SqlSource):
    """Reads as an `SqlSource`, and is told of changes by NOTIFY; a `WatchingSource`.

    Args:
        url: A database of PostgreSQL. Whatever driver it names, it is read by psycopg 3.
        queries: A query for each data type.
        notify_channel: The channel to LISTEN on.
        options: Further arguments of an `SqlSource`.

    Raises:
        ConfigurationError: The URL, its driver or a query's shape is wrong, or psycopg is missing.
    """

    def __init__(
        self,
        url: str | URL,
        queries: Mapping[str, Query],
        notify_channel: str,
        **options: Any,
    ) -> None:
        parsed = parse(url)
        if parsed.get_backend_name() != "postgresql":
            raise ConfigurationError(
                "only PostgreSQL has a notify_channel: give a url like "
                "postgresql+psycopg://user:password@host/name, or no notify_channel"
            )
        super().__init__(parsed.set(drivername="postgresql+psycopg"), queries, **options)
        import psycopg  # an extra of the package; without it the engine has raised already

        self._psycopg = psycopg
        self._channel = notify_channel
        # Bounds the threads that open a connection. One that was abandoned counts until it ends,
        # so that no more than one connection is ever being opened.
        self._opening = trio.CapacityLimiter(1)
        # Whether an unusable notification was logged; it is once only.
        self._logged_unusable = False

    async def watch(self, sink: ChangeSink) -> None:
        """Tell the sink what is notified, until cancelled; see `WatchingSource`.

        Cancellation closes the connection. One that a thread is opening at that moment is closed by
        the thread.

        Raises:
            SourceError: The connection could not be made, or is lost.
        """
        try:
            await self._listen(sink)
        except self._psycopg.Error as error:
            raise SourceError(self._first_line(error)) from None
        except trio.TooSlowError:
            raise SourceError(f"no answer to LISTEN within {LISTEN_TIMEOUT_S} s") from None

    async def _listen(self, sink: ChangeSink) -> None:
        # Shared with the thread that connects, under the lock.
        opened: list[Connection[Any]] = []
        lock = threading.Lock()
        left = False

        def connect() -> None:
            connection = self._connect()
            with lock:
                opened.append(connection)
                if left:  # cancelled while it was being opened
                    connection.close()

        try:
            await trio.to_thread.run_sync(connect, abandon_on_cancel=True, limiter=self._opening)
            (connection,) = opened
            server = connection.pgconn
            with trio.fail_after(LISTEN_TIMEOUT_S):
                await _command(server, f'LISTEN "{self._channel}"')
            sink.missed()
            while True:
                # Before the first wait: some may have come along with an earlier answer.
                changes = []
                while (notification := server.notifies()) is not None:
                    changes += self._changes(notification.extra)
                if changes:
                    sink.changed(changes)
                    # TLS may hold more where the socket has nothing: read again before waiting.
                    await trio.lowlevel.checkpoint()
                else:
                    await trio.lowlevel.wait_readable(server.socket)
                server.consume_input()
        finally:
            with lock:
                left = True
                for connection in opened:
                    if not connection.broken:  # libpq has closed the socket of a broken one
                        trio.lowlevel.notify_closing(connection.fileno())
                    connection.close()

    def _connect(self) -> Connection[Any]:
        """Open a connection; in a worker thread (rule 3), for no longer than its time-out.

        Raises:
            SourceError: It is one of a pooler that gives each transaction another session.
        """
        _, parameters = self._engine.dialect.create_connect_args(self._engine.url)
        parameters["autocommit"] = True
        connection: Connection[Any] = self._psycopg.Connection.connect(**parameters)
        try:
            session = _session(connection)
            # A pooler says another number than the session has. LISTEN works if it keeps one
            # session for each connection, and does not if a second connection gets the same one.
            if session != connection.info.backend_pid:
                with self._psycopg.Connection.connect(**parameters) as other:
                    if _session(other) == session:
                        raise SourceError(_POOLED, retryable=False)
        except BaseException:
            connection.close()
            raise
        return connection

    def _changes(self, payload: bytes) -> list[tuple[str, str]]:
        """Read a notification: the users and data types that have changed."""
        try:
            changed = _decode(payload)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            if not self._logged_unusable:
                self._logged_unusable = True
                text = payload.decode(errors="replace")
                logs.emit(
                    logs.line(
                        "notification_unusable", channel=self._channel, payload=text, error=error
                    )
                )
            return []
        types = self._plans if changed.type is None else (changed.type,)
        return [(str(changed.user), data_type) for data_type in types]


def _session(connection: Connection[Any]) -> int:
    """Return the number of the server's session that the connection has at the moment."""
    ((number,),) = connection.execute("SELECT pg_backend_pid()").fetchall()
    return int(number)


async def _command(server: PGconn, command: str) -> None:
    """Run a command that returns no rows."""
    server.send_query(command.encode())  # it fits into the empty buffer of a new socket
    error = b""
    while True:
        while server.is_busy():
            await trio.lowlevel.wait_readable(server.socket)
            server.consume_input()
        result = server.get_result()
        if result is None:
            break
        error = error or result.error_message
    if error:
        raise SourceError(error.decode(errors="replace").splitlines()[0])
