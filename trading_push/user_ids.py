"""User ids: texts for clients, whatever type or spelling the application and upstreams have.

The rules by which an id in an answer is the one that was asked for, the first that fits:

1. It is the same text.
2. It is a number that equals the asked id, which is an integer in canonical form: `0`, or digits
   without a leading zero. So `4.00` is 4, while the asked `04`, ` 4` and `4abc` are no numbers.
3. It is the same UUID, in any spelling.
4. It differs in trailing blanks only, as `char(10)` of SQL pads it.
5. It differs in case only, if the ids are `caseless`.

An id that fits nowhere is a *stray*: the source compares ids in another way. To give its data to
anyone could be a leak, and to leave them out would show an account that exists as empty. So it is
an error of each asked user that it may stand for.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, get_args
from uuid import UUID

import attrs

from trading_push.errors import ConfigurationError

__all__ = ["IdKind", "Matches", "UserIds", "given_user_id", "user_id_text"]

IdKind = Literal["text", "integer", "uuid", "caseless"]

_INTEGER = re.compile(r"0|[1-9][0-9]*")
_INTEGRAL = re.compile(r"(0|[1-9][0-9]*)(?:\.0*)?")
_UUID = re.compile(
    r"\{?[0-9a-fA-F]{8}(-?)[0-9a-fA-F]{4}(?:\1[0-9a-fA-F]{4}){2}\1[0-9a-fA-F]{12}\}?"
)
_LEADING_INTEGER = re.compile(r"\s*\+?0*([0-9]+)")
_DIGITS = 40
"""A number with more digits than this is compared as text only."""


def user_id_text(user: object) -> str:
    """Turn a user id into the text that it is everywhere in this package.

    Args:
        user: A text that is not empty, an integer or a UUID.

    Raises:
        TypeError: It is of another type.
        ValueError: It is empty, or no UTF-8 can hold it.
    """
    if isinstance(user, str) or (isinstance(user, int | UUID) and not isinstance(user, bool)):
        text = str(user)
    else:
        raise TypeError(f"a user id is a text, not of type {type(user).__name__}: give str(id)")
    if not text:
        raise ValueError("a user id is empty: give a text that is not")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a user id holds half a surrogate pair, which is no text") from None
    return text


def given_user_id(user: object) -> str:
    """Turn a user id that a caller has given into its text; see `user_id_text`.

    Raises:
        ValueError: It cannot be one, also by its type: who publishes many values has one kind of
            error to look for.
    """
    try:
        return user_id_text(user)
    except TypeError as error:
        raise ValueError(str(error)) from None


@attrs.frozen
class Matches:
    """Whose the ids of an answer are.

    Args:
        users: The asked users by id, as the answer has it: one, or several that are the same id.
        strays: The ids that are nobody's, each with the asked users that it may stand for: who has
            no answer of their own, and an id that another way of comparing could take for it.
    """

    users: Mapping[Any, Sequence[str]]
    strays: Mapping[Any, Sequence[str]]


class UserIds:
    """How the user ids of one upstream are compared.

    Args:
        kind: `text`; `integer` and `uuid`, which refuse every other id before it is asked for;
            `caseless`, for an upstream that takes capital and small letters for the same.

    Raises:
        ConfigurationError: There is no such kind.
    """

    def __init__(self, kind: IdKind = "text") -> None:
        if kind not in get_args(IdKind):
            raise ConfigurationError(
                f"{kind!r} is not a kind of user ids: give one of {', '.join(get_args(IdKind))}"
            )
        self.kind = kind

    def refusal(self, user: str) -> str | None:
        """Say why an id cannot be asked for; None if it can."""
        if self.kind == "integer" and not _INTEGER.fullmatch(user):
            return "the user's id is not an integer, as the ids of this source are"
        if self.kind == "uuid" and not _UUID.fullmatch(user):
            return "the user's id is not a UUID, as the ids of this source are"
        return None

    def match(self, asked: Sequence[str], answered: Iterable[Any]) -> Matches:
        """Find whose the ids of an answer are.

        Args:
            asked: The users who were asked for.
            answered: The ids in the answer, of any type that can be hashed.
        """
        # Of these kinds two asked users may be one: the same id, spelt in two ways.
        exact = set(asked) if self.kind in ("text", "integer") else ()
        users: dict[Any, Sequence[str]] = {}
        others = []
        for each in answered:
            # A bool is never an id, though `True` equals 1.
            if isinstance(each, str) and each in exact:
                users[each] = (each,)
            else:
                others.append(each)
        if not others:
            return Matches(users, {})
        by_key: dict[object, list[str]] = {}
        for user in asked:
            for key in self._asked_keys(user):
                by_key.setdefault(key, []).append(user)
        strays = []
        for each in others:
            keys = self._answered_keys(each)
            found = list(dict.fromkeys(user for key in keys for user in by_key.get(key, ())))
            if found:
                users[each] = found
            else:
                strays.append(each)
        if not strays:
            return Matches(users, {})
        answered_for = {user for found in users.values() for user in found}
        waiting = [user for user in dict.fromkeys(asked) if user not in answered_for]
        return Matches(users, {each: _candidates(each, waiting) for each in strays})

    def _asked_keys(self, user: str) -> Iterable[object]:
        if _INTEGER.fullmatch(user):
            yield "integer", user
        if _UUID.fullmatch(user):
            yield UUID(user)
        text = user.rstrip(" ")
        yield text
        if self.kind == "caseless":
            yield "caseless", _folded(text)

    def _answered_keys(self, answered: object) -> Iterable[object]:
        text = _text(answered)
        if not isinstance(answered, UUID) and (number := _INTEGRAL.fullmatch(text)):
            yield "integer", number[1]
        if _UUID.fullmatch(text.rstrip(" ")):
            yield UUID(text.rstrip(" "))
        if isinstance(answered, str):
            yield text.rstrip(" ")
            if self.kind == "caseless":
                yield "caseless", _folded(text.rstrip(" "))


def _text(answered: object) -> str:
    """Write an id of an answer as a text; a whole number without an exponent or a point."""
    if isinstance(answered, bool) or answered is None:
        return ""
    if isinstance(answered, float | Decimal):
        number = Decimal(answered)
        if (
            number.is_finite()
            and number.adjusted() < _DIGITS
            and number == number.to_integral_value()
        ):
            return str(int(number))
    if isinstance(answered, bytes):
        return answered.decode(errors="replace")
    return str(answered)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text.casefold())


def _candidates(stray: object, waiting: Iterable[str]) -> Sequence[str]:
    """Return whom a stray may stand for, by the loosest comparison that a database has."""
    loose, number = _loose(_text(stray)), _leading_integer(_text(stray))
    return [
        user
        for user in waiting
        if _loose(user) == loose or (number is not None and _leading_integer(user) == number)
    ]


def _loose(text: str) -> str:
    """Reduce a text to its letters and digits, less case, accents and leading zeros."""
    parts = unicodedata.normalize("NFKD", text.casefold())
    return "".join(filter(str.isalnum, parts)).lstrip("0")


def _leading_integer(text: str) -> str | None:
    """Return the number that MySQL takes a text for: its leading digits."""
    found = _LEADING_INTEGER.match(text)
    return None if found is None else found[1].lstrip("0")
