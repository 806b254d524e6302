"""One call of a source: a free slot, the application's context, a thread or none, the deadline.

1. As many calls run at the same time as there are slots. A slot is free again when its call has
   ended. A call in a worker thread that has hung is replaced: its slot is free at its deadline, as
   long as no more calls hang than there are slots; from then on, when the thread has ended.
2. An async function is called in the event loop, a plain one in a worker thread. What either of
   them returns is awaited, where it can be: a decorator may hide which of the two it is.
3. Each call has a context of its own around it. A plain context around a plain function is entered
   and left in the worker thread, all others in the event loop. Entering and leaving an async one
   has the deadline of a call each.
4. At the deadline an async function is cancelled. A thread cannot be: the caller is told that it is
   still running, and once more when it has ended.
5. A function that ends the process (`sys.exit`) has failed, and the process goes on.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from typing import Any, Final

import trio

from trading_push.errors import SourceError
from trading_push.histogram import Histogram
from trading_push.sources.base import Source
from trading_push.supervision import ExitAsked, exits_are_errors

__all__ = ["RESULTS", "FetchContext", "Fetcher", "StillRunning"]

RESULTS: Final = ("ok", "error", "timeout")
"""What a call ends with, as it is counted."""
_DURATION_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

FetchContext = Callable[[], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]
"""Makes the context manager that is open around one call of the source."""


class StillRunning(SourceError):
    """A fetch in a worker thread has taken too long, and goes on."""

    def __init__(self) -> None:
        super().__init__("the source did not answer in time", reason="source_timeout")


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
        batch_size: Callable[[str], int | None] | None = getattr(source, "batch_size", None)
        if batch_size is not None:
            batch = min(batch, batch_size(data_type) or batch)
        self._takes_many = fetch_many is not None and batch > 1
        self._function: Callable[..., Any] = source.fetch
        if fetch_many is not None and self._takes_many:
            self._function = fetch_many
        self._is_async = inspect.iscoroutinefunction(self._function)
        self._data_type = data_type
        self._context = context
        self._timeout_s = timeout_s
        self._slots = trio.CapacityLimiter(slots)
        self.most_hung = slots
        """How many hung calls are replaced at most."""
        self.hung = 0
        """How many calls go on in worker threads after their deadline."""
        self.results: Counter[str] = Counter()
        """How many calls have ended since the start, by `RESULTS`."""
        self.duration = Histogram(_DURATION_S)
        """How long they took, in seconds; one that hangs, until it was given up."""
        self.answered_at = -math.inf
        """When a call last succeeded, on trio's clock."""
        # trio's own limit is lifted, because the slots bound the threads already.
        self._threads = trio.CapacityLimiter(math.inf)
        self.batch = batch if self._takes_many else 1
        """How many users one call names at most."""

    async def wait_for_slot(self) -> object:
        """Wait until a call may begin, and reserve its slot; `fetch` gives it back."""
        slot = object()
        await self._slots.acquire_on_behalf_of(slot)
        return slot

    def give_back(self, slot: object) -> None:
        """Free a slot that is not needed after all."""
        self._slots.release_on_behalf_of(slot)

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
        began, result = trio.current_time(), ""
        try:
            answers = await self._fetch(users, slot, ended)
            result = "ok"
            self.answered_at = trio.current_time()
        except Exception as error:
            late = isinstance(error, trio.TooSlowError | StillRunning)
            result = "timeout" if late else "error"
            raise
        finally:
            if result:  # else it was cancelled
                self.results[result] += 1
                self.duration.observe(trio.current_time() - began)
        return answers

    async def _fetch(
        self, users: Sequence[str], slot: object, ended: Callable[[], None]
    ) -> Mapping[str, Any | None]:
        asked = users if self._takes_many else users[0]
        in_thread = False  # from then on the thread gives the slot back
        try:
            with exits_are_errors():
                context: Any = self._context()
                if self._is_async:
                    async with _entered(context, self._timeout_s):
                        with trio.fail_after(self._timeout_s):
                            answer = await _awaited(self._function(asked, self._data_type))
                elif hasattr(context, "__aenter__"):
                    async with _entered(context, self._timeout_s):
                        in_thread = True
                        answer = await self._call_in_thread(slot, ended, nullcontext(), asked)
                else:
                    in_thread = True
                    answer = await self._call_in_thread(slot, ended, context, asked)
                if inspect.isawaitable(answer):
                    with trio.fail_after(self._timeout_s):
                        answer = await answer
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
        begun = late = done = replaced = False

        def finish() -> None:
            nonlocal done
            done = True
            if not replaced:
                self._slots.release_on_behalf_of(slot)
            if late:
                self.hung -= 1
                ended()

        def call() -> Any:
            nonlocal begun
            begun = True
            try:
                with context:
                    # In a tuple, for trio takes a thread that returns a coroutine for a mistake.
                    return (self._function(asked, self._data_type),)
            except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
                raise ExitAsked from error  # in a thread, only the function itself raises them
            finally:
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(finish)

        try:
            with trio.move_on_after(self._timeout_s):
                (answer,) = await trio.to_thread.run_sync(
                    call, abandon_on_cancel=True, limiter=self._threads
                )
                return answer
        except RuntimeError:
            if not begun:  # the system has no thread left
                self._slots.release_on_behalf_of(slot)
            raise
        # The thread goes on, unless it has ended in this very moment.
        if done:
            ended()
        else:
            late = True
            self.hung += 1
            replaced = self.hung <= self.most_hung
            if replaced:
                self._slots.release_on_behalf_of(slot)
        raise StillRunning


async def _awaited(answer: Any) -> Any:
    return await answer if inspect.isawaitable(answer) else answer


@asynccontextmanager
async def _entered(context: Any, timeout_s: float) -> AsyncIterator[None]:
    """Keep a context open; entering it, and leaving it, may each take `timeout_s`.

    Raises:
        trio.TooSlowError: It took longer.
    """
    if not hasattr(context, "__aenter__"):
        with context:
            yield
        return
    # Around all of it, because a context may hold a nursery open.
    with trio.CancelScope(deadline=trio.current_time() + timeout_s) as scope:
        async with context:
            scope.deadline = math.inf
            try:
                yield
            finally:
                scope.deadline = trio.current_time() + timeout_s
    if scope.cancelled_caught:
        raise trio.TooSlowError
