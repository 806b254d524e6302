"""The page at `/` with its files, and `POST /demo/token`, which signs it in where it is the demo's.

In the embedded default (see `auth.demo.DemoTokens`) a page of this machine is handed a token. It is
refused to everyone else: what comes through a proxy, and pages of other origins, also of names that
DNS points at this machine.
"""

from __future__ import annotations

from importlib import resources
from typing import Final

import attrs
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from trading_push.auth.demo import DEMO_USERS
from trading_push.connections.context import Context
from trading_push.errors import ErrorCode
from trading_push.transport.local import is_local_request
from trading_push.transport.origin import is_own_or_named
from trading_push.web.access import Refused, bad_request, json_response, read_body
from trading_push.web.static_files import Content, StaticFile, respond

__all__ = ["CHART", "POLICY", "Pages"]

CHART: Final = "lightweight-charts.js"
"""The chart library, which the build puts beside the page; without it the page draws by itself."""
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
"""The Content-Security-Policy: no request leaves the host, and no text becomes markup."""
_HEADERS: Final = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}
_FILES: Final = (
    "page.css",
    "page.js",
    "account.js",
    "cells.js",
    "chart.js",
    "market.js",
    "words.js",
    "trading-push.js",
)
_TOKEN_S: Final = 3600
"""How long a token of the page is valid; it asks for another in time."""
_BODY_BYTES: Final = 1024
_STATIC: Final = resources.files("trading_push.web").joinpath("static")


def _has_chart() -> bool:
    return _STATIC.joinpath(CHART).is_file()


class _TokenRequest(msgspec.Struct):
    user: str


@attrs.frozen
class Pages:
    """The page of a service.

    Args:
        context: What its connections share.
        stale_after_s: From when on a quote is old.
    """

    context: Context
    stale_after_s: float

    def routes(self) -> list[Route]:
        """The routes of the page and of its files."""
        files = [*_FILES, CHART] if _has_chart() else _FILES
        return [
            Route("/", self.page),
            Route("/demo/token", self.token, methods=["POST"]),
            *(Route(f"/static/{name}", StaticFile(name, _HEADERS).answer) for name in files),
        ]

    async def page(self, request: Request) -> Response:
        """Answer with the page."""
        text = _STATIC.joinpath("page.html").read_text(encoding="utf-8")
        is_demo = self.context.demo is not None and self._is_local(request)
        chart = f'<script defer src="/static/{CHART}"></script>\n'
        for name, value in {
            "socket": self.context.path,
            "demo": str(is_demo).lower(),
            "stale_after_s": f"{self.stale_after_s:g}",
            "chart": chart if _has_chart() else "",
        }.items():
            text = text.replace(f"{{{name}}}", value)
        return respond(request, Content.of(text.encode()), "text/html; charset=utf-8", _HEADERS)

    async def token(self, request: Request) -> Response:
        """Hand out a token of one of the demo's users; 404 where this is no demo."""
        try:
            if self.context.demo is None:
                raise Refused(404, ErrorCode.FORBIDDEN, "this is no demo: sign in with a token")
            if not self._is_local(request) or not self._is_of_own_page(request):
                message = "tokens of the demo are for its own page, on this machine"
                raise Refused(403, ErrorCode.FORBIDDEN, message)
            body = await read_body(request, _BODY_BYTES)
            try:
                user = msgspec.json.decode(body, type=_TokenRequest).user
            except msgspec.MsgspecError:
                user = ""
            if user not in DEMO_USERS:
                raise bad_request(f'send {{"user": one of {", ".join(DEMO_USERS)}}}')
        except Refused as refused:
            return refused.response()
        token = self.context.demo.issue(user, _TOKEN_S)
        answer = {"token": token, "user": user, "expires_in": _TOKEN_S}
        return json_response(answer, headers={"Cache-Control": "no-store"})

    def _is_local(self, request: Request) -> bool:
        peer = request.client.host if request.client else "-"
        return is_local_request(peer, request.headers.raw, self.context.trusted_proxies)

    def _is_of_own_page(self, request: Request) -> bool:
        origins = request.headers.getlist("origin")
        return len(origins) == 1 and is_own_or_named(origins[0], request.headers.get("host"), ())
