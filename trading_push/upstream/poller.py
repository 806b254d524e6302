"""The push loop of one data type: source -> changed? -> broker, only for users who are subscribed.

A user's first subscription asks at once, and from then on each user has a time of their own: those
whose times are close are asked for together, and the work is spread over the whole interval. Who is
being asked already is left out, so that a slow answer delays nobody else.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from typing import Any

import attrs
import trio

from trading_push import logs
from trading_push.broker.base import Broker, Status
from trading_push.errors import SourceError
from trading_push.protocol.payloads import encode_data
from trading_push.settings.schema import Limits
from trading_push.sources.base import Source
from trading_push.topics import Topic
from trading_push.upstream.batcher import Answers

__all__ = ["FetchContext", "Poller"]

FetchContext = Callable[[], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]

REPEAT_S = 60
"""How often at most a source that goes on failing for a user is logged."""
_FRESH_S = 1.0
_SLOT_S = 0.25
_SLOTS = 20
"""Who is due in the same slot of time is asked for together, at its beginning.

A slot is a quarter of a second, the same for all types, or the twentieth part of a short interval.
"""


class _StillRunning(SourceError):
    """A fetch in a worker thread has taken too long, and goes on."""


@attrs.define
class _Failure:
    logged_at: float
    suppressed: int = 0


class Poller:
    """Polls a source for one data type.

    Args:
        data_type: The channel's name.
        interval_s: Seconds between two questions for the same user.
        source: Where the data come from.
        broker: Where changes are published, and the last values kept.
        limits: How many users and fetches at a time, and how long a fetch may take.
        settled: Called with the topics that the source has answered for since they are watched.
        context: Opened anew round each call of the source; in the worker thread, where the call
            is a plain function.
        answers: Shared with other pollers: what is published together.
    """

    def __init__(
        self,
        data_type: str,
        interval_s: float,
        source: Source,
        broker: Broker,
        limits: Limits,
        *,
        settled: Callable[[Sequence[Topic]], None],
        context: FetchContext = nullcontext,
        answers: Answers | None = None,
    ) -> None:
        self.data_type = data_type
        self.interval_s = interval_s
        self._slot_s = min(_SLOT_S, interval_s / _SLOTS)
        self._broker = broker
        self._limits = limits
        self._tell_settled = settled
        self._context = context
        self._fetch: Callable[..., Any] = source.fetch
        self._fetch_many: Callable[..., Any] | None = getattr(source, "fetch_many", None)
        self._answers = answers or Answers(broker)
        self._limiter = trio.CapacityLimiter(limits.fetches)
        self._watched: dict[str, float] = {}  # when they are to be asked for, the next one first
        self._left: dict[str, float] = {}  # when their last subscriber went
        self._new: dict[str, None] = {}
        self._batch = 1 if self._fetch_many is None else limits.fetch_batch
        self._queue: dict[str, None] = {}  # who waits for one of the fetches that may run
        self._rounds_waiting = 0
        self._busy: set[str] = set()
        self._again: set[str] = set()  # who has changed while they were being asked for
        self._given: dict[str, bytes] = {}  # what the source gave last
        self._settled: set[str] = set()
        self._failures: dict[str, _Failure] = {}
        self._stale: set[str] = set()
        self._answered_at: dict[str, float] = {}
        self._threads = trio.CapacityLimiter(math.inf)  # bounded by `_limiter`
        self._wake = trio.Event()

    @property
    def failing(self) -> int:
        """For how many watched users the source fails."""
        return sum(user in self._watched for user in self._failures)

    def awaits(self, user: str) -> bool:
        """Whether the source has yet to answer for a user since they are watched."""
        return user not in self._settled

    def watch(self, user: str) -> None:
        """The user's first subscriber has come: ask the source at once.

        Not where it answered a moment ago: coming and going is no way to make it work harder.
        """
        now = trio.current_time()
        self._watched[user] = now + self.interval_s
        self._left.pop(user, None)
        fresh_s = min(self.interval_s, _FRESH_S)
        is_known = user not in self._failures and user not in self._stale
        if is_known and now - self._answered_at.get(user, -math.inf) < fresh_s:
            topic = self._topic(user)
            if self._broker.snapshot(topic) is not None:
                self._broker.mark([topic], Status("live"))
            self._settle([user])
        elif user in self._busy:  # that answer may have gone by while nobody watched
            self._again.add(user)
        else:
            self._new[user] = None
        self._wake.set()

    def unwatch(self, user: str) -> None:
        """The user's last subscriber has gone."""
        if self._watched.pop(user, None) is not None:
            self._left[user] = trio.current_time()
        self._new.pop(user, None)
        self._settled.discard(user)

    def changed(self, users: Iterable[str]) -> None:
        """The source says that it has something new for these users: ask at once."""
        for user in users:
            if user in self._busy:
                self._again.add(user)
            elif user in self._watched:
                self._new[user] = None
            else:
                self._answered_at.pop(user, None)  # who comes back is asked for
        self._wake.set()

    def missed(self) -> None:
        """The source may have something new for anybody."""
        self.changed([*self._watched, *self._left])

    def forget(self, user: str) -> None:
        """The user's value is no longer kept: the source's next answer is news."""
        self._given.pop(user, None)

    def _freed(self, users: Iterable[str]) -> None:
        self._busy.difference_update(users)
        if self._again and (again := self._again.intersection(users)):
            self._again -= again
            self.changed(again)

    def _settle(self, users: Iterable[str]) -> None:
        settled = [user for user in users if user in self._watched and user not in self._settled]
        self._settled.update(settled)
        if settled:
            self._tell_settled([self._topic(user) for user in settled])

    async def run(self) -> None:
        """Poll until cancelled, which leaves nothing behind but worker threads that go on.

        After an end by an exception it may be run again.
        """
        self._queue.clear()
        self._busy.clear()
        self._again.clear()
        self._rounds_waiting = 0
        self._new.update(dict.fromkeys(self._watched))
        self._wake.set()
        async with trio.open_nursery() as nursery:
            while True:
                with trio.move_on_at(min(self._next_due(), self._next_useless())):
                    await self._wake.wait()
                self._wake = trio.Event()
                self._prune()
                users = dict.fromkeys((*self._new, *self._due()))
                self._new.clear()
                self._find_stale(users)
                self._ask(nursery, [user for user in users if user not in self._busy])

    def _slot(self, at: float) -> int:
        return math.floor(at / self._slot_s)

    def _next_due(self) -> float:
        """When the first of those who are watched are to be asked for; infinite for nobody."""
        for at in self._watched.values():
            return self._slot(at) * self._slot_s
        return math.inf

    def _due(self) -> list[str]:
        """Who is to be asked for by now; a time that has passed is not made up for."""
        now = trio.current_time()
        if self._next_due() > now:
            return []
        first = next(iter(self._watched.values()))
        slot = max(self._slot(first), self._slot(now))
        due = list(
            itertools.takewhile(lambda user: self._slot(self._watched[user]) <= slot, self._watched)
        )
        for user in due:
            self._watched[user] = max(self._watched.pop(user) + self.interval_s, now)
        return due

    def _find_stale(self, due: Iterable[str]) -> None:
        """Mark the values that are too old of who is due and still waits for an answer."""
        too_old = trio.current_time() - max(self._limits.stale_after_s, 2 * self.interval_s)
        for user in self._busy.intersection(due) - self._stale - self._failures.keys():
            topic = self._topic(user)
            if self._answered_at.get(user, math.inf) <= too_old and self._broker.snapshot(topic):
                self._stale.add(user)
                self._broker.mark([topic], Status("stale", "source_timeout"))
                logs.emit(logs.line("data_stale", user=user, data_type=self.data_type))

    def _next_useless(self) -> float:
        """When what is known of the first of those who have gone is of no use any more."""
        return next(iter(self._left.values()), math.inf) + REPEAT_S

    def _prune(self) -> None:
        # What is known of users who have gone, once it is of no use any more.
        now = trio.current_time()
        for user in list(
            itertools.takewhile(lambda user: self._left[user] + REPEAT_S <= now, self._left)
        ):
            del self._left[user]
            self._failures.pop(user, None)
            self._answered_at.pop(user, None)
            self._stale.discard(user)

    def _ask(self, nursery: trio.Nursery, users: Sequence[str]) -> None:
        self._busy.update(users)
        self._queue.update(dict.fromkeys(users))
        while self._rounds_waiting * self._batch < len(self._queue):
            self._rounds_waiting += 1
            nursery.start_soon(self._round)

    async def _round(self) -> None:
        # Who to ask for is settled when there is a fetch free: in a rush of new users, those who
        # have come meanwhile go along.
        fetch = await self._free_fetch()
        self._rounds_waiting -= 1
        users = list(itertools.islice(self._queue, self._batch))
        for user in users:
            del self._queue[user]
        await self._ask_for(users, fetch)

    async def _free_fetch(self) -> object:
        fetch = object()
        await self._limiter.acquire_on_behalf_of(fetch)
        return fetch

    async def _ask_for(self, users: Sequence[str], fetch: object) -> None:
        try:
            if self._fetch_many is None:
                answer = await self._call(users, fetch, self._fetch, users[0], self.data_type)
                answers = {users[0]: answer}
            else:
                answers = await self._call(users, fetch, self._fetch_many, users, self.data_type)
            await self._answers.publish(self, users, answers)
        except _StillRunning as error:
            # Its thread cannot be stopped: these users are not asked again before it has ended.
            self._failed(users, error)
            self._settle(users)
            return
        except Exception as error:  # a source may raise anything: it is logged, and asked again
            if len(users) > 1 and isinstance(error, SourceError) and not error.retryable:
                # It is what one of them has that it cannot give: the others shall have theirs.
                middle = len(users) // 2
                await self._ask_for(users[:middle], await self._free_fetch())
                await self._ask_for(users[middle:], await self._free_fetch())
                return
            self._failed(users, error)
        self._freed(users)
        self._settle(users)

    async def _call(
        self, users: Sequence[str], fetch: object, function: Callable[..., Any], *args: Any
    ) -> Any:
        """Call the source; the fetch is free again when it has answered, or its thread ended."""
        in_thread = False
        try:
            context: Any = self._context()
            if inspect.iscoroutinefunction(function):
                async with _entered(context):
                    with trio.fail_after(self._limits.fetch_timeout_s):
                        return await function(*args)
            if not hasattr(context, "__aenter__"):
                in_thread = True
                return await self._call_in_thread(users, fetch, context, function, *args)
            async with context:
                in_thread = True
                return await self._call_in_thread(users, fetch, nullcontext(), function, *args)
        finally:
            if not in_thread:
                self._limiter.release_on_behalf_of(fetch)

    async def _call_in_thread(
        self,
        users: Sequence[str],
        fetch: object,
        context: AbstractContextManager[Any],
        function: Callable[..., Any],
        *args: Any,
    ) -> Any:
        token = trio.lowlevel.current_trio_token()
        begun = late = done = False

        def ended() -> None:
            nonlocal done
            done = True
            self._limiter.release_on_behalf_of(fetch)
            if late:  # otherwise they are free when the answer has been taken
                self._freed(users)

        def call() -> Any:
            nonlocal begun
            begun = True
            try:
                with context:
                    return function(*args)
            finally:
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(ended)

        try:
            with trio.move_on_after(self._limits.fetch_timeout_s):
                return await trio.to_thread.run_sync(
                    call, abandon_on_cancel=True, limiter=self._threads
                )
        except RuntimeError:
            if not begun:  # the system has no thread left
                self._limiter.release_on_behalf_of(fetch)
            raise
        late = True
        if done:
            self._freed(users)
        raise _StillRunning("the source did not answer in time")

    def take(self, user: str, answer: Any | None, now: float) -> tuple[Topic, bytes] | Topic | None:
        """What an answer changes: see `answers.Taker`."""
        if user not in self._watched:
            return None
        topic = self._topic(user)
        try:
            data = None if answer is None else encode_data(answer)
        except Exception as error:
            self._failed([user], error)
            return None
        self._answered_at[user] = now
        if self._failures or self._stale:
            self._recovered(user)
        last = self._broker.snapshot(topic)
        given = self._given.get(user)
        if data is not None:
            self._given[user] = data
            # What was published stands until the source itself has something else to say.
            if (last is None or last.data != data) and (
                data != given if given is not None else last is None
            ):
                return topic, data
        return None if last is None else topic

    def _topic(self, user: str) -> Topic:
        return Topic(self.data_type, user)

    def _recovered(self, user: str) -> None:
        stale = user in self._stale
        self._stale.discard(user)
        if self._failures.pop(user, None) is not None or stale:
            logs.emit(logs.line("fetch_recovered", user=user, data_type=self.data_type))

    def _failed(self, users: Sequence[str], error: Exception) -> None:
        now = trio.current_time()
        late = isinstance(error, trio.TooSlowError | _StillRunning)
        reason = "source_timeout" if late else "source_error"
        for user in users:
            if user not in self._watched:
                continue
            topic = self._topic(user)
            state = Status("down" if self._broker.snapshot(topic) is None else "stale", reason)
            self._broker.mark([topic], state)
            failure = self._failures.get(user)
            fields = {"user": user, "data_type": self.data_type, "error": error}
            if failure is None:
                self._failures[user] = _Failure(now)
                logs.emit(logs.line("fetch_failed", **fields))
            elif now - failure.logged_at < REPEAT_S:
                failure.suppressed += 1
            else:
                event = "fetch_failed_again" if failure.suppressed else "fetch_failed"
                logs.emit(logs.line(event, suppressed=failure.suppressed, **fields))
                self._failures[user] = _Failure(now)


@asynccontextmanager
async def _entered(context: Any) -> AsyncIterator[None]:
    if hasattr(context, "__aenter__"):
        async with context:
            yield
    else:
        with context:
            yield
