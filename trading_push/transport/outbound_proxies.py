"""Decide which proxy leads to a URL that we open: by the settings, or by the usual environment.

1. A host of `no_proxy`, of the setting or of the environment, is connected to directly, and so is
   this machine itself (`localhost`, a loopback address).
2. Otherwise the setting's proxy leads to every URL.
3. Where the setting has none, the environment decides, small letters before capitals: HTTPS_PROXY
   for https and wss, HTTP_PROXY for http and ws, ALL_PROXY for the rest.

The name of a host is resolved by the proxy. No user name or password of a proxy is in an error.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, unquote, urlsplit

import attrs

from trading_push.errors import ConfigurationError

__all__ = ["OutboundProxies", "Proxy"]

_PORTS: Final = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}
_DEFAULT_PORTS: Final = {"http": 80, "ws": 80, "https": 443, "wss": 443}
_VARIABLES: Final = {
    "http": "http_proxy",
    "ws": "http_proxy",
    "https": "https_proxy",
    "wss": "https_proxy",
}


@attrs.frozen
class Proxy:
    """A proxy: HTTP (CONNECT), the same over TLS, or SOCKS5."""

    scheme: str
    host: str
    port: int
    username: str | None = attrs.field(default=None, repr=False)
    password: str | None = attrs.field(default=None, repr=False)

    @classmethod
    def of(cls, url: str, name: str = "proxy.url") -> Proxy:
        """Parse the URL of a proxy; without a scheme it is one of HTTP, as curl takes it.

        Args:
            url: As `http://user:password@host:3128` or `socks5://host`.
            name: What the error calls it.

        Raises:
            ConfigurationError: It is not the URL of a proxy.
        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            scheme, port = parts.scheme, parts.port
            host = parts.hostname or ""
            usable = (
                scheme in _PORTS
                and port != 0
                and bool(_HOST.fullmatch(host))
                and parts.path in ("", "/")
                and not parts.query
                and not parts.fragment
                and url.isascii()
                and url.isprintable()
            )
        except ValueError:
            usable = False
        if not usable:
            raise ConfigurationError(
                f"{name} is not usable: give one like http://host:3128 or socks5://host:1080"
            )
        username = None if parts.username is None else unquote(parts.username)
        password = None if parts.username is None else unquote(parts.password or "")
        return cls(scheme, host, port or _PORTS[scheme], username, password)

    @property
    def is_socks(self) -> bool:
        """Whether it speaks SOCKS5."""
        return self.scheme.startswith("socks")

    @property
    def url(self) -> str:
        """Its URL without user name and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def whole_url(self) -> str:
        """Its URL with user name and password, which must not be shown."""
        if self.username is None:
            return self.url
        user = f"{quote(self.username, safe='')}:{quote(self.password or '', safe='')}"
        return self.url.replace("://", f"://{user}@", 1)


_HOST = re.compile(r"[0-9A-Za-z._:-]+")


class OutboundProxies:
    """The proxies that lead to the URLs of one service.

    Args:
        url: The setting `proxy.url`; None to go by the environment.
        no_proxy: The setting `proxy.no_proxy`: hosts, with their subdomains, addresses and
            networks, each with or without a port, separated by spaces or commas; `*` for all.
        environment: The environment's variables; by default those of this process.

    Raises:
        ConfigurationError: A proxy's URL cannot be used.
    """

    def __init__(
        self,
        url: str | None = None,
        no_proxy: str = "",
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        def given(name: str) -> str:
            return environment.get(name) or environment.get(name.upper()) or ""

        self._direct = f"{no_proxy},{given('no_proxy')}".replace(",", " ").split()
        # By the scheme of the URL that is opened.
        self._proxies: dict[str, Proxy] = {}
        for scheme, variable in _VARIABLES.items():
            if url is not None:
                self._proxies[scheme] = Proxy.of(url)
                continue
            # A CGI script's HTTP_PROXY is a request's header.
            is_header = variable == "http_proxy" and "REQUEST_METHOD" in environment
            name = variable if given(variable) and not is_header else "all_proxy"
            if given(name):
                self._proxies[scheme] = Proxy.of(given(name), name.upper())

    def of(self, url: str) -> Proxy | None:
        """Return the proxy that leads to a URL (http, https, ws or wss); None for none."""
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
        if _is_this_machine(host) or any(_covers(each, host, port) for each in self._direct):
            return None
        return self._proxies.get(parts.scheme)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _covers(entry: str, host: str, port: int | None) -> bool:
    """Whether an entry of `no_proxy` is about a host."""
    entry = entry.lower()
    if entry == "*":
        return True
    # The port stands behind a name, an IPv4 address, or an IPv6 address in brackets.
    found = re.fullmatch(r"(\[[^]]*\]|[^:]*):([0-9]+)", entry)
    if found:
        if int(found[2]) != port:
            return False
        entry = found[1]
    entry = entry.strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = entry.removeprefix("*").strip(".")
        return bool(name) and (host == name or host.endswith(f".{name}"))
    try:
        return address in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
