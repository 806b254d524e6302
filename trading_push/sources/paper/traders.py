"""The demo users: what they deposit, and which orders they place and cancel, by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from contextlib import suppress
from decimal import ROUND_DOWN, ROUND_UP, Decimal

from trading_push.models import Ticker
from trading_push.sources.paper.engine import (
    CURRENCY,
    ZERO,
    Account,
    Holding,
    MatchingEngine,
    OrderRefused,
    OrderSide,
)

__all__ = ["SYMBOLS", "Traders", "demo_engine", "tradable"]

SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "BNBUSDT", "XRPUSDT")
"""What the demo users trade on a market that gives only what is watched."""
USERS = ("1", "2", "3", "4", "5")
DEPOSIT = Decimal(100_000)
ORDERS = 6
"""How many open orders a user has at most."""
CAP = Decimal("0.15")
"""Which share of the deposits one position may cost; above it the user only reduces it."""


def demo_engine() -> MatchingEngine:
    """Make the accounts of the demo users, before the first order."""
    engine = MatchingEngine()
    for user in USERS:
        engine.deposit(user, DEPOSIT)
    return engine


class Traders:
    """Places and cancels the demo users' orders, and decides how much of them is filled.

    Args:
        engine: Has their accounts.
        seed: The same seed makes the same choices, as long as the market is the same.
    """

    def __init__(self, engine: MatchingEngine, seed: int) -> None:
        self._engine = engine
        self._rng = random.Random(f"{seed}:{engine.next_number}")
        # The finest step that a symbol's prices have shown, as a power of ten.
        self._tick_exponents: dict[str, int] = {}

    def step(self, tickers: Mapping[str, Ticker], moved: Iterable[str], now: int) -> None:
        """Fill the orders of the symbols that moved, then place and cancel for each user."""
        for symbol in moved:
            bid, ask = _touch(tickers[symbol])
            if symbol.endswith(CURRENCY) and tradable(bid) and tradable(ask):
                self._learn_tick(symbol, (bid, ask))
                self._engine.on_price(
                    symbol,
                    bid,
                    ask,
                    bid_size=self._quantity(bid, 200, 3000),
                    ask_size=self._quantity(ask, 200, 3000),
                    now=now,
                )
        for account in self._engine.accounts.values():
            if not account.orders or self._rng.random() < 0.15:
                self._act(account, tickers, now)

    def _act(self, account: Account, tickers: Mapping[str, Ticker], now: int) -> None:
        if account.free < account.deposits / 5:
            self._engine.deposit(account.user, DEPOSIT)
        # A symbol that was traded may have no price, or no good one, by now.
        symbols = [
            symbol for symbol in self._tick_exponents if all(map(tradable, _touch(tickers[symbol])))
        ]
        if not symbols:
            return
        rng = self._rng
        # Cancel, where there are many orders or by chance.
        orders = list(account.orders)
        if orders and (len(orders) >= ORDERS or rng.random() < 0.1):
            self._engine.cancel(rng.choice(orders), account.user)
            return
        # Else place one; on the side that reduces a position that is large already.
        symbol = rng.choice(symbols)
        bid, ask = _touch(tickers[symbol])
        side: OrderSide = rng.choice(("buy", "sell"))
        holding = account.holdings.get(symbol, Holding())
        if abs(holding.cost) > account.deposits * CAP:
            side = "sell" if holding.quantity > 0 else "buy"
        quantity = self._quantity(bid, 100, 4000)
        limit = None
        if rng.random() >= 0.35:
            away = Decimal(rng.randint(0, 20)) / 10_000
            price = bid * (1 - away) if side == "buy" else ask * (1 + away)
            tick = Decimal(1).scaleb(self._tick_exponents[symbol])
            limit = price.quantize(tick, ROUND_DOWN if side == "buy" else ROUND_UP)
        with suppress(OrderRefused):
            self._engine.place(account.user, symbol, side, quantity, now, limit=limit, last=ask)

    def _quantity(self, price: Decimal, low: int, high: int) -> Decimal:
        """Choose a quantity worth about `low` to `high`, in lots of about a cent to ten cents."""
        lot = Decimal(1).scaleb(min(0, -price.adjusted() - 2))
        lots = Decimal(self._rng.randint(low, high)) / price / lot
        return max(lots.to_integral_value(), Decimal(1)) * lot

    def _learn_tick(self, symbol: str, prices: Iterable[Decimal]) -> None:
        for price in prices:
            exponent = price.normalize().as_tuple().exponent
            if isinstance(exponent, int):
                known = self._tick_exponents.get(symbol, 0)
                self._tick_exponents[symbol] = min(known, exponent)


def _touch(ticker: Ticker) -> tuple[Decimal, Decimal]:
    """Return bid and ask; of a tape that has only trades, the last price stands for both."""
    last = ticker.last or ZERO
    return ticker.bid or last, ticker.ask or last


def tradable(price: Decimal) -> bool:
    """Whether this is a price of a size that can be traded at, and be computed with exactly."""
    return (
        price.is_finite()
        and price > 0
        and -12 < price.adjusted() < 12
        and len(price.as_tuple().digits) < 25
    )
