"""Times and amounts in the form of the wire: integer milliseconds and plain decimals."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

__all__ = ["milliseconds", "now_ms", "plain_decimal"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def now_ms() -> int:
    """The time in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def milliseconds(moment: datetime) -> int:
    """A time in milliseconds since the epoch, rounded down; without a zone it counts as UTC."""
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    # In integers: a float of seconds would round the last digit.
    since = aware - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000


def plain_decimal(value: Decimal) -> str:
    """A decimal in plain notation, without an exponent.

    Raises:
        ValueError: It is not finite.
    """
    if not value.is_finite():
        raise ValueError(f"{value} is not a finite number")
    return format(value, "f")
