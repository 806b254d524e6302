"""The rows of a channel of kind `keyed`, put together from its pushes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trading_push.client.messages import Push

__all__ = ["Table"]


class Table:
    """What a channel like `ticker.*` shows by now: a snapshot has all rows, an update some.

    ::

        table = Table()
        async for push in client:
            if push.channel == "ticker.*":
                table.apply(push)
                print(table.rows["BTCUSDT"]["last"])

    Args:
        key: The member of a row that tells it from the others.
    """

    def __init__(self, key: str = "symbol") -> None:
        self._key = key
        self._rows: dict[str, Any] = {}

    @property
    def rows(self) -> Mapping[str, Any]:
        """The rows by key."""
        return self._rows

    def apply(self, push: Push) -> None:
        """Take a push; a status changes nothing."""
        if push.type == "snapshot":
            self._rows = {}
        if push.type in ("snapshot", "update"):
            self._rows.update((row[self._key], row) for row in push.data)
