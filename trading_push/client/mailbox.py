"""The pushes that have come and have not been taken yet: bounded, and without loss of what counts.

1. Up to `BUFFERED_PUSHES` everything is kept, in its order.
2. Beyond it, and until all have been taken, a channel of kind *state* has one value and one status
   in it: the newest, which stands where the older one stood.
3. Pushes of any other channel keep their order, up to `ORDERED_PUSHES` of each channel.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Final

import attrs

from trading_push.client.messages import Push

__all__ = ["Mailbox"]

BUFFERED_PUSHES: Final = 64
ORDERED_PUSHES: Final = 1000


class Mailbox:
    """Pushes in the order in which they are to be taken."""

    def __init__(self) -> None:
        # By a number, which counts up, or by channel and whether it is a status where only the
        # newest is kept.
        self._pushes: OrderedDict[int | tuple[str, bool], Push] = OrderedDict()
        self._next_number = 0
        # How many are here of each channel that keeps its order.
        self._ordered: Counter[str] = Counter()
        # The channels of kind *state* that have come by.
        self._states: set[str] = set()
        # Whether the application is behind: rule 2 holds.
        self._is_merging = False

    def __len__(self) -> int:
        return len(self._pushes)

    def put(self, push: Push, *, is_state: bool) -> bool:
        """Add a push; return False where the channel has too many of them, and it was not added."""
        if is_state:
            self._states.add(push.channel)
        elif self._ordered[push.channel] >= ORDERED_PUSHES:
            return False
        else:
            self._ordered[push.channel] += 1
        if not self._is_merging and len(self._pushes) >= BUFFERED_PUSHES:
            self._is_merging = True
            pushes = list(self._pushes.values())
            self._pushes.clear()
            for each in pushes:
                self._add(each)
        self._add(push)
        return True

    def take(self) -> Push | None:
        """Remove and return the first push; None where there is none."""
        if not self._pushes:
            return None
        _, push = self._pushes.popitem(last=False)
        if push.channel in self._ordered:
            self._ordered[push.channel] -= 1
        if not self._pushes:
            self._is_merging = False
        return push

    def drop(self, channel: str) -> Push | None:
        """Remove all pushes of a channel; return the first value among them."""
        dropped = [key for key, push in self._pushes.items() if push.channel == channel]
        pushes = [self._pushes.pop(key) for key in dropped]
        self._ordered.pop(channel, None)
        return next((push for push in pushes if push.type != "status"), None)

    def clear(self) -> None:
        """Remove all."""
        self._pushes.clear()
        self._ordered.clear()
        self._is_merging = False

    def _add(self, push: Push) -> None:
        key: int | tuple[str, bool]
        if self._is_merging and push.channel in self._states:
            key = (push.channel, push.type == "status")
            older = self._pushes.get(key)
            if older is not None:
                push = _merged(older, push)
        else:
            key = self._next_number
            self._next_number += 1
        self._pushes[key] = push


def _merged(older: Push, newer: Push) -> Push:
    """Make one push of two of the same state."""
    if newer.type == "status":
        return newer
    gap = older.gap or newer.gap
    if newer.type == "snapshot":
        return attrs.evolve(newer, gap=gap)
    if older.type == "snapshot":  # a state's update holds the whole value, too
        return attrs.evolve(newer, type="snapshot", prev=None, merged=0, gap=gap)
    count = max(older.merged, 1) + max(newer.merged, 1)
    return attrs.evolve(newer, prev=older.prev, merged=count, gap=gap)
