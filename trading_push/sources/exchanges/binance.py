"""Binance as a feed: the combined streams 24hrTicker, bookTicker and trade of each symbol.

From "WebSocket Streams for Binance" (web-socket-streams.md of Binance's spot API documentation):

1. Combined streams at /stream wrap an event as `{"stream":…,"data":…}`; names are in lower case.
2. `SUBSCRIBE` and `UNSUBSCRIBE` name streams and have an id, which the answer echoes.
3. At most 5 messages a second come in (pings and pongs among them) and 1,024 streams go out on a
   connection; at most 300 connections are tried in 5 minutes from an address.
4. A connection is cut at 24 hours, or some minutes after the event `serverShutdown`. The server
   pings every 20 seconds and wants a pong within a minute.
5. The REST service lists the symbols at /api/v3/exchangeInfo.

A stream that does not exist is acknowledged like any other, and stays silent. Numbers in the frames
say which of two is the later: the update id of a bookTicker, the id of a trade, and the event time
and last trade id of a 24hrTicker. The window of 24 hours is unknown before the first 24hrTicker.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from decimal import Decimal
from typing import Any, ClassVar, Final, Literal, NamedTuple

import msgspec

from trading_push.errors import ConfigurationError
from trading_push.models import Ticker
from trading_push.sources.exchanges.amounts import epoch_ns
from trading_push.sources.exchanges.binance_frames import Payload, is_other_event, values_of
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
from trading_push.sources.exchanges.ticker_state import Event, TickerState

__all__ = ["BinanceFeed"]

URL: Final = "wss://stream.binance.com:9443/stream"
REST_URL: Final = "https://api.binance.com"
STREAMS: Final = ("ticker", "bookTicker", "trade")
STREAMS_PER_CONNECTION: Final = 1024
LIMITS: Final = ExchangeLimits(
    symbols_per_connection=STREAMS_PER_CONNECTION // len(STREAMS),
    symbols_per_request=50,
)
"""At three messages a second (`spacing_s`) there is room for pongs among the five."""

_RAW_STREAMS: Final = re.compile(r"/ws(?:/|\?|$)")
_LOWER: Final = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


class BinanceFeed(ExchangeFeed):
    """Binance's spot market; a `WatchedFeed`.

    Args:
        url: The combined streams of the exchange, of its test network, or of a loopback.
        limits: The limits that are kept.
        rest_url: Where the symbols are listed. None is the exchange's own; for another `url`, it is
            no list.

    Raises:
        ConfigurationError: The URL is not one of a WebSocket, or is one of the raw streams.
    """

    name: ClassVar[str] = "Binance"
    symbol_pattern: ClassVar[re.Pattern[str]] = re.compile(r"(?:(?![a-z])[\w.-]){1,32}")

    def __init__(
        self, url: str = URL, *, limits: ExchangeLimits = LIMITS, rest_url: str | None = None
    ) -> None:
        super().__init__(url, limits, REST_URL if rest_url is None and url == URL else rest_url)
        if _RAW_STREAMS.search(self.address.resource):
            raise ConfigurationError(
                "market.url leads to Binance's raw streams, which have no tickers that can be told "
                "apart: end it with /stream in place of /ws"
            )

    def request(
        self, op: Literal["subscribe", "unsubscribe"], symbols: Sequence[str], number: int
    ) -> str:
        """Write a `SUBSCRIBE`, or `UNSUBSCRIBE`, of the three streams of each symbol."""
        params = [f"{symbol.translate(_LOWER)}@{name}" for symbol in symbols for name in STREAMS]
        return _encode({"method": op.upper(), "params": params, "id": number}).decode()

    def ping(self, number: int) -> None:
        """Ask for a ping frame."""
        return

    def read(self, message: str) -> Read:
        """Read an event of the three streams, a list of events, or the reply to a request."""
        try:
            decoded = _decode(message)
        except msgspec.ValidationError:
            if is_other_event(message):
                return None
            raise
        payload = decoded.data or decoded.event
        if isinstance(payload, list):  # of a stream of all symbols, such as !ticker@arr
            return [frame for each in payload if (frame := _frame(each, "")) is not None]
        if "serverShutdown" in (decoded.e, payload and payload.event):
            return GoingDown("the exchange says that it will end the connection")
        return _reply(decoded) if payload is None else _frame(payload, decoded.stream)

    async def load_symbols(self, service: RestService) -> Set[str]:
        """Read `exchangeInfo`."""
        listed = await service.get("/api/v3/exchangeInfo", _decode_list)
        return {each.symbol for each in listed.symbols}

    def new_symbol(self, symbol: str) -> SymbolState:
        """Make the state of a symbol of which nothing has been heard."""
        return _Symbol(symbol)


def _frame(payload: _Payload, stream: str) -> SymbolFrame | None:
    found = values_of(payload, stream)
    if found is None or payload.event == "aggTrade":
        return None
    time = payload.event_time or payload.trade_time
    time_ms = epoch_ns(time) // 1_000_000 if time else 0
    event = Event(0, time_ms, payload.symbol, *found)
    numbers = (payload.update_id, payload.trade_id, payload.last_trade_id)
    return SymbolFrame(payload.symbol, _Numbered(event, *numbers))


class _Numbered(NamedTuple):
    """An event with the numbers that order it; 0, or None, where it has none of a kind."""

    event: Event
    update_id: int
    trade_id: int
    last_trade_id: int | None


class _Symbol:
    """One symbol: its three streams merged as a tape's frames are, each in its own order."""

    def __init__(self, symbol: str) -> None:
        self._state = TickerState(symbol, has_own_window=False)
        # The numbers of what was merged last: of a bookTicker, a trade and a 24hrTicker.
        self._update_id = -1
        self._trade_id = -1
        self._window_ms = -1
        # The price of the trade `_trade_id`.
        self._trade_price: Decimal | None = None

    def apply(self, numbered: _Numbered) -> bool:
        """Merge an event, unless the same stream has brought a later one."""
        event = numbered.event
        if event.kind == "quote":
            if numbered.update_id <= self._update_id:
                return False
            self._update_id = numbered.update_id
            self._state.apply(event)
        elif event.kind == "trade":
            if numbered.trade_id <= self._trade_id:
                return False
            self._trade_id, self._trade_price = numbered.trade_id, event.values[0]
            self._state.apply(event)
        else:
            if event.source_ms <= self._window_ms:
                return False
            self._window_ms = event.source_ms
            self._apply_window(event, numbered.last_trade_id)
        return True

    def _apply_window(self, event: Event, last_trade_id: int | None) -> None:
        if self._update_id >= 0:
            # The quote of a 24hrTicker has no update id: it may be older than the last bookTicker.
            event = event._replace(values=(*event.values[:6], None, None))
        self._state.apply(event)
        is_latest = last_trade_id is None or last_trade_id >= self._trade_id
        if is_latest or self._trade_price is None:
            self._trade_id, self._trade_price = last_trade_id or self._trade_id, event.values[0]
        else:
            # A trade has come that this window does not know yet: it is the last one.
            later = (self._trade_price, Decimal(0))
            self._state.apply(Event(0, 0, event.symbol, "trade", later))

    def ticker(self) -> Ticker:
        """Return what is known now."""
        return self._state.ticker()


class _Payload(Payload):
    update_id: int = msgspec.field(name="u", default=0)
    trade_id: int = msgspec.field(name="t", default=0)
    last_trade_id: int | None = msgspec.field(name="L", default=None)


class _Error(msgspec.Struct):
    msg: str = ""


class _Message(msgspec.Struct):
    """An event in its wrapping, or a reply; errors come in two forms.

    What the server says of the connection itself has another wrapping (`event`), or none (`e`).
    """

    stream: str = ""
    data: _Payload | list[_Payload] | None = None
    event: _Payload | None = None
    e: str = ""
    id: int | str | None = None
    result: Any = msgspec.UNSET
    error: _Error | None = None
    code: int | None = None
    msg: str = ""


class _Listed(msgspec.Struct):
    symbol: str


class _List(msgspec.Struct):
    symbols: list[_Listed]


def _reply(message: _Message) -> Reply:
    number = message.id if isinstance(message.id, int) else None
    if message.error is not None or message.code is not None:
        error = message.error.msg if message.error else message.msg
        return Reply(number, error or "no reason given")
    if message.result is msgspec.UNSET:
        raise ValueError("neither an event nor an answer")
    return Reply(number)


_decode = msgspec.json.Decoder(_Message).decode
_decode_list = msgspec.json.Decoder(_List).decode
_encode = msgspec.json.Encoder().encode
