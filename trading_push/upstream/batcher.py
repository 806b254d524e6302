"""What the pollers were answered, published: what comes at about the same time goes together.

A user's types are due at the same times, so that their answers come within moments of each other.
Published together, they reach each connection in one write.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import attrs
import trio

from trading_push.broker.base import Broker, Status
from trading_push.topics import Topic

__all__ = ["Answers", "Taker"]

_SLICE_S: Final = 0.0002
_MANY: Final = 16
"""An answer for fewer users is not worth waiting for others."""
_GATHER_S: Final = 0.02


class Taker(Protocol):
    """Who has asked."""

    def take(self, user: str, answer: Any | None, now: float) -> tuple[Topic, bytes] | Topic | None:
        """What becomes of an answer that has come now, by trio's clock.

        Returns:
            A topic and its new value; the topic alone where it is unchanged; None where there is
            nothing to tell.
        """
        ...


@attrs.define(eq=False)
class _Answer:
    taker: Taker
    users: Sequence[str]
    answers: Mapping[str, Any | None]
    published: bool = False
    error: Exception | None = None


class Answers:
    """Publishes answers in slices, so that the event loop is never held for all of them at once.

    Args:
        broker: Where changes are published.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._turn = trio.Lock()
        self._waiting: list[_Answer] = []

    async def publish(
        self, taker: Taker, users: Sequence[str], answers: Mapping[str, Any | None]
    ) -> None:
        """Publish what has changed for some users, together with others' answers.

        Cancelled before its turn, nothing of it has been published, else all.

        Raises:
            Exception: The answer itself is of no use; the others' are published all the same.
        """
        mine = _Answer(taker, users, answers)
        self._waiting.append(mine)
        try:
            if len(users) >= _MANY:
                await trio.sleep(_GATHER_S)
            async with self._turn:
                if not mine.published:  # by whoever had the turn before
                    waiting, self._waiting = self._waiting, []
                    with trio.CancelScope(shield=True):
                        await self._publish(waiting)
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)
        if mine.error is not None:
            raise mine.error

    async def _publish(self, waiting: Sequence[_Answer]) -> None:
        by_user: dict[str, list[_Answer]] = {}
        for each in waiting:
            each.published = True
            for user in each.users:
                by_user.setdefault(user, []).append(each)
        changed: list[tuple[Topic, bytes]] = []
        unchanged: list[Topic] = []
        until = time.perf_counter() + _SLICE_S
        now = trio.current_time()
        for user, given in by_user.items():
            for each in given:
                if each.error is not None:
                    continue
                try:  # whatever a source has given: it is nobody else's trouble
                    taken = each.taker.take(user, each.answers.get(user), now)
                except Exception as error:
                    each.error = error
                    continue
                if isinstance(taken, Topic):
                    unchanged.append(taken)
                elif taken is not None:
                    changed.append(taken)
            if time.perf_counter() > until:
                self._hand_on(changed, unchanged)
                changed, unchanged = [], []
                await trio.lowlevel.checkpoint()
                now = trio.current_time()
                until = time.perf_counter() + _SLICE_S
        self._hand_on(changed, unchanged)

    def _hand_on(self, changed: Sequence[tuple[Topic, bytes]], unchanged: Sequence[Topic]) -> None:
        self._broker.publish(changed)
        self._broker.mark(unchanged, Status("live"))
