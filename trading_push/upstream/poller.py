"""Poll a source for one data type: decide who is asked for and when, and detect what changed.

Only users who are subscribed are asked for. A user's first subscription asks at once; from then on
each user has a time of their own. Users whose times are close are asked for together, and the work
is spread over the whole interval. A user who is being asked for already is left out, so that a slow
answer delays only its own users.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import attrs
import trio

from trading_push import logs
from trading_push.broker.base import Broker, Status
from trading_push.errors import SourceError
from trading_push.protocol.payloads import encode_data
from trading_push.settings.schema import Polling
from trading_push.sources.base import Source
from trading_push.topics import Topic
from trading_push.upstream.batcher import Batcher
from trading_push.upstream.fetching import FetchContext, Fetcher, StillRunning

__all__ = ["Poller"]

REPEAT_S = 60
"""How often at most a source that goes on failing for a user is logged."""
_FRESH_S = 1.0
_BUCKET_S = 0.25
_BUCKETS = 20
"""Users who are due in the same bucket of time are asked for together, at its beginning.

A bucket is a quarter of a second, the same for all types, or the twentieth part of a short
interval.
"""


@attrs.define
class _Failure:
    """A source that fails for a user: when that was logged, and how often it was not, since."""

    logged_at: float
    suppressed: int = 0


class Poller:
    """Polls a source for one data type; a `ChangeDetector` of its answers.

    It is longer than 300 lines because a user moves between its sets at every step: who asks, what
    is answered and what is forgotten cannot be told apart without them.

    Args:
        data_type: The channel's name.
        interval_s: Seconds between two questions for the same user.
        source: Where the data come from.
        broker: Where changes are published, and the last values kept.
        polling: How many users and fetches at a time, and how long a fetch may take.
        settled: Called with topics whose users the source has answered for the first time since
            they are watched.
        context: Opened anew around each call of the source; see `fetching`.
        batcher: Shared with other pollers, whose answers it publishes together with these.
    """

    def __init__(
        self,
        data_type: str,
        interval_s: float,
        source: Source,
        broker: Broker,
        polling: Polling,
        *,
        settled: Callable[[Sequence[Topic]], None],
        context: FetchContext = nullcontext,
        batcher: Batcher | None = None,
    ) -> None:
        self.data_type = data_type
        self.interval_s = interval_s
        self._bucket_s = min(_BUCKET_S, interval_s / _BUCKETS)
        # A value is stale when the source has not answered for so long.
        self._stale_after_s = max(polling.stale_after_s, 2 * interval_s)
        self._broker = broker
        self._tell_settled = settled
        self._batcher = batcher or Batcher(broker)
        self._fetcher = Fetcher(
            source,
            data_type,
            context=context,
            slots=polling.fetches,
            batch=polling.fetch_batch,
            timeout_s=polling.fetch_timeout_s,
        )
        # All times are those of trio's clock; each of these is a set of users, or keyed by user.
        # When watched users are due, the next one first.
        self._watched: dict[str, float] = {}
        # When the last subscriber of a user went, the first one first; until `_prune`.
        self._left: dict[str, float] = {}
        # Who is to be asked for at once.
        self._new: dict[str, None] = {}
        # Who waits for a free slot.
        self._queue: dict[str, None] = {}
        # How many tasks wait for a free slot, to ask for a batch of the queue each.
        self._rounds_waiting = 0
        # Who is in the queue, or being asked for.
        self._busy: set[str] = set()
        # Who has changed while they were busy.
        self._again: set[str] = set()
        # What the source gave last, encoded; as long as the broker keeps the topic.
        self._given: dict[str, bytes] = {}
        # For whom the source has answered, or failed, since they are watched.
        self._settled: set[str] = set()
        # For whom the source fails, until it answers or `_prune`.
        self._failures: dict[str, _Failure] = {}
        # Whose value was marked stale because no answer comes.
        self._stale: set[str] = set()
        # When the source last answered; until `_prune`.
        self._answered_at: dict[str, float] = {}
        # Set when there may be something to do before the next user is due.
        self._wake = trio.Event()

    @property
    def failing(self) -> int:
        """For how many watched users the source fails."""
        return sum(user in self._watched for user in self._failures)

    def awaits(self, user: str) -> bool:
        """Whether the source has yet to answer for a user since they are watched."""
        return user not in self._settled

    def watch(self, user: str) -> None:
        """Ask the source at once for a user whose first subscriber has come.

        Not where it answered a moment ago: coming and going must not make it work harder.
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
        elif user in self._busy:  # that answer may have gone by while the user was not watched
            self._again.add(user)
        else:
            self._new[user] = None
        self._wake.set()

    def unwatch(self, user: str) -> None:
        """Ask no more for a user whose last subscriber has gone."""
        if self._watched.pop(user, None) is not None:
            self._left[user] = trio.current_time()
        self._new.pop(user, None)
        self._settled.discard(user)

    def changed(self, users: Iterable[str]) -> None:
        """Ask at once for users for whom the source says that it has something new."""
        for user in users:
            if user in self._busy:
                self._again.add(user)
            elif user in self._watched:
                self._new[user] = None
            else:
                self._answered_at.pop(user, None)  # so that `watch` asks the source
        self._wake.set()

    def missed(self) -> None:
        """Ask for everybody: the source may have something new for any user."""
        self.changed([*self._watched, *self._left])

    def forget(self, user: str) -> None:
        """Count the source's next answer as a change: the user's value is no longer kept."""
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

    # --- when --------------------------------------------------------------------------------

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
                with trio.move_on_at(min(self._next_due(), self._next_prune())):
                    await self._wake.wait()
                self._wake = trio.Event()
                self._prune()
                users = dict.fromkeys((*self._new, *self._due()))
                self._new.clear()
                self._find_stale(users)
                self._enqueue(nursery, [user for user in users if user not in self._busy])

    def _bucket(self, at: float) -> int:
        return math.floor(at / self._bucket_s)

    def _next_due(self) -> float:
        """Return when the first bucket of watched users is due; infinity where there is none."""
        for at in self._watched.values():
            return self._bucket(at) * self._bucket_s
        return math.inf

    def _due(self) -> list[str]:
        """Return who is due by now, and note when they are due next.

        A time that has passed is not made up for.
        """
        now = trio.current_time()
        if self._next_due() > now:
            return []
        first = next(iter(self._watched.values()))
        bucket = max(self._bucket(first), self._bucket(now))
        due = list(
            itertools.takewhile(
                lambda user: self._bucket(self._watched[user]) <= bucket, self._watched
            )
        )
        for user in due:
            self._watched[user] = max(self._watched.pop(user) + self.interval_s, now)
        return due

    def _find_stale(self, due: Iterable[str]) -> None:
        """Mark the values that are too old of users who are due and still wait for an answer."""
        too_old = trio.current_time() - self._stale_after_s
        for user in self._busy.intersection(due) - self._stale - self._failures.keys():
            topic = self._topic(user)
            if self._answered_at.get(user, math.inf) <= too_old and self._broker.snapshot(topic):
                self._stale.add(user)
                self._broker.mark([topic], Status("stale", "source_timeout"))
                logs.emit(logs.line("data_stale", user=user, data_type=self.data_type))

    def _next_prune(self) -> float:
        return next(iter(self._left.values()), math.inf) + REPEAT_S

    def _prune(self) -> None:
        """Forget what is known of users who have been gone for long."""
        now = trio.current_time()
        for user in list(
            itertools.takewhile(lambda user: self._left[user] + REPEAT_S <= now, self._left)
        ):
            del self._left[user]
            self._failures.pop(user, None)
            self._answered_at.pop(user, None)
            self._stale.discard(user)

    # --- asking ------------------------------------------------------------------------------

    def _enqueue(self, nursery: trio.Nursery, users: Sequence[str]) -> None:
        self._busy.update(users)
        self._queue.update(dict.fromkeys(users))
        while self._rounds_waiting * self._fetcher.batch < len(self._queue):
            self._rounds_waiting += 1
            nursery.start_soon(self._round)

    async def _round(self) -> None:
        # Whom to ask for is decided when there is a free slot: in a rush of new users, those who
        # have come meanwhile go along.
        slot = await self._fetcher.wait_for_slot()
        self._rounds_waiting -= 1
        users = list(itertools.islice(self._queue, self._fetcher.batch))
        for user in users:
            del self._queue[user]
        await self._ask(users, slot)

    async def _ask(self, users: Sequence[str], slot: object) -> None:
        try:
            answers = await self._fetcher.fetch(users, slot, lambda: self._freed(users))
            await self._batcher.submit(self, users, answers)
        except StillRunning as error:
            # Its thread cannot be stopped: these users stay busy until it has ended.
            self._failed(users, error)
            self._settle(users)
            return
        except Exception as error:  # a source may raise anything: it is logged, and asked again
            if len(users) > 1 and isinstance(error, SourceError) and not error.retryable:
                # One of them has what the source cannot give: halves find whom, and serve the rest.
                middle = len(users) // 2
                await self._ask(users[:middle], await self._fetcher.wait_for_slot())
                await self._ask(users[middle:], await self._fetcher.wait_for_slot())
                return
            self._failed(users, error)
        self._freed(users)
        self._settle(users)

    # --- answers -----------------------------------------------------------------------------

    def detect_change(
        self, user: str, answer: Any | None, now: float
    ) -> tuple[Topic, bytes] | Topic | None:
        """Compare an answer with what was published before; see `ChangeDetector`."""
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
            # What the application published stands until the source itself says something new.
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
        """Mark the users' topics, and log it; of one that goes on failing, once a minute."""
        now = trio.current_time()
        late = isinstance(error, trio.TooSlowError | StillRunning)
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
