"""`POST /publish`: a back end pushes values over HTTP, one or many, at most once for each key.

The header `Idempotency-Key` is that of the IETF's draft of this name: who repeats a request because
its answer was lost repeats its key, and is given the first answer again.
"""

from __future__ import annotations

import codecs
import hashlib
import math
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, Final

import attrs
import cachetools
import msgspec
import trio
from msgspec import Raw, Struct
from starlette.requests import Request
from starlette.responses import Response

from trading_push.auth.principal import Principal
from trading_push.auth.revocation import RevokedTokens
from trading_push.errors import (
    ErrorCode,
    PayloadError,
    ServiceClosed,
)
from trading_push.web.access import Access, Refused, bad_request, json_response, read_body

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
        self._publish = publish
        self._limit_bytes = limit_bytes
        self._access = Access(check, revoked, check_timeout_s)
        # The keys of each publisher of the last ten minutes, oldest first; nobody's are thrown out
        # for another's. Put in anew with each new key, a publisher goes with the last of them.
        self._keys: cachetools.TTLCache[str, _Keys] = cachetools.TTLCache(
            math.inf, KEY_TTL_S, trio.current_time
        )

    async def answer(self, request: Request) -> Response:
        """Answer a request; see docs/publishing.md for what it takes and gives."""
        try:
            published = await self._take(request)
        except Refused as refused:
            return refused.response()
        return json_response({"ok": True, "published": published})

    async def _take(self, request: Request) -> int:
        refused: Refused | None = None
        try:
            principal = await self._access.principal(request, "publish")
            allowed = _allowed(principal)
        except Refused as error:
            refused = error
        if refused is not None:
            # Answered with its body unread, a connection cannot be used again.
            with suppress(Refused), trio.move_on_after(SKIP_S):
                await read_body(request, self._limit_bytes)
            raise refused
        with trio.move_on_after(BODY_S) as whole:
            body = await read_body(request, self._limit_bytes)
        if whole.cancelled_caught:
            raise Refused(408, ErrorCode.BAD_REQUEST, f"the body took longer than {BODY_S:g} s")
        values = _values(body)
        digest = hashlib.blake2b(body).digest()
        for value in values:
            if allowed is not None and value.channel not in allowed:
                raise Refused(
                    403, ErrorCode.FORBIDDEN, f"the token does not allow {value.channel!r}"
                )
        key = request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= KEY_CHARACTERS:
            raise bad_request(f"give an Idempotency-Key of 1 to {KEY_CHARACTERS} characters")
        # Nothing awaits from here to the publication: what is so now is so when it is published,
        # and no two requests with one key are under way. The body may have taken its time.
        self._access.refuse_ended(principal)
        keys = self._keys.get(principal.user)
        if keys is None:
            keys = cachetools.TTLCache(math.inf, KEY_TTL_S, trio.current_time)
        if key is not None:
            before = keys.get(key)
            if before is not None:
                if before.digest != digest:
                    message = "this Idempotency-Key has been used for another request"
                    raise Refused(422, ErrorCode.BAD_REQUEST, message)
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
                raise Refused(503, ErrorCode.INTERNAL, "shutting down") from None
            if isinstance(error, ValueError | PayloadError):
                raise bad_request(str(error)) from None
            raise
        return len(values)


def _allowed(principal: Principal) -> frozenset[str] | None:
    """The channels that a token's `publish` names; None for all."""
    claim = principal.claims.get("publish")
    if claim is True:
        return None
    if isinstance(claim, list) and claim and all(isinstance(name, str) for name in claim):
        return frozenset(claim)
    raise Refused(
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
        raise bad_request(
            f"send an object with channel, data and user, or a list of them: {error}"
        ) from None
    if not isinstance(values, list):
        return [values]
    if len(values) > VALUES:
        raise Refused(413, ErrorCode.BAD_REQUEST, f"send at most {VALUES} values at once")
    return values


def _refuse_too_many(keys: _Keys) -> None:
    with keys.timer as now:
        if len(keys) >= KEYS:
            oldest = keys[next(iter(keys))]
            message = f"more than {KEYS} keys within {KEY_TTL_S:g} s: send more values at once"
            wait = {"Retry-After": str(math.ceil(oldest.at + KEY_TTL_S - now) or 1)}
            raise Refused(429, ErrorCode.RATE_LIMITED, message, wait)
