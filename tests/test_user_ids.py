"""User ids: what is a text, whose an answer is, and who may be meant by a stray."""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from trading_push.errors import ConfigurationError
from trading_push.user_ids import UserIds, user_id_text

ONE_UUID = "6f9619ff-8b86-d011-b42d-00c04fc964ff"


@pytest.mark.parametrize(
    ("user", "text"), [("4", "4"), (4, "4"), (" é", " é"), (UUID(ONE_UUID), ONE_UUID)]
)
def test_an_id_is_turned_into_a_text(user: Any, text: str) -> None:
    assert user_id_text(user) == text
    assert type(user_id_text(user)) is str


@pytest.mark.parametrize("user", [True, None, 4.0, b"4", ["4"], Decimal(4)])
def test_what_is_no_id_is_refused(user: Any) -> None:
    with pytest.raises(TypeError, match="a user id is a text"):
        user_id_text(user)


@pytest.mark.parametrize("user", ["", "\ud800"])
def test_a_text_that_is_no_id_is_refused(user: str) -> None:
    with pytest.raises(ValueError, match="a user id"):
        user_id_text(user)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("4", "4"),
        ("4", 4),
        ("4", 4.0),
        ("4", "4.00"),
        ("4", Decimal(4)),
        ("4", Decimal("4.00")),
        ("0", 0),
        ("4000000000000000000000", Decimal("4E+21")),
        ("04", "04"),
        ("a", "a   "),
        ("a  ", "a"),
        (ONE_UUID.upper(), ONE_UUID),
        (ONE_UUID.upper(), UUID(ONE_UUID)),
        (ONE_UUID.replace("-", ""), ONE_UUID),
    ],
)
def test_an_answer_is_whose_id_it_has(asked: str, answered: Any) -> None:
    matches = UserIds().match(["someone", asked], [answered])
    assert matches.users == {answered: (asked,)} or matches.users == {answered: [asked]}
    assert not matches.strays


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("04", 4),
        (" 4", 4),
        ("4abc", 4),
        ("4.0", 4),
        ("4", "04"),
        ("+4", 4),
        ("alice", "Alice"),
        ("jose", "José"),
        ("00", 0),
    ],
)
def test_what_another_comparison_finds_is_an_error_of_that_user(asked: str, answered: Any) -> None:
    matches = UserIds().match(["someone", asked], [answered])
    assert not matches.users
    assert matches.strays == {answered: [asked]}


@pytest.mark.parametrize("answered", [None, True, float("nan"), "5", b"\xff", Decimal("Inf")])
def test_an_id_that_nobody_may_mean(answered: Any) -> None:
    matches = UserIds().match(["1", "4"], [answered])
    assert not matches.users
    assert [*matches.strays.values()] == [[]]


def test_the_same_text_goes_before_what_is_similar() -> None:
    matches = UserIds().match(["a", "a "], ["a", "a "])
    assert matches.users == {"a": ("a",), "a ": ("a ",)}


def test_a_stray_may_not_stand_for_who_has_an_answer() -> None:
    matches = UserIds().match(["4", "4abc"], ["4", 4.0, "4ABC"])
    assert matches.users == {"4": ("4",), 4.0: ["4"]}
    assert matches.strays == {"4ABC": ["4abc"]}


def test_capital_and_small_letters_are_the_same_only_where_that_is_set() -> None:
    assert UserIds("caseless").match(["ALICE", "straße"], ["alice ", "STRASSE"]).users == {
        "alice ": ["ALICE"],
        "STRASSE": ["straße"],
    }


def test_one_id_asked_for_in_two_spellings_is_of_both() -> None:
    asked = ["BOB", "bob", "carol"]
    for answered in ("bob", "BOB", "Bob"):
        (found,) = UserIds("caseless").match(asked, [answered]).users.values()
        assert sorted(found) == ["BOB", "bob"]
    spelt = [ONE_UUID, ONE_UUID.upper()]
    for same in (ONE_UUID, UUID(ONE_UUID)):
        assert UserIds("uuid").match(spelt, [same]).users == {same: spelt}


def test_ids_of_another_kind_are_refused() -> None:
    integers, uuids = UserIds("integer"), UserIds("uuid")
    assert [
        user for user in ("4", "0", "04", " 4", "4abc", "٤", "") if not integers.refusal(user)
    ] == [
        "4",
        "0",
    ]
    assert uuids.refusal(ONE_UUID.upper()) is None
    assert uuids.refusal("4") is not None
    assert UserIds().refusal("4abc") is None


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="give one of text, integer"):
        UserIds("number")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("user", "answered"),
    [
        ("BOB", "bob"),
        ("bob ", "bob"),
        ("jose", "José"),
        ("straße", "STRASSE"),
        ("strase", "straße"),
        ("Søren", "soren"),
        ("ｂｏｂ", "bob"),
        ("b\N{SOFT HYPHEN}ob", "bob"),
        ("かな", "カナ"),
        ("\N{ARABIC-INDIC DIGIT FOUR}", "4"),
        ("\N{MATHEMATICAL BOLD SMALL A}", "a"),
        ("\N{GRINNING FACE}", "\N{CAT FACE}"),
        ("04", 4),
        (" 4", 4),
        ("4.0", "4"),
        ("4e0", 4),
        ("4abc", 4),
        ("0x10", Decimal(16)),
        ("1_000", 1000),
    ],
)
def test_who_has_no_answer_beside_a_like_id_is_doubtful(user: str, answered: Any) -> None:
    assert UserIds().doubtful([user, "someone"], [answered, "5"])[0] == user


@pytest.mark.parametrize(
    ("user", "answered"),
    [
        *(("4", 40), ("40", 4), ("11", 1), ("9007199254740993", 9007199254740992)),
        *(("bob", "rob"), ("张三", "张四"), ("иван", "ивана"), (ONE_UUID, ONE_UUID[:-1] + "0")),
        *(("4-abc", "4-abd"), ("5", "")),
    ],
)
def test_who_has_another_id_is_not(user: str, answered: Any) -> None:
    assert UserIds().doubtful([user], [answered]) == []
    assert UserIds().doubtful([user], []) == UserIds().doubtful([], [user]) == []
