"""Whose the answers of an application's functions are, whatever type its ids have."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

import pytest

from trading_push import FunctionSource, Principal, SourceError, open_push_service
from trading_push.testing import peer

ONE = "0d2c8b8e-6a55-4d0b-9a65-5b1e6f2d2a11"


def never(user: str, data_type: str) -> Any:
    raise AssertionError("fetch_many is there")


def answering(answer: Any, **options: Any) -> FunctionSource:
    return FunctionSource(never, fetch_many=lambda users, data_type: answer, **options)


@pytest.mark.parametrize(
    ("asked", "answer", "kind"),
    [
        ("4", {4: "yes"}, "text"),
        ("4", {"4": "yes", 5: "no"}, "text"),
        ("bob", {"bob  ": "yes"}, "text"),
        (ONE.upper(), {ONE: "yes"}, "text"),
        (ONE, {UUID(ONE): "yes"}, "uuid"),
        ("Bob", {"bOB": "yes"}, "caseless"),
    ],
)
def test_an_answer_is_the_user_s_who_was_asked_for(asked, answer, kind):
    source = answering(answer, user_id=kind)
    assert source.fetch_many is not None
    assert source.fetch_many([asked], "balance") == {asked: "yes"}


@pytest.mark.parametrize(
    ("asked", "answered"), [("04", 4), ("4abc", 4), ("Bob", "bob"), ("4", "004"), ("4", True)]
)
def test_another_id_that_may_be_theirs_is_an_error_that_names_both(asked, answered):
    source = answering({answered: "no", "other": "no"})
    assert source.fetch_many is not None
    found = source.fetch_many([asked, "9"], "balance")
    if answered is True:  # which is no id at all
        assert found == {}
        return
    assert list(found) == [asked]
    assert isinstance(found[asked], SourceError)
    assert repr(asked) in str(found[asked])
    assert repr(answered) in str(found[asked])
    assert "function.user_id" in str(found[asked])


def test_who_cannot_be_a_user_of_the_source_is_not_asked_for():
    asked: list[Any] = []

    def fetch_many(users: Any, data_type: str) -> Any:
        asked.append(list(users))
        return {int(user): 1 for user in users}

    source = FunctionSource(lambda user, _: user, fetch_many=fetch_many, user_id="integer")
    assert source.fetch_many is not None
    found = source.fetch_many(["04", "4", "x"], "balance")
    assert found["4"] == 1
    assert {found["04"].reason, found["x"].reason} == {"refused"}
    assert set(source.fetch_many(["x"], "balance")) == {"x"}
    assert asked == [["4"]]
    with pytest.raises(SourceError, match="not an integer"):
        source.fetch("x", "balance")
    assert source.fetch("4", "balance") == "4"


@pytest.mark.parametrize("user", [4, UUID(ONE), "4"])
async def test_an_id_of_another_type_is_a_text_everywhere(user):
    async with (
        open_push_service(
            answering({user: ["mine"]}), authenticate=lambda token: Principal(user)
        ) as service,
        peer(service) as mine,
    ):
        assert (await mine.request("auth", token="t"))["user"] == str(user)
        await mine.subscribe(f"balance_{user}", "fills")
        # Each channel has a sender of its own: one may be before the other.
        found = {push["channel"]: push for push in [await mine.push(), await mine.push()]}
        assert found["fills"]["reason"] == "quiet"
        assert found["balance"]["data"] == ["mine"]
        await service.publish("fills", 1, user=user)
        assert (await mine.push())["data"] == 1
        assert service.kick(user=user) == 1


@pytest.mark.parametrize("user", [None, True, 4.0, "", "x" * 65, "\ud800", ["4"], b"4"])
async def test_what_cannot_be_a_user_is_one_line_and_a_clean_end(autojump_clock, caplog, user):
    async with open_push_service(authenticate=lambda token: Principal(user)) as service:
        async with peer(service) as nobody:
            refused = await nobody.request("auth", token="t")
            assert refused["error"]["code"] == "internal"
        assert nobody.closed_with == (1011, "internal error")
        [record] = [each for each in caplog.records if each.levelno >= logging.ERROR]
        assert "user id" in record.getMessage()
        if user is not None and not (isinstance(user, str) and len(user) == 65):
            with pytest.raises(ValueError, match="user id"):
                await service.publish("fills", 1, user=user)
            with pytest.raises(ValueError, match="user id"):
                service.kick(user=user)
