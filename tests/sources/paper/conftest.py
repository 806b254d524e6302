"""What the tests of the paper exchange share."""

from __future__ import annotations

import pytest

from trading_push.sources.exchanges import simulated_market
from trading_push.sources.paper import exchange


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything on the paper exchange happens at a hundred times the speed."""
    monkeypatch.setattr(exchange, "STEP_S", 0.005)
    monkeypatch.setattr(simulated_market, "STEP_S", 0.005)
