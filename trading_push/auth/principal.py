"""Who a token stands for, and what an application's own check of tokens must do."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import attrs

from trading_push.user_ids import user_id_text

__all__ = ["USER_CHARACTERS", "Authenticate", "Principal", "bearer", "is_user"]

USER_CHARACTERS: Final = 64
"""How long a user's id may be."""

_NO_CLAIMS: Final[Mapping[str, Any]] = MappingProxyType({})


def _user(user: object) -> str:
    """Turn a user's id into a text, at the one place where ids come in with a token."""
    text = user_id_text(user)
    if len(text) > USER_CHARACTERS:
        raise ValueError(f"a user id has {len(text)} characters: give at most {USER_CHARACTERS}")
    return text


def _none_if_infinite(at: float | None) -> float | None:
    return None if at == math.inf else at


@attrs.frozen
class Principal:
    """Who a token stands for.

    Args:
        user: The user's id, 1 to 64 characters; an integer or a UUID is turned into a text.
        expires_at: When the token expires, in seconds since the epoch, without any leeway; None
            for never.
        claims: What else the token says. A connection does not keep it.
        token_id: The token's own name (`jti`, RFC 7519 section 4.1.7), by which it can be revoked.

    Raises:
        TypeError, ValueError: There cannot be a user of that id.
    """

    user: str = attrs.field(converter=_user)
    expires_at: float | None = attrs.field(default=None, converter=_none_if_infinite)
    claims: Mapping[str, Any] = attrs.field(default=_NO_CLAIMS, repr=False)
    token_id: str | None = None


Authenticate = Callable[[str], Principal | Awaitable[Principal]]
"""Takes a token and returns its principal, at once or when awaited.

It raises AuthenticationError to refuse the token; any other exception counts as a bug.
"""


def bearer(header: str) -> str | None:
    """The token in the value of an `Authorization` header; None with another scheme (RFC 6750)."""
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def is_user(user: object) -> bool:
    """Whether this can be a user's id: a text of 1 to 64 characters that can be encoded."""
    if not isinstance(user, str) or not 1 <= len(user) <= USER_CHARACTERS:
        return False
    try:
        user.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
