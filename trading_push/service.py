"""The push service: wires the rooms together, tracks the connections, drains them at its end."""

from __future__ import annotations

import math
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import attrs
import trio

from trading_push import logs, protocol
from trading_push.auth import Authenticate, JwtAuthenticator
from trading_push.broker.memory import MemoryBroker
from trading_push.errors import CloseCode
from trading_push.feed import MarketFeed
from trading_push.hub import Hub
from trading_push.poller import FetchContext, Poller
from trading_push.proxies import networks
from trading_push.registry import Ledger, Member, Registry
from trading_push.settings import Limits, Settings
from trading_push.sources.base import Source, TickerFeed
from trading_push.supervision import keep_running
from trading_push.topics import (
    BUILTIN_CHANNELS,
    Channel,
    Channels,
    Topic,
    symbol_of,
)
from trading_push.transport import native
from trading_push.transport.asgi import AsgiDoor
from trading_push.transport.hypercorn_link import guard

__all__ = ["PushService", "Statistics", "open_push_service"]

_BACKLOG = 4096
_FORGET_EVERY_S = 10


@attrs.frozen
class Statistics:
    """What a service sees at one moment.

    Args:
        subscribers_by_data_type: Subscribed users by channel, tickers left out.
        subscribers_by_symbol: Subscribed users by symbol.
        ledger: What began and what ended since the start.
        failing_fetches: For how many watched users and data types the source fails.
        failures: How often each part of the service has raised and was started again (or, of a
            clean-up, logged) since the start; `feed` is the application's.
        connections_stopped: Connections that ended at a firewall; the link's are of the process.
        connections_refused: Connections of this process refused over the limit.
        connections_reaped: Connections of this process whose handler had to be reaped.
    """

    users_online: int
    connections: int
    subscribers_by_data_type: dict[str, int]
    subscribers_by_symbol: dict[str, int]
    ledger: Ledger
    failing_fetches: int
    failures: dict[str, int]
    connections_stopped: int
    connections_refused: int
    connections_reaped: int


class PushService:
    """A running service; made by `open_push_service`."""

    def __init__(
        self,
        settings: Settings,
        source: Source | None,
        feed: TickerFeed | None,
        authenticate: Authenticate,
        channels: Channels,
        fetch_context: FetchContext,
        on_leave: Callable[[Member], None],
    ) -> None:
        self._settings = settings
        limits = settings.limits
        self._registry = Registry(channels, on_watched=self._watched, on_leave=on_leave)
        self._broker = MemoryBroker(channels, self._registry.publish)
        self._pollers: dict[str, Poller] = {}
        self._failures: Counter[str] = Counter()
        turn = trio.Lock()
        if source is not None:
            for channel in channels:
                if channel.interval_s is not None:
                    self._pollers[channel.name] = Poller(
                        channel.name,
                        channel.interval_s,
                        source,
                        self._broker,
                        limits,
                        settled=self._registry.settle,
                        context=fetch_context,
                        turn=turn,
                    )
        self._feed = (
            None
            if feed is None
            else MarketFeed(
                feed, self._broker, settings.market.max_hz, settings.market.stale_after_s
            )
        )
        self._idle_since: dict[Topic, float] = {}
        self.hub = Hub(
            path=settings.server.path,
            origins=frozenset(settings.server.origins.split()),
            origin_required=settings.server.origin_required,
            trusted_proxies=networks(settings.server.trusted_proxies),
            leeway_s=settings.auth.leeway_s,
            channels=channels,
            limits=limits,
            registry=self._registry,
            broker=self._broker,
            authenticate=authenticate,
            knows_symbol=(lambda symbol: True) if feed is None else feed.knows,
            awaits_source=self._awaits_source,
        )
        self.asgi_app = AsgiDoor(self.hub)
        """The ASGI application: WebSocket at the configured path."""

    # --- for the application ---------------------------------------------------------------

    async def publish(self, channel: str, data: Any, user: str | int | None = None) -> None:
        """Publish a value to a channel's subscribers; it is their snapshot from now on.

        Args:
            channel: A user channel, an application's own, or `ticker.SYMBOL`.
            data: Any object that msgspec encodes; see `protocol.encode_data`.
            user: Whose topic it is, for a channel where every user has their own.

        The last value is kept for as long as the service runs, unless the channel is polled too.

        Raises:
            PayloadError: The data cannot be encoded.
            ValueError: There is no such channel, or a user is missing or too much.
            ServiceClosed: The service runs no more.

        A checkpoint. What was published is published, also when cancelled.
        """
        await self.publish_many([(channel, data, user)])

    async def publish_many(self, values: Iterable[tuple[str, Any, str | int | None]]) -> None:
        """Publish some values in one batch: each connection gets all of its own in one write.

        Args:
            values: Channel, data and user of each, as `publish` takes them.

        Raises:
            As `publish`; nothing is published then.

        A checkpoint. What was published is published, also when cancelled.
        """
        batch = [
            (self._topic(channel, user), protocol.encode_data(data))
            for channel, data, user in values
        ]
        self._broker.publish(batch)
        for topic, _ in batch:
            if topic.channel in self._pollers and not self._registry.watched(topic):
                self._idle_since[topic] = trio.current_time()  # the source can give it again
        await trio.lowlevel.checkpoint()

    def _topic(self, channel: str, user: str | int | None) -> Topic:
        ticker = self.hub.channels.ticker(channel)
        if ticker is not None:
            if user is not None:
                raise ValueError("a ticker is everyone's: leave out the user")
            return ticker
        known = self.hub.channels.get(channel)
        if known is None:
            raise ValueError(f"there is no channel {channel!r}: add it to channels=")
        if known.per_user != (user is not None):
            hint = "give the user" if known.per_user else "leave out the user"
            raise ValueError(f"{channel!r} is {'not ' * (not known.per_user)}per user: {hint}")
        return Topic(channel, None if user is None else str(user))

    async def handle_stream(self, stream: trio.abc.Stream) -> None:
        """Serve a WebSocket on a stream, plain or `trio.SSLStream`; the native door.

        For `trio.serve_tcp`, `trio.serve_ssl_over_tcp` and `trio.serve_listeners`. Returns when
        the peer is gone; no exception of its making, nor of a handler's, leaves it. Cancelled, it
        says good-bye to the peer first, within `limits.close_timeout_s`.
        """
        await native.handle_stream(self.hub, stream)

    async def serve_native(
        self,
        host: str,
        port: int,
        *,
        ssl_context: ssl.SSLContext | None = None,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen, and serve every connection by `handle_stream`, until cancelled.

        Args:
            host: The address to listen on.
            port: Its port; 0 for any free one (`task_status` tells the listeners).
            ssl_context: Serve over TLS with this.

        Raises:
            OSError: The address cannot be listened on.

        To have the clients told of the end, `drain` the service before it is cancelled.
        """
        listeners = await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG)
        task_status.started(listeners)

        async def over_tls(stream: trio.SocketStream) -> None:
            assert ssl_context is not None
            await self.handle_stream(trio.SSLStream(stream, ssl_context, server_side=True))

        handler = self.handle_stream if ssl_context is None else over_tls
        await trio.serve_listeners(handler, listeners)

    def kick(
        self,
        *,
        user: str | int | None = None,
        connection: str | None = None,
        reason: str = "kicked",
    ) -> int:
        """Close connections with 4503, after which a client does not come back by itself.

        For a user whose token has been revoked, too: what `authenticate` refuses from now on stays
        out. Synchronous.

        Args:
            user: Every connection of this user.
            connection: The one that the reply to `auth` calls so (`conn`).
            reason: Told to the client and logged; at most 123 bytes of UTF-8.

        Returns:
            How many were closed.

        Raises:
            ValueError: Neither is given, or both.
        """
        if (user is None) == (connection is None):
            raise ValueError("give the user or the connection to kick, one of them")
        if user is not None:
            kicked = list(self.hub.seats.get(str(user), ()))
        else:
            alive = (each for each in self.hub.connections if not each.closed)
            kicked = [each for each in alive if each.id == connection]
        for each in kicked:
            each.stop(CloseCode.KICKED, reason)
        return len(kicked)

    def revoke(self, token_id: str, *, expires_at: float = math.inf) -> int:
        """Refuse a token from now on, and close the connections that it stands for (4503).

        For this process and as long as the service runs: elsewhere, `authenticate` must know.

        Args:
            token_id: The token's `jti`, or the `token_id` of an `authenticate` of your own.
            expires_at: When the token ends by itself, in seconds since the epoch; it need not be
                remembered for longer.

        Returns:
            How many connections were closed.
        """
        revoked = self.hub.revoke(token_id, expires_at)
        for each in revoked:
            each.stop(CloseCode.KICKED, "token revoked")
        return len(revoked)

    def statistics(self) -> Statistics:
        """What the service sees now; synchronous."""
        counts = self._registry.counts()
        return Statistics(
            users_online=self._registry.users_online(),
            connections=self._registry.connections,
            subscribers_by_data_type={
                name: count for name, count in counts.items() if symbol_of(name) is None
            },
            subscribers_by_symbol={
                symbol: count
                for name, count in counts.items()
                if (symbol := symbol_of(name)) is not None
            },
            ledger=attrs.evolve(self._registry.ledger),
            failing_fetches=sum(poller.failing for poller in self._pollers.values()),
            failures={part: count for part, count in self._all_failures() if count},
            connections_stopped=guard.stopped + self.hub.stopped,
            connections_refused=guard.refused,
            connections_reaped=guard.reaped,
        )

    def _all_failures(self) -> Iterator[tuple[str, int]]:
        yield from self._failures.items()
        yield "clean-up", self._registry.cleanup_failures
        if self._feed is not None:
            yield "feed", self._feed.failures

    @property
    def limits(self) -> Limits:
        """The bounds that it was opened with."""
        return self._settings.limits

    # --- its life --------------------------------------------------------------------------

    async def drain(self, timeout_s: float | None = None) -> None:
        """Refuse new connections, send everyone the notice and close 1012, wait for their ends.

        Args:
            timeout_s: What is left by then is aborted; None takes `limits.drain_timeout_s`.

        Cancelled, it aborts what is left at once.
        """
        self.hub.accepting = False
        connections = self.hub.connections
        if not connections:
            return
        logs.emit(logs.line("shutting_down", connections=len(connections)))
        for connection in list(connections):
            connection.dismiss()
        try:
            with trio.move_on_after(
                self.limits.drain_timeout_s if timeout_s is None else timeout_s
            ):
                await self.hub.wait_empty()
        finally:
            for connection in list(connections):
                connection.abort()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await self.hub.wait_empty()

    def _watched(self, topic: Topic, watched: bool) -> None:
        poller = self._pollers.get(topic.channel)
        if poller is None or topic.user is None:
            return
        if watched:
            self._idle_since.pop(topic, None)
            poller.watch(topic.user)
        else:
            self._idle_since[topic] = trio.current_time()
            poller.unwatch(topic.user)

    def _awaits_source(self, topic: Topic) -> bool:
        poller = self._pollers.get(topic.channel)
        return poller is not None and topic.user is not None and poller.awaits(topic.user)

    async def _keep_running(self, part: str, run: Callable[[], Awaitable[None]]) -> None:
        def failed(error: Exception, delay: float) -> None:
            self._failures[part] += 1
            inner = logs.innermost(error)
            line = logs.line("part_failed", part=part, error=inner, delay=delay)
            logs.emit(line._replace(exception=inner))

        await keep_running(run, failed)

    async def _forget_idle_topics(self) -> None:
        linger = self._settings.limits.topic_linger_s
        while True:
            await trio.sleep(_FORGET_EVERY_S)
            now = trio.current_time()
            for topic, since in list(self._idle_since.items()):
                if now - since > linger:
                    del self._idle_since[topic]
                    self._broker.forget(topic)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled, then drain; ends when every line of every leave is emitted.

        Raises:
            ExceptionGroup: The registry died of a mistake of ours.
        """
        logs.emit(
            logs.line("service_started"),
            *(
                logs.line("poller_started", data_type=each.data_type, interval=each.interval_s)
                for each in self._pollers.values()
            ),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._registry.run)
            try:
                async with trio.open_nursery() as workers:
                    for name, poller in self._pollers.items():
                        workers.start_soon(self._keep_running, f"{name} poller", poller.run)
                    if self._feed is not None:
                        workers.start_soon(self._keep_running, "market feed", self._feed.run)
                    workers.start_soon(
                        self._keep_running, "sweep of idle topics", self._forget_idle_topics
                    )
                    workers.start_soon(self._keep_running, "heartbeat", self.hub.timetable.run)
                    task_status.started()
            finally:
                with trio.CancelScope(shield=True):
                    await self.drain()
                self._registry.close()


@asynccontextmanager
async def open_push_service(
    source: Source | None = None,
    *,
    settings: Settings | None = None,
    feed: TickerFeed | None = None,
    authenticate: Authenticate | None = None,
    channels: Iterable[Channel] = (),
    fetch_context: FetchContext = nullcontext,
    on_leave: Callable[[Member], None] = lambda member: None,
) -> AsyncIterator[PushService]:
    """Run a push service while the context is open.

    Args:
        source: Where users' data come from; None where everything is published.
        settings: Intervals, limits, keys.
        feed: Where tickers come from; None where they are published.
        authenticate: Takes a token, returns its `Principal`; None checks JWTs by the settings.
        channels: The application's own, after balance, positions, pnl and orders.
        fetch_context: A context manager factory, opened anew round each call of the source.
        on_leave: Called for each connection that has left; what it raises is logged.

    Raises:
        ConfigurationError: There is no `authenticate` and no key to check tokens with.

    At its end every connection is sent the notice and closed with 1012, within
    `limits.drain_timeout_s`; no log line of a leave is lost, also when cancelled.
    """
    settings = Settings() if settings is None else settings
    if authenticate is None:
        authenticate = JwtAuthenticator(settings.auth, settings.jwt_secret)
    builtin = [
        Channel(name, interval_s=getattr(settings.intervals, name) if source else None)
        for name in BUILTIN_CHANNELS
    ]
    service = PushService(
        settings,
        source,
        feed,
        authenticate,
        Channels([*builtin, *channels]),
        fetch_context,
        on_leave,
    )
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(service.run)
        try:
            yield service
        except Exception as error:
            failure = error  # raised below, as what it is and not as a group
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
