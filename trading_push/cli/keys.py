"""The keys of a terminal that `trading-push watch` heeds, from the bytes that stand for them."""

from __future__ import annotations

import re
from typing import Final, Literal

__all__ = ["Key", "KeyReader"]

Key = Literal[
    "up", "down", "left", "right", "page up", "page down", "home", "end", "redraw", "quit"
]

# A sequence of a special key, or any other byte.
_TOKEN: Final = re.compile(rb"\x1b\[[0-9;]*[@-~]|\x1bO[@-~]|[^\x1b]|\x1b(?=[^\[O])")
_LONGEST: Final = 16
"""How many bytes an unfinished sequence may have."""

_KEYS: Final[dict[bytes, Key]] = {
    **dict.fromkeys((b"k", b"\x1b[A", b"\x1bOA"), "up"),
    **dict.fromkeys((b"j", b"\r", b"\n", b"\x1b[B", b"\x1bOB"), "down"),
    **dict.fromkeys((b"l", b"\x1b[C", b"\x1bOC"), "right"),
    **dict.fromkeys((b"h", b"\x1b[D", b"\x1bOD"), "left"),
    **dict.fromkeys((b"b", b"\x1b[5~"), "page up"),
    **dict.fromkeys((b" ", b"f", b"\x1b[6~"), "page down"),
    **dict.fromkeys((b"g", b"\x1b[H", b"\x1bOH", b"\x1b[1~", b"\x1b[7~"), "home"),
    **dict.fromkeys((b"G", b"\x1b[F", b"\x1bOF", b"\x1b[4~", b"\x1b[8~"), "end"),
    b"\x0c": "redraw",  # Ctrl-L
    **dict.fromkeys((b"q", b"Q"), "quit"),
}


class KeyReader:
    """Splits what a terminal sends into keys; a key may come in several pieces."""

    def __init__(self) -> None:
        self._rest = b""  # of a sequence that is not complete yet

    def feed(self, data: bytes) -> list[Key]:
        """Take some bytes; return the keys that are complete, without those of no meaning."""
        data, at, keys = self._rest + data, 0, []
        while match := _TOKEN.match(data, at):
            at = match.end()
            if (key := _KEYS.get(match[0])) is not None:
                keys.append(key)
        self._rest = data[at:][:_LONGEST]
        return keys
