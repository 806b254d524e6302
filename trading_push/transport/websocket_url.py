"""The URL of a WebSocket that we open, in its parts."""

from __future__ import annotations

import urllib.parse
from typing import NamedTuple

from trading_push.errors import ConfigurationError

__all__ = ["WebSocketUrl", "parse"]


class WebSocketUrl(NamedTuple):
    """Where a server listens, and which resource is asked for."""

    host: str
    port: int
    resource: str
    tls: bool

    @property
    def host_header(self) -> str:
        """The `Host` header of the handshake."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def text(self) -> str:
        """The URL, without what is not sent: user name, password and fragment."""
        return f"{'wss' if self.tls else 'ws'}://{self.host_header}{self.resource}"


def parse(url: str, advice: str) -> WebSocketUrl:
    """Parse a URL.

    Args:
        url: `ws://` or `wss://`.
        advice: The text of the error.

    Raises:
        ConfigurationError: It is not the URL of a WebSocket.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urllib.parse.urlsplit(""), None
    if parts.scheme not in ("ws", "wss") or not parts.hostname or not url.isprintable():
        raise ConfigurationError(advice)
    resource = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    tls = parts.scheme == "wss"
    return WebSocketUrl(parts.hostname, port or (443 if tls else 80), resource, tls)
