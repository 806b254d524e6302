"""The broker of one process, which keeps its topics in memory."""

from __future__ import annotations

import secrets
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

from trading_push.broker.base import (
    Message,
    Publication,
    Render,
    State,
    Status,
    StatusChange,
    as_list,
)
from trading_push.broker.keyed import Table
from trading_push.errors import ServiceClosed
from trading_push.models import now_ms
from trading_push.topics import Channels, Kind, Topic, family_of

__all__ = ["MemoryBroker"]

_NO_DATA = Status("down", "no_data")
_LIVE = Status("live")
_QUIET = Status("live", "quiet")


class _TopicState:
    """What is known of one topic."""

    __slots__ = (
        "epoch",
        "family",
        "history",
        "kind",
        "last",
        "seq",
        "status",
        "table",
        "turned_at",
    )

    def __init__(self, kind: Kind, history: int, family: str) -> None:
        self.kind = kind
        self.family = family  # what it is counted as
        self.epoch = secrets.token_hex(8)
        self.seq = 0  # of the last publication
        self.last: Publication | None = None
        self.status = _initial(kind)
        self.turned_at = 0  # the `seq` of the last value before the status changed
        self.table: Table | None = None  # of kind `keyed`, once there are rows
        self.history: deque[Publication] | None = deque(maxlen=history) if history else None


def _initial(kind: Kind) -> Status:
    """Return the status of a topic to which nothing was published yet."""
    return _QUIET if kind == "events" else _NO_DATA


class MemoryBroker:
    """A `Broker` that keeps everything in memory.

    Args:
        channels: They say a topic's kind.
        deliver: Called with each batch, in order; synchronous.
        history: How many publications of a topic of kind `events` are kept for clients that resume.
    """

    def __init__(
        self,
        channels: Channels,
        deliver: Callable[[Sequence[Message]], None],
        *,
        history: int = 1000,
    ) -> None:
        self._channels = channels
        self._deliver = deliver
        self._history = history
        # A Counter would cost three times as much.
        self.published: defaultdict[str, int] = defaultdict(int)
        """How often was published, by channel; all symbols are `ticker`."""
        self._topics: dict[Topic, _TopicState] = {}
        # How many topics are in each state, by channel; without zeros.
        self._states: dict[str, dict[State, int]] = {}

    def _state(self, topic: Topic) -> _TopicState:
        state = self._topics.get(topic)
        if state is None:
            kind = self._channels.kind_of(topic)
            family = family_of(topic.channel)
            self._count(family, _initial(kind).state, 1)
            kept = self._history if kind == "events" else 0
            state = self._topics[topic] = _TopicState(kind, kept, family)
        return state

    def publish(self, values: Sequence[tuple[Topic, bytes]]) -> None:
        """Publish one batch of encoded values; their topics are live from then on."""
        now = now_ms()
        batch: list[Message] = []
        topics = self._topics
        for topic, data in values:
            state = topics.get(topic) or self._state(topic)
            if state.status is not _LIVE:
                self._revive(topic, state, now, batch)
            state.seq += 1
            self.published[state.family] += 1
            last = Publication(topic, state.kind, state.epoch, state.seq, now, data)
            state.last = last
            if state.history is not None:
                state.history.append(last)
            batch.append(last)
        if batch:
            self._deliver(batch)

    def publish_rows(
        self, topic: Topic, rows: Mapping[str, bytes], render: Render = as_list
    ) -> None:
        """Publish the rows of a topic of kind `keyed` that have changed; it is live from then on.

        Args:
            topic: Which.
            rows: As JSON, by key.
            render: Makes the JSON of some rows, the same function at each call.
        """
        now = now_ms()
        batch: list[Message] = []
        state = self._state(topic)
        if state.status is not _LIVE:
            self._revive(topic, state, now, batch)
        state.seq += 1
        self.published[state.family] += 1
        if state.table is None:
            state.table = Table(topic, state.epoch, render)
        state.last = state.table.put(state.seq, now, rows)
        self._deliver([*batch, state.last])

    def drop_rows(self, topic: Topic, keys: Iterable[str]) -> None:
        """Forget rows of a topic of kind `keyed`: newcomers are not sent them any more."""
        state = self._topics.get(topic)
        if state is not None and state.table is not None:
            state.table.drop(keys)

    def _revive(self, topic: Topic, state: _TopicState, now: int, batch: list[Message]) -> None:
        if state.status.state != "live":
            batch.append(StatusChange(topic, _LIVE, now))
        self._turn(topic, state, _LIVE)

    def mark(self, topics: Sequence[Topic], status: Status) -> None:
        """Set the status of some topics; only changes are delivered."""
        now = now_ms()
        changes: list[Message] = []
        for topic in topics:
            state = self._state(topic)
            new = status
            if status.state == "live":
                quiet = state.last is None and state.kind == "events"
                new = _QUIET if quiet else _LIVE
            changed = new.differs(state.status)
            self._turn(topic, state, new)
            if changed:
                changes.append(StatusChange(topic, new, now))
        if changes:
            # A closed registry works through its inbox. Members that leave then end topics, too,
            # and there is no one left to tell.
            with suppress(ServiceClosed):
                self._deliver(changes)

    def snapshot(self, topic: Topic) -> Publication | None:
        """Return the last value of a topic; None where there is none."""
        state = self._topics.get(topic)
        return None if state is None else state.last

    def status(self, topic: Topic) -> Status:
        """Return the status of a topic; before anything was published, that of its kind."""
        state = self._topics.get(topic)
        return _initial(self._channels.kind_of(topic)) if state is None else state.status

    def tickers(self) -> Sequence[tuple[Publication, Status]]:
        """Return the last value and the status of every symbol that has a value."""
        return [
            (state.last, state.status)
            for state in self._topics.values()
            if state.family == "ticker" and state.last is not None
        ]

    def states(self) -> dict[str, dict[State, int]]:
        """Count the topics that had a value or a status, by channel and state."""
        return {channel: {**counts} for channel, counts in self._states.items()}

    def _turn(self, topic: Topic, state: _TopicState, status: Status) -> None:
        if state.status.state != status.state:
            self._count(state.family, state.status.state, -1)
            self._count(state.family, status.state, 1)
            state.turned_at = state.seq
        state.status = status

    def _count(self, family: str, state: State, change: int) -> None:
        counts = self._states.setdefault(family, {})
        counts[state] = counts.get(state, 0) + change
        if not counts[state]:
            del counts[state]
            if not counts:
                del self._states[family]

    def since(self, topic: Topic, epoch: str, seq: int) -> Sequence[Publication] | None:
        """Return what was published after `seq`, oldest first; None if that is no longer known."""
        state = self._topics.get(topic)
        if state is None or state.epoch != epoch or state.last is None or seq > state.seq:
            return None
        if seq == state.seq:
            return ()
        if state.history is None:
            return (state.last,)
        if state.history[0].seq > seq + 1:
            return None
        return [publication for publication in state.history if publication.seq > seq]

    def turned_at(self, topic: Topic) -> int:
        """Return the `seq` of the last value before the last change of status."""
        state = self._topics.get(topic)
        return 0 if state is None else state.turned_at

    def forget(self, topic: Topic) -> None:
        """Drop all that is known of a topic; if it comes back, it has a new epoch."""
        state = self._topics.pop(topic, None)
        if state is not None:
            self._count(state.family, state.status.state, -1)
