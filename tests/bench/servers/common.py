"""What the servers of the benchmark share: the message, and how `run.py` drives them.

A server prints the port it listens on, then takes one JSON command a line:
`{"batches": B, "topics": T, "interval_s": S}`: publish B batches of T messages, one a topic, S
seconds apart; it answers with a line when all are handed to the kernel or to its own buffers.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

TOPICS = [f"SYM{number}USDT" for number in range(10)]


class Numbers:
    """Numbers the messages of each topic, or of all together where clients see them as one."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self) -> int:
        self.next += 1
        return self.next


numbers = Numbers()


def ticker(symbol: str) -> dict[str, Any]:
    """The value that is published: what matters is that every server sends as many bytes."""
    return {"symbol": symbol, "n": numbers(), "at": time.monotonic_ns(), "last": "61837.63"}


def payload(symbol: str) -> str:
    """The value as the other servers send it, as long as our own push is."""
    value = ticker(symbol)
    message = {"channel": f"ticker.{symbol}", "type": "update", "seq": value["n"], "data": value}
    return json.dumps(message, separators=(",", ":")).ljust(SIZE)


SIZE = 161


def listening(port: int) -> None:
    print(port, flush=True)


def answered() -> None:
    print("{}", flush=True)


def commands_to(take: Callable[[dict[str, Any]], None]) -> None:
    """Hand each command to `take`, from a thread."""

    def read() -> None:
        for line in sys.stdin:
            take(json.loads(line))

    threading.Thread(target=read, daemon=True).start()
