"""The push service: wires the rooms together, tracks the connections, drains them at its end."""

from __future__ import annotations

import math
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import trio

from trading_push import logs
from trading_push.auth.check import TokenCheck, check_origins
from trading_push.auth.principal import Authenticate
from trading_push.auth.tokens import JwtAuthenticator
from trading_push.broker.base import Message
from trading_push.broker.memory import MemoryBroker
from trading_push.connections.context import Context
from trading_push.connections.members import Member
from trading_push.connections.registry import Registry
from trading_push.connections.streams import SharedStream, Stream
from trading_push.endpoints import native
from trading_push.endpoints.asgi import AsgiEndpoint
from trading_push.endpoints.hypercorn.server import guard
from trading_push.errors import ServiceClosed, innermost
from trading_push.metrics import render
from trading_push.protocol import payloads
from trading_push.settings.schema import Limits, Settings
from trading_push.sources.base import Source, TickerFeed
from trading_push.sources.offered import channels_for
from trading_push.statistics import Latest, Statistics, collect
from trading_push.supervision import keep_running
from trading_push.topics import Channel, Channels, Kind, Topic, symbol_of
from trading_push.transport.proxies import networks
from trading_push.upstream.fetching import FetchContext
from trading_push.upstream.interest import SessionFactory
from trading_push.upstream.lifecycle import Upstream
from trading_push.user_ids import given_user_id
from trading_push.web.routes import routes

__all__ = ["PushService", "open_push_service"]


class PushService:
    """A running service; made by `open_push_service`.

    It is longer than 300 lines because it is the whole of what an application calls, most of it
    documentation; the work is done by what it wires together.
    """

    def __init__(
        self,
        settings: Settings,
        source: Source | None,
        feed: TickerFeed | None,
        authenticate: Authenticate,
        channels: Channels,
        fetch_context: FetchContext,
        user_session: SessionFactory | None,
        on_leave: Callable[[Member], None],
    ) -> None:
        self._settings = settings
        self._registry = Registry(channels, on_watched=self._watched, on_leave=on_leave)
        self._broker = MemoryBroker(channels, self._deliver)
        self._upstream = Upstream(
            source,
            feed,
            self._broker,
            channels,
            settings,
            settled=self._registry.settle,
            publish=self._publish_now,
            fetch_context=fetch_context,
            user_session=user_session,
            watchers=self._registry.users_of_symbol,
        )
        # How often each part of the service has failed since the start.
        self._failures: Counter[str] = Counter()
        # Where the parts of the service run, while it runs.
        self._workers: trio.Nursery | None = None
        self.context = Context(
            path=settings.server.path,
            origins=frozenset(settings.server.origins.split()),
            origin_required=settings.server.origin_required,
            trusted_proxies=networks(settings.server.trusted_proxies),
            leeway_s=settings.auth.leeway_s,
            channels=channels,
            limits=settings.limits,
            registry=self._registry,
            broker=self._broker,
            tokens=TokenCheck(authenticate, settings.auth.leeway_s),
            cookie_session_s=settings.auth.cookie_session_s,
            anonymous=frozenset(settings.auth.anonymous_channels.split()),
            market=self._upstream.market,
            awaits_source=self._awaits_source,
        )
        guard.strangers = self.context.strangers  # one bound for both
        http = routes(
            self.context,
            self,
            self._upstream.state,
            lambda: guard.workers,
            partial(render, self.context, self._upstream),
            settings,
        )
        self.asgi_app = AsgiEndpoint(self.context, http)
        """The ASGI application: WebSocket at the configured path, and the routes of HTTP."""

    # --- for the application ---------------------------------------------------------------

    async def publish(self, channel: str, data: Any, user: str | int | None = None) -> None:
        """Publish a value to a channel's subscribers; it is their snapshot from now on.

        Args:
            channel: A user channel, an application's own, or `ticker.SYMBOL`.
            data: Any object that msgspec encodes; see `payloads.encode_data`.
            user: Whose topic it is, for a channel where every user has their own.

        The last value is kept for as long as the service runs, unless the channel is polled too:
        then it stands until the source itself has another value than before.

        Raises:
            PayloadError: The data cannot be encoded.
            ValueError: There is no such channel, a user is missing or too much, or it is the ticker
                of a symbol that nobody can subscribe to.
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
            (self._publishable(channel, user), payloads.encode_data(data))
            for channel, data, user in values
        ]
        self._registry.check_running()  # before anything is numbered and kept
        self._broker.publish(batch)
        for topic, data in batch:
            self._upstream.published(topic, data)

    def _deliver(self, batch: Sequence[Message]) -> None:
        self._registry.deliver(batch)
        self._upstream.all_tickers.note(batch)

    def latest(self, channel: str, user: str | int | None = None) -> Latest | None:
        """The last value of a channel, live or not; None if there is none. Synchronous.

        Args:
            channel: As `publish` takes it.
            user: Whose, for a channel where every user has their own.

        Raises:
            ValueError: There is no such channel, or a user is missing or too much.
        """
        return Latest.of(self._broker, self._topic(channel, user))

    def _publishable(self, channel: str, user: str | int | None) -> Topic:
        topic = self._topic(channel, user)
        symbol = symbol_of(topic.channel)
        if symbol is not None and not self._upstream.market.knows(symbol):
            raise ValueError(
                f"{topic.channel!r} cannot be subscribed: the market feed has no such symbol"
            )
        return topic

    def _topic(self, channel: str, user: str | int | None) -> Topic:
        if channel in self.context.streams.own:
            raise ValueError(f"{channel!r} is a stream: its values come from its generator")
        return self.context.channels.topic(channel, None if user is None else given_user_id(user))

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
        self.context.channels.add(Channel(name, kind, per_user=not shared))
        streams = self.context.streams
        if shared:
            streams.shared[name] = SharedStream(
                streams, Topic(name), kind, stream, self._broker, self._registry.settle
            )
            self._workers.start_soon(streams.shared[name].run)
        else:
            streams.own[name] = stream

    async def handle_stream(self, stream: trio.abc.Stream) -> None:
        """Serve a WebSocket on a stream, plain or `trio.SSLStream`; the native endpoint.

        For `trio.serve_tcp`, `trio.serve_ssl_over_tcp` and `trio.serve_listeners`. Returns when
        the peer is gone; no exception of its making, nor of a handler's, leaves it. Cancelled, it
        says good-bye to the peer first, within `limits.close_timeout_s`.
        """
        await native.handle_stream(self.context, stream)

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
        listeners = await native.listen(host, port)
        task_status.started(listeners)
        await native.serve(self.context, listeners, ssl_context)

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
            ValueError: Neither is given, or both, or there cannot be such a user.
        """
        if (user is None) == (connection is None):
            raise ValueError("give the user or the connection to kick, one of them")
        if user is None:
            return self.context.connections.kick(lambda each: each.member.id == connection, reason)
        seated = self.context.seats.by_user.get(given_user_id(user), ())
        return self.context.connections.kick(seated.__contains__, reason)

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
        self.context.tokens.revoked.add(token_id, expires_at)
        return self.context.connections.kick(
            lambda each: each.authenticated_by(token_id), "token revoked"
        )

    def statistics(self) -> Statistics:
        """What the service sees now; synchronous."""
        return collect(self.context, self._upstream, self._failures)

    @property
    def limits(self) -> Limits:
        """The bounds that it was opened with."""
        return self.context.limits

    # --- its life --------------------------------------------------------------------------

    async def drain(self, timeout_s: float | None = None) -> None:
        """Refuse new connections, send everyone the notice and close 1012, wait for their ends.

        Args:
            timeout_s: What is left by then is aborted; None takes `limits.drain_timeout_s`. With
                none left (0, or less) there is still a moment, for a notice to go out.

        Cancelled, it aborts what is left at once.
        """
        await self.context.connections.drain(
            self.limits.drain_timeout_s if timeout_s is None else timeout_s
        )

    def _watched(self, topic: Topic, watched: bool) -> None:
        shared = self.context.streams.shared.get(topic.channel)
        if shared is not None:
            shared.watched(watched)
        else:
            self._upstream.watched(topic, watched)

    def _awaits_source(self, topic: Topic) -> bool:
        streams = self.context.streams
        if topic.channel in streams.own:
            return True
        if (shared := streams.shared.get(topic.channel)) is not None:
            return shared.awaited
        return self._upstream.awaits(topic)

    async def _keep_running(self, part: str, run: Callable[[], Awaitable[None]]) -> None:
        def failed(error: Exception, delay: float) -> None:
            self._failures[part] += 1
            inner = innermost(error)
            logs.emit(logs.traced("part_failed", inner, part=part, delay=delay))

        await keep_running(run, failed)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled, then drain; ends when every line of every leave is emitted.

        Raises:
            ExceptionGroup: The registry died of a bug.
        """
        logs.emit(
            logs.line("service_started"),
            *(
                logs.line("poller_started", data_type=each.data_type, interval=each.interval_s)
                for each in self._upstream.pollers.values()
            ),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._registry.run)
            try:
                # Beside the workers: the sessions that it holds close while clients are told.
                await nursery.start(self._upstream.interest.run)
                async with trio.open_nursery() as workers:
                    self._workers = workers
                    for part, run in self._upstream.parts():
                        workers.start_soon(self._keep_running, part, run)
                    workers.start_soon(self._keep_running, "heartbeat", self.context.heartbeat.run)
                    workers.start_soon(self._keep_running, "log", self.context.strangers.tell)
                    task_status.started()
            finally:
                self._workers = None
                self._upstream.end()
                with trio.CancelScope(shield=True):
                    await self.drain()
                self._registry.close()
                self.context.strangers.flush()


@asynccontextmanager
async def open_push_service(
    source: Source | None = None,
    *,
    settings: Settings | None = None,
    feed: TickerFeed | None = None,
    authenticate: Authenticate | None = None,
    channels: Iterable[Channel] = (),
    fetch_context: FetchContext = nullcontext,
    user_session: SessionFactory | None = None,
    on_leave: Callable[[Member], None] = lambda member: None,
) -> AsyncIterator[PushService]:
    """Run a push service while the context is open.

    Args:
        source: Where users' data come from; None where everything is published.
        settings: Intervals, limits, keys.
        feed: Where tickers come from; None where they are published.
        authenticate: Takes a token, returns its `Principal`; None checks JWTs by the settings. One
            with a second parameter is given the `Handshake` as well.
        channels: The application's own, after those of balance, positions, pnl and orders that the
            source offers (`data_types`) and fills.
        fetch_context: A context manager factory, opened anew round each call of the source.
        user_session: Takes a user's id, returns an async context manager: entered when the user's
            first watcher comes, left `polling.watch_linger_s` after the last one has gone; for an
            upstream session, say. Nothing is fetched for the user while it is not open. What it
            raises is logged, and it is entered again after a growing delay. To leave it may take a
            second, also when the service is cancelled.
        on_leave: Called for each connection that has left; what it raises is logged.

    Raises:
        ConfigurationError: There is no `authenticate` and no key to check tokens with; it takes the
            handshake, and `server.origins` has `*` or `null`; a channel is there twice, or is
            polled and the source does not offer it.

    At its end every connection is sent the notice and closed with 1012, within
    `limits.drain_timeout_s`; no log line of a leave is lost, also when cancelled.
    """
    settings = Settings() if settings is None else settings
    logs.default_language(settings.log.lang)
    if authenticate is None:
        authenticate = JwtAuthenticator(settings.auth, settings.jwt_secret)
    check_origins(authenticate, settings.server)
    service = PushService(
        settings,
        source,
        feed,
        authenticate,
        channels_for(source, settings.intervals, channels),
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
