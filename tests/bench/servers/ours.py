"""trading_push by its public way: `service.publish`, authentication, default logging.

`ours.py hypercorn` under stock Hypercorn with the link, `native` at the native endpoint, `plain` in
plain ASGI form. Beyond what `common` says it takes the commands `values` (publish what the users'
snapshots will be), `gone` (wait until nobody is connected), `lag` (of the event loop, for some
seconds), `slice` (the longest step of any task since the last time), `trace` and `where` (what the
memory since then was taken by).
"""

from __future__ import annotations

import argparse
import gc
import os
import time
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import hypercorn.config
import hypercorn.trio
import trio
from accounts import DATA_TYPES, MemorySource, postgres_source, sqlite_source, value
from common import SIZE, TOPICS, collect, each_command, say, ticker

from trading_push import JwtAuthenticator, PushService, logs, open_push_service
from trading_push.endpoints.hypercorn import link as hypercorn_link
from trading_push.server import tune
from trading_push.settings.schema import Auth, Limits, Settings, Web

BACKLOG = 4096
# All clients come from one address, more of them than one address would send.
RAISED = ("connections", "connections_per_user", "unauthenticated_per_address")
LIMITS = Limits(**{field.name: 20_000 for field in attrs.fields(Limits) if field.name in RAISED})


async def publish(
    service: PushService, batches: int, topics: int, interval_s: float, bytes: int = SIZE
) -> None:
    due = trio.current_time()
    pad = " " * max(0, bytes - SIZE)
    for _ in range(batches):
        if topics == 1:
            await service.publish(f"ticker.{TOPICS[0]}", filled(TOPICS[0], pad))
        elif topics:
            await service.publish_many(
                [(f"ticker.{symbol}", filled(symbol, pad), None) for symbol in TOPICS[:topics]]
            )
        due += interval_s
        await trio.sleep_until(due)


def filled(symbol: str, pad: str) -> dict[str, Any]:
    return {**ticker(symbol), "pad": pad} if pad else ticker(symbol)


async def values(service: PushService, users: int) -> None:
    for symbol in TOPICS:
        await service.publish(f"ticker.{symbol}", ticker(symbol))
    for user in range(users):
        await service.publish_many(
            [(channel, value(channel, str(user)), user) for channel in DATA_TYPES]
        )


async def gone(service: PushService) -> dict[str, Any]:
    while True:
        seen = service.statistics()
        if not (seen.connections or seen.users_online) and seen.ledger.balanced:
            return {"at": time.monotonic()}
        await trio.sleep(0.01)


async def lag(seconds: float) -> dict[str, Any]:
    """How late a task that wakes every 10 ms is, and how long the garbage collector took."""
    late: list[float] = []
    pauses = [0.0]
    began = 0.0

    def collecting(phase: str, info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.perf_counter()
        else:
            pauses.append((time.perf_counter() - began) * 1000)

    gc.callbacks.append(collecting)
    until = trio.current_time() + seconds
    while (due := trio.current_time() + 0.01) < until:
        await trio.sleep_until(due)
        late.append((trio.current_time() - due) * 1000)
    gc.callbacks.remove(collecting)
    late.sort()
    return {name: late[int(len(late) * share)] for name, share in SHARES.items()} | {
        "max": late[-1],
        "gc_max": max(pauses),
    }


SHARES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}


class Slices(trio.abc.Instrument):
    """The longest time for which one task has held the event loop."""

    def __init__(self) -> None:
        self._began = 0.0
        self._longest = 0.0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began = time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._longest = max(self._longest, time.perf_counter() - self._began)

    def taken(self) -> dict[str, float]:
        longest, self._longest = self._longest, 0.0
        return {"ms": longest * 1000}


def where() -> dict[str, Any]:
    """Bytes that are there now and were not at `trace`, by the innermost line of each package."""
    collect()
    snapshot = tracemalloc.take_snapshot().filter_traces(
        [tracemalloc.Filter(False, tracemalloc.__file__)]
    )
    lines: Counter[str] = Counter()
    packages: Counter[str] = Counter()
    for statistic in snapshot.statistics("lineno"):
        frame = statistic.traceback[0]
        name = short(frame.filename)
        lines[f"{name}:{frame.lineno}"] += statistic.size
        packages[name.partition("/")[0]] += statistic.size
    return {"lines": dict(lines.most_common(40)), "packages": dict(packages.most_common(12))}


def short(path: str) -> str:
    """The path below site-packages, or of the standard library, or of this project."""
    parts = Path(path).parts
    for root in ("site-packages", "python3.11", "python3.12", "python3.13"):
        if root in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(root) :])
    if "trading_push" in parts:
        return "/".join(parts[len(parts) - 1 - parts[::-1].index("trading_push") :])
    return parts[-1]


async def obey(service: PushService, commands: trio.MemoryReceiveChannel[dict[str, Any]]) -> None:
    slices: Slices | None = None
    async for command in commands:
        answer: dict[str, Any] = {}
        match command.pop("do"):
            case "publish":
                await publish(service, **command)
            case "values":
                await values(service, **command)
            case "gone":
                answer = await gone(service)
            case "lag":
                answer = await lag(**command)
            case "slice":
                if slices is None:
                    slices = Slices()
                    trio.lowlevel.add_instrument(slices)
                answer = slices.taken()
            case "trace":
                collect()
                tracemalloc.start()
            case "where":
                answer = where()
            case "collect":
                collect()
        say(**answer)


async def open_endpoint(form: str, service: PushService, nursery: trio.Nursery) -> int:
    """Listen; the port."""
    if form == "native":
        listeners = await nursery.start(
            partial(trio.serve_tcp, service.handle_stream, 0, host="127.0.0.1", backlog=BACKLOG)
        )
        port: int = listeners[0].socket.getsockname()[1]
        return port
    config = hypercorn.config.Config.from_mapping(
        {"bind": ["127.0.0.1:0"], "errorlog": None, "backlog": BACKLOG}
    )
    binds = await nursery.start(
        partial(
            hypercorn.trio.serve,
            service.asgi_app,
            config,
            shutdown_trigger=trio.sleep_forever,
            mode="asgi",
        )
    )
    return int(binds[0].rsplit(":", 1)[1])


def source_of(options: argparse.Namespace) -> Any:
    match options.source:
        case "memory":
            return MemorySource()
        case "sqlite":
            return sqlite_source(options.file, options.users)
        case "postgres":
            return postgres_source(os.environ["BENCH_POSTGRES_URL"], options.users)
    return None


async def main(options: argparse.Namespace) -> None:
    form = options.form
    if form == "native" and not hasattr(PushService, "handle_stream"):
        say(skip="this version has no native endpoint")
        return
    if form == "hypercorn":
        hypercorn_link.install(LIMITS)
    tune()  # as `serve` does
    settings = Settings(jwt_secret=options.secret, limits=LIMITS, web=Web(metrics=options.metrics))
    authenticate = JwtAuthenticator(Auth(), options.secret)
    source = source_of(options)
    send, commands = trio.open_memory_channel[dict[str, Any]](10)
    token = trio.lowlevel.current_trio_token()
    each_command(
        lambda command: trio.from_thread.run_sync(send.send_nowait, command, trio_token=token)
    )
    async with (
        open_push_service(source, settings=settings, authenticate=authenticate) as service,
        trio.open_nursery() as nursery,
    ):
        say(port=await open_endpoint(form, service, nursery))
        await obey(service, commands)


parser = argparse.ArgumentParser()
parser.add_argument("form", choices=["hypercorn", "native", "plain"])
parser.add_argument("--secret", required=True)
parser.add_argument("--source", choices=["none", "memory", "sqlite", "postgres"], default="none")
parser.add_argument("--metrics", choices=["local", "off"], default="local")
parser.add_argument("--users", type=int, default=0)
parser.add_argument("--file", type=Path)
with logs.attached():
    trio.run(main, parser.parse_args())
