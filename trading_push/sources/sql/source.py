"""An SQL database as a source: configured queries, many users in one, read in worker threads.

1. Every fetch is one call in a worker thread, which takes one connection, uses it and gives it back
   before it ends; nothing is held between two calls. There are as many connections as threads.
2. The event loop does no work on the rows: they leave the thread as encoded JSON.
3. Decimals leave as plain decimal strings and times as integer milliseconds, UTC.
4. No URL, password or parameter is in the text of an error.
5. An SQLite file is opened read-only: a reader can neither make nor change it (a URL with options
   of its own, after a `?`, says itself how).
6. A thread cannot be cancelled, so a statement has a deadline that the database itself holds:
   PostgreSQL and an SQLite file have `statement_timeout_s`. For another database the driver's own
   time-out belongs into the URL (`?read_timeout=30` for PyMySQL), or to the role that reads.

User ids are bound as untyped strings, so that the database compares them with a column of its own
type.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import msgspec
import trio
from sqlalchemy import (
    BindParameter,
    Connection,
    TextClause,
    bindparam,
    text,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, DBAPIError, SQLAlchemyError

from trading_push.errors import ConfigurationError, SourceError
from trading_push.models import milliseconds, plain_decimal
from trading_push.settings.sources import Query
from trading_push.sources.sql import sqlite_json
from trading_push.sources.sql.engine import is_sqlite_file, make_engine, parse

__all__ = ["SqlSource", "parse"]

# Databases bound the parameters of one statement (the lowest bound in use is about 2,000, and a
# query may name the list twice); more users are read in several queries on the same connection.
IDS_PER_QUERY = 500


# What may go into the JSON as it is; a row of nothing else needs no look at its values.
_PLAIN = frozenset({str, int, bool, type(None)})
_LIST_IN_BRACKETS = re.compile(r"\(\s*:user_ids\s*\)")

_encode = msgspec.json.Encoder().encode
_validate = msgspec.json.Decoder(msgspec.Raw).decode


@attrs.frozen
class _Plan:
    """A query made ready to run."""

    data_type: str
    sql: str
    bind: BindParameter[str]
    statement: TextClause
    many: bool
    single: bool
    json_columns: tuple[str, ...]
    empty: msgspec.Raw | None


class SqlSource:
    """Reads each data type by its query; a `BatchSource`.

    Args:
        url: The database as SQLAlchemy names it, with a synchronous driver. A path that may hold a
            `?` goes into a `sqlalchemy.URL`.
        queries: A query for each data type. A type without one has nothing to say.
        threads: How many fetches may run at the same time, each with a connection.
        statement_timeout_s: How long PostgreSQL, or an SQLite file, may take for one query.

    Raises:
        ConfigurationError: The URL, its driver or a query's shape is wrong.
    """

    def __init__(
        self,
        url: str | URL,
        queries: Mapping[str, Query],
        *,
        threads: int = 4,
        statement_timeout_s: float = 30,
    ) -> None:
        self._plans = {name: _plan(name, query) for name, query in queries.items()}
        self._limiter = trio.CapacityLimiter(threads)
        self._url = parse(url)
        # Python's driver gives the interpreter away at each row: two threads that read rows at the
        # same time do little else than hand it to each other.
        self._is_sqlite_file = is_sqlite_file(self._url)
        self._one_reads: AbstractContextManager[Any]
        self._one_reads = threading.Lock() if self._is_sqlite_file else nullcontext()
        self._engine = make_engine(self._url, threads, statement_timeout_s)
        self._closed = False
        self._whole: dict[str, TextClause | None] = {}  # None: to be read row by row

    async def check(self) -> None:
        """Run each query for nobody, in a worker thread, to find a mistake at the start.

        Cancellation abandons the thread, which gives its connection back by itself.

        Raises:
            ConfigurationError: The database cannot be opened, or a query cannot be run or has not
                the columns that it needs.
        """
        await trio.to_thread.run_sync(self._check, abandon_on_cancel=True, limiter=self._limiter)

    async def fetch(self, user_id: str, data_type: str) -> msgspec.Raw | None:
        """One user's current value; see `fetch_many`."""
        return (await self.fetch_many((user_id,), data_type)).get(user_id)

    async def fetch_many(
        self, user_ids: Sequence[str], data_type: str
    ) -> Mapping[str, msgspec.Raw | None]:
        """The current values as encoded JSON, by user id, each user asked for among them.

        Cancellation abandons the thread, which gives its connection back by itself; it counts as
        one of the threads until then.

        Returns:
            An empty mapping for a data type without a query. None where the query is `single`, has
            no `empty` and gave no row.

        Raises:
            SourceError: The database refused, or gave what cannot stand in JSON.
        """
        plan = self._plans.get(data_type)
        if plan is None or not user_ids:
            return {}
        return await trio.to_thread.run_sync(
            self._read, plan, user_ids, abandon_on_cancel=True, limiter=self._limiter
        )

    def close(self) -> None:
        """Close the connections, at once those that are idle, the others when they come back."""
        self._closed = True
        self._engine.dispose()

    def _read(self, plan: _Plan, user_ids: Sequence[str]) -> dict[str, msgspec.Raw | None]:
        try:
            with self._engine.connect() as connection:
                rows = self._rows(connection, plan, user_ids)
                if self._closed:
                    connection.detach()
        except SQLAlchemyError as error:
            raise SourceError(
                self._first_line(error), retryable=not isinstance(error, DataError)
            ) from None
        return {user: _value(plan, rows.get(user)) for user in user_ids}

    def _rows(
        self, connection: Connection, plan: _Plan, user_ids: Sequence[str]
    ) -> Mapping[str, Sequence[Any]]:
        """Each user's rows as what can be encoded, where there are any."""
        if plan.many and self._is_sqlite_file:
            if plan.data_type not in self._whole:
                columns = list(connection.execute(plan.statement, {"user_ids": [None]}).keys())
                self._whole[plan.data_type] = sqlite_json.whole(
                    plan.sql, plan.bind, columns, plan.json_columns
                )
            if (statement := self._whole[plan.data_type]) is not None:
                found = sqlite_json.read_whole(connection, statement, _parts(user_ids))
                if found is not None:
                    return found
                self._whole[plan.data_type] = None  # it would not be otherwise the next time
        return _rows(connection, plan, user_ids, self._one_reads)

    def _check(self) -> None:
        if self._is_sqlite_file and not Path(str(self._url.database)).is_file():
            raise ConfigurationError(
                f"there is no database file {self._url.database}: correct the database's url"
            )
        try:
            with self._engine.connect() as connection:
                for plan in self._plans.values():
                    # NULL compares with a column of any type, and equals none.
                    parameters = {"user_ids": [None]} if plan.many else {"user_id": None}
                    try:
                        result = connection.execute(plan.statement, parameters)
                        _check_columns(plan, list(result.keys()))
                    except SQLAlchemyError as error:
                        raise ConfigurationError(
                            f"the query of {plan.data_type} cannot be run "
                            f"({self._first_line(error)}): correct the query or the database's url"
                        ) from None
        except SQLAlchemyError as error:
            raise ConfigurationError(
                f"the database cannot be opened ({self._first_line(error)}): "
                "correct the database's url, or start the database"
            ) from None

    def _first_line(self, error: Exception) -> str:
        """What the driver said, in one line. SQLAlchemy's own text holds the parameters."""
        cause: BaseException | None = error
        if isinstance(error, SQLAlchemyError):
            cause = error.orig if isinstance(error, DBAPIError) else None
        lines = str(cause or "").strip().splitlines()
        line = lines[0] if lines else type(cause or error).__name__
        password = self._url.password
        return line.replace(str(password), "***") if password else line


def _plan(data_type: str, query: Query) -> _Plan:
    statement = text(_LIST_IN_BRACKETS.sub(":user_ids", query.sql))
    try:
        parameters = set(statement.compile().params)
    except SQLAlchemyError:
        parameters = set()
    if parameters not in ({"user_ids"}, {"user_id"}):
        raise ConfigurationError(
            f"the query of {data_type} must name :user_ids (many users, IN :user_ids) or :user_id "
            "(one user), and no other parameter; a colon that is none is written \\:"
        )
    empty = query.empty if query.empty is not None else None if query.single else "[]"
    try:
        if empty is not None:
            _validate(empty)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise ConfigurationError(
            f"the query of {data_type} has an 'empty' that is not JSON: correct it"
        ) from None
    many = parameters == {"user_ids"}
    # Without a type: the driver then casts nothing, and a column of integers finds "4" as well.
    bind: BindParameter[str] = bindparam("user_ids" if many else "user_id", expanding=many)
    return _Plan(
        data_type=data_type,
        sql=_LIST_IN_BRACKETS.sub(":user_ids", query.sql),
        bind=bind,
        statement=statement.bindparams(bind),
        many=many,
        single=query.single,
        json_columns=tuple(query.json_columns),
        empty=None if empty is None else msgspec.Raw(empty.encode()),
    )


def _check_columns(plan: _Plan, columns: list[str]) -> None:
    needed = (*plan.json_columns, *(("user_id",) if plan.many else ()))
    for column in needed:
        if column not in columns:
            raise ConfigurationError(
                f"the query of {plan.data_type} gives no column {column}: correct the query"
            )
    if len(set(columns)) != len(columns):
        raise ConfigurationError(
            f"the query of {plan.data_type} gives two columns of one name: name them with AS"
        )


def _parts(user_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(user_ids), IDS_PER_QUERY):
        yield user_ids[start : start + IDS_PER_QUERY]


def _rows(
    connection: Connection,
    plan: _Plan,
    user_ids: Sequence[str],
    turn: AbstractContextManager[Any],
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each user as dictionaries that can be encoded, their user_id dropped."""
    found: dict[str, list[dict[str, Any]]] = {}
    if not plan.many:
        for user in user_ids:
            result = connection.execute(plan.statement, {"user_id": user})
            with turn:
                rows = result.all()
            records = list(_records(plan, list(result.keys()), rows))
            for record in records:
                record.pop("user_id", None)
            if records:
                found[user] = records
        return found
    for ids in _parts(user_ids):
        result = connection.execute(plan.statement, {"user_ids": ids})
        with turn:
            rows = result.all()
        for record in _records(plan, list(result.keys()), rows):
            user = str(record.pop("user_id", None))
            if user in found:
                found[user].append(record)
            else:
                found[user] = [record]
    return found


def _records(
    plan: _Plan, columns: list[str], rows: Iterable[Sequence[Any]]
) -> Iterable[dict[str, Any]]:
    plain = _PLAIN.issuperset
    for row in rows:
        record = dict(zip(columns, row, strict=True))
        if not plain(map(type, row)):
            for column, value in record.items():
                if type(value) not in _PLAIN and column != "user_id":
                    record[column] = _convert(plan, column, value)
        for column in plan.json_columns:
            if isinstance(value := record.get(column), str):
                record[column] = _splice(plan, column, value)
        yield record


def _convert(plan: _Plan, column: str, value: Any) -> Any:
    if isinstance(value, Decimal | float) and not math.isfinite(value):
        raise SourceError(
            f"{plan.data_type}: column {column} holds {value}, which is no amount",
            retryable=False,
        )
    if isinstance(value, Decimal):
        return plain_decimal(value)
    if isinstance(value, datetime):
        return milliseconds(value)
    if isinstance(value, list):  # an array
        return [_convert(plan, column, each) for each in value]
    return value


def _splice(plan: _Plan, column: str, value: str) -> msgspec.Raw:
    try:
        _validate(value)
        return msgspec.Raw(value.encode())
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise SourceError(
            f"{plan.data_type}: column {column} is not JSON", retryable=False
        ) from None


def _value(plan: _Plan, records: Sequence[Any] | None) -> msgspec.Raw | None:
    if not records:
        return plan.empty
    if plan.single and len(records) > 1:
        raise SourceError(
            f"{plan.data_type}: the query gives several rows for one user, but is 'single'",
            retryable=False,
        )
    try:
        return msgspec.Raw(_encode(records[0] if plan.single else records))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise SourceError(
            f"{plan.data_type}: a row cannot be encoded: {error}", retryable=False
        ) from None
