"""Why a connection ended: whether the client comes back after it, and when.

Three rules say who is believed:

1. The server's word is its messages, and the code of a close frame that it sent.
2. An HTTP status may come from anything that stands between. One that says that there is no such
   thing here (200, 3xx, 400, 401, 403, 404, 421) is believed until the client has been connected
   once.
3. A close code that no frame brought was made up by our own library: 1006, the 1002 that wsproto
   makes of a 1014, the 1009 of a message over our own limit. It never ends the client.

What a library raises is turned into these words where that library is used: `connection` for trio,
`websockets_link` for the others.
"""

from __future__ import annotations

import random
from typing import Final

from trading_push.errors import AuthenticationError, CloseCode, TradingPushError, may_reconnect

__all__ = [
    "FINAL",
    "ConnectionLost",
    "Refused",
    "Unreachable",
    "back_off",
    "closed",
    "no_token",
    "not_a_url",
    "rejected",
]

BACKOFF_FIRST_S: Final = 0.2
BACKOFF_MOST_S: Final = 15.0
LASTING_S: Final = 15.0
"""A connection that was of use for so long lets the back-off begin anew."""

_NOTHING_HERE: Final = frozenset({200, *range(300, 400), 400, 401, 403, 404, 421})
"""The statuses of a handshake that another try does not change, if they are the server's."""


class Refused(TradingPushError):
    """The server said not to come back; `code` is its close code, 0 where it sent none.

    A function that gives tokens raises it to end the client: there will be no other token.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Unreachable(TradingPushError):
    """No connection came about."""


class ConnectionLost(Exception):
    """The connection is over, and another one is due; the text says why, for a person."""


FINAL: Final = (AuthenticationError, Refused)
"""What ends the client for good, whenever it is raised."""


def back_off(failures: int) -> float:
    """Compute the wait after so many failures in a row, in seconds, at random below its bound.

    The randomness keeps the clients of a server that restarts from coming back all at once.
    """
    # The exponent is bounded because a float would overflow after a thousand failures.
    longest = min(BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 30), BACKOFF_MOST_S)
    return longest * random.uniform(0.5, 1)


def not_a_url(url: str) -> str:
    """Say what to do about a URL that is not one of a WebSocket."""
    return f"{url[:200]!r} is no WebSocket URL: give one like ws://127.0.0.1:8000/ws"


def no_token(error: Exception) -> Exception:
    """Judge what the application's function raised in place of a token."""
    if isinstance(error, FINAL):
        return error
    why = f"{type(error).__name__}: {error}"
    return ConnectionLost(f"the function that gives the token failed: {why}")


def closed(code: int, reason: str, *, by_server: bool) -> Exception:
    """Judge a close.

    Args:
        code: The close code.
        reason: The text beside it.
        by_server: Whether the server's own close frame brought them.
    """
    words = f" {reason!r}" if reason else ""
    if not by_server:
        return ConnectionLost(f"the connection broke: {int(code)}{words}")
    why = f"the server closed the connection: {int(code)}{words}"
    if may_reconnect(code):
        return ConnectionLost(why)
    if code == CloseCode.BAD_TOKEN:
        return AuthenticationError(why)
    return Refused(why, code)


def rejected(status: int, *, has_succeeded: bool) -> Exception:
    """Judge a handshake that was answered with another HTTP status than 101.

    Args:
        status: The status.
        has_succeeded: Whether the client has been connected before.
    """
    why = f"the server, or a proxy in front of it, refused the handshake: HTTP {status}"
    if has_succeeded or status not in _NOTHING_HERE:
        return ConnectionLost(why)
    if status in (401, 403):
        return AuthenticationError(why)
    return Refused(f"there is no WebSocket at this URL: HTTP {status}; check its host and its path")
