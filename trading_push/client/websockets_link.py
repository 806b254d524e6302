"""What the clients on asyncio and on threads share: how they use the library `websockets`."""

from __future__ import annotations

from typing import Any, Final

from trading_push.client import ending
from trading_push.client.core import CONNECT_TIMEOUT_S, MESSAGE_BYTES
from trading_push.client.ending import FINAL, ConnectionLost
from trading_push.errors import CloseCode, innermost
from trading_push.protocol.messages import SUBPROTOCOL

try:
    from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
    from websockets.typing import Subprotocol
except ImportError as error:  # it is installed with the extra `aio` only
    raise ImportError(
        "this client needs the library websockets: pip install 'trading_push[aio]'"
    ) from error

__all__ = ["CLOSE_TIMEOUT_S", "HandshakeRejected", "judged", "options"]

CLOSE_TIMEOUT_S: Final = 1.0
"""How long a polite close waits for the server's close frame."""


class HandshakeRejected(Exception):
    """A handshake was answered with another HTTP status than 101.

    The connections raise it in place of `InvalidStatus`, because the library follows a redirect by
    itself: the token would go where the application has not sent it.
    """

    def __init__(self, error: InvalidStatus) -> None:
        super().__init__(str(error))
        self.status = error.response.status_code


def options() -> dict[str, Any]:
    """Return the library's options that both clients use."""
    return {
        "subprotocols": [Subprotocol(SUBPROTOCOL)],
        "compression": None,  # the server never agrees to any
        "proxy": None,
        "user_agent_header": None,
        "open_timeout": CONNECT_TIMEOUT_S,
        "close_timeout": CLOSE_TIMEOUT_S,
        "ping_interval": None,  # the core watches for silence
        "max_size": MESSAGE_BYTES,
    }


def judged(error: BaseException, *, has_succeeded: bool) -> BaseException:
    """Reduce what ended a connection to the one exception that says why; a bug stays what it is.

    Args:
        error: What the connection raised.
        has_succeeded: Whether the client has been connected before.
    """
    if isinstance(error, BaseExceptionGroup):
        # Of a reader and of a renewal, say; what ends the client counts more than what follows.
        error = innermost(error.subgroup(FINAL) or error, first=True)
    match error:
        case HandshakeRejected():
            return ending.rejected(error.status, has_succeeded=has_succeeded)
        case ConnectionClosed():
            return _closed(error)
        case TimeoutError():
            return ConnectionLost("the server does not answer")
        case OSError():
            return ConnectionLost(error.strerror or str(error))
        case WebSocketException():
            return ConnectionLost(f"the handshake failed: {str(error)[:200]}")
        case UnicodeError():  # a host name that IDNA refuses
            return ConnectionLost("the host's name cannot be looked up")
        case _:
            return error


def _closed(error: ConnectionClosed) -> Exception:
    # Where we sent a close frame first, the server's only answers it.
    by_server = error.rcvd is not None and (error.sent is None or bool(error.rcvd_then_sent))
    close = error.rcvd if by_server else error.sent
    if close is None:
        return ending.closed(CloseCode.ABNORMAL, "", by_server=False)
    return ending.closed(close.code, close.reason, by_server=by_server)
