"""Open a stream to a host through a proxy: CONNECT by h11, SOCKS5 by python-socks.

The deadline is the caller's. No user name or password is in the text of an error.
"""

from __future__ import annotations

import base64
import errno
import importlib.util
import math
import ssl
from typing import Final

import h11
import trio

from trading_push.errors import ConfigurationError
from trading_push.transport.outbound_proxies import Proxy

__all__ = ["check_proxy", "open_tunnel"]


def check_proxy(proxy: Proxy | None) -> None:
    """Check that what a proxy needs is installed.

    Raises:
        ConfigurationError: It is not.
    """
    if proxy is not None and proxy.is_socks and importlib.util.find_spec("python_socks") is None:
        raise ConfigurationError(
            "a SOCKS5 proxy needs the library python-socks: pip install 'trading_push[proxy]'"
        )


async def open_tunnel(proxy: Proxy, host: str, port: int) -> trio.abc.Stream:
    """Open a stream through a proxy, which resolves the host's name.

    Raises:
        OSError: The proxy cannot be reached, or does not lead there; `strerror` says which.

    Cancellation leaves no stream open.
    """
    if proxy.is_socks:
        return await _through_socks(proxy, host, port)
    try:
        stream: trio.abc.Stream = await trio.open_tcp_stream(proxy.host, proxy.port)
    except OSError as error:
        raise _failed(_AWAY) from error
    try:
        if proxy.scheme == "https":
            stream = trio.SSLStream(
                stream,
                ssl.create_default_context(),
                server_hostname=proxy.host,
                https_compatible=True,
            )
        await _connect(stream, proxy, host, port)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        await trio.aclose_forcefully(stream)
        raise _failed(_BROKE) from error
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


async def _connect(stream: trio.abc.Stream, proxy: Proxy, host: str, port: int) -> None:
    """Ask an HTTP proxy for a tunnel (RFC 9110, section 9.3.6)."""
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    headers = [("Host", target), ("User-Agent", "trading_push")]
    if proxy.username is not None:
        known = f"{proxy.username}:{proxy.password}".encode()
        headers.append(("Proxy-Authorization", f"Basic {base64.b64encode(known).decode()}"))
    http = h11.Connection(h11.CLIENT)
    try:
        request = http.send(h11.Request(method="CONNECT", target=target, headers=headers))
        await stream.send_all((request or b"") + (http.send(h11.EndOfMessage()) or b""))
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(bytes(await stream.receive_some(65_536)))
            elif isinstance(event, h11.Response):
                break
            elif not isinstance(event, h11.InformationalResponse):
                raise _failed(_BROKE)
    except h11.ProtocolError as error:
        raise _failed(_BROKE) from error
    if event.status_code == 407:
        raise _failed("the proxy asks for another user or password")
    if not 200 <= event.status_code < 300:
        raise _failed(f"the proxy does not lead there: it answered {event.status_code}")
    if http.trailing_data[0]:
        # What is behind it speaks second, by TLS and WebSocket alike.
        raise _failed(_BROKE)


async def _through_socks(proxy: Proxy, host: str, port: int) -> trio.abc.Stream:
    # It is installed with the extra `proxy` only.
    import python_socks
    from python_socks.async_.trio.v2 import Proxy as SocksProxy

    asked = SocksProxy(
        python_socks.ProxyType.SOCKS5,
        proxy.host,
        proxy.port,
        username=proxy.username,
        password=proxy.password,
        rdns=True,
    )
    try:
        # A deadline of its own would be 60 s.
        return (await asked.connect(host, port, timeout=math.inf)).trio_stream
    except python_socks.ProxyConnectionError as error:
        raise _failed(_AWAY) from error
    except python_socks.ProxyError as error:
        # A code says why the proxy cannot connect; without one, it does not want to.
        if error.error_code is None:
            raise _failed("the proxy refuses, or asks for another user or password") from error
        code = int(error.error_code)
        raise _failed(f"the proxy does not lead there: it answered {code}") from error
    except Exception as error:  # what a peer that is no proxy can make of it
        raise _failed(_BROKE) from error


_AWAY: Final = "the proxy cannot be reached"
_BROKE: Final = "the proxy broke the connection, or is none"


def _failed(text: str) -> OSError:
    return OSError(errno.EHOSTUNREACH, text)
