"""What the servers of the benchmark share: the messages, and how `run.py` drives them.

A server prints `{"port": N}` (or `{"skip": "why"}`), then takes one JSON command a line and answers
each with one: `{"do": "publish", "batches": B, "topics": T, "interval_s": S}` publishes B batches
of T messages, one a topic (none where T is 0: it only waits), S seconds apart, and answers when all
are handed to the kernel or to its own buffers; with `"bytes": B` each message is so long.
`{"do": "collect"}` collects garbage.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

TOPICS = [f"SYM{number}USDT" for number in range(10)]

SIZE = 161
"""How long a message is, so that its frame is as long as our own push of a ticker."""

numbers: Counter[str] = Counter()
"""How many messages there have been of each topic."""


def ticker(symbol: str) -> dict[str, Any]:
    """The value that is published."""
    numbers[symbol] += 1
    return {"symbol": symbol, "n": numbers[symbol], "at": time.monotonic_ns(), "last": "61837.63"}


def message(symbol: str) -> dict[str, Any]:
    """What the other servers send of it."""
    value = ticker(symbol)
    return {"channel": f"ticker.{symbol}", "type": "update", "seq": value["n"], "data": value}


def payload(symbol: str, size: int = SIZE) -> str:
    """The same as JSON, as long as our own push."""
    return json.dumps(message(symbol), separators=(",", ":")).ljust(size)


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def each_command(take: Callable[[dict[str, Any]], None]) -> None:
    """Hand each command to `take`, from a thread; the process ends with the last."""

    def read() -> None:
        for line in sys.stdin:
            take(json.loads(line))

    threading.Thread(target=read, daemon=True).start()


Publish = Callable[[list[str], int], Awaitable[None]]


async def obey(publish: Publish) -> None:
    """Carry out the commands on asyncio; `publish` takes the topics of a batch and a size."""
    loop = asyncio.get_running_loop()
    commands: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    each_command(lambda command: loop.call_soon_threadsafe(commands.put_nowait, command) and None)
    while True:
        command = await commands.get()
        if command.pop("do") == "collect":
            collect()
        else:
            await publish_batches(publish, **command)
        say()


async def publish_batches(
    publish: Publish, batches: int, topics: int, interval_s: float, bytes: int = SIZE
) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time()
    for _ in range(batches):
        await publish(TOPICS[:topics], bytes)
        due += interval_s
        await asyncio.sleep(max(0.0, due - loop.time()))


def collect() -> None:
    for _ in range(3):
        gc.collect()
