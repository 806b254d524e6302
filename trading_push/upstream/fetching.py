"""One call of a source: a free slot, the application's context, a thread or none, the deadline.

1. As many calls run at the same time as there are slots. A slot is free again when its call has
   ended, and one whose call runs in a worker thread when the thread has.
2. An async function is called in the event loop, a plain one in a worker thread.
3. Each call has a context of its own around it. A plain context around a plain function is entered
   and left in the worker thread, all others in the event loop.
4. At the deadline an async function is cancelled. A thread cannot be: the caller is told that it is
   still running, and once more when it has ended.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from typing import Any

import trio

from trading_push.errors import SourceError
from trading_push.sources.base import Source

__all__ = ["FetchContext", "Fetcher", "StillRunning"]

FetchContext = Callable[[], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]
"""Makes the context manager that is open around one call of the source."""


class StillRunning(SourceError):
    """A fetch in a worker thread has taken too long, and goes on."""


class Fetcher:
    """Calls a source for one data type.

    Args:
        source: Where the data come from; with `fetch_many`, many users are asked for in one call.
        data_type: The channel's name.
        context: Opened anew around each call.
        slots: How many calls may run at the same time.
        batch: How many users one call may name, where the source has `fetch_many`.
        timeout_s: How long a call may take.
    """

    def __init__(
        self,
        source: Source,
        data_type: str,
        *,
        context: FetchContext,
        slots: int,
        batch: int,
        timeout_s: float,
    ) -> None:
        fetch_many: Callable[..., Any] | None = getattr(source, "fetch_many", None)
        self._takes_many = fetch_many is not None
        self._function: Callable[..., Any] = source.fetch if fetch_many is None else fetch_many
        self._is_async = inspect.iscoroutinefunction(self._function)
        self._data_type = data_type
        self._context = context
        self._timeout_s = timeout_s
        self._slots = trio.CapacityLimiter(slots)
        # trio's own limit is lifted, because the slots bound the threads already.
        self._threads = trio.CapacityLimiter(math.inf)
        self.batch = batch if self._takes_many else 1
        """How many users one call names at most."""

    async def wait_for_slot(self) -> object:
        """Wait until a call may begin, and reserve its slot; `fetch` gives it back."""
        slot = object()
        await self._slots.acquire_on_behalf_of(slot)
        return slot

    async def fetch(
        self, users: Sequence[str], slot: object, ended: Callable[[], None]
    ) -> Mapping[str, Any | None]:
        """Call the source for some users.

        Args:
            users: Whom to ask for; at most `batch`.
            slot: From `wait_for_slot`.
            ended: Called when the thread of a call that was still running has ended.

        Returns:
            The answers by user id.

        Raises:
            StillRunning: It takes too long, and cannot be stopped.
            trio.TooSlowError: It took too long.
            Exception: What the source, or the context, raised.

        Cancellation abandons a worker thread, which keeps the slot until it ends.
        """
        asked = users if self._takes_many else users[0]
        in_thread = False  # from then on the thread gives the slot back
        try:
            context: Any = self._context()
            if self._is_async:
                async with _entered(context):
                    with trio.fail_after(self._timeout_s):
                        answer = await self._function(asked, self._data_type)
            elif hasattr(context, "__aenter__"):
                async with context:
                    in_thread = True
                    answer = await self._call_in_thread(slot, ended, nullcontext(), asked)
            else:
                in_thread = True
                answer = await self._call_in_thread(slot, ended, context, asked)
        finally:
            if not in_thread:
                self._slots.release_on_behalf_of(slot)
        return answer if self._takes_many else {users[0]: answer}

    async def _call_in_thread(
        self,
        slot: object,
        ended: Callable[[], None],
        context: AbstractContextManager[Any],
        asked: str | Sequence[str],
    ) -> Any:
        # Written in the event loop only, but for `begun`; they say who is to tell the caller.
        token = trio.lowlevel.current_trio_token()
        begun = late = done = False

        def finish() -> None:
            nonlocal done
            done = True
            self._slots.release_on_behalf_of(slot)
            if late:
                ended()

        def call() -> Any:
            nonlocal begun
            begun = True
            try:
                with context:
                    return self._function(asked, self._data_type)
            finally:
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(finish)

        try:
            with trio.move_on_after(self._timeout_s):
                return await trio.to_thread.run_sync(
                    call, abandon_on_cancel=True, limiter=self._threads
                )
        except RuntimeError:
            if not begun:  # the system has no thread left
                self._slots.release_on_behalf_of(slot)
            raise
        # The thread goes on, unless it has ended in this very moment.
        late = True
        if done:
            ended()
        raise StillRunning("the source did not answer in time")


@asynccontextmanager
async def _entered(context: Any) -> AsyncIterator[None]:
    if hasattr(context, "__aenter__"):
        async with context:
            yield
    else:
        with context:
            yield
