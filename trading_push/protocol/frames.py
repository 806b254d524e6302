"""Pushes as JSON, and WebSocket frames (RFC 6455 section 5.2): one text frame for one message.

What stands here is called for every delivery: a push is put together from bytes, and its data,
by far the longest part, are the same object for all subscribers and are never gone through again.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Final

import msgspec

__all__ = [
    "PING",
    "REASON_BYTES",
    "channel_head",
    "frame",
    "payload_of",
    "push",
    "split",
    "status_push",
]

PING: Final = b"\x89\x00"
"""A ping frame without a payload (RFC 6455 section 5.5.2)."""
REASON_BYTES: Final = 123
"""How long the reason of a close frame may be: a control frame carries 125 bytes, and the close
code takes two of them (RFC 6455 section 5.5)."""

_TEXT: Final = 0x81  # FIN and the opcode of text; a server does not mask
_head_16 = struct.Struct("!BBH").pack

_encode: Final = msgspec.json.Encoder().encode


def push(
    head: bytes,
    type_: bytes,
    epoch: str,
    prev: int | None,
    seq: int,
    ts: int,
    data: bytes,
    *,
    merged: int = 0,
    dropped: int = 0,
) -> bytes:
    """Make a snapshot or an update as JSON, around data that are encoded already.

    Args:
        head: The `channel_head` of the channel.
        type_: `snapshot` or `update`.
        epoch: The epoch that the numbers belong to.
        prev: The number of the value that this subscription was sent before; None in a snapshot.
        seq: The number of the value.
        ts: When it was published, in milliseconds since the epoch.
        data: The value.
        merged: How many values this one stands for; 0 if only for itself.
        dropped: How many events were left out before it.
    """
    middle = b"" if prev is None else b'"prev":%d,' % prev
    extra = b""
    if merged:
        extra = b'"merged":%d,' % merged
    if dropped:
        extra += b'"dropped":%d,' % dropped
    return b'%s"%s","epoch":"%s",%s"seq":%d,%s"ts":%d,"data":%s}' % (
        head,
        type_,
        epoch.encode(),
        middle,
        seq,
        extra,
        ts,
        data,
    )


@lru_cache(4096)
def channel_head(channel: str) -> bytes:
    """How every push of a channel begins; the same object for all of its subscribers."""
    return b'{"channel":%s,"type":' % _encode(channel)


def status_push(head: bytes, state: str, reason: str | None, ts: int) -> bytes:
    """Make a status push as JSON."""
    why = b"" if reason is None else b'"reason":%s,' % _encode(reason)
    return b'%s"status","state":"%s",%s"ts":%d}' % (head, state.encode(), why, ts)


def frame(payload: bytes) -> bytes:
    """Make one unmasked WebSocket text frame."""
    length = len(payload)
    if length < 126:
        return bytes((_TEXT, length)) + payload
    if length < 65536:
        return _head_16(_TEXT, 126, length) + payload
    return bytes((_TEXT, 127)) + length.to_bytes(8, "big") + payload


def payload_of(frame: bytes) -> bytes:
    """The payload of a frame that `frame` made."""
    length = frame[1]
    return frame[2 if length < 126 else 4 if length == 126 else 10 :]


def split(data: bytes) -> list[bytes]:
    """Take joined frames apart, each of which `frame` made."""
    frames = []
    while data:
        length, head = data[1], 2
        if length == 126:
            length, head = int.from_bytes(data[2:4], "big"), 4
        elif length == 127:
            length, head = int.from_bytes(data[2:10], "big"), 10
        frames.append(data[: head + length])
        data = data[head + length :]
    return frames
