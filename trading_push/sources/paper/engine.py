"""The matching engine: accounts, their orders and the fills, without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import (
    ROUND_HALF_EVEN,
    ROUND_UP,
    Context,
    Decimal,
    DivisionByZero,
    Inexact,
    InvalidOperation,
    Overflow,
    localcontext,
)
from typing import Literal

import attrs

from trading_push.models import Fill

__all__ = [
    "CURRENCY",
    "EXACT",
    "ZERO",
    "Account",
    "Holding",
    "MatchingEngine",
    "OpenOrder",
    "OrderRefused",
    "OrderSide",
]

CURRENCY = "USDT"
TAKER_FEE = Decimal("0.0005")
MAKER_FEE = Decimal("0.0002")
QUANTUM = Decimal("0.00000001")
"""The step that a fee, and the share of the cost that a partial close takes, are rounded to."""
MARKET_MARGIN = Decimal("1.05")
"""How much of its value at the last price a market order locks."""

ZERO = Decimal(0)
_ERRORS = [DivisionByZero, InvalidOperation, Overflow]
EXACT = Context(prec=100, traps=[Inexact, *_ERRORS])
"""Computes without rounding: a result that would have to be rounded is an error."""
_ROUNDING = Context(prec=100, traps=_ERRORS)

OrderSide = Literal["buy", "sell"]


class OrderRefused(ValueError):
    """The account cannot carry the order, or its numbers make no sense."""


@attrs.define
class OpenOrder:
    """An order that is not filled yet, or only in part."""

    number: int
    user: str
    symbol: str
    side: OrderSide
    price: Decimal | None
    """The limit; None for a market order."""
    quantity: Decimal
    created_at: int
    updated_at: int
    unit_lock: Decimal
    """How much of the cash each unit left of it locks, fee included."""
    filled: Decimal = ZERO
    resting: bool = False
    """Whether it has met a price before; from then on it is filled at its own limit."""

    @property
    def left(self) -> Decimal:
        """The quantity that is still to be filled."""
        return EXACT.subtract(self.quantity, self.filled)

    @property
    def locked(self) -> Decimal:
        """How much of the cash the order locks."""
        return EXACT.multiply(self.left, self.unit_lock)

    def accepts(self, price: Decimal) -> bool:
        """Whether the order may be filled at `price`."""
        if self.price is None:
            return True
        return price <= self.price if self.side == "buy" else price >= self.price


@attrs.define
class Holding:
    """What an account has of one symbol.

    `quantity` and the total `cost` are exact, and negative for a short position.
    """

    quantity: Decimal = ZERO
    cost: Decimal = ZERO
    realized: Decimal = ZERO
    fees: Decimal = ZERO

    @property
    def side(self) -> Literal["long", "short"] | None:
        """None where nothing is held."""
        if not self.quantity:
            return None
        return "long" if self.quantity > 0 else "short"

    @property
    def entry_price(self) -> Decimal | None:
        """What a unit has cost, rounded; None where nothing is held."""
        return _share(self.cost, Decimal(1), self.quantity) if self.quantity else None

    def unrealized(self, mark: Decimal | None) -> Decimal:
        """Compute what the holding gains at the price `mark`; zero where there is none yet."""
        if mark is None:
            return ZERO
        return EXACT.subtract(EXACT.multiply(self.quantity, mark), self.cost)


@attrs.define
class Account:
    """One user's account, in one currency."""

    user: str
    deposits: Decimal = ZERO
    cash: Decimal = ZERO
    realized: Decimal = ZERO
    fees: Decimal = ZERO
    holdings: dict[str, Holding] = attrs.field(factory=dict)
    orders: dict[int, OpenOrder] = attrs.field(factory=dict)

    @property
    def locked(self) -> Decimal:
        """What the open orders hold back of the cash."""
        with localcontext(EXACT):
            return sum((order.locked for order in self.orders.values()), ZERO)

    @property
    def free(self) -> Decimal:
        """How much of the cash may be used for an order."""
        return EXACT.subtract(self.cash, self.locked)

    def imbalance(self) -> Decimal:
        """Compute by how much the account is out of balance; always zero."""
        with localcontext(EXACT):
            cost = sum((holding.cost for holding in self.holdings.values()), ZERO)
            return self.deposits - (self.cash + cost - self.realized + self.fees)

    def execute(self, symbol: str, signed: Decimal, price: Decimal, fee: Decimal) -> None:
        """Buy, or sell where `signed` is negative: close what is held, then open what is left."""
        holding = self.holdings.setdefault(symbol, Holding())
        with localcontext(EXACT):
            # The opposite of what is held closes it, at its share of the cost.
            held = holding.quantity
            closing = ZERO
            if held and (held > 0) != (signed > 0):
                closing = signed if abs(signed) <= abs(held) else -held
                share = holding.cost
                if closing != -held:
                    share = _share(holding.cost, abs(closing), abs(held))
                profit = -closing * price - share
                holding.cost -= share
                holding.realized += profit
                self.realized += profit
            # The rest opens, or adds to, a position.
            holding.cost += (signed - closing) * price
            holding.quantity = held + signed
            holding.fees += fee
            self.fees += fee
            self.cash -= signed * price + fee


def _positive(value: Decimal) -> bool:
    return value.is_finite() and value > 0


def _share(total: Decimal, part: Decimal, whole: Decimal) -> Decimal:
    """Compute the share of a total that a part has, rounded."""
    exact = _ROUNDING.divide(_ROUNDING.multiply(total, part), whole)
    return exact.quantize(QUANTUM, ROUND_HALF_EVEN, _ROUNDING)


class MatchingEngine:
    """Accounts and their open orders, which it fills as prices move. Not for several threads.

    Times (`now`) are in ms since the epoch. What changes is noted until `forget_changes`.

    Args:
        next_number: The number of the next order or fill.
        accounts: The accounts by user, as they were kept.
    """

    def __init__(self, next_number: int = 1, accounts: Mapping[str, Account] | None = None) -> None:
        self.next_number = next_number
        self.accounts = dict(accounts or {})
        self.forget_changes()

    def forget_changes(self) -> None:
        """Begin anew to note what changes."""
        self.changed_users: set[str] = set()
        """Whose account, positions or orders changed."""
        self.changed_orders: dict[int, OpenOrder | None] = {}
        """The orders that changed, by number; None for one that is no longer open."""
        self.fills: list[tuple[str, Fill]] = []
        """The new fills, with their users."""

    def deposit(self, user: str, amount: Decimal) -> None:
        """Pay in; the account is opened by its first deposit."""
        account = self.accounts.setdefault(user, Account(user))
        account.deposits = EXACT.add(account.deposits, amount)
        account.cash = EXACT.add(account.cash, amount)
        self.changed_users.add(user)

    def place(
        self,
        user: str,
        symbol: str,
        side: OrderSide,
        quantity: Decimal,
        now: int,
        *,
        limit: Decimal | None = None,
        last: Decimal | None = None,
    ) -> OpenOrder:
        """Place an order with a `limit`, or a market order, which locks cash by the `last` price.

        It is filled when the price moves next, as far as the size offered goes.

        Raises:
            OrderRefused: Nothing was placed.
        """
        # A market order has no price of its own: the last one stands in, with a margin.
        account = self.accounts.get(user)
        price = limit if limit is not None else last
        if account is None or price is None or not (_positive(quantity) and _positive(price)):
            raise OrderRefused("an order needs an account, a quantity and a price above zero")
        unit = price if limit is not None else EXACT.multiply(price, MARKET_MARGIN)
        order = OpenOrder(
            number=self.next_number,
            user=user,
            symbol=symbol,
            side=side,
            price=limit,
            quantity=quantity,
            created_at=now,
            updated_at=now,
            unit_lock=EXACT.multiply(unit, EXACT.add(1, TAKER_FEE)),
        )
        if order.locked > account.free:
            raise OrderRefused(f"user {user} has not enough free {CURRENCY} for that order")
        self.next_number += 1
        account.orders[order.number] = order
        self._note(order)
        return order

    def cancel(self, number: int, user: str) -> bool:
        """Cancel what is left of an order; False where the user has no such open order."""
        account = self.accounts.get(user)
        order = account.orders.get(number) if account else None
        if order is None:
            return False
        self._close(order)
        return True

    def on_price(
        self,
        symbol: str,
        bid: Decimal,
        ask: Decimal,
        *,
        bid_size: Decimal,
        ask_size: Decimal,
        now: int,
    ) -> list[Fill]:
        """Fill the orders of a symbol, the oldest first, up to the sizes at bid and ask.

        An order that can be filled when it first meets a price pays that price and the taker's fee;
        one that has rested is filled at its own limit and pays the maker's fee.
        """
        sizes: dict[OrderSide, Decimal] = {"buy": ask_size, "sell": bid_size}
        fills = []
        for order in self._orders_of(symbol):
            touch = ask if order.side == "buy" else bid
            quantity = min(order.left, sizes[order.side])
            if order.accepts(touch) and quantity > 0:
                sizes[order.side] = EXACT.subtract(sizes[order.side], quantity)
                if order.resting and order.price is not None:
                    fills.append(self._fill(order, quantity, order.price, MAKER_FEE, now))
                else:
                    fills.append(self._fill(order, quantity, touch, TAKER_FEE, now))
            order.resting = True
        return fills

    def _orders_of(self, symbol: str) -> list[OpenOrder]:
        orders = [
            order
            for account in self.accounts.values()
            for order in account.orders.values()
            if order.symbol == symbol
        ]
        return sorted(orders, key=lambda order: order.number)

    def _fill(
        self, order: OpenOrder, quantity: Decimal, price: Decimal, rate: Decimal, now: int
    ) -> Fill:
        value = EXACT.multiply(quantity, price)
        fee = EXACT.multiply(value, rate).quantize(QUANTUM, ROUND_UP, _ROUNDING)
        signed = quantity if order.side == "buy" else quantity.copy_negate()
        self.accounts[order.user].execute(order.symbol, signed, price, fee)
        order.filled = EXACT.add(order.filled, quantity)
        order.updated_at = now
        fill = Fill(
            fill_id=str(self.next_number),
            order_id=str(order.number),
            symbol=order.symbol,
            side=order.side,
            price=price,
            quantity=quantity,
            fee=fee,
            fee_asset=CURRENCY,
            at=now,
        )
        self.next_number += 1
        self.fills.append((order.user, fill))
        if order.left:
            self._note(order)
        else:
            self._close(order)
        return fill

    def _note(self, order: OpenOrder) -> None:
        self.changed_orders[order.number] = order
        self.changed_users.add(order.user)

    def _close(self, order: OpenOrder) -> None:
        del self.accounts[order.user].orders[order.number]
        self.changed_orders[order.number] = None
        self.changed_users.add(order.user)
