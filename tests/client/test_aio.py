"""What the asyncio client does beside the table: cancellation, tasks, a loop that runs already."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio

from harness.scripted_server import Peer, server

from trading_push.client import websockets_link
from trading_push.client.aio import Client, connect


async def in_asyncio(use: Callable[[], Awaitable[Any]]) -> Any:
    """Run it under asyncio, in a thread; no task may be left."""

    async def main() -> Any:
        result = await use()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return await trio.to_thread.run_sync(lambda: asyncio.run(main()))


@pytest.mark.parametrize("point", ["connecting", "token", "authenticating", "reading", "waiting"])
async def test_cancellation_leaves_nothing_behind(monkeypatch: Any, point: str) -> None:
    reached, gone = trio.Event(), trio.Event()
    portal = trio.lowlevel.current_trio_token()

    def reach() -> None:
        portal.run_sync_soon(reached.set)

    async def script(peer: Peer, number: int) -> None:
        if point == "authenticating":
            await peer.receive("auth")
        else:
            await peer.open()
            if point == "waiting":
                await trio.aclose_forcefully(peer.websocket._stream)
        reached.set()
        await peer.until_closed()
        gone.set()

    async def hold(stream: trio.SocketStream) -> None:
        reached.set()
        while await stream.receive_some():
            pass
        gone.set()

    async def never() -> str:
        reach()
        gone_soon()
        await asyncio.Event().wait()
        raise AssertionError

    def gone_soon() -> None:
        portal.run_sync_soon(gone.set)

    monkeypatch.setattr("trading_push.client.ending.back_off", lambda failures: 3600.0)

    async def use(url: str) -> float:
        async def follow() -> None:
            token: Any = never if point == "token" else "t"
            async with connect(url, token, channels=["balance"]) as client:
                async for _ in client:
                    pass

        task = asyncio.create_task(follow())
        while not reached.is_set():
            await asyncio.sleep(0.001)
        if point == "waiting":
            gone_soon()
            await asyncio.sleep(0.05)
        started_at = asyncio.get_running_loop().time()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asyncio.get_running_loop().time() - started_at

    async with server(script) as url, trio.open_nursery() as nursery:
        if point == "connecting":
            (listener,) = await nursery.start(partial(trio.serve_tcp, hold, 0, host="127.0.0.1"))
            url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}/"
        took_s = await in_asyncio(lambda: use(url))
        await gone.wait()
        nursery.cancel_scope.cancel()
    assert took_s < websockets_link.CLOSE_TIMEOUT_S / 2  # at once: no polite close


async def test_a_time_out_around_a_push_loses_none() -> None:
    go_on = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        await go_on.wait()
        await peer.push(2, 1)
        await peer.until_closed()

    portal = trio.lowlevel.current_trio_token()

    async def use(url: str) -> list[int | None]:
        async with connect(url, "t", channels=["balance"]) as client:
            seqs = [(await anext(client)).seq]
            for _ in range(20):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(client), 0.001)
            portal.run_sync_soon(go_on.set)
            seqs.append((await asyncio.wait_for(anext(client), 10)).seq)
            return seqs

    async with server(script) as url:
        assert await in_asyncio(lambda: use(url)) == [1, 2]


async def test_the_bodys_own_exception_comes_out_alone_and_the_close_is_polite() -> None:
    codes: list[int] = []
    closed = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        codes.append(await peer.until_closed())
        closed.set()

    async def use(url: str) -> None:
        with pytest.raises(LookupError, match="mine"):
            async with connect(url, "t", channels=["balance"]):
                raise LookupError("mine")

    async with server(script) as url:
        await in_asyncio(lambda: use(url))
        await closed.wait()
    assert codes == [1000]


async def test_a_server_that_does_not_answer_the_close_is_left_after_a_second() -> None:
    is_stuck = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        await peer.push(5, 4)  # a gap makes the client say more than is read here
        while not peer.websocket._send_channel.statistics().tasks_waiting_send:
            await trio.sleep(0.001)
        is_stuck.set()
        await trio.sleep_forever()

    async def use(url: str) -> float:
        async with connect(url, "t", channels=["balance"]):
            while not is_stuck.is_set():
                await asyncio.sleep(0.001)
            started_at = asyncio.get_running_loop().time()
        return asyncio.get_running_loop().time() - started_at

    async with server(script) as url:
        took_s = await in_asyncio(lambda: use(url))
    assert 0.9 <= took_s / websockets_link.CLOSE_TIMEOUT_S < 3


async def test_who_waits_elsewhere_is_told_when_the_block_is_left() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.until_closed()

    async def use(url: str) -> None:
        async def all_of(client: Client) -> list[Any]:
            return [push async for push in client]

        async with connect(url, "t", channels=["balance"]) as client:
            readers = [asyncio.create_task(all_of(client)) for _ in range(2)]
            await asyncio.sleep(0)
        assert await asyncio.gather(*readers) == [[], []]

    async with server(script) as url:
        await in_asyncio(lambda: use(url))


async def test_two_who_read_share_the_pushes() -> None:
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        for seq in range(2, 11):
            await peer.push(seq, seq - 1)
        await peer.until_closed()

    async def use(url: str) -> list[Any]:
        seqs: list[Any] = []

        async def read(client: Client) -> None:
            while len(seqs) < 10:
                seqs.append((await anext(client)).seq)

        async with connect(url, "t", channels=["balance"]) as client:
            readers = [asyncio.create_task(read(client)) for _ in range(2)]
            await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
            for each in readers:
                each.cancel()
            await asyncio.wait(readers)
        return sorted(seqs)

    async with server(script) as url:
        assert await in_asyncio(lambda: use(url)) == list(range(1, 11))


PROGRAM = """
import asyncio, sys
from trading_push.client.aio import connect

async def main():
    async with connect(sys.argv[1], "t", channels=["balance"]) as client:
        print("connected", flush=True)
        async for push in client:
            pass

asyncio.run(main())
"""


async def test_ctrl_c_ends_a_program() -> None:
    gone = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.until_closed()
        gone.set()

    async with server(script) as url:
        running = await trio.lowlevel.open_process(
            [sys.executable, "-X", "dev", "-c", PROGRAM, url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert running.stdout is not None
        assert running.stderr is not None
        assert (await running.stdout.receive_some()).startswith(b"connected")
        os.kill(running.pid, signal.SIGINT)
        told = b"".join([chunk async for chunk in running.stderr])
        assert await running.wait() == -signal.SIGINT
        await gone.wait()
        await running.stdout.aclose()
    assert told.strip().endswith(b"KeyboardInterrupt")
    for word in (b"ResourceWarning", b"never retrieved", b"was destroyed"):
        assert word not in told
