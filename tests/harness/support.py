"""What the tests share: tokens, real server processes, and a client of the wire protocol."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import hypercorn.config
import hypercorn.trio
import trio
import trio_websocket
from websockets.asyncio.client import ClientConnection, connect

from trading_push import PushService, issue_token
from trading_push.endpoints.asgi import AsgiEndpoint
from trading_push.endpoints.hypercorn import link as hypercorn_link
from trading_push.endpoints.hypercorn.server import guard

SECRET = "a secret of at least thirty-two bytes"
TESTS = Path(__file__).parents[1]
DATA = TESTS.parents[1] / "shared" / "data"
SIX = ["balance", "positions", "pnl", "orders", "ticker.BTCUSDT", "ticker.ETHUSDT"]
PATIENCE_S = 30
"""How long a test waits for what must happen; never how long it takes."""


def token(user: str | int = 4, ttl_s: float = 3600) -> str:
    return issue_token(SECRET, str(user), ttl_s)


# --- real processes ---------------------------------------------------------------------------


class Process:
    """A process whose output is read all the time and can be waited for, line by line."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None) -> None:
        self.command = command
        self.out: list[str] = []
        self.err: list[str] = []
        self._news = threading.Condition()
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            bufsize=1,
            env={**os.environ, **env},
            cwd=cwd,
            start_new_session=True,
        )
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.popen.stdout, self.out), (self.popen.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            with self._news:
                lines.append(line.rstrip("\n"))
                self._news.notify_all()

    def wait_for(self, what: Callable[[], Any], why: str) -> Any:
        """Wait until `what()` is true of the output so far; its value."""
        deadline = time.monotonic() + PATIENCE_S
        with self._news:
            while not (found := what()):
                left = deadline - time.monotonic()
                if left <= 0 or (self.popen.poll() is not None and not self._reading()):
                    raise AssertionError(f"no {why}; stdout: {self.out} stderr: {self.err}")
                self._news.wait(min(left, 0.5))
            return found

    def _reading(self) -> bool:
        return any(reader.is_alive() for reader in self._readers)

    def wait_for_line(self, text: str, stream: list[str] | None = None, count: int = 1) -> None:
        lines = self.err if stream is None else stream
        self.wait_for(lambda: sum(text in line for line in lines) >= count, f"line {text!r}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, unless it has ended; its exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(how)
        try:
            status = self.popen.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGKILL)
            raise AssertionError(f"{self.command} did not end; stderr: {self.err}") from None
        for reader in self._readers:
            reader.join(PATIENCE_S)
        return status

    def kill(self) -> None:
        """The end of everything that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            assert stream is not None
        for reader in self._readers:
            reader.join(PATIENCE_S)
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            with suppress(BrokenPipeError):
                stream.close()

    def traces(self) -> list[str]:
        return [line for line in self.err if line.startswith(("Traceback", "  File "))]


@contextmanager
def process(
    *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[Process]:
    running = Process(command, env=env or {}, cwd=cwd)
    try:
        yield running
    finally:
        running.kill()


@contextmanager
def serving(
    home: Path,
    *flags: str,
    program: Sequence[str] = ("-m", "trading_push"),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    secret: str | None = SECRET,
) -> Iterator[Process]:
    """`trading-push serve` on a free port, with the tests' secret; `url` is its WebSocket."""
    command = [sys.executable, *program, "serve", "--port", "0", *flags]
    environment = {
        **({} if secret is None else {"TRADING_PUSH_JWT_SECRET": secret}),
        "XDG_DATA_HOME": str(home),
        **(env or {}),
    }
    with process(*command, env=environment, cwd=cwd) as running:
        running.wait_for_line("Serving on", running.out)
        found = re.search(r"WebSocket (ws://[^)]+)\)", "\n".join(running.out))
        assert found, running.out
        running.url = found[1]
        yield running


@contextmanager
def plain_hypercorn(
    home: Path,
    *flags: str,
    app: str = "trading_push.asgi:app",
    env: Mapping[str, str] | None = None,
) -> Iterator[Process]:
    """The plain `hypercorn` command; `url` is its WebSocket."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "hypercorn", "--worker-class", "trio"),
        *("--bind", f"127.0.0.1:{port}", *flags, app),
    ]
    environment = {
        "TRADING_PUSH_JWT_SECRET": SECRET,
        "XDG_DATA_HOME": str(home),
        **(env or {}),
    }
    with process(*command, env=environment, cwd=TESTS) as running:
        running.wait_for_line("Running on")
        running.wait_for_line("启动交易数据WebSocket推送服务")
        running.url = f"ws://127.0.0.1:{port}/ws"
        yield running


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- a client of the wire protocol, on asyncio --------------------------------------------------


class Client:
    """What a trader's front end does, with the `websockets` library."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.pushes: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        return json.loads(await self.socket.recv())

    async def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request; its reply. Pushes that come before it are kept."""
        await self.socket.send(json.dumps({"op": op, **fields}))
        while "op" not in (message := await self.receive()):
            self.pushes.append(message)
        return message

    async def authenticate(self, user: str | int) -> None:
        reply = await self.request("auth", token=token(user))
        assert reply["ok"], reply

    async def subscribe(self, *args: Any) -> None:
        reply = await self.request("subscribe", args=list(args))
        assert reply["ok"], reply

    async def push(self) -> dict[str, Any]:
        return self.pushes.pop(0) if self.pushes else await self.receive()

    async def until(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while not what(message := await self.push()):
            pass
        return message

    async def until_snapshots(self, channels: Sequence[str]) -> None:
        missing = set(channels)
        while missing:
            message = await self.push()
            if message["type"] == "snapshot":
                missing.discard(message["channel"])


@asynccontextmanager
async def client(url: str, user: str | int | None = None, **options: Any) -> AsyncIterator[Client]:
    async with connect(url, **{"compression": None, "open_timeout": PATIENCE_S, **options}) as ws:
        made = Client(ws)
        if user is not None:
            await made.authenticate(user)
        yield made


# --- a service in this process, on trio ---------------------------------------------------------


async def until(what: Callable[[], Any]) -> None:
    """Look, again and again, until it is so; for what only a look from outside shows."""
    with trio.fail_after(PATIENCE_S):
        while not what():
            await trio.sleep(0.005)


@asynccontextmanager
async def hypercorn_serving(app: AsgiEndpoint | PushService, **config: Any) -> AsyncIterator[int]:
    """Serve an ASGI application with guarded Hypercorn in this process; the port."""
    hypercorn_link.install(guard.limits)
    settings = hypercorn.config.Config.from_mapping(
        {
            "bind": ["127.0.0.1:0"],
            "errorlog": None,
            "graceful_timeout": 0.5,
            "backlog": 4096,
            **config,
        }
    )
    async with trio.open_nursery() as nursery:
        served = getattr(app, "asgi_app", app)
        binds = await nursery.start(
            partial(
                hypercorn.trio.serve,
                served,
                settings,
                shutdown_trigger=trio.sleep_forever,
                mode="asgi",
            )
        )
        yield int(binds[0].rsplit(":", 1)[1])
        nursery.cancel_scope.cancel()


class TrioClient:
    """The same client on trio-websocket, for tests with a service in the same process."""

    def __init__(self, socket: trio_websocket.WebSocketConnection) -> None:
        self.socket = socket
        self.pushes: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        return json.loads(await self.socket.get_message())

    async def request(self, op: str, **fields: Any) -> dict[str, Any]:
        await self.socket.send_message(json.dumps({"op": op, **fields}))
        while "op" not in (message := await self.receive()):
            self.pushes.append(message)
        return message

    async def push(self) -> dict[str, Any]:
        return self.pushes.pop(0) if self.pushes else await self.receive()


@asynccontextmanager
async def trio_client(
    port: int, user: str | int | None = None, *channels: Any, **options: Any
) -> AsyncIterator[TrioClient]:
    async with trio.open_nursery() as nursery:
        socket = await trio_websocket.connect_websocket(
            nursery, "127.0.0.1", port, "/ws", use_ssl=False, **options
        )
        made = TrioClient(socket)
        if user is not None:
            reply = await made.request("auth", token=token(user))
            assert reply["ok"], reply
        if channels:
            reply = await made.request("subscribe", args=list(channels))
            assert reply["ok"], reply
        try:
            yield made
            with trio.move_on_after(2):
                await socket.aclose()
        finally:
            socket._stream.socket.close()  # its own clean-up leaves it open at some ends
        nursery.cancel_scope.cancel()
