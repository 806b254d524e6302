"""What a check has found, and how one is made that may fail or never end."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Literal

import attrs
import trio

from trading_push.errors import innermost

__all__ = ["Check", "Finding", "guarded", "words"]

State = Literal["ok", "warning", "failed"]


@attrs.frozen
class Finding:
    """What a check has found.

    Args:
        state: Whether a server would do: `ok`, `warning`, `failed`.
        what: What was checked.
        text: What there is, or what is wrong and what to do.
    """

    state: State
    what: str
    text: str


Check = Callable[[], list[Finding] | Awaitable[list[Finding]]]


async def guarded(what: str, check: Check, timeout_s: float) -> list[Finding]:
    """Make a check; what it raises, and that it takes too long, is a finding."""
    try:
        with trio.fail_after(timeout_s):
            found = check()
            return await found if inspect.isawaitable(found) else found
    except trio.TooSlowError:
        return [Finding("failed", what, f"there was no answer within {timeout_s:g} s")]
    except Exception as error:  # an application's own code may raise anything
        return [Finding("failed", what, words(error))]


def words(error: BaseException) -> str:
    """What an error says; its name, where it says nothing."""
    error = innermost(error, first=True)
    return str(error) or type(error).__name__
