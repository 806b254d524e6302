"""Who a token stands for: the header that it comes in, and ids that can be a user's."""

from __future__ import annotations

import pytest

from trading_push.auth.principal import bearer, is_user


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Bearer", ""),
        ("Basic abc", None),
        ("", None),
        ("Bearerabc", None),
    ],
)
def test_the_token_of_a_header(header: str, token: str | None) -> None:
    assert bearer(header) == token


@pytest.mark.parametrize("user", ["4", "用户", "x" * 64])
def test_what_can_be_a_user(user: str) -> None:
    assert is_user(user)


@pytest.mark.parametrize("user", ["", "x" * 65, "\ud800", 4, None, b"4"])
def test_what_cannot_be_a_user(user: object) -> None:
    assert not is_user(user)
