"""What the benchmark has found: medians and spreads as tables, a JSON file and a chart."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

__all__ = ["earlier", "markdown", "print_table", "print_where", "summarise", "targets", "write"]

JSON = "benchmark.json"
CHART = "benchmark.svg"


def earlier(directory: Path) -> dict[str, Any]:
    """The workloads of an earlier run."""
    file = directory / JSON
    if not file.exists():
        return {}
    found: dict[str, Any] = json.loads(file.read_text())["workloads"]
    return found


def summarise(workload: dict[str, Any]) -> None:
    """Add the median, the lowest and the highest of each figure over the rounds."""
    for server in workload["servers"].values():
        rounds = server["rounds"]
        for figure in workload["figures"] if rounds else ():
            values = [measured[figure] for measured in rounds]
            server[figure] = {
                "median": statistics.median(values),
                "low": min(values),
                "high": max(values),
            }


def print_table(name: str, workload: dict[str, Any]) -> None:
    figures = workload["figures"]
    print(f"\n{name}: {workload['title']}; median of {workload['rounds']} (lowest-highest)")
    heads = [f"{f['meaning']}, {f['unit']}" for f in figures.values()]
    print(f"  {'':26}" + "".join(f"{head:>32}" for head in heads))
    for server in workload["servers"].values():
        cells = [
            f"{show(server[f]['median'])} ({show(server[f]['low'])}-{show(server[f]['high'])})"
            for f in figures
            if f in server
        ]
        note = server.get("skipped") or "; ".join(server.get("errors", ()))
        print(f"  {server['title']:26}" + "".join(f"{cell:>32}" for cell in cells), note[:120])


COLUMNS = [
    ("fanout-1000", "cpu_us", "a delivery to 1,000, µs"),
    ("fanout-1000", "ratio", "× the floor"),
    ("burst-1000", "cpu_us", "one of a burst, µs"),
    ("latency", "p99_ms", "latency p99, ms"),
    ("arrival-2000", "cpu_us", "arrival, µs"),
    ("memory", "kb", "memory, KB"),
]


def markdown(workloads: dict[str, Any]) -> str:
    """The medians as a table of Markdown, as the README shows it."""
    columns = [column for column in COLUMNS if column[0] in workloads]
    rows = [["", *(title for _, _, title in columns)], ["---", *("---:" for _ in columns)]]
    servers = {
        server: found["title"]
        for name, _, _ in columns
        for server, found in workloads[name]["servers"].items()
    }
    for server, title in servers.items():
        found = [workloads[name]["servers"].get(server, {}).get(key) for name, key, _ in columns]
        rows.append([title, *("" if each is None else show(each["median"]) for each in found)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def show(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 20 else f"{value:.2f}"


def write(directory: Path, results: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(results), indent=1, ensure_ascii=False)
    (directory / JSON).write_text(text + "\n")
    try:
        draw(directory / CHART, results["workloads"])
    except ImportError:
        print("No chart: matplotlib is not installed.")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# --- the chart -------------------------------------------------------------------------------

PANELS = [
    ("fanout-1000", "cpu_us", "Server CPU a delivery, 1,000 subscribers (µs)"),
    ("burst-1000", "cpu_us", "Server CPU a delivery, bursts of 10 (µs)"),
    ("latency", "p99_ms", "Latency p99, 1,000 subscribers (ms)"),
    ("memory-deflate", "kb", "Memory a connection, six subscriptions (KB)"),
]
OURS, PEER, FLOOR = "#0b7a5b", "#9aa5b1", "#3d4852"
OF_OURS = ("hypercorn", "native", "plain")


def draw(file: Path, workloads: dict[str, Any]) -> None:
    """The panels that there are figures for."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "trading_push", "font.size": 9})
    import matplotlib.pyplot as plt

    panels = [each for each in PANELS if each[0] in workloads]
    if not panels:
        return
    rows = (len(panels) + 1) // 2
    columns = min(2, len(panels))
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.4 * columns, 3.1 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, key, title) in zip(axes.flat, panels, strict=False):
        bars = [
            (server[key], server["title"], each)
            for each, server in workloads[name]["servers"].items()
            if key in server and not (each == "floor" and key in ("kb", "p99_ms"))
        ]
        bars.sort(key=lambda bar: -bar[0]["median"])
        middles = [bar[0]["median"] for bar in bars]
        spread = [
            [bar[0]["median"] - bar[0]["low"] for bar in bars],
            [bar[0]["high"] - bar[0]["median"] for bar in bars],
        ]
        colours = [
            FLOOR if bar[2] == "floor" else OURS if bar[2] in OF_OURS else PEER for bar in bars
        ]
        # A slow one would make the others' differences too small to see.
        limit = 4 * statistics.median(middles)
        shown = [min(middle, limit) for middle in middles]
        axis.barh(
            range(len(bars)), shown, color=colours, xerr=spread, ecolor="#00000066", capsize=2
        )
        axis.set_yticks(range(len(bars)), [bar[1] for bar in bars])
        for row, middle in enumerate(middles):
            axis.annotate(
                show(middle) + (" →" if middle > limit else ""),
                (shown[row] + (spread[1][row] if middle <= limit else 0), row),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axis.set_xlim(0, min(limit, max(middles)) * 1.18)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)


# --- what is asked for -----------------------------------------------------------------------


def targets(workloads: dict[str, Any]) -> str:
    """The figures against what is asked of them, as far as they were measured."""

    def of(workload: str, server: str, figure: str) -> float | None:
        found = workloads.get(workload, {}).get("servers", {}).get(server, {}).get(figure)
        return None if found is None else float(found["median"])

    def among(workload: str, servers: tuple[str, ...], figure: str) -> float | None:
        values = [value for each in servers if (value := of(workload, each, figure)) is not None]
        return min(values) if values else None

    python_peers = ("websockets", "fastapi", "litestar", "socketio")
    lines: list[str] = []

    def check(text: str, value: float | None, base: float | None, factor: float) -> None:
        if value is None or base is None:
            return
        bound = base * factor
        verdict = "yes" if value <= bound else "NO"
        lines.append(f"  {verdict:4} {text}: {show(value)}, at most {show(bound)}")

    for server, factor in (("hypercorn", 1.15), ("native", 1.10)):
        for count in (1000, 100, 5000):
            name = f"fanout-{count}"
            check(f"{server}, {name}, ratio to the floor", of(name, server, "ratio"), 1.0, factor)
        name = "fanout-1000"
        cpu = of(name, server, "cpu_us")
        check(f"{server}, {name}, to Python peers", cpu, among(name, python_peers, "cpu_us"), 1.0)
        ratio = of(name, server, "ratio")
        check(f"{server}, {name}, to picows (ratios)", ratio, of(name, "picows", "ratio"), 1.1)
        check(
            f"{server}, a message of a burst to a single one",
            of("burst-1000", server, "cpu_us"),
            cpu,
            0.25,
        )
        for what, figure in (
            ("arrival", "seconds"),
            ("arrival", "cpu_us"),
            ("departure", "zero_s"),
            ("departure", "logged_s"),
        ):
            value, base = of(f"{what}-5000", server, figure), of(f"{what}-1000", server, figure)
            factor_5 = 6 / 5 if figure == "cpu_us" else 6
            check(f"{server}, {what}, {figure}, 5,000 to 1,000", value, base, factor_5)
        p99 = of("latency", server, "p99_ms")
        check(
            f"{server}, latency p99 to Python peers",
            p99,
            among("latency", (*python_peers, "picows"), "p99_ms"),
            1.0,
        )
        check(
            f"{server}, latency p99 with stalled clients to without",
            of("latency-stalled", server, "p99_ms"),
            p99,
            1.5,
        )
        limit = 42 if server == "hypercorn" else 38
        plain, offered = of("memory", server, "kb"), of("memory-deflate", server, "kb")
        check(f"{server}, KB a connection", plain, limit, 1)
        check(f"{server}, KB a connection, deflate offered", offered, limit, 1)
        if plain is not None and offered is not None:
            check(f"{server}, KB more with deflate offered", offered - plain, 5, 1)
        check(
            f"{server}, arrival, CPU to FastAPI's bare handshake",
            of("arrival-2000", server, "cpu_us"),
            of("arrival-2000", "fastapi", "cpu_us"),
            2,
        )
        check(f"{server}, SQLite, % of a core", of("polling-sqlite", server, "core_percent"), 20, 1)
        check(f"{server}, SQLite, lag p99 in ms", of("polling-sqlite", server, "lag_p99_ms"), 5, 1)
    return "\nWhat is asked for:\n" + "\n".join(lines) if lines else ""


def print_where(title: str, found: dict[str, Any], clients: int) -> None:
    print(f"\n{title}: bytes of a connection with six subscriptions, by tracemalloc")
    for name in ("packages", "lines"):
        print(f"  by {name}")
        for line, size in found[name].items():
            print(f"  {size / clients:9,.0f}  {line}")
