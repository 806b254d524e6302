"""Accounts on any exchange that ccxt knows: an exchange object for each user, while watched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from trading_push.errors import ConfigurationError, SourceError
from trading_push.sources.base import ChangeSink
from trading_push.sources.ccxt.conversions import UNREADABLE, balance, order, pnl, position
from trading_push.sources.ccxt.exchange import (
    CcxtExchange,
    ExchangeOptions,
    RequestRefused,
    as_decimal,
)
from trading_push.sources.ccxt.fills import ALL_SYMBOLS, FillPoller

__all__ = ["CcxtSource"]

KEYS_S: Final = 5.0
"""How often it is looked whether a user who is watched has other keys by now."""

# How ccxt is asked for each data type ...
_METHODS = {
    "balance": "fetch_balance",
    "positions": "fetch_positions",
    "pnl": "fetch_positions",
    "orders": "fetch_open_orders",
}
# ... and how an exchange says that it has that.
_HAS = {
    "fetch_balance": "fetchBalance",
    "fetch_positions": "fetchPositions",
    "fetch_open_orders": "fetchOpenOrders",
}


class CcxtSource:
    """Reads balance, positions, PnL, open orders and fills by each user's own keys.

    A `SessionSource`, and a `WatchingSource` for the fills.

    Args:
        options: Which exchange, and where.
        credentials: Each user's, as ccxt names them. A user without any has an empty account.
        order_symbols: The markets, by ccxt's names, whose open orders are read, each by a request
            of its own. Without any, those of all are asked for in one; an exchange that cannot do
            that is asked for those of `fill_symbols`.
        fill_symbols: The markets, by ccxt's names (`BTC/USDT`), whose fills are published; `*` asks
            for those of all in one request, which not every exchange can.
        fills_interval_s: Between two questions for the fills of a user.

    Raises:
        ConfigurationError: ccxt cannot be used, a user lacks what the exchange asks for, or it has
            no fills to tell of.
    """

    def __init__(
        self,
        options: ExchangeOptions,
        credentials: Mapping[str, Mapping[str, str]],
        *,
        order_symbols: Sequence[str] = (),
        fill_symbols: Sequence[str] = (),
        fills_interval_s: float = 5,
    ) -> None:
        self._fills = (
            FillPoller(fill_symbols, fills_interval_s, self._call) if fill_symbols else None
        )
        self._order_symbols = order_symbols
        self._fallback_symbols = [each for each in fill_symbols if each != ALL_SYMBOLS]
        self._options = options
        self._credentials = credentials
        # Without keys: the markets are loaded with it, once for all users.
        self._public = CcxtExchange(options)
        self._loading = trio.Lock()
        # The exchange objects of the users whose sessions are open, and the keys of each.
        self._open: dict[str, CcxtExchange] = {}
        self._keys: dict[str, Mapping[str, str]] = {}
        # Told whose keys have changed; None while the source is not watched.
        self._sink: ChangeSink | None = None
        api = self._public.api
        if fill_symbols and not api.has.get("fetchMyTrades"):
            raise ConfigurationError(
                f"{options.exchange} does not tell ccxt of fills: remove ccxt.fill_symbols"
            )
        left_out = {"fetch_positions"} if api.options.get("defaultType") == "spot" else set()
        self.data_types = tuple(
            data_type
            for data_type, method in _METHODS.items()
            if method not in left_out and api.has.get(_HAS[method])
        )
        """What the exchange has; without positions there is no PnL either."""
        for user, given in credentials.items():
            self._check_credentials(user, given)

    async def check(self) -> None:
        """Load the exchange's markets; raises SourceError where it cannot be asked."""
        async with self._loading:
            await self._call(self._public, "load_markets")

    @asynccontextmanager
    async def session(self, user_id: str) -> AsyncIterator[None]:
        """Hold the user's own exchange object open, with its connections and its rate limiter.

        Raises:
            SourceError: The exchange's markets cannot be loaded.
        """
        try:
            if user_id in self._credentials:  # not in the nursery: its error would be in a group
                await self._open_exchange(user_id)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow, user_id)
                yield
                nursery.cancel_scope.cancel()
        finally:
            self._close_exchange(user_id)

    async def _open_exchange(self, user_id: str) -> None:
        await self.check()
        keys = self._credentials[user_id]
        exchange = await trio.to_thread.run_sync(self._make, user_id, keys)
        self._close_exchange(user_id)
        self._open[user_id], self._keys[user_id] = exchange, keys

    def _close_exchange(self, user_id: str) -> None:
        self._keys.pop(user_id, None)
        if user_id in self._open:
            self._open.pop(user_id).close()

    async def _follow(self, user_id: str) -> None:
        """Tell of a user's fills, from now on with the keys that are in the file by then."""
        while True:
            async with trio.open_nursery() as nursery:
                if self._fills is not None and user_id in self._open:
                    nursery.start_soon(self._fills.follow, user_id, self._open[user_id])
                are_same = True
                while are_same:
                    await trio.sleep(KEYS_S)
                    are_same = self._credentials.get(user_id) == self._keys.get(user_id)
                nursery.cancel_scope.cancel()
            if user_id not in self._credentials:
                self._close_exchange(user_id)
                if self._sink is not None:
                    self._sink.mark("fills", user_id, None)  # as of everyone without keys
            else:
                try:
                    await self._open_exchange(user_id)
                except SourceError:  # a fetch with the keys of before says what is wrong
                    continue
            if self._sink is not None:
                self._sink.changed((user_id, data_type) for data_type in self.data_types)

    def _check_credentials(self, user: str, given: Mapping[str, str]) -> None:
        for name, required in self._public.api.requiredCredentials.items():
            if required and not given.get(name):
                raise ConfigurationError(
                    f"the credentials of user {user} have no {name}, which "
                    f"{self._options.exchange} asks for: add it"
                )

    async def watch(self, sink: ChangeSink) -> None:
        """Publish the fills of the users whose sessions are open, and tell of new keys.

        The first time a user is watched it begins with the fills to come; after that, with those
        since the last one, as far as they are in the newest page of each market.
        """
        self._sink = sink
        if self._fills is not None:
            self._fills.sink = sink
        try:
            await trio.sleep_forever()
        finally:
            self._sink = None
            if self._fills is not None:
                self._fills.sink = None

    async def _call(self, exchange: CcxtExchange, method: str, *args: Any) -> Any:
        # ccxt's own time-out is that of each read, and its rate limiter may pause before.
        try:
            with trio.fail_after(6 * self._options.timeout_s):
                return await exchange.call(method, *args)
        except trio.TooSlowError:
            raise SourceError(f"{exchange.name} did not answer in time") from None

    def _make(self, user_id: str, given: Mapping[str, str]) -> CcxtExchange:
        try:
            self._check_credentials(user_id, given)  # it may have been added since the start
        except ConfigurationError as error:
            raise SourceError(str(error), retryable=False) from None
        exchange = CcxtExchange(self._options, given)
        exchange.api.set_markets_from_exchange(self._public.api)
        return exchange

    async def fetch(self, user_id: str, data_type: str) -> Any | None:
        """Read one user's value; None for what the exchange does not tell.

        Raises:
            SourceError: The exchange refused or did not answer; or the session is not open.

        Cancellation abandons the thread, which ends by itself when the exchange has been silent
        for ccxt's time-out; until then the user's other calls wait.
        """
        # What there is no need to ask for.
        method = _METHODS.get(data_type)
        if method is None:
            return None
        if user_id not in self._credentials:
            return None if data_type == "pnl" else []
        exchange = self._open.get(user_id)
        if exchange is None:
            raise SourceError("the user's session is not open")
        if data_type not in self.data_types:
            return None
        # The question ...
        answer: Any
        if method == "fetch_open_orders":
            answer = await self._open_orders(exchange)
        else:
            answer = await exchange.call(method)
        # ... and the answer.
        try:
            if data_type == "balance":
                return balance(answer)
            if data_type == "orders":
                return [order(each, exchange.api) for each in answer]
            positions = [each for each in answer if as_decimal(each.get("contracts"))]
            if data_type == "positions":
                return [position(each, exchange.api) for each in positions]
            return pnl(positions, exchange.api)
        except UNREADABLE as error:
            raise SourceError(
                f"{exchange.name} gave no {data_type} that can be read ({type(error).__name__})"
            ) from None

    async def _open_orders(self, exchange: CcxtExchange) -> list[Any]:
        kind = exchange.api.options.get("defaultType", "spot")
        # Some exchanges' orders are those of the spot market unless it is said here.
        more = () if kind == "spot" else (None, None, {"type": kind})
        symbols = self._order_symbols
        if not symbols:
            try:
                return list(await exchange.call("fetch_open_orders", None, *more))
            except RequestRefused as error:
                if not error.needs_symbol:
                    raise
            symbols = self._fallback_symbols
        if not symbols:
            raise SourceError(
                f"{exchange.name} gives open orders of one market at a time: name the markets in "
                "ccxt.order_symbols",
                retryable=False,
            )
        orders: list[Any] = []
        for symbol in symbols:
            if symbol not in exchange.api.markets:
                raise SourceError(
                    f"{exchange.name} has no market {symbol!r}: correct ccxt.order_symbols",
                    retryable=False,
                )
            orders += await exchange.call("fetch_open_orders", symbol, *more)
        return orders

    def close(self) -> None:
        """Close the connection that the markets were loaded over."""
        self._public.close()
