"""What the client on threads does beside the table: close, Ctrl-C, notebooks, being forgotten."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

import pytest
import trio

from harness.python_clients import in_thread
from harness.scripted_server import Peer, server

from trading_push.client.sync import Client, connect


async def quiet(peer: Peer, number: int) -> None:
    await peer.open()
    await peer.until_closed()


def ours() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("trading_push")]


async def until_no_thread() -> None:
    with trio.fail_after(10):
        while ours():
            await trio.sleep(0.001)


async def test_close_from_another_thread_ends_the_loop() -> None:
    async with server(quiet) as url:
        client = await in_thread(lambda: connect(url, "t", channels=["balance"]))
        async with trio.open_nursery() as nursery:
            pushes: list[Any] = []
            for _ in range(2):
                nursery.start_soon(in_thread, lambda: pushes.extend(client))
            await trio.lowlevel.checkpoint()
            nursery.start_soon(in_thread, client.close)
        assert pushes == []
        await in_thread(client.close)  # a second time
        await until_no_thread()


async def test_the_with_statement_lets_the_bodys_own_exception_through() -> None:
    codes: list[int] = []
    closed = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        codes.append(await peer.until_closed())
        closed.set()

    def use(url: str) -> None:
        with connect(url, "t", channels=["balance"]):
            raise LookupError("mine")

    async with server(script) as url:
        with pytest.raises(LookupError, match="mine"):
            await in_thread(use, url)
        await closed.wait()
        await until_no_thread()
    assert codes == [1000]


async def test_what_a_loop_has_left_open_is_closed_when_it_is_forgotten() -> None:
    gone = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.authenticate(heartbeat_s=0.1)
        await peer.subscribe()
        await peer.push(1)
        await peer.until_closed()
        gone.set()

    def use(url: str) -> int | None:
        for push in connect(url, "t", channels=["balance"]):
            return push.seq
        raise AssertionError

    async with server(script) as url:
        assert await in_thread(use, url) == 1
        await gone.wait()
        await until_no_thread()


async def test_inside_of_a_loop_that_runs_as_in_a_notebook() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        await peer.until_closed()

    async def cell(url: str) -> int | None:
        with connect(url, "t", channels=["balance"]) as client:
            return next(client).seq

    async with server(script) as url:
        assert await in_thread(lambda: asyncio.run(cell(url))) == 1


async def test_a_function_may_close_the_client_that_asks_it() -> None:
    made: list[Client] = []

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await trio.aclose_forcefully(peer.websocket._stream)

    def next_token() -> str:
        if made:
            made[0].close()
        return "t"

    def use(url: str) -> list[Any]:
        made.append(connect(url, next_token, channels=["balance"]))
        return list(made[0])

    async with server(script) as url:
        assert await in_thread(use, url) == []
        await until_no_thread()


async def test_an_exit_that_the_function_asks_for_is_the_programs() -> None:
    async with server(quiet) as url:
        with pytest.raises(SystemExit, match="no account"):
            await in_thread(lambda: connect(url, lambda: sys.exit("no account")))
        await until_no_thread()


PROGRAM = """
import sys
from trading_push.client.sync import connect

client = connect(sys.argv[1], "t", channels=["balance"])
print("connected", flush=True)
if sys.argv[2] == "loop":
    for push in client:
        pass
"""


@pytest.mark.parametrize("how", ["loop", "end"])
async def test_neither_ctrl_c_nor_the_end_of_a_program_waits(how: str) -> None:
    gone = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.until_closed()
        gone.set()

    async with server(script) as url:
        running = await trio.lowlevel.open_process(
            [sys.executable, "-c", PROGRAM, url, how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert running.stdout is not None
        assert running.stderr is not None
        assert (await running.stdout.receive_some()).startswith(b"connected")
        if how == "loop":
            with suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGINT)
        with trio.fail_after(10):
            told = b"".join([chunk async for chunk in running.stderr])
            assert await running.wait() == (-signal.SIGINT if how == "loop" else 0)
        await gone.wait()
        await running.stdout.aclose()
    assert told.strip().endswith(b"KeyboardInterrupt") if how == "loop" else told == b""
