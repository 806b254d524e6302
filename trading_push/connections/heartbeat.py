"""The heartbeat: one task looks after every connection, each when it is its time.

It pings the peers that are silent, ends those that stay so, and tells of tokens that are to expire.
"""

from __future__ import annotations

import heapq
import math
from typing import Final, Protocol

import trio

__all__ = ["Timetable", "Watched"]

_STEP_S: Final = 0.05
"""At most; a quarter of a heartbeat that is shorter. The pongs of a step come all at once."""
_CHUNK: Final = 64
"""How many connections there are between two checkpoints."""


class Watched(Protocol):
    """A connection, as the heartbeat sees it."""

    look_at: float
    """The step of the timetable that it stands in; infinite where it stands in none."""

    def look_after(self, now: float) -> float:
        """Do what is due; synchronous. Returns when to come again, infinite for never."""
        ...


class Timetable:
    """When each connection is to be looked after, in small steps.

    Looking at all of them in every step would cost more than all their pings. What it holds, and
    what a step costs, grows with the connections that are there, not with those that have been.

    Args:
        heartbeat_s: Nothing heard for so long: a ping (RFC 6455 section 5.5.2), to which every
            client library answers by itself. Nothing for twice that: close 4002, or the end of the
            stream where the close frame does not go out either.
    """

    def __init__(self, heartbeat_s: float) -> None:
        self._step_s = min(_STEP_S, heartbeat_s / 4)
        self._steps: dict[float, set[Watched]] = {}  # none of them empty
        self._order: list[float] = []  # a heap of the steps; of some that are no more, too

    def enter(self, watched: Watched, at: float) -> None:
        """Look after a connection at this time of trio's clock, unless it is to be sooner."""
        step = math.ceil(at / self._step_s) if at < math.inf else at
        if step >= watched.look_at:
            return
        self.remove(watched)
        watched.look_at = step
        standing = self._steps.get(step)
        if standing is None:
            standing = self._steps[step] = set()
            heapq.heappush(self._order, step)
        standing.add(watched)

    def remove(self, watched: Watched) -> None:
        """Look after a connection no more."""
        standing = self._steps.get(watched.look_at)
        if standing is not None:
            standing.discard(watched)
            if not standing:
                del self._steps[watched.look_at]
                if len(self._order) > _CHUNK + 2 * len(self._steps):
                    self._order = sorted(self._steps)
        watched.look_at = math.inf

    async def run(self) -> None:
        """Look after each connection when it is its time, until cancelled."""
        while True:
            await trio.sleep(self._step_s)
            now = trio.current_time()
            while self._order and self._order[0] * self._step_s <= now:
                step = heapq.heappop(self._order)
                for number, watched in enumerate(self._steps.pop(step, ())):
                    if watched.look_at == step:  # it has neither left nor been entered anew
                        watched.look_at = math.inf
                        again = watched.look_after(now)
                        self.enter(watched, max(again, now + self._step_s))
                    if number % _CHUNK == _CHUNK - 1:
                        await trio.lowlevel.checkpoint()
