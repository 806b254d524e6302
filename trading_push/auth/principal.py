"""Who a token stands for, and what an application's own check of tokens must do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import parse_qsl

import attrs

from trading_push.user_ids import user_id_text

__all__ = [
    "USER_CHARACTERS",
    "Authenticate",
    "Handshake",
    "Principal",
    "bearer",
    "is_user",
    "takes_handshake",
]

USER_CHARACTERS: Final = 64
"""How long a user's id may be."""

_NO_CLAIMS: Final[Mapping[str, Any]] = MappingProxyType({})
_POSITIONAL: Final = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


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


@attrs.frozen
class Handshake:
    """The request that opens a connection, for an `authenticate` that takes it.

    Args:
        headers: By name in lower case; several of one name are joined by a comma.
        cookies: By name, as they were sent; of several of one name the first, which is the one of
            the longest path (RFC 6265 section 5.4).
        query: What stands behind the `?` of the URL, decoded; of several of one name the first.
        address: The client's, behind the trusted proxies.
        origin: The one `Origin`; None where there is none, or several.
    """

    headers: Mapping[str, str] = attrs.field(default=_NO_CLAIMS, repr=False)
    cookies: Mapping[str, str] = attrs.field(default=_NO_CLAIMS, repr=False)
    query: Mapping[str, str] = attrs.field(default=_NO_CLAIMS, repr=False)
    address: str = "-"
    origin: str | None = None

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]], query: str, address: str) -> Handshake:
        """Read a request's headers, with names in lower case, and the query of its URL."""
        values: dict[str, list[str]] = {}
        for name, value in headers:
            values.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1").strip())
        cookies: dict[str, str] = {}
        for pair in ";".join(values.get("cookie", ())).split(";"):
            cookie, equals, text = pair.partition("=")
            if equals:
                cookies.setdefault(cookie.strip(), text.strip())
        asked: dict[str, str] = {}
        for field, text in parse_qsl(query, keep_blank_values=True):
            asked.setdefault(field, text)
        origins = values.get("origin", ())
        return cls(
            MappingProxyType({name: ", ".join(each) for name, each in values.items()}),
            MappingProxyType(cookies),
            MappingProxyType(asked),
            address,
            origins[0] if len(origins) == 1 else None,
        )


Authenticate = (
    Callable[[str], Principal | Awaitable[Principal]]
    | Callable[[str | None, Handshake], Principal | Awaitable[Principal | None] | None]
)
"""Takes a token and returns its principal, at once or when awaited.

It raises AuthenticationError to refuse the token; any other exception counts as a bug. One that
takes the handshake as well is called at each handshake, with None where that brings no token; it
returns None to let the connection go on without a user, who may authenticate later.
"""


def takes_handshake(authenticate: Authenticate) -> bool:
    """Whether an `authenticate` must be given a second argument, the handshake."""
    try:
        parameters = [*inspect.signature(authenticate).parameters.values()]
    except (TypeError, ValueError):  # something of C that does not tell
        return False
    positional = [each for each in parameters if each.kind in _POSITIONAL]
    return len(positional) > 1 and (
        positional[1].default is inspect.Parameter.empty or positional[1].name == "handshake"
    )


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
