"""Answers that the HTTP service has given an ETag for, up to a bound."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final

__all__ = ["KnownAnswers"]

_ENTRY_BYTES: Final = 500
"""About what an entry costs beside its texts."""
_ETAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{0,256}"')  # RFC 9110, section 8.8.3


class KnownAnswers:
    """The last ETag and data of each URL; what was used longest ago is forgotten first.

    Args:
        limit_bytes: How much is kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        # How many bytes may still be kept.
        self._left = limit_bytes
        # The ETag and the data by URL, what was used longest ago first.
        self._entries: OrderedDict[str, tuple[str, bytes]] = OrderedDict()

    def get(self, url: str) -> tuple[str, bytes] | None:
        """Return the ETag and the data of a URL."""
        if url in self._entries:
            self._entries.move_to_end(url)
        return self._entries.get(url)

    def put(self, url: str, etag: str, data: bytes) -> None:
        """Remember them; without a proper ETag, forget what was known of the URL."""
        if url in self._entries:
            self._left += _size(url, *self._entries.pop(url))
        if _ETAG.fullmatch(etag):
            self._entries[url] = etag, data
            self._left -= _size(url, etag, data)
        while self._left < 0:
            oldest, entry = self._entries.popitem(last=False)
            self._left += _size(oldest, *entry)


def _size(url: str, etag: str, data: bytes) -> int:
    return len(url) + len(etag) + len(data) + _ENTRY_BYTES
