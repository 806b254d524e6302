"""Answer requests for what nobody serves: the answer names the path of the WebSocket."""

from __future__ import annotations

import attrs
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from trading_push.connections.context import Context
from trading_push.transport.proxies import client_address

__all__ = ["NotFound"]


@attrs.frozen
class NotFound:
    """What is answered where no route fits."""

    context: Context

    async def answer(self, request: Request, error: Exception) -> Response:
        """Answer 404; at the WebSocket's own path it is the upgrade that is missing."""
        if request.url.path == self.context.path:
            return PlainTextResponse("this is a WebSocket: connect with a client of those\n", 404)
        peer = request.client.host if request.client else "-"
        address = client_address(peer, request.headers.raw, self.context.trusted_proxies)
        self.context.notices.unserved(request.url.path, address)
        return PlainTextResponse(
            f"nothing is served here: the WebSocket is at {self.context.path}\n", 404
        )
