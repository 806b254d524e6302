"""Who may ask for what over HTTP: by a token as Bearer, and by nothing else.

No cookie counts, so that no page can act for its visitor.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import msgspec
import trio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from trading_push import logs
from trading_push.auth.principal import Principal, bearer
from trading_push.auth.revocation import RevokedTokens
from trading_push.errors import AuthenticationError, ErrorCode, SourceError

__all__ = ["Access", "Refused", "bad_request", "json_response", "read_body"]


class Refused(Exception):
    """A request is answered with an error.

    Args:
        status: The HTTP status.
        code: The error's code.
        message: What is wrong and what to do.
        headers: More headers of the answer.
    """

    def __init__(
        self, status: int, code: ErrorCode, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers

    def response(self) -> Response:
        """Make the answer."""
        error = {"code": self.code, "message": str(self)}
        return json_response({"ok": False, "error": error}, self.status, self.headers)


class Access:
    """Finds out who asks.

    Args:
        check: Returns the principal of a token that came from an address; raises
            AuthenticationError, or SourceError if it cannot tell.
        revoked: The tokens that are refused although they are good otherwise.
        check_timeout_s: How long `check` may take.
    """

    def __init__(
        self,
        check: Callable[[str, str], Awaitable[Principal]],
        revoked: RevokedTokens,
        check_timeout_s: float,
    ) -> None:
        self._check = check
        self._revoked = revoked
        self._check_timeout_s = check_timeout_s

    async def principal(self, request: Request, wanted: str) -> Principal:
        """Find out who asks.

        Args:
            request: The request.
            wanted: What their token has to allow, for the error.

        Raises:
            Refused: With 401, 503, or 500 for a bug in `check` (one trace).
        """
        token = bearer(request.headers.get("authorization", ""))
        if token is None:
            message = f"send Authorization: Bearer with a token that may {wanted}"
            raise _unauthorized(ErrorCode.NOT_AUTHENTICATED, message)
        address = request.client.host if request.client else "-"
        try:
            with trio.fail_after(self._check_timeout_s):
                principal = await self._check(token, address)
        except AuthenticationError as error:
            raise _unauthorized(error.code, error.message) from None
        except (SourceError, trio.TooSlowError):
            message = "the token cannot be checked now"
            raise Refused(503, ErrorCode.INTERNAL, message) from None
        except Exception as error:  # the application's own code: one trace, one answer
            logs.emit(logs.traced("internal_error", error, address=address))
            message = "an error in the server; try again later"
            raise Refused(500, ErrorCode.INTERNAL, message) from None
        self.refuse_ended(principal)
        return principal

    def refuse_ended(self, principal: Principal) -> None:
        """Refuse, with 401, whose token has expired or was revoked by now."""
        expires_at = principal.expires_at
        if expires_at is not None and expires_at + self._revoked.leeway_s < time.time():
            raise _unauthorized(ErrorCode.TOKEN_EXPIRED, "the token has expired")
        try:
            self._revoked.check(principal)
        except AuthenticationError as error:
            raise _unauthorized(error.code, error.message) from None


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """Read a request's body; Refused with 413 or 400 where it is too long, or not whole."""
    body = bytearray()
    try:
        async with aclosing(request.stream()) as parts:
            async for part in parts:
                body += part
                if len(body) > limit_bytes:
                    message = f"the body is longer than {limit_bytes} bytes: send fewer"
                    raise Refused(413, ErrorCode.BAD_REQUEST, message)
    except ClientDisconnect:
        raise bad_request("the body is not whole") from None
    return bytes(body)


def bad_request(message: str) -> Refused:
    """A request that cannot be understood."""
    return Refused(400, ErrorCode.BAD_REQUEST, message)


def json_response(
    content: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Answer with an object that msgspec encodes."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def _unauthorized(code: ErrorCode, message: str) -> Refused:
    return Refused(401, code, message, {"WWW-Authenticate": "Bearer"})
