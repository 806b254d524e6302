"""Requests by the library asks."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import anyio
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute

from trading_push.errors import ConfigurationError, SourceError
from trading_push.sources.http.body import BODY_BYTES, too_long
from trading_push.sources.http.pool import (
    Answer,
    ConnectionBroken,
    Target,
    holds_data,
    not_http,
    unreachable,
)

try:
    import asks
    from asks.errors import BadHttpResponse
except ImportError:
    # asks 3.0.0 says that it needs anyio 3, which fails on today's trio; it works with anyio 4.
    raise ConfigurationError(
        'http.client = "asks" needs the library asks: '
        "pip install --no-deps asks async_generator h11"
    ) from None

__all__ = ["AsksPool"]


class AsksPool:
    """Connections to one service, by asks; see `Pool`.

    Raises:
        ConfigurationError: HTTP/2 or a proxy is wanted, which asks does not have.
    """

    def __init__(self, target: Target) -> None:
        if target.http2:
            raise ConfigurationError('asks has no HTTP/2: set http.client = "httpx"')
        if target.proxy is not None:
            raise ConfigurationError(
                'asks knows no proxies: set http.client = "httpx", or name the host of http.url in '
                "proxy.no_proxy"
            )
        self._session = _QuietSession(
            connections=target.connections, ssl_context=target.ssl_context
        )

    async def get(self, url: str, headers: Mapping[str, str]) -> Answer:
        """See `Pool`."""
        # By itself, asks keeps no connection.
        headers = {**headers, "Connection": "keep-alive"}
        try:
            return await self._answer(url, headers)
        except ConnectionBroken:
            await self._session.close()  # those that are idle
            return await self._answer(url, headers)

    async def close(self) -> None:
        """See `Pool`."""
        await self._session.close()

    async def _answer(self, url: str, headers: Mapping[str, str]) -> Answer:
        body = bytearray()

        async def extend(data: bytes) -> None:  # noqa: ASYNC124 - asks awaits it
            body.extend(data)
            if len(body) > BODY_BYTES:
                raise too_long()

        try:
            response = await self._session.get(
                url,
                headers=headers,
                callback=extend,
                follow_redirects=False,
                retries=0,
                connection_timeout=None,  # the caller's is for all of it
            )
        except SourceError:
            raise
        except Exception as error:
            raise _explained(error, begun=bool(body)) from None
        return Answer(response.status_code, response.headers, bytes(body))


class _QuietSession(asks.Session):  # type: ignore[misc]
    """The session of asks, less the connections on which something came unasked for."""

    async def _grab_connection(self, url: str) -> Any:
        while self._conn_pool and not _is_quiet(self._conn_pool[0]):
            await self._conn_pool.popleft().aclose()
        return await super()._grab_connection(url)


def _is_quiet(stream: Any) -> bool:
    """Whether nothing has come on an idle connection, neither its end nor any data."""
    try:
        stream.extra(SocketAttribute.raw_socket).recv(1, socket.MSG_PEEK)
        return False
    except BlockingIOError:
        pass
    except OSError:
        return False
    return not holds_data(stream.extra(TLSAttribute.ssl_object, None))


def _explained(error: Exception, *, begun: bool) -> SourceError:
    """Say what a failed request means, without a secret."""
    if isinstance(error, OSError):
        return unreachable(error)
    if isinstance(error, BadHttpResponse | anyio.BrokenResourceError | anyio.EndOfStream):
        return not_http(begun=begun)
    # What asks stumbles over: a cookie without a value, a header that is not UTF-8.
    return SourceError(f"the HTTP service's answer cannot be read ({type(error).__name__})")
