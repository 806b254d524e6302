"""What all connections of a service share: settings, which are read only, and owners of state.

Only `take_over` changes settings, all of them at once, when the service is told of new ones.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from trading_push.auth.check import TokenCheck
from trading_push.auth.demo import DemoTokens, has_key
from trading_push.auth.principal import Authenticate
from trading_push.broker.base import Broker
from trading_push.connections.heartbeat import Heartbeat
from trading_push.connections.registry import Registry
from trading_push.connections.roster import Roster
from trading_push.connections.seats import Seats
from trading_push.connections.streams import Streams
from trading_push.logs.notices import Notices
from trading_push.logs.strangers import StrangerLines
from trading_push.protocol.session import Market
from trading_push.settings.schema import Limits, Settings
from trading_push.topics import Channels, Topic
from trading_push.transport.proxies import Network, networks

__all__ = ["Context"]


@attrs.define(eq=False)
class Context:
    """What all connections of a service share.

    Args:
        path: Where the endpoints serve the WebSocket.
        leeway_s: By how much the clocks of who issues tokens and of this machine may differ.
        channels: The channels that clients can name.
        limits: The bounds of one connection, and of all.
        registry: Who subscribes to what.
        broker: Each topic's last value, numbering and status.
        tokens: The check of tokens, and those that are revoked.
        market: Which symbols there are.
        awaits_source: Whether the source has yet to answer for a topic for the first time since it
            is watched, so that the value there may be old.
        origins: The web pages that may connect; see `transport.origin`.
        origin_required: Whether a handshake without an origin is refused.
        trusted_proxies: The proxies whose `X-Forwarded-For` is believed; see `transport.proxies`.
        anonymous: The market channels that are served without a user.
        connections: The connections that are open, and whether more are taken.
        seats: How many may be open, in all, by address and by user.
        heartbeat: When each connection is to be looked after.
        streams: The application's own streams.
        cookie_session_s: How long a session without a token and without an expiry lasts.
        strangers: Bounds the lines that anyone can cause.
        notices: Tells of requests for paths that nobody serves, and of tokens in URLs.
        demo: Makes tokens for the page, in the embedded default; None elsewhere.
    """

    path: str
    leeway_s: float
    channels: Channels
    limits: Limits
    registry: Registry
    broker: Broker
    tokens: TokenCheck
    market: Market
    awaits_source: Callable[[Topic], bool]
    origins: frozenset[str] = frozenset()
    origin_required: bool = False
    trusted_proxies: tuple[Network, ...] = ()
    anonymous: frozenset[str] = frozenset()
    connections: Roster = attrs.field(factory=Roster)
    seats: Seats = attrs.field(
        default=attrs.Factory(
            lambda self: Seats(self.limits, anonymous=bool(self.anonymous)), takes_self=True
        )
    )
    heartbeat: Heartbeat = attrs.field(
        default=attrs.Factory(lambda self: Heartbeat(self.limits.heartbeat_s), takes_self=True)
    )
    streams: Streams = attrs.field(factory=Streams)
    cookie_session_s: float = 3600.0
    strangers: StrangerLines = attrs.field(
        default=attrs.Factory(lambda self: self.tokens.strangers, takes_self=True)
    )
    notices: Notices = attrs.field(
        default=attrs.Factory(lambda self: Notices(self.strangers), takes_self=True)
    )

    demo: DemoTokens | None = None

    def take_over(self, settings: Settings, authenticate: Authenticate) -> None:
        """Have all that connections ask from now on answered by other settings. Synchronous."""
        self.origins = frozenset(settings.server.origins.split())
        self.trusted_proxies = networks(settings.server.trusted_proxies)
        self.leeway_s = settings.auth.leeway_s
        self.cookie_session_s = settings.auth.cookie_session_s
        self.anonymous = frozenset(settings.auth.anonymous_channels.split())
        self.limits = self.seats.limits = settings.limits
        self.seats.anonymous = bool(self.anonymous)
        self.tokens.use(authenticate, self.leeway_s)
        if has_key(settings):
            self.demo = None
