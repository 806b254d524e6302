"""The demo users: what they pay in, and the orders that they place and cancel, seeded."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from contextlib import suppress
from decimal import ROUND_DOWN, ROUND_UP, Decimal

from trading_push.models import Ticker
from trading_push.sources.paper.book import (
    CURRENCY,
    ZERO,
    Account,
    Book,
    Holding,
    OrderRefused,
    OrderSide,
)

__all__ = ["SYMBOLS", "Traders", "demo_book"]

SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "BNBUSDT", "XRPUSDT")
"""What the demo users trade where the market asks which symbols it is to give."""
USERS = ("1", "2", "3", "4", "5")
DEPOSIT = Decimal(100_000)
ORDERS = 6
"""How many orders a user leaves open at most."""
CAP = Decimal("0.15")
"""How much of the deposits one position may cost before the user only reduces it."""


def demo_book() -> Book:
    """The book before the first order."""
    book = Book()
    for user in USERS:
        book.deposit(user, DEPOSIT)
    return book


class Traders:
    """Places and cancels the demo users' orders, and says how much the market takes; seeded."""

    def __init__(self, book: Book, seed: int) -> None:
        self._book = book
        self._rng = random.Random(f"{seed}:{book.next_number}")
        self._tick_exponents: dict[str, int] = {}

    def step(self, markets: Mapping[str, Ticker], moved: Iterable[str], now: int) -> None:
        """One step of everybody: fill against the symbols that moved, then place and cancel."""
        for symbol in moved:
            bid, ask = _touch(markets[symbol])
            if symbol.endswith(CURRENCY) and _tradable(bid) and _tradable(ask):
                self._learn_tick(symbol, (bid, ask))
                self._book.on_price(
                    symbol,
                    bid,
                    ask,
                    bid_size=self._quantity(bid, 200, 3000),
                    ask_size=self._quantity(ask, 200, 3000),
                    now=now,
                )
        for account in self._book.accounts.values():
            if not account.orders or self._rng.random() < 0.15:
                self._act(account, markets, now)

    def _act(self, account: Account, markets: Mapping[str, Ticker], now: int) -> None:
        if account.free < account.deposits / 5:
            self._book.deposit(account.user, DEPOSIT)
        if not self._tick_exponents:
            return
        rng = self._rng
        orders = list(account.orders)
        if orders and (len(orders) >= ORDERS or rng.random() < 0.1):
            self._book.cancel(rng.choice(orders), account.user)
            return
        symbol = rng.choice(list(self._tick_exponents))
        bid, ask = _touch(markets[symbol])
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
            self._book.place(account.user, symbol, side, quantity, now, limit=limit, last=ask)

    def _quantity(self, price: Decimal, low: int, high: int) -> Decimal:
        """A quantity worth about `low` to `high`, in lots of about a cent to ten cents."""
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
    """Bid and ask; a tape of trades alone has neither, and the last price stands for both."""
    last = ticker.last or ZERO
    return ticker.bid or last, ticker.ask or last


def _tradable(price: Decimal) -> bool:
    return price > 0 and -12 < price.adjusted() < 12 and len(price.as_tuple().digits) < 25
