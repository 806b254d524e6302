"""Two hundred clients that come, unsubscribe, leave and are cut, while data flow: nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
from collections.abc import Iterator

import pytest
from websockets.exceptions import ConnectionClosed

from harness.embedded import Embedded, embed
from harness.support import SIX, client

CLIENTS = 200
ROUNDS = 10


async def visit(url: str, rng: random.Random, user: int) -> None:
    await asyncio.sleep(rng.random() / 4)  # when it comes is part of the seeded order
    with contextlib.suppress(ConnectionClosed, OSError):
        async with client(url, user) as each:
            await each.subscribe(*rng.sample(SIX, len(SIX)))
            for _ in range(rng.randrange(12)):
                await each.push()
            if rng.random() < 0.5:
                await each.request("unsubscribe", args=rng.sample(SIX, rng.randrange(1, 6)))
            for _ in range(rng.randrange(4)):
                await each.push()
            match rng.randrange(4):
                case 0:
                    await each.socket.close(1000, "done")
                case 1:
                    each.socket.transport.abort()
                case 2:
                    each.socket.transport.write_eof()
                case 3:
                    each.socket.transport.write(b"\x81\x85\x00")  # half a frame, then gone
                    each.socket.transport.abort()


@pytest.fixture
def embedded() -> Iterator[Embedded]:
    # All of them are of one address, and how many have not authenticated yet at the same moment
    # hangs on the machine's pace.
    with embed("--limits", json.dumps({"unauthenticated_per_address": 2 * CLIENTS})) as running:
        yield running


def test_nothing_stays_behind(embedded):
    async def everybody(rng: random.Random, count: int) -> None:
        seeds = [random.Random(rng.random()) for _ in range(count)]
        users = [rng.randrange(100) for _ in range(count)]
        await asyncio.gather(
            *(visit(embedded.url, seed, user) for seed, user in zip(seeds, users, strict=True))
        )

    memory = []
    before = embedded.look()
    # How many are there at the same time depends on the machine's pace, and with it how far the
    # heap is spread: twice as many take it to where no later round does.
    asyncio.run(everybody(random.Random(-1), 2 * CLIENTS))
    for number in range(ROUNDS):
        asyncio.run(everybody(random.Random(number), CLIENTS))
        seen = embedded.look_until(
            lambda seen: seen["balanced"] and seen["tasks"] <= before["tasks"], "the end"
        )
        assert seen["connections"] == seen["users_online"] == 0
        assert seen["subscribers_by_data_type"] == seen["subscribers_by_symbol"] == {}
        assert seen["ledger"]["connections_opened"] == CLIENTS * (number + 3)
        assert seen["descriptors"] <= before["descriptors"]
        memory.append((seen["in_use_kib"], seen["rss_kib"]))
    assert seen["violations"] == []
    assert embedded.process.traces() == []
    used = [used for used, _ in memory]
    assert used[9] - used[2] <= 1024, memory
    # Resident pages move by half a MiB from round to round: the middle one of three is compared.
    resident = [resident for _, resident in memory]
    assert statistics.median(resident[-3:]) - statistics.median(resident[1:4]) <= 1024, memory
