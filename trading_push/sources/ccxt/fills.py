"""Publish each new fill of the users whose sessions are open.

The newest page of fills is asked for again and again, because there is nothing else that every
exchange has. What is new in it is published, once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn

import trio

from trading_push import logs
from trading_push.errors import SourceError
from trading_push.sources.base import ChangeSink
from trading_push.sources.ccxt.conversions import UNREADABLE, fill
from trading_push.sources.ccxt.exchange import CcxtExchange
from trading_push.supervision import back_off

__all__ = ["FillPoller"]

ALL_SYMBOLS: Final = "*"
PAGE: Final = 100
"""How many fills one request asks for: every exchange that ccxt knows gives as many."""
_IDS_KEPT: Final = 20 * PAGE
_LONGEST_PAUSE_S: Final = 60.0


class FillPoller:
    """Polls the fills of users, and remembers which were published.

    Args:
        symbols: The markets, by ccxt's names; `*` asks for those of all in one request.
        interval_s: Between two questions for the same user.
        call: Calls a method of an exchange object, within a deadline.
    """

    def __init__(
        self, symbols: Sequence[str], interval_s: float, call: Callable[..., Awaitable[Any]]
    ) -> None:
        self._symbols = symbols
        self._interval_s = interval_s
        self._call = call
        # The newest fills of a user and market, by symbol and id, that were published, or were
        # there before the user was first watched; kept when the user's session closes.
        self._known: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
        self.sink: ChangeSink | None = None
        """Where fills are published; None while the source is not watched."""

    async def follow(self, user: str, exchange: CcxtExchange) -> NoReturn:
        """Publish a user's new fills until cancelled."""
        failing: set[str] = set()
        failures = 0
        while True:
            for symbol in self._symbols:
                try:
                    await self._publish_new(user, exchange, symbol)
                except SourceError as error:
                    if symbol not in failing:
                        with_symbol = SourceError(f"{symbol}: {error}")
                        fields = {"user": user, "data_type": "fills", "error": with_symbol}
                        logs.emit(logs.line("fetch_failed", **fields))
                    failing.add(symbol)
                else:
                    if symbol in failing:
                        logs.emit(logs.line("fetch_recovered", user=user, data_type="fills"))
                    failing.discard(symbol)
            if self.sink is not None:
                # Those of one market go on where another's cannot be told.
                all_fail = len(failing) == len(self._symbols)
                self.sink.mark("fills", user, "source_error" if all_fail else None)
            # A client that is refused has to ask less, or the exchange refuses its whole address.
            failures = failures + 1 if failing else 0
            longest_s = max(_LONGEST_PAUSE_S, self._interval_s)
            await trio.sleep(back_off(failures + 1, self._interval_s, longest_s))

    async def _publish_new(self, user: str, exchange: CcxtExchange, symbol: str) -> None:
        # The newest page, and no `since`: windows of time, clocks and the order of pages differ
        # from exchange to exchange.
        asked = None if symbol == ALL_SYMBOLS else symbol
        trades = await self._call(exchange, "fetch_my_trades", asked, None, PAGE)
        if self.sink is None:
            return
        if not isinstance(trades, list):
            raise SourceError(f"{exchange.name} gave no fills that can be read")
        fills, unreadable = [], 0
        for trade in trades:
            try:
                fills.append(fill(trade, exchange.api))
            except UNREADABLE:
                unreadable += 1
        # At the first page, all that is in it happened before the user was watched.
        known = self._known.get((user, symbol))
        if known is None:
            known = self._known[user, symbol] = {}
            known |= {(each["symbol"], each["fill_id"]): None for each in fills}
        for each in sorted(fills, key=lambda each: each["at"]):
            key = each["symbol"], each["fill_id"]
            if key not in known:
                known[key] = None
                self.sink.publish([("fills", each, user)])
        for old in list(known)[:-_IDS_KEPT]:
            del known[old]
        if unreadable:
            raise SourceError(f"{exchange.name} gave {unreadable} fills that cannot be read")
