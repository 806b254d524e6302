"""The command line, as a real process wherever it matters."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from harness.scripted_server import Peer, server

from trading_push.cli import commands as cli
from trading_push.cli import token as token_command
from trading_push.cli.escaping import escaped
from trading_push.settings.consistency import is_loopback

COMMAND = [sys.executable, "-m", "trading_push"]
BALANCE = ["watch", "--data", "balance"]
SECRET = "0123456789abcdef0123456789abcdef"
WAIT_S = 30


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No setting from outside, and a data directory of this test's own, which is returned."""
    for name in list(os.environ):
        if name.startswith("TRADING_PUSH_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parent.parent.parent))
    return tmp_path / "data" / "trading-push"


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the command in this process: its exit status, standard output and error."""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main([*args])
        out, err = capfd.readouterr()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, out, err

    return run


async def finished(process: trio.Process) -> int:
    with trio.fail_after(WAIT_S):
        return await process.wait()


class Lines:
    """The lines of a process's output, one at a time."""

    def __init__(self, stream: trio.abc.ReceiveStream | None) -> None:
        assert stream is not None
        self._stream = stream
        self._rest = b""

    async def next(self) -> str:
        """The next line without its end; empty at the end of the output."""
        with trio.fail_after(WAIT_S):
            while b"\n" not in self._rest:
                data = await self._stream.receive_some()
                if not data:
                    break
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()


async def start(*args: str, **options: Any) -> trio.Process:
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options}
    return await trio.lowlevel.open_process([*COMMAND, *args], stderr=subprocess.PIPE, **options)


@asynccontextmanager
async def running(*args: str, **options: Any) -> AsyncIterator[trio.Process]:
    """A process of the command, which is killed at the end if it is still there."""
    process = await start(*args, **options)
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                await trio.aclose_forcefully(stream)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("nope", "No such command 'nope'"),
        ("serve --nope", "--nope"),
        ("serve --port abc", "server.port is 'abc': give a whole number"),
        ("serve --port 65536", "server.port"),
        ("serve --speed 0", "market.speed"),
        ("serve --lang fr", "log.lang is 'fr': give one of zh, en, auto"),
        ("serve --log-format xml", "log.format"),
        ("serve --interval balance", "give TYPE=SECONDS"),
        ("serve --interval balnce=1", "did you mean intervals.balance?"),
        ("serve --interval balance=0", "intervals.balance is 0.0"),
        ("serve --config /nope.toml", "there is no configuration file '/nope.toml'"),
        ("serve --host 0.0.0.0", "set TRADING_PUSH_JWT_SECRET"),
        ("serve --host ::", "set TRADING_PUSH_JWT_SECRET"),
        ("serve --host example.com", "set TRADING_PUSH_JWT_SECRET"),
        ("token", "Missing option '--user'"),
        ("token --user", "--user"),
        ("token --user 4 --ttl 0", "--ttl"),
        ("token --user " + "x" * 65, "1 to 64 characters"),
        ("watch", "give --token, or set TRADING_PUSH_TOKEN"),
        ("watch --token é", "give --token"),
        ("watch --token t --count 0", "--count"),
        ("watch --token t --data , --ticker ,", "nothing to watch"),
        ("watch http://x --token t", "give one like ws://127.0.0.1:8000/ws"),
        ("init /dev/null", "is a file"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_status_2(
    call: Callable[..., tuple[int, str, str]], args: str, says: str
) -> None:
    status, out, err = call(*args.split(" "))
    assert status == 2
    assert out == ""
    assert err.startswith("trading-push: ")
    assert err.count("\n") == 1
    assert says in err


def test_the_environment_is_checked_too(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRADING_PUSH_JWT_SECRT", "x")
    status, _, err = call("serve")
    assert (status, "did you mean TRADING_PUSH_JWT_SECRET?" in err) == (2, True)
    monkeypatch.delenv("TRADING_PUSH_JWT_SECRT")
    monkeypatch.setenv("TRADING_PUSH_JWT_SECRET", "hunter2")
    status, out, err = call("token", "--user", "4")
    assert (status, "32 bytes" in err, "hunter2" in out + err) == (2, True, False)


def test_no_control_character_of_an_argument_reaches_the_terminal(
    call: Callable[..., tuple[int, str, str]],
) -> None:
    status, _, err = call("serve", "--config", "/\x1b[31m\n\u202e")
    assert status == 2
    assert err.rstrip("\n").isprintable()


def test_a_bug_shows_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_command, "load_settings", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["token", "--user", "4"])


def test_help_tells_the_exit_statuses() -> None:
    for args in (["--help"], ["watch", "--help"]):
        done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 0
        assert re.search(
            r"(?s)0 .*success.*2 .*wrong usage.*3 .*refused.*4 .*answered", done.stdout
        )


def test_a_token_of_the_demo(environment: Path) -> None:
    args = [*COMMAND, "token", "--user", "4", "--ttl", "60"]
    done = subprocess.run(args, capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stderr) == (0, "")
    token = done.stdout.removesuffix("\n")
    secret = (environment / "jwt-secret").read_text()
    claims = jwt.decode(token, secret, ["HS256"])
    assert claims["sub"] == "4"
    assert claims["exp"] == pytest.approx(time.time() + 60, abs=20)


def test_a_token_of_the_configured_secret_says_what_is_asked_for(
    call: Callable[..., tuple[int, str, str]],
    environment: Path,
    tmp_path: Path,
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f'jwt_secret = "{SECRET}"\n[auth]\naudience = "a"\nissuer = "i"')
    status, out, _ = call("token", "--user", "4", "--config", str(config))
    assert status == 0
    claims = jwt.decode(out.strip(), SECRET, ["HS256"], audience="a", issuer="i")
    assert claims["exp"] == pytest.approx(time.time() + 3600, abs=20)
    assert not environment.exists()


def test_no_token_where_only_a_public_key_is_known(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[auth]\nalgorithm = "RS256"\njwks_url = "https://id.example.com/keys"')
    status, out, err = call("token", "--user", "4", "--config", str(config))
    assert (status, out) == (2, "")
    assert "ask whoever issues yours" in err


def test_init_writes_a_sample_once(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    directory = tmp_path / "new" / "place"
    status, out, err = call("init", str(directory))
    assert (status, err) == (0, "")
    path = directory / "trading-push.toml"
    assert str(path) in out
    assert "# port = 8000" in path.read_text()
    others = {"trading-push.service", "nginx.conf", "Caddyfile"}
    assert {each.name for each in directory.iterdir()} == {path.name, *others}
    assert "reverse_proxy" in (directory / "Caddyfile").read_text()
    for name in others - {"Caddyfile"}:
        (directory / name).unlink()
    path.write_text("mine")
    status, out, err = call("init", str(directory))
    assert (status, out) == (2, "")
    assert "is there already" in err
    assert path.read_text() == "mine"
    path.unlink()
    assert call("init", str(directory))[0] == 2  # for the Caddyfile's sake
    assert [each.name for each in directory.iterdir()] == ["Caddyfile"]


def test_which_hosts_are_this_machine_alone() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "localhost.example.com"]))


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text())
def test_escaped_text_steers_no_terminal_and_json_reads_it_back(text: str) -> None:
    line = escaped(json.dumps(text, ensure_ascii=False))
    assert json.loads(line) == text
    assert not re.search("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]", line)
    assert not re.search("[\ud800-\udfff]", line)


# --- watch ------------------------------------------------------------------------------------


async def test_watch_prints_one_json_push_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(peer: Peer, number: int) -> None:
        assert await peer.authenticate() == "the-token"
        items = await peer.subscribe()
        if number == 0:
            assert items == ["balance", "orders", "ticker.BTCUSDT"]
            await peer.push(1)
            await trio.aclose_forcefully(peer.websocket._stream)  # it comes back
            return
        await peer.websocket.send_message(
            '{"channel":"balance",\n"type":"update","epoch":"e","prev":1,"seq":2,"ts":1,'
            '"data":"\x9b31m\u202e\\u001b"}'
        )
        for seq in range(3, 10):
            await peer.push(seq, seq - 1)
        await peer.until_closed()

    monkeypatch.setenv("TRADING_PUSH_TOKEN", "the-token")
    args = ["--data", "balance,orders,balance", "--ticker", " BTCUSDT", "--count", "3"]
    async with server(script) as url, running("watch", url, *args) as process:
        lines = Lines(process.stdout)
        printed = [await lines.next() for _ in range(4)]
        assert await finished(process) == 0
    assert [json.loads(line)["seq"] for line in printed[:3]] == [1, 2, 3]
    assert json.loads(printed[1])["data"] == "\x9b31m\u202e\x1b"
    assert printed[1].isprintable()
    assert printed[3] == ""


async def test_watch_shows_what_the_server_offers_where_nothing_is_named() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.authenticate()
        request = await peer.receive("channels")
        offered = [{"channel": name, "kind": "state", "of_later": 1} for name in ("margin", "pnl")]
        if number == 0:
            error = {"code": "rate_limited", "message": "later", "retryable": True}
            await peer.send(op="channels", id=request["id"], ok=False, error=error)
            await peer.until_closed()
            return
        await peer.send(op="channels", id=request["id"], ok=True, channels=[*offered, "odd", {}])
        assert await peer.subscribe() == ["ticker.A", "margin", "pnl"]
        await peer.push(1, channel="margin")
        await peer.until_closed()

    args = ["--token", "t", "--ticker", "A", "--count", "1"]
    async with server(script) as url, running("watch", url, *args) as process:
        assert json.loads(await Lines(process.stdout).next())["channel"] == "margin"
        assert await finished(process) == 0


async def test_watch_of_a_server_that_does_not_tell_says_what_to_do() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.authenticate()
        request = await peer.receive("channels")
        error = {"code": "unknown_op", "message": "no", "retryable": False}
        await peer.send(op="error", id=request["id"], ok=False, error=error)
        await peer.until_closed()

    async with server(script) as url, running("watch", url, "--token", "t") as process:
        line = await Lines(process.stderr).next()
        assert await finished(process) == 3
    assert "name the channels" in line


@pytest.mark.parametrize(("what", "status"), [("token", 3), ("channel", 3), ("kicked", 3)])
async def test_watch_tells_refused(what: str, status: int) -> None:
    async def script(peer: Peer, number: int) -> None:
        if what == "token":
            request = await peer.receive("auth")
            error = {"code": "bad_token", "message": "no \x1b[31mway", "retryable": False}
            await peer.send(op="auth", id=request["id"], ok=False, error=error)
            await peer.websocket.aclose(4500)
            return
        await peer.authenticate()
        if what == "kicked":
            await peer.subscribe()
            await peer.websocket.aclose(4503, "go away")
            return
        request = await peer.receive("subscribe")
        error = {"code": "unknown_channel", "message": "there is none", "retryable": False}
        results = [{"channel": name, "ok": False, "error": error} for name in request["args"]]
        await peer.send(op="subscribe", id=request["id"], ok=False, results=results)
        await peer.until_closed()

    async with server(script) as url, running(*BALANCE, url, "--token", "tell-no-one") as process:
        line = await Lines(process.stderr).next()
        assert await finished(process) == status
    assert line.startswith("trading-push: ")
    assert line.isprintable()
    assert "tell-no-one" not in line


async def test_watch_tells_unreachable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{taken.getsockname()[1]}/ws"
        async with running(*BALANCE, url, "--token", "t") as process:
            lines = Lines(process.stderr)
            line, end = await lines.next(), await lines.next()
            assert await finished(process) == 4
    assert "cannot reach" in line
    assert "trading-push serve" in line
    assert end == ""


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupt_ends_watch_quietly_and_politely(signal_: signal.Signals) -> None:
    codes: list[int] = []
    closed = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        codes.append(await peer.until_closed())
        closed.set()

    async with server(script) as url, running(*BALANCE, url, "--token", "t") as process:
        assert json.loads(await Lines(process.stdout).next())["seq"] == 1
        process.send_signal(signal_)
        assert await finished(process) == 0
        assert await Lines(process.stderr).next() == ""
        await closed.wait()
    assert codes == [1000]


async def test_an_interrupt_ends_watch_while_it_connects() -> None:
    connected = trio.Event()

    async def hold(stream: trio.SocketStream) -> None:
        connected.set()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, hold, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        async with running("watch", f"ws://127.0.0.1:{port}/", "--token", "t") as process:
            await connected.wait()
            process.send_signal(signal.SIGINT)
            assert await finished(process) == 0
            assert await Lines(process.stderr).next() == ""
        nursery.cancel_scope.cancel()


async def test_watch_ends_quietly_when_nobody_reads_on() -> None:
    gone = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        await gone.wait()
        for seq in range(2, 100):
            await peer.push(seq, seq - 1)
        await peer.until_closed()

    async with server(script) as url, running(*BALANCE, url, "--token", "t") as process:
        await Lines(process.stdout).next()
        assert process.stdout is not None
        await process.stdout.aclose()
        gone.set()
        assert await finished(process) == 0
        assert await Lines(process.stderr).next() == ""


async def test_watch_shows_tables_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pushes: dict[str, object] = {
        "balance": [{"asset": "USDT", "free": "10.5", "locked": "0", "total": "10.5"}],
        "positions": [
            {"symbol": "BTCUSDT", "side": "long", "quantity": "1", "unrealized_pnl": "12.25"},
            {"symbol": "ETHUSDT", "side": "short", "quantity": "2", "unrealized_pnl": "-7.75"},
        ],
        "pnl": {"total": "-3", "by_symbol": [{"symbol": "BTCUSDT", "realized": "1"}]},
        "orders": [],
        "ticker.BTCUSDT": {"symbol": "BTCUSDT", "last": "65000.1", "change": "0"},
        "custom": [{"note": "\x1b[2Jclear \x9b1m\u202e", "n": 1.5}, "text", None],
    }

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        for channel, data in pushes.items():
            await peer.send(channel=channel, type="snapshot", epoch="e", seq=1, ts=1, data=data)
        await peer.send(channel="orders", type="status", state="stale", reason="source", ts=1)
        await peer.until_closed()

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "60")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, inside = os.openpty()
    args = ["--token", "t", "--data", "balance,positions,pnl,orders,custom"]
    args += ["--ticker", "BTCUSDT", "--count", str(len(pushes) + 1)]
    shown = bytearray()

    def read_all() -> None:
        while True:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # how a terminal says that the other end is closed
                return
            if not data:
                return
            shown.extend(data)

    async with (
        server(script) as url,
        trio.open_nursery() as nursery,
        running("watch", url, *args, stdout=inside) as process,
    ):
        os.close(inside)
        nursery.start_soon(trio.to_thread.run_sync, read_all)
        assert await finished(process) == 0
        assert await Lines(process.stderr).next() == ""
    os.close(terminal)

    text = shown.decode()
    last = text[text.rindex("Tickers") :]
    for part in ("Balance", "Positions", "PnL", "Open orders", "custom", "65,000.10", "10.50"):
        assert part in last
    assert re.search(r"\x1b\[32m *12\.25", last)  # green for a gain, red for a loss
    assert re.search(r"\x1b\[31m *-7\.75", last)
    assert re.search(r"\x1b\[33mstale \(source\)", last)
    assert r"\u001b[2Jclear \u009b1m\u202e" in last
    assert "\x1b[2J" not in text
    assert "\x9b" not in text
    assert "\u202e" not in text


# --- serve ------------------------------------------------------------------------------------


async def started(process: trio.Process) -> tuple[str, Lines]:
    """The WebSocket URL that a server says, and the rest of its standard output."""
    lines = Lines(process.stdout)
    first = await lines.next()
    match = re.fullmatch(r"Serving on http://(\S+) \(WebSocket (ws://(\S+)/ws)\)", first)
    assert match is not None, first
    assert match[1] == match[3]
    return match[2], lines


async def drained(process: trio.Process) -> bytes:
    """All of what is left on standard error."""
    assert process.stderr is not None
    text = bytearray()
    with trio.fail_after(WAIT_S):
        async for data in process.stderr:
            text += data
    return bytes(text)


async def test_serve_from_its_first_line_to_its_end(environment: Path) -> None:
    async with running("serve", "--port", "0", "--lang", "en") as process:
        url, lines = await started(process)
        printed = await lines.next()
        _, shown, watch = printed.partition("Watch it from another shell: ")
        assert shown
        assert "24 hours" in await lines.next()
        tokens = []
        for user in "12345":
            match = re.fullmatch(rf"  user {user}: (\S+)", await lines.next())
            assert match is not None
            tokens.append(match[1])

        # What is printed works as it is pasted, elsewhere.
        shell = ["sh", "-c", f"{watch} --count 1"]
        pasted = await trio.run_process(shell, capture_stdout=True, cwd="/", stdin=b"")
        assert json.loads(pasted.stdout)

        # All that a trader has, and within two seconds of the client's being there.
        async with running("watch", url, "--token", tokens[3], "--count", "9") as client:
            printed = Lines(client.stdout)
            pushes = [json.loads(await printed.next()) for _ in range(9)]
            assert await finished(client) == 0
        channels = {push["channel"] for push in pushes}
        assert channels == {
            *("balance", "positions", "pnl", "orders", "fills"),
            *("ticker.BTCUSDT", "ticker.ETHUSDT"),
        }

        async with running("serve", "--port", url.split(":")[-1][:-3]) as second:
            complaint = await Lines(second.stderr).next()
            assert await finished(second) == 2
        assert complaint.startswith("trading-push: ")

        process.send_signal(signal.SIGTERM)
        assert await finished(process) == 0
        assert await lines.next() == ""  # log lines go elsewhere
        log = await drained(process)
    assert b"Traceback" not in log
    assert not any(token.encode() in log for token in tokens)
    assert (environment / "jwt-secret").read_bytes() not in log


@pytest.mark.parametrize("stdout", ["closed pipe", "closed"])
async def test_a_standard_output_that_nobody_has_does_not_end_the_server(stdout: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = ["serve", "--port", str(port), "--lang", "en"]
    if stdout == "closed":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, *args]
    else:
        command = [*COMMAND, *args]
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    try:
        run = partial(trio.run_process, capture_stdout=True, capture_stderr=True, check=False)
        token = (await run([*COMMAND, "token", "--user", "1"])).stdout.decode().strip()
        watch = [*COMMAND, "watch", f"ws://127.0.0.1:{port}/ws", "--token", token, "--count", "1"]
        # The server cannot say that it is there: the client tries until it is.
        status = 4
        with trio.fail_after(WAIT_S):
            while status == 4:
                status = (await run(watch)).returncode
        assert status == 0
        process.send_signal(signal.SIGINT)
        assert await finished(process) == 0
        assert b"Traceback" not in await drained(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        if process.stderr is not None:
            await trio.aclose_forcefully(process.stderr)


async def test_serve_with_a_secret_tells_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRADING_PUSH_JWT_SECRET", SECRET)
    async with running("serve", "--port", "0", "--host", "0.0.0.0", "--log-file", "/dev/null") as p:
        _, lines = await started(p)
        _, shown, watch = (await lines.next()).partition("with the same settings: ")
        assert shown
        shell = ["sh", "-c", f"{watch} --count 1"]
        pasted = await trio.run_process(shell, capture_stdout=True, cwd="/", stdin=b"")
        assert json.loads(pasted.stdout)
        p.send_signal(signal.SIGINT)
        assert await finished(p) == 0
        assert await lines.next() == ""


async def test_serve_tells_what_it_cannot_open(tmp_path: Path) -> None:
    for args, says in (
        (["--tape", str(tmp_path / "nope.gz")], "nope.gz"),
        (["--db", str(tmp_path)], str(tmp_path)),
    ):
        async with running("serve", "--port", "0", *args) as process:
            log = (await drained(process)).decode()
            assert await finished(process) == 2
        assert "Traceback" not in log
        assert says in log.splitlines()[-1]
        assert log.splitlines()[-1].startswith("trading-push: ")
