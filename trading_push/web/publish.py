"""`POST /publish`: a back end pushes values over HTTP, one or many, at most once for each key.

The header `Idempotency-Key` is that of the IETF's draft of this name: who repeats a request because
its answer was lost repeats its key, and is given the first answer again.
"""

from __future__ import annotations

import codecs
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from typing import Any, Final

import attrs
import cachetools
import msgspec
import trio
from msgspec import Raw, Struct
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from trading_push import logs
from trading_push.auth.principal import Principal, bearer
from trading_push.auth.revocation import RevokedTokens
from trading_push.errors import (
    AuthenticationError,
    ErrorCode,
    PayloadError,
    ServiceClosed,
    SourceError,
)

__all__ = ["Publish", "PublishEndpoint"]

KEYS: Final = 10_000
"""How many keys of one publisher are remembered: with more, new ones must wait."""
KEY_TTL_S: Final = 600.0
KEY_CHARACTERS: Final = 255
SKIP_S: Final = 1.0
"""How long the body of a request that is refused may take."""
BODY_S: Final = 10.0
"""How long the body of any other may take."""
VALUES: Final = 1000
"""How many values one request may publish: nothing else is done meanwhile."""

Publish = Callable[[Iterable[tuple[str, Any, str | int | None]]], Awaitable[None]]


class _Value(Struct, forbid_unknown_fields=True):
    channel: str
    data: Raw
    user: str | int | None = None


_decode = msgspec.json.Decoder(_Value | list[_Value]).decode
_validate = msgspec.json.Decoder().decode


class _Refused(Exception):
    def __init__(
        self, status: int, code: ErrorCode, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers


@attrs.frozen
class _Done:
    """What a key has published, and when."""

    digest: bytes
    count: int
    at: float


_Keys = cachetools.TTLCache[str, _Done]


class PublishEndpoint:
    """The endpoint of one service.

    Args:
        check: Returns the principal of a token that came from an address; raises
            AuthenticationError, or SourceError if it cannot tell.
        publish: Publishes a batch, all or nothing: where it raises (ValueError, PayloadError),
            nothing; cancelled, all.
        limit_bytes: How long a request's body may be.
        revoked: The tokens that are refused although they are good otherwise.
        check_timeout_s: How long `check` may take.
    """

    def __init__(
        self,
        check: Callable[[str, str], Awaitable[Principal]],
        publish: Publish,
        limit_bytes: int,
        revoked: RevokedTokens,
        check_timeout_s: float,
    ) -> None:
        self._check = check
        self._publish = publish
        self._limit_bytes = limit_bytes
        self._revoked = revoked
        self._check_timeout_s = check_timeout_s
        # The keys of each publisher of the last ten minutes, oldest first; nobody's are thrown out
        # for another's. Put in anew with each new key, a publisher goes with the last of them.
        self._keys: cachetools.TTLCache[str, _Keys] = cachetools.TTLCache(
            math.inf, KEY_TTL_S, trio.current_time
        )

    async def answer(self, request: Request) -> Response:
        """Answer a request; see docs/publishing.md for what it takes and gives."""
        try:
            published = await self._take(request)
        except _Refused as refused:
            error = {"code": refused.code, "message": str(refused)}
            return _json({"ok": False, "error": error}, refused.status, refused.headers)
        return _json({"ok": True, "published": published})

    async def _take(self, request: Request) -> int:
        refused: _Refused | None = None
        try:
            principal = await self._principal(request)
            allowed = _allowed(principal)
        except _Refused as error:
            refused = error
        if refused is not None:
            # Answered with its body unread, a connection cannot be used again.
            with suppress(_Refused), trio.move_on_after(SKIP_S):
                await self._body(request)
            raise refused
        with trio.move_on_after(BODY_S) as whole:
            body = await self._body(request)
        if whole.cancelled_caught:
            raise _Refused(408, ErrorCode.BAD_REQUEST, f"the body took longer than {BODY_S:g} s")
        values = _values(body)
        digest = hashlib.blake2b(body).digest()
        for value in values:
            if allowed is not None and value.channel not in allowed:
                raise _Refused(
                    403, ErrorCode.FORBIDDEN, f"the token does not allow {value.channel!r}"
                )
        key = request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= KEY_CHARACTERS:
            raise _bad_request(f"give an Idempotency-Key of 1 to {KEY_CHARACTERS} characters")
        # Nothing awaits from here to the publication: what is so now is so when it is published,
        # and no two requests with one key are under way. The body may have taken its time.
        self._refuse_ended(principal)
        keys = self._keys.get(principal.user)
        if keys is None:
            keys = cachetools.TTLCache(math.inf, KEY_TTL_S, trio.current_time)
        if key is not None:
            before = keys.get(key)
            if before is not None:
                if before.digest != digest:
                    message = "this Idempotency-Key has been used for another request"
                    raise _Refused(422, ErrorCode.BAD_REQUEST, message)
                return before.count
            _refuse_too_many(keys)
            keys[key] = _Done(digest, len(values), trio.current_time())
            self._keys[principal.user] = keys
        try:
            await self._publish((value.channel, value.data, value.user) for value in values)
        except Exception as error:
            if key is not None:
                keys.pop(key, None)
            if isinstance(error, ServiceClosed):
                raise _Refused(503, ErrorCode.INTERNAL, "shutting down") from None
            if isinstance(error, ValueError | PayloadError):
                raise _bad_request(str(error)) from None
            raise
        return len(values)

    async def _principal(self, request: Request) -> Principal:
        token = bearer(request.headers.get("authorization", ""))
        if token is None:
            message = "send Authorization: Bearer with a token that may publish"
            raise _unauthorized(ErrorCode.NOT_AUTHENTICATED, message)
        address = request.client.host if request.client else "-"
        try:
            with trio.fail_after(self._check_timeout_s):
                principal = await self._check(token, address)
        except AuthenticationError as error:
            raise _unauthorized(error.code, error.message) from None
        except (SourceError, trio.TooSlowError):
            message = "the token cannot be checked now"
            raise _Refused(503, ErrorCode.INTERNAL, message) from None
        except Exception as error:  # the application's own code: one trace, one answer
            logs.emit(logs.traced("internal_error", error, address=address))
            message = "an error in the server; try again later"
            raise _Refused(500, ErrorCode.INTERNAL, message) from None
        self._refuse_ended(principal)
        return principal

    def _refuse_ended(self, principal: Principal) -> None:
        expires_at = principal.expires_at
        if expires_at is not None and expires_at + self._revoked.leeway_s < time.time():
            raise _unauthorized(ErrorCode.TOKEN_EXPIRED, "the token has expired")
        try:
            self._revoked.check(principal)
        except AuthenticationError as error:
            raise _unauthorized(error.code, error.message) from None

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async with aclosing(request.stream()) as parts:
                async for part in parts:
                    body += part
                    if len(body) > self._limit_bytes:
                        message = f"the body is longer than {self._limit_bytes} bytes: send fewer"
                        raise _Refused(413, ErrorCode.BAD_REQUEST, message)
        except ClientDisconnect:
            raise _bad_request("the body is not whole") from None
        return bytes(body)


def _allowed(principal: Principal) -> frozenset[str] | None:
    """The channels that a token's `publish` names; None for all."""
    claim = principal.claims.get("publish")
    if claim is True:
        return None
    if isinstance(claim, list) and claim and all(isinstance(name, str) for name in claim):
        return frozenset(claim)
    raise _Refused(
        403, ErrorCode.FORBIDDEN, "the token has no claim `publish` (true, or a list of channels)"
    )


def _values(body: bytes) -> list[_Value]:
    body = body.removeprefix(codecs.BOM_UTF8)  # .NET and PowerShell send one
    try:
        # All of it, for Raw is passed over: what is no JSON would break every subscriber's frame.
        body.decode()
        _validate(body)
        values = _decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise _bad_request(
            f"send an object with channel, data and user, or a list of them: {error}"
        ) from None
    if not isinstance(values, list):
        return [values]
    if len(values) > VALUES:
        raise _Refused(413, ErrorCode.BAD_REQUEST, f"send at most {VALUES} values at once")
    return values


def _refuse_too_many(keys: _Keys) -> None:
    with keys.timer as now:
        if len(keys) >= KEYS:
            oldest = keys[next(iter(keys))]
            message = f"more than {KEYS} keys within {KEY_TTL_S:g} s: send more values at once"
            wait = {"Retry-After": str(math.ceil(oldest.at + KEY_TTL_S - now) or 1)}
            raise _Refused(429, ErrorCode.RATE_LIMITED, message, wait)


def _unauthorized(code: ErrorCode, message: str) -> _Refused:
    return _Refused(401, code, message, {"WWW-Authenticate": "Bearer"})


def _bad_request(message: str) -> _Refused:
    return _Refused(400, ErrorCode.BAD_REQUEST, message)


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
