"""Find the address of a client behind reverse proxies, by `X-Forwarded-For`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final, Literal

__all__ = ["UNIX", "Network", "client_address", "networks"]

UNIX: Final = "unix:"
"""Stands for whoever connects by a Unix socket, whose peer has no address."""

Network = IPv4Network | IPv6Network | Literal["unix:"]

_NO_ADDRESS: Final = "-"


def networks(text: str) -> tuple[Network, ...]:
    """Parse addresses and networks that are separated by spaces; `unix:` is among them.

    Raises:
        ValueError: One of them is neither.
    """
    return tuple(UNIX if each == UNIX else ip_network(each, strict=False) for each in text.split())


def client_address(
    peer: str, headers: Iterable[tuple[bytes, bytes]], trusted: Sequence[Network]
) -> str:
    """The address of the client itself.

    Each proxy appends the address that it was asked from. Read from its end, the header is true as
    long as a trusted proxy wrote the entry; anyone may have written what stands before.

    Args:
        peer: The address at the other end of the connection; `-` if it has none.
        headers: The headers of the handshake, with names in lower case.
        trusted: The networks of the proxies.
    """
    if not trusted or not _is_trusted(peer, trusted):
        return peer
    values = (value.decode("latin-1") for name, value in headers if name == b"x-forwarded-for")
    for entry in reversed([part for value in values for part in value.split(",")]):
        address = _address(entry.strip())
        if address is None:
            break
        peer = address
        if not _is_trusted(peer, trusted):
            break
    return peer


def _is_trusted(address: str, trusted: Sequence[Network]) -> bool:
    if address == _NO_ADDRESS:
        return UNIX in trusted
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return any(parsed in network for network in trusted if network != UNIX)


def _address(text: str) -> str | None:
    # Some proxies add a port: 10.0.0.1:4711, [2001:db8::1]:4711.
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(ip_address(text))
    except ValueError:
        return None
