"""The HTTP routes beside the WebSocket."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.routing import Route

from trading_push.web.not_found import NotFound
from trading_push.web.publish import PublishEndpoint

__all__ = ["routes"]


def routes(publisher: PublishEndpoint, not_found: NotFound) -> Starlette:
    """The ASGI application of all routes; for scopes of type `http`."""
    return Starlette(
        routes=[Route("/publish", publisher.answer, methods=["POST"])],
        exception_handlers={404: not_found.answer},
    )
