"""The HTTP routes beside the WebSocket."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trading_push.connections.context import Context
from trading_push.errors import ErrorCode
from trading_push.settings.schema import Settings
from trading_push.web.access import Access, Refused
from trading_push.web.admin import Admin, Operations
from trading_push.web.health import Health
from trading_push.web.metrics import Metrics
from trading_push.web.not_found import NotFound
from trading_push.web.pages import Pages
from trading_push.web.publish import PublishEndpoint
from trading_push.web.static_files import StaticFile

__all__ = ["Served", "routes"]


class Served(Operations, Protocol):
    """The service that the routes are about."""

    async def publish_many(self, values: Any) -> None:
        """Publish some values."""
        ...


def routes(
    context: Context,
    service: Served,
    upstream: Callable[[], Mapping[str, bool]],
    processes: Callable[[], int],
    metrics: Callable[[str], Awaitable[tuple[bytes, str]]],
    settings: Settings,
) -> Starlette:
    """Make the ASGI application of all routes; for scopes of type `http`.

    Args:
        context: What the connections share.
        service: What is published to, and administered.
        upstream: Whether the source answers, and the feed runs, by name.
        processes: How many processes serve, this one among them.
        metrics: Writes the metrics; see `web.metrics.Metrics`.
        settings: What is served, and to whom.
    """
    limits, tokens = context.limits, context.tokens
    publisher = PublishEndpoint(
        tokens.principal,
        service.publish_many,
        limits.publish_bytes,
        tokens.revoked,
        limits.authentication_timeout_s,
    )
    access = Access(tokens.principal, tokens.revoked, limits.authentication_timeout_s)
    admin = Admin(context, service, access)
    health = Health(context, upstream)
    # A module may be imported by pages of another origin only if the answer says so.
    client = StaticFile("trading-push.js", {"Access-Control-Allow-Origin": "*"})

    async def publish(request: Request) -> Response:
        if not context.connections.accepting:
            return Refused(503, ErrorCode.INTERNAL, "shutting down").response()
        if (count := processes()) > 1:
            message = (
                f"this server has {count} processes and no broker, and only the clients of one of "
                "them would get this: run one process"
            )
            return Refused(501, ErrorCode.INTERNAL, message).response()
        return await publisher.answer(request)

    optional = []
    if settings.web.metrics != "off":
        answer = Metrics(context, access, metrics, settings.web.metrics).answer
        optional.append(Route("/metrics", answer))
    if settings.web.pages:
        optional += Pages(context, settings.market.stale_after_s).routes()
    return Starlette(
        routes=[
            *optional,
            Route("/publish", publish, methods=["POST"]),
            Route("/trading-push.js", client.answer),
            Route("/healthz", health.healthz),
            Route("/readyz", health.readyz),
            Route("/online", admin.online),
            Route("/stats", admin.stats),
            Route("/connections", admin.connections),
            Route("/kick", admin.kick, methods=["POST"]),
            Route("/revoke", admin.revoke, methods=["POST"]),
        ],
        exception_handlers={404: NotFound(context).answer},
    )
