"""Read the events of users after the cursor of each: every row once, in order.

1. A user who is read for the first time starts at their newest row, or with the last `history`
   rows. One who has no row then gets each that comes.
2. A cursor moves on only when the events are about to be published, and only if it is still what
   they were read after. So a read that fails, or whose answer comes too late, loses and doubles
   none.
3. One query reads many users after the smallest of their cursors, and rows that a user has had are
   dropped. Users of near cursors are read together, in fewer at a time if much is dropped.
4. A cursor is a whole number above 0, or a text that sorts after "0" as its characters do. Rows of
   equal cursors are all given if one read finds them all; one that is written later is not.
5. A database that compares cursors otherwise would hide new rows. It shows by rows that are not in
   order, or not after the cursor that was asked for: these are errors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import partial
from typing import Any, Final

import attrs
import msgspec
from sqlalchemy import Connection, text

from trading_push.errors import SourceError
from trading_push.models import plain_decimal
from trading_push.sources.base import NewEvents
from trading_push.sources.sql.answers import Rows, told_apart
from trading_push.sources.sql.plan import Plan
from trading_push.sources.sql.rows import IDS_PER_QUERY, RowReader
from trading_push.user_ids import UserIds

__all__ = ["EventReader"]

_START: Final = "0"
"""What the first read compares with: a text that has no type yet, below every cursor."""
CURSORS: Final = 100_000
"""Of so many users the cursors are kept: more than one process can have watched."""
_MANY_DROPPED: Final = 1000
_RANK: Final = "trading_push_rank"

_encode = msgspec.json.Encoder().encode


class EventReader:
    """Reads one query of events, and keeps how far each user has come.

    Args:
        plan: The query.
        rows: Reads its rows.
        ids: How ids are compared.
        value_bytes: How long an event may be.
    """

    def __init__(self, plan: Plan, rows: RowReader, ids: UserIds, value_bytes: int) -> None:
        assert plan.cursor is not None
        self._name = plan.cursor
        self._as_text = plan.cursor in plan.as_text
        # The cursor is compared as it comes.
        columns = tuple(column for column in plan.as_text if column != plan.cursor)
        self._plan = attrs.evolve(plan, as_text=columns, after=_START)
        self._rows = rows
        self._ids = ids
        self._value_bytes = value_bytes
        # The last cursor of each user who was read, `_START` if there was no row. Kept for those
        # who have gone, so that they get what they have missed; who was read last is the last.
        self._cursors: OrderedDict[str, int | str] = OrderedDict()
        # How many users one query names.
        self._width = IDS_PER_QUERY

    def first(self, connection: Connection) -> Plan:
        """Make the query that gives only the last rows of each user."""
        query = self._plan.sql.rstrip().removesuffix(";")  # it stands within another
        name = connection.dialect.identifier_preparer.quote(self._name)
        sql = (
            f"SELECT * FROM (SELECT trading_push_rows.*, ROW_NUMBER() OVER (PARTITION BY user_id "
            f"ORDER BY {name} DESC) AS {_RANK} FROM (\n{query}\n) AS trading_push_rows"
            f") AS trading_push_ranked WHERE {_RANK} <= {max(1, self._plan.history)} "
            f"ORDER BY {name}"
        )
        return attrs.evolve(self._plan, statement=text(sql).bindparams(*self._plan.binds))

    def read(
        self, connection: Connection, users: Sequence[str]
    ) -> dict[str, NewEvents | SourceError]:
        """Read the new events of users, in a worker thread.

        Raises:
            Exception: The database refused, or its driver cannot read what it gave.
        """
        answers: dict[str, NewEvents | SourceError] = {}
        for plan, part in self._parts(connection, users):
            read = partial(self._rows.read, connection, plan)
            dropped = 0
            for rows in told_apart(plan, self._ids, part, read):
                dropped += self._answer(plan, rows, answers)
            if dropped > _MANY_DROPPED:
                self._width = max(1, len(part) // 2)
            elif len(part) == self._width:
                self._width = min(IDS_PER_QUERY, self._width + 1)
        return answers

    def _answer(self, plan: Plan, rows: Rows, answers: dict[str, NewEvents | SourceError]) -> int:
        """Put down what is new for each user; return how many rows were not."""
        dropped = 0
        for user in rows.asked:
            since = self._cursors.get(user)
            records = rows.records.get(user, ())
            try:
                if user in rows.errors:
                    raise rows.errors[user]
                new = self._new(records, since, plan.after)
                dropped += len(records) - len(new)
                newest = new[-1][0] if new else since or _START
                is_first = since is None and not self._plan.history
                events = [] if is_first else [event for _, event in new]
            except SourceError as error:
                answers[user] = error
                continue
            answers[user] = NewEvents(events, partial(self._taken, user, since, newest))
        return dropped

    def _parts(
        self, connection: Connection, users: Sequence[str]
    ) -> Iterator[tuple[Plan, Sequence[str]]]:
        """Cut users into those whom one query reads, with the query."""
        cursors = {user: self._cursors.get(user) for user in users}
        # A cursor of another type than before is compared with no other.
        groups: dict[str | type | None, list[str]] = {}
        for user, cursor in cursors.items():
            kind: str | type | None = type(cursor)
            if cursor is None or cursor == _START:
                kind = None if cursor is None else _START
            groups.setdefault(kind, []).append(user)
        for kind, group in groups.items():
            first = kind is None
            most = IDS_PER_QUERY if first or kind == _START else self._width
            if not first:
                group.sort(key=lambda user: cursors[user])  # type: ignore[arg-type, return-value]
            most = most if self._plan.many else 1
            for start in range(0, len(group), most):
                part = group[start : start + most]
                plan = self._plan
                plan = (
                    self.first(connection) if first else attrs.evolve(plan, after=cursors[part[0]])
                )
                yield plan, part

    def _new(
        self, records: Sequence[dict[str, Any]], since: int | str | None, after: int | str | None
    ) -> list[tuple[int | str, msgspec.Raw]]:
        """Return the rows that a user has not had, with their cursors.

        Args:
            records: The user's rows.
            since: The user's cursor.
            after: The cursor that the query was run with: of another user maybe, who is behind.
        """
        new: list[tuple[int | str, msgspec.Raw]] = []
        last: int | str | None = None
        for record in records:
            record.pop(_RANK, None)
            cursor = record[self._name]
            if isinstance(cursor, Decimal) and cursor.is_finite() and cursor == int(cursor):
                # As a text it would sort by its characters.
                record[self._name], cursor = plain_decimal(cursor), int(cursor)
            if type(cursor) not in (int, str):
                raise self._error(
                    f"holds {'NULL' if cursor is None else f'a {type(cursor).__name__}'} in a row: "
                    "a cursor is a whole number or a text in every row"
                )
            for before in (last, since if since != _START else None):
                if before is not None and type(before) is not type(cursor):
                    raise self._error("holds numbers and texts: cast it to one of them")
            if last is not None and cursor < last:
                raise self._error(
                    f"does not grow from row to row: end the query with ORDER BY {self._name}, and "
                    "cast it to an integer if it is a number, or to a text that sorts by its "
                    "characters"
                )
            if type(after) is type(cursor) and cursor < after:  # type: ignore[operator]
                raise self._error(
                    "is not compared as it sorts, which would lose events: cast it to an integer "
                    f"if it is a number (CAST({self._name} AS ...) > :after), or compare the text "
                    'by its characters (COLLATE "C" in PostgreSQL, utf8mb4_bin in MySQL, BINARY '
                    "in SQLite)"
                )
            last = cursor
            if since is None or since == _START or cursor > since:
                if self._as_text:
                    record[self._name] = str(cursor)
                new.append((cursor, self._encoded(record)))
        return new

    def _encoded(self, record: dict[str, Any]) -> msgspec.Raw:
        try:
            encoded = _encode(record)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise SourceError(
                f"{self._plan.data_type}: a row cannot be encoded: {error}", retryable=False
            ) from None
        if len(encoded) > self._value_bytes:
            raise SourceError(
                f"{self._plan.data_type}: an event has {len(encoded)} bytes: select less, or raise "
                f"database.value_bytes ({self._value_bytes})",
                retryable=False,
            )
        return msgspec.Raw(encoded)

    def _error(self, what: str) -> SourceError:
        return SourceError(
            f"{self._plan.data_type}: the cursor {self._name} {what}", retryable=False
        )

    def _taken(self, user: str, since: int | str | None, newest: int | str) -> bool:
        """Move a user's cursor on, if it still is where it was; in the event loop."""
        if self._cursors.get(user) != since:
            return False
        self._cursors[user] = newest
        self._cursors.move_to_end(user)  # no other way: a thread that reads must not miss it
        if len(self._cursors) > CURSORS:
            self._cursors.popitem(last=False)
        return True
