"""The heartbeat: one task looks after every connection, each when it is its time.

It pings the peers that are silent, ends those that stay so, and tells of tokens that are to expire.
"""

from __future__ import annotations

import heapq
import math
from typing import Final, Protocol

import trio

from trading_push.histogram import Histogram

__all__ = ["Heartbeat", "Monitored"]

_STEP_S: Final = 0.05
"""At most; a quarter of a heartbeat that is shorter. The pongs of a step come all at once."""
_LAG_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_CHUNK: Final = 64
"""How many connections there are between two checkpoints."""


class Monitored(Protocol):
    """A connection, as the heartbeat sees it."""

    due: float
    """The step in which it is looked after next; infinite for none."""

    def look_after(self, now: float) -> float:
        """Do what is due; synchronous. Returns when to come again, infinite for never."""
        ...


class Heartbeat:
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
        self.lag = Histogram(_LAG_S)
        """How late the event loop was at each step, in seconds."""
        self._steps: dict[float, set[Monitored]] = {}  # none of them empty
        self._order: list[float] = []  # a heap of the steps; of some that are no more, too

    def add(self, connection: Monitored, at: float) -> None:
        """Look after a connection at this time of trio's clock, unless it is to be sooner."""
        step = math.ceil(at / self._step_s) if at < math.inf else at
        if step >= connection.due:
            return
        self.remove(connection)
        connection.due = step
        standing = self._steps.get(step)
        if standing is None:
            standing = self._steps[step] = set()
            heapq.heappush(self._order, step)
        standing.add(connection)

    def remove(self, connection: Monitored) -> None:
        """Look after a connection no more."""
        standing = self._steps.get(connection.due)
        if standing is not None:
            standing.discard(connection)
            if not standing:
                del self._steps[connection.due]
                if len(self._order) > _CHUNK + 2 * len(self._steps):
                    self._order = sorted(self._steps)
        connection.due = math.inf

    async def run(self) -> None:
        """Look after each connection when it is its time, until cancelled."""
        while True:
            due = trio.current_time() + self._step_s
            await trio.sleep_until(due)
            now = trio.current_time()
            self.lag.observe(now - due)
            while self._order and self._order[0] * self._step_s <= now:
                step = heapq.heappop(self._order)
                for number, connection in enumerate(self._steps.pop(step, ())):
                    if connection.due == step:  # it has neither left nor been added anew
                        connection.due = math.inf
                        again = connection.look_after(now)
                        self.add(connection, max(again, now + self._step_s))
                    if number % _CHUNK == _CHUNK - 1:
                        await trio.lowlevel.checkpoint()
