"""What a setting may be: a check for each kind of value, with an error that says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import msgspec

from trading_push.errors import ConfigurationError
from trading_push.transport.origin import is_origin
from trading_push.transport.proxies import networks as parsed_networks

__all__ = [
    "DOT_SEGMENT",
    "SECRET_BYTES",
    "Check",
    "columns",
    "file_path",
    "headers",
    "is_host",
    "is_identifier",
    "is_json",
    "is_object_name",
    "is_path",
    "is_pointer",
    "is_query",
    "is_token",
    "is_url",
    "is_websocket_url",
    "networks",
    "number",
    "one_of",
    "origins",
    "secret",
    "switch",
    "text",
    "url_template",
    "whole",
    "words",
]

SECRET_BYTES = 32
"""How long the secret of HS256 is at least (RFC 7518, section 3.2)."""

DOT_SEGMENT = re.compile(r"/(?:\.|%2e){1,2}(?:[/?]|$)", re.IGNORECASE)
"""A piece of a URL's path that leads up, or nowhere (RFC 3986, section 5.2.4)."""

Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _shown(attribute: attrs.Attribute[Any], value: object) -> str:
    """A value for a message: short, and not at all where it is a secret."""
    if attribute.repr is False:
        return "not usable"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(attribute: attrs.Attribute[Any], value: object, advice: str) -> ConfigurationError:
    return ConfigurationError(f"{attribute.name} is {_shown(attribute, value)}: {advice}")


def number(low: float, high: float = 1_000_000) -> Check:
    """A check for a finite number from `low` to `high`; no bool passes, nor a NaN."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise _refuse(attribute, value, f"give a number, {low} to {high}")

    return check


def whole(low: int, high: int = 2**53) -> Check:
    """A check for a whole number from `low` to `high`."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(attribute, value, f"give a whole number, {low} to {high}")

    return check


def one_of(*choices: str) -> Check:
    """A check for one of a few words."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, str) or value not in choices:
            raise _refuse(attribute, value, f"give one of {', '.join(choices)}")

    return check


def text(advice: str, accepts: Callable[[str], bool] = bool) -> Check:
    """A check for a text that `accepts` takes; by default one that is not empty."""

    def check(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, str) or not accepts(value):
            raise _refuse(attribute, value, advice)

    return check


def switch(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """A check for true or false, and nothing that merely counts as one of them."""
    if not isinstance(value, bool):
        raise _refuse(attribute, value, "give true or false")


def words(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """A check for a text of words, or none."""
    if not isinstance(value, str) or not value.isprintable():
        raise _refuse(attribute, value, "give words with blanks between them")


def file_path(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """A check for a path; whether something is there is for whoever opens it."""
    if not isinstance(value, Path) or "\0" in str(value):
        raise _refuse(attribute, value, "give the path of a file")


def columns(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """A check for a tuple of names."""
    if not isinstance(value, tuple) or not all(isinstance(name, str) and name for name in value):
        raise _refuse(attribute, value, "give the names of columns")


def secret(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """A check for the secret of HS256, which no message shows."""
    try:
        enough = isinstance(value, str) and len(value.encode()) >= SECRET_BYTES
    except UnicodeEncodeError:  # bytes of the environment that are no UTF-8
        enough = False
    if not enough:
        raise ConfigurationError(
            f"{attribute.name} is not usable: give a random text of {SECRET_BYTES} bytes or more"
        )


def is_path(value: str) -> bool:
    return value.startswith("/") and value.isascii() and value.isprintable() and " " not in value


def is_url(value: str) -> bool:
    return value.startswith(("https://", "http://")) and len(value.split()) == 1


def is_websocket_url(value: str) -> bool:
    return value.startswith(("wss://", "ws://")) and len(value.split()) == 1


def is_host(value: str) -> bool:
    return len(value.split()) == 1 and value.isprintable() and "/" not in value


def url_template(*names: str) -> Check:
    """A check for an http(s) URL whose path or query holds each of these names in braces.

    There may be no user and password in it, no fragment, no `.` or `..`, and nothing but what
    RFC 3986 lets stand there.
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
# What the source says itself, or HTTP says.
_OWN_HEADERS = frozenset(
    {
        *("accept-encoding", "connection", "content-length", "host", "if-none-match"),
        *("te", "transfer-encoding", "upgrade"),
    }
)


def headers(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
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


def is_token(value: str) -> bool:
    return bool(value) and value.isascii() and value.isprintable() and " " not in value


def is_pointer(value: str) -> bool:
    return re.fullmatch(r"(?:/(?:[^~/]|~[01])*)*", value) is not None  # RFC 6901, section 3


def is_query(value: str) -> bool:
    return ":user_id" in value  # :user_ids too


def is_identifier(value: str) -> bool:
    # Of capitals, NOTIFY makes small letters and pg_notify() does not; a name has 63 at most.
    return re.fullmatch("[a-z_][a-z0-9_]{0,62}", value) is not None


def is_object_name(value: str) -> bool:
    module, _, attribute = value.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def is_json(value: str) -> bool:
    try:
        msgspec.json.decode(value)  # strict, where json takes NaN and Infinity
    except (ValueError, RecursionError):
        return False
    return True


def origins(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, str) or not all(map(is_origin, value.split())):
        advice = "give origins like https://app.example.com, with blanks between them"
        raise _refuse(attribute, value, advice)


def networks(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    try:
        if isinstance(value, str):
            parsed_networks(value)
            return
    except ValueError:
        pass
    advice = "give addresses or networks like 10.0.0.0/8, with blanks between them"
    raise _refuse(attribute, value, advice)
