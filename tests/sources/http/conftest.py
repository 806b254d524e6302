"""What the HTTP source's tests share: a service that keeps the rules, on Hypercorn."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from harness.sources import Service
from harness.support import hypercorn_serving


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    made = Service()
    async with hypercorn_serving(made) as made.port:
        yield made
