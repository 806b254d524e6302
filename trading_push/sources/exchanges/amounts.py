"""Amounts, times and symbols as markets write them, and the context to compute in.

What cannot be an amount of any market is a ValueError here, from whatever source it comes.
"""

from __future__ import annotations

from decimal import (
    ROUND_HALF_EVEN,
    Context,
    Decimal,
    DivisionByZero,
    InvalidOperation,
    Overflow,
)

import msgspec

from trading_push.topics import SYMBOL_RULE, canonical_symbol

__all__ = [
    "DECIMALS",
    "UNUSABLE",
    "Symbols",
    "epoch_ns",
    "known_price",
    "number",
    "percentage",
    "price",
    "reason_of",
]

DECIMALS = Context(
    60,
    ROUND_HALF_EVEN,
    Emin=-999_999,
    Emax=999_999,
    capitals=1,
    clamp=0,
    traps=[DivisionByZero, InvalidOperation, Overflow],
)
"""The context that sources compute in, because that of the thread is the application's own."""

UNUSABLE = (msgspec.MsgspecError, ValueError, ArithmeticError, RecursionError, IndexError)
"""What decoding a line or frame, and reading its amounts, may raise."""


def reason_of(error: Exception) -> str:
    """Say why a line or frame cannot be used."""
    if isinstance(error, InvalidOperation):
        return "a price or quantity is no number"
    if isinstance(error, IndexError):
        return "too few columns"
    return str(error)


def number(text: str | int | None) -> Decimal:
    """Read an amount of a size that markets have, zero included."""
    if not isinstance(text, str) or len(text) > 40:
        raise ValueError("a price or quantity is missing or no decimal string")
    value = Decimal(text)
    if value.is_signed() or not value.is_finite() or not -20 < value.adjusted() < 20:
        raise ValueError("a price or quantity is out of range")
    return value


def price(text: str | int | None) -> Decimal:
    """Read an amount that is not zero."""
    value = number(text)
    if not value:
        raise ValueError("a price is zero")
    return value


def known_price(text: str | int | None) -> Decimal | None:
    """Read a price; exchanges write zero where there is none, such as before the first trade."""
    return number(text) or None


def percentage(text: str) -> Decimal:
    """Read a change in percent, or as a share; of either sign."""
    value = Decimal(text[:40])
    if not (value.is_finite() and -20 < value.adjusted() < 20):
        raise ValueError("a percentage is out of range")
    return value


def epoch_ns(value: int) -> int:
    """Convert a time since the epoch to ns.

    Seconds, ms, µs and ns are told apart by their magnitude, for the years 1973 to 5138.
    """
    if value <= 0:
        raise ValueError("a time is not positive")
    if value < 10**11:
        return value * 1_000_000_000
    if value < 10**14:
        return value * 1_000_000
    return value * 1000 if value < 10**17 else value


class Symbols(dict[str, str]):
    """The spelling that clients use, by the spelling of a tape."""

    def __missing__(self, name: str) -> str:
        symbol = canonical_symbol(name)
        if symbol is None:
            raise ValueError(f"the symbol is missing or cannot name a ticker: {SYMBOL_RULE}")
        self[name] = symbol
        return symbol
