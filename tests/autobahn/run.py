"""The fuzzing client of Autobahn|Testsuite against an echo at each endpoint: `nox -s autobahn`.

It fails where a case is not passed, and where a server's log has a trace.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
ENDPOINTS = ("linked", "native")
# 12 and 13 are permessage-deflate, which neither endpoint agrees to.
CASES = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.*", "10.*"]
PASSED = ("OK", "NON-STRICT", "INFORMATIONAL")
TRACE = "Traceback (most recent call last)"


@contextmanager
def echo(kind: str, log: IO[str]) -> Iterator[str]:
    """The URL of an echo server, which runs as long as the context."""
    running = subprocess.Popen(
        [sys.executable, str(HERE / "echo.py"), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert running.stdin is not None
    assert running.stdout is not None
    try:
        yield f"ws://127.0.0.1:{int(running.stdout.readline())}"
        running.stdin.close()
        status = running.wait(30)
        if status != 0:
            sys.exit(f"the echo at the {kind} endpoint ended with status {status}")
    finally:
        running.kill()
        running.wait()
        running.stdout.close()


def fuzz(wstest: str, cases: list[str], place: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What each case came to, by endpoint, and the servers' logs."""
    logs = {kind: place / f"{kind}.log" for kind in ENDPOINTS}
    with ExitStack() as stack:
        servers = []
        for kind in ENDPOINTS:
            log = stack.enter_context(logs[kind].open("w", encoding="utf-8"))
            servers.append({"agent": kind, "url": stack.enter_context(echo(kind, log))})
        specification = {"outdir": str(place / "reports"), "servers": servers, "cases": cases}
        specification |= {"exclude-cases": [], "exclude-agent-cases": {}}
        path = place / "fuzzingclient.json"
        path.write_text(json.dumps(specification), encoding="utf-8")
        said = subprocess.run(
            [wstest, "--mode", "fuzzingclient", "--spec", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=place,
        )
    index = place / "reports" / "index.json"
    if said.returncode or not index.exists():
        sys.exit(f"{said.stdout}\n{wstest} ended with status {said.returncode}")
    read = {kind: log.read_text(encoding="utf-8") for kind, log in logs.items()}
    return json.loads(index.read_text(encoding="utf-8")), read


def table(report: dict[str, Any]) -> Iterator[str]:
    """How many cases of each group came to what, one line each."""
    for kind in ENDPOINTS:
        groups: dict[int, Counter[str]] = {}
        for case, outcome in report.get(kind, {}).items():
            group = groups.setdefault(int(case.split(".")[0]), Counter())
            group[outcome["behavior"]] += 1
        for group in sorted(groups):
            counts = ", ".join(f"{n} {what}" for what, n in sorted(groups[group].items()))
            yield f"{kind:<8} {f'{group}.*':<5} {counts}"
        total = sum((groups[group] for group in groups), Counter[str]())
        counts = ", ".join(f"{n} {what}" for what, n in sorted(total.items()))
        yield f"{kind:<8} all   {counts or 'nothing'}"


def failures(report: dict[str, Any], logs: dict[str, str]) -> Iterator[str]:
    """What must not be, one line each."""
    ran = [set(report.get(kind, {})) for kind in ENDPOINTS]
    if not ran[0] or any(cases != ran[0] for cases in ran):
        yield "not the same cases ran at every endpoint"
    for kind, cases in report.items():
        for case, outcome in cases.items():
            # UNIMPLEMENTED is no pass either.
            if not {outcome["behavior"], outcome["behaviorClose"]} <= set(PASSED):
                said = f"{outcome['behavior']}, close {outcome['behaviorClose']}"
                yield f"{kind}: case {case}: {said}: {outcome['reportfile']}"
    for kind, log in logs.items():
        if TRACE in log:
            yield f"{kind}: the server's log has a trace:\n{log[log.index(TRACE) :][:4000]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wstest", required=True, help="the command of autobahntestsuite")
    parser.add_argument("--reports", type=Path, help="where to keep the reports and the logs")
    parser.add_argument("cases", nargs="*", default=CASES, help="for example 1.* 7.1.1")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        place = given.reports or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        report, logs = fuzz(given.wstest, given.cases, place.resolve())
    print(*table(report), sep="\n")
    print(f"{time.monotonic() - began:.0f} s")
    found = list(failures(report, logs))
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
