"""An application's own functions as a source, each call inside a context of its own.

A plain function stays a plain one, so that `upstream.fetching` runs it in a worker thread. Its
context is entered and left in that thread, even when the answer is not awaited any more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
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
        fetch: Called with a user's id and a data type; returns the current value, or None for
            "nothing new". A plain function, which runs in a worker thread, or an async one.
        context: A factory of context managers, of which a new one is open around each call. Async
            ones go around async functions only. (`fetch_context` of `open_push_service` takes any
            kind around any function; it is the outer one.)
        fetch_many: Called with a sequence of user ids and a data type, in place of `fetch`; returns
            values by user id.
        data_types: The data types that the functions answer for; None for all.

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
    ) -> None:
        self.data_types = None if data_types is None else tuple(data_types)
        """What is offered; see `sources.base.Source`."""
        self.fetch = _within(context, fetch)
        self.fetch_many = None if fetch_many is None else _within(context, fetch_many)


def _within(context: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function, plain or async as it is, in a new context for each call."""
    if not _accepts_two(function):
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


def _accepts_two(function: Any) -> bool:
    try:
        inspect.signature(function).bind("", "")
    except TypeError:
        return False
    except ValueError:  # a function written in C does not tell its parameters
        return True
    return True
