"""What a session asks of the connection that it belongs to, as plain values."""

from __future__ import annotations

import attrs

from trading_push.errors import CloseCode
from trading_push.protocol import messages
from trading_push.protocol.messages import Id, ItemResult, Since
from trading_push.topics import Topic

__all__ = [
    "Action",
    "CheckToken",
    "End",
    "Reply",
    "Subscribe",
    "Unsubscribe",
    "Wanted",
]


@attrs.frozen
class Reply:
    """Send this reply."""

    message: messages.Reply


@attrs.frozen
class CheckToken:
    """Check this token, then call `authenticated` or `refused`."""

    id: Id
    token: str = attrs.field(repr=False)


@attrs.frozen
class Wanted:
    """One new subscription; `result` is its part of the reply."""

    topic: Topic
    max_hz: float | None
    since: Since | None
    result: ItemResult


@attrs.frozen
class Subscribe:
    """Begin `wanted`, set the rate of each of `throttled` (times a second), then send `reply`.

    A rate of None is as often as there is something to push.
    """

    reply: messages.ItemsReply
    wanted: tuple[Wanted, ...]
    throttled: tuple[tuple[Topic, float | None], ...]


@attrs.frozen
class Unsubscribe:
    """End these subscriptions, then send `reply`."""

    reply: messages.ItemsReply
    topics: tuple[Topic, ...]


@attrs.frozen
class End:
    """Close the connection."""

    code: CloseCode
    reason: str


Action = Reply | CheckToken | Subscribe | Unsubscribe | End
