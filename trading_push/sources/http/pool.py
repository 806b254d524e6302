"""Connections that are kept and used again, by the library asks.

1. A connection is used again only after a whole answer, and when nothing has come on it since: what
   came late, or too much, is never taken for the next answer.
2. An answer is bounded while it comes.
3. No URL, token or header, and nothing that the service wrote, is in the text of an error.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Mapping
from typing import Any

import anyio
import attrs
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSAttribute

from trading_push.errors import ConfigurationError, SourceError
from trading_push.sources.http.body import BODY_BYTES, too_long

try:
    import asks
    from asks.errors import BadHttpResponse
except ImportError:
    # asks 3.0.0 says that it needs anyio 3, which fails on today's trio; it works with anyio 4.
    raise ConfigurationError(
        "the HTTP source needs the library asks: pip install --no-deps asks async_generator h11"
    ) from None

__all__ = ["Answer", "ConnectionBroken", "ConnectionPool"]


class ConnectionBroken(SourceError):
    """The connection broke before any of the answer's body had come."""


@attrs.frozen
class Answer:
    """What a GET was answered; the body may be packed."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class ConnectionPool:
    """The connections to one service.

    Args:
        connections: How many there may be at the same time.
        ssl_context: For TLS; None where the service has none.
    """

    def __init__(self, connections: int, ssl_context: ssl.SSLContext | None) -> None:
        self._session = _QuietSession(connections=connections, ssl_context=ssl_context)

    async def get(self, url: str, headers: Mapping[str, str]) -> Answer:
        """Send a GET once, on a kept connection or a new one; redirects are not followed.

        Cancellation closes the connection.

        Raises:
            ConnectionBroken: The connection broke before any of the body had come.
            SourceError: There is no whole answer, or it is too long.
        """
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

    async def close(self) -> None:
        """Close the connections that are idle."""
        await self._session.close()


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
    # TLS may hold what the socket does not.
    tls = stream.extra(TLSAttribute.ssl_object, None)
    if tls is None:
        return True
    try:
        tls.read(1)
    except ssl.SSLWantReadError:
        return True
    except ssl.SSLError:
        pass
    return False


def _explained(error: Exception, *, begun: bool) -> SourceError:
    """Say what a failed request means, without a secret."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return SourceError(
            "the HTTP service's certificate is not one to trust: correct http.url, or add the "
            "authority that signed it to the system's",
            retryable=False,
        )
    if isinstance(error, OSError):
        return SourceError(f"the HTTP service cannot be reached: {_reason(error)}")
    if isinstance(error, BadHttpResponse | anyio.BrokenResourceError | anyio.EndOfStream):
        kind = SourceError if begun else ConnectionBroken
        return kind("the HTTP service broke the connection, or what it answered is not HTTP")
    # What asks stumbles over: a cookie without a value, a header that is not UTF-8.
    return SourceError(f"the HTTP service's answer cannot be read ({type(error).__name__})")


def _reason(error: OSError) -> str:
    # anyio says only in the cause why it could not connect.
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if isinstance(cause, ssl.SSLError):
        return f"no TLS ({cause.reason})"
    if isinstance(cause, socket.gaierror) or cause.errno is None:
        return cause.strerror or "no address of it answered"
    return os.strerror(cause.errno)
