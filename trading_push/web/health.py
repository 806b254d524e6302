"""`GET /healthz` and `GET /readyz`: whether the process lives, and whether it wants clients.

What is checked is named, and nothing else is told: no text of an error, no address.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import attrs
import trio
from starlette.requests import Request
from starlette.responses import Response

from trading_push.connections.context import Context
from trading_push.errors import ServiceClosed
from trading_push.web.access import json_response

__all__ = ["Health"]

_PATIENCE_S: Final = 1.0
"""How late the event loop and the registry may be."""
_NO_STORE: Final = {"Cache-Control": "no-store"}


@attrs.frozen
class Health:
    """The health of a service.

    Args:
        context: What its connections share.
        upstream: Whether the source answers, and the feed runs, by name.
    """

    context: Context
    upstream: Callable[[], Mapping[str, bool]]

    async def healthz(self, request: Request) -> Response:
        """Answer 200 as long as the event loop turns, in a drain too."""
        return json_response({"status": "ok"}, headers=dict(_NO_STORE))

    async def readyz(self, request: Request) -> Response:
        """Answer 200 or 503 with the state of each check.

        What is upstream is `degraded`, with 200, because to take the server away helps nobody
        then; with `?strict` it is 503.
        """
        own = {
            "accepting": self.context.connections.accepting,
            "loop": await self._loop_is_in_time(),
            "registry": await self._registry_answers(),
        }
        upstream = self.upstream()
        checks = {name: "ok" if is_well else "failed" for name, is_well in own.items()}
        checks |= {name: "ok" if is_well else "degraded" for name, is_well in upstream.items()}
        is_strict = "strict" in request.query_params
        if not all(own.values()) or (is_strict and not all(upstream.values())):
            status = "unavailable"
        else:
            status = "ok" if all(upstream.values()) else "degraded"
        return json_response(
            {"status": status, "checks": checks},
            503 if status == "unavailable" else 200,
            dict(_NO_STORE),
        )

    async def _loop_is_in_time(self) -> bool:
        before = trio.current_time()
        await trio.lowlevel.checkpoint()
        return trio.current_time() - before < _PATIENCE_S

    async def _registry_answers(self) -> bool:
        answered = trio.Event()
        try:
            self.context.registry.call(answered.set)
        except ServiceClosed:
            return False
        with trio.move_on_after(_PATIENCE_S):
            await answered.wait()
        return answered.is_set()
