"""What a service tells of itself: its statistics, and the last value of a channel."""

from __future__ import annotations

import time
from collections.abc import Mapping

import attrs
import msgspec

from trading_push.broker.base import Broker, State, Status
from trading_push.connections.context import Context
from trading_push.connections.members import Ledger
from trading_push.endpoints.hypercorn.server import guard
from trading_push.topics import Topic, market_symbol, symbol_of
from trading_push.upstream.lifecycle import Upstream

__all__ = ["Latest", "Statistics", "collect"]


@attrs.frozen
class Statistics:
    """What a service sees at one moment.

    Args:
        subscribers_by_data_type: Subscribed users by channel, those of single symbols left out.
        subscribers_by_symbol: Users who are subscribed to a ticker, by symbol.
        topics: How many topics with a value are live, stale or down, by channel; all symbols are
            `ticker`, and their candles `candles`.
        streams: How many generators of streams run.
        ledger: What began and what ended since the start.
        failing_fetches: For how many watched users and data types the source fails.
        hung_fetches: Calls of the source that go on in worker threads after their time-out.
        failures: How often each part of the service has raised and was started again (or, of a
            clean-up, logged) since the start; `feed` is the application's.
        connections_stopped: Connections that ended at a firewall; the link's are of the process.
        connections_refused: Connections and sockets over the limit; the sockets are of the process.
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
    hung_fetches: int
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

    @classmethod
    def of(cls, broker: Broker, topic: Topic) -> Latest | None:
        """Take a topic's last value; None if there is none."""
        last = broker.snapshot(topic)
        if last is None:
            return None
        age_s = max(0.0, time.time() - last.ts / 1000)
        return cls(msgspec.Raw(last.data), last.ts, age_s, broker.status(topic))


def collect(context: Context, upstream: Upstream, failures: Mapping[str, int]) -> Statistics:
    """Take the statistics of a service; `failures` are those of its parts."""
    registry = context.registry
    counts = registry.counts()
    every_failure = {
        **failures,
        **upstream.failures,
        "clean-up": registry.cleanup_failures,
        "streams": context.streams.failures,
        "feed": 0 if upstream.feed is None else upstream.feed.failures,
    }
    return Statistics(
        users_online=registry.users_online(),
        connections=registry.connections,
        subscribers_by_data_type={
            name: count for name, count in counts.items() if market_symbol(name) is None
        },
        subscribers_by_symbol={
            symbol: count for name, count in counts.items() if (symbol := symbol_of(name))
        },
        topics=context.broker.states(),
        ledger=attrs.evolve(registry.ledger),
        streams=context.streams.running,
        failing_fetches=upstream.failing_fetches,
        hung_fetches=upstream.hung_fetches,
        failures={part: count for part, count in every_failure.items() if count},
        connections_stopped=guard.stopped + context.connections.stopped,
        connections_refused=guard.sockets.refused + context.seats.connections.refused,
        connections_reaped=guard.reaped,
    )
