"""What connections have done since the start, in plain numbers that are read when somebody asks.

The fan-out counts once a publication, not once a delivery.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Final

import attrs

from trading_push.histogram import Histogram
from trading_push.topics import family_of

__all__ = ["Tally"]

_TO_SOCKET_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 1)


@attrs.define(eq=False)
class Tally:
    """The counters of a service's connections; owned by the registry.

    A *family* is a channel's name; all symbols are one, `ticker`, and their candles `candles`.

    Args:
        opened: Connections that have begun, by endpoint.
        open: Connections that there are, by endpoint.
        closed: Connections that have ended, by close code.
        subscriptions: Subscriptions that there are, by family.
        refused: Handshakes that were refused, by reason (`endpoints.admission`).
        requests: Requests that were answered, by `op` and by `ok` or an error's code.
        resumes: Subscriptions with `since`, by whether what was missed could be sent.
        deliveries: Values that were handed to a peer's stream, by family.
        delivered_bytes: How many bytes the frames of all of them had.
        merged: Values of states that went out in a later one only, by family.
        dropped: Events that did not go out to a slow peer, by family.
        pending_bytes: How much waits for sender tasks now.
        to_socket: The seconds from a publication until the fan-out was through with it.
    """

    opened: Counter[str] = attrs.field(factory=Counter)
    open: Counter[str] = attrs.field(factory=Counter)
    closed: Counter[int] = attrs.field(factory=Counter)
    subscriptions: Counter[str] = attrs.field(factory=Counter)
    refused: Counter[str] = attrs.field(factory=Counter)
    requests: Counter[tuple[str, str]] = attrs.field(factory=Counter)
    resumes: Counter[bool] = attrs.field(factory=Counter)
    # A Counter would cost the fan-out three times as much.
    deliveries: defaultdict[str, int] = attrs.field(factory=lambda: defaultdict(int))
    delivered_bytes: int = 0
    merged: Counter[str] = attrs.field(factory=Counter)
    dropped: Counter[str] = attrs.field(factory=Counter)
    pending_bytes: int = 0
    to_socket: Histogram = attrs.field(factory=lambda: Histogram(_TO_SOCKET_S))

    def delivered(self, channel: str, count: int, size: int, merged: int = 0) -> None:
        """Count a value that so many peers were sent, in a frame of so many bytes.

        Args:
            channel: Where it was published.
            count: To how many peers.
            size: How long its frame is.
            merged: How many values before it went out in it only.
        """
        family = family_of(channel)
        self.deliveries[family] += count
        self.delivered_bytes += count * size
        if merged:
            self.merged[family] += merged
