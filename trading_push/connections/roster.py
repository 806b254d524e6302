"""The connections of a service that are open, and how all of them are ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import trio

from trading_push import logs
from trading_push.connections.members import Member
from trading_push.errors import CloseCode

__all__ = ["Peer", "Roster"]

_AT_LEAST_S = 0.5
"""How long a drain lasts at least: with less time no peer would be told of the end."""
_ABORTED_S = 1.0
"""How long connections that were aborted may take to end."""


class Peer(Protocol):
    """A connection, as whoever ends it sees it; see `connections.connection.Connection`."""

    closed: bool
    """Whether it is to end, or has ended."""

    @property
    def member(self) -> Member:
        """What the registry knows of it, its id among that."""
        ...

    def authenticated_by(self, token_id: str) -> bool:
        """Whether it stands on a token of this id."""
        ...

    def stop(self, code: int, reason: str) -> None:
        """End it with a close code; synchronous."""
        ...

    def dismiss(self) -> None:
        """End it because the service ends; synchronous."""
        ...

    def abort(self) -> None:
        """Drop it without a close frame; synchronous."""
        ...


class Roster:
    """The connections whose stream has not ended."""

    def __init__(self) -> None:
        self.accepting = True
        """Whether the endpoints take new connections; ended by `drain`."""
        self.stopped = 0
        """How many connections the native endpoint's firewall has ended."""
        self._open: set[Peer] = set()
        self._waiting = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._open)

    def add(self, connection: Peer) -> None:
        """A connection begins."""
        self._open.add(connection)

    def remove(self, connection: Peer) -> None:
        """A connection's stream has ended."""
        self._open.discard(connection)
        if not self._open:
            self._waiting.unpark_all()

    def count_stopped(self) -> None:
        """A firewall has ended a connection."""
        self.stopped += 1

    async def wait_empty(self) -> None:
        """Wait until no connection has a stream any more."""
        while self._open:
            await self._waiting.park()

    def kick(self, concerns: Callable[[Peer], bool], reason: str) -> int:
        """Close some connections with 4503; return how many. Synchronous."""
        kicked = [each for each in self._open if not each.closed and concerns(each)]
        for each in kicked:
            each.stop(CloseCode.KICKED, reason)
        return len(kicked)

    async def drain(self, timeout_s: float) -> None:
        """Take no new connections, tell those that are there of the end, and wait for theirs.

        Args:
            timeout_s: Those that are left by then are aborted; at least half a second.

        Cancelled, it aborts those that are left at once.
        """
        self.accepting = False
        if not self._open:
            return
        logs.emit(logs.line("shutting_down", connections=len(self._open)))
        for connection in list(self._open):
            connection.dismiss()
        try:
            # `max` in this order takes the least for a NaN, too.
            with trio.move_on_after(max(_AT_LEAST_S, timeout_s)):
                await self.wait_empty()
        finally:
            for connection in list(self._open):
                connection.abort()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _ABORTED_S):
                await self.wait_empty()
