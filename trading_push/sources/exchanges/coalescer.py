"""Give the sink of a feed the tickers that have changed, all together and not too often."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NoReturn

import trio

from trading_push.sources.base import MarketSink
from trading_push.sources.exchanges.dialect import SymbolState

__all__ = ["TickerCoalescer"]

PERIOD_S: Final = 0.02
"""The sink is updated at most this often."""


class TickerCoalescer:
    """Collects the symbols that change, and hands their tickers to the sink together."""

    def __init__(self) -> None:
        # Where tickers go; None while the feed does not run.
        self._sink: MarketSink | None = None
        # Set when a symbol changes.
        self._wake = trio.Event()
        self.changed: dict[str, SymbolState] = {}
        """The symbols that the sink has not been given yet."""

    def add(self, symbol: str, state: SymbolState) -> None:
        """Give the sink what is known of a symbol, soon; synchronous."""
        self.changed[symbol] = state
        self._wake.set()

    def discard(self, symbol: str) -> None:
        """Give nothing more of a symbol, until it is added again."""
        self.changed.pop(symbol, None)

    def mark_stale(self, reason: str, symbols: Iterable[str]) -> None:
        """Tell the sink at once; what it has not been given yet, it never is."""
        stale = list(symbols)
        for symbol in stale:
            self.discard(symbol)
        if stale and self._sink is not None:
            self._sink.stale(reason, stale)

    def attach(self, sink: MarketSink) -> None:
        """Give tickers to a sink from now on."""
        self._sink = sink

    def detach(self) -> None:
        """Give nothing any more, neither what has changed until now nor what changes later."""
        self._sink = None
        self.changed.clear()

    async def run(self) -> NoReturn:
        """Update the sink until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            if self.changed and self._sink is not None:
                tickers = [state.ticker() for state in self.changed.values()]
                self.changed.clear()
                self._sink.update(tickers)
            await trio.sleep(PERIOD_S)
