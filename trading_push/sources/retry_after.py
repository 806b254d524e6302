"""How long an upstream wants to be left alone: the header Retry-After."""

from __future__ import annotations

import email.utils
import time
from typing import Final

__all__ = ["LONGEST_S", "retry_after_s"]

LONGEST_S: Final = 300.0
"""The longest pause that is heeded."""


def retry_after_s(value: str) -> float:
    """Read a Retry-After: a number of seconds or a date (RFC 9110, section 10.2.3); at most
    `LONGEST_S`, and 0 for what is neither."""
    value = value.strip()
    try:
        if value.isascii() and value.isdecimal():
            asked_s = float(value)
        else:
            asked_s = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError, TypeError):
        return 0.0
    return min(max(asked_s, 0.0), LONGEST_S)
