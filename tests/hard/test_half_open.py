"""Clients behind a link that drops: no FIN, no RST, no answer; gone within the heartbeat's time."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio_websocket

from harness.endpoints import open_endpoint
from harness.room import lines
from harness.support import SECRET, TrioClient, hypercorn_serving, token, until

from trading_push import JwtAuthenticator, PushService, open_push_service
from trading_push.endpoints.hypercorn.server import guard
from trading_push.settings.schema import Auth, Limits, Settings

CLONE_NEWNET = 0x40000000
HEARTBEAT_S = 1.0
TIMEOUT_S = 2 * HEARTBEAT_S
LATE_S = 2.0
"""How much later than the heartbeat's timeout the end may come."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@attrs.frozen
class Link:
    """A pair of interfaces: one is here, the other in a network namespace with nothing else."""

    name: str
    here: str
    there: str

    def connect(self, port: int) -> socket.socket:
        """A connection to this side that begins at the other."""
        libc = ctypes.CDLL(None, use_errno=True)
        with (
            open("/proc/thread-self/ns/net") as ours,
            open(f"/run/netns/{self.name}") as theirs,
        ):
            # Only this thread goes over, and the socket belongs there from then on.
            assert libc.setns(theirs.fileno(), CLONE_NEWNET) == 0, ctypes.get_errno()
            try:
                return socket.create_connection((self.here, port), timeout=10)
            finally:
                assert libc.setns(ours.fileno(), CLONE_NEWNET) == 0, ctypes.get_errno()

    def drop(self) -> None:
        """From now on whatever either side sends vanishes."""
        ip("-n", self.name, "link", "set", f"{self.name}c", "down")


@pytest.fixture
def link() -> Iterator[Link]:
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip`")
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    # Of a range for trials between networks (RFC 2544); four addresses for each process.
    at = 4 * (os.getpid() % 2**15)
    net = f"198.{18 + (at >> 16)}.{at >> 8 & 255}"
    made = Link(f"tp{os.getpid()}", f"{net}.{(at & 255) + 1}", f"{net}.{(at & 255) + 2}")
    name = made.name
    try:
        try:
            ip("netns", "add", name)
            ip("link", "add", f"{name}s", "type", "veth", "peer", "name", f"{name}c")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespace may be made here: {error.stderr.strip()}")
        ip("link", "set", f"{name}c", "netns", name)
        ip("addr", "add", f"{made.here}/30", "dev", f"{name}s")
        ip("-n", name, "addr", "add", f"{made.there}/30", "dev", f"{name}c")
        ip("-n", name, "link", "set", f"{name}c", "up")
        ip("link", "set", f"{name}s", "up")
        yield made
    finally:
        # The interface there ends with the one here.
        subprocess.run(["ip", "link", "del", f"{name}s"], check=False, capture_output=True)
        if Path(f"/run/netns/{name}").exists():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@asynccontextmanager
async def serving(kind: str, service: PushService) -> AsyncIterator[int]:
    """One of the endpoints, at every address of this machine."""
    if kind == "linked":
        async with hypercorn_serving(service, bind=["0.0.0.0:0"]) as port:
            yield port
        return
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(service.serve_native, "0.0.0.0", 0)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def client_there(link: Link, port: int, *channels: str) -> AsyncIterator[TrioClient]:
    """A client of user 4 at the other side, whose library answers pings by itself."""
    bare = await trio.to_thread.run_sync(link.connect, port)
    bare.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(bare))
    try:
        async with trio.open_nursery() as nursery:
            websocket = await trio_websocket.wrap_client_stream(
                nursery, stream, f"{link.here}:{port}", "/ws"
            )
            made = TrioClient(websocket)
            assert (await made.request("auth", token=token(4)))["ok"]
            assert (await made.request("subscribe", args=list(channels)))["ok"]
            yield made
            nursery.cancel_scope.cancel()
    finally:
        bare.close()


async def push_for_ever(service: PushService) -> None:
    count = 0
    while True:
        count += 1
        await service.publish("balance", [count, "x" * 200], user=4)
        await trio.sleep(0.02)


async def read_for_ever(client: TrioClient) -> None:
    while True:
        await client.receive()


async def just_heard(service: PushService) -> None:
    (connection,) = service.context.connections
    transport: Any = connection._transport
    before = transport.last_heard
    await until(lambda: transport.last_heard > before)


BLOCK = """\
⚠️ 连接关闭: code=4002 reason='nothing heard' (nothing heard within the heartbeat timeout)
🔌 WebSocket客户端断开连接 - 来自: {there}
👤 用户4退出所有房间
   🚪 退出房间: balance_4
📋 用户4取消订阅balance数据 - 剩余订阅者: 0
   🚪 退出行情房间: ticker_BTCUSDT_4
📊 用户4取消订阅BTCUSDT行情 - 剩余订阅者: 0
   BTCUSDT无订阅者，移除
✅ 用户4已退出所有房间并清理订阅
用户4断开连接并清理所有订阅
🔌 当前连接数: 0
👤 当前在线用户数: 0"""


@pytest.mark.parametrize("pushed_to", [False, True], ids=["idle", "pushed to"])
@pytest.mark.parametrize("kind", ["linked", "native"])
async def test_a_client_behind_a_dropped_link_is_gone_in_time(
    kind, pushed_to, link, caplog, monkeypatch
):
    caplog.set_level("INFO", "trading_push")
    limits = Limits(heartbeat_s=HEARTBEAT_S)
    monkeypatch.setattr(guard, "limits", limits)
    async with (
        open_push_service(
            settings=Settings(limits=limits), authenticate=JwtAuthenticator(Auth(), SECRET)
        ) as service,
        serving(kind, service) as port,
        client_there(link, port, "balance", "ticker.BTCUSDT") as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(read_for_ever, client)
        if pushed_to:
            nursery.start_soon(push_for_ever, service)
        # While the link is there, its answers to the pings keep the connection.
        with trio.move_on_after(2 * TIMEOUT_S):
            await until(lambda: not service.statistics().connections)
        assert service.statistics().connections == 1

        await just_heard(service)  # whatever else waits for an answer began to wait later
        await trio.to_thread.run_sync(link.drop)
        dropped = trio.current_time()
        await until(lambda: not service.statistics().connections)
        took = trio.current_time() - dropped
        assert TIMEOUT_S - 0.5 < took <= TIMEOUT_S + LATE_S
        # What stands below the connection goes, too, when it was given time for a polite close.
        await until(lambda: not service.context.connections and not guard.sockets.taken)
        took = trio.current_time() - dropped
        assert took <= TIMEOUT_S + LATE_S + limits.close_timeout_s
        nursery.cancel_scope.cancel()
    logged = lines(caplog)
    start = next(at for at, line in enumerate(logged) if "连接关闭" in line)
    block = BLOCK.format(there=link.there).splitlines()
    assert logged[start : start + len(block)] == block
    assert not [record for record in caplog.records if record.exc_info]
    assert service.statistics().ledger.balanced


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="a timeout of Linux's TCP")
@pytest.mark.parametrize("heartbeat_s", [0.5, 1, 15])
@pytest.mark.parametrize("kind", ["linked", "native"])
async def test_the_kernel_drops_nobody_before_the_heartbeat_says_why(
    kind, heartbeat_s, certificates
):
    limits = Limits(heartbeat_s=heartbeat_s)
    async with open_endpoint(kind, certificates, limits=limits) as endpoint, endpoint.connect(4):
        (connection,) = endpoint.service.context.connections
        bare = connection._transport._stream.socket
        kernel_s = bare.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
    step_s = min(1, heartbeat_s / 4)
    # A time stands in the next step of the timetable, whose rounds are a step apart.
    assert kernel_s > 2 * heartbeat_s + 2 * step_s
