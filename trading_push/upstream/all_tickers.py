"""The channel `ticker.*`: what has changed of all tickers, in one publication.

It watches no symbol by itself: it has the symbols that somebody watches, that the feed gives anyway
or that are published. While nobody is subscribed it does nothing at a delivery: the broker knows
what has come meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from trading_push.broker.base import Broker, Message, Publication, Status
from trading_push.topics import ALL_TICKERS, Topic, symbol_of

__all__ = ["AllTickers"]


class AllTickers:
    """Collects the tickers that are published, and publishes them together.

    Args:
        max_hz: How often a second at most.
        broker: Where to.
        watched: Whether anyone is subscribed.
    """

    def __init__(
        self,
        max_hz: float,
        broker: Broker,
        watched: Callable[[], bool],
    ) -> None:
        self._period_s = 1 / max_hz
        self._broker = broker
        self._watched = watched
        # Whether each delivery is looked at.
        self._collecting = False
        # The ticker of each symbol that is in the table, as JSON.
        self._rows: dict[str, bytes] = {}
        # The tickers that are still to be published, as JSON, by symbol.
        self._changed: dict[str, bytes] = {}
        # The symbols that there are, and whether each is live.
        self._live: dict[str, bool] = {}
        # How many of them are not live.
        self._stale = 0
        self._wake = trio.Event()

    def note(self, batch: Sequence[Message]) -> None:
        """Take what is delivered, and pick the tickers out of it; synchronous."""
        if not self._collecting:
            return
        for message in batch:
            symbol = symbol_of(message.topic.channel)
            if symbol is None:
                continue
            if isinstance(message, Publication):
                self._changed[symbol] = message.data
                self._turn(symbol, True)
            elif symbol in self._live:
                self._turn(symbol, message.status.state == "live")
            self._wake.set()

    def _turn(self, symbol: str, live: bool) -> None:
        self._stale += (not live) - (not self._live.get(symbol, True))
        self._live[symbol] = live

    def forget(self, topic: Topic) -> None:
        """Leave out a symbol whose ticker is kept no more."""
        symbol = symbol_of(topic.channel)
        if symbol is not None:
            self._drop(symbol)

    def _drop(self, symbol: str) -> None:
        if symbol in self._live:
            self._turn(symbol, True)
            del self._live[symbol]
            self._changed.pop(symbol, None)
        if self._rows.pop(symbol, None) is not None:
            self._broker.drop_rows(ALL_TICKERS, [symbol])

    def catch_up(self) -> None:
        """Publish now what a first subscriber would miss; nothing where one is there already."""
        if not self._watched():
            self._collect()
            self._flush()

    def begin(self) -> None:
        """Somebody is subscribed now; synchronous."""
        self._collect()
        self._wake.set()

    def end(self) -> None:
        """Nobody is subscribed any more; synchronous."""
        self._collecting = False

    def _collect(self) -> None:
        """Look at each delivery from now on, and catch up with those before."""
        if self._collecting:
            return
        self._collecting = True
        gone = set(self._live)
        for last, status in self._broker.tickers():
            symbol = symbol_of(last.topic.channel)
            assert symbol is not None
            if last.data != self._rows.get(symbol):
                self._changed[symbol] = last.data
            self._turn(symbol, status.state == "live")
            gone.discard(symbol)
        for symbol in gone:
            self._drop(symbol)

    async def run(self) -> None:
        """Publish while someone is subscribed, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            if self._watched():
                self._flush()
            await trio.sleep(self._period_s)

    def _flush(self) -> None:
        if self._changed:
            changed, self._changed = self._changed, {}
            self._rows.update(changed)
            self._broker.publish_rows(ALL_TICKERS, changed)
        if self._live:
            # One that is live makes the table worth looking at; nothing is told twice.
            stale = self._stale == len(self._live)
            status = Status("stale", "no_symbol_live") if stale else Status("live")
            self._broker.mark([ALL_TICKERS], status)
