"""Check the market: a tape can be read, an exchange has symbols and gives a ticker."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import trio

from trading_push.check.findings import Finding, words
from trading_push.factory import exchange_of, open_market
from trading_push.settings.schema import Settings
from trading_push.sources.base import WatchedFeed
from trading_push.sources.exchanges.tape import Tape

__all__ = ["market"]

_PREFERRED: Final = ("BTCUSDT", "BTC-USDT", "BTC/USDT")
_LOOK_S: Final = 0.05


async def market(settings: Settings, timeout_s: float) -> list[Finding]:
    """Open the market that is set; an exchange is asked for its list, and for one ticker."""
    async with AsyncExitStack() as opened:
        with trio.fail_after(timeout_s):
            feed = await open_market(settings, exchange_of(settings), opened)
        if isinstance(feed, WatchedFeed):
            return await _exchange(feed, settings, timeout_s)
        if isinstance(feed, Tape):
            return [Finding("ok", "market", f"the tape {settings.market.tape}")]
        return [Finding("ok", "market", "simulated")]


class _Sink:
    """Waits for a ticker of one symbol."""

    def __init__(self) -> None:
        self.symbol = ""
        self.found = trio.Event()
        self.text: str | None = None
        """What has come; None where the exchange does not have the symbol."""

    def update(self, tickers: Sequence[Any]) -> None:
        for each in tickers:
            if each.symbol == self.symbol:
                self.text = f"{each.symbol} is at {each.last}"
                self.found.set()

    def stale(self, reason: str, symbols: Any = None) -> None:
        if reason == "refused" and symbols is not None and self.symbol in symbols:
            self.found.set()


async def _exchange(feed: WatchedFeed, settings: Settings, timeout_s: float) -> list[Finding]:
    """Read the list of symbols, and a ticker of one of them."""
    name = settings.market.feed
    sink, errors = _Sink(), list[Exception]()

    async def run() -> None:
        try:
            await feed.run(sink)
        except Exception as error:
            errors.append(error)
        sink.found.set()

    def listed() -> Sequence[str] | None:
        symbols = getattr(feed, "symbols", lambda: None)()
        return None if symbols is None else sorted(symbols)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        # An exchange with another URL and no market.rest_url has no list to wait for.
        expects_list = settings.market.url is None or settings.market.rest_url is not None
        with trio.move_on_after(timeout_s if expects_list else 0):
            while listed() is None and not errors:  # noqa: ASYNC110 - a feed does not tell of it
                await trio.sleep(_LOOK_S)
        symbols = listed()
        known = [each for each in _PREFERRED if symbols is None or each in symbols]
        sink.symbol = next((each for each in known or symbols or () if feed.knows(each)), "")
        feed.watch(sink.symbol)
        with trio.move_on_after(timeout_s) as waiting:
            await sink.found.wait()
        nursery.cancel_scope.cancel()

    found: list[Finding] = []
    if errors:
        found.append(Finding("failed", "market", f"{name}: {words(errors[0])}"))
    elif sink.text is not None:
        count = "" if symbols is None else f"{len(symbols)} symbols, "
        found.append(Finding("ok", "market", f"{name}: {count}{sink.text}"))
    elif waiting.cancelled_caught:
        text = f"{name} has given no ticker of {sink.symbol} within {timeout_s:g} s"
        found.append(Finding("failed", "market", text))
    else:
        found.append(Finding("failed", "market", f"{name} does not have {sink.symbol}"))
    if expects_list and symbols is None and not errors:
        text = "the exchange's list of symbols cannot be read: see market.rest_url"
        found.append(Finding("warning", "symbols", text))
    return found
