"""The paper exchange as a source: accounts by its queries, fills and changes once written."""

from __future__ import annotations

import itertools
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
from trading_push.topics import BUILTIN_CHANNELS

__all__ = ["PaperSource"]

LOOK_S: Final = 0.2
"""How often it is looked for new fills, and for accounts that have changed."""

_FILLS: Final = """
SELECT user_id, CAST(fill_id AS TEXT) AS fill_id, CAST(order_id AS TEXT) AS order_id, symbol, side,
    price, quantity, fee, fee_asset, at
FROM fills WHERE fills.fill_id > ? ORDER BY fills.fill_id
"""

# What an order, a cancellation or a fill changes, in one text a user. New marks change none of it.
_ACCOUNTS: Final = """
SELECT user_id, deposits || ' ' || cash || ' ' || locked || ' ' || realized || ' ' || fees || ' ' ||
    coalesce((SELECT group_concat(order_id || ':' || filled) FROM orders
        WHERE orders.user_id = accounts.user_id), '')
FROM accounts
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
        # Each user's account as it was last seen (see `_ACCOUNTS`).
        self._accounts: dict[str, str] = {}

    @property
    def data_types(self) -> Sequence[str]:
        """The data types that it has: those with a query, and the fills that `watch` publishes."""
        return (*super().data_types, "fills")

    async def watch(self, sink: ChangeSink) -> None:
        """Publish each new fill to its user, and have what it changed fetched, until cancelled.

        So that orders, positions, balance and PnL agree: polled, each would show a fill at another
        time. An order that is placed or cancelled is told as well; new marks wait for a poll.

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
                    fills, accounts = await trio.to_thread.run_sync(_look, file, self._last)
                    for fill in fills:
                        self._last = int(fill["fill_id"])
                        sink.publish([("fills", fill, fill.pop("user_id"))])
                    changed = [
                        user for user, seen in accounts.items() if seen != self._accounts.get(user)
                    ]
                    self._accounts = accounts
                    sink.changed(itertools.product(changed, BUILTIN_CHANNELS))
                    await trio.sleep(LOOK_S)
        except sqlite3.Error as error:
            raise SourceError(f"{self._path} cannot be read: {error}") from None


def _newest(file: sqlite3.Connection) -> int:
    ((newest,),) = file.execute("SELECT coalesce(max(fill_id), 0) FROM fills")
    return int(newest)


def _look(file: sqlite3.Connection, last: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Read the fills after the last one, and the accounts as they are with them."""
    file.execute("BEGIN")  # one moment for both
    try:
        fills = [dict(row) for row in file.execute(_FILLS, (last,))]
        accounts = {str(user): str(seen) for user, seen in file.execute(_ACCOUNTS)}
    finally:
        file.execute("COMMIT")
    return fills, accounts
