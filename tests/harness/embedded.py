"""`embedded_server.py`, run as a process and looked into."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.support import PATIENCE_S, TESTS, Process, process


class Embedded:
    """`embedded_server.py`, running."""

    def __init__(self, running: Process) -> None:
        self.process = running
        running.wait_for(lambda: len(running.out) == 2, "ports")
        self.port, self.native_port = map(int, running.out)
        self.ports = {"linked": self.port, "native": self.native_port}
        self.url = f"ws://127.0.0.1:{self.port}/ws"

    def look(self, command: str = "") -> dict[str, Any]:
        """What the server sees inside itself now, after a command that its program knows."""
        seen = len(self.process.out)
        assert self.process.popen.stdin is not None
        self.process.popen.stdin.write(f"{command}\n")
        self.process.wait_for(lambda: len(self.process.out) > seen, "answer")
        return json.loads(self.process.out[seen])

    def look_until(self, what: Any, why: str) -> dict[str, Any]:
        """Look again and again until `what` is true of what is seen."""
        deadline = time.monotonic() + PATIENCE_S
        while not what(seen := self.look()):
            assert time.monotonic() < deadline, f"{why} never came: {seen}"
            time.sleep(0.1)  # a look holds the server for as long
        return seen


@contextmanager
def embed(*flags: str, exact_memory: bool = True) -> Iterator[Embedded]:
    """Run `embedded_server.py` with these flags; its memory is only exact at a cost in speed."""
    # Python's own allocator keeps whole arenas: without it the memory in use is known exactly.
    # One arena and a fixed threshold: what is free can be given back whichever thread took it.
    env = {
        "PYTHONMALLOC": "malloc",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    command = [sys.executable, "-m", "harness.embedded_server", *flags]
    with process(*command, env=env if exact_memory else {}, cwd=TESTS) as running:
        yield Embedded(running)
