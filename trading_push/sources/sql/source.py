"""An SQL database as a source: configured queries, many users in one, run in worker threads.

1. Every fetch is one call in a worker thread, which takes one connection, uses it and gives it back
   before it ends; nothing is held between two calls. There are as many connections as threads, and
   where there are several types, none may use all of them.
2. The event loop does no work on the rows: they leave the thread as encoded JSON.
3. No URL, password or parameter is in the text of an error.
4. Each read is a read-only transaction of its own (see `engine`). An SQLite file is opened
   read-only: a reader can neither make nor change it. (A URL with options of its own, after a `?`,
   says itself how it is opened.)
5. A thread cannot be cancelled, so a statement has a deadline that the database itself holds:
   PostgreSQL, SQLite, MySQL and MariaDB have `statement_timeout_s`. For another database the
   driver's own time-out belongs into the URL, or to the role that reads.
6. User ids are bound as untyped strings, so that the database compares them with a column of its
   own type. Whose a row is, is compared again (see `answers`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, tzinfo
from functools import partial
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import trio
from sqlalchemy import Connection
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, DBAPIError, SQLAlchemyError

from trading_push import logs
from trading_push.errors import ConfigurationError, SourceError
from trading_push.settings.sources import Query
from trading_push.settings.validators import is_time_zone
from trading_push.sources.base import NewEvents, NoValue
from trading_push.sources.sql.answers import Answer, Rows, answers, refused, told_apart
from trading_push.sources.sql.engine import (
    beginning,
    is_sqlite_file,
    open_engine,
    parse,
    transaction,
)
from trading_push.sources.sql.events import EventReader
from trading_push.sources.sql.plan import Plan, check_columns, make_plan
from trading_push.sources.sql.rows import Found, RowReader, in_parts
from trading_push.sources.sql.slots import TypeSlots
from trading_push.sources.sql.sqlite_json import WholeReader
from trading_push.sources.sqlite import is_in_wal_mode
from trading_push.user_ids import IdKind, UserIds

__all__ = ["SqlSource"]


class SqlSource:
    """Reads each data type by its query; a `BatchSource`.

    Args:
        url: The database as SQLAlchemy names it, with a synchronous driver. A path that may hold a
            `?` goes into a `sqlalchemy.URL`.
        queries: A query for each data type. A type without one has nothing to say.
        threads: How many fetches may run at the same time, each with a connection; of one type,
            where there are several, at most one less.
        statement_timeout_s: How long one query may take, in PostgreSQL, SQLite, MySQL or MariaDB.
        user_id: How the database compares user ids; see `UserIds`.
        time_zone: The time zone, by its IANA name, of times that have none.
        value_bytes: How long a user's value may be as JSON; a longer one is an error.

    Raises:
        ConfigurationError: The URL, its driver, a query's shape or the time zone is wrong.
    """

    def __init__(
        self,
        url: str | URL,
        queries: Mapping[str, Query],
        *,
        threads: int = 4,
        statement_timeout_s: float = 30,
        user_id: IdKind = "text",
        time_zone: str = "UTC",
        value_bytes: int = 1_000_000,
    ) -> None:
        self._value_bytes = value_bytes
        self._ids = UserIds(user_id)
        self._plans = {name: make_plan(name, query) for name, query in queries.items()}
        self._limiter = trio.CapacityLimiter(threads)
        # By data type; one of several types leaves a thread to the others.
        most = threads if len(self._plans) == 1 else max(1, threads - 1)
        self._slots = {name: TypeSlots(most, self._limiter) for name in self._plans}
        self._url = parse(url)
        self._is_sqlite_file = is_sqlite_file(self._url)
        # Python's SQLite driver releases the interpreter at each row: two threads that read rows
        # at the same time do little else than hand it to each other.
        turn: AbstractContextManager[Any]
        turn = threading.Lock() if self._is_sqlite_file else nullcontext()
        self._reader = RowReader(turn, _zone(time_zone))
        # Of the queries of events, by data type.
        self._events = {
            name: EventReader(plan, self._reader, self._ids, value_bytes)
            for name, plan in self._plans.items()
            if plan.cursor is not None
        }
        self._engine = open_engine(self._url, threads, statement_timeout_s)
        # What begins the transaction of each read.
        self._begin = beginning(self._url, statement_timeout_s)
        # From then on a connection that comes back is closed.
        self._closed = False
        # Reads an SQLite file, as far as it can.
        self._whole = WholeReader()

    @property
    def data_types(self) -> Sequence[str]:
        """The data types that it has: those with a query."""
        return tuple(self._plans)

    @property
    def event_types(self) -> Sequence[str]:
        """Those of its data types that are events: their queries have a cursor."""
        return tuple(self._events)

    def batch_size(self, data_type: str) -> int | None:
        """Return how many users one call should name at most; None for any number.

        One where the query asks for one user: each then has a call, and a deadline, of their own.
        """
        plan = self._plans.get(data_type)
        return None if plan is None or plan.many else 1

    async def check(self) -> None:
        """Run each query for nobody, in a worker thread, to find a mistake at the start.

        Cancellation abandons the thread, which gives its connection back by itself.

        Raises:
            ConfigurationError: The database cannot be opened, or a query cannot be run or has not
                the columns that it needs.
        """
        unverified = await trio.to_thread.run_sync(
            self._check, abandon_on_cancel=True, limiter=self._limiter
        )
        if unverified:
            logs.emit(logs.line("users_unverified", data_types=", ".join(unverified)))

    async def fetch(self, user_id: str, data_type: str) -> msgspec.Raw | NewEvents | NoValue | None:
        """Read one user's current value; see `fetch_many`.

        Raises:
            SourceError: The database refused, or gave what cannot be this user's value.
        """
        value = (await self.fetch_many((user_id,), data_type)).get(user_id)
        if isinstance(value, SourceError):
            raise value
        return value

    async def fetch_many(
        self, user_ids: Sequence[str], data_type: str
    ) -> Mapping[str, Answer | NewEvents]:
        """Read the current values as encoded JSON, by user id; each user asked for is among them.

        Cancellation abandons the thread, which gives its connection back by itself; it counts as
        one of the threads until then.

        Returns:
            An empty mapping for a data type without a query. A value is `NO_VALUE` where the query
            is `single`, has no `empty` and gave no row, `NewEvents` where the query has a cursor,
            and a `SourceError` where this user's rows
            cannot be given.

        Raises:
            SourceError: The database refused, or its driver cannot read what it gave.
        """
        plan = self._plans.get(data_type)
        if plan is None or not user_ids:
            return {}
        values: dict[str, Answer | NewEvents] = {**refused(self._ids, user_ids)}
        asked = [user for user in user_ids if user not in values] if values else user_ids
        if asked:
            slots: Any = self._slots[data_type]  # trio takes anything with its two methods
            values |= await trio.to_thread.run_sync(
                self._read, plan, asked, abandon_on_cancel=True, limiter=slots
            )
        return values

    def close(self) -> None:
        """Close the idle connections at once, and the others when they come back."""
        self._closed = True
        self._engine.dispose()

    def _read(self, plan: Plan, user_ids: Sequence[str]) -> dict[str, Answer | NewEvents]:
        # A query that asks for one user is run for each of them.
        parts = [user_ids] if plan.many else [[user] for user in user_ids]
        events = self._events.get(plan.data_type)
        values: dict[str, Answer | NewEvents] = {}
        read: list[Rows] = []
        try:
            with self._engine.connect() as connection:
                with transaction(connection, self._begin):
                    if events is not None:
                        values |= events.read(connection, user_ids)
                        parts = []
                    rows = partial(self._rows, connection, plan)
                    for users in parts:
                        read += told_apart(plan, self._ids, users, rows)
                if self._closed:
                    connection.detach()
        except Exception as error:  # a driver raises more than its own errors
            raise SourceError(
                self._first_line(error), retryable=not isinstance(error, DataError | ValueError)
            ) from None
        for each in read:
            values |= answers(plan, each, self._value_bytes)
        return values

    def _rows(self, connection: Connection, plan: Plan, user_ids: Sequence[str]) -> Found:
        """Read some users' rows in a form that can be encoded."""
        # At best SQLite makes one text of them all.
        if plan.many and self._is_sqlite_file:
            found = self._whole.read(connection, plan, in_parts(user_ids))
            if found is not None:
                return Found(dict(found))
        return self._reader.read(connection, plan, user_ids)

    def _check(self) -> list[str]:
        """Run each query; return the types whose rows do not say whose they are."""
        if self._is_sqlite_file and not Path(str(self._url.database)).is_file():
            raise ConfigurationError(
                f"there is no database file {self._url.database}: correct the database's url"
            )
        unverified = []
        try:
            with self._engine.connect() as connection:
                for plan in self._plans.values():
                    if "user_id" not in self._columns(connection, plan):
                        unverified.append(plan.data_type)
        except ConfigurationError:
            raise
        except Exception as error:  # a driver raises more than its own errors
            raise ConfigurationError(
                f"the database cannot be opened ({self._first_line(error)}): "
                f"{self._advice(error, 'correct the url, or start the database')}"
            ) from None
        return unverified

    def _columns(self, connection: Connection, plan: Plan) -> Sequence[str]:
        # NULL compares with a column of any type, and equals none. Two of them show a query that
        # can do with one user only.
        parameters = plan.parameters([None, None])
        try:
            with transaction(connection, self._begin):
                columns = list(connection.execute(plan.statement, parameters).keys())
                if plan.cursor is not None and {plan.cursor, "user_id"}.issubset(columns):
                    first = self._events[plan.data_type].first(connection)
                    connection.execute(first.statement, parameters)
        except Exception as error:  # as above
            raise ConfigurationError(
                f"the query of {plan.data_type} cannot be run ({self._first_line(error)}): "
                f"{self._advice(error, 'correct the query, or the url of the database')}"
            ) from None
        check_columns(plan, columns)
        return columns

    def _advice(self, error: Exception, usual: str) -> str:
        """Say what to do about an error; where it is not known better, as usual."""
        name = getattr(getattr(error, "orig", None), "sqlite_errorname", "")
        if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY")) and is_in_wal_mode(
            str(self._url.database)
        ):
            return (
                "the file is in WAL mode, where a reader, too, writes beside it: let this user "
                "write in its directory, or end that mode (PRAGMA journal_mode = DELETE)"
            )
        return usual

    def _first_line(self, error: Exception) -> str:
        """Return what the driver said, in one line; SQLAlchemy's own text holds the parameters."""
        cause: BaseException | None = error
        if isinstance(error, SQLAlchemyError):
            cause = error.orig if isinstance(error, DBAPIError) else None
        lines = str(cause or "").strip().splitlines()
        line = lines[0] if lines else type(cause or error).__name__
        password = self._url.password
        return line.replace(str(password), "***") if password else line


def _zone(name: str) -> tzinfo:
    if not is_time_zone(name):
        raise ConfigurationError(
            f"there is no time zone {name!r}: give an IANA name, like Asia/Shanghai"
        )
    return UTC if name == "UTC" else ZoneInfo(name)
