"""A configured query made ready to run, and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence

import attrs
import msgspec
from sqlalchemy import BindParameter, TextClause, bindparam, text
from sqlalchemy.exc import SQLAlchemyError

from trading_push.errors import ConfigurationError
from trading_push.settings.sources import Query

__all__ = ["Plan", "check_columns", "make_plan"]

# What a query may say, and SQLAlchemy does not take as it stands. Where the list is one array of
# PostgreSQL, it is bound as one.
_ARRAY = re.compile(
    r"(\b(?:any|some|unnest)\s*\(\s*):user_ids\b"
    r"|:user_ids\b(?=\s*::\s*[\w ]+\[|\s+as\s+[\w ]+\[)",
    re.IGNORECASE,
)
_LIST_IN_BRACKETS = re.compile(r"\b(in\s*)\(\s*:user_ids\s*\)", re.IGNORECASE)
_CAST = re.compile(r":(user_ids?|user_id_array|after)(?=::)")
_COMPARED = re.compile(r"[=<>]\s*\(?\s*:user_ids\b")

_PARAMETERS = (
    {"user_id"},
    {"user_ids"},
    {"user_id_array"},
    {"user_ids", "user_id_array"},
)

_validate = msgspec.json.Decoder(msgspec.Raw).decode


@attrs.frozen
class Plan:
    """A query made ready to run.

    Args:
        data_type: What it reads.
        sql: Its text.
        binds: The parameters that name users.
        statement: Text and parameter as SQLAlchemy runs them.
        many: Whether the parameter is a list of users.
        single: Whether a user has one row, which stands alone and not in a list.
        json_columns: The columns that hold JSON.
        as_text: The columns whose numbers leave as texts.
        empty: The value of a user without rows; None where there is nothing to say then.
        cursor: The column that only grows, of a query of events; None of any other.
        history: How many events a user gets who is watched for the first time.
        after: What the cursor is compared with.
    """

    data_type: str
    sql: str
    binds: tuple[BindParameter[str], ...]
    statement: TextClause
    many: bool
    single: bool
    json_columns: tuple[str, ...]
    as_text: tuple[str, ...]
    empty: msgspec.Raw | None
    cursor: str | None = None
    history: int = 0
    after: int | str | None = None

    def parameters(self, user_ids: Sequence[str | None]) -> dict[str, object]:
        """Return the parameters that ask for some users; for the first if it takes one only."""
        given: dict[str, object] = {}
        for bind in self.binds:
            if bind.key == "user_ids":
                given[bind.key] = user_ids
            elif bind.key == "after":
                given[bind.key] = self.after
            else:
                given[bind.key] = _array(user_ids) if self.many else user_ids[0]
        return given


def make_plan(data_type: str, query: Query) -> Plan:
    """Make a query ready to run.

    Raises:
        ConfigurationError: Its parameters, or its `empty`, are wrong.
    """
    # SQLAlchemy writes the brackets of a list itself, and takes no cast directly after a parameter.
    sql = _ARRAY.sub(r"\1:user_id_array", query.sql)
    sql = _LIST_IN_BRACKETS.sub(r"\1 :user_ids", sql)
    sql = _CAST.sub(r":\1 ", sql)
    if _COMPARED.search(sql):
        raise ConfigurationError(
            f"the query of {data_type} compares with :user_ids, which works for one user only: "
            "write IN :user_ids, or = ANY(:user_ids) in PostgreSQL"
        )
    statement = text(sql)
    try:
        parameters = set(statement.compile().params)
    except SQLAlchemyError:
        parameters = set()
    many = "user_id" not in parameters
    _check_events(data_type, query, "after" in parameters)
    if query.cursor is not None:
        parameters.discard("after")
    if parameters not in _PARAMETERS:
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
    # Without a type: the driver then casts nothing, and a column of integers finds "4" as well.
    binds: dict[str, BindParameter[str]] = {
        name: bindparam(name, expanding=name == "user_ids")
        for name in (*parameters, *(() if query.cursor is None else ("after",)))
    }
    return Plan(
        data_type=data_type,
        sql=sql,
        binds=tuple(binds.values()),
        statement=statement.bindparams(*binds.values()),
        many=many,
        single=query.single,
        json_columns=tuple(query.json_columns),
        as_text=tuple(query.as_text),
        empty=None if empty is None else msgspec.Raw(empty.encode()),
        cursor=query.cursor,
        history=query.history,
    )


def _check_events(data_type: str, query: Query, has_after: bool) -> None:
    if query.cursor is None:
        if data_type == "fills" or has_after or query.history:
            raise ConfigurationError(
                f"the query of {data_type} reads events without a cursor: name the column that "
                'only grows (cursor = "fill_id") and select by it (AND fill_id > :after ORDER BY '
                "fill_id)"
            )
    elif not has_after:
        raise ConfigurationError(
            f"the query of {data_type} has a cursor and no :after: write AND {query.cursor} > "
            f":after ORDER BY {query.cursor}"
        )
    elif query.single or query.empty is not None:
        raise ConfigurationError(
            f"the query of {data_type} has a cursor: each row is an event; remove single and empty"
        )


def _array(user_ids: Sequence[str | None]) -> str:
    """Write ids as an array of PostgreSQL (section 8.15.2 of its manual), of no type yet."""
    quoted = (
        "NULL" if each is None else '"' + each.replace("\\", "\\\\").replace('"', '\\"') + '"'
        for each in user_ids
    )
    return "{" + ",".join(quoted) + "}"


def check_columns(plan: Plan, columns: list[str]) -> None:
    """Check the columns that a query gives.

    Raises:
        ConfigurationError: One that is needed is missing, or two have the same name.
    """
    needed = (
        *plan.json_columns,
        *plan.as_text,
        *(("user_id",) if plan.many or plan.cursor else ()),
    )
    if plan.cursor is not None:
        needed = (*needed, plan.cursor)
    for column in needed:
        if column not in columns:
            raise ConfigurationError(
                f"the query of {plan.data_type} gives no column {column}: correct the query"
            )
    if len(set(columns)) != len(columns):
        raise ConfigurationError(
            f"the query of {plan.data_type} gives two columns of one name: name them with AS"
        )
