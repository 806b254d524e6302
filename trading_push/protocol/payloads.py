"""An application's values as the JSON of a payload."""

from __future__ import annotations

import math
import re
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import msgspec
from msgspec import Raw

from trading_push.errors import PayloadError
from trading_push.models import milliseconds, plain_decimal

__all__ = ["encode_data"]

# What str() of a Decimal or a datetime can leave in JSON: an exponent, not a number, a date. Most
# values have none of them, and are encoded once.
_NOT_PLAIN: Final = re.compile(rb"E[+-]\d|NaN|Infinity|\dT\d\d:")

_encode: Final = msgspec.json.Encoder().encode


def encode_data(data: Any) -> bytes:
    """Encode an application's value as JSON.

    Args:
        data: Any object that msgspec encodes (attrs, dataclasses, Structs, dicts, lists, enums).
            Decimals become strings in plain notation, times integer milliseconds since the epoch.
            A `msgspec.Raw` is JSON already and goes out unchanged.

    Raises:
        PayloadError: It cannot be encoded, or holds a number that is not finite.
    """
    if isinstance(data, Raw):
        return bytes(data)
    try:
        encoded = _encode(data)
        not_plain = _NOT_PLAIN.search(encoded)
        # A float that is not finite becomes null in silence, where a decimal is an error.
        if not_plain or b"null" in encoded:
            builtins = msgspec.to_builtins(
                data, builtin_types=(Decimal, datetime), enc_hook=_decode_raw
            )
            plain = _plain(builtins)
            if not_plain:
                encoded = _encode(plain)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise PayloadError(f"a value cannot be encoded as JSON: {error}") from error
    return encoded


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain_key(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Decimal):
        return plain_decimal(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    if isinstance(value, datetime):
        return milliseconds(value)
    return value


def _plain_key(key: Any) -> Any:
    plain = _plain(key)
    return str(plain) if isinstance(key, datetime) else plain


def _decode_raw(value: Any) -> Any:
    if isinstance(value, Raw):
        return msgspec.json.decode(value)
    raise TypeError(f"JSON has no type for {type(value).__name__}")
