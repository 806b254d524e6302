"""Why a connection ended: whether the client comes back after it, and when.

Three rules say who is believed:

1. The server's word is its messages, and the code of a close frame that it sent.
2. An HTTP status may come from anything that stands between. One that says that there is no such
   thing here (200, 3xx, 400, 401, 403, 404, 421) is believed until the client has been connected
   once.
3. A close code that no frame brought was made up by our own library: 1006, the 1002 that wsproto
   makes of a 1014, the 1009 of a message over our own limit. It never ends the client.
"""

from __future__ import annotations

import random
from typing import Final

import trio
import trio_websocket
from wsproto.connection import ConnectionState

from trading_push import supervision
from trading_push.errors import AuthenticationError, CloseCode, TradingPushError, may_reconnect
from trading_push.transport.outbound import CONNECTION_ERRORS, first_of

__all__ = ["FINAL", "ConnectionLost", "Refused", "Unreachable", "back_off", "end_of"]

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
    """The connection is over, and another one is due.

    Args:
        why: The reason, in words for a person.
        after_s: How long the server asked to wait, in seconds; None for the back-off.
    """

    def __init__(self, why: str, after_s: float | None = None) -> None:
        super().__init__(why)
        self.after_s = after_s


FINAL: Final = (AuthenticationError, Refused)
"""What ends the client for good, whenever it is raised."""


def back_off(failures: int) -> float:
    """Compute the wait after so many failures in a row, in seconds, at random below its bound.

    The randomness keeps the clients of a server that restarts from coming back all at once.
    """
    longest = supervision.back_off(failures, BACKOFF_FIRST_S, BACKOFF_MOST_S)
    return longest * random.uniform(0.5, 1)


def end_of(
    group: BaseExceptionGroup[BaseException],
    socket: trio_websocket.WebSocketConnection | None,
    *,
    advice_s: float | None,
    has_succeeded: bool,
) -> BaseException:
    """Reduce what ended a connection to the one exception that says why.

    The connection's nursery may hold several: what we made of the end, and what trio-websocket's
    reader did. A bug, and a cancellation, stay the group that they are.

    Args:
        group: What the connection raised.
        socket: The connection; None where its handshake was not done.
        advice_s: How long the server's last notice asked to wait; None where there was none.
        has_succeeded: Whether the client has been connected before.
    """
    final = group.subgroup(FINAL)
    if final is not None:
        return first_of(final)
    unknown = group.split((ConnectionLost, *CONNECTION_ERRORS))[1]
    if unknown is not None:
        return unknown
    error = first_of(group.subgroup(ConnectionLost) or group)
    match error:
        case ConnectionLost():
            return error
        case trio_websocket.ConnectionClosed():
            by_server = socket is not None and _has_sent_close(socket)
            return _closed(error.reason, by_server, advice_s)
        case trio_websocket.ConnectionRejected():
            return _rejected(error.status_code, has_succeeded)
        case trio.TooSlowError():
            return ConnectionLost("the server does not answer")
        case OSError():
            return ConnectionLost(error.strerror or str(error))
        case trio.BrokenResourceError() if isinstance(error.__cause__, OSError):  # of TLS
            return ConnectionLost(error.__cause__.strerror or str(error.__cause__))
        case _:
            return ConnectionLost("the connection was lost")


def _has_sent_close(socket: trio_websocket.WebSocketConnection) -> bool:
    """Whether the peer has sent a close frame.

    trio-websocket gives a reason for any end, made up if need be. Only a close frame brings wsproto
    into these states: after what it cannot parse, or what trio-websocket finds too long, it stays
    open or closing.
    """
    return socket._wsproto.state in (ConnectionState.REMOTE_CLOSING, ConnectionState.CLOSED)


def _closed(
    reason: trio_websocket.CloseReason | None, by_server: bool, advice_s: float | None
) -> Exception:
    code = CloseCode.ABNORMAL if reason is None else reason.code
    words = "" if reason is None or not reason.reason else f" {reason.reason!r}"
    if not by_server:
        return ConnectionLost(f"the connection broke: {int(code)}{words}", advice_s)
    why = f"the server closed the connection: {int(code)}{words}"
    if may_reconnect(code):
        return ConnectionLost(why, advice_s)
    if code == CloseCode.BAD_TOKEN:
        return AuthenticationError(why)
    return Refused(why, code)


def _rejected(status: int, has_succeeded: bool) -> Exception:
    why = f"the server, or a proxy in front of it, refused the handshake: HTTP {status}"
    if has_succeeded or status not in _NOTHING_HERE:
        return ConnectionLost(why)
    if status in (401, 403):
        return AuthenticationError(why)
    return Refused(f"there is no WebSocket at this URL: HTTP {status}; check its host and its path")
