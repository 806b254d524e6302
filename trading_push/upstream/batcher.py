"""Publish together the answers that come at about the same time.

The data types of one user are due at the same times, so that their answers come within moments of
each other. Published together, they reach each connection in one write.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import attrs
import trio

from trading_push.broker.base import Broker, Status
from trading_push.topics import Topic

__all__ = ["Batcher", "ChangeDetector"]

_SLICE_S: Final = 0.0002
"""For how long the event loop is held before other tasks have their turn."""
_MANY: Final = 16
"""An answer for fewer users is not worth waiting for others."""
_GATHER_S: Final = 0.02


class ChangeDetector(Protocol):
    """Knows what was published before; the poller that asked."""

    def detect_change(
        self, user: str, answer: Any | None, now: float
    ) -> tuple[Topic, bytes] | list[tuple[Topic, bytes]] | Topic | None:
        """Compare an answer, which has come now, with what was published before.

        Args:
            user: Whose answer it is.
            answer: What the source gave; None where it has nothing to say.
            now: The time on trio's clock.

        Returns:
            A topic and its new value, or each of its new events; the topic alone where it
            is unchanged; None where there is nothing to tell.
        """
        ...


@attrs.define(eq=False)
class _Submission:
    """The answers of one call, until they have been published."""

    detector: ChangeDetector
    users: Sequence[str]
    answers: Mapping[str, Any | None]
    published: bool = False
    error: Exception | None = None
    """What the answers themselves made `detect_change` raise."""


class Batcher:
    """Publishes answers in slices, so that the event loop is never held for all of them at once.

    Args:
        broker: Where changes are published.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        # Held by the one who publishes everything that waits.
        self._turn = trio.Lock()
        self._waiting: list[_Submission] = []

    async def submit(
        self, detector: ChangeDetector, users: Sequence[str], answers: Mapping[str, Any | None]
    ) -> None:
        """Publish what has changed for some users, together with the answers that wait as well.

        Cancelled before its turn, nothing of it has been published; else all of it.

        Raises:
            Exception: The answers themselves cannot be used; others' are published all the same.
        """
        mine = _Submission(detector, users, answers)
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

    async def _publish(self, waiting: Sequence[_Submission]) -> None:
        # User by user, so that all of a user's topics are in the same slice.
        by_user: dict[str, list[_Submission]] = {}
        for each in waiting:
            each.published = True
            for user in each.users:
                by_user.setdefault(user, []).append(each)
        changed: list[tuple[Topic, bytes]] = []
        unchanged: list[Topic] = []
        until = time.perf_counter() + _SLICE_S
        now = trio.current_time()
        for user, submissions in by_user.items():
            for each in submissions:
                if each.error is not None:
                    continue
                try:  # a source may have given anything, which must not trouble the others
                    found = each.detector.detect_change(user, each.answers.get(user), now)
                except Exception as error:
                    each.error = error
                    continue
                if isinstance(found, Topic):
                    unchanged.append(found)
                elif isinstance(found, list):
                    changed += found
                elif found is not None:
                    changed.append(found)
            if time.perf_counter() > until:
                # The slice is over: publish it, and let other tasks run.
                self._hand_on(changed, unchanged)
                changed, unchanged = [], []
                await trio.lowlevel.checkpoint()
                now = trio.current_time()
                until = time.perf_counter() + _SLICE_S
        self._hand_on(changed, unchanged)

    def _hand_on(self, changed: Sequence[tuple[Topic, bytes]], unchanged: Sequence[Topic]) -> None:
        self._broker.publish(changed)
        self._broker.mark(unchanged, Status("live"))
