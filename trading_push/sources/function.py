"""An application's own functions as a source, each call inside a context of its own.

A plain function stays one, so that whoever polls runs it in a worker thread (`poller`): its context
is entered and left in that thread, also when nobody waits for the answer any more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    nullcontext,
)
from typing import Any

from trading_push.errors import ConfigurationError

__all__ = ["FunctionSource"]


class FunctionSource:
    """Asks an application's functions; with `fetch_many`, a `BatchSource`.

    Args:
        fetch: Called with a user's id and a data type, returns the current value or None for
            "nothing new"; a plain function, which runs in a worker thread, or an async one.
        context: A factory of context managers, a new one of which is open round each call; async
            ones round async functions alone. (Any kind round any function is what
            `open_push_service` takes as `fetch_context`; that one is the outer.)
        fetch_many: Called with a sequence of user ids and a data type, in place of `fetch`; returns
            values by user id.

    The value is encoded when the context has been left: objects that still need it, as those of an
    ORM do, belong turned into values before.

    Raises:
        ConfigurationError: What is to be called does not take two arguments.
    """

    def __init__(
        self,
        fetch: Callable[[str, str], Any],
        *,
        context: Callable[
            [], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]
        ] = nullcontext,
        fetch_many: Callable[..., Any] | None = None,
    ) -> None:
        self.fetch = _within(context, fetch)
        self.fetch_many = None if fetch_many is None else _within(context, fetch_many)


def _within(context: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, plain or async as it is, with a new context round each call."""
    if not _takes_two(function):
        name = getattr(function, "__qualname__", repr(function))
        raise ConfigurationError(f"{name} cannot be asked: give a function of user_id, data_type")

    async def call_async(asked: Any, data_type: str) -> Any:
        manager = context()
        async with AsyncExitStack() as stack:
            if hasattr(manager, "__aenter__"):
                await stack.enter_async_context(manager)
            else:
                stack.enter_context(manager)
            return await function(asked, data_type)

    def call_plain(asked: Any, data_type: str) -> Any:
        with context():
            return function(asked, data_type)

    called = inspect.unwrap(function)
    if inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(type(called).__call__):
        return call_async
    return call_plain


def _takes_two(function: Any) -> bool:
    try:
        inspect.signature(function).bind("", "")
    except TypeError:
        return False
    except ValueError:  # written in C: it does not say
        return True
    return True
