"""As many symbols as one connection carries, and that connection; two while one takes over."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from trading_push import logs
from trading_push.errors import SourceError
from trading_push.sources.exchanges.connection import ExchangeConnection, FeedContext
from trading_push.sources.exchanges.dialect import SymbolFrame, SymbolState
from trading_push.supervision import keep_running

__all__ = ["Shard"]

_LONGEST_MUTE_S = 3600.0


class Shard:
    """Keeps some symbols subscribed, and merges what is said of each.

    Args:
        context: What the shards and connections of a feed share.
    """

    def __init__(self, context: FeedContext) -> None:
        self._context = context
        # What the frames of each symbol have said, as long as a connection carries it.
        self._states: dict[str, SymbolState] = {}
        # Set when a symbol is watched or unwatched.
        self._wake = trio.Event()
        # How many connections in a row have brought nothing for so long that another one came.
        self._mutes = 0
        self.symbols: dict[str, None] = {}
        """The symbols that are watched."""
        self.connections: list[ExchangeConnection] = []
        """Those that have not ended; two while one takes over from the other."""

    def watch(self, symbol: str) -> None:
        """Subscribe a symbol as soon as it can be."""
        self.symbols[symbol] = None
        self._wake_all()

    def unwatch(self, symbol: str) -> None:
        """Unsubscribe a symbol as soon as it can be."""
        self.symbols.pop(symbol, None)
        self._wake_all()

    @property
    def mute_s(self) -> float:
        """How long a connection may bring nothing; the longer, the more have brought nothing."""
        return min(self._context.dialect.limits.mute_s * 2.0**self._mutes, _LONGEST_MUTE_S)

    def _wake_all(self) -> None:
        self._wake.set()
        for connection in self.connections:
            connection.wake()

    async def run(self) -> None:
        """Be connected whenever there are symbols, until cancelled."""
        limits = self._context.dialect.limits
        while True:
            while not self.symbols:
                self._wake = trio.Event()
                await self._wake.wait()
            await keep_running(
                self._stay_connected,
                self._log_lost,
                on=SourceError,
                first_s=limits.first_pause_s,
                last_s=limits.last_pause_s,
                jitter_s=limits.jitter_s,
            )

    def _log_lost(self, error: SourceError, pause_s: float) -> None:
        name = self._context.dialect.name
        logs.emit(logs.line("exchange_lost", exchange=name, error=error, delay=pause_s))

    async def _stay_connected(self) -> None:
        """Keep one connection after another, without a gap, until there are no symbols.

        Raises:
            SourceError: It was lost, and no other was there to go on.
        """
        limits = self._context.dialect.limits
        if not self.symbols:
            return
        async with trio.open_nursery() as nursery:
            current = self._connect(nursery)
            renew_at = trio.current_time() + limits.lifetime_s
            while True:
                with trio.move_on_at(renew_at):
                    await current.succession.wait()
                if current.over.is_set():
                    break
                # Its lifetime is over, or it says so itself: a fresh one is to take over.
                current.succession = trio.Event()
                self._mutes = min(self._mutes + 1, 16)  # until a frame comes
                fresh = self._connect(nursery)
                with trio.move_on_after(limits.takeover_timeout_s):
                    await fresh.settled.wait()
                if fresh.settled.is_set():
                    # What was sent on the old one, and is still under way, is read too.
                    with trio.move_on_after(limits.overlap_s):
                        await fresh.over.wait()
                if fresh.settled.is_set() and not fresh.over.is_set():
                    # All is acknowledged: what is quiet has not changed, and is not stale.
                    fresh.carries |= current.carries & fresh.subscribed.keys()
                    current.stop()
                    current = fresh
                    renew_at = trio.current_time() + limits.lifetime_s
                else:
                    # It failed: the old one goes on, and another one is tried later.
                    fresh.stop()
                    if not current.over.is_set():
                        self._log_lost(
                            fresh.error or SourceError("the subscriptions were not acknowledged"),
                            limits.last_pause_s,
                        )
                    renew_at = trio.current_time() + limits.last_pause_s
        if current.error is not None and self.symbols:
            raise current.error

    def _connect(self, nursery: trio.Nursery) -> ExchangeConnection:
        connection = ExchangeConnection(self._context, self)
        self.connections.append(connection)
        nursery.start_soon(connection.run)
        return connection

    # --- for its connections -------------------------------------------------------------------

    def merge(self, connection: ExchangeConnection, frame: SymbolFrame) -> bool:
        """Merge a frame, and hand on the result where its symbol is watched.

        Returns:
            False where the frame is outdated.
        """
        symbol = frame.symbol
        state = self._states.get(symbol)
        if state is None:
            state = self._context.dialect.new_symbol(symbol)
        if not state.apply(frame.event):
            return False
        self._states[symbol] = state
        self._mutes = 0
        connection.carries.add(symbol)
        if symbol in self.symbols:
            self._context.tickers.add(symbol, state)
        return True

    def forget(self, symbols: Iterable[str]) -> None:
        """Drop what was merged of symbols that no connection carries any more."""
        for symbol in symbols:
            if not any(symbol in connection.carries for connection in self.connections):
                self._states.pop(symbol, None)

    def is_carried_elsewhere(self, symbol: str, connection: ExchangeConnection) -> bool:
        """Whether another connection carries a symbol."""
        return any(symbol in other.carries for other in self.connections if other is not connection)

    def ended(self, connection: ExchangeConnection) -> None:
        """Mark as stale what only this connection carried, which is over; synchronous."""
        self.connections.remove(connection)
        lost = connection.carries.difference(*(other.carries for other in self.connections))
        self.forget(lost)
        connection.carries.clear()
        self._context.tickers.mark_stale("disconnected", sorted(lost & self.symbols.keys()))
