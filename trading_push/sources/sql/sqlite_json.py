"""Many users' rows of an SQLite file as one JSON text, which SQLite itself makes.

Python's driver gives the interpreter away before each row and asks for it back after it. Where an
event loop is busy beside it, most of the time that reading takes is waiting for that, and the loop
waits as often. One text is one row.

SQLite prints a REAL with fewer digits than it has, and knows no JSON for a BLOB: what holds one is
read row by row, and so is all that is no plain SELECT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec
from sqlalchemy import BindParameter, Connection, TextClause, text
from sqlalchemy.exc import DBAPIError

__all__ = ["read_whole", "whole"]

# A number with a point. In a text it would be a mistake that costs time, and nothing else.
_REAL = re.compile(r'":-?\d+\.')
_decode = msgspec.json.Decoder(list[tuple[str, msgspec.Raw]]).decode


def whole(
    sql: str, bind: BindParameter[str], columns: Sequence[str], json_columns: Sequence[str]
) -> TextClause:
    """The query that gives the rows of `sql` as one text, `user_id` apart from the others."""
    # By position, for SQLite takes `b` and `B` for one name; and materialized, or it would know
    # which text its own JSON functions have made, and put it in as JSON.
    names = [f"c{number}" for number in range(len(columns))]
    fields = ", ".join(
        f"{_literal(column)}, {_json(name) if column in json_columns else name}"
        for name, column in zip(names, columns, strict=True)
        if column != "user_id"
    )
    user_id = names[columns.index("user_id")]
    return text(
        f"WITH trading_push_rows({', '.join(names)}) AS MATERIALIZED (\n{sql}\n) "
        f"SELECT json_group_array(json_array(CAST({user_id} AS TEXT), json_object({fields}))) "
        "FROM trading_push_rows"
    ).bindparams(bind)


def _json(name: str) -> str:
    # SQLite reads more than JSON as JSON: what is none, '?' is neither, and ends the query.
    fits = (
        f"typeof({name}) IN ('null', 'integer') OR typeof({name}) = 'text' AND json_valid({name})"
    )
    return f"json(CASE WHEN {fits} THEN {name} ELSE '?' END)"


def read_whole(
    connection: Connection, statement: TextClause, parts: Iterable[Sequence[str]]
) -> dict[str, list[msgspec.Raw]] | None:
    """The rows of some users, a query for each part of them, by user and in order.

    Returns:
        None where they have to be read row by row.

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
            raise  # the file is locked, or its time is up: that is no fault of this form
        return None
    except (msgspec.MsgspecError, RecursionError):
        return None
    return found


def _literal(column: str) -> str:
    # Or SQLAlchemy takes what follows a colon for a parameter.
    return "'" + column.replace("'", "''").replace(":", "\\:") + "'"
