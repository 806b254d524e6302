"""Whose `X-Forwarded-For` is believed: the client's address behind reverse proxies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

__all__ = ["Network", "client_address", "networks"]

Network = IPv4Network | IPv6Network


def networks(text: str) -> tuple[Network, ...]:
    """The networks that a setting names, with blanks between them.

    Raises:
        ValueError: One of them is no address and no network.
    """
    return tuple(ip_network(each, strict=False) for each in text.split())


def client_address(
    peer: str, headers: Iterable[tuple[bytes, bytes]], trusted: Sequence[Network]
) -> str:
    """The address of the client itself.

    Each proxy adds to the end of the header the address that it was asked from. So from the end on
    it is true as long as a trusted proxy has said it, and whatever stands before that was said by
    somebody whom nobody vouches for.

    Args:
        peer: The address at the other end of the connection.
        headers: The handshake's, names in lower case.
        trusted: The proxies' own networks.
    """
    if not trusted or not _is_trusted(peer, trusted):
        return peer
    values = (value.decode("latin-1") for name, value in headers if name == b"x-forwarded-for")
    for said in reversed([part for value in values for part in value.split(",")]):
        address = _address(said.strip())
        if address is None:
            break
        peer = address
        if not _is_trusted(peer, trusted):
            break
    return peer


def _is_trusted(address: str, trusted: Sequence[Network]) -> bool:
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    return any(parsed in network for network in trusted)


def _address(text: str) -> str | None:
    # Some proxies add the port: 10.0.0.1:4711, [2001:db8::1]:4711.
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        return str(ip_address(text))
    except ValueError:
        return None
