"""What a source offers, and which channels a service has for it."""

from __future__ import annotations

from collections.abc import Iterable

from trading_push.errors import ConfigurationError
from trading_push.settings.schema import Intervals
from trading_push.sources.base import Source
from trading_push.topics import BUILTIN_CHANNELS, Channel, Channels

__all__ = ["channels_for", "offered_by"]


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
            of a data type that the source does not offer.

    Raises:
        ConfigurationError: A name is there twice, or a channel is polled that the source does not
            offer.
    """
    offered = None if source is None else offered_by(source)
    channels = Channels(
        Channel(name, interval_s=None if source is None else getattr(intervals, name))
        for name in BUILTIN_CHANNELS
        if offered is None or name in offered
    )
    channels.add(Channel("fills", "events"))  # whoever publishes to it
    for channel in own:
        if channel.interval_s is not None and offered is not None and channel.name not in offered:
            raise ConfigurationError(
                f"the channel {channel.name!r} has an interval, and the source does not offer "
                f"{channel.name}: it offers {', '.join(sorted(offered)) or 'nothing'}"
            )
        channels.add(channel)
    return channels
