"""The client's view of the wire: one type that fits every message of a server, and the pushes.

The client reads leniently: a member that it does not know, of a later version of the protocol, is
passed over.
"""

from __future__ import annotations

from typing import Any

import attrs
import msgspec

from trading_push.client.ending import ConnectionLost

__all__ = ["ErrorBody", "Message", "Push", "encode", "parse", "push_of"]


@attrs.frozen
class Push:
    """One push of the server, as it stood on the wire.

    Where the application is slow, the client merges values of a state as the server would.

    Args:
        channel: The channel's name as the server spells it.
        type: `snapshot` or `update` for a value, or `status` with `state` and `reason`.
        ts: When it was sent, in ms since the epoch.
        epoch: Within which `seq` counts the publications of the topic.
        seq: The number of the publication.
        prev: The `seq` of the push before; None in a snapshot.
        merged: How many publications this one stands for; 0 where it is only itself.
        dropped: How many events were lost before this snapshot.
        data: The payload; decimals are strings.
        state: Whether the channel is `live`, `stale` or `down`; of a status only.
        reason: Why, as a word for programs; of a status only.
        gap: Whether something was missing before this value, for which the channel was subscribed
            anew: it has come by now, or `type` is `snapshot`.
        json: The whole message; the newest one's where the client has merged several.
    """

    channel: str
    type: str
    ts: int
    epoch: str | None = None
    seq: int | None = None
    prev: int | None = None
    merged: int = 0
    dropped: int = 0
    data: Any = None
    state: str | None = None
    reason: str | None = None
    gap: bool = False
    json: str = attrs.field(default="", repr=False)


class ErrorBody(msgspec.Struct):
    """Why a request, or one of its items, was refused."""

    code: str = ""
    message: str = ""
    retryable: bool = False


class ItemResult(msgspec.Struct):
    """What became of one channel of a request."""

    channel: str | None = None
    ok: bool = False
    error: ErrorBody | None = None


class Message(msgspec.Struct):
    """Whatever a server of this protocol may send: a reply, a notice (`op`) or a push (`type`)."""

    op: str | None = None
    code: str | None = None
    id: int | str | None = None
    ok: bool = True
    error: ErrorBody | None = None
    results: list[ItemResult] = []
    channels: list[Any] = []
    user: str | None = None
    heartbeat_s: float = 15
    reconnect_after_ms: float | None = None
    channel: str | None = None
    type: str | None = None
    ts: int = 0
    epoch: str | None = None
    seq: int | None = None
    prev: int | None = None
    merged: int = 0
    dropped: int = 0
    data: Any = None
    state: str | None = None
    reason: str | None = None


_decode = msgspec.json.Decoder(Message).decode
_encode = msgspec.json.Encoder().encode


def encode(request: dict[str, Any]) -> str:
    """Encode a request."""
    return _encode(request).decode()


def parse(text: str | bytes) -> Message:
    """Decode a message of the server.

    Raises:
        ConnectionLost: It is not one of this protocol.
    """
    if isinstance(text, bytes):
        raise ConnectionLost("the server sent a binary message")
    try:
        return _decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        raise ConnectionLost("the server sent what this protocol does not have") from None


def push_of(message: Message, text: str | bytes, *, gap: bool = False) -> Push:
    """Make a push of a message that has a `channel` and a `type`."""
    assert message.channel is not None
    assert message.type is not None
    return Push(
        channel=message.channel,
        type=message.type,
        ts=message.ts,
        epoch=message.epoch,
        seq=message.seq,
        prev=message.prev,
        merged=message.merged,
        dropped=message.dropped,
        data=message.data,
        state=message.state,
        reason=message.reason,
        gap=gap,
        json=text if isinstance(text, str) else text.decode(),
    )
