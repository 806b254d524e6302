"""A connection as the registry knows it, how it left, and the counters of what began and ended."""

from __future__ import annotations

import attrs

from trading_push.connections.subscription import Subscription
from trading_push.topics import Topic
from trading_push.transport.base import Close

__all__ = ["Departure", "Ledger", "Member"]


@attrs.define
class Ledger:
    """What began and what ended since the start; equal when no connection is open."""

    connections_opened: int = 0
    connections_closed: int = 0
    subscriptions_opened: int = 0
    subscriptions_closed: int = 0
    senders_started: int = 0
    senders_ended: int = 0

    @property
    def balanced(self) -> bool:
        """Whether everything that began has ended."""
        return (
            self.connections_opened == self.connections_closed
            and self.subscriptions_opened == self.subscriptions_closed
            and self.senders_started == self.senders_ended
        )


@attrs.define(eq=False)
class Member:
    """One connection as the registry knows it; `user` is None until it has authenticated."""

    id: str
    address: str
    endpoint: str = ""
    user: str | None = None
    subscriptions: dict[Topic, Subscription] = attrs.field(factory=dict)
    present: bool = False


@attrs.frozen
class Departure:
    """How a connection ended.

    Args:
        close: The close code and reason that decided.
        found_by_send: It was a send that found the peer gone.
    """

    close: Close
    found_by_send: bool = False
