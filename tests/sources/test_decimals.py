"""An application's decimal context, which is its whole thread's, changes no number of ours."""

from __future__ import annotations

import decimal
import threading
from collections.abc import Callable
from decimal import Context, Decimal

import msgspec
import pytest

from trading_push.models import Ticker
from trading_push.sources.exchanges.bybit import BybitFeed
from trading_push.sources.exchanges.simulated_market import SimulatedMarket
from trading_push.sources.exchanges.ticker_state import Event, TickerState
from trading_push.sources.paper.exchange import Trading
from trading_push.sources.paper.traders import Traders, demo_engine

CONTEXTS = {
    "four digits": Context(prec=4),
    "up": Context(rounding=decimal.ROUND_UP),
    "inexact": Context(traps=[decimal.Inexact, decimal.Rounded, decimal.FloatOperation]),
    "small exponents": Context(Emax=3, Emin=-3),
}


def simulated() -> object:
    market = SimulatedMarket(7)
    market.resume({"BTCUSDT": Decimal("68000.123456789")})
    for at in range(50):
        market.step(at)
    return [repr(ticker) for ticker in market.tickers(0)]


def merged() -> object:
    market = TickerState("BTCUSDT")
    for text in ("61500.1234", "61499.98765432", "3.00000001"):
        market.apply(Event(0, 0, "BTCUSDT", "trade", (Decimal(text), Decimal("12345.678901"))))
    prices = 4 * [Decimal("61234.5678")]
    market.apply(Event(0, 0, "BTCUSDT", "kline", (*prices, Decimal("0.1234567"))))
    return repr(market.ticker())


def bybit() -> object:
    data = {"symbol": "BTCUSDT", "lastPrice": "61500.1234", "prevPrice24h": "3.0000001"}
    data |= {"price24hPcnt": "0.012345678"}
    feed, merged = BybitFeed(), BybitFeed().new_symbol("BTCUSDT")
    frame = {"topic": "tickers.BTCUSDT", "type": "snapshot", "cs": 1, "ts": 1, "data": data}
    news = feed.read(msgspec.json.encode(frame).decode())
    assert news is not None
    merged.apply(news.event)
    return repr(merged.ticker())


def paper() -> object:
    class Books:
        def save(self, book: object, moved: list[Ticker], now: int) -> None:
            pass

    market, book = SimulatedMarket(7), demo_engine()
    trading = Trading(Books(), book, Traders(book, 1), {})
    trading.step(market.tickers(0), 0)
    for at in range(300):
        trading.step(market.step(at), at)
    return [repr(account) for account in book.accounts.values()]


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("run", [simulated, merged, bybit, paper], ids=lambda run: run.__name__)
def test_an_application_s_context_changes_no_number(run: Callable[[], object], context: Context):
    expected, found = run(), []

    def elsewhere() -> None:
        decimal.setcontext(context.copy())
        found.append(run())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [expected]
