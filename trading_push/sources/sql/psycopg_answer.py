"""The rows of an answer of PostgreSQL that psycopg can read, and whose the others are.

A time after the year 9999, `infinity`, or text that is not UTF-8 is an error of psycopg, which then
gives no row at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
from sqlalchemy import CursorResult

__all__ = ["PsycopgAnswer"]


@attrs.frozen
class PsycopgAnswer:
    """An answer as libpq has it.

    Args:
        connection: The driver's connection, which says how types are read.
        answer: What libpq has received.
    """

    connection: Any
    answer: Any

    @classmethod
    def of(cls, result: CursorResult[Any]) -> PsycopgAnswer | None:
        """Take the answer from a result that was not read yet; None with another driver."""
        answer = getattr(result.cursor, "pgresult", None)
        return None if answer is None else cls(result.cursor.connection, answer)

    def rows(self, columns: Sequence[str]) -> tuple[list[Any], list[tuple[str | None, str]]]:
        """Read row by row.

        Returns:
            The rows that can be read; and of each other one the text of its `user_id`, None if it
            has none, and what is wrong.
        """
        from psycopg.adapt import Transformer

        transformer = Transformer(self.connection)
        transformer.set_pgresult(self.answer)
        place = columns.index("user_id") if "user_id" in columns else None
        rows = []
        unreadable: list[tuple[str | None, str]] = []
        for number in range(self.answer.ntuples):
            try:
                rows.append(transformer.load_row(number, tuple))
            except Exception as error:  # psycopg.DataError, UnicodeDecodeError, ...
                user_id = None if place is None else self.answer.get_value(number, place)
                text = None if user_id is None else user_id.decode(errors="replace")
                unreadable.append((text, str(error).partition("\n")[0]))
        return rows, unreadable
