"""Where a client's tokens come from: one string, or the application's function."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable

from trading_push.client import ending

__all__ = ["Token", "next_token"]

Token = str | Callable[[], str | Awaitable[str]]
"""A token, or a function, sync or async, that gives one."""


async def next_token(token: Token) -> str:
    """Return the token for the next connection or renewal.

    Raises:
        ConnectionLost: The application's function failed; it may succeed the next time.
        AuthenticationError, Refused: The function says that there is no other.
    """
    if isinstance(token, str):
        return token
    try:
        answer = token()
        return await answer if inspect.isawaitable(answer) else answer
    except Exception as error:  # the application's own, which may succeed the next time
        raise ending.no_token(error) from error
