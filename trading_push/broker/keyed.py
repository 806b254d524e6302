"""A topic of kind `keyed`: a table of rows, of which each update holds those that have changed.

A subscriber that was sent the publication before gets the rows of one publication, the same bytes
as everyone else. One that merged, was throttled or resumes gets the rows that have changed since
what it was sent last, and a newcomer gets all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from trading_push.broker.base import Publication, Render
from trading_push.topics import Topic

__all__ = ["KeyedPublication", "Table"]


class Table:
    """The rows of one topic, each with the `seq` of its last change.

    Args:
        topic: Whose they are.
        epoch: Within which `seq` counts.
        render: Makes JSON of some of them.
    """

    def __init__(self, topic: Topic, epoch: str, render: Render) -> None:
        self._topic = topic
        self._epoch = epoch
        self._render = render
        self._seq = 0  # of the last publication
        self._ts = 0  # when that was, in ms since the epoch of the clock
        self._rows: dict[str, tuple[int, bytes]] = {}
        # What was made since the last publication, by the `seq` that it begins after: subscribers
        # that keep the same pace ask for the same.
        self._made: dict[int, bytes] = {}

    def put(self, seq: int, ts: int, rows: Mapping[str, bytes]) -> KeyedPublication:
        """Replace rows, and return the publication that tells of them."""
        self._seq, self._ts = seq, ts
        self._rows.update((key, (seq, row)) for key, row in rows.items())
        self._made.clear()
        data = self._render(sorted(rows.items()))
        return KeyedPublication(self._topic, "keyed", self._epoch, seq, ts, data, self)

    def drop(self, keys: Iterable[str]) -> None:
        """Forget rows: newcomers are not sent them any more."""
        for key in keys:
            self._rows.pop(key, None)
        self._made.clear()

    def since(self, seq: int | None) -> KeyedPublication:
        """Return what has changed after a publication, as one; everything, for None.

        It is of the table as it is now, which may be ahead of a publication that waits to be sent.
        """
        after = 0 if seq is None else seq
        data = self._made.get(after)
        if data is None:
            rows = [(key, row) for key, (at, row) in self._rows.items() if at > after]
            data = self._made[after] = self._render(sorted(rows))
        return KeyedPublication(self._topic, "keyed", self._epoch, self._seq, self._ts, data, self)


@attrs.define(eq=False)
class KeyedPublication(Publication):
    """A publication of some rows; `data` holds those that it has changed."""

    table: Table
