"""Text that cannot steer a terminal."""

from __future__ import annotations

import unicodedata

__all__ = ["escaped"]


def escaped(text: str) -> str:
    """Write all that could steer a terminal as `\\uXXXX`, which JSON reads back."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else _unicode_escape(character)
        for character in text
    )


def _unicode_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
