"""How a connection is closed where no close frame of its peer has said so."""

from __future__ import annotations

from typing import Final

from trading_push.errors import CloseCode, SendTimeout, TransportClosed
from trading_push.transport.base import ABNORMAL, Close

__all__ = ["RESTART", "at_cancellation", "at_deadline", "of_transport"]

RESTART: Final = Close(CloseCode.SERVICE_RESTART, "service restart", ours=True)
"""The service ends."""


def of_transport(error: TransportClosed) -> Close:
    """The close of a connection whose stream has ended."""
    if isinstance(error, SendTimeout):
        return Close(CloseCode.TOO_SLOW, "too slow", ours=True)
    return ABNORMAL


def at_deadline(*, authenticated: bool) -> Close:
    """The close of a connection whose time is up, and whose peer is still there."""
    if authenticated:
        return Close(CloseCode.TOKEN_EXPIRED, "token expired", ours=True)
    return Close(CloseCode.AUTHENTICATION_TIMEOUT, "not authenticated in time", ours=True)


def at_cancellation(gone: bool | None) -> Close:
    """The close of a connection that somebody else has cancelled.

    A server cancels what outlives its peer. Only if the peer is known to be there (`gone` is
    False, and not None) is it the server itself that ends.
    """
    return RESTART if gone is False else ABNORMAL
