"""Numbers as a person reads them: thousands apart, and a fixed count of decimals in each column."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["Decimals", "grouped"]

_PLAIN: Final = re.compile(r"-?\d{1,40}(?:\.\d{1,40})?", re.ASCII)
_FEWEST: Final = 2
_MOST: Final = 8


class Decimals:
    """How many decimals each column is shown with: as many as a value of it has ever had.

    So a price does not jump to and fro as its last digits come and go. There are at least two of
    them, or none in a column of whole numbers, and at most eight.
    """

    def __init__(self) -> None:
        self._by_column: dict[object, int] = {}

    def note(self, column: object, text: str) -> None:
        """Take a value that is to be shown in a column."""
        if _PLAIN.fullmatch(text):
            decimals = len(text.partition(".")[2].rstrip("0"))
            if decimals:
                decimals = min(max(decimals, _FEWEST), _MOST)
            self._by_column[column] = max(decimals, self._by_column.get(column, 0))

    def show(self, column: object, text: str) -> str:
        """Write a value of a column; what is no plain number stays as it is."""
        return grouped(text, self._by_column.get(column, 0))


def grouped(text: str, decimals: int) -> str:
    """Write a decimal with thousands apart and so many decimals, rounded half to even.

    One that would be rounded to nothing stays as it is, and so does what is no plain number.
    """
    if not _PLAIN.fullmatch(text):
        return text
    sign, digits = ("-", text[1:]) if text[0] == "-" else ("", text)
    whole, _, fraction = digits.partition(".")
    number = int(whole + fraction)
    surplus = len(fraction) - decimals
    if surplus <= 0:
        scaled = number * 10**-surplus
    else:
        scaled, rest = divmod(number, 10**surplus)
        half = 10**surplus // 2
        scaled += rest > half or (rest == half and scaled % 2)
        if number and not scaled:
            return text
    whole, part = divmod(scaled, 10**decimals)
    return f"{sign if scaled else ''}{whole:,}" + (f".{part:0{decimals}}" if decimals else "")
