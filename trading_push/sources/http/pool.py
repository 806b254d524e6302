"""The seam between the HTTP source and the library that sends its requests.

What holds for each library:

1. A connection is used again only after a whole answer, and when nothing has come on it since: what
   came late, or too much, is never taken for the next answer.
2. A kept connection may end just as it is used again. A GET may be sent twice (RFC 9110, section
   9.2.2): once more, without a pause, on a new connection.
3. An answer is bounded while it comes.
4. No URL, token or header, and nothing that the service wrote, is in the text of an error.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

import attrs

from trading_push.errors import SourceError
from trading_push.transport.outbound_proxies import Proxy

__all__ = [
    "CLOSE_S",
    "Answer",
    "ConnectionBroken",
    "Pool",
    "Target",
    "holds_data",
    "not_http",
    "unreachable",
]

CLOSE_S: Final = 1.0
"""How long the polite end of a connection may take."""


@attrs.frozen
class Answer:
    """What a GET was answered; the body may be packed.

    Args:
        status: The status code.
        headers: By name, whatever its case.
        body: The body as it came.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


@attrs.frozen
class Target:
    """A service, and how its connections are made.

    Args:
        connections: How many connections there may be at the same time.
        ssl_context: For TLS; None if the service has none.
        http2: Whether to speak HTTP/2, if the service does.
        proxy: The proxy that leads to the service.
    """

    connections: int
    ssl_context: ssl.SSLContext | None
    http2: bool = False
    proxy: Proxy | None = None


class Pool(Protocol):
    """Connections to one service, which are kept and used again."""

    async def get(self, url: str, headers: Mapping[str, str]) -> Answer:
        """Send a GET on a kept connection or a new one; redirects are not followed.

        Cancellation closes the connection, or leaves its other requests alone under HTTP/2.

        Raises:
            SourceError: There is no whole answer, or it is too long.
        """
        ...

    async def close(self) -> None:
        """Close the connections, none of which is in use."""
        ...


class ConnectionBroken(SourceError):
    """The connection broke before any of the answer's body had come."""


def not_http(*, begun: bool) -> SourceError:
    """Make the error of a connection that broke, or on which something else than HTTP came.

    Args:
        begun: Some of the answer's body had come, so that it is not asked for again.
    """
    kind = SourceError if begun else ConnectionBroken
    return kind("the HTTP service broke the connection, or what it answered is not HTTP")


def unreachable(error: BaseException) -> SourceError:
    """Say why there is no connection, by what the library's error was made from."""
    causes = [*_causes(error)]
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in causes):
        return SourceError(
            "the HTTP service's certificate is not one to trust: correct http.url, or name the "
            "authority that signed it in http.ca_file",
            retryable=False,
        )
    reasons = [_reason(each) for each in causes if isinstance(each, OSError)]
    said = next(filter(None, reasons), "no address of it answered")
    return SourceError(f"the HTTP service cannot be reached: {said}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Walk from an error to what it was raised from, the outermost first."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                yield from _causes(each)
            return
        error = error.__cause__ or error.__context__


def _reason(error: OSError) -> str | None:
    if isinstance(error, ssl.SSLError):
        return f"no TLS ({error.reason})"
    if isinstance(error, socket.gaierror) or error.errno is None:
        return error.strerror
    return os.strerror(error.errno)


def holds_data(tls: ssl.SSLObject | None) -> bool:
    """Whether TLS holds data, or an end, which its socket does not show; it is then used up."""
    if tls is None:
        return False
    try:
        tls.read(1)
    except ssl.SSLWantReadError:
        return False
    except ssl.SSLError:
        pass
    return True
