"""OKX as a feed: the channel `tickers` of its public streams.

From "WebSocket" (Overview), "Tickers channel" and "Get instruments" of OKX's API v5 documentation:

1. A request to subscribe has an id and names channels with their instruments; all that it names has
   at most 64 KB. Each channel is answered by itself, and an error says which it is about.
2. At most 480 requests an hour on a connection, and 3 connections a second from an address.
3. Where nothing has come for 30 seconds the connection is cut: send the text `ping`, which is
   answered by the text `pong`.
4. A notice says that the connection will be closed for an upgrade of the service.
5. A ticker is whole in each frame; an empty text stands for no value. `vol24h` is in the base
   currency for spot, and in contracts for derivatives.
6. The REST service lists the instruments of each type.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from decimal import Decimal
from typing import ClassVar, Final, Literal

import attrs
import msgspec

from trading_push.errors import SourceError
from trading_push.models import Ticker
from trading_push.sources.exchanges.amounts import DECIMALS, known_price, number
from trading_push.sources.exchanges.dialect import (
    ExchangeLimits,
    GoingDown,
    Read,
    Reply,
    SymbolFrame,
    SymbolState,
)
from trading_push.sources.exchanges.rest import RestService
from trading_push.sources.exchanges.stream import ExchangeFeed

__all__ = ["OkxFeed"]

URL: Final = "wss://ws.okx.com:8443/ws/v5/public"
REST_URL: Final = "https://www.okx.com"
CHANNEL: Final = "tickers"
TYPES: Final = ("SPOT", "SWAP", "FUTURES")
LIMITS: Final = ExchangeLimits(
    symbols_per_connection=400,
    symbols_per_request=100,
    requests_per_hour=480,
)
"""A hundred of the longest instruments have less than 10 KB."""

_HUNDRED = Decimal(100)
_PERCENT = Decimal("0.0001")


class OkxFeed(ExchangeFeed):
    """OKX's spot, swap and futures markets; a `WatchedFeed`. A symbol is OKX's own, as `BTC-USDT`.

    Args:
        url: The public streams of the exchange, of its demo service, or of a loopback.
        limits: The limits that are kept.
        rest_url: Where the symbols are listed. None is the exchange's own; for another `url`, it is
            no list.

    Raises:
        ConfigurationError: The URL is not one of a WebSocket.
    """

    name: ClassVar[str] = "OKX"
    symbol_pattern: ClassVar[re.Pattern[str]] = re.compile(r"(?:(?![a-z])[\w.-]){1,64}")

    def __init__(
        self, url: str = URL, *, limits: ExchangeLimits = LIMITS, rest_url: str | None = None
    ) -> None:
        super().__init__(url, limits, REST_URL if rest_url is None and url == URL else rest_url)

    def request(
        self, op: Literal["subscribe", "unsubscribe"], symbols: Sequence[str], number: int
    ) -> str:
        """Write a `subscribe`, or `unsubscribe`, of the tickers of each symbol."""
        args = [{"channel": CHANNEL, "instId": symbol} for symbol in symbols]
        return _encode({"id": str(number), "op": op, "args": args}).decode()

    def ping(self, number: int) -> str:
        """Write a ping, which is a text here."""
        return "ping"

    def read(self, message: str) -> Read:
        """Read tickers, the reply to one channel of a request, or a notice."""
        if message == "pong":
            return Reply(None)
        decoded = _decode(message)
        match decoded.event:
            case "subscribe" | "unsubscribe":
                return Reply(_number(decoded.id), symbol=decoded.arg.instId or None)
            case "error":
                return _refusal(decoded)
            case "notice":
                return GoingDown(decoded.msg or "the exchange gives notice")
            case "" if decoded.data is not None:
                if decoded.arg.channel != CHANNEL:
                    return None
                return [_frame(each) for each in decoded.data]
            case "":
                raise ValueError("neither a ticker nor an answer")
        return None

    async def load_symbols(self, service: RestService) -> Set[str]:
        """Read `instruments` of each type."""
        found: set[str] = set()
        for kind in TYPES:
            path = f"/api/v5/public/instruments?instType={kind}"
            listed = await service.get(path, _decode_list)
            if listed.code != "0":
                raise SourceError(f"it refused to list its symbols: {listed.msg}")
            found.update(each.instId for each in listed.data)
        return found

    def new_symbol(self, symbol: str) -> SymbolState:
        """Make the state of a symbol of which nothing has been heard."""
        return _Symbol(Ticker(symbol))


@attrs.define
class _Symbol:
    """One symbol: its last ticker."""

    last: Ticker

    def apply(self, ticker: Ticker) -> bool:
        """Take a ticker, unless it is older; two of one millisecond are in their order."""
        if self.last.source_ts is not None and (
            ticker.source_ts is None
            or ticker.source_ts < self.last.source_ts
            or ticker == self.last
        ):
            return False
        self.last = ticker
        return True

    def ticker(self) -> Ticker:
        """Return what is known now."""
        return self.last


class _Arg(msgspec.Struct):
    channel: str = ""
    instId: str = ""


class _Ticker(msgspec.Struct):
    instId: str
    ts: str
    last: str = ""
    bid: str = msgspec.field(name="bidPx", default="")
    ask: str = msgspec.field(name="askPx", default="")
    open: str = msgspec.field(name="open24h", default="")
    high: str = msgspec.field(name="high24h", default="")
    low: str = msgspec.field(name="low24h", default="")
    volume: str = msgspec.field(name="vol24h", default="")


class _Message(msgspec.Struct):
    event: str = ""
    arg: _Arg = msgspec.field(default_factory=_Arg)
    data: list[_Ticker] | None = None
    id: str = ""
    msg: str = ""


class _Listed(msgspec.Struct):
    instId: str


class _List(msgspec.Struct):
    code: str
    data: list[_Listed] = []
    msg: str = ""


_decode = msgspec.json.Decoder(_Message).decode
_decode_list = msgspec.json.Decoder(_List).decode
_encode = msgspec.json.Encoder().encode

# The ids of our requests.
_OUR_ID: Final = re.compile(r"[0-9]{1,15}")
_NAMED: Final = re.compile(r"instId:\s*([^,\s}]+)")


def _number(text: str) -> int | None:
    return int(text) if _OUR_ID.fullmatch(text) else None


def _refusal(message: _Message) -> Reply:
    """Read an error, which names in its words which channel does not exist."""
    named = _NAMED.search(message.msg)
    symbol = message.arg.instId or (named[1] if named else None)
    return Reply(_number(message.id), message.msg or "no reason given", symbol)


def _frame(data: _Ticker) -> SymbolFrame:
    last, bid, ask, open_, high, low = (
        known_price(text) if text else None
        for text in (data.last, data.bid, data.ask, data.open, data.high, data.low)
    )
    change = pct = None
    if last is not None and open_ is not None:
        change = DECIMALS.subtract(last, open_)
        share = DECIMALS.divide(DECIMALS.multiply(change, _HUNDRED), open_)
        pct = DECIMALS.quantize(share, _PERCENT)
    if not (data.ts.isascii() and data.ts.isdecimal() and len(data.ts) <= 15):
        raise ValueError("a time is not one in ms")
    ticker = Ticker(
        symbol=data.instId,
        last=last,
        bid=bid,
        ask=ask,
        open=open_,
        high=high,
        low=low,
        volume=number(data.volume) if data.volume else None,
        change=change,
        change_pct=pct,
        source_ts=int(data.ts),
    )
    return SymbolFrame(data.instId, ticker)
