"""The body of an answer: bounded, unpacked, strict JSON, and the data within it."""

from __future__ import annotations

import zlib
from typing import Final

import msgspec

from trading_push.errors import SourceError
from trading_push.sources.http.pointer import resolve_pointer

__all__ = ["BODY_BYTES", "by_user", "data_in", "refusal", "too_long", "unpacked"]

BODY_BYTES: Final = 8 * 1024 * 1024
"""How long an answer may be, packed or not."""
_MEMBERS: Final = 100
"""How many gzip members one answer may be made of; usually it is one."""
_BOM: Final = b"\xef\xbb\xbf"

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_objects = msgspec.json.Decoder(list[dict[str, msgspec.Raw] | None]).decode
_user_id = msgspec.json.Decoder(str | int | float).decode


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
    text = bytearray()
    for _ in range(_MEMBERS):
        unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS + 16)
        try:
            text += unpack.decompress(body, BODY_BYTES + 1 - len(text))
        except zlib.error:
            break
        if len(text) > BODY_BYTES:
            raise too_long()
        body = unpack.unused_data.lstrip(b"\0")  # padding may stand behind the last member
        if unpack.eof and not body:
            return bytes(text)
        if not unpack.eof:
            break
    raise SourceError("the HTTP service's answer cannot be unpacked", retryable=False)


def data_in(body: bytes, pointer: tuple[str, ...], *, strict: bool = True) -> bytes:
    """Return the data that a pointer points to, as the service wrote them.

    Args:
        body: JSON, with or without a byte order mark before it.
        pointer: The tokens of a JSON pointer.
        strict: Whether all of it is checked; False where the caller checks each value by itself.

    Raises:
        SourceError: It is not strict JSON, or there is nothing.
    """
    body = body.removeprefix(_BOM)
    try:
        if strict:
            # All of it, not only the data: a client must be able to read what it is sent.
            _decode(body)
        return resolve_pointer(body, pointer)
    except LookupError:
        raise SourceError(
            "the HTTP service's answer has nothing where http.pointer points", retryable=False
        ) from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise SourceError(_NOT_JSON, retryable=False) from None


_NOT_JSON: Final = "the HTTP service's answer is not JSON that can be passed on"


def refusal(value: msgspec.Raw) -> SourceError | None:
    """Say why one user's value cannot be passed on; None if it can."""
    try:
        _decode(value)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return SourceError(_NOT_JSON, retryable=False)
    return None


def by_user(data: bytes) -> list[tuple[str | int | float, msgspec.Raw]]:
    """Take the values of a batch's answer apart: pairs of a user id, as it stands there, and a
    value, which is not checked.

    Raises:
        SourceError: It has neither of the two forms, or is no JSON.
    """
    if data == b"null":
        return []
    try:
        if data.startswith(b"{"):
            return list(_members(data).items())
        values: list[tuple[str | int | float, msgspec.Raw]] = []
        for each in _objects(data):
            if each is None:
                continue
            user = _user_id(each.pop("user_id"))
            values.append((user, each["data"] if "data" in each else msgspec.Raw(_encode(each))))
        return values
    except (msgspec.MsgspecError, KeyError, UnicodeError, RecursionError):
        # What makes all of it unreadable may stand in one user's value.
        if (unreadable := refusal(msgspec.Raw(data))) is not None:
            raise unreadable from None
        raise SourceError(
            "the HTTP service's answer for many users is neither an object by user id nor a list "
            "of objects with `user_id`"
        ) from None
