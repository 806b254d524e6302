"""Accounts on any exchange that ccxt knows: an exchange object for each user, while watched.

Fills are asked for again and again, for there is nothing else that every exchange has: each that is
new in the newest page is published, once.

What the exchange does not tell is null: nothing is computed that it alone can know. Symbols are
those of the market's base and quote (`BTCUSDT`) for spot and linear perpetual contracts, and ccxt's
own (`BTC/USD:BTC`) for others.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import trio

from trading_push import logs
from trading_push.errors import ConfigurationError, SourceError
from trading_push.sources.base import ChangeSink
from trading_push.sources.ccxt.exchange import CcxtExchange, ExchangeOptions, as_decimal

__all__ = ["CcxtSource", "credentials_of_file", "credentials_of_json", "short_symbol"]

_METHODS = {
    "balance": "fetch_balance",
    "positions": "fetch_positions",
    "pnl": "fetch_positions",
    "orders": "fetch_open_orders",
}
_HAS = {
    "fetch_balance": "fetchBalance",
    "fetch_positions": "fetchPositions",
    "fetch_open_orders": "fetchOpenOrders",
}
# Which names ccxt has for credentials, by how a configuration may write them.
_CREDENTIALS = {
    "api_key": "apiKey",
    "secret": "secret",
    "password": "password",
    "uid": "uid",
    "login": "login",
    "account_id": "accountId",
    "private_key": "privateKey",
    "wallet_address": "walletAddress",
    "token": "token",
}


ALL_SYMBOLS = "*"
PAGE = 100
"""How many fills one request asks for: every exchange that ccxt knows gives as many."""
_IDS_KEPT = 20 * PAGE
_LONGEST_PAUSE_S = 60.0


class CcxtSource:
    """Reads balance, positions, PnL, open orders and fills by each user's own keys.

    A `SessionSource`, and a `WatchingSource` for the fills.

    Args:
        options: Which exchange, and where.
        credentials: Each user's, as ccxt names them. Who has none has an account without anything.
        fill_symbols: The markets, by ccxt's names (`BTC/USDT`), whose fills are published; `*` asks
            for those of all in one request, which not every exchange can.
        fills_interval_s: Between two questions for them.

    Raises:
        ConfigurationError: ccxt cannot be used, a user lacks what the exchange asks for, or it has
            no fills to tell of.
    """

    def __init__(
        self,
        options: ExchangeOptions,
        credentials: Mapping[str, Mapping[str, str]],
        *,
        fill_symbols: Sequence[str] = (),
        fills_interval_s: float = 5,
    ) -> None:
        self._fill_symbols = fill_symbols
        self._fills_interval_s = fills_interval_s
        # The newest fills of a user and market, by symbol and id, that have been published.
        self._known: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
        self._sink: ChangeSink | None = None
        self._options = options
        self._credentials = credentials
        self._public = CcxtExchange(options)  # markets are loaded once, for all users
        self._loading = trio.Lock()
        self._open: dict[str, CcxtExchange] = {}
        api = self._public.api
        if fill_symbols and not api.has.get("fetchMyTrades"):
            raise ConfigurationError(
                f"{options.exchange} does not tell ccxt of fills: remove ccxt.fill_symbols"
            )
        self._has_positions = api.options.get("defaultType") != "spot"
        for user, given in credentials.items():
            for name, required in api.requiredCredentials.items():
                if required and not given.get(name):
                    raise ConfigurationError(
                        f"the credentials of user {user} have no {name}, which "
                        f"{options.exchange} asks for: add it"
                    )

    @asynccontextmanager
    async def session(self, user_id: str) -> AsyncIterator[None]:
        """The user's own exchange object, with its connections and its rate limiter.

        Raises:
            SourceError: The exchange's markets cannot be loaded.
        """
        if user_id not in self._credentials:
            yield
            return
        async with self._loading:
            await self._call(self._public, "load_markets")
        exchange = await trio.to_thread.run_sync(self._make, user_id)
        self._open[user_id] = exchange
        try:
            async with trio.open_nursery() as nursery:
                if self._fill_symbols:
                    nursery.start_soon(self._follow_fills, user_id, exchange)
                yield
                nursery.cancel_scope.cancel()
        finally:
            del self._open[user_id]
            exchange.close()

    async def watch(self, sink: ChangeSink) -> None:
        """Publish the fills of those whose session is open, until cancelled.

        The first time a user is watched it begins with the fills to come; after that with those
        since the last one, of each market the newest PAGE.
        """
        self._sink = sink
        try:
            await trio.sleep_forever()
        finally:
            self._sink = None

    async def _follow_fills(self, user: str, exchange: CcxtExchange) -> None:
        failing: set[str] = set()
        pause_s = self._fills_interval_s
        while True:
            for symbol in self._fill_symbols:
                try:
                    await self._publish_fills(user, exchange, symbol)
                except SourceError as error:
                    if symbol not in failing:
                        told = SourceError(f"{symbol}: {error}")
                        line = logs.line("fetch_failed", user=user, data_type="fills", error=told)
                        logs.emit(line)
                    failing.add(symbol)
                else:
                    if symbol in failing:
                        logs.emit(logs.line("fetch_recovered", user=user, data_type="fills"))
                    failing.discard(symbol)
            # Who is refused asks less, or an exchange refuses everything of this address.
            longest_s = max(_LONGEST_PAUSE_S, self._fills_interval_s)
            pause_s = min(2 * pause_s, longest_s) if failing else self._fills_interval_s
            await trio.sleep(pause_s)

    async def _publish_fills(self, user: str, exchange: CcxtExchange, symbol: str) -> None:
        # The newest page, and no `since`: windows of time, clocks and the order of pages differ
        # from exchange to exchange.
        asked = None if symbol == ALL_SYMBOLS else symbol
        trades = await self._call(exchange, "fetch_my_trades", asked, None, PAGE)
        if self._sink is None:
            return
        if not isinstance(trades, list):
            raise SourceError(f"{exchange.name} gave no fills that can be read")
        fills, unreadable = [], 0
        for trade in trades:
            try:
                fills.append(_fill(trade, exchange.api))
            except (AttributeError, KeyError, TypeError, ValueError):
                unreadable += 1
        known = self._known.get((user, symbol))
        if known is None:  # what was before anybody watched
            known = self._known[user, symbol] = {}
            known |= {(fill["symbol"], fill["fill_id"]): None for fill in fills}
        for fill in sorted(fills, key=lambda fill: fill["at"]):
            key = fill["symbol"], fill["fill_id"]
            if key not in known:
                known[key] = None
                self._sink.publish([("fills", fill, user)])
        for old in list(known)[:-_IDS_KEPT]:
            del known[old]
        if unreadable:
            raise SourceError(f"{exchange.name} gave {unreadable} fills that cannot be read")

    async def _call(self, exchange: CcxtExchange, method: str, *args: Any) -> Any:
        # ccxt's own time-out is of each read, and a rate limiter may pause before.
        try:
            with trio.fail_after(6 * self._options.timeout_s):
                return await exchange.call(method, *args)
        except trio.TooSlowError:
            raise SourceError(f"{exchange.name} did not answer in time") from None

    def _make(self, user_id: str) -> CcxtExchange:
        exchange = CcxtExchange(self._options, self._credentials[user_id])
        exchange.api.set_markets_from_exchange(self._public.api)
        return exchange

    async def fetch(self, user_id: str, data_type: str) -> Any | None:
        """One user's value; None for what the exchange does not tell of.

        Raises:
            SourceError: The exchange refused or did not answer; or the session is not open.

        Cancellation abandons the thread, which ends by itself when the exchange has been silent
        for ccxt's time-out; until then the user's other calls wait.
        """
        method = _METHODS.get(data_type)
        if method is None:
            return None
        if user_id not in self._credentials:
            return None if data_type == "pnl" else []
        exchange = self._open.get(user_id)
        if exchange is None:
            raise SourceError("the user's session is not open")
        if method == "fetch_positions" and not self._has_positions:
            return None
        if not exchange.api.has.get(_HAS[method]):
            return None
        kind = exchange.api.options.get("defaultType", "spot")
        if method == "fetch_open_orders" and kind != "spot":
            # Some exchanges' orders are those of the spot market unless it is said here.
            answer = await exchange.call(method, None, None, None, {"type": kind})
        else:
            answer = await exchange.call(method)
        try:
            if data_type == "balance":
                return _balance(answer)
            if data_type == "orders":
                return [_order(each, exchange.api) for each in answer]
            positions = [each for each in answer if as_decimal(each.get("contracts"))]
            if data_type == "positions":
                return [_position(each, exchange.api) for each in positions]
            return _pnl(positions, exchange.api)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SourceError(
                f"{exchange.name} gave no {data_type} that can be read ({type(error).__name__})"
            ) from None

    def close(self) -> None:
        """Close the connection that the markets were loaded over."""
        self._public.close()


def short_symbol(market: Mapping[str, Any]) -> str:
    """A market's symbol as clients name it."""
    if market.get("spot") or (market.get("swap") and market.get("linear")):
        return f"{market['base']}{market['quote']}".upper()
    return str(market["symbol"]).upper()


def _symbol(symbol: str, api: Any) -> str:
    market = api.markets.get(symbol)
    return symbol if market is None else short_symbol(market)


def _balance(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    free, used, total = answer["free"], answer["used"], answer["total"]
    rows = [
        {
            "asset": asset,
            "free": as_decimal(free.get(asset)),
            "locked": as_decimal(used.get(asset)),
            "total": as_decimal(total.get(asset)),
        }
        for asset in sorted({*free, *used, *total})
    ]
    return [row for row in rows if row["free"] or row["locked"] or row["total"]]


def _position(given: Mapping[str, Any], api: Any) -> dict[str, Any]:
    contracts, size = as_decimal(given["contracts"]), as_decimal(given.get("contractSize"))
    return {
        "symbol": _symbol(given["symbol"], api),
        "side": given.get("side"),
        "quantity": None if contracts is None or size is None else abs(contracts * size),
        "entry_price": as_decimal(given.get("entryPrice")),
        "mark_price": as_decimal(given.get("markPrice")),
        "unrealized_pnl": as_decimal(given.get("unrealizedPnl")),
    }


def _pnl(positions: list[Mapping[str, Any]], api: Any) -> dict[str, Any]:
    by_symbol = [
        {
            "symbol": _symbol(each["symbol"], api),
            "realized": as_decimal(each.get("realizedPnl")),
            "unrealized": as_decimal(each.get("unrealizedPnl")),
            "fees": None,
        }
        for each in positions
    ]
    currencies = {api.markets.get(each["symbol"], {}).get("settle") for each in positions}
    currency = currencies.pop() if len(currencies) == 1 else None
    amounts = [row["unrealized"] for row in by_symbol]
    known = [each for each in amounts if each is not None]
    # Of several currencies there is no sum; nor of what is not known.
    summed = len(known) == len(amounts) and (currency is not None or not amounts)
    return {
        "realized": None,
        "unrealized": sum(known, Decimal(0)) if summed else None,
        "fees": None,
        "total": None,
        "currency": currency,
        "by_symbol": by_symbol,
    }


def _order(given: Mapping[str, Any], api: Any) -> dict[str, Any]:
    filled = as_decimal(given.get("filled"))
    return {
        "order_id": given["id"],
        "symbol": _symbol(given["symbol"], api),
        "side": given.get("side"),
        "type": given.get("type"),
        "price": as_decimal(given.get("price")),
        "quantity": as_decimal(given.get("amount")),
        "filled": filled,
        "status": "partially_filled" if filled else "new",
        "created_at": given.get("timestamp"),
        "updated_at": given.get("lastUpdateTimestamp") or given.get("lastTradeTimestamp"),
    }


def _text(value: object) -> str:
    if value is None:
        raise ValueError("there is none")
    return str(value)


def _fill(given: Mapping[str, Any], api: Any) -> dict[str, Any]:
    fee = given.get("fee") or {}
    return {
        "fill_id": _text(given["id"]),
        "order_id": given.get("order"),
        "symbol": _symbol(given["symbol"], api),
        "side": given.get("side"),
        "price": as_decimal(given.get("price")),
        "quantity": as_decimal(given.get("amount")),
        "fee": as_decimal(fee.get("cost")),
        "fee_asset": fee.get("currency"),
        "at": int(given["timestamp"]),
    }


def credentials_of_file(path: Path) -> dict[str, dict[str, str]]:
    """Each user's credentials from a TOML file with a table [users.ID] for each.

    Raises:
        ConfigurationError: It cannot be read, can be read by others than its owner, or holds
            something else. No value is in the text.
    """
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigurationError(
                    f"ccxt.credentials_file {str(path)!r} can be used by others than its owner: "
                    f"chmod 600 {path}"
                )
            tables = tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "it is not TOML"
        raise ConfigurationError(
            f"ccxt.credentials_file {str(path)!r} cannot be read: {why}"
        ) from None
    if set(tables) != {"users"} or not isinstance(tables["users"], dict):
        raise ConfigurationError(
            f"ccxt.credentials_file {str(path)!r}: write a table [users.ID] for each user, and "
            "nothing else"
        )
    return _credentials(tables["users"], f"ccxt.credentials_file {str(path)!r}")


def credentials_of_json(text: str) -> dict[str, dict[str, str]]:
    """Each user's credentials from JSON: {"4": {"api_key": "...", "secret": "..."}}.

    Raises:
        ConfigurationError: It is something else. No value is in the text.
    """
    try:
        tables = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        tables = None
    if not isinstance(tables, dict):
        raise ConfigurationError(
            'ccxt.credentials is not usable: give JSON like {"4": {"api_key": "...", ...}}'
        )
    return _credentials(tables, "ccxt.credentials")


def _credentials(tables: Mapping[str, Any], where: str) -> dict[str, dict[str, str]]:
    if not tables:
        raise ConfigurationError(f"{where} names no user: give at least one")
    found: dict[str, dict[str, str]] = {}
    for user, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigurationError(f"{where}: user {user} has no table of credentials: write one")
        names = {_CREDENTIALS.get(str(name), str(name)): table[name] for name in table}
        for name, value in names.items():
            if name not in _CREDENTIALS.values():
                raise ConfigurationError(
                    f"{where}: there is no credential {name!r} (user {user}): use some of "
                    f"{', '.join(_CREDENTIALS)}"
                )
            if not isinstance(value, str) or not value:
                raise ConfigurationError(f"{where}: {name} of user {user} is no text: correct it")
        found[user] = names
    return found
