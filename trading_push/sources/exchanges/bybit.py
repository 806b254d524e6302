"""Bybit as a feed: the tickers of its v5 public streams, snapshots and deltas merged.

From "Connect" (v5/ws/connect) and "Ticker" (v5/websocket/public/ticker) of Bybit's API
documentation:

1. A category has its own address: /v5/public/spot, /linear, /inverse.
2. A request to subscribe to spot topics names at most 10; the topics of one connection have at most
   21,000 characters; at most 500 connections are made in 5 minutes.
3. A client should ping every 20 seconds, with a message.
4. A spot ticker is always a snapshot, and has neither bid nor ask. The other categories send a
   snapshot first and deltas after it: what a delta leaves out has not changed.

One topic that does not exist makes a whole request fail. `cs` and `ts` say which of two frames is
the later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import ClassVar, Final, Literal, NamedTuple

import attrs
import msgspec

from trading_push.models import Ticker
from trading_push.sources.exchanges.amounts import DECIMALS, number, percentage
from trading_push.sources.exchanges.dialect import ExchangeLimits, Reply, SymbolFrame, SymbolState
from trading_push.sources.exchanges.stream import ExchangeFeed

__all__ = ["BybitFeed"]

URL: Final = "wss://stream.bybit.com/v5/public/spot"
TOPIC: Final = "tickers."
LIMITS: Final = ExchangeLimits(symbols_per_connection=400, symbols_per_request=10)
"""Of the longest symbols there are, 400 have 17,200 characters with their quotes."""


class BybitFeed(ExchangeFeed):
    """One category of Bybit, by its address; a `WatchedFeed`.

    Args:
        url: A public stream of the exchange, of its test network, or of a loopback.
        limits: The limits that are kept.

    Raises:
        ConfigurationError: The URL is not one of a WebSocket.
    """

    name: ClassVar[str] = "Bybit"
    symbol_pattern: ClassVar[re.Pattern[str]] = re.compile(r"[A-Z0-9-]{1,32}")

    def __init__(self, url: str = URL, *, limits: ExchangeLimits = LIMITS) -> None:
        super().__init__(url, limits)

    def request(
        self, op: Literal["subscribe", "unsubscribe"], symbols: Sequence[str], number: int
    ) -> str:
        """Write a `subscribe`, or `unsubscribe`, of the tickers of each symbol."""
        topics = [TOPIC + symbol for symbol in symbols]
        return _encode({"req_id": str(number), "op": op, "args": topics}).decode()

    def ping(self, number: int) -> str:
        """Write a ping, which is a message here."""
        return _encode({"req_id": str(number), "op": "ping"}).decode()

    def read(self, message: str) -> SymbolFrame | Reply | None:
        """Read a ticker, or the reply to a request."""
        decoded = _decode(message)
        if decoded.topic.startswith(TOPIC):
            return _frame(decoded)
        if decoded.topic:
            return None
        if not decoded.op:
            raise ValueError("neither a ticker nor an answer")
        request = int(decoded.req_id) if _OUR_ID.fullmatch(decoded.req_id) else None
        if decoded.success is not False:
            return Reply(request)
        why = decoded.ret_msg or "no reason given"
        return Reply(request, why, is_subscribed="already subscribed" in why)

    def new_symbol(self, symbol: str) -> SymbolState:
        """Make the state of a symbol of which nothing has been heard."""
        return _Symbol(symbol)


class _Change(NamedTuple):
    """What a frame says.

    Args:
        is_snapshot: Whether it says everything, or only what has changed.
        cs: Bybit's sequence number.
        ts: Bybit's time, in ms since the epoch.
        amounts: By the names of a `Ticker`; None for what there is none of.
    """

    is_snapshot: bool
    cs: int
    ts: int
    amounts: dict[str, Decimal | None]


_HUNDRED = Decimal(100)


@attrs.define
class _Symbol:
    """One symbol: its last snapshot and the deltas since."""

    symbol: str
    cs: int = -1
    ts: int = -1
    amounts: dict[str, Decimal | None] | None = None
    """None before the first snapshot."""

    def apply(self, change: _Change) -> bool:
        """Merge a frame, unless it is not newer or there is no snapshot to merge it into."""
        is_later = (change.cs, change.ts) > (self.cs, self.ts)
        if change.is_snapshot:
            # After a restart of the exchange `cs` may begin anew; time goes on.
            if not is_later and change.ts <= self.ts:
                return False
            self.amounts = change.amounts
        else:
            if self.amounts is None or not is_later:
                return False
            self.amounts |= change.amounts
        self.cs, self.ts = change.cs, change.ts
        return True

    def ticker(self) -> Ticker:
        """Return what is known now."""
        amounts = self.amounts or {}
        last, open_ = amounts.get("last"), amounts.get("open")
        change = None if last is None or open_ is None else DECIMALS.subtract(last, open_)
        return Ticker(self.symbol, **amounts, change=change, source_ts=self.ts)


class _Data(msgspec.Struct):
    """The fields of a ticker that matter here; an empty text stands for no value."""

    symbol: str
    last: str | None = msgspec.field(name="lastPrice", default=None)
    bid: str | None = msgspec.field(name="bid1Price", default=None)
    ask: str | None = msgspec.field(name="ask1Price", default=None)
    open: str | None = msgspec.field(name="prevPrice24h", default=None)
    high: str | None = msgspec.field(name="highPrice24h", default=None)
    low: str | None = msgspec.field(name="lowPrice24h", default=None)
    volume: str | None = msgspec.field(name="volume24h", default=None)
    change_share: str | None = msgspec.field(name="price24hPcnt", default=None)


class _Message(msgspec.Struct):
    topic: str = ""
    type: str = ""
    ts: int = 0
    cs: int = 0
    data: msgspec.Raw = msgspec.Raw(b"")
    op: str = ""
    success: bool | None = None
    ret_msg: str = ""
    req_id: str = ""


_AMOUNTS: Final = ("last", "bid", "ask", "open", "high", "low", "volume")

# The ids of our requests; what else a `req_id` says is not a reply to one.
_OUR_ID: Final = re.compile(r"[0-9]{1,15}")

_decode = msgspec.json.Decoder(_Message).decode
_decode_data = msgspec.json.Decoder(_Data).decode
_encode = msgspec.json.Encoder().encode


def _frame(message: _Message) -> SymbolFrame:
    data = _decode_data(message.data)
    if TOPIC + data.symbol != message.topic or message.type not in ("snapshot", "delta"):
        raise ValueError("a ticker of another symbol, or neither a snapshot nor a delta")
    amounts: dict[str, Decimal | None] = {}
    for name in _AMOUNTS:
        text = getattr(data, name)
        if text is not None:
            amounts[name] = number(text) if text else None
    if data.change_share is not None:
        share = data.change_share
        amounts["change_pct"] = DECIMALS.multiply(percentage(share), _HUNDRED) if share else None
    change = _Change(message.type == "snapshot", message.cs, message.ts, amounts)
    return SymbolFrame(data.symbol, change)
