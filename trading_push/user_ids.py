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

Of two asked ids that the source takes for the same one gets the answer, and the other seems to have
none. So who has none, and an id like an answered one, is *doubtful*: only a question without the
other ids tells. What is like each other is the loosest of what databases in use take for equal.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import lru_cache
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
_LEADING_NUMBER = re.compile(r"\s*[+-]?((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)")
_DIGITS = 40
"""A number with more digits than this is compared as text only."""

# Characters of which it is known what the collations of databases take for equal; any other may
# count as any character, or as none.
_USUAL = re.compile(
    "[\0-\u017f\u0300-\u0315\u0386-\u03ce\u0401-\u045f"  # Latin, accents, Greek, Cyrillic
    "\u3041-\u30fe\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff5e]*"  # kana, Han, Hangul, full width
)
# What is a letter with an accent to some collations, and no such thing to Unicode.
_ALIKE = str.maketrans(dict(zip("æœøđðłħŧıς", ("ae", "oe", *"oddlhtiσ"), strict=True)))
_KANA = re.compile("[\u3041-\u30fe]+")
_DOUBLED = re.compile(r"([^\W\d])\1+")  # `ß` is `ss` to one collation, and `s` to another


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

    def doubtful(self, waiting: Iterable[str], answered: Iterable[Any]) -> list[str]:
        """Find asked users whose ids the source may have taken for an answered one.

        Args:
            waiting: The asked users for whom there was no answer.
            answered: The ids in the answer, as for `match`.
        """
        waiting = list(waiting)
        if not waiting or self.kind == "integer":  # of which no two are the same
            return []
        likes: set[str | None] = set()
        numbers: set[float] = set()
        for each in answered:
            likes.add(_like(text := _text(each)))
            if _INTEGRAL.fullmatch(text):
                numbers.add(float(text))
        if not likes:
            return []
        return [
            user
            for user in waiting
            if None in likes
            or (like := _like(user)) is None
            or like in likes
            or not (_INTEGER.fullmatch(user) or numbers.isdisjoint(_numbers(user)))
        ]

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
    like, numbers = _like(_text(stray)), _numbers(_text(stray))
    return [
        user for user in waiting if _like(user) == like or not numbers.isdisjoint(_numbers(user))
    ]


@lru_cache(maxsize=32_768)
def _like(text: str) -> str | None:
    """Reduce an id to what is left by every collation; None if that is not known.

    Its letters and digits are left, without case, accents and leading zeros.
    """
    if not _USUAL.fullmatch(text):
        return None
    parts = unicodedata.normalize("NFKD", text.casefold()).translate(_ALIKE)
    letters = _KANA.sub("\u3042", "".join(filter(str.isalnum, parts)))
    return _DOUBLED.sub(r"\1", letters).lstrip("0")


def _numbers(text: str) -> set[float]:
    """Return what a database may read a text as: the number that it begins with, or `0x10`."""
    found = _LEADING_NUMBER.match(text)
    numbers = set() if found is None else {float(found[1])}
    with suppress(ValueError, OverflowError):
        numbers.add(float(int(text, 0)))
    return numbers
