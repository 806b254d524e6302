"""Rows of a database as encoded JSON, by user.

Decimals leave as plain decimal strings and times as integer milliseconds, UTC. JSON in a column
goes on as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec
from sqlalchemy import Connection

from trading_push.errors import SourceError
from trading_push.models import milliseconds, plain_decimal
from trading_push.sources.sql.plan import Plan

__all__ = ["encode_rows", "in_parts", "read_rows"]

IDS_PER_QUERY = 500
"""How many users one query names.

Databases bound the parameters of one statement (the lowest bound in use is about 2,000, and a query
may name the list twice); more users are read in several queries on the same connection.
"""

# What may go into the JSON as it is; a row of nothing else needs no look at its values.
_PLAIN = frozenset({str, int, bool, type(None)})

_encode = msgspec.json.Encoder().encode
_validate = msgspec.json.Decoder(msgspec.Raw).decode


def in_parts(user_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut a list of users into parts that one query may name."""
    for start in range(0, len(user_ids), IDS_PER_QUERY):
        yield user_ids[start : start + IDS_PER_QUERY]


def read_rows(
    connection: Connection,
    plan: Plan,
    user_ids: Sequence[str],
    turn: AbstractContextManager[Any],
) -> dict[str, list[dict[str, Any]]]:
    """Read each user's rows as dictionaries that can be encoded, without their user_id.

    Args:
        connection: Where to read.
        plan: The query.
        user_ids: Whom to read for.
        turn: Entered while rows are fetched from the driver.

    Raises:
        SQLAlchemyError: The database refused.
        SourceError: A value cannot stand in JSON.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    if not plan.many:
        # A query for each user.
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
    # A query for each part of the users.
    for ids in in_parts(user_ids):
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
    plan: Plan, columns: list[str], rows: Iterable[Sequence[Any]]
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


def _convert(plan: Plan, column: str, value: Any) -> Any:
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


def _splice(plan: Plan, column: str, value: str) -> msgspec.Raw:
    try:
        _validate(value)
        return msgspec.Raw(value.encode())
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise SourceError(
            f"{plan.data_type}: column {column} is not JSON", retryable=False
        ) from None


def encode_rows(plan: Plan, records: Sequence[Any] | None) -> msgspec.Raw | None:
    """Encode the rows of one user.

    Returns:
        The query's `empty` where there are none.

    Raises:
        SourceError: They cannot be encoded, or are several where the query is `single`.
    """
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
