"""The benchmark: `nox -s bench`, or `python tests/bench/run.py` where all of it is installed.

Each server runs in a process of its own, its clients in another. In each round every server is
measured once, in another order each time; a fan-out is measured by turns with the floor,
so that the ratio to it is of the same moment. The figures are medians over the rounds, with the
lowest and the highest. A run on a machine that does other work shows it in the spread.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import report
from process import Failed
from workloads import SERVERS, WORKLOADS, Place, Skipped, Workload, where

RESULTS = Path(__file__).parent / "results"
PACKAGES = ["trading_push", "hypercorn", "trio", "trio-websocket", "picows", "websockets"]
PACKAGES += ["fastapi", "uvicorn", "uvloop", "litestar", "python-socketio"]
FILES_BESIDE = 200


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round with small counts")
    parser.add_argument(
        "--only", metavar="WORKLOADS", help="for example fanout,burst: those that begin so"
    )
    parser.add_argument("--servers", metavar="SERVERS", help=f"of {','.join(SERVERS)}")
    parser.add_argument(
        "--rounds", type=int, help="how many rounds (5; latency and memory 3; polling 2)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="a directory; a whole run writes to tests/bench/results, another to a new one. "
        "Workloads that are not run keep what an earlier run has put there",
    )
    parser.add_argument(
        "--where", action="store_true", help="where the memory of a connection is, and no more"
    )
    parser.add_argument(
        "--table", action="store_true", help="print what the last run found, for the README"
    )
    parser.add_argument("--list", action="store_true", help="name the workloads and their times")
    return parser.parse_args()


def raise_limit(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemExit(
            f"A process needs {needed} open files and may have {hard}: raise the limit (`ulimit "
            "-Hn`, as root), or leave out with --only what needs so many (--list shows it)."
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def chosen(names: str | None, known: Sequence[str], what: str) -> list[str]:
    if names is None:
        return list(known)
    found: list[str] = []
    for name in names.split(","):
        matching = [each for each in known if each == name or each.startswith(f"{name}-")]
        if not matching:
            raise SystemExit(f"There is no {what} {name!r}; there are {', '.join(known)}.")
        found += [each for each in matching if each not in found]
    return [each for each in known if each in found]


class Progress:
    """What is being measured and how much is left, on standard error."""

    def __init__(self, total_s: float) -> None:
        self.began = time.monotonic()
        self.total_s = total_s
        self.done_s = 0.0

    def say(self, text: str) -> None:
        elapsed = time.monotonic() - self.began
        pace = elapsed / self.done_s if self.done_s else 1.0
        left = max(0.0, self.total_s - self.done_s) * pace
        print(f"[{elapsed / 60:5.1f} min, {left / 60:5.1f} left] {text}", file=sys.stderr)


def rounds_of(name: str, options: argparse.Namespace) -> int:
    if options.rounds:
        return int(options.rounds)
    if options.quick:
        return 1
    if name == "metrics":  # which has rounds of its own
        return 1
    return 5 if name in ("fanout-1000", "burst-1000") else 2 if name.startswith("polling") else 3


def run(
    name: str, workload: Workload, servers: list[str], place: Place, rounds: int, progress: Progress
) -> dict[str, Any]:
    figures: dict[str, list[dict[str, float]]] = {each: [] for each in servers}
    errors: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    for number in range(rounds):
        turn = number % len(servers)
        with workload.begin(place) as measure:
            for each in [*servers[turn:], *servers[:turn]]:
                if each in skipped:
                    continue
                said = f"{name} {number + 1}/{rounds} {each}: "
                try:
                    measured = measure(SERVERS[each])
                    figures[each].append(measured)
                    said += ", ".join(
                        f"{measured[figure]:.4g} {unit}"
                        for figure, (unit, _) in workload.figures.items()
                    )
                except Skipped as error:
                    skipped[each] = str(error)
                    said += f"skipped, {error}"
                except Failed as error:
                    errors.setdefault(each, []).append(str(error))
                    said += f"FAILED, {error}"
                progress.done_s += workload.estimate_s
                progress.say(said)
    return {
        "title": workload.title,
        "figures": {key: {"unit": u, "meaning": m} for key, (u, m) in workload.figures.items()},
        "rounds": rounds,
        "servers": {
            each: {
                "title": SERVERS[each].title,
                "rounds": figures[each],
                **({"errors": errors[each]} if each in errors else {}),
                **({"skipped": skipped[each]} if each in skipped else {}),
            }
            for each in servers
        },
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "kernel": platform.release().split("-")[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    options = parsed()
    if options.table:
        print(report.markdown(report.earlier(options.output or RESULTS)))
        return 0
    known = WORKLOADS(options.quick)
    names = chosen(options.only, list(known), "workload")
    servers = chosen(options.servers, list(SERVERS), "server")
    plan = {name: [each for each in known[name].servers if each in servers] for name in names}
    total_s = sum(
        len(each)
        * rounds_of(name, options)
        * known[name].estimate_s
        * (0.4 if options.quick else 1)
        for name, each in plan.items()
    )
    if options.list:
        for name in names:
            workload = known[name]
            minutes = len(plan[name]) * rounds_of(name, options) * workload.estimate_s / 60
            print(f"{name:16} {minutes:4.0f} min {workload.files:6} files  {workload.title}")
        print(f"{'all':16} {total_s / 60:4.0f} min")
        return 0
    raise_limit(FILES_BESIDE + max(known[name].files for name in names))
    with tempfile.TemporaryDirectory() as directory:
        place = Place(Path(directory))
        if options.where:
            for each in (each for each in servers if SERVERS[each].ours):
                try:
                    report.print_where(SERVERS[each].title, where(place, SERVERS[each], 500), 500)
                except Skipped as error:
                    print(f"{each}: {error}")
            return 0
        whole = not (options.quick or options.only or options.servers)
        output = options.output or (RESULTS if whole else Path(tempfile.mkdtemp(prefix="bench-")))
        results = {
            "machine": {"cpus": os.cpu_count(), **cpu_model()},
            "versions": versions(),
            "workloads": report.earlier(output),
        }
        progress = Progress(total_s)
        for name in names:
            if not plan[name]:
                continue
            results["workloads"][name] = run(
                name, known[name], plan[name], place, rounds_of(name, options), progress
            )
            report.summarise(results["workloads"][name])
            report.print_table(name, results["workloads"][name])
            # After each, so that a run that is broken off leaves what it has.
            report.write(output, results)
        print(report.targets(results["workloads"]))
        print(f"\nIn {output}: {', '.join(sorted(each.name for each in output.iterdir()))}")
    failed = [
        each
        for name in names
        for each, found in results["workloads"].get(name, {}).get("servers", {}).items()
        if "errors" in found and SERVERS[each].ours
    ]
    return 1 if failed else 0


def cpu_model() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0]} if models else {}


if __name__ == "__main__":
    sys.exit(main())
