"""The limits on connections: in all, by address and by user.

Two things are bounded by `limits.connections`, each with a count of its own, by the one rule of
`Places`. A *connection* is a WebSocket: a service counts its own, at every endpoint. A *socket* is
what Hypercorn has accepted: the link counts those of the process. The two differ, and neither count
can stand for the other: a socket on which nothing was asked for yet is no connection, and holds a
place among the sockets; over HTTP/2 many connections share one socket; a process may have several
services, or a service without our link.

Everything here is synchronous: a place is taken in the step in which its limit is looked at, and
before the first wait of a handshake, so that no number of handshakes under way can pass a limit.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import attrs

from trading_push.errors import CloseCode, TradingPushError
from trading_push.settings.schema import Limits

__all__ = ["NoSeat", "Places", "Seat", "Seated", "Seats"]


class NoSeat(TradingPushError):
    """A limit is reached; the text says which."""


class Seated(Protocol):
    """A user's connection, which may have to make room for a newer one."""

    def stop(self, code: int, reason: str) -> None:
        """End it with a close code; synchronous."""
        ...


@attrs.define
class Places:
    """A count of what `limits.connections` bounds.

    Args:
        taken: How many there are now.
        refused: How many have come when all places were taken.
    """

    taken: int = 0
    refused: int = 0

    def take(self, limits: Limits) -> bool:
        """Take a place; False if all are taken. Whoever has one calls `leave`, once."""
        if self.taken >= limits.connections:
            self.refused += 1
            return False
        self.taken += 1
        return True

    def leave(self) -> None:
        """Give a place back."""
        self.taken -= 1


@attrs.define
class Seats:
    """The seats of a service.

    Args:
        limits: How many there are.
        connections: The WebSockets of the service, handshakes under way among them.
        unauthenticated: How many of them have not authenticated, by address.
        by_user: The connections of each user who has authenticated, oldest first.
        anonymous: Whether those without a user may stay; then they have half of the seats at most.
    """

    limits: Limits
    connections: Places = attrs.field(factory=Places)
    unauthenticated: Counter[str] = attrs.field(factory=Counter)
    by_user: dict[str, dict[Seated, None]] = attrs.field(factory=dict)
    anonymous: bool = False

    def take(self) -> Seat:
        """Take one of `limits.connections`; whoever takes it calls `Seat.leave`.

        Raises:
            NoSeat: They are all taken.
        """
        if not self.connections.take(self.limits):
            raise NoSeat("too many connections")
        return Seat(self)


class Seat:
    """The place of one connection, from its handshake to the end of its stream."""

    __slots__ = ("_address", "_connection", "_seats", "_user")

    def __init__(self, seats: Seats) -> None:
        self._seats: Seats | None = seats
        self._address: str | None = None
        self._user: str | None = None
        self._connection: Seated | None = None

    def hold_unauthenticated(self, address: str) -> None:
        """Be one of `limits.unauthenticated_per_address`, until it is a user's.

        Raises:
            NoSeat: The address has as many.
        """
        assert self._seats is not None
        counts = self._seats.unauthenticated
        if counts[address] >= self._seats.limits.unauthenticated_per_address:
            raise NoSeat("too many connections of this address have not authenticated")
        if self._seats.anonymous and counts.total() >= self._seats.limits.connections // 2:
            raise NoSeat("too many connections without a user")
        counts[address] += 1
        self._address = address

    def hold_user(self, user: str, connection: Seated) -> None:
        """Be one of `limits.connections_per_user`; the user's oldest may have to make room.

        Raises:
            NoSeat: The user has as many.
        """
        assert self._seats is not None
        limits, by_user = self._seats.limits, self._seats.by_user
        taken = by_user.get(user, {})
        if len(taken) >= limits.connections_per_user:
            if limits.over_user_limit == "reject":
                raise NoSeat("too many connections of this user")
            next(iter(taken)).stop(CloseCode.REPLACED, "replaced by a newer connection")
        self.release()
        by_user.setdefault(user, {})[connection] = None
        self._user, self._connection = user, connection

    def release(self) -> None:
        """Count for no address and no user any more: the connection is closed."""
        if self._seats is None:
            return
        if self._address is not None:
            counts = self._seats.unauthenticated
            counts[self._address] -= 1
            if not counts[self._address]:
                del counts[self._address]
            self._address = None
        if self._user is not None and self._connection is not None:
            taken = self._seats.by_user[self._user]
            del taken[self._connection]
            if not taken:
                del self._seats.by_user[self._user]
            self._user = self._connection = None

    def leave(self) -> None:
        """Give the place back; harmless when that was done."""
        self.release()
        if self._seats is not None:
            self._seats.connections.leave()
            self._seats = None
