"""`GET /metrics`: who may read the metrics, and in which form."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

import attrs
from starlette.requests import Request
from starlette.responses import Response

from trading_push.connections.context import Context
from trading_push.errors import ErrorCode
from trading_push.transport.local import is_local_request
from trading_push.web.access import Access, Refused

__all__ = ["Metrics"]


@attrs.frozen
class Metrics:
    """The metrics of a service.

    Args:
        context: What its connections share.
        access: Finds out who asks.
        render: Writes the metrics in the form that an `Accept` asks for; the text and its type.
        who: Whether programs of this machine may read them without a token; see `web.metrics`.
    """

    context: Context
    access: Access
    render: Callable[[str], Awaitable[tuple[bytes, str]]]
    who: Literal["local", "token", "off"]

    async def answer(self, request: Request) -> Response:
        """Answer a request."""
        try:
            if not (self.who == "local" and self._is_local(request)):
                principal = await self.access.principal(request, "read the metrics")
                if not any(principal.claims.get(each) is True for each in ("metrics", "admin")):
                    message = "the token has no claim `metrics` or `admin` (true)"
                    raise Refused(403, ErrorCode.FORBIDDEN, message)
        except Refused as refused:
            return refused.response()
        text, kind = await self.render(request.headers.get("accept", ""))
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return Response(text, headers={"Content-Type": kind, **headers})

    def _is_local(self, request: Request) -> bool:
        peer = request.client.host if request.client else "-"
        return is_local_request(peer, request.headers.raw, self.context.trusted_proxies)
