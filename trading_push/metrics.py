"""What `GET /metrics` tells, in the text formats of Prometheus and OpenMetrics.

The numbers are counted, as plain integers, by those who do the work. They are copied here when
somebody asks, and made text in a thread: none of it is done at a delivery.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Final

import attrs
import trio
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from trading_push import logs
from trading_push.auth import check
from trading_push.broker.base import State
from trading_push.connections.context import Context
from trading_push.endpoints import admission
from trading_push.endpoints.hypercorn.server import guard
from trading_push.errors import CloseCode, ErrorCode
from trading_push.histogram import Histogram
from trading_push.protocol.messages import OPS
from trading_push.topics import ALL_TICKERS
from trading_push.upstream import fetching
from trading_push.upstream.lifecycle import Upstream

__all__ = ["PREFIX", "families", "render"]

PREFIX: Final = "trading_push_"
_PLAIN: Final = "text/plain; version=0.0.4; charset=utf-8"
_OPEN_METRICS: Final = "application/openmetrics-text"
_ENDPOINTS: Final = ("asgi", "native")
_STATES: Final[tuple[State, ...]] = ("live", "stale", "down")
_RESULTS: Final = ("ok", *(code.value for code in ErrorCode))

_WRITERS: Final = trio.CapacityLimiter(1)
"""Not trio's own: threads of the application must not keep a scrape waiting."""

Labels = tuple[str, ...]


@attrs.frozen(eq=False)
class _Snapshot(Collector):
    """Some metrics as they were at one moment."""

    metrics: list[Metric]

    def collect(self) -> Iterable[Metric]:
        return self.metrics


async def render(context: Context, upstream: Upstream, accept: str) -> tuple[bytes, str]:
    """Write the metrics of a service and of its process.

    Args:
        context: What the service's connections share.
        upstream: Its sources.
        accept: The request's `Accept`: OpenMetrics where that is named, else Prometheus' own.

    Returns:
        The text, and its type. A checkpoint.
    """
    snapshot = _Snapshot([*families(context, upstream)])

    def write() -> tuple[bytes, str]:
        registry = CollectorRegistry()
        registry.register(snapshot)
        # With thousands of descriptors to be counted, this would hold the event loop.
        ProcessCollector(registry=registry)
        if _OPEN_METRICS in accept:
            text: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(registry), _PLAIN

    return await trio.to_thread.run_sync(write, limiter=_WRITERS)


def families(context: Context, upstream: Upstream) -> Iterator[Metric]:
    """Copy all metrics but those of the process, each with every label that it can have.

    Only the number of channels and of states counts for how long it takes, not that of connections.
    """
    registry, broker, tally = context.registry, context.broker, context.registry.tally
    ledger = registry.ledger
    channels = [*(each.name for each in context.channels), "ticker", ALL_TICKERS.channel, "candles"]
    states = broker.states()
    pollers = upstream.pollers

    yield _gauge(
        "build_info",
        "The version of trading_push and of Python.",
        {(metadata.version("trading_push"), platform.python_version()): 1},
        "version",
        "python",
    )

    # Who is there.
    yield _gauge(
        "connections", "Connections that are open.", _by(_ENDPOINTS, tally.open), "endpoint"
    )
    yield _gauge("users", "Users who have a connection.", {(): registry.users_online()})
    yield _gauge(
        "subscriptions",
        "Subscriptions that there are.",
        _by(channels, tally.subscriptions),
        "channel",
    )
    yield _gauge(
        "topics",
        "Topics that have a value or a status.",
        {
            (channel, state): states.get(channel, {}).get(state, 0)
            for channel, state in itertools.product(channels, _STATES)
        },
        "channel",
        "state",
    )

    # How they came and went.
    yield _counter(
        "connections_opened",
        "Connections that were opened.",
        _by(_ENDPOINTS, tally.opened),
        "endpoint",
    )
    closed = {str(int(code)): tally.closed[code] for code in CloseCode}
    closed["other"] = tally.closed.total() - sum(closed.values())
    yield _counter(
        "connections_closed", "Connections that have ended.", _by(closed, closed), "code"
    )
    over_limit = guard.sockets.refused + context.seats.connections.refused
    yield _counter(
        "handshakes_refused",
        "Handshakes that were refused.",
        _by(admission.REASONS, {**tally.refused, "connections": over_limit}),
        "reason",
    )
    yield _counter(
        "authentications",
        "Checks of tokens, and of handshakes.",
        _by(check.RESULTS, context.tokens.results),
        "result",
    )

    # What they asked for.
    yield _counter(
        "requests",
        "Requests that were answered.",
        {pair: tally.requests[pair] for pair in itertools.product(OPS, _RESULTS)},
        "op",
        "result",
    )
    yield _counter(
        "resumes",
        "Subscriptions that were to go on where the client had been.",
        {(str(yes).lower(),): tally.resumes[yes] for yes in (True, False)},
        "recovered",
    )

    # What they were sent.
    yield _counter(
        "publications", "Values that were published.", _by(channels, broker.published), "channel"
    )
    yield _counter(
        "deliveries",
        "Values that were handed to clients' streams.",
        _by(channels, tally.deliveries),
        "channel",
    )
    yield _counter(
        "delivered_bytes", "Bytes of the frames of deliveries.", {(): tally.delivered_bytes}
    )
    yield _counter(
        "merged",
        "Values that went to a slow or throttled client in a later one only.",
        _by(channels, tally.merged),
        "channel",
    )
    yield _counter(
        "dropped",
        "Events that a slow client was told it has lost.",
        _by(channels, tally.dropped),
        "channel",
    )
    yield _gauge("pending_bytes", "Bytes of values that wait.", {(): tally.pending_bytes})

    # Where it comes from.
    yield _counter(
        "fetches",
        "Calls of the source.",
        {
            (channel, result): poller.fetcher.results[result]
            for channel, poller in pollers.items()
            for result in fetching.RESULTS
        },
        "channel",
        "result",
    )
    yield _histogram(
        "fetch_duration_seconds",
        "How long calls of the source took.",
        {(channel,): poller.fetcher.duration for channel, poller in pollers.items()},
        "channel",
    )
    yield _gauge(
        "source_age_seconds",
        "How long the source has not answered, of the channel where that is longest.",
        {(): upstream.source_age_s()},
    )
    feed = upstream.feed
    yield _gauge(
        "feed_up",
        "Whether the market feed runs.",
        {} if feed is None else {(feed.name,): feed.is_up},
        "feed",
    )

    # How well it runs.
    yield _histogram(
        "publish_to_socket_seconds",
        "From a publication until the fan-out was through with it.",
        {(): tally.to_socket},
    )
    yield _histogram(
        "loop_lag_seconds", "How late the event loop was.", {(): context.heartbeat.lag}
    )
    yield _gauge(
        "ledger_open",
        "What has begun and not ended; 0 with nobody connected.",
        {
            ("connections",): ledger.connections_opened - ledger.connections_closed,
            ("subscriptions",): ledger.subscriptions_opened - ledger.subscriptions_closed,
            ("senders",): ledger.senders_started - ledger.senders_ended,
        },
        "what",
    )
    yield _counter(
        "log_lines_dropped",
        "Log lines that a slow reader has lost.",
        {(): logs.lines_dropped()},
    )


def _by(known: Iterable[str], counts: Mapping[str, int]) -> dict[Labels, int]:
    """The counts by one label: the values that are known, from 0 on, and any others."""
    return {(value,): counts.get(value, 0) for value in dict.fromkeys([*known, *counts])}


def _gauge(
    name: str, meaning: str, values: Mapping[Labels, float], *labels: str
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, meaning, labels=labels)
    for of_labels, value in values.items():
        family.add_metric(of_labels, value)
    return family


def _counter(
    name: str, meaning: str, values: Mapping[Labels, float], *labels: str
) -> CounterMetricFamily:
    family = CounterMetricFamily(PREFIX + name, meaning, labels=labels)
    for of_labels, value in values.items():
        family.add_metric(of_labels, value)
    return family


def _histogram(
    name: str, meaning: str, values: Mapping[Labels, Histogram], *labels: str
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(PREFIX + name, meaning, labels=labels)
    for of_labels, histogram in values.items():
        sums = itertools.accumulate(histogram.counts)
        bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
        family.add_metric(of_labels, [*zip(bounds, sums, strict=True)], histogram.total)
    return family
