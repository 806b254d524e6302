"""Whose the rows are: each asked user's value, or the error that stands in its place.

A database may compare ids in a way of its own: MySQL gives `4abc` the rows of an integer 4, and
`citext` gives `BOB` those of `bob`. So the `user_id` of each row is compared again (see
`user_ids`). A row of a user who was not asked for may belong to any asked one without rows. To show
their accounts as empty would hide an account that exists, so it is an error of theirs. Who has no
rows beside a user of a like id is read once more without that user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import msgspec

from trading_push.errors import SourceError
from trading_push.sources.base import NO_VALUE, NoValue
from trading_push.sources.sql.plan import Plan
from trading_push.sources.sql.rows import Found
from trading_push.user_ids import UserIds

__all__ = ["Answer", "Rows", "answers", "refused", "told_apart"]

Answer = msgspec.Raw | SourceError | NoValue
"""A user's value as encoded JSON, the error in its place, or None for nothing to say."""

_encode = msgspec.json.Encoder().encode


def refused(ids: UserIds, users: Sequence[str]) -> dict[str, SourceError]:
    """Return the errors of those users whose ids cannot be asked for."""
    # One that a driver cannot send would fail the call for all of them.
    unsendable = [user for user in users if not _is_text(user)] if not _is_text(*users) else ()
    refusals = dict.fromkeys(unsendable, "the user's id holds a NUL, or half a surrogate pair")
    if ids.kind not in ("text", "caseless"):  # which take any
        refusals |= {user: why for user in users if (why := ids.refusal(user)) is not None}
    return {
        user: SourceError(why, retryable=False, reason="refused") for user, why in refusals.items()
    }


def _is_text(*ids: str) -> bool:
    """Whether databases have a form for each of some ids."""
    joined = "".join(ids)
    try:
        joined.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in joined


@attrs.frozen
class Rows:
    """Whose the rows of one query are.

    Args:
        asked: Whom it was run for.
        records: The rows of each of them who has any.
        errors: What is wrong with a user's rows.
    """

    asked: Sequence[str]
    records: Mapping[str, Sequence[Any]]
    errors: Mapping[str, SourceError]


def told_apart(
    plan: Plan, ids: UserIds, asked: Sequence[str], read: Callable[[Sequence[str]], Found]
) -> Iterator[Rows]:
    """Read the rows of users, and once more those of users whose ids are like another's.

    The database may take two asked ids for the same, and its rows have one of them only.

    Args:
        plan: The query.
        ids: How ids are compared.
        asked: Whom to read.
        read: Runs the query for some users.
    """
    while asked:
        found = read(asked)
        rows = _whose(plan, ids, asked, found)
        yield rows
        # Each time there are fewer of them: a row is somebody's, or an error of somebody.
        asked = ids.doubtful(
            (user for user in asked if user not in rows.records and user not in rows.errors),
            (*found.records, *found.errors),
        )


def answers(plan: Plan, rows: Rows, value_bytes: int) -> dict[str, Answer]:
    """Give each asked user their rows, encoded; no value may be longer than `value_bytes`."""
    found_for, errors = rows.records.get, rows.errors
    return {
        user: errors.get(user) or _encoded(plan, found_for(user), value_bytes)
        for user in rows.asked
    }


def _whose(plan: Plan, ids: UserIds, asked: Sequence[str], found: Found) -> Rows:
    # Mostly each row has an id as it was asked for, and there is nothing to compare.
    is_exact = ids.kind in ("text", "integer") and set(asked).issuperset(found.records)
    if is_exact and not found.errors:
        return Rows(asked, found.records, {})
    matches = ids.match(asked, (*found.records, *(found.errors.keys() - found.records.keys())))
    # The errors of users, of their rows first.
    errors: dict[str, SourceError] = {}
    records: dict[str, list[Any]] = {}
    for answered, users in matches.users.items():
        for user in users:
            if answered in found.errors:
                errors[user] = found.errors[answered]
            rows = found.records.get(answered, [])
            records[user] = records[user] + rows if user in records else rows
    for stray, users in matches.strays.items():
        for user in users or asked:
            if user not in records and user not in errors:
                errors[user] = _stray(plan, stray, user)
    return Rows(asked, records, errors)


def _stray(plan: Plan, stray: object, user: str) -> SourceError:
    return SourceError(
        f"{plan.data_type}: the database gave rows with the user_id {_shown(stray)} when "
        f"{_shown(user)} was asked for: set database.user_id as the column compares (integer, uuid "
        "or caseless), or correct the query",
        retryable=False,
    )


def _shown(user_id: object) -> str:
    text = repr(user_id)
    return text if len(text) <= 60 else text[:57] + "..."


def _encoded(plan: Plan, records: Sequence[Any] | None, value_bytes: int) -> Answer:
    """Encode the rows of one user; without any it is the query's `empty`, if it has one."""
    if not records:
        return NO_VALUE if plan.empty is None else plan.empty
    value: Any = records
    if plan.single:
        if len(records) > 1:
            return SourceError(
                f"{plan.data_type}: the query gives several rows for one user, but is 'single'",
                retryable=False,
            )
        value = records[0]
    try:
        encoded = _encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        return SourceError(f"{plan.data_type}: a row cannot be encoded: {error}", retryable=False)
    if len(encoded) > value_bytes:
        return SourceError(
            f"{plan.data_type}: the value has {len(encoded)} bytes: limit a user's rows in the "
            f"query, or raise database.value_bytes ({value_bytes})",
            retryable=False,
        )
    return msgspec.Raw(encoded)
