"""A program that embeds the service, with data that change at every fetch and a look inside.

It prints its port. For each line on standard input it prints one JSON object: the statistics, the
living tasks, the open descriptors, the memory in KiB (resident, and what of it is in use), and what
the recorder has seen.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import hypercorn.config
import hypercorn.trio
import psutil
import recorder
import trio

from trading_push import JwtAuthenticator, MarketSink, PushService, Ticker, logs, open_push_service
from trading_push.settings import Auth, Intervals, Settings
from trading_push.transport import hypercorn_link

SECRET = "a secret of at least thirty-two bytes"


class Changing:
    """A source whose every answer is another."""

    def __init__(self) -> None:
        self._count = itertools.count()

    async def fetch(self, user_id: str, data_type: str) -> Any:
        return (await self.fetch_many([user_id], data_type))[user_id]

    async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any]:
        await trio.lowlevel.checkpoint()
        return {user: [{"user": user, "count": next(self._count)}] for user in user_ids}


class Ticking:
    """A market of two symbols that moves twenty times a second."""

    def knows(self, symbol: str) -> bool:
        return symbol in ("BTCUSDT", "ETHUSDT")

    async def run(self, sink: MarketSink) -> None:
        for count in itertools.count():
            sink.update([Ticker(symbol, source_ts=count) for symbol in ("BTCUSDT", "ETHUSDT")])
            await trio.sleep(0.05)


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


def look(service: PushService) -> str:
    gc.collect()
    used = in_use()
    return json.dumps(
        {
            **attrs.asdict(service.statistics()),
            "balanced": service.statistics().ledger.balanced,
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "rss_kib": psutil.Process().memory_info().rss // 1024,
            "in_use_kib": used // 1024,
            "closes": recorder.closes,
            "violations": recorder.violations,
        }
    )


async def main() -> None:
    recorder.install()
    settings = Settings(jwt_secret=SECRET, intervals=Intervals(0.1, 0.1, 0.1, 0.1))
    hypercorn_link.install(settings.limits)
    config = hypercorn.config.Config.from_mapping(
        {"bind": ["127.0.0.1:0"], "errorlog": "-", "loglevel": "WARNING", "backlog": 4096}
    )
    with logs.attached():
        async with (
            open_push_service(
                Changing(),
                settings=settings,
                feed=Ticking(),
                authenticate=JwtAuthenticator(Auth(), SECRET),
            ) as service,
            trio.open_nursery() as nursery,
        ):
            binds = await nursery.start(
                partial(
                    hypercorn.trio.serve,
                    service.asgi_app,
                    config,
                    shutdown_trigger=trio.sleep_forever,
                )
            )
            print(binds[0].rsplit(":", 1)[1], flush=True)
            while await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
                print(look(service), flush=True)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
