"""The paper exchange as a source: accounts by its queries, and each fill once it is written."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import trio
from sqlalchemy.engine import URL

from trading_push.errors import SourceError
from trading_push.settings.sources import Query
from trading_push.sources.base import ChangeSink
from trading_push.sources.paper.schema import PAPER_QUERIES
from trading_push.sources.sql.source import SqlSource
from trading_push.sources.sqlite import open_sqlite

__all__ = ["PaperSource"]

LOOK_S: Final = 0.2
"""How often new fills are looked for."""

_FILLS: Final = """
SELECT user_id, CAST(fill_id AS TEXT) AS fill_id, CAST(order_id AS TEXT) AS order_id, symbol, side,
    price, quantity, fee, fee_asset, at
FROM fills WHERE fills.fill_id > ? ORDER BY fills.fill_id
"""


class PaperSource(SqlSource):
    """Reads the file of a paper exchange, whichever process trades on it; a `WatchingSource`.

    Args:
        path: The file.
        queries: Queries that replace the exchange's own, by data type.
        options: Further arguments of an `SqlSource`.
    """

    def __init__(self, path: Path, queries: Mapping[str, Query], **options: Any) -> None:
        super().__init__(
            URL.create("sqlite", database=str(path)), {**PAPER_QUERIES, **queries}, **options
        )
        self._path = path
        # The last fill that was published; None before the first `watch`.
        self._last: int | None = None

    @property
    def data_types(self) -> Sequence[str]:
        """The data types that it has: those with a query, and the fills that `watch` publishes."""
        return (*super().data_types, "fills")

    async def watch(self, sink: ChangeSink) -> None:
        """Publish each new fill to its user, in order, until cancelled.

        The first time it begins with the fills to come; after that, with those since the last one
        that it published, as far as the file still has them.

        Raises:
            SourceError: The file cannot be read.
        """
        try:
            with closing(await trio.to_thread.run_sync(open_sqlite, self._path, "ro")) as file:
                file.row_factory = sqlite3.Row
                if self._last is None:
                    self._last = await trio.to_thread.run_sync(_newest, file)
                while True:
                    fills = await trio.to_thread.run_sync(_after, file, self._last)
                    for fill in fills:
                        self._last = int(fill["fill_id"])
                        sink.publish([("fills", fill, fill.pop("user_id"))])
                    await trio.sleep(LOOK_S)
        except sqlite3.Error as error:
            raise SourceError(f"{self._path} cannot be read: {error}") from None


def _newest(file: sqlite3.Connection) -> int:
    ((newest,),) = file.execute("SELECT coalesce(max(fill_id), 0) FROM fills")
    return int(newest)


def _after(file: sqlite3.Connection, last: int) -> list[dict[str, Any]]:
    return [dict(row) for row in file.execute(_FILLS, (last,))]
