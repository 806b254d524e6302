"""Let SQLite itself make one JSON text of many users' rows.

Python's driver releases the interpreter before each row and takes it back afterwards. Beside a busy
event loop most of the time of reading is spent waiting for that, and the loop waits as often. One
text is one row.

SQLite prints a REAL with fewer digits than it has, and has no JSON for a BLOB. What holds one is
read row by row, and so is a query that is not a plain SELECT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError

from trading_push.sources.sql.plan import Plan

__all__ = ["WholeReader"]

# A number with a point. Where it matches inside a text, that costs time and nothing else.
_REAL = re.compile(r'":-?\d+\.')
_decode = msgspec.json.Decoder(list[tuple[str, msgspec.Raw]]).decode


class WholeReader:
    """Reads rows of an SQLite file as one text, where that is possible."""

    def __init__(self) -> None:
        # By data type, the version of the file's schema that the query was made for, and the query;
        # None where the rows have to be read one by one.
        self._queries: dict[str, tuple[int, TextClause | None]] = {}

    def read(
        self, connection: Connection, plan: Plan, parts: Iterable[Sequence[str]]
    ) -> dict[str, list[msgspec.Raw]] | None:
        """Read the rows of some users; see `_read_whole`."""
        version, query = self._queries.get(plan.data_type, (None, None))
        # The names stand in the query: a column may have been renamed, or moved, since it was made.
        if version != (version := _schema_version(connection)):
            result = connection.execute(plan.statement, plan.parameters([None]))
            query = _whole(plan, list(result.keys()))
        found = None if query is None else _read_whole(connection, query, parts)
        # Where it fails, it would fail in the same way the next time.
        self._queries[plan.data_type] = version, None if found is None else query
        return found


def _schema_version(connection: Connection) -> int:
    driver: Any = connection.connection.driver_connection
    ((version,),) = driver.execute("PRAGMA schema_version").fetchall()
    return int(version)


def _whole(plan: Plan, columns: Sequence[str]) -> TextClause:
    """Make the query that gives all rows of another as one text, with `user_id` apart."""
    # Columns are named by position, because SQLite takes `b` and `B` for one name. The rows are
    # materialized: otherwise SQLite would know which text its own JSON functions have made, and
    # insert that as JSON.
    names = [f"c{number}" for number in range(len(columns))]
    fields = ", ".join(
        f"{_literal(column)}, {_value(plan, column, name)}"
        for name, column in zip(names, columns, strict=True)
        if column != "user_id"
    )
    user_id = names[columns.index("user_id")]
    return text(
        f"WITH trading_push_rows({', '.join(names)}) AS MATERIALIZED (\n{plan.sql}\n) "
        f"SELECT json_group_array(json_array(CAST({user_id} AS TEXT), json_object({fields}))) "
        "FROM trading_push_rows"
    ).bindparams(*plan.binds)


def _value(plan: Plan, column: str, name: str) -> str:
    if column in plan.json_columns:
        return _json(name)
    if column in plan.as_text:
        return f"CASE typeof({name}) WHEN 'integer' THEN CAST({name} AS TEXT) ELSE {name} END"
    return name


def _json(name: str) -> str:
    # SQLite accepts more than JSON as JSON. In place of what is not JSON stands '?', which is
    # refused by both, and ends the query.
    fits = (
        f"typeof({name}) IN ('null', 'integer') OR typeof({name}) = 'text' AND json_valid({name})"
    )
    return f"json(CASE WHEN {fits} THEN {name} ELSE '?' END)"


def _read_whole(
    connection: Connection, statement: TextClause, parts: Iterable[Sequence[str]]
) -> dict[str, list[msgspec.Raw]] | None:
    """Read the rows of some users, by user and in order, with a query for each part of them.

    Returns:
        None where they have to be read one by one.

    Raises:
        SQLAlchemyError: The file cannot be read, in whatever form.
    """
    found: dict[str, list[msgspec.Raw]] = {}
    try:
        for user_ids in parts:
            rows = connection.execute(statement, {"user_ids": user_ids}).scalar_one()
            if _REAL.search(rows):
                return None
            for user, record in _decode(rows):
                if user in found:
                    found[user].append(record)
                else:
                    found[user] = [record]
    except DBAPIError as error:
        if getattr(error.orig, "sqlite_errorname", "SQLITE_ERROR") != "SQLITE_ERROR":
            raise  # the file is locked, or its time is up: reading row by row would not help
        return None
    except (msgspec.MsgspecError, RecursionError):
        return None
    return found


def _literal(column: str) -> str:
    # Otherwise SQLAlchemy takes what follows a colon for a parameter.
    return "'" + column.replace("'", "''").replace(":", "\\:") + "'"
