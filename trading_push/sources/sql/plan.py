"""A configured query made ready to run, and checked."""

from __future__ import annotations

import re

import attrs
import msgspec
from sqlalchemy import BindParameter, TextClause, bindparam, text
from sqlalchemy.exc import SQLAlchemyError

from trading_push.errors import ConfigurationError
from trading_push.settings.sources import Query

__all__ = ["Plan", "check_columns", "make_plan"]

_LIST_IN_BRACKETS = re.compile(r"\(\s*:user_ids\s*\)")

_validate = msgspec.json.Decoder(msgspec.Raw).decode


@attrs.frozen
class Plan:
    """A query made ready to run.

    Args:
        data_type: What it reads.
        sql: Its text.
        bind: Its only parameter, `user_ids` or `user_id`.
        statement: Text and parameter as SQLAlchemy runs them.
        many: Whether the parameter is a list of users.
        single: Whether a user has one row, which stands alone and not in a list.
        json_columns: The columns that hold JSON.
        empty: The value of a user without rows; None where there is nothing to say then.
    """

    data_type: str
    sql: str
    bind: BindParameter[str]
    statement: TextClause
    many: bool
    single: bool
    json_columns: tuple[str, ...]
    empty: msgspec.Raw | None


def make_plan(data_type: str, query: Query) -> Plan:
    """Make a query ready to run.

    Raises:
        ConfigurationError: Its parameters, or its `empty`, are wrong.
    """
    # SQLAlchemy writes the brackets of a list itself.
    sql = _LIST_IN_BRACKETS.sub(":user_ids", query.sql)
    statement = text(sql)
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
    return Plan(
        data_type=data_type,
        sql=sql,
        bind=bind,
        statement=statement.bindparams(bind),
        many=many,
        single=query.single,
        json_columns=tuple(query.json_columns),
        empty=None if empty is None else msgspec.Raw(empty.encode()),
    )


def check_columns(plan: Plan, columns: list[str]) -> None:
    """Check the columns that a query gives.

    Raises:
        ConfigurationError: One that is needed is missing, or two have the same name.
    """
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
