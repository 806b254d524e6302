"""Files of the package that browsers are given: read once, with an ETag, compressed if wanted."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Final

import attrs
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["Content", "StaticFile", "respond"]

_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "ico": "image/x-icon",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "png": "image/png",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
    "webmanifest": "application/manifest+json",
}
"""The media types by the endings of names; a file with another ending is not given out."""


@attrs.frozen
class Content:
    """The bytes of one answer; each encoding has an ETag of its own (RFC 9110, 8.8.3.3)."""

    plain: bytes
    plain_etag: str
    gzipped: bytes
    gzipped_etag: str

    @classmethod
    def of(cls, plain: bytes) -> Content:
        """Make it of the bytes as they are."""
        digest = hashlib.sha256(plain).hexdigest()[:32]
        gzipped = gzip.compress(plain, 9, mtime=0)
        return cls(plain, f'"{digest}"', gzipped, f'"{digest}-gzip"')


@cache
def _read(name: str) -> Content:
    return Content.of(resources.files("trading_push.web").joinpath("static", name).read_bytes())


@attrs.frozen
class StaticFile:
    """One file in `web/static`, at a path of its own.

    Args:
        name: Its name there.
        headers: More headers of each answer.
    """

    name: str
    headers: Mapping[str, str] = attrs.field(factory=dict)

    async def answer(self, request: Request) -> Response:
        """Answer with the file, or 304 if the client has it.

        Its path does not change with its content, so a client asks each time whether it has.
        """
        kind = _TYPES[self.name.rpartition(".")[2]]
        return respond(request, _read(self.name), kind, self.headers)


def respond(
    request: Request, content: Content, media_type: str, headers: Mapping[str, str]
) -> Response:
    """Answer with some content, compressed if that is taken, or 304 if the client has it."""
    is_gzipped = _takes_gzip(request.headers.get("accept-encoding", ""))
    etag = content.gzipped_etag if is_gzipped else content.plain_etag
    headers = {
        "ETag": etag,
        "Cache-Control": "no-cache",
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
        **headers,
    }
    if _has(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    if is_gzipped:
        headers["Content-Encoding"] = "gzip"
    headers["Content-Type"] = media_type
    return Response(content.gzipped if is_gzipped else content.plain, headers=headers)


def _has(if_none_match: str, etag: str) -> bool:
    """Whether a client names what it would get; a proxy may have made the tag a weak one."""
    named = {each.strip().removeprefix("W/") for each in if_none_match.split(",")}
    return etag in named or "*" in named


def _takes_gzip(accept_encoding: str) -> bool:
    """Whether `gzip` is named (or any, by `*`), and not with the weight 0 (RFC 9110, 12.5.3)."""
    weights: dict[str, bool] = {}
    for each in accept_encoding.lower().split(","):
        coding, _, weight = each.partition(";")
        name, _, value = weight.replace(" ", "").partition("=")
        weights[coding.strip()] = not (name == "q" and value.strip("0.") == "")
    return weights.get("gzip", weights.get("*", False))
