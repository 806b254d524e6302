"""How a connection is closed if its peer has sent no close frame, and the last words to it."""

from __future__ import annotations

import random
from typing import Final

from trading_push.connections.opening import Opening
from trading_push.errors import CloseCode, SendTimeout, TransportClosed
from trading_push.protocol import frames, messages
from trading_push.protocol.session import Session
from trading_push.transport.base import ABNORMAL, Close

__all__ = [
    "RESTART",
    "at_cancellation",
    "at_deadline",
    "internal_error",
    "of_transport",
    "shutdown_notice",
]

_RECONNECT_AFTER_MS: Final = (500, 3000)

RESTART: Final = Close(CloseCode.SERVICE_RESTART, "service restart", ours=True)
"""The service ends."""


def of_transport(error: TransportClosed) -> Close:
    """The close of a connection whose stream has ended."""
    if isinstance(error, SendTimeout):
        return Close(CloseCode.TOO_SLOW, "too slow", ours=True)
    return ABNORMAL


def at_deadline(authenticated: bool, opening: Opening) -> Close:
    """The close of a connection whose time is up, and whose peer is still there."""
    if authenticated:
        return Close(CloseCode.TOKEN_EXPIRED, "token expired", ours=True)
    reason = "not authenticated in time" + ": ?token= is not read" * opening.token_in_url
    return Close(CloseCode.AUTHENTICATION_TIMEOUT, reason, ours=True)


def at_cancellation(gone: bool | None) -> Close:
    """The close of a connection that somebody else has cancelled.

    A server cancels what outlives its peer. Only if the peer is known to be there (`gone` is
    False, and not None) is it the server itself that ends.
    """
    return RESTART if gone is False else ABNORMAL


def shutdown_notice() -> bytes:
    """The last message before the service ends, with a time to come back that differs for each."""
    return messages.encode(messages.Notice("shutdown", random.randint(*_RECONNECT_AFTER_MS)))


def internal_error(session: Session) -> bytes:
    """The frame of the reply to a request that the server has failed at."""
    return frames.frame(messages.encode(session.failed()))
