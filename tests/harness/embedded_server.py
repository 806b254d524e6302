"""A program that embeds the service, with data that change at every fetch and a look inside.

It prints the port of Hypercorn's endpoint and that of the native one. For each line on standard
input it prints one JSON object: the statistics, the living tasks, the open descriptors, the memory
in KiB (resident, the most that it was, and what of it is in use), what the recorder has seen, and
since the line before: how late a task that wakes every 10 ms was at most, and how long it was at
most from one accepted connection to the next.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import attrs
import hypercorn.config
import hypercorn.trio
import psutil
import trio

from harness import recorder

from trading_push import (
    Channel,
    JwtAuthenticator,
    MarketSink,
    PushService,
    Ticker,
    logs,
    open_push_service,
)
from trading_push.endpoints.hypercorn import link as hypercorn_link
from trading_push.server import tune
from trading_push.settings.schema import Auth, Intervals, Limits, Settings

SECRET = "a secret of at least thirty-two bytes"


class Faults:
    """Some of what is asked fails, by a seed; without one nothing does."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._share = 0.02 if seed else 0.0

    def maybe(self) -> None:
        if self._rng.random() < self._share:
            raise RuntimeError("on purpose")


class Changing:
    """A source whose every answer is another."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._count = itertools.count()

    async def fetch(self, user_id: str, data_type: str) -> Any:
        return (await self.fetch_many([user_id], data_type))[user_id]

    async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any]:
        await trio.lowlevel.checkpoint()
        self._faults.maybe()
        return {user: [{"user": user, "count": next(self._count)}] for user in user_ids}


class Ticking:
    """A market of two symbols that moves some times a second."""

    def __init__(self, hz: float, faults: Faults) -> None:
        self._pause_s = 1 / hz
        self._faults = faults

    def knows(self, symbol: str) -> bool:
        return symbol in ("BTCUSDT", "ETHUSDT")

    async def run(self, sink: MarketSink) -> None:
        for count in itertools.count():
            sink.update([Ticker(symbol, source_ts=count) for symbol in ("BTCUSDT", "ETHUSDT")])
            await trio.sleep(self._pause_s)
            self._faults.maybe()


class Numbers:
    """Streams that count, and are counted."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self.last_ended_at = 0.0

    async def own(self, user: str = "") -> AsyncGenerator[Any, None]:
        self.begun += 1
        try:
            for number in itertools.count():
                yield {"user": user, "number": number}
                await trio.sleep(0.05)
        finally:
            self.ended += 1
            self.last_ended_at = time.monotonic()

    async def shared(self) -> AsyncGenerator[Any, None]:
        async with aclosing(self.own()) as values:
            async for value in values:
                yield value


class Mallinfo2(ctypes.Structure):
    """What glibc's allocator says of itself, in bytes; see mallinfo(3)."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def in_use() -> int:
    """Bytes that are allocated now: all of Python's under PYTHONMALLOC=malloc.

    What is free goes back to the system, so that the resident memory is what is kept.
    """
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    mallinfo2 = libc.mallinfo2
    mallinfo2.restype = Mallinfo2
    said = mallinfo2()
    return said.uordblks + said.hblkhd


class Watch:
    """How late the loop was, and how long nobody was accepted, at most."""

    def __init__(self) -> None:
        self.lag_s = self.accept_gap_s = 0.0
        self._accepted_at = math.inf
        self._looked = False

    async def run(self) -> None:
        while True:
            due, used = trio.current_time() + 0.01, time.process_time()
            await trio.sleep_until(due)
            if not self._looked:  # a look itself holds the loop
                # What others on the machine have taken of its time is not the loop's doing.
                late = min(trio.current_time() - due, time.process_time() - used)
                self.lag_s = max(self.lag_s, late)
            self._looked = False

    def accepts(self) -> None:
        """Note each connection that a listener accepts from now on."""
        original = trio.SocketListener.accept

        async def accept(listener: trio.SocketListener) -> trio.SocketStream:
            stream = await original(listener)
            now = trio.current_time()
            self.accept_gap_s = max(self.accept_gap_s, now - self._accepted_at)
            self._accepted_at = now
            return stream

        trio.SocketListener.accept = accept

    def since_last(self) -> dict[str, float]:
        seen = {"lag_s": self.lag_s, "accept_gap_s": self.accept_gap_s}
        self.lag_s = self.accept_gap_s = 0.0
        self._accepted_at = math.inf
        self._looked = True
        return seen


async def report(service: PushService) -> None:
    """Publish a number on the public events channel, five times a second."""
    for number in itertools.count(1):
        await service.publish("reports", number)
        await trio.sleep(0.2)


def peak_kib() -> int:
    """The most that was resident; /proc/PID/clear_refs starts it anew."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def look(service: PushService, watch: Watch, numbers: Numbers) -> str:
    gc.collect()
    used = in_use()
    return json.dumps(
        {
            **attrs.asdict(service.statistics()),
            "balanced": service.statistics().ledger.balanced,
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "rss_kib": psutil.Process().memory_info().rss // 1024,
            "peak_kib": peak_kib(),
            "in_use_kib": used // 1024,
            **watch.since_last(),
            "stalled_s": recorder.stalled_s,
            "closes": recorder.closes,
            "violations": recorder.violations,
            "numbers": vars(numbers),
        }
    )


async def open_hypercorn(service: PushService, limits: Limits, nursery: trio.Nursery) -> int:
    hypercorn_link.install(limits)
    config = hypercorn.config.Config.from_mapping(
        {"bind": ["127.0.0.1:0"], "errorlog": "-", "loglevel": "WARNING", "backlog": 4096}
    )
    served = partial(
        hypercorn.trio.serve, service.asgi_app, config, shutdown_trigger=trio.sleep_forever
    )
    binds = await nursery.start(served)
    return int(binds[0].rsplit(":", 1)[1])


async def main(options: argparse.Namespace) -> None:
    recorder.install()
    tune()  # as the README tells a program with very many connections
    limits = Limits(**json.loads(options.limits))
    settings = Settings(jwt_secret=SECRET, intervals=Intervals(*4 * [0.1]), limits=limits)
    watch = Watch()
    watch.accepts()
    faults = Faults(options.faults)
    numbers = Numbers()
    with logs.attached():
        async with (
            open_push_service(
                Changing(faults),
                settings=settings,
                feed=Ticking(options.hz, faults),
                authenticate=JwtAuthenticator(Auth(), SECRET),
                channels=[Channel("reports", "events", per_user=False)],
            ) as service,
            trio.open_nursery() as nursery,
        ):
            print(await open_hypercorn(service, limits, nursery), flush=True)
            [listener] = await nursery.start(partial(service.serve_native, "127.0.0.1", 0))
            print(listener.socket.getsockname()[1], flush=True)
            nursery.start_soon(watch.run)
            nursery.start_soon(report, service)
            service.add_stream("numbers", numbers.own)
            service.add_stream("shared", numbers.shared, shared=True)
            while await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
                print(look(service, watch, numbers), flush=True)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--limits", default="{}", help="JSON")
    parser.add_argument("--hz", type=float, default=20, help="of the market")
    parser.add_argument("--faults", type=int, default=0, help="seed of sources that fail")
    trio.run(main, parser.parse_args())
