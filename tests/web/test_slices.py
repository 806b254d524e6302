"""Long lists are worked through in slices, so that an operator's question keeps nobody waiting."""

from __future__ import annotations

import random
import time

import pytest
import trio

from trading_push.web import slices
from trading_push.web.slices import each_in_slices, page_of


async def turns_of_others(work) -> int:
    """How often another task has its turn while some work is done."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await work
        nursery.cancel_scope.cancel()
    return turns


async def test_after_a_slice_others_have_their_turn():
    seen = []

    def slowly(number: int) -> None:
        until = time.perf_counter() + slices._SLICE_S / slices._CHUNK
        while time.perf_counter() < until:
            pass
        seen.append(number)

    count = 20 * slices._CHUNK
    assert await turns_of_others(each_in_slices(range(count), slowly)) >= 10
    assert seen == [*range(count)]


@pytest.mark.parametrize("count", [0, 1, 499, 500, 501, 2345])
@pytest.mark.parametrize(
    ("offset", "limit"), [(0, 100), (0, 0), (450, 100), (2340, 100), (9**9, 1)]
)
async def test_a_page_is_that_of_the_sorted_whole(count, offset, limit):
    items = random.sample(range(10_000), count)
    page = await page_of(items, lambda number: -number, offset, limit)
    assert page == sorted(items, reverse=True)[offset : offset + limit]


async def test_a_page_is_sorted_in_slices():
    items = random.sample(range(100_000), 10_000)
    assert await turns_of_others(page_of(items, int, 9_900, 100)) >= 10_000 // 500
