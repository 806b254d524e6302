"""Rows of a database as records that can be encoded, by the `user_id` that they have.

1. Decimals leave as plain decimal strings and times as integer milliseconds, UTC. JSON in a column
   goes on as it stands.
2. A time without a zone is one of the zone that the settings name. MySQL gives a TIMESTAMP without
   one, in the zone of the session, which is UTC (see `engine`).
3. A value that cannot stand in JSON is an error of its row's user.
4. The cursor of a query of events is left as the driver gave it: `events` compares it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import Any
from uuid import UUID

import attrs
import msgspec
from sqlalchemy import Connection, CursorResult

from trading_push.errors import SourceError
from trading_push.models import milliseconds, plain_decimal
from trading_push.sources.sql.engine import MYSQL
from trading_push.sources.sql.plan import Plan
from trading_push.sources.sql.psycopg_answer import PsycopgAnswer

__all__ = ["Found", "RowReader", "in_parts"]

IDS_PER_QUERY = 500
"""How many users one query names.

Databases bound the parameters of one statement (the lowest bound in use is about 2,000, and a query
may name the list twice); more users are read in several queries on the same connection.
"""

# What may go into the JSON as it is; a row of nothing else needs no look at its values.
_PLAIN = frozenset({str, int, bool, type(None)})

# What PostgreSQL's inet and cidr are in Python.
_ADDRESSES = (IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network)
# What msgspec writes by itself: dates, times of day and durations by ISO 8601, bytes in base64.
_ENCODABLE = (
    *(str, int, float, bool, type(None), date, time, timedelta, UUID, dict, msgspec.Raw),
    *(bytes, bytearray, memoryview),
)

# What psycopg2 makes of 'infinity'; psycopg refuses it.
_INFINITE = (datetime.max, datetime.min)

# The types of columns as MySQL's protocol numbers them, whatever the driver.
_MYSQL_TIMESTAMP = 7
_MYSQL_DATES = (_MYSQL_TIMESTAMP, 10, 12)  # and DATE, DATETIME

_validate = msgspec.json.Decoder(msgspec.Raw).decode


@attrs.frozen
class Found:
    """What a query gave, by `user_id` as the database has it.

    Args:
        records: Rows without their `user_id`, in order.
        errors: Of ids that have a row which cannot stand in JSON.
    """

    records: dict[Any, list[Any]] = attrs.field(factory=dict)
    errors: dict[Any, SourceError] = attrs.field(factory=dict)


def in_parts(user_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut a list of users into parts that one query may name."""
    for start in range(0, len(user_ids), IDS_PER_QUERY):
        yield user_ids[start : start + IDS_PER_QUERY]


@attrs.frozen
class RowReader:
    """Reads the rows of queries.

    Args:
        turn: Entered while rows are fetched from the driver.
        zone: The time zone of times that have none.
    """

    turn: AbstractContextManager[Any]
    zone: tzinfo

    def read(self, connection: Connection, plan: Plan, user_ids: Sequence[str]) -> Found:
        """Read the rows of some users; of one user if the query asks for one.

        Rows without a column `user_id` are those of the one user.

        Raises:
            Exception: The database refused, or its driver cannot read what it gave.
        """
        found = Found()
        for ids in in_parts(user_ids):
            alone = None if plan.many else ids[0]
            result = connection.execute(plan.statement, plan.parameters(ids))
            columns = list(result.keys())
            zones = self._zones(result, columns)
            infinite = _INFINITE if result.dialect.driver == "psycopg2" else ()
            dates = _date_columns(result, columns)
            answer = PsycopgAnswer.of(result)
            try:
                with self.turn:
                    rows: Sequence[Sequence[Any]] = result.all()
            except Exception:
                if answer is None:
                    raise
                # One value that Python has no object for: the others' rows are there.
                rows, unreadable = answer.rows(columns)
                for user_id, error in unreadable:
                    user = alone if user_id is None else user_id
                    found.errors[user] = SourceError(
                        f"{plan.data_type}: a row cannot be read: {error}", retryable=False
                    )
            if dates:
                rows = _without_texts(plan, columns, dates, rows, alone, found)
            _sort(plan, columns, zones, infinite, rows, alone, found)
        return found

    def _zones(self, result: CursorResult[Any], columns: Sequence[str]) -> Sequence[tzinfo]:
        """Return the time zone of each column, for times that have none."""
        zones = [self.zone] * len(columns)
        if result.dialect.name in MYSQL:
            for place, (_, kind, *_) in enumerate(result.cursor.description):
                if kind == _MYSQL_TIMESTAMP:
                    zones[place] = UTC
        return zones


def _date_columns(result: CursorResult[Any], columns: Sequence[str]) -> Sequence[int]:
    """Return the places of MySQL's dates and times; none in another database."""
    if result.dialect.name not in MYSQL:
        return ()
    kinds = [kind for _, kind, *_ in result.cursor.description]
    return [place for place in range(len(columns)) if kinds[place] in _MYSQL_DATES]


def _without_texts(
    plan: Plan,
    columns: Sequence[str],
    dates: Sequence[int],
    rows: Sequence[Sequence[Any]],
    alone: str | None,
    found: Found,
) -> Sequence[Sequence[Any]]:
    """Leave out rows with a date that is none (0000-00-00), which PyMySQL gives as a text."""
    good = []
    user_at = columns.index("user_id") if "user_id" in columns else None
    for row in rows:
        wrong = next((place for place in dates if isinstance(row[place], str)), None)
        if wrong is None:
            good.append(row)
            continue
        user = alone if user_at is None else _hashable(row[user_at])
        found.errors[user] = SourceError(
            f"{plan.data_type}: column {columns[wrong]} holds a date that there is not (as "
            f"0000-00-00): write NULLIF({columns[wrong]}, 0) in the query",
            retryable=False,
        )
    return good


def _sort(
    plan: Plan,
    columns: Sequence[str],
    zones: Sequence[tzinfo],
    infinite: Sequence[datetime],
    rows: Sequence[Sequence[Any]],
    alone: str | None,
    found: Found,
) -> None:
    """Put each row to those of its user_id; a row without one is that of `alone`."""
    plain = _PLAIN.issuperset
    for row in rows:
        record = dict(zip(columns, row, strict=True))
        user = record.pop("user_id", alone)
        try:
            if not plain(map(type, row)):
                user = _hashable(user)
                for column, zone in zip(columns, zones, strict=True):
                    value = record.get(column)
                    if type(value) not in _PLAIN and column != plan.cursor:
                        record[column] = _convert(plan, column, zone, infinite, value)
            for column in plan.json_columns:
                if isinstance(value := record.get(column), str):
                    record[column] = _splice(plan, column, value)
            for column in plan.as_text:
                if type(value := record.get(column)) in (int, float):
                    record[column] = plain_decimal(Decimal(repr(value)))
        except SourceError as error:
            found.errors[user] = error
            continue
        if user in found.records:
            found.records[user].append(record)
        else:
            found.records[user] = [record]


def _hashable(user_id: Any) -> Any:
    try:
        hash(user_id)
    except TypeError:
        return str(user_id)
    return user_id


def _convert(
    plan: Plan, column: str, zone: tzinfo, infinite: Sequence[datetime], value: Any
) -> Any:
    if isinstance(value, Decimal | float) and not math.isfinite(value):
        raise SourceError(
            f"{plan.data_type}: column {column} holds {value}, which is no amount",
            retryable=False,
        )
    if isinstance(value, Decimal):
        return plain_decimal(value)
    if isinstance(value, datetime):
        if infinite and value.replace(tzinfo=None) in infinite:
            raise SourceError(
                f"{plan.data_type}: column {column} holds an infinity, which is no time",
                retryable=False,
            )
        return milliseconds(value if value.tzinfo is not None else value.replace(tzinfo=zone))
    if isinstance(value, list):  # an array
        return [_convert(plan, column, zone, infinite, each) for each in value]
    if isinstance(value, _ADDRESSES):
        return str(value)
    if not isinstance(value, _ENCODABLE):
        raise SourceError(
            f"{plan.data_type}: column {column} holds a {type(value).__name__}, which JSON has no "
            f"form for: write CAST({column} AS text), or what it is to be, in the query",
            retryable=False,
        )
    return value


def _splice(plan: Plan, column: str, value: str) -> msgspec.Raw:
    try:
        _validate(value)
        return msgspec.Raw(value.encode())
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise SourceError(
            f"{plan.data_type}: column {column} is not JSON", retryable=False
        ) from None
