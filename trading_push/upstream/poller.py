"""Poll a source for one data type: decide who is asked for and when, and detect what changed.

1. Only users who are subscribed are asked for. A user's first subscription asks at once; from then
   on each user has a time of their own. Users whose times are close are asked for together, and the
   work is spread over the whole interval. A user who is being asked for already is left out, so
   that a slow answer delays only its own users.
2. What happens where the source fails stands in `failures`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, Final

import trio
from msgspec import Raw

from trading_push import logs
from trading_push.broker.base import Broker, State, Status
from trading_push.errors import SourceError
from trading_push.protocol.payloads import encode_data
from trading_push.settings.schema import Polling
from trading_push.sources.base import NO_VALUE, NewEvents, Source
from trading_push.topics import Topic
from trading_push.upstream.batcher import Batcher
from trading_push.upstream.failure_log import FailureLog
from trading_push.upstream.failures import Failures, Outage, by_cause, reason_of, told_pause_s
from trading_push.upstream.fetching import FetchContext, Fetcher, StillRunning
from trading_push.upstream.schedule import Schedule
from trading_push.upstream.search import find_failing

__all__ = ["Poller"]

_FRESH_S: Final = 1.0
"""A user who was answered for so lately is not asked for when a first subscriber comes back."""
_SLICE: Final = 50
"""So many users are marked before other tasks have their turn."""


class Poller:
    """Polls a source for one data type; a `ChangeDetector` of its answers.

    It is longer than 300 lines because a user moves between its sets at every step: who asks, what
    is answered and whom it fails for cannot be told apart without them.

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
        # A value is stale when the source has not answered for so long.
        self._stale_after_s = max(polling.stale_after_s, 2 * interval_s)
        self._broker = broker
        self._tell_settled = settled
        self._batcher = batcher or Batcher(broker)
        self.fetcher = Fetcher(
            source,
            data_type,
            context=context,
            slots=polling.fetches,
            batch=polling.fetch_batch,
            timeout_s=polling.fetch_timeout_s,
        )
        self._schedule = Schedule(interval_s, polling.change_gap_s)
        self._failures = Failures(interval_s)
        self._log = FailureLog(data_type)
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
        # Held by who finds out whether the source answers at all, so that it is asked once.
        self._searching = trio.Lock()
        # How many calls have succeeded; and two users whom the last one answered for.
        self._successes = 0
        self._good: Sequence[str] = ()
        # Whose own call goes on in a thread after its deadline; they stay busy until it ends.
        self._hung: set[str] = set()
        # What the answers of the calls that are being published have shown, until it is logged.
        self._new_failures: list[tuple[str, Exception]] = []
        self._new_recoveries: list[str] = []
        # Whose value was marked stale because no answer comes.
        self._stale: set[str] = set()
        # When the source last answered, on trio's clock; until the schedule forgets the user.
        self._answered_at: dict[str, float] = {}
        # Set when there may be something to do before the next user is due.
        self._wake = trio.Event()

    @property
    def failing(self) -> int:
        """For how many watched users the source fails."""
        return sum(user in self._schedule for user in self._failures)

    def silent_s(self) -> float:
        """How long the source has not answered for those who are watched; 0 if nobody is."""
        asked_since = max(self.fetcher.answered_at, self._schedule.busy_since)
        return max(0.0, trio.current_time() - asked_since)

    def answers(self) -> bool:
        """Whether the source answers for anybody, as far as is known."""
        return self._failures.outage is None

    def awaits(self, user: str) -> bool:
        """Whether the source has yet to answer for a user since they are watched."""
        return user not in self._settled

    def watch(self, user: str) -> None:
        """Ask the source at once for a user whose first subscriber has come.

        Not where it answered a moment ago: coming and going must not make it work harder.
        """
        now = trio.current_time()
        self._schedule.watch(user)
        fresh_s = min(self.interval_s, _FRESH_S)
        is_known = user not in self._failures and user not in self._stale
        if is_known and now - self._answered_at.get(user, -math.inf) < fresh_s:
            if self._broker.snapshot(topic := self._topic(user)) is not None:
                self._broker.mark([topic], Status("live"))
            self._settle([user])
        elif not self._failures.may_be_asked(user):  # its status says why
            self._settle([user])
        elif user in self._busy:  # that answer may have gone by while the user was not watched
            self._again.add(user)
        else:
            self._schedule.ask_at_once([user])
        self._wake.set()

    def unwatch(self, user: str) -> None:
        """Ask no more for a user whose last subscriber has gone."""
        self._schedule.unwatch(user)
        self._settled.discard(user)

    def changed(self, users: Iterable[str]) -> None:
        """Ask for users for whom the source says that it has something new."""
        for user in users:
            if user in self._busy:
                self._again.add(user)
            elif user in self._schedule:
                self._schedule.changed(user)
            else:
                self._answered_at.pop(user, None)  # so that `watch` asks the source
        self._wake.set()

    def missed(self) -> None:
        """Ask for everybody: the source may have something new for any user."""
        self.changed(self._schedule.known())

    def forget(self, user: str) -> None:
        """Count the source's next answer as a change: the user's value is no longer kept."""
        self._given.pop(user, None)

    def _freed(self, users: Iterable[str]) -> None:
        freed = [user for user in users if user not in self._hung]
        self._busy.difference_update(freed)
        if self._again and (again := self._again.intersection(freed)):
            self._again -= again
            self.changed(again)

    def _settle(self, users: Iterable[str]) -> None:
        settled = [user for user in users if user not in self._settled and user in self._schedule]
        self._settled.update(settled)
        if settled:
            self._tell_settled([self._topic(user) for user in settled])

    async def run(self) -> None:
        """Poll until cancelled; may be run again. Only calls in worker threads go on after it."""
        self._queue.clear()
        self._busy = {*self._hung}
        self._again.clear()
        self._rounds_waiting = 0
        if self._failures.outage is not None:
            self._failures.outage.trying = False
        self._schedule.ask_at_once(self._schedule)
        self._wake.set()
        async with trio.open_nursery() as nursery:
            while True:
                at = min(self._schedule.next_turn(), self._failures.next_try())
                with trio.move_on_at(min(at, self._log.next_flush())):
                    await self._wake.wait()
                self._wake = trio.Event()
                self._forget()
                self._log.flush()
                due, asked = self._schedule.take_due(), self._schedule.take_asked()
                self._find_stale(itertools.chain(asked, due) if self._busy else ())
                if self._failures:
                    asked = {user: None for user in asked if self._failures.may_be_asked(user)}
                    due = [user for user in due if self._failures.may_be_due(user)]
                    due += self._failures.take_alone(self._schedule)
                asked.update(dict.fromkeys(due))
                users: Sequence[str] = [user for user in asked if user not in self._busy]
                if self._failures.outage is not None:
                    users = self._during_outage(nursery, self._failures.outage, users)
                self._enqueue(nursery, users)

    def _during_outage(
        self, nursery: trio.Nursery, outage: Outage, users: Sequence[str]
    ) -> Sequence[str]:
        """Return whom to ask for while the source answers for nobody: at most one call's."""
        # Who has come since then is told so.
        if new := [user for user in users if user not in self._failures]:
            nursery.start_soon(self._tell_of_outage, outage, new)
        if outage.trying or trio.current_time() < outage.until:
            return []
        free = [user for user in self._schedule if user not in self._busy]
        free.sort(key=self._failures.is_alone)
        if free:
            outage.trying = True
        else:  # all calls that are under way hang
            outage.goes_on()
        return free[: self.fetcher.batch]

    async def _tell_of_outage(self, outage: Outage, users: Sequence[str]) -> None:
        await self._failed(users, outage.error)
        self._settle(users)

    def _find_stale(self, due: Iterable[str]) -> None:
        """Mark the values that are too old of users who are due and still wait for an answer."""
        too_old = trio.current_time() - self._stale_after_s
        for user in self._busy.intersection(due).difference(self._stale, self._failures):
            topic = self._topic(user)
            if self._answered_at.get(user, math.inf) <= too_old and self._broker.snapshot(topic):
                self._stale.add(user)
                self._broker.mark([topic], Status("stale", "source_timeout"))
                logs.emit(logs.line("data_stale", user=user, data_type=self.data_type))

    def _forget(self) -> None:
        """Forget what is known of users who have been gone for long."""
        for user in self._schedule.take_forgotten():
            self._failures.discard(user)
            self._answered_at.pop(user, None)
            self._stale.discard(user)

    def _enqueue(self, nursery: trio.Nursery, users: Sequence[str]) -> None:
        self._busy.update(users)
        if self._failures:
            alone = {user for user in users if self._failures.is_alone(user)}
            for user in alone:
                nursery.start_soon(self._serve, (user,))
            users = [user for user in users if user not in alone]
        self._queue.update(dict.fromkeys(users))
        while self._rounds_waiting * self.fetcher.batch < len(self._queue):
            self._rounds_waiting += 1
            nursery.start_soon(self._round)

    async def _round(self) -> None:
        # Whom to ask for is decided when there is a free slot: in a rush of new users, those who
        # have come meanwhile go along.
        slot = await self.fetcher.wait_for_slot()
        self._rounds_waiting -= 1
        users = list(itertools.islice(self._queue, self.fetcher.batch))
        for user in users:
            del self._queue[user]
        outage = self._failures.outage
        if outage is not None and not outage.trying:  # it began while they were waiting
            self.fetcher.give_back(slot)
            await self._tell_of_outage(outage, users)
            self._freed(users)
        else:
            await self._serve(users, slot)

    async def _serve(self, users: Sequence[str], slot: object | None = None) -> None:
        """Ask for users, and find out whom that fails for."""
        began, outage = trio.current_time(), self._failures.outage
        error = await self._ask(users, slot)
        if error is not None:
            await self._explain(users, error, trio.current_time() - began)
        if outage is not None and outage is self._failures.outage:
            outage.goes_on()  # it was this call that has tried whether the source answers again
            self._wake.set()
        self._freed(users)
        self._settle(users)

    async def _ask(self, users: Sequence[str], slot: object | None = None) -> Exception | None:
        """Ask for users once, publish the answers, and return the error of a call that failed."""
        over = False

        def ended() -> None:
            nonlocal over
            over = True
            self._hung.difference_update(users)
            self._freed(users)

        if slot is None:
            slot = await self.fetcher.wait_for_slot()
        try:
            # Several users of a call that hangs are asked for in other ways; one is not.
            is_one = len(users) == 1
            answers = await self.fetcher.fetch(users, slot, ended if is_one else lambda: None)
            await self._batcher.submit(self, users, answers)
        except Exception as error:  # a source may raise anything: it is logged, and asked again
            if isinstance(error, StillRunning):
                self._log.hung(self.fetcher.hung, self.fetcher.most_hung)
                if is_one and not over:
                    self._hung.update(users)
            return error
        await self._succeeded(users)
        return None

    async def _succeeded(self, users: Sequence[str]) -> None:
        """Note that the source has answered, and log what the answers have shown."""
        self._successes += 1
        failures, self._new_failures = self._new_failures, []
        recovered, self._new_recoveries = self._new_recoveries, []
        if failures:
            failed = {user for user, _ in failures}
            self._good = [user for user in users if user not in failed][:2] or self._good
            for error, failing in by_cause(failures):
                await self._failed(failing, error)
        else:
            self._good = users[:2]
        if recovered:
            self._log.recovered(recovered)
        if self._failures.answered(anybody=len(failures) < len(users)):
            self._schedule.ask_at_once(self._schedule)
            self._wake.set()

    async def _explain(self, users: Sequence[str], error: Exception, took_s: float) -> None:
        """Find out whom a call that failed was failing for, and mark them."""
        if isinstance(error, SourceError) and error.everyone:
            self._begin_outage(error)
        elif len(users) > 1 and not told_pause_s(error):
            successes = self._successes
            with ExitStack() as turn:
                # In turn, until it is known whether the source answers at all.
                await self._searching.acquire()
                turn.callback(self._searching.release)
                outage, failing = self._failures.outage, None
                if outage is None or outage.trying:
                    good = [user for user in self._good if user not in (*users, *self._busy)]
                    failing = await find_failing(
                        self._ask,
                        users,
                        took_s,
                        good=good if self._successes == successes else None,
                        known=turn.close,
                    )
                if failing is None and self._failures.outage is None:
                    self._begin_outage(error)
            if failing is not None:
                await self._failed_alone(users, failing)
                return
        await self._failed(users, error)

    def _begin_outage(self, error: Exception) -> None:
        self._failures.begin_outage(error)
        self._wake.set()

    async def _failed_alone(self, users: Sequence[str], failing: dict[str, Exception]) -> None:
        """Mark whom a call was failing for; if that is most of them, it is no matter of theirs."""
        for error, found in by_cause(failing.items()):
            await self._failed(found, error, alone=2 * len(failing) <= len(users))

    def detect_change(
        self, user: str, answer: Any | None, now: float
    ) -> tuple[Topic, bytes] | list[tuple[Topic, bytes]] | Topic | None:
        """Compare an answer with what was published before; see `ChangeDetector`."""
        if user not in self._schedule:
            return None
        topic = self._topic(user)
        events: NewEvents | None = None
        try:
            if type(answer) is Raw:  # by far the most
                data: bytes | None = bytes(answer)
            elif isinstance(answer, Exception):
                raise answer
            elif isinstance(answer, NewEvents):
                # All events are encoded before they are taken: an error loses none of them.
                events, data = answer, None
                new = [(topic, encode_data(each)) for each in events.events]
            else:
                data = None if answer is None or answer is NO_VALUE else encode_data(answer)
        except Exception as error:
            self._new_failures.append((user, error))
            return None
        self._answered_at[user] = now
        if self._failures or self._stale:
            stale = user in self._stale
            self._stale.discard(user)
            if self._failures.discard(user) or stale:
                self._new_recoveries.append(user)
        if events is not None:
            return new if events.taken() and new else topic
        last = self._broker.snapshot(topic)
        given = self._given.get(user)
        if answer is NO_VALUE:
            if given is None:
                return None if last is None else topic  # what the application has published
            # Who comes now begins without a value; the next one has another epoch.
            del self._given[user]
            self._broker.mark([topic], Status("down", "no_data"))
            self._broker.forget(topic)
            return None
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

    async def _failed(self, users: Sequence[str], error: Exception, alone: bool = False) -> None:
        """Mark the users' topics, note when they may be asked for again, and log it."""
        # Who is watched, and whether it is new of them that the source fails in this way.
        failed: dict[str, bool] = {}
        for start in range(0, len(users), _SLICE):
            if start:
                await trio.lowlevel.checkpoint()
            for user in users[start : start + _SLICE]:
                if user in self._schedule:
                    failed[user] = self._failures.add(user, error, alone=alone)
                    topic = self._topic(user)
                    state: State = "down" if self._broker.snapshot(topic) is None else "stale"
                    self._broker.mark([topic], Status(state, reason_of(error)))
        if failed:
            self._log.failed(failed, error)
