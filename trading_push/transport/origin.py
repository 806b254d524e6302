"""Decide which web pages may connect, by the `Origin` of a handshake (RFC 6454)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Final
from urllib.parse import urlsplit

__all__ = ["host_of_origin", "is_allowed", "is_origin", "is_own_or_named"]

_HOST: Final = re.compile(r"[a-z0-9._:-]+", re.ASCII)  # colons are in IPv6 addresses
# What desktop shells have in place of a host: `file://`, `app://-`, `tauri://localhost`.
_SHELL: Final = re.compile(r"[a-z][a-z0-9+.-]*://")
_PORTS: Final = {"http": 80, "https": 443}

# Scheme, host and port; no port if the scheme has no default one.
_Parts = tuple[str, str, int | None]


def is_origin(text: str) -> bool:
    """Whether a text can stand in the list: scheme://host[:port], `null`, or `*` for all.

    The scheme may be one of a desktop shell, which may have no host: `file://`.
    """
    return text in ("*", "null") or _parts(text) is not None


def is_allowed(origins: Sequence[str], host: str | None, allowed: Collection[str]) -> bool:
    """Whether a handshake may go on.

    Args:
        origins: Its `Origin` headers. A browser sends one; with several, all must be allowed.
        host: Its `Host` header.
        allowed: Texts that `is_origin` accepts; empty allows the pages of the same host and port.
    """
    if "*" in allowed:
        return True
    return all(_is_one_allowed(origin, host, allowed) for origin in origins)


def host_of_origin(origin: str) -> str | None:
    """The host of a page of the web, in lower case; None for any other origin."""
    parts = _parts(origin)
    return parts[1] if parts is not None and parts[0] in _PORTS else None


def _is_one_allowed(origin: str, host: str | None, allowed: Collection[str]) -> bool:
    if origin == "null":  # a sandboxed frame or a file, which any page can be
        return "null" in allowed
    parts = _parts(origin)
    if parts is None:
        return False
    if allowed:
        return any(parts == _parts(each) for each in allowed)
    return _is_own(parts, host)


def is_own_or_named(origin: str, host: str | None, allowed: Collection[str]) -> bool:
    """Whether a page is of the same host and port, or is in the list by its own name.

    Stricter than `is_allowed`: `null` and `*` name no page.
    """
    parts = _parts(origin)
    if parts is None:
        return False
    return any(parts == _parts(each) for each in allowed) or _is_own(parts, host)


def _is_own(parts: _Parts, host: str | None) -> bool:
    # Compared by the page's own scheme: a proxy may have ended the TLS. A page of a desktop shell,
    # `app://localhost`, is of no server.
    return host is not None and parts[0] in _PORTS and _parts(f"{parts[0]}://{host}") == parts


def _parts(origin: str) -> _Parts | None:
    if _SHELL.fullmatch(origin.lower()) and origin.lower()[:-3] not in _PORTS:
        return origin.lower()[:-3], "", None
    try:
        split = urlsplit(origin)
        port = split.port
    except ValueError:
        return None
    plain = f"{split.scheme}://{split.netloc}"
    if not split.scheme or not split.hostname or origin.lower() != plain.lower():
        return None  # it has a path or a query
    if not _HOST.fullmatch(split.hostname) or "@" in split.netloc:
        return None
    return split.scheme, split.hostname, port if port is not None else _PORTS.get(split.scheme)
