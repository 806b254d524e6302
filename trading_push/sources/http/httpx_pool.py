"""Requests by the library httpx, without its client: that one keeps cookies, and reads proxies from
the environment in a way of its own.

1. A pool of httpcore needs the more time for a request the more are under way in it, so that the
   connections are spread over pools of `POOL_CONNECTIONS`.
2. httpcore keeps what has come behind an answer for the next one. So each of its streams notes
   whether anything was read since a request was written (`_KeptStream`).
3. httpx times each read, and never a whole request: it is given no time-out, and the caller sets
   the deadline.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final

import trio

from trading_push.errors import ConfigurationError, SourceError
from trading_push.sources.http.body import BODY_BYTES, too_long
from trading_push.sources.http.pool import (
    CLOSE_S,
    Answer,
    ConnectionBroken,
    Target,
    holds_data,
    not_http,
    unreachable,
)
from trading_push.transport.outbound_proxies import Proxy

try:
    import httpcore
    import httpx  # noqa: ASYNC127 - httpx2 is another library
except ImportError:
    raise ConfigurationError(
        "the HTTP source needs the library httpx: pip install 'trading_push[http]'"
    ) from None

__all__ = ["HttpxPool"]

POOL_CONNECTIONS: Final = 20
"""How many connections stand in one pool of httpcore."""


class HttpxPool:
    """Connections to one service, by httpx; see `Pool`.

    Raises:
        ConfigurationError: The proxy needs a library that is not installed.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        sizes = [
            min(POOL_CONNECTIONS, target.connections - begin)
            for begin in range(0, target.connections, POOL_CONNECTIONS)
        ]
        # How many requests may still begin in each part.
        self._free = {_transport(target, size): size for size in sizes}
        # For requests that are sent again: it keeps no connection.
        self._fresh = _transport(target, target.connections, keep=False)

    async def get(self, url: str, headers: Mapping[str, str]) -> Answer:
        """See `Pool`."""
        try:
            request = httpx.Request("GET", url, headers=dict(headers))
        except (httpx.InvalidURL, UnicodeError):
            raise SourceError(
                "the user's id is one that no URL can hold", retryable=False
            ) from None
        # The first part that has room, so that few connections are kept busy.
        transport = next((each for each, free in self._free.items() if free), self._fresh)
        if transport is not self._fresh:
            self._free[transport] -= 1
        try:
            return await _answer(transport, request)
        except ConnectionBroken:
            return await _answer(self._fresh, request)
        finally:
            if transport is not self._fresh:
                self._free[transport] += 1

    async def close(self) -> None:
        """See `Pool`."""
        for transport in (*self._free, self._fresh):
            await transport.aclose()


def _transport(target: Target, size: int, *, keep: bool = True) -> httpx.AsyncHTTPTransport:
    try:
        transport = httpx.AsyncHTTPTransport(
            # A service without TLS needs none: this one trusts nobody, and is made fast.
            verify=target.ssl_context or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            trust_env=False,
            http2=target.http2,
            limits=httpx.Limits(
                max_connections=size,
                max_keepalive_connections=size if keep else 0,
                keepalive_expiry=None,
            ),
            proxy=None if target.proxy is None else _httpx_proxy(target.proxy),
        )
    except ImportError:
        raise ConfigurationError(
            "a SOCKS5 proxy needs the library socksio: pip install 'trading_push[http]'"
        ) from None
    # httpx has no parameter for it; httpcore has one.
    pool = transport._pool
    pool._network_backend = _Backend(pool._network_backend)
    return transport


def _httpx_proxy(proxy: Proxy) -> httpx.Proxy:
    auth = None if proxy.username is None else (proxy.username, proxy.password or "")
    return httpx.Proxy(proxy.url, auth=auth)


async def _answer(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> Answer:
    body = bytearray()
    response: httpx.Response | None = None
    opened: list[_KeptStream] = []
    token = _opened.set(opened)
    try:
        response = await transport.handle_async_request(request)
        stream = response.extensions.get("network_stream")
        if isinstance(stream, _KeptStream) and not stream.heard and not _is_http2(response):
            raise not_http(begun=False)  # it was there before it was asked for
        # To leave the loop would leave the generators of httpx behind it unfinished.
        with trio.CancelScope() as reading:
            async for part in response.aiter_raw():
                if len(body) <= BODY_BYTES:
                    body += part
                if len(body) > BODY_BYTES:
                    reading.cancel()
        if len(body) > BODY_BYTES:
            raise too_long()
        return Answer(response.status_code, response.headers, bytes(body))
    except (httpx.HTTPError, httpx.StreamError, UnicodeError) as error:
        raise _explained(error, begun=bool(body)) from None
    finally:
        _opened.reset(token)
        with trio.move_on_after(CLOSE_S, shield=True):
            if response is not None:
                # Closes the connection too, unless the whole answer has come.
                await response.aclose()
            else:
                for each in opened:
                    await each.abandon()


def _is_http2(response: httpx.Response) -> bool:
    return response.extensions.get("http_version") == b"HTTP/2"


def _explained(error: Exception, *, begun: bool) -> SourceError:
    """Say what a failed request means, without a secret."""
    if isinstance(error, httpx.ProxyError):
        return SourceError(
            "the proxy does not lead to the HTTP service: look after proxy.url, or HTTPS_PROXY"
        )
    if isinstance(error, httpx.ConnectError):
        return unreachable(error)
    if isinstance(error, httpx.LocalProtocolError | UnicodeError):
        return SourceError("the HTTP service cannot be asked for this user", retryable=False)
    return not_http(begun=begun)


# The streams that the request of this task has opened.
_opened: ContextVar[list[_KeptStream]] = ContextVar("_opened")


class _Backend(httpcore.AsyncNetworkBackend):
    """A backend of httpcore whose streams are `_KeptStream`s."""

    def __init__(self, backend: httpcore.AsyncNetworkBackend) -> None:
        self._backend = backend

    async def connect_tcp(self, *args: Any, **named: Any) -> httpcore.AsyncNetworkStream:
        stream = _KeptStream(await self._backend.connect_tcp(*args, **named))
        _opened.get().append(stream)
        return stream

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


class _KeptStream(httpcore.AsyncNetworkStream):
    """A stream that says whether anything has come since something was last sent."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self.heard = False
        """Whether anything was read since the last write."""
        # A stream of TLS stands on it, which closes it.
        self._carries_tls = False

    async def read(self, *args: Any, **named: Any) -> bytes:
        data = await self._stream.read(*args, **named)
        self.heard = True
        return data

    async def write(self, *args: Any, **named: Any) -> None:
        self.heard = False
        await self._stream.write(*args, **named)

    async def aclose(self) -> None:
        # httpcore shields it, and the end of TLS is written to a peer that may not read.
        with trio.move_on_after(CLOSE_S):
            await self._stream.aclose()

    async def abandon(self) -> None:
        """Close it after a request that had no answer: httpcore leaves it open where a SOCKS5 proxy
        does not answer."""
        if not self._carries_tls:
            await self.aclose()

    async def start_tls(self, *args: Any, **named: Any) -> httpcore.AsyncNetworkStream:
        self._carries_tls = True
        return _KeptStream(await self._stream.start_tls(*args, **named))

    def get_extra_info(self, info: str) -> Any:
        found = self._stream.get_extra_info(info)
        if info == "is_readable" and not found:
            # An idle connection is dropped where this is true. TLS may hold what the socket does
            # not.
            return holds_data(self._stream.get_extra_info("ssl_object"))
        return found
