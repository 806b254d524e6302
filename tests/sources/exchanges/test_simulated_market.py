"""The simulated market: the same for the same seed, and a sensible one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from decimal import Decimal

import pytest
import trio
from trio.testing import MockClock

from trading_push.models import Ticker
from trading_push.sources.exchanges.simulated_market import STEP_S, SimulatedMarket


class Recorder:
    """A sink that keeps what it is given, with the time."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, list[Ticker]]] = []

    def update(self, tickers: Sequence[Ticker]) -> None:
        self.calls.append((trio.current_time(), list(tickers)))

    def stale(self, reason: str, symbols: object = None) -> None:
        raise AssertionError("a simulated market never ends")


def walk(seed: int, steps: int = 2000) -> list[Ticker]:
    market = SimulatedMarket(seed)
    return [ticker for step in range(steps) for ticker in market.step(step)]


def test_the_seed_decides() -> None:
    assert walk(3, 200) == walk(3, 200)
    assert walk(3, 200) != walk(4, 200)


def test_every_ticker_makes_sense() -> None:
    tickers = walk(1)
    assert {ticker.symbol for ticker in tickers} == {
        "BTCUSDT",
        "ETHUSDT",
        "SOLUSDT",
        "BNBUSDT",
        "XRPUSDT",
    }
    for t in tickers:
        assert t.last is not None
        assert t.bid is not None
        assert t.ask is not None
        assert t.open is not None
        assert t.high is not None
        assert t.low is not None
        assert t.volume is not None
        assert 0 < t.bid < t.ask
        assert (t.ask - t.bid) / t.bid < Decimal("0.006")
        assert t.low <= t.last <= t.high
        assert t.last in (t.bid, t.ask)
        assert t.change == t.last - t.open
        assert t.change_pct == (t.change * 100 / t.open).quantize(Decimal("0.0001"))
        assert t.volume > 0


def test_a_symbol_moves_but_not_far() -> None:
    prices = [t.last for t in walk(5, 20_000) if t.symbol == "BTCUSDT" and t.last is not None]
    assert len(set(prices)) > 1000
    assert Decimal(64_000) < min(prices) < max(prices) < Decimal(72_000)
    moves = [abs(b - a) / a for a, b in itertools.pairwise(prices)]
    assert max(moves) < Decimal("0.005")


def test_it_goes_on_from_given_prices() -> None:
    market = SimulatedMarket(1)
    for step in range(50):
        market.step(step)
    market.resume({"BTCUSDT": Decimal("112731.29"), "NOSUCH": Decimal(1), "XRPUSDT": Decimal(0)})
    tickers = {ticker.symbol: ticker for ticker in market.tickers(7)}
    btc = tickers["BTCUSDT"]
    assert (btc.last, btc.open, btc.volume) == (Decimal("112731.29"), btc.last, 0)
    assert btc.source_ts == 7
    xrp = tickers["XRPUSDT"].last
    assert xrp is not None
    assert xrp > 0
    moved = [t for step in range(50) for t in market.step(step) if t.symbol == "BTCUSDT"]
    assert all(t.last is not None and abs(t.last - 112_731) < 2000 for t in moved)


def test_it_knows_its_symbols() -> None:
    market = SimulatedMarket()
    assert market.knows("BTCUSDT")
    assert not market.knows("NOSUCH")


async def test_it_runs_several_times_a_second(autojump_clock: MockClock) -> None:
    sink = Recorder()
    with trio.move_on_after(60):
        await SimulatedMarket(1).run(sink)
    first, *rest = sink.calls
    assert len(first[1]) == 5  # All of them at once: a subscriber need not wait for a move.
    assert len(rest) == pytest.approx(60 / STEP_S, abs=3)
    moves = sum(ticker.symbol == "ETHUSDT" for _, tickers in rest for ticker in tickers)
    assert 60 * 2 < moves < 60 * 5
    expected = SimulatedMarket(1)
    for _, tickers in rest:
        moved = expected.step(0)
        assert [(t.symbol, t.last) for t in tickers] == [(t.symbol, t.last) for t in moved]
