"""How an exchange's WebSocket is reached, and what its end means."""

from __future__ import annotations

import ssl
import urllib.parse
from typing import Any, Final

import attrs
import h11
import trio
import trio_websocket
import wsproto.utilities

from trading_push.errors import ConfigurationError, SourceError

__all__ = ["LOST", "Address", "explained"]

# What a network, or a peer that is no such exchange, can make of a connection.
LOST: Final = (
    SourceError,
    OSError,
    UnicodeError,  # a host name that IDNA refuses
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    trio_websocket.ConnectionClosed,
    trio_websocket.HandshakeError,
    wsproto.utilities.ProtocolError,  # also raised by a ping that comes after our own close
    h11.ProtocolError,  # a handshake so wrong that trio-websocket fails at answering it
)


def explained(group: BaseExceptionGroup[Any]) -> SourceError:
    """Why a connection was lost, in words; of several reasons, the first."""
    error = _innermost(group)
    if isinstance(error, SourceError):
        return error
    if isinstance(error, trio_websocket.ConnectionClosed):
        reason = error.reason
        if reason is None:
            return SourceError("the connection was closed")
        return SourceError(
            f"the connection was closed: {reason.code} {reason.reason or ''}".strip()
        )
    if isinstance(error, trio_websocket.ConnectionRejected):
        return SourceError(f"the handshake was refused with status {error.status_code}")
    if isinstance(error, trio.TooSlowError):
        return SourceError("there was no answer to the handshake in time")
    if isinstance(error, OSError):
        return SourceError(error.strerror or type(error).__name__)
    return SourceError(type(error).__name__)


def _innermost(error: BaseException) -> BaseException:
    """What has gone wrong at last: trio says so in groups, and in causes."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif isinstance(error, trio.BrokenResourceError) or (
            isinstance(error, OSError) and error.strerror is None
        ):
            if error.__cause__ is None:
                return error
            error = error.__cause__
        else:
            return error


@attrs.frozen
class Address:
    """Where a WebSocket is."""

    host: str
    port: int
    resource: str
    tls: bool

    @classmethod
    def of(cls, url: str) -> Address:
        """What a URL says.

        Raises:
            ConfigurationError: It is none of a WebSocket.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urllib.parse.urlsplit(""), None
        if parts.scheme not in ("ws", "wss") or not parts.hostname or not url.isprintable():
            raise ConfigurationError(
                "market.url is no WebSocket URL: give one like wss://stream.example.com/stream"
            )
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
