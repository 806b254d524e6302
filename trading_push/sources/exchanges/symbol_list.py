"""The symbols that an exchange has: read when the feed begins, and once an hour after that.

Until the first list has come nothing is known, and symbols are taken as they are asked for. A list
that cannot be read is asked for again, less and less often; the one before stands meanwhile.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence, Set
from typing import Final, NoReturn

import trio

from trading_push import logs
from trading_push.errors import SourceError
from trading_push.supervision import keep_running
from trading_push.topics import canonical_symbol

__all__ = ["SymbolList"]

EVERY_S: Final = 3600.0
FIRST_PAUSE_S: Final = 30.0
"""Before a list that could not be read is asked for again; it doubles up to `EVERY_S`."""
JITTER_S: Final = 5.0


class SymbolList:
    """The list of one exchange.

    Args:
        exchange: Its name in the log.
        load: Reads the list; raises SourceError.
        renewed: Called when a list has come; synchronous.
    """

    def __init__(
        self,
        exchange: str,
        load: Callable[[], Awaitable[Set[str]]],
        renewed: Callable[[], None],
    ) -> None:
        self._exchange = exchange
        self._load = load
        self._renewed = renewed
        # None until the first list has come.
        self._symbols: Set[str] | None = None
        self._sorted: Sequence[str] = ()

    def has(self, symbol: str) -> bool | None:
        """Whether the exchange has a symbol; None until the first list has come."""
        return None if self._symbols is None else symbol in self._symbols

    def sorted(self) -> Sequence[str] | None:
        """Return all symbols; None until the first list has come."""
        return None if self._symbols is None else self._sorted

    async def run(self) -> NoReturn:
        """Keep the list fresh until cancelled."""
        while True:
            await keep_running(
                self._read,
                self._log_failed,
                on=SourceError,
                first_s=FIRST_PAUSE_S,
                last_s=EVERY_S,
                jitter_s=JITTER_S,
            )
            await trio.sleep(EVERY_S)

    async def _read(self) -> None:
        named = {canonical_symbol(name) for name in await self._load()}
        symbols = frozenset(symbol for symbol in named if symbol is not None)
        if not symbols:
            raise SourceError("the list is empty")
        self._symbols, self._sorted = symbols, tuple(sorted(symbols))
        self._renewed()

    def _log_failed(self, error: SourceError, pause_s: float) -> None:
        logs.emit(
            logs.line("exchange_list_failed", exchange=self._exchange, error=error, delay=pause_s)
        )
