"""A WebSocket that we open: its address, its life from connect to close, and what can end it.

The client and the feeds of exchanges both stand on this.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import attrs
import h11
import trio
import trio_websocket
import wsproto.utilities

from trading_push.transport.outbound_proxies import OutboundProxies, Proxy
from trading_push.transport.tunnel import check_proxy, open_tunnel
from trading_push.transport.websocket_url import parse

__all__ = ["CLOSE_TIMEOUT_S", "CONNECTION_ERRORS", "Address", "OutboundWebSocket", "first_of"]

CLOSE_TIMEOUT_S: Final = 1.0
"""How long a polite close waits for the peer's close frame."""

CONNECTION_ERRORS: Final = (
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
"""What a network, or a peer that is not the server it should be, can make of a connection."""


def first_of(error: BaseException) -> BaseException:
    """Return the first exception of a group, however deep it stands."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@attrs.frozen
class Address:
    """Where a server listens, which resource is asked for, and which proxy leads there."""

    host: str
    port: int
    resource: str
    tls: bool
    proxy: Proxy | None = None

    @classmethod
    def of(cls, url: str, advice: str) -> Address:
        """Parse a URL.

        Args:
            url: `ws://` or `wss://`.
            advice: The text of the error.

        Raises:
            ConfigurationError: It is not the URL of a WebSocket.
        """
        parts = parse(url, advice)
        return cls(parts.host, parts.port, parts.resource, parts.tls)

    @property
    def host_header(self) -> str:
        """The `Host` header of the handshake."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    def through(self, proxies: OutboundProxies) -> Address:
        """Return the same address with the proxy that leads to it.

        Raises:
            ConfigurationError: The proxy needs a library that is not installed.
        """
        proxy = proxies.of(f"{'wss' if self.tls else 'ws'}://{self.host_header}")
        check_proxy(proxy)
        return attrs.evolve(self, proxy=proxy)

    async def connect(self) -> trio.abc.Stream:
        """Open a stream to the address; cancellation leaves none open."""
        stream: trio.abc.Stream
        if self.proxy is None:
            stream = await trio.open_tcp_stream(self.host, self.port)
        else:
            stream = await open_tunnel(self.proxy, self.host, self.port)
        if not self.tls:
            return stream
        secured = trio.SSLStream(
            stream, ssl.create_default_context(), server_hostname=self.host, https_compatible=True
        )
        try:
            await secured.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return secured


class OutboundWebSocket:
    """One WebSocket connection that we open: connect, talk, close politely.

    Args:
        address: Where to connect.
        connect_timeout_s: How long TCP, TLS and the handshake may take together.
        message_bytes: How long a message of the peer may be.
        buffered_messages: How many messages are read ahead of who takes them.
        subprotocols: The subprotocols to ask for.
    """

    def __init__(
        self,
        address: Address,
        *,
        connect_timeout_s: float,
        message_bytes: int,
        buffered_messages: int = 1,
        subprotocols: Sequence[str] | None = None,
    ) -> None:
        self._address = address
        self._connect_timeout_s = connect_timeout_s
        self._message_bytes = message_bytes
        self._buffered_messages = buffered_messages
        self._subprotocols = subprotocols
        # The nursery in which trio-websocket reads; there from the beginning of `run`.
        self._nursery: trio.Nursery | None = None
        # What `run` has to close in any case, as soon as it is open.
        self._stream: trio.abc.Stream | None = None
        self.socket: trio_websocket.WebSocketConnection | None = None
        """The connection, once its handshake is done."""

    async def run(self, talk: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        """Talk until `talk` returns or raises or `scope` is cancelled; then close politely.

        The polite close takes `CLOSE_TIMEOUT_S` at most. Cancellation from outside of `scope`
        drops the connection at once. Nothing stays open in either case.

        Args:
            talk: Calls `connect`, and uses the connection.
            scope: Entered around `talk`; cancel it to end the connection politely.

        Raises:
            BaseExceptionGroup: What `talk` raised, and what trio-websocket's reader did.
        """
        try:
            # trio-websocket reads in this nursery, which has to outlive the polite close.
            async with trio.open_nursery() as self._nursery:
                failure: Exception | None = None
                try:
                    with scope:
                        await talk()
                except Exception as error:
                    failure = error  # and not out of the nursery yet, which would end the reader
                if self.socket is not None:
                    # It would wait without limit for the peer's own close frame.
                    with trio.move_on_after(CLOSE_TIMEOUT_S):
                        await self.socket.aclose()
                self._nursery.cancel_scope.cancel()
                if failure is not None:
                    raise failure
        finally:
            if self._stream is not None:
                await trio.aclose_forcefully(self._stream)

    async def connect(
        self, wrap: Callable[[trio.abc.Stream], trio.abc.Stream] = lambda stream: stream
    ) -> trio_websocket.WebSocketConnection:
        """Connect and shake hands; to be called once, by `talk`.

        Args:
            wrap: Makes the stream that trio-websocket uses of the stream to the server.

        Raises:
            trio.TooSlowError: It took longer than `connect_timeout_s`.
            Exception: One of `CONNECTION_ERRORS`.
        """
        assert self._nursery is not None
        with trio.fail_after(self._connect_timeout_s):
            self._stream = wrap(await self._address.connect())
            self.socket = await trio_websocket.wrap_client_stream(
                self._nursery,
                # It is annotated as a SocketStream, and uses what any Stream has.
                self._stream,  # type: ignore[arg-type]
                self._address.host_header,
                self._address.resource,
                subprotocols=self._subprotocols,
                message_queue_size=self._buffered_messages,
                max_message_size=self._message_bytes,
            )
        return self.socket
