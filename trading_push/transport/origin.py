"""Which web pages may connect: a handshake's `Origin` (RFC 6454) against the allow list."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Final
from urllib.parse import urlsplit

__all__ = ["is_allowed", "is_origin"]

_HOST: Final = re.compile(r"[a-z0-9._:-]+", re.ASCII)  # a colon in an address of IPv6
_PORTS: Final = {"http": 80, "https": 443}

Parts = tuple[str, str, int | None]


def is_origin(text: str) -> bool:
    """Whether it is an origin that can be allowed: scheme://host[:port], `null`, or `*` for all."""
    return text in ("*", "null") or _parts(text) is not None


def is_allowed(origins: Sequence[str], host: str | None, allowed: Collection[str]) -> bool:
    """Whether a handshake may go on.

    Args:
        origins: Its `Origin` headers; a browser sends one, and nobody two.
        host: Its `Host` header.
        allowed: What `is_origin` is true of; empty allows the pages of the same host and port.
    """
    if "*" in allowed:
        return True
    return all(_is_one_allowed(origin, host, allowed) for origin in origins)


def _is_one_allowed(origin: str, host: str | None, allowed: Collection[str]) -> bool:
    if origin == "null":  # a sandboxed frame, a file: anybody's page can be one
        return "null" in allowed
    parts = _parts(origin)
    if parts is None:
        return False
    if allowed:
        return any(parts == _parts(each) for each in allowed)
    # A proxy may end the TLS, so that the scheme of the page is not known to be ours.
    return host is not None and _parts(f"{parts[0]}://{host}") == parts


def _parts(origin: str) -> Parts | None:
    try:
        split = urlsplit(origin)
        port = split.port
    except ValueError:
        return None
    plain = f"{split.scheme}://{split.netloc}"
    if not split.scheme or not split.hostname or origin.lower() != plain.lower():
        return None  # a path, a query: no origin
    if not _HOST.fullmatch(split.hostname) or "@" in split.netloc:
        return None
    return split.scheme, split.hostname, port if port is not None else _PORTS.get(split.scheme)
