"""The pauses that an HTTP service asks for: one user's, or everyone's."""

from __future__ import annotations

import email.utils
import time
from contextlib import aclosing
from typing import Any

import pytest
import trio
import trio.testing

from harness.http_service import HTTP_CLIENT, failure, reading
from harness.sources import Service

from trading_push import SourceError
from trading_push.sources.http.pauses import REFUSALS
from trading_push.sources.http.source import HttpBatchSource


@pytest.mark.parametrize(
    ("status", "after", "pause_s"),
    [
        (429, "7", 7),
        (503, "7", 7),
        (429, "100000", 300),
        (429, "9" * 5_000, 300),
        (429, lambda: email.utils.formatdate(time.time() + 100_000, usegmt=True), 300),
        (503, lambda: email.utils.formatdate(time.time() - 60, usegmt=True), 0),
        (429, "-5", 0),
        (429, "soon", 0),
        (429, "1.5", 0),
        (429, "", 0),
        (429, "Mon, 99 Foo 2026 00:00:00 GMT", 0),
        (500, "7", 0),
    ],
)
async def test_one_users_pause_is_that_users_alone(
    service: Service, mock_clock: trio.testing.MockClock, status: int, after: Any, pause_s: float
) -> None:
    service.turns = [(status, b"", {"retry-after": after() if callable(after) else after})]
    async with reading(service.url()) as source:
        error = await failure(source)
        assert (error.retryable, error.pause_s, error.everyone) == (True, pause_s, False)
        assert await source.fetch("5", "balance") is not None
        if pause_s:
            mock_clock.jump(pause_s - 0.5)
            for data_type in ("balance", "orders"):
                with pytest.raises(SourceError, match="a pause, of which 1 s are left") as caught:
                    await source.fetch("4", data_type)
                assert caught.value.retryable
                assert caught.value.pause_s == pytest.approx(0.5)
                assert not caught.value.everyone
            assert len(service.asked) == 2
            mock_clock.jump(0.6)
        assert await source.fetch("4", "balance") is not None


@pytest.mark.parametrize("status", [429, 503])
async def test_a_batchs_pause_is_everyones(
    service: Service, mock_clock: trio.testing.MockClock, status: int
) -> None:
    service.say(b"{}")
    service.turns = [(status, b"", {"retry-after": "60"})]
    url = service.url("/{data_type}?users={user_ids}")
    async with aclosing(HttpBatchSource(service.url(), url, client=HTTP_CLIENT)) as source:
        for jump_s, left_s in ((0, 60), (59.5, 0.5)):
            mock_clock.jump(jump_s)
            with pytest.raises(SourceError) as caught:
                await source.fetch_many(["4", "5"], "balance")
            assert caught.value.pause_s == pytest.approx(left_s)
            assert (caught.value.retryable, caught.value.everyone) == (True, True)
            assert (await failure(source, "6")).everyone
        assert len(service.asked) == 1
        mock_clock.jump(0.6)
        assert await source.fetch_many(["4", "5"], "balance") == {}


async def test_so_many_refusals_in_a_row_are_the_services(
    service: Service, mock_clock: trio.testing.MockClock
) -> None:
    refused = (429, b"", {"retry-after": "60"})
    async with reading(service.url()) as source:
        # Not in a row: somebody is answered between.
        for user in range(4):
            service.turns = [refused]
            assert not (await failure(source, f"early-{user}")).everyone
            assert await source.fetch("good", "balance") is not None
        del service.asked[:]
        service.say(b"", 429, retry_after="60")
        errors = [await failure(source, str(user)) for user in range(10)]
        assert len(service.asked) == REFUSALS
        assert [error.everyone for error in errors] == [False] * (REFUSALS - 1) + [True] * (
            11 - REFUSALS
        )
        mock_clock.jump(60.1)
        service.say(b"1")
        assert await source.fetch("0", "balance") is not None


async def test_who_waits_for_a_connection_heeds_the_pause_too(
    service: Service, mock_clock: trio.testing.MockClock
) -> None:
    service.go_on = trio.Event()
    service.turns = [(429, b"", {"retry-after": "5"})]

    async def fail(data_type: str) -> None:
        with pytest.raises(SourceError):
            await source.fetch("4", data_type)

    async with reading(service.url(), connections=1) as source, trio.open_nursery() as nursery:
        for data_type in ("balance", "orders", "pnl"):
            nursery.start_soon(fail, data_type)
        await service.arrived.wait()
        service.go_on.set()
    assert len(service.asked) == 1
