"""The servers and the workloads of the benchmark; `run.py` runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from process import Failed, Process

from trading_push import issue_token

__all__ = ["SERVERS", "WORKLOADS", "Place", "Server", "Skipped", "Workload", "where"]

HERE = Path(__file__).parent
SECRET = "only for the benchmark, and of 32 bytes or more"
TOPICS = [f"SYM{number}USDT" for number in range(10)]
USER_CHANNELS = ["balance", "positions", "pnl", "orders"]
SIX = [*USER_CHANNELS, "ticker.SYM0USDT", "ticker.SYM1USDT"]
SNAPSHOT = '"type":"snapshot"'
LAST_LINE_OF_A_LEAVE = "当前在线用户数".encode()
LINES_DROPPED = "已丢弃".encode()

# The least time from one batch to the next, so that the load generator keeps up.
PACE_S = 14e-6
BURST_PACE_S = 5e-6
MEASURE_S = 6.0
"""How long one measurement of a fan-out takes at most."""
TURNS = 6
"""In how many turns with the floor."""

Figures = dict[str, float]
Step = tuple[str, str, int]


class Skipped(Exception):
    """The server cannot be run here."""


# --- servers ---------------------------------------------------------------------------------


@attrs.frozen
class Server:
    """A server and how its clients say hello.

    Args:
        title: As the tables and the chart name it.
        file: Its program, with arguments.
        needs: What has to be installed for it.
        hello: What a client of a peer says first.
    """

    title: str
    file: tuple[str, ...]
    needs: tuple[str, ...] = ()
    path: str = "/ws"
    hello: tuple[Step, ...] = ()

    @property
    def ours(self) -> bool:
        return self.file[0] == "ours.py"

    def greeting(self, topics: int) -> list[Step]:
        """Authenticated, and subscribed to some tickers."""
        channels = [f"ticker.{symbol}" for symbol in TOPICS[:topics]]
        return subscribing(channels, '"op":"subscribe"', 1) if self.ours else list(self.hello)

    def greeting_six(self) -> list[Step]:
        """Authenticated, subscribed to six channels and their snapshots there."""
        return subscribing(SIX, SNAPSHOT, len(SIX)) if self.ours else list(self.hello)


def subscribing(channels: Sequence[str], wanted: str, times: int) -> list[Step]:
    return [
        ('{"op":"auth","id":1,"token":"TOKEN"}', '"op":"auth"', 1),
        (json.dumps({"op": "subscribe", "id": 2, "args": channels}), wanted, times),
    ]


ENGINE_IO = (("", "0{", 1), ("40", "40{", 1))
UVICORN = ("uvicorn", "uvloop", "httptools", "websockets")

SERVERS = {
    "floor": Server("floor: bare send()", ("floor.py",)),
    "hypercorn": Server("trading_push, Hypercorn", ("ours.py", "hypercorn")),
    "native": Server("trading_push, native", ("ours.py", "native")),
    "plain": Server("trading_push, plain ASGI", ("ours.py", "plain")),
    "picows": Server("picows (Cython)", ("picows_server.py",), ("picows", "uvloop")),
    "websockets": Server("websockets.broadcast", ("websockets_broadcast.py",), ("websockets",)),
    "fastapi": Server("FastAPI, uvicorn", ("fastapi_uvicorn.py",), ("fastapi", *UVICORN)),
    "litestar": Server("Litestar channels", ("litestar_channels.py",), ("litestar", *UVICORN)),
    "socketio": Server(
        "python-socketio",
        ("socketio_rooms.py",),
        ("socketio", *UVICORN),
        "/socket.io/?EIO=4&transport=websocket",
        ENGINE_IO,
    ),
    "ws": Server("ws (Node)", ("ws.js",)),
}
OURS = ("hypercorn", "native")
ALL_OURS = (*OURS, "plain")
EVERY = tuple(SERVERS)
PEERS = tuple(name for name, server in SERVERS.items() if not server.ours)


@attrs.define
class Place:
    """Where the processes of a run put what they write; Node's library is fetched into it once."""

    directory: Path
    _started: int = 0
    _node_modules: Path | None = None

    def command(self, server: Server) -> tuple[list[str], dict[str, str]]:
        """What to run, and its environment."""
        file = str(HERE / "servers" / server.file[0])
        if file.endswith(".js"):
            node = shutil.which("node")
            if node is None:
                raise Skipped("there is no node")
            return [node, file, *server.file[1:]], {"NODE_PATH": str(self._fetched())}
        for module in server.needs:
            if importlib.util.find_spec(module) is None:
                raise Skipped(f"{module} is not installed")
        return [sys.executable, file, *server.file[1:]], {}

    def _fetched(self) -> Path:
        if self._node_modules is None:
            npm = shutil.which("npm")
            if npm is None:
                raise Skipped("there is no npm")
            directory = self.directory / "node"
            directory.mkdir()
            done = subprocess.run(
                [npm, "install", "--no-audit", "--no-fund", "--prefix", str(directory), "ws@8"],
                capture_output=True,
                cwd=directory,
                timeout=120,
                check=False,
            )
            if done.returncode:
                raise Skipped("npm could not install ws")
            self._node_modules = directory / "node_modules"
        return self._node_modules

    @contextmanager
    def running(self, server: Server, *arguments: str, pinned: bool = True) -> Iterator[Pair]:
        """A server and its load generator, until the block ends.

        Pinned, the load generator has the last processor to itself, and the server the others: on
        the same one, each delivery would wait for the other's turn.
        """
        args, environment = self.command(server)
        if server.ours:
            arguments = ("--secret", SECRET, *arguments)
        if args[0].endswith("node"):
            args.insert(1, "--expose-gc")
        *for_server, for_load = sorted(os.sched_getaffinity(0))
        cpus = for_server if pinned else []
        with Process([*args, *arguments], self._log("server"), environment, cpus) as process:
            answer = process.answer(90)
            if "skip" in answer:
                raise Skipped(answer["skip"])
            generator = [sys.executable, str(HERE / "load.py")]
            with Process(generator, self._log("load"), None, [for_load] if cpus else []) as load:
                pair = Pair(server, process, load, answer["port"])
                yield pair
                pair.load.ask("cut")

    def _log(self, what: str) -> Path:
        self._started += 1
        return self.directory / f"{what}-{self._started}.log"

    def file(self) -> Path:
        self._started += 1
        return self.directory / f"accounts-{self._started}.db"


@attrs.frozen(eq=False)
class Pair:
    """A server and the load generator that its clients are in."""

    server: Server
    process: Process
    load: Process
    port: int

    def connect(self, count: int, hello: list[Step], **more: Any) -> float:
        """Connect so many clients; the seconds until the last is ready."""
        tokens = [issue_token(SECRET, str(user), 7200) for user in range(count)]
        if not self.server.ours:
            tokens = []
        path = self.server.path
        answer = self.load.ask(
            "connect",
            120,
            port=self.port,
            count=count,
            path=path,
            hello=hello,
            tokens=tokens,
            **more,
        )
        return float(answer["seconds"])

    def get(self, path: str) -> bytes:
        """Ask one of the HTTP routes, as an operator."""
        operator = issue_token(SECRET, "operator", 7200, {"admin": True})
        headers = {"Authorization": f"Bearer {operator}"}
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            content: bytes = answer.read()
        return content

    def publish(
        self,
        batches: int,
        topics: int,
        interval_s: float,
        *,
        rest_s: float = 0.0,
        timed: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        """Publish, until everything is received: server seconds of CPU, and the latencies."""
        timeout_s = 20 + 3 * batches * interval_s
        before = self.process.cpu_s()
        self.load.send(
            "receive",
            messages=batches * topics,
            timeout_s=timeout_s,
            rest_s=rest_s,
            timed=timed,
        )
        self.process.send("publish", batches=batches, topics=topics, interval_s=interval_s, **more)
        answer = self.load.answer(timeout_s + 10)
        cpu_s = self.process.cpu_s() - before
        if "missing" in answer:
            raise Failed(f"{answer['missing']} deliveries did not come in {timeout_s:.0f} s")
        self.process.answer(timeout_s)
        if answer["merged"] and not timed:
            raise Failed(f"{answer['merged']} deliveries were merged into later ones")
        return {"cpu_s": cpu_s, **answer}

    def waiting_s(self, batches: int, interval_s: float) -> float:
        """What it costs the server to wait for the time of a batch: its timer, not its delivery."""
        before = self.process.cpu_s()
        self.process.ask("publish", 60, batches=batches, topics=0, interval_s=interval_s)
        return (self.process.cpu_s() - before) / batches

    def batch_s(self, topics: int) -> float:
        """How long one batch takes until everybody has it; it warms the server up, too."""
        return statistics.median(float(self.publish(1, topics, 0.0)["seconds"]) for _ in range(12))


# --- workloads -------------------------------------------------------------------------------


@attrs.frozen
class Workload:
    """What is measured.

    Args:
        title: What it is.
        figures: Its figures: name, unit and what it means.
        servers: Which servers it is for.
        files: How many open files one process needs.
        estimate_s: About how long one round of one server takes.
        begin: Called for each round; what it gives measures one server.
    """

    title: str
    figures: dict[str, tuple[str, str]]
    servers: tuple[str, ...]
    files: int
    estimate_s: float
    begin: Callable[[Place], Any]


@contextmanager
def fanout(
    place: Place, clients: int, topics: int, deliveries: int
) -> Iterator[Callable[[Server], Figures]]:
    """A server by turns with the floor, which stays there for the whole round."""
    with place.running(SERVERS["floor"]) as floor:
        floor.connect(clients, [])
        floor_s = floor.batch_s(topics)

        def once(server: Server, slowness: float) -> Figures:
            with place.running(server) as pair:
                pair.connect(clients, server.greeting(topics))
                time.sleep(0.5)
                pace = PACE_S if topics == 1 else BURST_PACE_S * topics
                took = max(pair.batch_s(topics), floor_s)
                interval_s = slowness * max(0.004, clients * pace, 1.4 * took)
                batches = deliveries // (clients * topics)
                batches = min(batches, round(MEASURE_S / interval_s))
                batches = max(5, batches // TURNS)
                rest_s = 0.4 * interval_s
                waiting_s = {
                    each: each.waiting_s(2 * batches, interval_s) for each in (floor, pair)
                }
                # By turns, all as long as each other: a machine's pace changes within seconds.
                turns = [floor, *(pair, floor) * TURNS]
                costs = [
                    (
                        each.publish(batches, topics, interval_s, rest_s=rest_s)["cpu_s"]
                        - (batches - 1) * waiting_s[each]
                    )
                    / (batches * topics * clients)
                    * 1e6
                    for each in turns
                ]
            cost_us = statistics.mean(costs[1::2])
            floor_us = statistics.mean(costs[0::2])
            return {
                "cpu_us": cost_us,
                "ratio": cost_us / floor_us,
                "floor_us": floor_us,
                "deliveries": TURNS * batches * topics * clients,
            }

        def measure(server: Server) -> Figures:
            try:
                return once(server, 1.0)
            except Failed:
                # It may have been disturbed, so that a batch met the one before: slower, once.
                return once(server, 2.0)

        yield measure


def each_alone(measure: Callable[[Place, Server], Figures]) -> Callable[[Place], Any]:
    @contextmanager
    def begin(place: Place) -> Iterator[Callable[[Server], Figures]]:
        yield lambda server: measure(place, server)

    return begin


def latency(place: Place, server: Server, clients: int, batches: int, stalled: int) -> Figures:
    with place.running(server) as pair:
        pair.connect(clients, server.greeting(1), stalled=stalled)
        time.sleep(0.5)
        if stalled:
            pair.load.ask("stall")
            # Until nothing more goes into the sockets of those that do not read.
            pair.publish(60, 1, 0.05, timed=True, bytes=4096)
        pair.publish(20, 1, 0.1, timed=True)
        answer = pair.publish(batches, 1, 0.1, timed=True)
    merged = answer["merged"] / clients / batches
    return {f"{name}_ms": value for name, value in answer["latencies"].items()} | {"merged": merged}


def arrival(place: Place, server: Server, clients: int, source: str = "none") -> Figures:
    arguments = ["--source", source] if server.ours else []
    with place.running(server, *arguments) as pair:
        if server.ours:
            pair.process.ask("values", users=0 if source != "none" else clients)
        time.sleep(0.5)
        before = pair.process.cpu_s()
        seconds = pair.connect(clients, server.greeting_six())
        time.sleep(1)
        cost = pair.process.cpu_s() - before
    return {"cpu_us": cost / clients * 1e6, "seconds": seconds}


def departure(place: Place, server: Server, clients: int) -> Figures:
    with place.running(server) as pair:
        pair.process.ask("values", users=clients)
        pair.connect(clients, server.greeting_six())
        time.sleep(2)
        log = pair.process.log.open("rb")
        log.seek(0, 2)
        before = pair.process.cpu_s()
        pair.process.send("gone")
        cut = pair.load.ask("cut")
        began = cut["at"] - cut["seconds"]
        zero = pair.process.answer(120)["at"] - began
        lines, until = 0, time.monotonic() + 30
        logged = time.monotonic()
        while lines < clients and time.monotonic() < until:
            data = log.read()
            if LINES_DROPPED in data:
                raise Failed("lines of the log were dropped")
            lines += data.count(LAST_LINE_OF_A_LEAVE)
            logged = time.monotonic()
            time.sleep(0.005)
        log.close()
        if lines != clients:
            raise Failed(f"{lines} of {clients} blocks logged")
        cost = pair.process.cpu_s() - before
    return {"zero_s": zero, "logged_s": logged - began, "cpu_us": cost / clients * 1e6}


def memory(place: Place, server: Server, clients: int, deflate: bool) -> Figures:
    with place.running(server) as pair:
        if server.ours:
            pair.process.ask("values", users=clients)
        pair.connect(50, server.greeting_six(), deflate=deflate)
        pair.load.ask("cut")
        time.sleep(1)
        pair.process.ask("collect")
        before = pair.process.private_bytes()
        pair.connect(clients, server.greeting_six(), deflate=deflate)
        time.sleep(2)
        pair.process.ask("collect")
        after = pair.process.private_bytes()
    return {"kb": (after - before) / clients / 1024}


def polling(place: Place, server: Server, users: int, seconds: float, source: str) -> Figures:
    if source == "postgres" and "BENCH_POSTGRES_URL" not in os.environ:
        raise Skipped("BENCH_POSTGRES_URL names no database whose tables may be replaced")
    arguments = ["--source", source, "--users", str(users), "--file", str(place.file())]
    with place.running(server, *arguments, pinned=False) as pair:
        if source == "none":
            pair.process.ask("values", users=users)
        pair.connect(users, subscribing(USER_CHANNELS, SNAPSHOT, len(USER_CHANNELS)))
        time.sleep(5)
        before = pair.process.cpu_s()
        pair.process.send("lag", seconds=seconds)
        pushes = pair.load.ask("watch", seconds + 30, seconds=seconds)["pushes"]
        lag = pair.process.answer(seconds + 30)
        cost = pair.process.cpu_s() - before
    # A tick that comes late is not made up for: some less than all says that it was too much.
    due = users * seconds * (1 / 10 + 1 / 5 + 1 / 5 + 1 / 15) if source != "none" else pushes or 1
    return {
        "core_percent": cost / seconds * 100,
        "pushes_percent": pushes / due * 100,
        "lag_p99_ms": lag["p99"],
        "lag_max_ms": lag["max"],
        "gc_max_ms": lag["gc_max"],
    }


def metrics(place: Place, server: Server, clients: int, deliveries: int, rounds: int) -> Figures:
    """Metrics that are read after each turn, by turns with a server that has none."""
    with (
        place.running(server, "--metrics", "local") as on,
        place.running(server, "--metrics", "off") as off,
    ):
        for pair in (on, off):
            pair.connect(clients, server.greeting(1))
        time.sleep(0.5)
        took = max(pair.batch_s(1) for pair in (on, off))
        interval_s = max(0.004, clients * PACE_S, 1.4 * took)
        batches = max(5, deliveries // clients)

        def cost_us(pair: Pair) -> float:
            cpu_s = pair.publish(batches, 1, interval_s, rest_s=0.4 * interval_s)["cpu_s"]
            return float(cpu_s / (batches * clients) * 1e6)

        reads: list[float] = []

        def read() -> None:
            before = on.process.cpu_s()
            on.get("/metrics")
            reads.append(on.process.cpu_s() - before)

        costs: list[tuple[float, float]] = []
        for number in range(rounds):
            # In another order each time: the second may profit from what the first has warmed up.
            both = {pair: cost_us(pair) for pair in ((on, off) if number % 2 else (off, on))}
            costs.append((both[on], both[off]))
            read()
    more = [(with_it / without - 1) * 100 for with_it, without in costs]
    mean = statistics.mean(more)
    # The normal distribution's: for 20 rounds Student's would be 7 % wider.
    margin = 1.96 * statistics.stdev(more) / len(more) ** 0.5 if rounds > 1 else 0.0
    return {
        "cpu_us": statistics.mean(with_it for with_it, _ in costs),
        "more_percent": mean,
        "low_percent": mean - margin,
        "high_percent": mean + margin,
        "read_ms": statistics.median(reads) * 1000,
    }


def operators(place: Place, server: Server, clients: int) -> Figures:
    """For how long one step of the server lasts at most while an operator asks."""
    routes = {
        "metrics_ms": "/metrics",
        "connections_ms": "/connections",
        "last_page_ms": f"/connections?offset={clients - 100}",
        "search_ms": "/connections?q=99",
        "online_ms": "/online",
        "stats_ms": "/stats",
    }
    figures: Figures = {}
    with place.running(server) as pair:
        pair.process.ask("values", users=clients)
        pair.connect(clients, server.greeting_six())
        time.sleep(2)
        pair.process.ask("slice")
        for name, route in {"nothing_ms": "/healthz", **routes}.items():
            longest = []
            for _ in range(5):
                time.sleep(0.2)
                pair.process.ask("slice")
                pair.get(route)
                longest.append(pair.process.ask("slice")["ms"])
            figures[name] = statistics.median(longest)
    return figures


def where(place: Place, server: Server, clients: int) -> dict[str, Any]:
    """Where the bytes of a connection with six subscriptions are, by tracemalloc."""
    with place.running(server) as pair:
        pair.process.ask("values", users=clients)
        pair.connect(50, server.greeting_six())
        pair.load.ask("cut")
        time.sleep(1)
        pair.process.ask("trace")
        pair.connect(clients, server.greeting_six())
        time.sleep(2)
        return pair.process.ask("where", 120)


FANOUT = {
    "cpu_us": ("µs", "server CPU a delivery"),
    "ratio": ("×", "of the floor beside it"),
}
LATENCY = {
    "p50_ms": ("ms", "half of the deliveries"),
    "p99_ms": ("ms", "99 %"),
    "p999_ms": ("ms", "99.9 %"),
}
ARRIVAL = {
    "cpu_us": ("µs", "server CPU a connection"),
    "seconds": ("s", "until the last is ready"),
}
DEPARTURE = {
    "zero_s": ("s", "until the statistics are zero"),
    "logged_s": ("s", "until every block is logged"),
    "cpu_us": ("µs", "server CPU a connection"),
}
MEMORY = {"kb": ("KB", "private memory a connection")}
METRICS = {
    "cpu_us": ("µs", "server CPU a delivery"),
    "more_percent": ("%", "more than without metrics"),
    "low_percent": ("%", "its 95 % interval from"),
    "high_percent": ("%", "to"),
    "read_ms": ("ms", "server CPU to read them once"),
}
OPERATORS = {
    "nothing_ms": ("ms", "step at /healthz"),
    "metrics_ms": ("ms", "at /metrics"),
    "connections_ms": ("ms", "at /connections"),
    "last_page_ms": ("ms", "at its last page"),
    "search_ms": ("ms", "at its search"),
    "online_ms": ("ms", "at /online"),
    "stats_ms": ("ms", "at /stats"),
}
POLLING = {
    "core_percent": ("%", "of one core"),
    "pushes_percent": ("%", "of the pushes that were due"),
    "lag_p99_ms": ("ms", "lag of the event loop, p99"),
    "lag_max_ms": ("ms", "at most"),
    "gc_max_ms": ("ms", "garbage collection, at most"),
}


def workloads(quick: bool) -> dict[str, Workload]:
    """All of them, by name; those that are `quick` show that it works, and no more."""
    found: dict[str, Workload] = {}

    def of_fanout(name: str, title: str, clients: int, topics: int, estimate_s: float) -> None:
        deliveries = 20_000 if quick else 300_000 if topics == 1 else 1_000_000
        found[name] = Workload(
            title,
            FANOUT,
            EVERY,
            clients,
            estimate_s,
            lambda place: fanout(place, clients, topics, deliveries),
        )

    for clients, estimate_s in ((100, 22), (1000, 22), (5000, 32)):
        of_fanout(
            f"fanout-{clients}",
            f"Fan-out of one topic to {clients:,} subscribers",
            clients,
            1,
            estimate_s,
        )
    of_fanout(
        "burst-1000", "Bursts of 10 symbols in a batch to 1,000 subscribers of all", 1000, 10, 26
    )

    batches = 20 if quick else 100
    for name, stalled, title in (
        ("latency", 0, "Publish to receipt, 1,000 subscribers, 10 batches a second"),
        ("latency-stalled", 10, "The same with 1 % of the clients not reading"),
    ):
        found[name] = Workload(
            title,
            LATENCY,
            tuple(each for each in EVERY if each != "floor" or not stalled),
            1000,
            16 + 5 * bool(stalled),
            each_alone(
                lambda place, server, stalled=stalled: latency(
                    place, server, 1000, batches, stalled
                )
            ),
        )

    scale = 10 if quick else 1
    for clients in (1000, 2000, 5000):
        found[f"arrival-{clients}"] = Workload(
            f"{clients // scale:,} clients at once: ours authenticate, subscribe six channels and "
            "get the snapshots; the others shake hands",
            ARRIVAL,
            EVERY if clients == 2000 else ALL_OURS,
            clients,
            6 + clients / 1000,
            each_alone(lambda place, server, n=clients // scale: arrival(place, server, n)),
        )
    found["arrival-source"] = Workload(
        f"{2000 // scale:,} clients at once, user data asked of a source (in memory) for each",
        ARRIVAL,
        OURS,
        2000,
        9,
        each_alone(lambda place, server: arrival(place, server, 2000 // scale, "memory")),
    )
    for clients in (1000, 5000):
        found[f"departure-{clients}"] = Workload(
            f"{clients // scale:,} clients cut at once",
            DEPARTURE,
            ALL_OURS,
            clients,
            8 + clients / 500,
            each_alone(lambda place, server, n=clients // scale: departure(place, server, n)),
        )
    for name, deflate, title in (
        ("memory", False, "compression not offered"),
        ("memory-deflate", True, "permessage-deflate offered"),
    ):
        found[name] = Workload(
            f"Memory at {5000 // scale:,} connections, six subscriptions each (of others: bare "
            f"connections), {title}",
            MEMORY,
            EVERY,
            5000,
            14,
            each_alone(
                lambda place, server, deflate=deflate: memory(place, server, 5000 // scale, deflate)
            ),
        )
    found["metrics"] = Workload(
        "Metrics, read after each turn, by turns with a server without them: fan-out of one topic "
        "to 1,000 subscribers",
        METRICS,
        ("hypercorn",),
        1000,
        60,
        each_alone(
            lambda place, server: metrics(
                place, server, 1000, 5_000 if quick else 60_000, 2 if quick else 20
            )
        ),
    )
    found["operators"] = Workload(
        f"What operators ask with {10_000 // scale:,} connections: the longest step of the event "
        "loop meanwhile",
        OPERATORS,
        ("hypercorn",),
        10_000,
        40,
        each_alone(lambda place, server: operators(place, server, 10_000 // scale)),
    )
    for source, title in (
        ("sqlite", "from SQLite"),
        ("postgres", "from PostgreSQL"),
        ("memory", "from memory"),
        ("none", "without a source: what the idle connections cost"),
    ):
        found[f"polling-{source}"] = Workload(
            f"{10_000 // scale:,} watched users, four types, default intervals, every value "
            f"changing, {title}",
            POLLING,
            OURS,
            10_000,
            70,
            each_alone(
                lambda place, server, source=source: polling(
                    place, server, 10_000 // scale, 10.0 if quick else 30.0, source
                )
            ),
        )
    return found


WORKLOADS = workloads
