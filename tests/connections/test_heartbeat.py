"""Silent peers: pinged once a heartbeat, gone after two, at every endpoint that can send a ping."""

from __future__ import annotations

import math
import random

import pytest
import trio
import trio.testing
from wsproto.frame_protocol import FrameDecoder

from harness.endpoints import open_endpoint
from harness.frames import masked
from harness.handshakes import handshake
from harness.room import room, unit
from harness.support import until

from trading_push.connections.heartbeat import Heartbeat
from trading_push.settings.schema import Limits

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
        await until(lambda: not here.service.context.connections)
        # The ping was not taken in ten seconds: too slow, before it was too silent.
        assert peer.closed_with is None
        assert not here.service.context.connections


async def test_without_a_way_to_ping_silence_says_nothing(autojump_clock):
    async with room() as here:
        peer, _ = await here.subscribed("ticker.A")
        await trio.sleep(1000)
        assert (peer.pings, peer.closed_with) == (0, None)


@pytest.mark.parametrize("kind", PINGED)
async def test_a_client_library_answers_and_stays(kind, certificates):
    limits = Limits(heartbeat_s=0.2)
    async with (
        open_endpoint(kind, certificates, limits=limits) as endpoint,
        endpoint.connect(4) as client,
    ):
        with trio.move_on_after(1.5):  # seven heartbeats
            await client.socket.get_message()
        assert client.socket.closed is None
        assert (await client.request("list"))["channels"] == []


@pytest.mark.parametrize("kind", ["linked", "native"])
async def test_a_client_that_says_nothing_more_is_gone(kind, certificates):
    limits = Limits(heartbeat_s=0.3)
    async with open_endpoint(kind, certificates, limits=limits) as endpoint:
        stream = await trio.open_tcp_stream("127.0.0.1", endpoint.port)
        await stream.send_all(handshake())
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 101")
        await stream.send_all(masked(0x81, b'{"op":"ping"}'))
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


@pytest.mark.parametrize("kind", ["linked", "native"])
async def test_a_pong_is_heard_and_goes_no_further(kind, certificates, monkeypatch):
    decoded: list[bytes] = []
    decode = FrameDecoder.receive_bytes

    def seen(decoder: FrameDecoder, data: bytes) -> None:
        decoded.append(bytes(data))
        decode(decoder, data)

    monkeypatch.setattr(FrameDecoder, "receive_bytes", seen)
    async with open_endpoint(kind, certificates) as endpoint:
        stream = await trio.open_tcp_stream("127.0.0.1", endpoint.port)

        async def send(data: bytes) -> None:
            await stream.send_all(data)
            await trio.testing.wait_all_tasks_blocked(0.01)

        await send(handshake())
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 101")
        [connection] = endpoint.service.context.connections
        decoded.clear()
        heard = connection._transport.last_heard
        await send(masked(0x8A, b""))
        assert connection._transport.last_heard > heard
        assert decoded == []
        # One with a payload is none of ours, nor is what looks like one amid a frame, or at the
        # end of its head.
        await send(masked(0x8A, b"payload"))
        assert len(decoded) == 1
        text = b'{"op":"ping","id":"abcdefgh"}'
        like = b"\x8a\x80"
        at = 12
        mask = bytes(a ^ b for a, b in zip(text[at:], like, strict=False)) + b"\x00\x00"
        body = bytes(byte ^ mask[n % 4] for n, byte in enumerate(text))
        assert body[at : at + 2] == like
        await send(bytes([0x81, 0x80 | len(text)]) + mask + body[:at])
        await send(body[at : at + 6])
        await send(body[at + 6 :])
        assert b'"id":"abcdefgh"' in await stream.receive_some()
        text = b'{"op":"ping","id":"' + 200 * b"-" + b'"}'
        frame = bytes([0x81, 0x80 | 126]) + len(text).to_bytes(2, "big") + like + b"\x00\x00"
        for part in (
            frame[:4],
            frame[4:] + bytes([text[0] ^ 0x8A, text[1] ^ 0x80]),
            bytes(byte ^ (like + b"\x00\x00")[n % 4] for n, byte in enumerate(text))[2:],
        ):
            await send(part)
        assert b'"code":"bad_request"' in await stream.receive_some()  # the id is too long
        await stream.aclose()


@pytest.mark.parametrize("kind", ["plain", "memory"])
async def test_where_no_ping_can_be_sent_nobody_is_dropped(kind, certificates):
    limits = Limits(heartbeat_s=0.2)
    async with (
        open_endpoint(kind, certificates, limits=limits) as endpoint,
        endpoint.connect(4) as client,
    ):
        with trio.move_on_after(1):
            await client.socket.get_message()
        assert (await client.request("list"))["channels"] == []


class Guest:
    """Wants to be looked after at some time, once."""

    def __init__(self) -> None:
        self.due = math.inf
        self.seen_at: list[float] = []

    def look_after(self, now: float) -> float:
        self.seen_at.append(now)
        return math.inf


async def test_those_who_have_been_there_leave_nothing_in_the_timetable():
    timetable = Heartbeat(15)
    stays = Guest()
    timetable.add(stays, 1e6)
    for number in range(20_000):
        guest = Guest()
        timetable.add(guest, 1000 + number)
        timetable.add(guest, 500 + number)
        timetable.remove(guest)
    assert len(timetable._steps) == 1
    assert len(timetable._order) < 200


async def test_each_is_looked_after_at_its_time_whoever_comes_and_goes(autojump_clock):
    rng = random.Random(1)
    timetable = Heartbeat(15)
    guests: dict[Guest, float] = {}

    class Meddler(Guest):
        """Looked after, it sends others away, or calls them sooner."""

        def look_after(self, now: float) -> float:
            for other in rng.sample(list(guests), 3):
                if rng.random() < 0.5:
                    timetable.remove(other)
                    guests[other] = min(guests[other], now)
                else:
                    timetable.add(other, now + 1)
                    if other.due < math.inf:
                        guests[other] = min(guests[other], now + 1)
            return super().look_after(now)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(timetable.run)
        began = trio.current_time()
        for _ in range(2000):
            guest = rng.choice((Guest, Meddler))()
            guests[guest] = began + rng.randrange(60)
            timetable.add(guest, guests[guest])
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert timetable._steps == {}
    assert timetable._order == []
    for guest, at in guests.items():
        assert all(at - 1e-9 <= seen for seen in guest.seen_at[:1]), (guest.seen_at, at)
