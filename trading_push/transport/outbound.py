"""Where a WebSocket is, and the stream to it; for those of us who are clients."""

from __future__ import annotations

import ssl
import urllib.parse

import attrs
import trio

from trading_push.errors import ConfigurationError

__all__ = ["Address"]


@attrs.frozen
class Address:
    """Where a WebSocket is."""

    host: str
    port: int
    resource: str
    tls: bool

    @classmethod
    def of(cls, url: str, advice: str) -> Address:
        """What a URL says.

        Args:
            url: `ws://` or `wss://`.
            advice: The error's text.

        Raises:
            ConfigurationError: It is no URL of a WebSocket.
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
        return cls(parts.hostname, port or (443 if tls else 80), resource, tls)

    @property
    def host_header(self) -> str:
        """What the handshake says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    async def connect(self) -> trio.SocketStream | trio.SSLStream[trio.SocketStream]:
        """A stream to the address; cancelled, it leaves none open."""
        if not self.tls:
            return await trio.open_tcp_stream(self.host, self.port)
        stream = await trio.open_ssl_over_tcp_stream(
            self.host,
            self.port,
            ssl_context=ssl.create_default_context(),
            https_compatible=True,
        )
        try:
            await stream.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream
