"""The close code and reason in the log are the client's own, under both servers."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest

from harness.frames import MASK
from harness.handshakes import raw
from harness.support import SIX, TESTS, Client, Process, client, plain_hypercorn, serving

GONE = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[2])
from harness.support import client

async def main():
    async with client(sys.argv[1], 4) as user:
        await user.subscribe("balance")
        print("in", flush=True)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


async def polite(user: Client, code: int, reason: str) -> None:
    await user.socket.close(code, reason)


async def without_a_code(user: Client) -> None:
    transport = user.socket.transport
    transport.write(b"\x88\x80\x00\x00\x00\x00")  # what a browser sends for close()
    await user.socket.wait_closed()


async def reset(user: Client) -> None:
    sock = user.socket.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    user.socket.transport.abort()


async def cut(user: Client) -> None:
    user.socket.transport.write_eof()
    await user.socket.wait_closed()


CASES: dict[str, tuple[Callable[[Client], Awaitable[None]], str]] = {
    "1000 done": (
        lambda user: polite(user, 1000, "done"),
        "🔌 连接关闭: code=1000 reason='done' (正常关闭)",
    ),
    "1001": (
        lambda user: polite(user, 1001, ""),
        "🔌 连接关闭: code=1001 reason='' (客户端离开页面)",
    ),
    "4001 bye": (
        lambda user: polite(user, 4001, "bye"),
        "⚠️ 连接关闭: code=4001 reason='bye' (too slow)",
    ),
    "3999": (
        lambda user: polite(user, 3999, "我走了"),
        "⚠️ 连接关闭: code=3999 reason='我走了' (其他)",
    ),
    "1012 of the peer": (
        lambda user: polite(user, 1012, ""),
        "⚠️ 连接关闭: code=1012 reason='' (server restarting)",
    ),
    "no code": (without_a_code, "🔌 连接关闭: code=1005 reason='' (正常关闭)"),
    "reset": (reset, "⚠️ 连接关闭: code=1006 reason='' (异常断开)"),
    "end of file": (cut, "⚠️ 连接关闭: code=1006 reason='' (异常断开)"),
}


def kill_a_client(url: str) -> None:
    command = [sys.executable, "-c", GONE, url, str(TESTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "in\n"
        killed.send_signal(signal.SIGKILL)


def leave_in_every_way(server: Process) -> None:
    async def visit(leave: Callable[[Client], Awaitable[None]]) -> None:
        async with client(server.url, 4) as user:
            await user.subscribe(*SIX)
            await user.until_snapshots(["ticker.BTCUSDT"])
            await leave(user)

    for leave, line in CASES.values():
        done = sum("当前在线用户数: 0" in each for each in server.err)
        asyncio.run(visit(leave))
        server.wait_for_line("当前在线用户数: 0", count=done + 1)
        last = "\n".join(server.err).rsplit("🔌 WebSocket客户端连接", 1)[1].split("\n")
        assert [each for each in last if "连接关闭" in each] == [line]
        assert last[-3:] == [
            "用户4断开连接并清理所有订阅",
            "🔌 当前连接数: 0",
            "👤 当前在线用户数: 0",
        ]
    done = sum("当前在线用户数: 0" in each for each in server.err)
    kill_a_client(server.url)
    server.wait_for_line("当前在线用户数: 0", count=done + 1)
    closes = [each for each in server.err if "连接关闭" in each]
    assert closes[-1] == "⚠️ 连接关闭: code=1006 reason='' (异常断开)"
    assert not [each for each in server.err if each.startswith("RECORDER")]
    assert server.traces() == []


@pytest.mark.parametrize(
    "program",
    [("-m", "trading_push"), ("-m", "harness.recorded_serve")],
    ids=["bare", "recorded"],
)
def test_under_serve(tmp_path, program):
    with serving(tmp_path, "--interval", "pnl=0.1", program=program, cwd=TESTS) as server:
        leave_in_every_way(server)


@pytest.mark.parametrize("app", ["trading_push.asgi:app", "harness.recorded_app:app"])
def test_under_plain_hypercorn(tmp_path, app):
    with plain_hypercorn(tmp_path, app=app) as server:
        leave_in_every_way(server)


def test_the_level_is_that_of_the_mark(tmp_path):
    async def visit(url: str) -> None:
        for code in (1000, 4000):
            async with client(url, 4) as user:
                await user.socket.close(code)

    log = tmp_path / "log"
    with serving(tmp_path, "--log-file", str(log)) as server:
        asyncio.run(visit(server.url))
        server.wait_for_line("当前在线用户数: 0", count=2)
        server.stop()
    levels = re.findall(r"- (\w+) - \S+ 连接关闭: code=(\d+)", log.read_text(encoding="utf-8"))
    assert levels == [("INFO", "1000"), ("WARNING", "4000")]


BROKEN = {
    "unmasked frame": (b"\x81\x02{}", 1002),
    "reserved bit": (b"\xc1\x82" + MASK + b"{}", 1002),
    "reserved opcode": (b"\x83\x82" + MASK + b"{}", 1002),
    "bad UTF-8": (b"\x81\x82" + MASK + b"\xff\xff", 1007),
    "binary message": (b"\x82\x82" + MASK + b"{}", 1003),
    "message over the limit": (
        b"\x81\xff" + (2**17).to_bytes(8, "big") + MASK + b"x" * 2**17,
        1009,
    ),
    "over the limit in fragments": (
        b"\x01\xfe\xff\xff" + MASK + "é".encode() * 32767 + b"x" + b"\x80\x82" + MASK + b"xx",
        1009,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_framing_is_answered_with_its_code(embedded, name):
    frames, code = BROKEN[name]
    with raw(embedded.url) as sock:
        sock.sendall(frames)
        answer = b""
        try:
            while data := sock.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
    # The close frame and nothing after it; a reset may have swallowed it for a large message.
    if answer or code != 1009:
        assert answer[0] == 0x88
        assert int.from_bytes(answer[2:4], "big") == code
        assert len(answer) == 2 + answer[1]
    embedded.process.wait_for_line("当前在线用户数: 0")
    assert any(f"连接关闭: code={code}" in line for line in embedded.process.err)
    assert embedded.process.traces() == []
