"""How a server ends: everyone is told, every line is there, and nobody can hold it up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from websockets.exceptions import ConnectionClosedError

from harness.handshakes import raw
from harness.support import SECRET, SIX, Process, client, plain_hypercorn, serving, token

CLIENTS = 50


async def told(server: Process, stop) -> None:
    async def stay(user: int, ready: asyncio.Barrier) -> None:
        async with client(server.url, user) as each:
            await each.subscribe(*SIX)
            await ready.wait()
            notice = None
            with pytest.raises(ConnectionClosedError) as closed:
                while True:
                    message = await each.push()
                    notice = message if message.get("op") == "notice" else notice
            assert closed.value.rcvd.code == 1012
            assert notice["code"] == "shutdown"
            assert 0 < notice["reconnect_after_ms"] <= 60_000

    ready = asyncio.Barrier(CLIENTS + 1)
    tasks = [asyncio.create_task(stay(user, ready)) for user in range(CLIENTS)]
    await ready.wait()
    stop()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_serve_tells_everyone_and_ends_with_0(tmp_path, how):
    with serving(tmp_path, "--interval", "pnl=0.1") as server:
        asyncio.run(told(server, lambda: server.popen.send_signal(how)))
        began = time.monotonic()
        assert server.popen.wait(10) == 0
        assert time.monotonic() - began < 5
        server.stop()
        blocks = [line for line in server.err if "已退出所有房间并清理订阅" in line]
        assert len(blocks) == CLIENTS
        assert f"🔌 服务正在关闭 - 通知{CLIENTS}个连接" in server.err
        assert server.err[-2:] == ["🔌 当前连接数: 0", "👤 当前在线用户数: 0"]
        assert server.traces() == []


@pytest.mark.parametrize("workers", ["0", "1", "2"])
def test_plain_hypercorn_tells_everyone(tmp_path, workers):
    with plain_hypercorn(tmp_path, "-w", workers) as server:
        server.wait_for_line("启动交易数据WebSocket推送服务", count=max(1, int(workers)))
        # As systemd does: to the whole group.
        asyncio.run(told(server, lambda: os.killpg(server.popen.pid, signal.SIGTERM)))
        assert server.popen.wait(10) == 0
        server.stop()
        blocks = [line for line in server.err if "已退出所有房间并清理订阅" in line]
        assert len(blocks) == CLIENTS
        assert server.traces() == []


@pytest.mark.parametrize("workers", ["0", "1"])
def test_hypercorn_s_graceful_timeout_does_not_cut_the_farewell(tmp_path, workers):
    with plain_hypercorn(tmp_path, "-w", workers, "--graceful-timeout", "0") as server:
        asyncio.run(told(server, lambda: os.killpg(server.popen.pid, signal.SIGTERM)))
        assert server.popen.wait(10) == 0
        server.stop()
        assert f"🔌 服务正在关闭 - 通知{CLIENTS}个连接" in server.err
        assert sum("连接关闭: code=1012" in line for line in server.err) == CLIENTS
        assert server.traces() == []
        assert not [line for line in server.err if "❌" in line]


def stalled(url: str) -> socket.socket:
    """A client that subscribes and never reads."""
    sock = raw(url)
    for request in (
        {"op": "auth", "token": token(4)},
        {"op": "subscribe", "args": ["pnl", "positions", "balance", "orders"]},
    ):
        payload = json.dumps(request).encode().ljust(126)
        length = len(payload).to_bytes(2, "big")
        sock.sendall(b"\x81\xfe" + length + b"\x00\x00\x00\x00" + payload)
    return sock


def test_a_peer_that_never_reads_does_not_hold_serve(tmp_path):
    with serving(tmp_path) as server, stalled(server.url):
        server.wait_for_line("用户4订阅orders数据")
        began = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 5
        assert any("连接关闭: code=1012" in line for line in server.err)


def test_a_peer_that_never_reads_does_not_hold_hypercorn(tmp_path):
    with plain_hypercorn(tmp_path, "--graceful-timeout", "0") as server, stalled(server.url):
        server.wait_for_line("用户4订阅orders数据")
        began = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 5
        assert any("连接关闭: code=1012" in line for line in server.err)


def test_a_second_signal_ends_at_once(tmp_path):
    with serving(tmp_path) as server, stalled(server.url):
        server.wait_for_line("用户4订阅orders数据")
        server.popen.send_signal(signal.SIGTERM)
        server.popen.send_signal(signal.SIGINT)
        began = time.monotonic()
        server.popen.wait(10)
        assert time.monotonic() - began < 4


def test_a_full_pipe_that_nobody_reads_stops_nobody(tmp_path):
    read, write = os.pipe()
    command = [sys.executable, "-m", "trading_push", "serve", "--port", "0"]
    environment = {**os.environ, "TRADING_PUSH_JWT_SECRET": SECRET, "XDG_DATA_HOME": str(tmp_path)}
    command += ["--interval", "pnl=0.1", "--interval", "positions=0.1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=write, text=True, env=environment
    ) as server:
        try:
            os.close(write)
            assert server.stdout is not None
            url = server.stdout.readline().split("WebSocket ")[1].rstrip(")\n")

            async def visits() -> None:
                # Each visit logs more than two kilobytes; the pipe holds sixty-four.
                for _ in range(10):
                    async with asyncio.TaskGroup() as group:
                        for user in range(1, 21):
                            group.create_task(visit(user))

            async def visit(user: int) -> None:
                async with client(url, user) as each:
                    await each.subscribe(*SIX)
                    await each.until_snapshots(SIX)

            asyncio.run(asyncio.wait_for(visits(), 60))
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 0
        finally:
            server.kill()
            os.close(read)


def test_programs_tune_the_interpreter_and_the_library_does_not():
    code = "import gc; before = gc.get_threshold(); {}; print(gc.get_threshold() == before)"
    env = {**os.environ, "TRADING_PUSH_JWT_SECRET": SECRET}
    for statement, same in (("import trading_push", "True"), ("import trading_push.asgi", "False")):
        command = [sys.executable, "-c", code.format(statement)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        assert done.stdout.strip() == same


def test_a_registry_that_dies_ends_its_worker_and_a_new_one_starts(tmp_path):
    with plain_hypercorn(tmp_path, "-w", "1", app="harness.dying_app:app") as server:

        async def once(user: int) -> None:
            async with client(server.url, user) as each:
                await each.subscribe("balance")
                await each.until_snapshots(["balance"])

        async def kill() -> None:
            async with client(server.url) as each:
                with pytest.raises(ConnectionClosedError) as closed:
                    await each.authenticate(13)
                    while True:
                        await each.push()
                assert closed.value.rcvd.code == 1012

        asyncio.run(once(1))
        asyncio.run(kill())
        server.wait_for_line("❌ 订阅登记任务意外终止: RuntimeError: a mistake of ours")
        server.wait_for_line("启动交易数据WebSocket推送服务", count=2)
        asyncio.run(once(1))
        assert server.stop() == 0
