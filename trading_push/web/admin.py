"""What an operator may ask and do over HTTP, with a token that has the claim `admin`.

The lists are sorted, searched and paged here, a page at a time, so that an answer about ten
thousand connections keeps nobody waiting.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection
from operator import attrgetter
from typing import Any, Final, Protocol

import msgspec
import trio
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from trading_push import logs
from trading_push.auth.principal import Principal
from trading_push.connections.context import Context
from trading_push.connections.members import Member
from trading_push.connections.roster import Peer
from trading_push.errors import ErrorCode
from trading_push.web.access import Access, Refused, bad_request, json_response, read_body
from trading_push.web.slices import each_in_slices, page_of

__all__ = ["Admin", "Operations"]

_PAGE: Final = 100
_BODY_BYTES: Final = 4096
_BODY_S: Final = 10.0
_REASON_BYTES: Final = 123
"""How long the reason of a close frame may be (RFC 6455, section 5.5)."""


class Operations(Protocol):
    """What an operator does; see `PushService`."""

    def kick(
        self, *, user: str | None = None, connection: str | None = None, reason: str = "kicked"
    ) -> int:
        """Close connections."""
        ...

    def revoke(self, token_id: str, *, expires_at: float = math.inf) -> int:
        """Refuse a token."""
        ...

    def statistics(self) -> Any:
        """What the service sees."""
        ...


class _Kick(Struct, forbid_unknown_fields=True):
    user: str | int | None = None
    connection: str | None = None
    all: bool = False
    reason: str = "kicked"


class _Revoke(Struct, forbid_unknown_fields=True):
    token_id: str
    expires_at: float | None = None


class Admin:
    """The routes of operators.

    Args:
        context: What the connections share.
        service: What is done to them.
        access: Finds out who asks.
    """

    def __init__(self, context: Context, service: Operations, access: Access) -> None:
        self._context = context
        self._service = service
        self._access = access

    async def online(self, request: Request) -> Response:
        """`GET /online`: the users who are connected, with the number of their connections."""
        return await self._answer(request, self._online)

    async def stats(self, request: Request) -> Response:
        """`GET /stats`: `PushService.statistics()`."""
        return await self._answer(request, self._stats)

    async def connections(self, request: Request) -> Response:
        """`GET /connections`: a page of the connections.

        Parameters: `q`, a text in the user, address or id; `offset`; `limit`, at most 100.
        """
        return await self._answer(request, self._connections)

    async def kick(self, request: Request) -> Response:
        """`POST /kick`: close the connections of `user`, the `connection`, or `all`."""
        return await self._answer(request, self._kick)

    async def revoke(self, request: Request) -> Response:
        """`POST /revoke`: refuse the token `token_id`, and close what stands on it."""
        return await self._answer(request, self._revoke)

    async def _answer(
        self, request: Request, act: Callable[[Request, Principal], Awaitable[object]]
    ) -> Response:
        try:
            principal = await self._access.principal(request, "administer")
            if principal.claims.get("admin") is not True:
                raise Refused(403, ErrorCode.FORBIDDEN, "the token has no claim `admin` (true)")
            if request.method == "POST" and "origin" in request.headers:
                self._refuse_foreign(request)
            content = await act(request, principal)
        except Refused as refused:
            return refused.response()
        return json_response(content, headers={"Cache-Control": "no-store"})

    def _refuse_foreign(self, request: Request) -> None:
        host = request.headers.get("host", "")
        if request.headers["origin"].partition("://")[2] != host:
            raise Refused(403, ErrorCode.FORBIDDEN, "no page of another origin may do this")

    async def _online(self, request: Request, principal: Principal) -> object:
        users: dict[str, int] = {}

        def count(item: tuple[str, Collection[object]]) -> None:
            users[item[0]] = len(item[1])

        await each_in_slices([*self._context.seats.by_user.items()], count)
        return {"users_online": len(users), "users": users}

    async def _stats(self, request: Request, principal: Principal) -> object:
        return self._service.statistics()

    async def _connections(self, request: Request, principal: Principal) -> object:
        offset = _number(request, "offset", 0, math.inf)
        limit = _number(request, "limit", _PAGE, _PAGE)
        wanted = request.query_params.get("q", "")
        found: list[Member] = []

        def look_at(each: Peer) -> None:
            member = each.member
            if any(wanted in (text or "") for text in (member.user, member.address, member.id)):
                found.append(member)

        await each_in_slices([*self._context.connections], look_at)
        page = await page_of(found, attrgetter("id"), offset, limit)
        return {"total": len(found), "connections": [_row(member) for member in page]}

    async def _kick(self, request: Request, principal: Principal) -> object:
        asked = await _body(request, _Kick)
        named = (asked.user is not None) + (asked.connection is not None) + asked.all
        if named != 1:
            raise bad_request("name one of user, connection, and all (true)")
        if len(asked.reason.encode(errors="replace")) > _REASON_BYTES:
            raise bad_request(
                f"the reason is longer than {_REASON_BYTES} bytes: give a shorter one"
            )
        try:
            if asked.all:
                closed = self._context.connections.kick(lambda each: True, asked.reason)
            elif asked.connection is not None:
                closed = self._service.kick(connection=asked.connection, reason=asked.reason)
            else:
                closed = self._service.kick(user=str(asked.user), reason=asked.reason)
        except ValueError as error:
            raise bad_request(str(error)) from None
        whom = "all" if asked.all else str(asked.user or asked.connection)
        logs.emit(
            logs.line("kicked", user=principal.user, whom=whom, count=closed, reason=asked.reason)
        )
        return {"ok": True, "closed": closed}

    async def _revoke(self, request: Request, principal: Principal) -> object:
        asked = await _body(request, _Revoke)
        expires_at = math.inf if asked.expires_at is None else asked.expires_at
        closed = self._service.revoke(asked.token_id, expires_at=expires_at)
        logs.emit(logs.line("revoked", user=principal.user, whom=asked.token_id, count=closed))
        return {"ok": True, "closed": closed}


def _row(member: Member) -> dict[str, Any]:
    return {
        "id": member.id,
        "user": member.user,
        "address": member.address,
        "channels": [topic.channel for topic in member.subscriptions],
    }


async def _body(request: Request, kind: type[Any]) -> Any:
    with trio.move_on_after(_BODY_S) as whole:
        body = await read_body(request, _BODY_BYTES)
    if whole.cancelled_caught:
        raise Refused(408, ErrorCode.BAD_REQUEST, f"the body took longer than {_BODY_S:g} s")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise bad_request(
            f"send an object with {', '.join(kind.__struct_fields__)}: {error}"
        ) from None


def _number(request: Request, name: str, default: int, most: float) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise bad_request(f"{name} is {text!r}: give a whole number")
    return int(min(int(text), most))
