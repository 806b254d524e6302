"""Admission: a handshake is let in by its path, its page, the limits and a token in its headers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

import attrs
import trio

from trading_push import logs
from trading_push.auth.principal import Handshake, Principal, bearer
from trading_push.connections.context import Context
from trading_push.connections.opening import Opening
from trading_push.connections.seats import NoSeat, Seat
from trading_push.errors import AuthenticationError, SourceError, TradingPushError
from trading_push.transport.descriptors import BUSY
from trading_push.transport.local import is_local_request, is_loopback_origin
from trading_push.transport.origin import is_allowed, is_origin, is_own_or_named
from trading_push.transport.proxies import client_address
from trading_push.transport.push_stream import PushStream

__all__ = ["REASONS", "Refused", "Request", "admit", "refuse_unread", "unserved"]

REASONS: Final = (
    "path",
    "origin",
    "token",
    "unavailable",
    "connections",
    "address",
    "shutdown",
    "error",
)
"""Why a handshake is refused, as it is counted; `unavailable` is a token that cannot be checked."""

_REFUSAL_S: Final = 1.0


class Refused(TradingPushError):
    """The handshake is answered with an HTTP status and a reason instead of being accepted.

    Args:
        status: The HTTP status.
        why: The body of the answer.
        reason: One of `REASONS`, for counts.
    """

    def __init__(self, status: int, why: str, reason: str) -> None:
        super().__init__(why)
        self.status = status
        self.reason = reason
        self.body = why.encode() + b"\n"
        self.headers = [(b"content-type", b"text/plain; charset=utf-8")]
        if status == 401:
            self.headers.append((b"www-authenticate", b"Bearer"))


@attrs.frozen
class Request:
    """The request of a handshake.

    Args:
        path: The path asked for, without its query.
        query: What stands behind its `?`.
        headers: Names in lower case.
        peer: The address at the other end of the socket.
        address: The client's own, behind the trusted proxies; for limits and the log.
    """

    path: str
    query: str
    headers: list[tuple[bytes, bytes]]
    peer: str
    address: str

    @classmethod
    def of(
        cls,
        context: Context,
        path: str,
        query: str,
        headers: Iterable[tuple[bytes, bytes]],
        peer: str,
    ) -> Request:
        """Find the client's address in it."""
        headers = list(headers)
        address = client_address(peer, headers, context.trusted_proxies)
        return cls(path, query, headers, peer, address)

    def values(self, wanted: bytes) -> list[str]:
        """The values of a header."""
        return [value.decode("latin-1").strip() for name, value in self.headers if name == wanted]


async def admit(context: Context, seat: Seat, request: Request) -> Opening:
    """Let a handshake in.

    Args:
        context: What the connections share.
        seat: Its place among the connections; without a user it is one of its address, too.
        request: What is asked for, by whom.

    Raises:
        Refused: With the status to answer: 404, 403 for a page of another origin, 401, 503, or 500
            for a bug in `authenticate` (one trace).
    """
    if request.path != context.path:
        raise unserved(context, request.path, request.address)
    _check_origin(context, request)
    if not context.connections.accepting:
        raise Refused(503, "shutting down", "shutdown")

    # Who it is: by a token, or by what an `authenticate` of the application sees in the handshake.
    tokens = (bearer(value) for value in request.values(b"authorization"))
    token = next((token for token in tokens if token is not None), None)
    handshake = Handshake.of(request.headers, request.query, request.address)
    principal = None
    if token is not None or context.tokens.sees_handshake:
        principal = await _principal(context, token, handshake)
        if not context.connections.accepting:  # while it was being checked, the end has come
            raise Refused(503, "shutting down", "shutdown")
    if principal is not None and token is None:
        principal = _by_session(context, request, principal)

    # Without a user, it is one of its address.
    token_in_url = principal is None and "token" in handshake.query
    if token_in_url:
        context.notices.token_in_url(request.address)
    if principal is None:
        try:
            seat.hold_unauthenticated(request.address)
        except NoSeat as error:
            raise Refused(503, str(error), "address") from None
    seen_again = handshake if context.tokens.sees_handshake else None
    return Opening(principal, seen_again, token_in_url)


def unserved(context: Context, path: str, address: str) -> Refused:
    """The answer to a request for a path that nobody serves; the log tells of it, too."""
    context.notices.unserved(path, address)
    return Refused(404, f"nothing is served here: the WebSocket is at {context.path}", "path")


def _check_origin(context: Context, request: Request) -> None:
    origins = request.values(b"origin")
    host = next(iter(request.values(b"host")), None)
    if not origins and not context.origin_required:
        return
    if origins and is_allowed(origins, host, context.origins):
        return
    # A developer's page on another port of this machine. Cookies do not know ports: where they
    # count, it could be anyone's page.
    if (
        len(origins) == 1
        and is_loopback_origin(origins[0])
        and not context.tokens.sees_handshake
        and is_local_request(request.peer, request.headers, context.trusted_proxies)
    ):
        return
    origin, address = " ".join(origins), request.address
    if not origins:
        context.strangers.emit(logs.line("origin_missing", address=address))
        why = "send an Origin: the server requires one (server.origin_required)"
        raise Refused(403, why, "origin")
    if is_origin(origin) and origin != "null":  # which any page can have
        context.strangers.emit(logs.line("origin_unlisted", origin=origin, address=address))
    else:
        context.strangers.emit(logs.line("origin_refused", origin=origin, address=address))
    raise Refused(403, "pages of this origin may not connect: see server.origins", "origin")


async def _principal(context: Context, token: str | None, handshake: Handshake) -> Principal | None:
    try:
        with trio.fail_after(context.limits.authentication_timeout_s):
            return await context.tokens.of_handshake(token, handshake)
    except AuthenticationError as error:
        raise Refused(401, error.message, "token") from None
    except (SourceError, trio.TooSlowError):
        raise Refused(503, "the token cannot be checked now", "unavailable") from None
    except Exception as error:  # the application's own code: one trace, one answer
        logs.emit(logs.traced("internal_error", error, address=handshake.address))
        raise Refused(500, "an error in the server; try again later", "error") from None


def _by_session(context: Context, request: Request, principal: Principal) -> Principal | None:
    """The principal of a handshake without a token, if a page that may do so has sent it.

    A browser sends its cookies with the handshake of any page: only the `Origin` tells whose page
    it is. Without an expiry, the session ends after `auth.cookie_session_s`.
    """
    origins = request.values(b"origin")
    host = next(iter(request.values(b"host")), None)
    if len(origins) != 1 or not is_own_or_named(origins[0], host, context.origins):
        context.strangers.emit(logs.line("session_refused", address=request.address))
        return None
    if principal.expires_at is not None:
        return principal
    return attrs.evolve(principal, expires_at=time.time() + context.cookie_session_s)


async def refuse_unread(stream: PushStream) -> None:
    """Answer 503 to whatever the peer asks for, within a second; the caller closes the stream."""
    with trio.move_on_after(_REFUSAL_S):
        try:
            if hasattr(stream, "do_handshake"):
                await stream.do_handshake()
            await stream.send_all(BUSY)
            await stream.send_eof()
            while await stream.receive_some():
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError, AttributeError):
            pass  # it has gone; or there is no end of file over TLS
