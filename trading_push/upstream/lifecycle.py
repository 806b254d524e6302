"""What runs upstream while a topic is watched: it begins, ends, fails and is forgotten here."""

from __future__ import annotations

from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Final

import trio

from trading_push import logs
from trading_push.broker.base import Broker, State, Status
from trading_push.errors import PayloadError, innermost
from trading_push.settings.schema import Settings
from trading_push.sources.base import (
    HistoryFeed,
    SessionSource,
    Source,
    TickerFeed,
    WatchedFeed,
    WatchingSource,
)
from trading_push.topics import (
    ALL_TICKERS,
    CANDLES_PREFIX,
    Channels,
    Topic,
    candles_topic,
    market_symbol,
    symbol_of,
    ticker_topic,
)
from trading_push.upstream.all_tickers import AllTickers
from trading_push.upstream.batcher import Batcher
from trading_push.upstream.candles import Candles
from trading_push.upstream.fetching import FetchContext
from trading_push.upstream.interest import Interest, SessionFactory
from trading_push.upstream.market_feed import MarketFeed, OpenMarket
from trading_push.upstream.poller import Poller

__all__ = ["Publish", "Upstream"]

Publish = Callable[[Iterable[tuple[str, Any, str | int | None]]], None]
"""Publishes some values at once: channel, data and user of each."""

_FORGET_EVERY_S: Final = 10
_SESSION_FAILED: Final = "source_error"


class Upstream:
    """The pollers, the market feed and the users' sessions of a service.

    Args:
        source: Where users' data come from; None for nowhere.
        feed: Where tickers come from; None for nowhere.
        broker: Where values are published, and kept.
        channels: Those with an interval are polled.
        settings: Intervals and limits.
        settled: Told the topics that the source has answered for since they are watched.
        publish: Publishes what a source tells by itself.
        fetch_context: Opened anew round each call of the source.
        user_session: The application's own session of a user.
        watchers: The users who watch a symbol.
    """

    def __init__(
        self,
        source: Source | None,
        feed: TickerFeed | None,
        broker: Broker,
        channels: Channels,
        settings: Settings,
        *,
        settled: Callable[[Sequence[Topic]], None],
        publish: Publish,
        fetch_context: FetchContext,
        user_session: SessionFactory | None,
        watchers: Callable[[str], Collection[str]],
    ) -> None:
        polling = settings.polling
        self.failures: Counter[str] = Counter()
        """How often a session, or the watch over the source, has failed since the start."""
        self.pollers: dict[str, Poller] = {}
        """The poller of each data type."""
        self._broker = broker
        self._channels = channels
        self._linger_s = polling.topic_linger_s
        # Since when the topics that nobody watches are idle, on trio's clock.
        self._idle_since: dict[Topic, float] = {}
        self._ending = False
        batcher = Batcher(broker)
        for channel in channels if source is not None else ():
            if channel.interval_s is not None:
                assert source is not None
                self.pollers[channel.name] = Poller(
                    channel.name,
                    channel.interval_s,
                    source,
                    broker,
                    polling,
                    settled=settled,
                    context=fetch_context,
                    batcher=batcher,
                )
        self.feed: MarketFeed | None = None
        """The market feed, where there is one."""
        self.market: MarketFeed | OpenMarket = OpenMarket()
        """Which symbols there are."""
        if feed is not None:
            market = settings.market
            self.feed = self.market = MarketFeed(
                feed, broker, market.max_hz, market.stale_after_s, market.symbols, watchers
            )
        self.interest = Interest(
            polling.watch_linger_s,
            begin=self._begin,
            end=self._end,
            failed=self._failed,
            session=_sessions(source, user_session),
            watch=(
                partial(source.watch, _Changes(publish, self.pollers, self._mark_told))
                if isinstance(source, WatchingSource)
                else None
            ),
        )
        """Who is watched; its `run` holds the users' sessions."""
        self.all_tickers = AllTickers(
            settings.market.all_max_hz, broker, lambda: self.interest.holds(ALL_TICKERS)
        )
        """What `ticker.*` is made of."""
        self.candles = Candles(
            broker,
            feed if isinstance(feed, HistoryFeed) else None,
            counts_volume=bool(getattr(feed, "counts_volume", False)),
            gives_all=not isinstance(feed, WatchedFeed),
        )
        """What `candles.SYMBOL` are made of."""
        if self.feed is not None:
            self.feed.candles = self.candles

    @property
    def failing_fetches(self) -> int:
        """For how many watched users and data types the source fails."""
        return sum(poller.failing for poller in self.pollers.values())

    @property
    def hung_fetches(self) -> int:
        """How many calls of the source go on in worker threads after their time-out."""
        return sum(poller.fetcher.hung for poller in self.pollers.values())

    def source_age_s(self) -> float:
        """How long the source has not answered for a data type that is watched, at the longest."""
        return max((poller.silent_s() for poller in self.pollers.values()), default=0.0)

    def state(self) -> dict[str, bool]:
        """Whether the source answers, and whether the feed runs; without one, it is not named."""
        state = {}
        if self.pollers:
            state["source"] = all(poller.answers() for poller in self.pollers.values())
        if self.feed is not None:
            state["feed"] = self.feed.is_up
        return state

    def awaits(self, topic: Topic) -> bool:
        """Whether the source has yet to answer for a topic since it is watched."""
        if topic == ALL_TICKERS:
            self.all_tickers.catch_up()
            return False
        if topic.channel.startswith(CANDLES_PREFIX):
            self.candles.catch_up(topic.channel[len(CANDLES_PREFIX) :])
            return False
        poller = self.pollers.get(topic.channel)
        return poller is not None and topic.user is not None and poller.awaits(topic.user)

    def watched(self, topic: Topic, watched: bool) -> None:
        """Note that a topic's first watcher has arrived, or its last one has left; synchronous."""
        self.interest.watched(topic, watched)
        if watched and topic.user is not None and self.interest.session_failed(topic.user):
            self._mark_failed([topic])

    def published(self, topic: Topic, data: bytes) -> None:
        """Somebody has published to a topic: forget it in time if the source can give it again."""
        if (symbol := symbol_of(topic.channel)) is not None:
            self.market.published(symbol)
            self.candles.published(symbol, data)
        if topic.channel in self.pollers and not self.interest.holds(topic):
            self._idle_since[topic] = trio.current_time()

    def parts(self) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        """What is to be kept running, by the name that the log has for it."""
        for name, poller in self.pollers.items():
            yield f"{name} poller", poller.run
        if self.feed is not None:
            yield "market feed", self.feed.run
        yield "channel of all tickers", self.all_tickers.run
        yield "candles", self.candles.run
        yield "sweep of idle topics", self._forget_idle_topics

    def end(self) -> None:
        """Begin nothing more: the service ends, and the registry with it."""
        self._ending = True

    def _begin(self, topic: Topic) -> None:
        if self._ending:
            return
        self._idle_since.pop(topic, None)
        if topic == ALL_TICKERS:
            self.all_tickers.begin()
        symbol = market_symbol(topic.channel)
        if symbol is not None:
            if symbol_of(topic.channel) is None:
                self.candles.begin(symbol)
            if self.feed is not None and not self._is_watched_otherwise(topic, symbol):
                self.feed.watch(symbol)
        elif topic.user is not None and (poller := self.pollers.get(topic.channel)) is not None:
            poller.watch(topic.user)
        else:
            self._session_is_over(topic)

    def _end(self, topic: Topic) -> None:
        if topic == ALL_TICKERS:
            self.all_tickers.end()
        symbol = market_symbol(topic.channel)
        if symbol is not None:
            now = trio.current_time()
            if symbol_of(topic.channel) is None:
                self.candles.end(symbol)
                self._idle_since[topic] = now
            if self.feed is None or self._is_watched_otherwise(topic, symbol):
                return
            if self.feed.unwatch(symbol):
                self._idle_since[ticker_topic(symbol)] = now
        elif topic.user is not None and (poller := self.pollers.get(topic.channel)) is not None:
            poller.unwatch(topic.user)
            if self.interest.holds(topic):  # it is its user's session that has failed
                return
            self._idle_since[topic] = trio.current_time()
            if self._broker.snapshot(topic) is not None:
                self._broker.mark([topic], Status("stale", "not_watched"))
        elif not self.interest.holds(topic):
            self._session_is_over(topic)

    def _is_watched_otherwise(self, topic: Topic, symbol: str) -> bool:
        """Whether a symbol is watched by another topic than this one."""
        both = (ticker_topic(symbol), candles_topic(symbol))
        return any(self.interest.holds(each) for each in both if each != topic)

    def _failed(self, user: str | None, error: Exception, delay: float) -> None:
        inner = innermost(error)
        if user is None:
            self.failures["watch over the source"] += 1
            logs.emit(logs.line("watch_failed", error=inner, delay=delay))
            return
        self.failures["user sessions"] += 1
        logs.emit(logs.line("session_failed", user=user, error=inner, delay=delay))
        self._mark_failed(self.interest.topics_of(user))

    def _mark_told(self, topic: Topic, reason: str | None) -> None:
        """Mark what a source tells by itself, as the source says."""
        if topic.channel in self.pollers or not self.interest.holds(topic):
            return
        if reason is None:
            self._broker.mark([topic], Status("live"))
        else:
            self._broker.mark([topic], Status(self._failed_state(topic), reason))

    def _failed_state(self, topic: Topic) -> State:
        return "down" if self._broker.snapshot(topic) is None else "stale"

    def _mark_failed(self, topics: Iterable[Topic]) -> None:
        """Mark what comes by a user's session: what is polled, and events that are told."""
        for topic in topics:
            if topic.channel in self.pollers or self._channels.kind_of(topic) == "events":
                self._broker.mark([topic], Status(self._failed_state(topic), _SESSION_FAILED))

    def _session_is_over(self, topic: Topic) -> None:
        """Take back what was marked of events that are told: no answer comes that would do it."""
        if topic.user is not None and self._broker.status(topic).reason == _SESSION_FAILED:
            self._broker.mark([topic], Status("live"))

    async def _forget_idle_topics(self) -> None:
        while True:
            await trio.sleep(_FORGET_EVERY_S)
            now = trio.current_time()
            for topic, since in list(self._idle_since.items()):
                if now - since > self._linger_s:
                    del self._idle_since[topic]
                    self.candles.forget(topic)
                    if topic.channel.startswith(CANDLES_PREFIX):
                        continue
                    self._broker.forget(topic)
                    self.all_tickers.forget(topic)
                    poller = self.pollers.get(topic.channel)
                    if poller is not None and topic.user is not None:
                        poller.forget(topic.user)


class _Changes:
    """What a source that watches its own upstream tells; see `sources.base.ChangeSink`."""

    def __init__(
        self,
        publish: Publish,
        pollers: Mapping[str, Poller],
        mark: Callable[[Topic, str | None], None],
    ) -> None:
        self._publish = publish
        self._pollers = pollers
        self._mark = mark

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

    def mark(self, channel: str, user_id: str, reason: str | None) -> None:
        self._mark(Topic(channel, user_id), reason)

    def publish(self, values: Iterable[tuple[str, Any, str]]) -> None:
        for value in values:
            try:
                self._publish([value])
            except (PayloadError, ValueError) as error:
                logs.emit(logs.line("publish_failed", channel=value[0], error=error))


def _sessions(source: Source | None, user_session: SessionFactory | None) -> SessionFactory | None:
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
