"""Silent peers: pinged once a heartbeat, gone after two, at every door that can send a ping."""

from __future__ import annotations

import pytest
import trio
from support import until
from test_doors import certificates, open_door
from test_ending import masked
from test_firewall import handshake
from test_teardown import room, unit

from trading_push.settings import Limits

__all__ = ["certificates"]

PINGED = ["linked", "native", "linked-tls", "native-tls"]


async def test_a_silent_peer_is_pinged_once_and_then_dropped(autojump_clock, caplog):
    caplog.set_level("INFO", "trading_push")
    async with room() as here:
        peer, _ = await here.subscribed("ticker.A", pinged=True)
        began = trio.current_time()
        await trio.sleep(14.9)
        assert peer.pings == 0
        await trio.sleep(2)
        assert peer.pings == 1
        await trio.sleep(12)
        assert (peer.pings, peer.closed_with) == (1, None)
        await until(lambda: peer.closed_with is not None)
        assert 30 <= trio.current_time() - began <= 32
    assert peer.closed_with == (4002, "nothing heard")
    meaning = "nothing heard within the heartbeat timeout"
    assert unit(caplog)[0] == f"⚠️ 连接关闭: code=4002 reason='nothing heard' ({meaning})"


async def test_whoever_answers_or_talks_stays(autojump_clock):
    async with room() as here:
        peer, _ = await here.subscribed("ticker.A", pinged=True)
        for count in range(1, 5):
            await trio.sleep(20)
            assert peer.pings == count
            peer.last_heard = trio.current_time()  # as a pong does
        for _ in range(20):
            await trio.sleep(10)
            await peer.request("ping")
        assert (peer.pings, peer.closed_with) == (4, None)


async def test_a_ping_that_cannot_be_written_at_once_waits_its_turn(autojump_clock):
    async with room() as here:
        peer, _ = await here.subscribed("ticker.A", direct=False, pinged=True)
        await trio.sleep(17)
        assert peer.pings == 1
        peer.last_heard = trio.current_time()
        peer.reading = trio.Event()
        await trio.sleep(17)
        assert peer.pings == 1
        await until(lambda: not here.service.hub.connections)
        # The ping was not taken in ten seconds: too slow, before it was too silent.
        assert peer.closed_with is None
        assert not here.service.hub.connections


async def test_without_a_way_to_ping_silence_says_nothing(autojump_clock):
    async with room() as here:
        peer, _ = await here.subscribed("ticker.A")
        await trio.sleep(1000)
        assert (peer.pings, peer.closed_with) == (0, None)


@pytest.mark.parametrize("kind", PINGED)
async def test_a_client_library_answers_and_stays(kind, certificates):
    limits = Limits(heartbeat_s=0.2)
    async with open_door(kind, certificates, limits=limits) as door, door.connect(4) as client:
        with trio.move_on_after(1.5):  # seven heartbeats
            await client.socket.get_message()
        assert client.socket.closed is None
        assert (await client.request("list"))["channels"] == []


@pytest.mark.parametrize("kind", ["linked", "native"])
async def test_a_client_that_says_nothing_more_is_gone(kind, certificates):
    limits = Limits(heartbeat_s=0.3)
    async with open_door(kind, certificates, limits=limits) as door:
        stream = await trio.open_tcp_stream("127.0.0.1", door.port)
        await stream.send_all(handshake())
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 101")
        await stream.send_all(masked(1, b'{"op":"ping"}'))
        began = trio.current_time()
        frames = b""
        with trio.fail_after(5):
            while data := await stream.receive_some():
                frames += data
        assert 0.5 <= trio.current_time() - began < 2.6
        assert frames.count(b"\x89\x00") == 1
        close = frames[frames.index(b"\x88") :]
        assert close == b"\x88\x0f" + (4002).to_bytes(2, "big") + b"nothing heard"
        await stream.aclose()


@pytest.mark.parametrize("kind", ["plain", "memory"])
async def test_where_no_ping_can_be_sent_nobody_is_dropped(kind, certificates):
    limits = Limits(heartbeat_s=0.2)
    async with open_door(kind, certificates, limits=limits) as door, door.connect(4) as client:
        with trio.move_on_after(1):
            await client.socket.get_message()
        assert (await client.request("list"))["channels"] == []
