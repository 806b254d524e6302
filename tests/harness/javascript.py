"""The JavaScript client where it runs: in Node, and in a browser.

A test gives the code, which tells it by `say` what came of it (`javascript_prelude.js` has all
that the code finds at hand).
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from harness import browser
from harness.support import PATIENCE_S, process

__all__ = ["KINDS", "Javascript", "Place", "node_modules", "running"]

KINDS: Final = ("node", "node-own", "chromium")
"""Node with the package `ws`, a Node that has a WebSocket of its own, and a browser."""

CLIENT: Final = Path(str(resources.files("trading_push.web"))) / "static" / "trading-push.js"
PRELUDE: Final = Path(__file__).with_name("javascript_prelude.js")

_HUB: Final = """\
<!doctype html><script type="module">
const frames = new Map();
for (;;) {
  const { start, stop } = await (await fetch("/next")).json();
  if (start) {
    const frame = document.createElement("iframe");
    frame.src = `/run/${start}`;
    frames.set(start, frame);
    document.body.append(frame);
  }
  frames.get(stop)?.remove();
}
</script><body></body>"""
_PAGE: Final = '<!doctype html><script type="module" src="/code/{number}"></script>'
_HEAD: Final = """\
import {{ connect, Refused, Unreachable }} from {client};
import {{ doze, eager, hasten, pause, say, tell, tellStates, until }} from {prelude};
const given = {given};
const {{ url }} = given;
{own}
"""


def node_modules() -> Path | None:
    """Where npm has put what the tests need: `TESTS_NODE_MODULES`."""
    given = os.environ.get("TESTS_NODE_MODULES")
    return Path(given) if given else None


class Javascript:
    """A program in JavaScript, and what it has said so far."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.said: list[Any] = []
        self._look = look

    async def until(self, what: Callable[[], Any]) -> Any:
        """Wait until `what()` is true; its value."""
        with trio.move_on_after(PATIENCE_S):
            while True:
                self._look()
                if found := what():
                    return found
                await trio.sleep(0.005)
        raise AssertionError(f"it has said only {self.said}")

    async def says(self, count: int) -> list[Any]:
        """Wait until it has said so much; the beginning of it."""
        await self.until(lambda: len(self.said) >= count)
        return self.said[:count]

    async def until_said(self, what: Any) -> None:
        """Wait until it has said just this."""
        await self.until(lambda: what in self.said)


class _Handler(BaseHTTPRequestHandler):
    """Serves the pages of `_Hub`."""

    server: _Hub

    def do_GET(self) -> None:
        _, _, number = self.path.rpartition("/")
        kind, body = "text/javascript", ""
        match self.path.split("/")[1]:
            case "hub":
                kind, body = "text/html", _HUB
            case "run":
                kind, body = "text/html", _PAGE.format(number=number)
            case "next":
                try:
                    command = self.server.commands.get(timeout=5)
                except queue.Empty:
                    command = {}
                kind, body = "application/json", json.dumps(command)
            case "code":
                body = self.server.codes.get(int(number), "")
            case "client.js":
                body = CLIENT.read_text("utf-8")
            case "prelude.js":
                body = PRELUDE.read_text("utf-8")
        self._answer(kind, body)

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        lines = self.rfile.read(length).decode().splitlines()
        number = int(self.path.rpartition("/")[2])
        self.server.said.setdefault(number, []).extend(map(json.loads, lines))
        self._answer("text/plain", "")

    def _answer(self, kind: str, body: str) -> None:
        data = body.encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Hub(ThreadingHTTPServer):
    """One browser for many tests: a page that runs the code of each in a frame of its own."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commands: queue.Queue[dict[str, int]] = queue.Queue()
        self.codes: dict[int, str] = {}
        self.said: dict[int, list[Any]] = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the browser is ended while it asks


class Place:
    """Where code runs.

    Args:
        kind: One of `KINDS`.
        start: Starts some code, with what it is given.
    """

    def __init__(
        self, kind: str, start: Callable[[str, dict[str, Any]], AbstractAsyncContextManager[Any]]
    ) -> None:
        self.kind = kind
        self._start = start

    def run(self, code: str, **given: Any) -> AbstractAsyncContextManager[Javascript]:
        """Run a program while the block lasts; `given` is at hand in it as an object."""
        return self._start(code, given)


@contextmanager
def running(kind: str, home: Path) -> Iterator[Place]:
    """A place of one kind; skips where that is not installed.

    Args:
        kind: One of `KINDS`.
        home: A directory for files.
    """
    if kind == "chromium":
        program = browser.find_browser()
        if program is None:
            pytest.skip(f"no browser is installed: {', '.join(browser.BROWSERS)}")
        with _Hub() as hub:
            threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
            url = f"http://127.0.0.1:{hub.server_address[1]}/hub"
            with process(program, *browser.BROWSER_FLAGS, f"--user-data-dir={home}", url):
                yield Place(kind, lambda code, given: _in_frame(hub, code, given))
            hub.shutdown()
        return
    program, own = _node(kind)
    yield Place(kind, lambda code, given: _in_node(program, own, home, code, given))


def _node(kind: str) -> tuple[str, str]:
    """Node, and the line that hands its WebSocket in."""
    modules = node_modules()
    if kind == "node":
        program = shutil.which("node")
        if program is None:
            pytest.skip("Node is not installed")
        if modules is None or not (modules / "ws").is_dir():
            pytest.skip("npm's package `ws` is not in $TESTS_NODE_MODULES")
        path = json.dumps(str(modules / "ws" / "index.js"))
        return program, f"const WebSocket = (await import({path})).default;"
    here = str(modules / "node" / "bin" / "node") if modules else None
    for program in filter(None, (shutil.which("node"), here)):
        version = _version(program)
        if version >= 22:
            return program, "const { WebSocket } = globalThis;"
    pytest.skip("no Node 22, which has a WebSocket of its own, is installed")


def _version(program: str) -> int:
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(said.stdout.removeprefix("v").split(".")[0])


@asynccontextmanager
async def _in_node(
    program: str, own: str, home: Path, code: str, given: dict[str, Any]
) -> AsyncIterator[Javascript]:
    head = _HEAD.format(
        client=json.dumps(CLIENT.as_uri()),
        prelude=json.dumps(PRELUDE.as_uri()),
        given=json.dumps(given),
        own=own,
    )
    # Node takes a file for a module by its name: the client's has its package.json beside it.
    file = home / f"test-{os.urandom(4).hex()}.mjs"
    file.write_text(head + code, "utf-8")
    with process(program, "--no-warnings", str(file)) as node:

        def look() -> None:
            made.said[:] = [json.loads(line) for line in node.out]
            assert not node.err, node.err

        made = Javascript(look)
        yield made
        look()


@asynccontextmanager
async def _in_frame(hub: _Hub, code: str, given: dict[str, Any]) -> AsyncIterator[Javascript]:
    number = len(hub.codes) + 1
    hub.codes[number] = (
        _HEAD.format(
            client='"/client.js"', prelude='"/prelude.js"', given=json.dumps(given), own=""
        )
        + code
    )
    hub.commands.put({"start": number})

    def look() -> None:
        made.said[:] = list(hub.said.get(number, []))

    made = Javascript(look)
    try:
        yield made
        look()
    finally:
        hub.commands.put({"stop": number})
