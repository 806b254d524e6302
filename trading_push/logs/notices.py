"""Say once a minute what a client that is set up wrongly does again and again."""

from __future__ import annotations

import time
from typing import Final

from trading_push.logs.lines import Line, line
from trading_push.logs.strangers import StrangerLines

__all__ = ["Notices"]

_REPEAT_S: Final = 60.0
_KEPT: Final = 64
"""How many paths are remembered."""


class Notices:
    """Tells of requests for paths that nobody serves, and of tokens in URLs.

    Args:
        strangers: Bounds the lines in all.
    """

    def __init__(self, strangers: StrangerLines) -> None:
        self._strangers = strangers
        # When each was last said, on the monotonic clock, the oldest first: a path, or None for a
        # token in a URL.
        self._said: dict[str | None, float] = {}

    def __len__(self) -> int:
        return len(self._said)

    def unserved(self, path: str, address: str) -> None:
        """Somebody has asked for a path that nobody serves."""
        self._say(path, line("path_unserved", requested=path, address=address))

    def token_in_url(self, address: str) -> None:
        """Somebody has sent a token in the URL, where it is not read."""
        self._say(None, line("token_in_url", address=address))

    def _say(self, what: str | None, told: Line) -> None:
        now = time.monotonic()
        if now < self._said.get(what, now - _REPEAT_S) + _REPEAT_S:
            return
        self._said.pop(what, None)
        self._said[what] = now
        if len(self._said) > _KEPT:
            del self._said[next(iter(self._said))]
        self._strangers.emit(told)
