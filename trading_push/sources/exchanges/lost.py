"""What the end of a connection to an exchange means."""

from __future__ import annotations

from typing import Any, Final

import h11
import trio
import trio_websocket
import wsproto.utilities

from trading_push.errors import SourceError

__all__ = ["LOST", "explained"]

# What a network, or a peer that is no such exchange, can make of a connection.
LOST: Final = (
    SourceError,
    OSError,
    UnicodeError,  # a host name that IDNA refuses
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    trio_websocket.ConnectionClosed,
    trio_websocket.HandshakeError,
    wsproto.utilities.ProtocolError,  # also raised by a ping that comes after our own close
    h11.ProtocolError,  # a handshake so wrong that trio-websocket fails at answering it
)


def explained(group: BaseExceptionGroup[Any]) -> SourceError:
    """Why a connection was lost, in words; of several reasons, the first."""
    error = _innermost(group)
    if isinstance(error, SourceError):
        return error
    if isinstance(error, trio_websocket.ConnectionClosed):
        reason = error.reason
        if reason is None:
            return SourceError("the connection was closed")
        return SourceError(
            f"the connection was closed: {reason.code} {reason.reason or ''}".strip()
        )
    if isinstance(error, trio_websocket.ConnectionRejected):
        return SourceError(f"the handshake was refused with status {error.status_code}")
    if isinstance(error, trio.TooSlowError):
        return SourceError("there was no answer to the handshake in time")
    if isinstance(error, OSError):
        return SourceError(error.strerror or type(error).__name__)
    return SourceError(type(error).__name__)


def _innermost(error: BaseException) -> BaseException:
    """What has gone wrong at last: trio says so in groups, and in causes."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif isinstance(error, trio.BrokenResourceError) or (
            isinstance(error, OSError) and error.strerror is None
        ):
            if error.__cause__ is None:
                return error
            error = error.__cause__
        else:
            return error
