"""What a source offers, and which channels a service has for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from trading_push.errors import ConfigurationError
from trading_push.settings.schema import Intervals
from trading_push.sources.base import Source
from trading_push.topics import BUILTIN_CHANNELS, Channel, Channels

__all__ = ["channels_for", "offered_by"]

FILLS: Final = "fills"
_FILLS_INTERVAL_S: Final = 5.0
"""How often a source is asked for fills, where the application does not say."""


def offered_by(source: Source) -> frozenset[str] | None:
    """Return the data types that a source says it offers; None if it does not say."""
    data_types: Iterable[str] | None = getattr(source, "data_types", None)
    return None if data_types is None else frozenset(data_types)


def channels_for(source: Source | None, intervals: Intervals, own: Iterable[Channel]) -> Channels:
    """Make the channels of a service.

    Args:
        source: Where users' data come from; None where everything is published. Of the four data
            types, those that it does not offer are no channels.
        intervals: How often it is polled for the four.
        own: The application's own channels, last in the log's order. One of them may have the name
            of a data type that the source does not offer, or be `fills` with an interval.

    Raises:
        ConfigurationError: A name is there twice, a channel is polled that the source does not
            offer, or a channel of events is polled of which it gives none.
    """
    offered = None if source is None else offered_by(source)
    channels = Channels(
        Channel(name, interval_s=None if source is None else getattr(intervals, name))
        for name in BUILTIN_CHANNELS
        if offered is None or name in offered
    )
    event_types = frozenset[str](getattr(source, "event_types", ()))
    own = list(own)
    fills = Channel(FILLS, "events", interval_s=_FILLS_INTERVAL_S if FILLS in event_types else None)
    for channel in own:
        if channel.name == FILLS and FILLS in event_types:
            fills = channel
    channels.add(fills)  # where the source gives none, whoever publishes to it
    for channel in own:
        if channel.name in event_types and (channel.kind != "events" or not channel.interval_s):
            raise ConfigurationError(
                f"the channel {channel.name!r} has a query with a cursor: give it "
                'kind = "events" and an interval_s'
            )
        if (
            channel.interval_s is not None
            and channel.kind == "events"
            and channel.name not in event_types
        ):
            raise ConfigurationError(
                f"the channel {channel.name!r} is of kind 'events' and cannot be polled: only an "
                "SQL query with a cursor gives new events; remove the interval, and publish to it"
            )
        if channel is fills:
            continue
        if channel.interval_s is not None and offered is not None and channel.name not in offered:
            raise ConfigurationError(
                f"the channel {channel.name!r} has an interval, and the source does not offer "
                f"{channel.name}: it offers {', '.join(sorted(offered)) or 'nothing'}"
            )
        channels.add(channel)
    return channels
