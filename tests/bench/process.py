"""A process that takes JSON commands by line: a server of the benchmark, or the load generator."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

__all__ = ["Failed", "Process"]


class Failed(Exception):
    """A process has died, or has not answered in time."""


class Process:
    """One process, which ends with the `with` block.

    Args:
        args: What is run.
        log: Where its standard error goes.
        environment: What it gets beyond this process's own.
        cpus: Where it may run.
    """

    def __init__(
        self,
        args: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        cpus: Collection[int] = (),
    ) -> None:
        self.log = log
        with log.open("wb") as errors, _only_on(cpus):
            self._process = subprocess.Popen(
                args,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **(environment or {})},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin
        self._stdout = self._process.stdout
        self._buffer = b""
        self._known = psutil.Process(self._process.pid)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._process.terminate()
        try:
            self._process.wait(3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()

    def ask(self, do: str, timeout_s: float = 60, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.send(do, **command)
        return self.answer(timeout_s)

    def send(self, do: str, **command: Any) -> None:
        try:
            self._stdin.write(json.dumps({"do": do, **command}).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise Failed(self._why("is gone")) from None

    def answer(self, timeout_s: float = 60) -> dict[str, Any]:
        """The next line that is an answer.

        Raises:
            Failed: There is none to come.
        """
        until = time.monotonic() + timeout_s
        while True:
            line, found, rest = self._buffer.partition(b"\n")
            if found:
                self._buffer = rest
                if line.startswith(b"{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
                continue
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._stdout], [], [], left)[0]:
                raise Failed(self._why(f"gave no answer in {timeout_s:.0f} s"))
            data = os.read(self._stdout.fileno(), 1 << 20)
            if not data:
                raise Failed(self._why("is gone"))
            self._buffer += data

    def _why(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        name = Path(self._process.args[1]).stem
        return f"{name} {what}: {lines[-1][:300] if lines else 'it says nothing'}"

    def cpu_s(self) -> float:
        """User and system seconds so far, of its children too."""
        return sum(map(_cpu_s, [self._known, *self._known.children(recursive=True)]))

    def private_bytes(self) -> int:
        """The memory that no other process shares."""
        every = [self._known, *self._known.children(recursive=True)]
        return sum(each.memory_full_info().uss for each in every)


@contextlib.contextmanager
def _only_on(cpus: Collection[int]) -> Iterator[None]:
    """A process that is started meanwhile runs on these, with all its threads."""
    if not cpus or not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def _cpu_s(process: psutil.Process) -> float:
    try:
        # The process's own clock, exact where its counters go in steps of 10 ms: the clock that
        # clock_getcpuclockid(3) gives, whose number is made of the process's.
        return time.clock_gettime((~process.pid << 3) | 2)
    except (OSError, AttributeError):
        times = process.cpu_times()
        return float(times.user + times.system)
