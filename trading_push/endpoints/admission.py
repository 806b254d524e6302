"""Admission: a handshake is let in by its path, its page, the limits and a token in its headers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import trio

from trading_push import logs
from trading_push.auth.principal import Principal, bearer
from trading_push.connections.context import Context
from trading_push.connections.seats import NoSeat, Seat
from trading_push.errors import AuthenticationError, SourceError, TradingPushError
from trading_push.transport.origin import is_allowed
from trading_push.transport.push_stream import PushStream

__all__ = ["Refused", "admit", "refuse_unread"]

_BUSY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 5\r\n"
    b"connection: close\r\n\r\n"
)
_REFUSAL_S: Final = 1.0


class Refused(TradingPushError):
    """The handshake is answered with an HTTP status and a reason instead of being accepted."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.body = why.encode() + b"\n"
        self.headers = [(b"content-type", b"text/plain; charset=utf-8")]
        if status == 401:
            self.headers.append((b"www-authenticate", b"Bearer"))


async def admit(
    context: Context, seat: Seat, path: str, headers: Iterable[tuple[bytes, bytes]], address: str
) -> Principal | None:
    """Let a handshake in.

    Args:
        context: What the connections share.
        seat: Its place among the connections; without a token it is one of its address, too.
        path: The path asked for, without its query.
        headers: The request's, names in lower case.
        address: The peer's, for the log.

    Returns:
        The principal of an `Authorization: Bearer` header; None without one.

    Raises:
        Refused: With the status to answer: 404, 403 for a page of another origin, 401, 503, or 500
            for a bug in `authenticate` (one trace).
    """
    if path != context.path:
        raise Refused(404, f"the WebSocket is at {context.path}")
    headers = list(headers)
    origins = _values(headers, b"origin")
    host = next(iter(_values(headers, b"host")), None)
    if not (origins or not context.origin_required) or not is_allowed(
        origins, host, context.origins
    ):
        logs.emit(logs.line("origin_refused", origin=" ".join(origins) or "-", address=address))
        raise Refused(403, "pages of this origin may not connect: see server.origins")
    if not context.connections.accepting:
        raise Refused(503, "shutting down")
    tokens = (bearer(value) for value in _values(headers, b"authorization"))
    token = next((token for token in tokens if token is not None), None)
    if token is None:
        try:
            seat.hold_unauthenticated(address)
        except NoSeat as error:
            raise Refused(503, str(error)) from None
        return None
    try:
        with trio.fail_after(context.limits.authentication_timeout_s):
            principal = await context.tokens.principal(token)
    except AuthenticationError as error:
        raise Refused(401, error.message) from None
    except (SourceError, trio.TooSlowError):
        raise Refused(503, "the token cannot be checked now") from None
    except Exception as error:  # the application's own code: one trace, one answer
        logs.emit(logs.traced("internal_error", error, address=address))
        raise Refused(500, "an error in the server; try again later") from None
    if not context.connections.accepting:  # while the token was being checked, the end has come
        raise Refused(503, "shutting down")
    return principal


async def refuse_unread(stream: PushStream) -> None:
    """Answer 503 to whatever the peer asks for, within a second; the caller closes the stream."""
    with trio.move_on_after(_REFUSAL_S):
        try:
            if hasattr(stream, "do_handshake"):
                await stream.do_handshake()
            await stream.send_all(_BUSY)
            await stream.send_eof()
            while await stream.receive_some():
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError, AttributeError):
            pass  # it has gone; or there is no end of file over TLS


def _values(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for name, value in headers if name == wanted]
