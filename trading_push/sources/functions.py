"""An application's own functions as a source, each call inside a context of its own.

A plain function stays a plain one, so that `upstream.fetching` runs it in a worker thread. Its
context is entered and left in that thread, even when the answer is not awaited any more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    nullcontext,
)
from typing import Any

from trading_push.errors import ConfigurationError, SourceError
from trading_push.user_ids import IdKind, UserIds

__all__ = ["FunctionSource"]


class FunctionSource:
    """Asks an application's functions; with `fetch_many`, a `BatchSource`.

    Args:
        fetch: Called with a user's id and a data type; returns the current value, or None for
            "nothing new". A plain function, which runs in a worker thread, or an async one.
        context: A factory of context managers, of which a new one is open around each call. Async
            ones go around async functions only. (`fetch_context` of `open_push_service` takes any
            kind around any function; it is the outer one.)
        fetch_many: Called with a sequence of user ids and a data type, in place of `fetch`; returns
            values by user id.
        data_types: The data types that the functions answer for; None for all.
        user_id: How the ids in an answer of `fetch_many` are compared with those asked for: `text`,
            `integer`, `uuid` or `caseless`; see `user_ids`.

    The value is encoded after the context has been left. Objects that still need the context, as
    those of an ORM do, have to be turned into plain values before.

    Raises:
        ConfigurationError: A function does not accept two arguments.
    """

    def __init__(
        self,
        fetch: Callable[[str, str], Any],
        *,
        context: Callable[
            [], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]
        ] = nullcontext,
        fetch_many: Callable[..., Any] | None = None,
        data_types: Iterable[str] | None = None,
        user_id: IdKind = "text",
    ) -> None:
        self._ids = UserIds(user_id)
        self.data_types = None if data_types is None else tuple(data_types)
        """What is offered; see `sources.base.Source`."""
        self.fetch = _within(context, fetch, self._check_one, lambda user, answer: answer)
        self.fetch_many = (
            None
            if fetch_many is None
            else _within(context, fetch_many, self._askable, self._by_user)
        )

    def _check_one(self, user: str) -> str:
        if (refused := self._refusal(user)) is not None:
            raise refused
        return user

    def _refusal(self, user: str) -> SourceError | None:
        why = self._ids.refusal(user)
        return None if why is None else SourceError(why, retryable=False, reason="refused")

    def _askable(self, users: Sequence[str]) -> Sequence[str]:
        return [user for user in users if self._ids.refusal(user) is None]

    def _by_user(self, users: Sequence[str], answer: Any) -> Any:
        """Give each asked user their value: a function may spell their ids in another way."""
        if not isinstance(answer, Mapping):
            return answer  # refused by whoever asked
        values = {user: each for user in users if (each := self._refusal(user)) is not None}
        matches = self._ids.match(self._askable(users), answer)
        for answered_id, found in matches.users.items():
            for user in found:
                values[user] = answer[answered_id]
        for answered_id, candidates in matches.strays.items():
            for user in candidates:
                values[user] = SourceError(
                    f"fetch_many answered for {_shown(answered_id)}, who may be {_shown(user)}: "
                    "let it answer with the id that it was asked for, or set function.user_id to "
                    "how its ids compare",
                    retryable=False,
                )
        return values


def _within(
    context: Callable[[], Any],
    function: Callable[..., Any],
    prepare: Callable[[Any], Any],
    conclude: Callable[[Any, Any], Any],
) -> Callable[..., Any]:
    """Wrap a function, plain or async as it is, in a new context for each call.

    Args:
        context: Makes the context.
        function: The function.
        prepare: Returns what the function is asked, of what is asked for; nothing is not asked.
        conclude: Takes what was asked for, and the answer; returns what is answered.
    """
    if not _accepts_two(function):
        name = getattr(function, "__qualname__", repr(function))
        raise ConfigurationError(f"{name} cannot be asked: give a function of user_id, data_type")

    async def call_async(asked: Any, data_type: str) -> Any:
        if not (prepared := prepare(asked)):
            return conclude(asked, {})
        manager = context()
        async with AsyncExitStack() as stack:
            if hasattr(manager, "__aenter__"):
                await stack.enter_async_context(manager)
            else:
                stack.enter_context(manager)
            answer = await function(prepared, data_type)
        return conclude(asked, answer)

    def call_plain(asked: Any, data_type: str) -> Any:
        if not (prepared := prepare(asked)):
            return conclude(asked, {})
        with context():
            answer = function(prepared, data_type)
        return conclude(asked, answer)

    called = inspect.unwrap(function)
    if inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(type(called).__call__):
        return call_async
    return call_plain


def _shown(user_id: object) -> str:
    text = repr(user_id)
    return text if len(text) <= 60 else text[:57] + "..."


def _accepts_two(function: Any) -> bool:
    try:
        inspect.signature(function).bind("", "")
    except TypeError:
        return False
    except ValueError:  # a function written in C does not tell its parameters
        return True
    return True
