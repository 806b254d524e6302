"""Tell the requests of this machine's own programs from all others.

A proxy of the same machine connects from loopback for everyone in the world, so the peer's address
alone proves nothing. A proxy that neither adds a header nor passes the client's `Host` on cannot be
told from a local program: docs/security.md says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import Final

from trading_push.transport.origin import host_of_origin
from trading_push.transport.proxies import Network

__all__ = ["is_local_request", "is_loopback_origin"]

# A host with its port, as a `Host` header has it (RFC 9110, section 7.2).
_HOST: Final = re.compile(r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9.-]+))(?::[0-9]{0,5})?")
_FROM_A_PROXY: Final = (b"forwarded", b"x-real-ip", b"via")


def is_local_request(
    peer: str, headers: Iterable[tuple[bytes, bytes]], trusted_proxies: Sequence[Network]
) -> bool:
    """Whether a program of this machine asks for this machine, with no proxy in between.

    All of this must hold: the peer's address is loopback, the one `Host` names loopback (a page of
    another name that DNS has pointed here does not: DNS rebinding), no header is one that proxies
    add, and no proxies are configured.

    Args:
        peer: The address at the other end of the socket, not one that `X-Forwarded-For` tells; a
            Unix socket has none, and is not local.
        headers: The request's, with names in lower case.
        trusted_proxies: What `server.trusted_proxies` holds.
    """
    if trusted_proxies or not _is_loopback_address(peer):
        return False
    hosts = []
    for name, value in headers:
        if name in _FROM_A_PROXY or name.startswith(b"x-forwarded-"):
            return False
        if name == b"host":
            hosts.append(value.decode("latin-1").strip().lower())
    if len(hosts) != 1:
        return False
    match = _HOST.fullmatch(hosts[0])
    return match is not None and _is_loopback_name(match["ipv6"] or match["name"])


def is_loopback_origin(origin: str) -> bool:
    """Whether an `Origin` is of a page that was served from loopback, on whatever port."""
    host = host_of_origin(origin)
    return host is not None and _is_loopback_name(host)


def _is_loopback_name(host: str) -> bool:
    return host == "localhost" or _is_loopback_address(host)


def _is_loopback_address(text: str) -> bool:
    try:
        address = ip_address(text)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
