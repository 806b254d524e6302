"""The whole recorded tape through a real server: what arrives is what stood in the tape."""

from __future__ import annotations

import asyncio
import gzip
from bisect import bisect_left
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.support import DATA, client, serving

TAPE = DATA / "binance_spot_2024-08-08.jsonl.gz"
SYMBOLS = ("BTCUSDT", "ETHUSDT")
UPDATES_PER_S = range(7, 11)


class Read:
    """What the tape says, by a reader that shares no code with the one that is tested."""

    def __init__(self, path: Path) -> None:
        self.quotes: dict[str, set[tuple[str, str]]] = defaultdict(set)
        self.last: dict[str, dict[str, Any]] = defaultdict(dict)
        with gzip.open(path, "rb") as file:
            for line in file:
                data = msgspec.json.decode(line)["frame"]["data"]
                symbol = data["s"]
                if data.get("e") == "trade":
                    self.last[symbol]["last"] = data["p"]
                else:
                    self.quotes[symbol].add((data["b"], data["a"]))
                    self.last[symbol] |= {"bid": data["b"], "ask": data["a"]}


async def collect(url: str) -> list[dict[str, Any]]:
    pushes = []
    missing = set(SYMBOLS)
    async with client(url, 4) as watcher:
        await watcher.subscribe(*(f"ticker.{symbol}" for symbol in SYMBOLS))
        while missing:
            pushes.append(await asyncio.wait_for(watcher.push(), 60))
            if pushes[-1]["type"] == "status" and pushes[-1]["state"] == "stale":
                assert pushes[-1]["reason"] == "tape_ended"
                missing.discard(pushes[-1]["channel"].removeprefix("ticker."))
    return pushes


@pytest.mark.skipif(not TAPE.exists(), reason="the recorded tape is not beside the checkout")
def test_the_whole_tape_at_speed_20(tmp_path):
    tape = Read(TAPE)
    with serving(tmp_path, "--tape", str(TAPE), "--speed", "20") as server:
        pushes = asyncio.run(collect(server.url))
        assert server.stop() == 0
        assert not [line for line in server.err if line.startswith("❌")]
        assert server.traces() == []
    for symbol in SYMBOLS:
        mine = [push for push in pushes if push["channel"] == f"ticker.{symbol}"]
        values = [push for push in mine if push["type"] != "status"]
        assert values[0]["type"] == "snapshot"
        assert all(push["type"] == "update" for push in values[1:])
        for before, after in pairwise(values):
            assert after["prev"] == before["seq"]
        for push in values:
            if push["data"]["bid"] is not None:
                assert (push["data"]["bid"], push["data"]["ask"]) in tape.quotes[symbol]
        final = values[-1]["data"]
        assert {name: final[name] for name in ("last", "bid", "ask")} == tape.last[symbol]
        check_pace([push["ts"] for push in values[1:]])


def check_pace(stamps: list[int]) -> None:
    """In every sliding second at most ten updates, and at least seven while the tape moves."""
    assert stamps[-1] - stamps[0] > 25_000
    counts = Counter(
        bisect_left(stamps, start + 1000) - bisect_left(stamps, start)
        for start in range(stamps[0], stamps[-1] - 1000)
    )
    assert set(counts) <= set(UPDATES_PER_S), counts
