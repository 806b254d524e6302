"""The channels `candles.SYMBOL`: bars of one second and of one minute, made of the tickers.

They are made for the symbols whose candles somebody watches, and for the first few of those that a
feed gives unasked, so that a page that has just been opened shows what was before.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Final

import attrs
import msgspec
import trio

from trading_push.broker.base import Broker
from trading_push.models import Candle, now_ms, plain_decimal
from trading_push.sources.base import HistoryFeed
from trading_push.topics import Topic, candles_topic, market_symbol, symbol_of, ticker_topic

__all__ = ["BARS", "Candles"]

BARS: Final = 600
"""How many bars of each length are kept of a symbol."""
_PERIOD_S: Final = 1.0
_LENGTHS_MS: Final = {"1s": 1000, "1m": 60_000}
_UNASKED: Final = 32
"""Of how many symbols at most bars are made while nobody watches them: each has some 300 KB."""


class _Ticker(msgspec.Struct):
    """What is read of a ticker that was published as JSON."""

    last: Decimal | None = None


@attrs.define
class _Bars:
    """The bars of one length of one symbol."""

    name: str
    length_ms: int
    keys: dict[str, None] = attrs.field(factory=dict)
    """Of the bars that are kept, the oldest first."""
    last: Candle | None = None

    def trade(self, at_ms: int, price: Decimal, volume: Decimal | None) -> None:
        """Have the present bar end at a price; begin one where its time has come."""
        begin = at_ms - at_ms % self.length_ms
        last = self.last
        if last is None or begin > last.at:
            self.last = Candle(begin, price, price, price, price, volume)
            return
        # A clock that was set back a little must not bring an older bar than the last.
        if volume is not None:
            volume += last.volume or 0
        self.last = Candle(
            last.at, last.open, max(last.high, price), min(last.low, price), price, volume
        )

    def key(self, at_ms: int) -> str:
        """The key of the bar that begins then: sorted, they are in the order of time."""
        return f"{self.name}{at_ms:015d}"


@attrs.define
class _Symbol:
    """The bars of one symbol, and what of them is still to be published."""

    topic: Topic
    bars: tuple[_Bars, ...] = attrs.field(
        factory=lambda: tuple(_Bars(name, length) for name, length in _LENGTHS_MS.items())
    )
    changed: dict[str, bytes] = attrs.field(factory=dict)
    """Rows, by key."""
    volume: Decimal | None = None
    """What the last ticker has said of the traded volume, where that only grows."""

    def put(self, bars: _Bars, candle: Candle) -> None:
        """Have a bar published."""
        key = bars.key(candle.at)
        bars.keys[key] = None
        self.changed[key] = _row(candle)

    def outdated(self) -> list[str]:
        """Take out the keys of the bars that are too many."""
        keys = []
        for bars in self.bars:
            while len(bars.keys) > BARS:
                key = next(iter(bars.keys))
                del bars.keys[key]
                self.changed.pop(key, None)
                keys.append(key)
        return keys


class Candles:
    """Makes bars of tickers, and publishes once a second those that have changed.

    Args:
        broker: Where to.
        history: Gives what was before, where the feed can.
        counts_volume: Whether a ticker's volume counts up from a fixed moment.
        gives_all: Whether tickers come unasked.
    """

    def __init__(
        self,
        broker: Broker,
        history: HistoryFeed | None,
        *,
        counts_volume: bool,
        gives_all: bool,
    ) -> None:
        self._broker = broker
        self._history = history
        self._counts_volume = counts_volume
        self._unasked = _UNASKED if gives_all else 0
        self._symbols: dict[str, _Symbol] = {}
        # Those whose candles somebody is subscribed to.
        self._watched: set[str] = set()
        # Those with something to publish.
        self._changed: dict[str, None] = {}
        self._wake = trio.Event()

    def trade(self, symbol: str, price: Decimal | None, volume: Decimal | None = None) -> None:
        """Take a symbol's last price, and the volume as its ticker has it; synchronous."""
        if price is None:
            return
        of_symbol = self._symbols.get(symbol)
        if of_symbol is None:
            if len(self._symbols) >= self._unasked and symbol not in self._watched:
                return
            of_symbol = self._begin(symbol)
        traded = None
        if self._counts_volume and volume is not None:
            before, of_symbol.volume = of_symbol.volume, volume
            traded = Decimal(0) if before is None or volume < before else volume - before
        at_ms = now_ms()
        for bars in of_symbol.bars:
            last = bars.last
            bars.trade(at_ms, price, traded)
            if last is not None and bars.last is not None and bars.last.at != last.at:
                of_symbol.put(bars, last)
        self._changed[symbol] = None

    def published(self, symbol: str, data: bytes) -> None:
        """Take a ticker that an application has published; one without a usable price is left."""
        try:
            ticker = msgspec.json.decode(data, type=_Ticker)
        except msgspec.MsgspecError:
            return
        if ticker.last is not None and ticker.last.is_finite():
            self.trade(symbol, ticker.last)

    def catch_up(self, symbol: str) -> None:
        """Publish now what a first subscriber would miss; nothing where one is there already."""
        if symbol in self._changed and symbol not in self._watched:
            self._flush(symbol)

    def begin(self, symbol: str) -> None:
        """Somebody is subscribed to a symbol's candles now; synchronous."""
        self._watched.add(symbol)
        self._wake.set()

    def end(self, symbol: str) -> None:
        """Nobody is subscribed to a symbol's candles any more; synchronous."""
        self._watched.discard(symbol)

    def forget(self, topic: Topic) -> None:
        """Drop bars that nobody has watched for long, or whose ticker is kept no more."""
        symbol = market_symbol(topic.channel)
        if symbol not in self._symbols:
            return
        if symbol_of(topic.channel) is None and len(self._symbols) <= self._unasked:
            return  # they would be begun anew at once
        del self._symbols[symbol]
        self._changed.pop(symbol, None)
        self._broker.forget(candles_topic(symbol))

    async def run(self) -> None:
        """Publish while someone is subscribed, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._watched:
                for symbol in list(self._watched):
                    if symbol in self._changed:
                        self._flush(symbol)
                    self._follow_status(symbol)
                    await trio.lowlevel.checkpoint()
                await trio.sleep(_PERIOD_S)

    def _begin(self, symbol: str) -> _Symbol:
        of_symbol = self._symbols[symbol] = _Symbol(candles_topic(symbol))
        if self._history is not None:
            history = self._history.candles(symbol, now_ms(), BARS)
            for bars in of_symbol.bars:
                for candle in history.get(bars.name, ()):
                    of_symbol.put(bars, candle)
                    bars.last = candle
        return of_symbol

    def _follow_status(self, symbol: str) -> None:
        """Have candles be as stale as their ticker; they are live again with the next bar."""
        status = self._broker.status(ticker_topic(symbol))
        if status.state != "live" and status.reason != "no_data":
            self._broker.mark([candles_topic(symbol)], status)

    def _flush(self, symbol: str) -> None:
        self._changed.pop(symbol, None)
        of_symbol = self._symbols[symbol]
        for bars in of_symbol.bars:
            if bars.last is not None:
                of_symbol.put(bars, bars.last)
        self._broker.drop_rows(of_symbol.topic, of_symbol.outdated())
        changed, of_symbol.changed = of_symbol.changed, {}
        self._broker.publish_rows(of_symbol.topic, changed, _render)


def _row(candle: Candle) -> bytes:
    volume = b"null" if candle.volume is None else b'"%s"' % plain_decimal(candle.volume).encode()
    prices = (candle.open, candle.high, candle.low, candle.close)
    texts = b",".join(b'"%s"' % plain_decimal(price).encode() for price in prices)
    return b"[%d,%s,%s]" % (candle.at, texts, volume)


def _render(rows: Sequence[tuple[str, bytes]]) -> bytes:
    parts = (
        b'"%s":[%s]' % (name.encode(), b",".join(row for key, row in rows if key.startswith(name)))
        for name in _LENGTHS_MS
    )
    return b"{%s}" % b",".join(parts)
