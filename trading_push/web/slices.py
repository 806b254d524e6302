"""Work through many things without holding the event loop for all of them at once."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import trio

__all__ = ["each_in_slices", "page_of"]

_SLICE_S: Final = 0.001
_CHUNK: Final = 32
"""How many there are between two looks at the clock."""
_SORTED_AT_ONCE: Final = 500

_Item = TypeVar("_Item")


async def each_in_slices(items: Iterable[_Item], act: Callable[[_Item], object]) -> None:
    """Call `act` with each item; after a millisecond other tasks have their turn.

    Cancelled, it leaves off between two items.
    """
    until = time.perf_counter() + _SLICE_S
    for number, each in enumerate(items, 1):
        act(each)
        if not number % _CHUNK and time.perf_counter() > until:
            await trio.lowlevel.checkpoint()
            until = time.perf_counter() + _SLICE_S


async def page_of(
    items: list[_Item], key: Callable[[_Item], Any], offset: int, limit: int
) -> list[_Item]:
    """Sort many items, and return some of them; in slices, as `each_in_slices`.

    Args:
        items: All of them.
        key: What they are sorted by.
        offset: How many stand before the first that is wanted.
        limit: How many are wanted.
    """
    parts: list[list[_Item]] = []
    for start in range(0, len(items), _SORTED_AT_ONCE):
        parts.append(sorted(items[start : start + _SORTED_AT_ONCE], key=key))
        await trio.lowlevel.checkpoint()
    page: list[_Item] = []
    ordered = itertools.islice(heapq.merge(*parts, key=key), offset + limit)
    await each_in_slices(ordered, page.append)
    return page[offset:]
