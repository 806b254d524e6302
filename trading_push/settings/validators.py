"""Validators of the settings; each refuses a value with an error that says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import attrs
import msgspec

from trading_push.errors import ConfigurationError
from trading_push.logs.catalogue import CATALOGUE
from trading_push.transport.origin import is_origin
from trading_push.transport.outbound_proxies import Proxy
from trading_push.transport.proxies import networks as parsed_networks

__all__ = [
    "DOT_SEGMENT",
    "SECRET_BYTES",
    "Validator",
    "ccxt_options",
    "columns",
    "events",
    "file_path",
    "headers",
    "is_host",
    "is_identifier",
    "is_json",
    "is_object_name",
    "is_path",
    "is_pointer",
    "is_proxy_url",
    "is_query",
    "is_time_zone",
    "is_token",
    "is_url",
    "is_websocket_url",
    "market_channels",
    "networks",
    "number",
    "one_of",
    "optional",
    "origins",
    "secret",
    "switch",
    "text",
    "url_template",
    "whole",
    "words",
]

SECRET_BYTES = 32
"""The least length of the secret of HS256 (RFC 7518, section 3.2)."""

DOT_SEGMENT = re.compile(r"/(?:\.|%2e){1,2}(?:[/?]|$)", re.IGNORECASE)
"""A `.` or `..` in the path of a URL (RFC 3986, section 5.2.4)."""

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]
"""Takes an instance (which none of these looks at), the attribute and the value."""

optional = attrs.validators.optional
"""Make a validator that also accepts None."""


def _shown(attribute: attrs.Attribute[Any], value: object) -> str:
    """Put a value in a message: cut, and left out if it is a secret."""
    if attribute.repr is False:
        return "not usable"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(attribute: attrs.Attribute[Any], value: object, advice: str) -> ConfigurationError:
    return ConfigurationError(f"{attribute.name} is {_shown(attribute, value)}: {advice}")


def number(low: float, high: float = 1_000_000) -> Validator:
    """Accept a finite number from `low` to `high`, and neither a bool nor a NaN."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise _refuse(attribute, value, f"give a number, {low} to {high}")

    return check


def whole(low: int, high: int = 2**53) -> Validator:
    """Accept a whole number from `low` to `high`, and no bool."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(attribute, value, f"give a whole number, {low} to {high}")

    return check


def one_of(*choices: str) -> Validator:
    """Accept one of a few words."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, str) or value not in choices:
            raise _refuse(attribute, value, f"give one of {', '.join(choices)}")

    return check


def events(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Accept names of log events, with spaces between; none by an empty text."""
    names = value.split() if isinstance(value, str) else [value]
    if unknown := [name for name in names if name not in CATALOGUE]:
        raise _refuse(
            attribute, value, f"there is no event {unknown[0]!r}: docs/logs.md has their names"
        )


def text(advice: str, accepts: Callable[[str], bool] = bool) -> Validator:
    """Accept a text for which `accepts` is true; by default any that is not empty."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, str) or not accepts(value):
            raise _refuse(attribute, value, advice)

    return check


def switch(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Accept true or false, and nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise _refuse(attribute, value, "give true or false")


def words(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Accept words that are separated by spaces, or an empty text."""
    if not isinstance(value, str) or not value.isprintable():
        raise _refuse(attribute, value, "give words separated by spaces")


def file_path(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Accept a path; whether there is a file shows when it is opened."""
    if not isinstance(value, Path) or "\0" in str(value):
        raise _refuse(attribute, value, "give the path of a file")


def columns(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Accept a tuple of names."""
    if not isinstance(value, tuple) or not all(isinstance(name, str) and name for name in value):
        raise _refuse(attribute, value, "give the names of columns")


def secret(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Accept a secret of HS256; no message shows it."""
    try:
        enough = isinstance(value, str) and len(value.encode()) >= SECRET_BYTES
    except UnicodeEncodeError:  # bytes of the environment that are not UTF-8
        enough = False
    if not enough:
        raise ConfigurationError(
            f"{attribute.name} is not usable: give a random text of {SECRET_BYTES} bytes or more"
        )


def is_path(value: str) -> bool:
    """Whether it is the path of a URL, beginning with /."""
    return value.startswith("/") and value.isascii() and value.isprintable() and " " not in value


def is_url(value: str) -> bool:
    """Whether it is one http(s) URL."""
    return value.startswith(("https://", "http://")) and len(value.split()) == 1


def is_websocket_url(value: str) -> bool:
    """Whether it is one ws(s) URL."""
    return value.startswith(("wss://", "ws://")) and len(value.split()) == 1


def is_proxy_url(value: str) -> bool:
    """Whether it is the URL of a proxy."""
    try:
        Proxy.of(value)
    except ConfigurationError:
        return False
    return True


def is_host(value: str) -> bool:
    """Whether it can be an address or a host name."""
    return len(value.split()) == 1 and value.isprintable() and "/" not in value


def url_template(*names: str) -> Validator:
    """Accept an http(s) URL whose path or query holds each of these names in braces.

    It must be valid by RFC 3986 and have no user, password or fragment, and no `.` or `..`.
    """
    piece = "|".join((r"[\w.~!$&'()*+,;=:@/?-]", "%[0-9A-Fa-f]{2}", *(f"{{{n}}}" for n in names)))
    host = r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
    url = re.compile(f"https?://{host}/(?:{piece})*", re.ASCII)
    in_braces = [f"{{{name}}}" for name in names]
    return text(
        f"give one like https://host/path with {' and '.join(in_braces)} in it, and without a user "
        "or password (http.token is for a token)",
        lambda value: (
            url.fullmatch(value) is not None
            and all(name in value for name in in_braces)
            and not DOT_SEGMENT.search(value)
            and int((_PORT.match(value) or ["", "80"])[1]) in range(1, 65536)
        ),
    )


_PORT = re.compile(r"https?://[^/]*:([0-9]+)/")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
# Headers that the source or the HTTP library sets itself.
_OWN_HEADERS = frozenset(
    {
        *("accept-encoding", "connection", "content-length", "host", "if-none-match"),
        *("te", "transfer-encoding", "upgrade"),
    }
)


def headers(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Accept a table of request headers, without those that the source sets itself."""
    if not isinstance(value, dict):
        raise _refuse(attribute, value, "write a table [http.headers] in the configuration file")
    for name, text_ in value.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ConfigurationError(f"{attribute.name}: one has no name that HTTP knows")
        if name.lower() in _OWN_HEADERS:
            raise ConfigurationError(f"{attribute.name}.{name} is not for you to set: remove it")
        if (
            not isinstance(text_, str)
            or text_ != text_.strip()
            or not (text_.isascii() and text_.isprintable())
        ):
            raise ConfigurationError(
                f"{attribute.name}.{name} is not usable: give a text of ASCII characters"
            )


def ccxt_options(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Accept a table of ccxt's options, which ccxt itself gives a meaning."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise _refuse(attribute, value, "write a table [ccxt.options] in the configuration file")


def is_token(value: str) -> bool:
    """Whether it can stand behind `Bearer`."""
    return bool(value) and value.isascii() and value.isprintable() and " " not in value


def is_pointer(value: str) -> bool:
    """Whether it is a JSON pointer (RFC 6901, section 3)."""
    return re.fullmatch(r"(?:/(?:[^~/]|~[01])*)*", value) is not None


def is_query(value: str) -> bool:
    """Whether it selects by `:user_ids` or `:user_id`."""
    return ":user_id" in value  # which `:user_ids` holds as well


def is_identifier(value: str) -> bool:
    """Whether it is a name that NOTIFY and pg_notify() read alike."""
    # NOTIFY turns capitals into small letters and pg_notify() does not. 63 characters at most.
    return re.fullmatch("[a-z_][a-z0-9_]{0,62}", value) is not None


def is_time_zone(value: str) -> bool:
    """Whether it is the IANA name of a time zone that this machine knows."""
    try:
        return value == "UTC" or bool(ZoneInfo(value))
    except (ZoneInfoNotFoundError, ValueError, OSError):  # a directory is an OSError
        return False


def is_object_name(value: str) -> bool:
    """Whether it is `module:attribute`."""
    module, _, attribute = value.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def is_json(value: str) -> bool:
    """Whether it is JSON."""
    try:
        msgspec.json.decode(value)  # strict, where json takes NaN and Infinity
    except (ValueError, RecursionError):
        return False
    return True


def origins(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Accept origins that are separated by spaces."""
    if not isinstance(value, str) or not all(map(is_origin, value.split())):
        advice = "give origins like https://app.example.com, separated by spaces"
        raise _refuse(attribute, value, advice)


def market_channels(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Accept names of market channels that are separated by spaces."""
    known = ("ticker", "candles", "ticker.*")
    if not isinstance(value, str) or not all(name in known for name in value.split()):
        raise _refuse(attribute, value, f"give some of {', '.join(known)}, separated by spaces")


def networks(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Accept addresses and networks that are separated by spaces."""
    try:
        if isinstance(value, str):
            parsed_networks(value)
            return
    except ValueError:
        pass
    advice = "give addresses or networks like 10.0.0.0/8, or unix:, separated by spaces"
    raise _refuse(attribute, value, advice)
