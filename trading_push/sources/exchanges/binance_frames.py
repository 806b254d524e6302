"""Binance's stream frames as events of a symbol: bookTicker, trade, aggTrade and 24hrTicker.

The fields are those of "WebSocket Streams for Binance" (web-socket-streams.md of Binance's spot API
documentation).
"""

from __future__ import annotations

from decimal import Decimal

import msgspec

from trading_push.sources.exchanges.amounts import known_price, number, percentage, price
from trading_push.sources.exchanges.ticker_state import Kind

__all__ = ["Frame", "Payload", "is_other_event", "values_of"]


class Payload(msgspec.Struct):
    """The fields of Binance's events that matter here; `a`, `b` and `l` may be ids in a trade."""

    event: str = msgspec.field(name="e", default="")
    event_time: int = msgspec.field(name="E", default=0)
    trade_time: int = msgspec.field(name="T", default=0)
    symbol: str = msgspec.field(name="s", default="")
    price: str | None = msgspec.field(name="p", default=None)
    quantity: str | None = msgspec.field(name="q", default=None)
    bid: str | int | None = msgspec.field(name="b", default=None)
    ask: str | int | None = msgspec.field(name="a", default=None)
    last: str | None = msgspec.field(name="c", default=None)
    open: str | None = msgspec.field(name="o", default=None)
    high: str | None = msgspec.field(name="h", default=None)
    low: str | int | None = msgspec.field(name="l", default=None)
    volume: str | None = msgspec.field(name="v", default=None)
    percent: str | None = msgspec.field(name="P", default=None)


class Frame(msgspec.Struct):
    """An event in the wrapping of the combined streams, or those of a stream of all symbols."""

    data: Payload | list[Payload]
    stream: str = ""


def values_of(payload: Payload, stream: str = "") -> tuple[Kind, tuple[Decimal | None, ...]] | None:
    """Read an event: its kind, and the values of an `Event` of that kind.

    Args:
        payload: The event.
        stream: The stream's name, where the event came in its wrapping.

    Returns:
        None for one that is well-formed, but of no use here.

    Raises:
        ValueError, ArithmeticError: It is not an event of Binance, or its amounts cannot be used.
    """
    event = payload.event
    if event == "bookTicker" or (not event and payload.bid is not None):
        return "quote", (known_price(payload.bid), known_price(payload.ask))
    if event in ("trade", "aggTrade"):
        return "trade", (price(payload.price), number(payload.quantity))
    if event == "24hrTicker":
        return "window", _window(payload)
    if event or stream:
        return None
    raise ValueError("not a Binance stream frame")


def is_other_event(text: bytes | str) -> bool:
    """Whether an event is well-formed, but of a stream that is of no use here, such as depth."""
    event: object = msgspec.json.decode(text)
    while isinstance(event, dict) and ("frame" in event or "data" in event):
        event = event.get("frame") or event.get("data")
    return isinstance(event, dict) and event.get("e", "") not in ("", *_EVENTS)


_EVENTS = ("bookTicker", "trade", "aggTrade", "24hrTicker")


def _window(payload: Payload) -> tuple[Decimal | None, ...]:
    last = known_price(payload.last)  # a pair without a trade yet has zeros
    window: tuple[Decimal | None, ...] = (None, None, None, None)
    if payload.open is not None:
        prices = map(known_price, (payload.open, payload.high, payload.low))
        window = (*prices, number(payload.volume))
    percent = None if payload.percent is None or last is None else percentage(payload.percent)
    quote: tuple[Decimal | None, ...] = (None, None)
    if payload.bid is not None and payload.ask is not None:
        quote = (known_price(payload.bid), known_price(payload.ask))
    return (last, *window, percent, *quote)
