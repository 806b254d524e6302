"""What a service tells of itself: its statistics, and the last value of a channel."""

from __future__ import annotations

import attrs
import msgspec

from trading_push.broker.base import State, Status
from trading_push.connections.members import Ledger

__all__ = ["Latest", "Statistics"]


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
