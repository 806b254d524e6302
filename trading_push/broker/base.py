"""The broker: the owner of each topic's epoch, sequence, last value, status and history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import attrs

from trading_push.topics import Kind, Topic

__all__ = ["Broker", "Publication", "Render", "State", "Status", "as_list"]

State = Literal["live", "stale", "down"]


Render = Callable[[Sequence[tuple[str, bytes]]], bytes]
"""Makes the JSON of some rows of a table, each with its key, in the order of the keys."""


def as_list(rows: Sequence[tuple[str, bytes]]) -> bytes:
    """Render rows as a list, without their keys."""
    return b"[%s]" % b",".join([row for _, row in rows])


@attrs.define(eq=False)  # never changed; frozen, one would cost three times as much to make
class Publication:
    """One value of one topic, encoded once for all its subscribers.

    Args:
        topic: Where it was published.
        kind: Whether the latest value counts (`state`), each one (`events`), or each row of a table
            (`keyed`).
        epoch: Within which `seq` counts; a topic that was forgotten comes back with another one.
        seq: The number of the publication, from 1.
        ts: When it was published, in ms since the epoch of the clock.
        data: The value, as JSON.
    """

    topic: Topic
    kind: Kind
    epoch: str
    seq: int
    ts: int
    data: bytes


class Status(NamedTuple):
    """Whether a topic's value can be relied on; `reason` is a word for programs.

    It is None if the topic is live, unless it is of kind `events` and nothing has happened yet
    (`quiet`).
    """

    state: State
    reason: str | None = None

    def differs(self, told: Status) -> bool:
        """Whether it is news to who was told `told`: another state, or that nothing will come."""
        is_final = self.reason == "refused" and told.reason != "refused"
        return self.state != told.state or is_final


@attrs.frozen(eq=False)
class StatusChange:
    """A change of a topic's status, at `ts` in ms since the epoch."""

    topic: Topic
    status: Status
    ts: int


Message = Publication | StatusChange


class Broker(Protocol):
    """Numbers what is published, keeps the last value, and delivers it.

    All methods are synchronous and never block. Publications and changes of status go to the
    `deliver` that the broker was made with, in the order of the calls.
    """

    @property
    def published(self) -> Mapping[str, int]:
        """How often was published since the start, by channel; all symbols are `ticker`."""
        ...

    def publish(self, values: Sequence[tuple[Topic, bytes]]) -> None:
        """Publish one batch of encoded values; their topics are live from then on."""
        ...

    def publish_rows(
        self, topic: Topic, rows: Mapping[str, bytes], render: Render = as_list
    ) -> None:
        """Publish the rows of a topic of kind `keyed` that have changed; it is live from then on.

        Args:
            topic: Which.
            rows: As JSON, by key.
            render: Makes the JSON of some rows, the same function at each call.
        """
        ...

    def drop_rows(self, topic: Topic, keys: Iterable[str]) -> None:
        """Forget rows of a topic of kind `keyed`: newcomers are not sent them any more."""
        ...

    def mark(self, topics: Sequence[Topic], status: Status) -> None:
        """Set the status of some topics; only changes of its state are delivered.

        Unlike `publish`, which raises ServiceClosed, it raises nothing once the service has ended:
        there is no one left to tell that a topic ended.
        """
        ...

    def snapshot(self, topic: Topic) -> Publication | None:
        """Return the last value of a topic; None where there is none."""
        ...

    def status(self, topic: Topic) -> Status:
        """Return the status of a topic; before anything was published, `down`, `no_data`.

        Of kind `events` it is `live`, `quiet` then: that nothing has happened is no failure.
        """
        ...

    def tickers(self) -> Sequence[tuple[Publication, Status]]:
        """Return the last value and the status of every symbol that has a value."""
        ...

    def states(self) -> dict[str, dict[State, int]]:
        """Count the topics that had a value or a status, by channel and state.

        The tickers of all symbols are counted as `ticker`, their candles as `candles`.
        """
        ...

    def since(self, topic: Topic, epoch: str, seq: int) -> Sequence[Publication] | None:
        """Return what was published after `seq`, oldest first; None if that is no longer known.

        For a topic of kind `state` the last value stands for all that it replaced; of kind `keyed`,
        the last publication, which knows what has changed before.
        """
        ...

    def turned_at(self, topic: Topic) -> int:
        """Return the `seq` of the last value before the last change of status; 0 for none.

        A subscriber that has got a later value knows the present status.
        """
        ...

    def forget(self, topic: Topic) -> None:
        """Drop all that is known of a topic that is not watched any more."""
        ...
