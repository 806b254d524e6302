"""What all connections of a service share: the settings, the registry, the broker, who is there."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Protocol

import attrs
import trio

from trading_push import logs
from trading_push.auth.revocation import RevokedTokens
from trading_push.auth.tokens import Authenticate, Principal
from trading_push.broker.base import Broker
from trading_push.connections.heartbeat import Timetable, Watched
from trading_push.connections.registry import Registry
from trading_push.connections.seats import Seats
from trading_push.connections.streams import Streams
from trading_push.errors import SourceError
from trading_push.settings.schema import Limits
from trading_push.topics import Channels, Topic
from trading_push.transport.proxies import Network

__all__ = ["Hub", "Peer"]

_REPEAT_S = 60


class Peer(Watched, Protocol):
    """One connection, as others see it; see `connection.Connection`."""

    closed: bool
    """Whether it is to end, or has ended."""

    @property
    def id(self) -> str:
        """What the reply to `auth` calls it."""
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


@attrs.define(eq=False)
class Hub:
    """What all connections of a service share.

    Args:
        path: Where the doors serve the WebSocket.
        origins: The web pages that may connect; see `origin`.
        origin_required: Whether a handshake without an origin is refused.
        trusted_proxies: Whose word on a client's address is taken; see `proxies`.
        leeway_s: By how much the clocks of who issues tokens and of this machine may differ.
        knows_symbol: Whether a symbol may exist.
        awaits_source: Whether the source has yet to answer for a topic for the first time since it
            is watched, so that the value there is may be old.
        accepting: Whether the doors take new connections.
        stopped: How many connections ended at the native door's firewall.
        refused: How many the doors have refused over `limits.connections`.
        connections: Those whose stream has not ended.
        seats: Who may connect, and who sits where.
        revoked: The tokens that are refused although they are good otherwise.
        timetable: When each connection is to be looked after.
        streams: An application's own.
    """

    path: str
    leeway_s: float
    channels: Channels
    limits: Limits
    registry: Registry
    broker: Broker
    authenticate: Authenticate
    knows_symbol: Callable[[str], bool]
    awaits_source: Callable[[Topic], bool]
    origins: frozenset[str] = frozenset()
    origin_required: bool = False
    trusted_proxies: tuple[Network, ...] = ()
    accepting: bool = True
    stopped: int = 0
    refused: int = 0
    connections: set[Peer] = attrs.field(factory=set)
    seats: Seats = attrs.field(
        default=attrs.Factory(lambda self: Seats(self.limits), takes_self=True)
    )
    revoked: RevokedTokens = attrs.field(
        default=attrs.Factory(lambda self: RevokedTokens(self.leeway_s), takes_self=True)
    )
    timetable: Timetable = attrs.field(
        default=attrs.Factory(lambda self: Timetable(self.limits.heartbeat_s), takes_self=True)
    )
    streams: Streams = attrs.field(factory=Streams)
    _told_unavailable_at: float = -math.inf
    _waiting: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    async def check(self, token: str) -> Principal:
        """Whom a token stands for.

        Raises:
            AuthenticationError: It is refused.
            SourceError: It cannot be checked now; said in the log once a minute at most.
            Exception: A mistake of the application's own.
        """
        try:
            principal = self.authenticate(token)
            if inspect.isawaitable(principal):
                principal = await principal
        except SourceError as error:
            if trio.current_time() - self._told_unavailable_at >= _REPEAT_S:
                self._told_unavailable_at = trio.current_time()
                logs.emit(logs.line("authentication_unavailable", error=error))
            raise
        if not isinstance(principal, Principal):
            raise TypeError(f"authenticate returned {type(principal).__name__}, not a Principal")
        self.revoked.check(principal)
        return principal

    def revoke(self, token_id: str, expires_at: float) -> list[Peer]:
        """Refuse a token from now on; the connections that stand on it, which go on."""
        self.revoked.add(token_id, expires_at)
        return [
            each for each in self.connections if not each.closed and each.authenticated_by(token_id)
        ]

    def gone(self, connection: Peer) -> None:
        """A connection's stream has ended."""
        self.connections.discard(connection)
        self.timetable.remove(connection)
        if not self.connections:
            self._waiting.unpark_all()

    async def wait_empty(self) -> None:
        """Wait until no connection has a stream any more."""
        while self.connections:
            await self._waiting.park()
