"""The push service: wires the rooms together, tracks the connections, drains them at its end."""

from __future__ import annotations

import math
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import attrs
import msgspec
import trio

from trading_push import logs
from trading_push.auth.tokens import Authenticate, JwtAuthenticator
from trading_push.broker.base import State, Status
from trading_push.broker.memory import MemoryBroker
from trading_push.connections.context import Hub
from trading_push.connections.registry import Ledger, Member, Registry
from trading_push.connections.streams import SharedStream, Stream
from trading_push.endpoints import native
from trading_push.endpoints.asgi import AsgiDoor
from trading_push.endpoints.hypercorn.link import guard
from trading_push.errors import CloseCode, PayloadError, ServiceClosed
from trading_push.protocol import messages as protocol
from trading_push.settings.schema import Limits, Settings
from trading_push.sources.base import SessionSource, Source, TickerFeed, WatchingSource
from trading_push.supervision import keep_running
from trading_push.topics import (
    BUILTIN_CHANNELS,
    Channel,
    Channels,
    Kind,
    Topic,
    symbol_of,
)
from trading_push.transport.proxies import networks
from trading_push.upstream.batcher import Answers
from trading_push.upstream.interest import Demand, Session
from trading_push.upstream.market_feed import MarketFeed
from trading_push.upstream.poller import FetchContext, Poller
from trading_push.web.publish import Publisher
from trading_push.web.routes import routes

__all__ = ["Latest", "PushService", "Statistics", "open_push_service"]

_BACKLOG = 4096
_FORGET_EVERY_S = 10
_LEAST_DRAIN_S = 0.5


@attrs.frozen
class Statistics:
    """What a service sees at one moment.

    Args:
        subscribers_by_data_type: Subscribed users by channel, tickers left out.
        subscribers_by_symbol: Subscribed users by symbol.
        topics: How many topics with a value are live, stale or down, by channel; all symbols are
            `ticker`.
        streams: How many generators of streams run.
        ledger: What began and what ended since the start.
        failing_fetches: For how many watched users and data types the source fails.
        failures: How often each part of the service has raised and was started again (or, of a
            clean-up, logged) since the start; `feed` is the application's.
        connections_stopped: Connections that ended at a firewall; the link's are of the process.
        connections_refused: Connections refused over the limit; the link's are of the process.
        connections_reaped: Connections of this process whose handler had to be reaped.
    """

    users_online: int
    connections: int
    subscribers_by_data_type: dict[str, int]
    subscribers_by_symbol: dict[str, int]
    topics: dict[str, dict[State, int]]
    streams: int
    ledger: Ledger
    failing_fetches: int
    failures: dict[str, int]
    connections_stopped: int
    connections_refused: int
    connections_reaped: int


@attrs.frozen
class Latest:
    """A channel's last value.

    Args:
        data: As JSON.
        ts: When it was published, in ms since the epoch.
        age_s: How long ago that was, in seconds.
        status: Whether it can be relied on.
    """

    data: msgspec.Raw
    ts: int
    age_s: float
    status: Status


class _Changes:
    """What a source that watches its upstream speaks to; see `sources.base.ChangeSink`."""

    def __init__(
        self,
        publish: Callable[[Iterable[tuple[str, Any, str | int | None]]], None],
        pollers: Mapping[str, Poller],
    ) -> None:
        self._publish = publish
        self._pollers = pollers

    def changed(self, changes: Iterable[tuple[str, str]]) -> None:
        users: dict[str, list[str]] = {}
        for user, data_type in changes:
            users.setdefault(data_type, []).append(user)
        for data_type, changed in users.items():
            if data_type in self._pollers:
                self._pollers[data_type].changed(changed)

    def missed(self) -> None:
        for poller in self._pollers.values():
            poller.missed()

    def publish(self, values: Iterable[tuple[str, Any, str]]) -> None:
        for value in values:
            try:
                self._publish([value])
            except (PayloadError, ValueError) as error:
                logs.emit(logs.line("publish_failed", channel=value[0], error=error))


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
        user_session: Session | None,
        on_leave: Callable[[Member], None],
    ) -> None:
        self._settings = settings
        limits = settings.limits
        self._pollers: dict[str, Poller] = {}
        self._demand = Demand(
            limits.watch_linger_s,
            begin=self._begin_upstream,
            end=self._end_upstream,
            failed=self._upstream_failed,
            session=_sessions(source, user_session),
            watch=(
                partial(source.watch, _Changes(self._publish_now, self._pollers))
                if isinstance(source, WatchingSource)
                else None
            ),
        )
        self._registry = Registry(channels, on_watched=self._watched, on_leave=on_leave)
        self._broker = MemoryBroker(channels, self._registry.publish)
        self._failures: Counter[str] = Counter()
        answers = Answers(self._broker)
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
                        answers=answers,
                    )
        self._feed = (
            None
            if feed is None
            else MarketFeed(
                feed, self._broker, settings.market.max_hz, settings.market.stale_after_s
            )
        )
        self._idle_since: dict[Topic, float] = {}
        self._workers: trio.Nursery | None = None
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
        publisher = Publisher(
            self.hub.check,
            self.publish_many,
            limits.publish_bytes,
            self.hub.revoked,
            limits.authentication_timeout_s,
            settings.auth.leeway_s,
        )
        self.asgi_app = AsgiDoor(self.hub, routes(publisher))
        """The ASGI application: WebSocket at the configured path, and `POST /publish`."""

    # --- for the application ---------------------------------------------------------------

    async def publish(self, channel: str, data: Any, user: str | int | None = None) -> None:
        """Publish a value to a channel's subscribers; it is their snapshot from now on.

        Args:
            channel: A user channel, an application's own, or `ticker.SYMBOL`.
            data: Any object that msgspec encodes; see `protocol.encode_data`.
            user: Whose topic it is, for a channel where every user has their own.

        The last value is kept for as long as the service runs, unless the channel is polled too:
        then it stands until the source itself has another value than before.

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
        self._publish_now(values)
        await trio.lowlevel.checkpoint()

    def _publish_now(self, values: Iterable[tuple[str, Any, str | int | None]]) -> None:
        batch = [
            (self._topic(channel, user), protocol.encode_data(data))
            for channel, data, user in values
        ]
        self._registry.check_running()  # before anything is numbered and kept
        self._broker.publish(batch)
        for topic, _ in batch:
            if topic.channel in self._pollers and not self._demand.holds(topic):
                self._idle_since[topic] = trio.current_time()  # the source can give it again

    def latest(self, channel: str, user: str | int | None = None) -> Latest | None:
        """The last value of a channel, live or not; None where there is none. Synchronous.

        Args:
            channel: As `publish` takes it.
            user: Whose, for a channel where every user has their own.

        Raises:
            ValueError: There is no such channel, or a user is missing or too much.
        """
        topic = self._topic(channel, user)
        last = self._broker.snapshot(topic)
        if last is None:
            return None
        age_s = max(0.0, time.time() - last.ts / 1000)
        return Latest(msgspec.Raw(last.data), last.ts, age_s, self._broker.status(topic))

    def _topic(self, channel: str, user: str | int | None) -> Topic:
        ticker = self.hub.channels.ticker(channel)
        if ticker is not None:
            if user is not None:
                raise ValueError("a ticker is everyone's: leave out the user")
            return ticker
        known = self.hub.channels.get(channel)
        if known is None:
            raise ValueError(f"there is no channel {channel!r}: add it to channels=")
        if channel in self.hub.streams.own:
            raise ValueError(f"{channel!r} is a stream: its values come from its generator")
        if known.per_user != (user is not None):
            hint = "give the user" if known.per_user else "leave out the user"
            raise ValueError(f"{channel!r} is {'not ' * (not known.per_user)}per user: {hint}")
        return Topic(channel, None if user is None else str(user))

    def add_stream(
        self, name: str, stream: Stream, *, shared: bool = False, kind: Kind = "events"
    ) -> None:
        """Add a channel whose values an async generator yields. Synchronous.

        A generator runs while it is subscribed. When the subscriber leaves, it is cancelled where
        it waits and its `finally` is run, in the same task; what that awaits needs a shield of its
        own, with a deadline. One that raises is logged with its trace and made anew after a growing
        delay; one that ends is told as `down`, reason `ended`.

        Args:
            name: As a `Channel`'s.
            stream: An async generator function of objects that msgspec encodes (attrs, dataclasses,
                `Decimal`, `datetime`, enums). It is called with the user's id, for each
                subscription; where `shared`, without arguments, once for all subscribers.
            shared: Whether one generator serves everyone who subscribes.
            kind: `events`: each value is delivered, in order, and a generator of one subscription
                waits for a peer that is slow. `state`: the latest value counts.

        Raises:
            ConfigurationError: The name cannot be a channel's, or there is one already.
            ServiceClosed: The service runs no more.
        """
        if self._workers is None:
            raise ServiceClosed("the service runs no more")
        self.hub.channels.add(Channel(name, kind, per_user=not shared))
        streams = self.hub.streams
        if shared:
            streams.shared[name] = SharedStream(
                streams, Topic(name), stream, self._broker, self._registry.settle
            )
            self._workers.start_soon(streams.shared[name].run)
        else:
            streams.own[name] = stream

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
            kicked = list(self.hub.seats.by_user.get(str(user), ()))
        else:
            alive = (each for each in self.hub.connections if not each.closed)
            kicked = [each for each in alive if each.id == connection]
        for each in kicked:
            each.stop(CloseCode.KICKED, reason)
        return len(kicked)

    def revoke(self, token_id: str, *, expires_at: float = math.inf) -> int:
        """Refuse a token from now on, and close the connections that stand on it (4503).

        A session that was renewed stands on each of its tokens that has not expired.

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
            topics=self._broker.states(),
            ledger=attrs.evolve(self._registry.ledger),
            streams=self.hub.streams.running,
            failing_fetches=sum(poller.failing for poller in self._pollers.values()),
            failures={part: count for part, count in self._all_failures() if count},
            connections_stopped=guard.stopped + self.hub.stopped,
            connections_refused=guard.refused + self.hub.refused,
            connections_reaped=guard.reaped,
        )

    def _all_failures(self) -> Iterator[tuple[str, int]]:
        yield from self._failures.items()
        yield "clean-up", self._registry.cleanup_failures
        yield "streams", self.hub.streams.failures
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
            timeout_s: What is left by then is aborted; None takes `limits.drain_timeout_s`. With
                none left (0, or less) there is still a moment, for a notice to go out.

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
            if timeout_s is None:
                timeout_s = self.limits.drain_timeout_s
            with trio.move_on_after(max(_LEAST_DRAIN_S, timeout_s)):
                await self.hub.wait_empty()
        finally:
            for connection in list(connections):
                connection.abort()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await self.hub.wait_empty()

    def _watched(self, topic: Topic, watched: bool) -> None:
        shared = self.hub.streams.shared.get(topic.channel)
        if shared is not None:
            shared.watched(watched)
        else:
            self._demand.watched(topic, watched)

    def _begin_upstream(self, topic: Topic) -> None:
        if self._workers is None:  # the service ends, and the registry with it
            return
        self._idle_since.pop(topic, None)
        symbol = symbol_of(topic.channel)
        if symbol is not None:
            if self._feed is not None:
                self._feed.watch(symbol)
        elif topic.user is not None and (poller := self._pollers.get(topic.channel)) is not None:
            poller.watch(topic.user)

    def _end_upstream(self, topic: Topic) -> None:
        symbol = symbol_of(topic.channel)
        if symbol is not None:
            if self._feed is not None and self._feed.unwatch(symbol):
                self._idle_since[topic] = trio.current_time()
        elif topic.user is not None and (poller := self._pollers.get(topic.channel)) is not None:
            poller.unwatch(topic.user)
            if self._demand.holds(topic):  # it is its user's session that has failed
                return
            self._idle_since[topic] = trio.current_time()
            if self._broker.snapshot(topic) is not None:
                self._broker.mark([topic], Status("stale", "not_watched"))

    def _upstream_failed(self, user: str | None, error: Exception, delay: float) -> None:
        inner = logs.innermost(error)
        if user is None:
            self._failures["watch over the source"] += 1
            logs.emit(logs.line("watch_failed", error=inner, delay=delay))
            return
        self._failures["user sessions"] += 1
        logs.emit(logs.line("session_failed", user=user, error=inner, delay=delay))
        for topic in (Topic(channel, user) for channel in self._pollers):
            if self._demand.holds(topic):
                state: State = "down" if self._broker.snapshot(topic) is None else "stale"
                self._broker.mark([topic], Status(state, "source_error"))

    def _awaits_source(self, topic: Topic) -> bool:
        streams = self.hub.streams
        if topic.channel in streams.own:
            return True
        if (shared := streams.shared.get(topic.channel)) is not None:
            return shared.awaited
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
                    poller = self._pollers.get(topic.channel)
                    if poller is not None and topic.user is not None:
                        poller.forget(topic.user)

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
                # Beside the workers: the sessions that it holds close while clients are told.
                await nursery.start(self._demand.run)
                async with trio.open_nursery() as workers:
                    self._workers = workers
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
                self._workers = None
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
    user_session: Session | None = None,
    on_leave: Callable[[Member], None] = lambda member: None,
) -> AsyncIterator[PushService]:
    """Run a push service while the context is open.

    Args:
        source: Where users' data come from; None where everything is published.
        settings: Intervals, limits, keys.
        feed: Where tickers come from; None where they are published.
        authenticate: Takes a token, returns its `Principal`; None checks JWTs by the settings.
        channels: The application's own, after balance, positions, pnl, orders and fills.
        fetch_context: A context manager factory, opened anew round each call of the source.
        user_session: Takes a user's id, returns an async context manager: entered when the user's
            first watcher comes, left when the last one has gone, after `limits.watch_linger_s`; for
            an upstream session, say. Nothing is fetched for the user while it is not open. What it
            raises is logged, and it is entered again after a growing delay. To leave it may take a
            second, also when the service is cancelled.
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
    builtin.append(Channel("fills", "events"))
    service = PushService(
        settings,
        source,
        feed,
        authenticate,
        Channels([*builtin, *channels]),
        fetch_context,
        user_session,
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


def _sessions(source: Source | None, user_session: Session | None) -> Session | None:
    """The application's session of a user, and within it the source's."""
    factories = [user_session] if user_session is not None else []
    if isinstance(source, SessionSource):
        factories.append(source.session)
    if not factories:
        return None

    @asynccontextmanager
    async def session(user: str) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for factory in factories:
                await stack.enter_async_context(factory(user))
            yield

    return session
