"""Follow a JSON pointer (RFC 6901) through encoded JSON, of which every digit stays as it is."""

from __future__ import annotations

import re

import msgspec

__all__ = ["parse_pointer", "resolve_pointer"]

_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")

_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_elements = msgspec.json.Decoder(list[msgspec.Raw]).decode


def parse_pointer(pointer: str) -> tuple[str, ...]:
    """Return the reference tokens of a well-formed pointer; none for the whole document."""
    # In this order: "~01" stands for "~1" (section 4).
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in pointer.split("/")[1:])


def resolve_pointer(document: bytes, tokens: tuple[str, ...]) -> bytes:
    """Return the part of a JSON document that a pointer points to, as it is written there.

    Raises:
        LookupError: It points to nothing.
        msgspec.DecodeError: The document is not JSON.
    """
    part = document.strip(b" \t\r\n")
    for token in tokens:
        if part.startswith(b"{"):
            part = bytes(_members(part)[token])
        elif part.startswith(b"[") and _INDEX.fullmatch(token):
            part = bytes(_elements(part)[int(token)])
        else:
            raise LookupError(token)
    return part
