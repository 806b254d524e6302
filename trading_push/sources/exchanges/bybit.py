"""Bybit as a feed: the tickers of its v5 public streams, snapshots and deltas merged.

From "Connect" (v5/ws/connect), "Ticker" and "Orderbook" (v5/websocket/public/…) and "Get
Instruments Info" (v5/market/instrument) of Bybit's API documentation:

1. A category has its own address: /v5/public/spot, /linear, /inverse.
2. A request to subscribe to spot topics names at most 10; the topics of one connection have at most
   21,000 characters; at most 500 connections are made in 5 minutes.
3. A client should ping every 20 seconds, with a message.
4. A spot ticker is always a snapshot, and has neither bid nor ask: `orderbook.1` has them. The
   other categories send a snapshot first and deltas after it: what a delta leaves out has not
   changed.
5. A delta of an order book has the levels that are new or changed; one of size 0 is gone. `u` goes
   up, and is 1 in a snapshot after a restart of the exchange.
6. The REST service lists the instruments of a category by pages, each with the next one's cursor.

One topic that does not exist makes a whole request fail. `cs` and `ts` say which of two frames is
the later.
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence, Set
from decimal import Decimal
from typing import ClassVar, Final, Literal, NamedTuple

import attrs
import msgspec

from trading_push.errors import SourceError
from trading_push.models import Ticker
from trading_push.sources.exchanges.amounts import (
    DECIMALS,
    known_price,
    number,
    percentage,
    price,
)
from trading_push.sources.exchanges.dialect import (
    ExchangeLimits,
    Read,
    Reply,
    SymbolFrame,
    SymbolState,
)
from trading_push.sources.exchanges.rest import RestService
from trading_push.sources.exchanges.stream import ExchangeFeed

__all__ = ["BybitFeed"]

URL: Final = "wss://stream.bybit.com/v5/public/spot"
REST_URL: Final = "https://api.bybit.com"
TICKERS: Final = "tickers."
BOOK: Final = "orderbook.1."
LIMITS: Final = ExchangeLimits(symbols_per_connection=400, symbols_per_request=10)
"""Of the longest symbols there are, 400 have 17,200 characters with their quotes."""
PAGES: Final = 100
"""How many pages a list may have."""


class BybitFeed(ExchangeFeed):
    """One category of Bybit, by its address; a `WatchedFeed`.

    Args:
        url: A public stream of the exchange, of its test network, or of a loopback.
        limits: The limits that are kept, by symbols that have one topic.
        rest_url: Where the symbols are listed. None is the exchange's own; for another `url`, it is
            no list.

    Raises:
        ConfigurationError: The URL is not one of a WebSocket.
    """

    name: ClassVar[str] = "Bybit"
    symbol_pattern: ClassVar[re.Pattern[str]] = re.compile(r"[A-Z0-9-]{1,32}")

    def __init__(
        self, url: str = URL, *, limits: ExchangeLimits = LIMITS, rest_url: str | None = None
    ) -> None:
        super().__init__(url, limits, REST_URL if rest_url is None and url == URL else rest_url)
        path = urllib.parse.urlsplit(self.address.resource).path
        self._category = path.rstrip("/").rpartition("/")[2]
        # What each symbol is subscribed by.
        self._topics: Sequence[str] = (TICKERS,)
        if self._category == "spot":
            self._topics = (TICKERS, BOOK)
            # Of the longest symbols, 228 have 20,976 characters in both topics.
            self.limits = attrs.evolve(
                limits,
                symbols_per_connection=max(1, limits.symbols_per_connection * 4 // 7),
                symbols_per_request=max(1, limits.symbols_per_request // 2),
            )

    def request(
        self, op: Literal["subscribe", "unsubscribe"], symbols: Sequence[str], number: int
    ) -> str:
        """Write a `subscribe`, or `unsubscribe`, of the topics of each symbol."""
        topics = [topic + symbol for symbol in symbols for topic in self._topics]
        return _encode({"req_id": str(number), "op": op, "args": topics}).decode()

    def ping(self, number: int) -> str:
        """Write a ping, which is a message here."""
        return _encode({"req_id": str(number), "op": "ping"}).decode()

    def read(self, message: str) -> Read:
        """Read a ticker, the best of an order book, or the reply to a request."""
        decoded = _decode(message)
        if decoded.topic.startswith(TICKERS):
            return _frame(decoded)
        if decoded.topic.startswith(BOOK) and BOOK in self._topics:
            return _book_frame(decoded)
        if decoded.topic:
            return None
        if not decoded.op:
            raise ValueError("neither a ticker nor an answer")
        request = int(decoded.req_id) if _OUR_ID.fullmatch(decoded.req_id) else None
        if decoded.success is not False:
            return Reply(request)
        why = decoded.ret_msg or "no reason given"
        return Reply(request, why, is_subscribed="already subscribed" in why)

    async def load_symbols(self, service: RestService) -> Set[str]:
        """Read all pages of `instruments-info`."""
        found: set[str] = set()
        cursor = ""
        for _ in range(PAGES):
            query = {"category": self._category, "limit": "1000", "cursor": cursor}
            words = urllib.parse.urlencode({key: value for key, value in query.items() if value})
            page = await service.get(f"/v5/market/instruments-info?{words}", _decode_list)
            if page.retCode:
                raise SourceError(f"it refused to list its symbols: {page.retMsg}")
            found.update(each.symbol for each in page.result.symbols)
            cursor = page.result.nextPageCursor
            if not cursor:
                return found
        raise SourceError(f"its list of symbols has more than {PAGES} pages")

    def new_symbol(self, symbol: str) -> SymbolState:
        """Make the state of a symbol of which nothing has been heard."""
        return _Symbol(symbol)


class _Quotes(NamedTuple):
    """What a frame says of the best of an order book.

    Args:
        is_snapshot: Whether it says everything, or only what has changed.
        update_id: The number that orders the frames of one book.
        ts: Bybit's time, in ms since the epoch.
        bids: Sizes by price; none of a price that is gone.
        asks: Likewise.
    """

    is_snapshot: bool
    update_id: int
    ts: int
    bids: dict[Decimal, Decimal]
    asks: dict[Decimal, Decimal]


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
    """One symbol: its last snapshot and the deltas since; likewise its order book, on spot."""

    symbol: str
    cs: int = -1
    ts: int = -1
    amounts: dict[str, Decimal | None] | None = None
    """None before the first snapshot."""
    book: _Quotes | None = None
    """None before the first snapshot."""

    def apply(self, change: _Change | _Quotes) -> bool:
        """Merge a frame, unless it is not newer or there is no snapshot to merge it into."""
        if isinstance(change, _Quotes):
            return self._apply_quotes(change)
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

    def _apply_quotes(self, quotes: _Quotes) -> bool:
        book = self.book
        if quotes.is_snapshot:
            # One that was sent again, or is older: the time decides, for `u` may begin anew.
            if book is not None and quotes.ts < book.ts:
                return False
            self.book = quotes
            return True
        if book is None or quotes.update_id <= book.update_id:
            return False
        self.book = quotes._replace(
            bids=_merged(book.bids, quotes.bids), asks=_merged(book.asks, quotes.asks)
        )
        return True

    def ticker(self) -> Ticker:
        """Return what is known now."""
        amounts = dict(self.amounts or {})
        ts = self.ts
        if self.book is not None:
            amounts["bid"] = max(self.book.bids, default=None)
            amounts["ask"] = min(self.book.asks, default=None)
            ts = max(ts, self.book.ts)
        last, open_ = amounts.get("last"), amounts.get("open")
        change = None if last is None or open_ is None else DECIMALS.subtract(last, open_)
        return Ticker(self.symbol, **amounts, change=change, source_ts=ts)


def _merged(
    levels: dict[Decimal, Decimal], changes: dict[Decimal, Decimal]
) -> dict[Decimal, Decimal]:
    return {price_: size for price_, size in (levels | changes).items() if size}


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


class _Book(msgspec.Struct):
    """An order book: prices and sizes of the levels of each side."""

    s: str
    u: int
    b: list[tuple[str, str]] = []
    a: list[tuple[str, str]] = []


class _Listed(msgspec.Struct):
    symbol: str


class _Page(msgspec.Struct):
    symbols: list[_Listed] = msgspec.field(name="list")
    nextPageCursor: str = ""


class _List(msgspec.Struct):
    result: _Page
    retCode: int = 0
    retMsg: str = ""


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


_PRICES: Final = ("last", "bid", "ask", "open", "high", "low")

# The ids of our requests; what else a `req_id` says is not a reply to one.
_OUR_ID: Final = re.compile(r"[0-9]{1,15}")

_decode = msgspec.json.Decoder(_Message).decode
_decode_book = msgspec.json.Decoder(_Book).decode
_decode_list = msgspec.json.Decoder(_List).decode
_decode_data = msgspec.json.Decoder(_Data).decode
_encode = msgspec.json.Encoder().encode


def _frame(message: _Message) -> SymbolFrame:
    data = _decode_data(message.data)
    _check(message, TICKERS + data.symbol)
    amounts: dict[str, Decimal | None] = {}
    for name in _PRICES:
        text = getattr(data, name)
        if text is not None:
            amounts[name] = known_price(text) if text else None
    if data.volume is not None:
        amounts["volume"] = number(data.volume) if data.volume else None
    if data.change_share is not None:
        share = data.change_share
        amounts["change_pct"] = DECIMALS.multiply(percentage(share), _HUNDRED) if share else None
    change = _Change(message.type == "snapshot", message.cs, message.ts, amounts)
    return SymbolFrame(data.symbol, change)


def _book_frame(message: _Message) -> SymbolFrame:
    book = _decode_book(message.data)
    _check(message, BOOK + book.s)
    is_snapshot = message.type == "snapshot"
    bids, asks = (
        {price(each): number(size) for each, size in levels} for levels in (book.b, book.a)
    )
    if is_snapshot:
        bids, asks = _merged({}, bids), _merged({}, asks)
    return SymbolFrame(book.s, _Quotes(is_snapshot, book.u, message.ts, bids, asks))


def _check(message: _Message, topic: str) -> None:
    if message.topic != topic or message.type not in ("snapshot", "delta"):
        raise ValueError("a frame of another symbol, or neither a snapshot nor a delta")
