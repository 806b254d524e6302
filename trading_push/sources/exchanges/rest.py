"""Ask an exchange's REST service for a document, over the streams that its WebSocket goes over.

It is one GET on a connection of its own, by h11, which the WebSocket brings along: the feeds need
no library for HTTP, cancellation ends it at once, and it takes the same way out as they do. It
follows no redirect, because a base address that has moved is better set right.
"""

from __future__ import annotations

import urllib.parse
import zlib
from collections.abc import Callable
from typing import Final, TypeVar

import h11
import trio

from trading_push.errors import ConfigurationError, SourceError
from trading_push.sources.exchanges.amounts import UNUSABLE
from trading_push.transport.outbound import CONNECTION_ERRORS, Address, first_of
from trading_push.transport.outbound_proxies import OutboundProxies

__all__ = ["RestService"]

TIMEOUT_S: Final = 30.0
"""How long one answer may take, to its last byte."""
BODY_BYTES: Final = 64 * 2**20
"""How long an answer may be, unpacked. The list of Binance's spot market has about 20 MiB."""
RECEIVE_BYTES: Final = 65_536

_T = TypeVar("_T")


class RestService:
    """The REST service of an exchange.

    Args:
        url: Its base address, as `https://api.example.com`.

    Raises:
        ConfigurationError: It is not one.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urllib.parse.urlsplit(""), None
        if (
            parts.scheme not in ("https", "http")
            or not parts.hostname
            or parts.query
            or not (url.isprintable() and url.isascii() and " " not in url)
        ):
            raise ConfigurationError(
                "market.rest_url is not a base address: give one like https://api.example.com"
            )
        tls = parts.scheme == "https"
        self._path = parts.path.rstrip("/")
        self._address = Address(parts.hostname, port or (443 if tls else 80), self._path, tls)

    def reach_through(self, proxies: OutboundProxies) -> None:
        """Connect through the proxy that leads there; synchronous.

        Raises:
            ConfigurationError: The proxy needs a library that is not installed.
        """
        self._address = self._address.through(proxies)

    async def get(self, resource: str, decode: Callable[[bytes], _T]) -> _T:
        """Fetch a document, and decode it in a worker thread, for it may be long.

        Args:
            resource: Path and query, after the base address.
            decode: May raise one of UNUSABLE.

        Raises:
            SourceError: There was no answer in time, or not one that can be used.

        Cancellation leaves no connection; it waits for `decode`.
        """
        try:
            with trio.fail_after(TIMEOUT_S):
                body = await self._fetch(resource)
            return await trio.to_thread.run_sync(decode, body)
        except trio.TooSlowError:
            raise SourceError(f"there was no answer within {TIMEOUT_S:g} s") from None
        except (BaseExceptionGroup, *CONNECTION_ERRORS) as group:
            error = first_of(group)
            if not isinstance(error, CONNECTION_ERRORS):
                raise
            words = getattr(error, "strerror", None) or type(error).__name__
            raise SourceError(f"{self._address.host} cannot be asked: {words}") from None
        except (zlib.error, *UNUSABLE):
            raise SourceError(f"{self._address.host} gave an answer that cannot be read") from None

    async def _fetch(self, resource: str) -> bytes:
        stream = await self._address.connect()
        try:
            http = h11.Connection(h11.CLIENT)
            request = h11.Request(
                method="GET",
                target=self._path + resource,
                headers=[
                    ("Host", self._address.host_header),
                    ("Accept", "application/json"),
                    ("Accept-Encoding", "gzip"),
                    ("Connection", "close"),
                    ("User-Agent", "trading-push"),
                ],
            )
            await stream.send_all(
                (http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b"")
            )
            body = _Body()
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(bytes(await stream.receive_some(RECEIVE_BYTES)))
                elif isinstance(event, h11.Response):
                    if event.status_code != 200:
                        raise SourceError(f"{self._address.host} answered {event.status_code}")
                    body.unpack = dict(event.headers).get(b"content-encoding") == b"gzip"
                elif isinstance(event, h11.Data):
                    body.add(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    return body.end()
        finally:
            await trio.aclose_forcefully(stream)


class _Body:
    """The body of an answer, unpacked as it comes; SourceError where it is too long or cut."""

    def __init__(self) -> None:
        self.unpack = False
        self._bytes = bytearray()
        self._gzip = zlib.decompressobj(wbits=31)

    def add(self, data: bytes) -> None:
        left = BODY_BYTES - len(self._bytes)
        if self.unpack:
            data = self._gzip.decompress(data, left + 1)
        if len(data) > left:
            raise SourceError(f"an answer is longer than {BODY_BYTES} bytes")
        self._bytes += data

    def end(self) -> bytes:
        if self.unpack and not self._gzip.eof:
            raise SourceError("an answer is not whole")
        return bytes(self._bytes)
