"""Channels of one's own, as the configuration names them."""

from __future__ import annotations

from typing import Literal

import attrs

from trading_push.settings.validators import number, one_of, optional, switch
from trading_push.topics import Channel

__all__ = ["CHANNELS_EXAMPLE", "OwnChannel"]

CHANNELS_EXAMPLE = """\
[channels.alerts]
kind = "events"
per_user = true
"""


@attrs.frozen
class OwnChannel:
    """A channel beside the built-in ones; see `topics.Channel`.

    Args:
        interval_s: The time between two polls of the source for it, in seconds; None for a channel
            that is only published to.
        kind: `state`, or `events`.
        per_user: Every user has their own; otherwise all share one.
    """

    interval_s: float | None = attrs.field(default=None, validator=optional(number(0.1)))
    kind: Literal["state", "events"] = attrs.field(
        default="state", validator=one_of("state", "events")
    )
    per_user: bool = attrs.field(default=True, validator=switch)

    def named(self, name: str) -> Channel:
        """Make the channel of that name.

        Raises:
            ConfigurationError: It cannot be named so, or cannot be polled.
        """
        kind = "events" if name == "fills" else self.kind
        return Channel(name, kind, self.per_user, self.interval_s)
