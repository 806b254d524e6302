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
    others = [column for column in columns if column != "user_id"]
    fields = ", ".join(
        f"{_literal(column)}, "
        + (f"json({_name(column)})" if column in json_columns else _name(column))
        for column in others
    )
    return text(
        f"SELECT json_group_array(json_array(CAST(user_id AS TEXT), json_object({fields}))) "
        f"FROM (\n{sql}\n)"  # a line of its own: a comment may end it
    ).bindparams(bind)


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


def _name(column: str) -> str:
    # Not in double quotes: a name that is not there would silently be a text.
    return _escaped("`" + column.replace("`", "``") + "`")


def _literal(column: str) -> str:
    return _escaped("'" + column.replace("'", "''") + "'")


def _escaped(sql: str) -> str:
    return sql.replace(":", "\\:")  # or SQLAlchemy takes it for a parameter
