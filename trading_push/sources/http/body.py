"""The body of an answer: bounded, unpacked, strict JSON, and the data within it."""

from __future__ import annotations

import zlib
from typing import Final

import msgspec

from trading_push.errors import SourceError
from trading_push.sources.http.pointer import resolve_pointer

__all__ = ["BODY_BYTES", "by_user", "data_in", "too_long", "unpacked"]

BODY_BYTES: Final = 8 * 1024 * 1024
"""How long an answer may be, packed or not."""

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_objects = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_user_id = msgspec.json.Decoder(str | int).decode


def too_long() -> SourceError:
    """Make the error of an answer over `BODY_BYTES`."""
    return SourceError(
        f"the HTTP service's answer is longer than {BODY_BYTES} bytes", retryable=False
    )


def unpacked(body: bytes, encoding: str) -> bytes:
    """Unpack a body, by its Content-Encoding.

    Raises:
        SourceError: It is packed by something else than gzip, broken, or too long.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip"):
        raise SourceError("the HTTP service's answer is packed, and not by gzip", retryable=False)
    unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS + 16)
    try:
        text = unpack.decompress(body, BODY_BYTES + 1)
    except zlib.error:
        text = b""
    if len(text) > BODY_BYTES:
        raise too_long()
    if not unpack.eof or unpack.unused_data:
        raise SourceError("the HTTP service's answer cannot be unpacked", retryable=False)
    return text


def data_in(body: bytes, pointer: tuple[str, ...]) -> bytes:
    """Return the data that a pointer points to, as the service wrote them.

    Raises:
        SourceError: It is not strict JSON, or there is nothing.
    """
    try:
        # All of it, not only the data: a client must be able to read what it is sent.
        _decode(body)
        return resolve_pointer(body, pointer)
    except LookupError:
        raise SourceError(
            "the HTTP service's answer has nothing where http.pointer points", retryable=False
        ) from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise SourceError(
            "the HTTP service's answer is not JSON that can be passed on", retryable=False
        ) from None


def by_user(data: bytes) -> dict[str, msgspec.Raw]:
    """Take the values of a batch's answer apart, by user id.

    Raises:
        SourceError: It has neither of the two forms, or two values for one user.
    """
    try:
        if data.startswith(b"{"):
            return _members(data)
        values: dict[str, msgspec.Raw] = {}
        for each in _objects(data):
            user = str(_user_id(each.pop("user_id")))
            if user in values:
                raise SourceError(
                    "the HTTP service's answer has two values for one user", retryable=False
                )
            values[user] = each["data"] if "data" in each else msgspec.Raw(_encode(each))
        return values
    except (msgspec.MsgspecError, KeyError):
        raise SourceError(
            "the HTTP service's answer for many users is neither an object by user id nor a list "
            "of objects with `user_id`"
        ) from None
