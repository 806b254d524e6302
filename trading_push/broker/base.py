"""What a broker is: the owner of each topic's epoch, sequence, last value and history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import attrs

from trading_push.topics import Kind, Topic

__all__ = ["Broker", "Publication", "State", "Status"]

State = Literal["live", "stale", "down"]


@attrs.define(eq=False)  # never changed; frozen, one would cost three times as much to make
class Publication:
    """One value of one topic, encoded once for all its subscribers.

    `seq` counts the publications of the topic within `epoch`, from 1; `ts` is its time in ms since
    the epoch; `data` is JSON.
    """

    topic: Topic
    kind: Kind
    epoch: str
    seq: int
    ts: int
    data: bytes


class Status(NamedTuple):
    """Whether a topic's value can be relied on; `reason` is a word for programs, None if live."""

    state: State
    reason: str | None = None


@attrs.frozen(eq=False)
class StatusChange:
    """A topic's status has changed, at `ts` in ms since the epoch."""

    topic: Topic
    status: Status
    ts: int


Message = Publication | StatusChange


class Broker(Protocol):
    """Takes what is published, numbers it, keeps the last value, and hands it on.

    All methods are synchronous and never block; what is handed on goes to the `deliver` that the
    broker was made with, in the order of the calls.
    """

    def publish(self, values: Sequence[tuple[Topic, bytes]]) -> None:
        """Publish one batch of encoded values; a topic that was not live is live then."""
        ...

    def mark(self, topics: Sequence[Topic], status: Status) -> None:
        """Set the status of some topics; only changes are handed on.

        Raises nothing where the service runs no more, unlike `publish` (ServiceClosed): whoever
        ends a topic then has nobody to tell.
        """
        ...

    def snapshot(self, topic: Topic) -> Publication | None:
        """The last value of a topic; None where there is none."""
        ...

    def status(self, topic: Topic) -> Status:
        """The status of a topic; `down`, `no_data` where nothing was ever published."""
        ...

    def states(self) -> dict[str, dict[State, int]]:
        """How many topics that had a value or a status are in each state, by channel.

        All symbols are counted as `ticker`.
        """
        ...

    def since(self, topic: Topic, epoch: str, seq: int) -> Sequence[Publication] | None:
        """What was published after `seq`, oldest first; None where that is no longer known.

        For a topic of kind `state` the last value stands for all that it replaced.
        """
        ...

    def turned_at(self, topic: Topic) -> int:
        """The `seq` of the last value before the status changed for the last time; 0 for none.

        Whoever has got a later one was told the status of now.
        """
        ...

    def forget(self, topic: Topic) -> None:
        """Drop all that is known of a topic that nobody watches any more."""
        ...
