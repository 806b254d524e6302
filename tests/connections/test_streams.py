"""Streams of an application's own: what arrives, and how each generator ends."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import random
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import attrs
import pytest
import trio
import trio.lowlevel
import trio.testing

from harness.crowd import Crowd, at_rest, faults, limits
from harness.embedded import embed
from harness.room import lines
from harness.sources import failing_when_cancelled, serving

from trading_push import ConfigurationError, ServiceClosed


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO, "trading_push")


class Side(enum.Enum):
    BUY = "buy"


@attrs.frozen
class Level:
    price: Decimal
    side: Side


@dataclasses.dataclass
class Book:
    best: Level
    at: datetime
    sizes: tuple[Decimal, ...]


class Numbers:
    """A stream that yields what the test sends."""

    def __init__(self) -> None:
        self.users: list[str] = []
        self.running = 0
        self.most = 0
        self.ends: list[trio.MemorySendChannel[Any]] = []

    async def send(self, value: Any, number: int = 0) -> None:
        """Have a generator yield a value, the first one unless another is named."""
        while len(self.ends) <= number:
            await trio.lowlevel.checkpoint()
        await self.ends[number].send(value)

    async def __call__(self, user: str = "") -> AsyncIterator[Any]:
        send, receive = trio.open_memory_channel[Any](0)
        self.users.append(user)
        self.ends.append(send)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            async with receive:
                async for value in receive:
                    if isinstance(value, Exception):
                        raise value
                    yield value
        finally:
            self.running -= 1


async def test_objects_arrive_as_the_json_that_a_client_expects(autojump_clock):
    async def books(user: str) -> AsyncIterator[Any]:
        at = datetime(2026, 11, 20, 12, 0, 0, 250_000, tzinfo=UTC)
        yield Book(Level(Decimal("1E-8"), Side.BUY), at, (Decimal("1.50"),))
        yield {"for": user, Side.BUY: [Decimal("1E+3")]}
        await trio.sleep_forever()

    async with serving(None) as (service, join):
        service.add_stream("books", books)
        peer = await join("4", "books")
        first, second = await peer.next(2)
        assert first["type"] == "snapshot"
        assert first["data"] == {
            "best": {"price": "0.00000001", "side": "buy"},
            "at": 1795176000250,
            "sizes": ["1.50"],
        }
        assert second["type"] == "update"
        assert (second["prev"], second["seq"]) == (1, 2)
        assert second["data"] == {"for": "4", "buy": ["1000"]}


async def test_each_subscription_has_a_generator_of_its_own(autojump_clock):
    numbers = Numbers()
    async with serving(None) as (service, join):
        service.add_stream("numbers", numbers)
        first, second = await join("4", "numbers"), await join("4", "numbers")
        await trio.testing.wait_all_tasks_blocked()
        assert numbers.users == ["4", "4"]
        assert service.statistics().streams == 2
        await numbers.send("two", 1)
        await numbers.send("one")
        assert (await first.next())[0]["data"] == "one"
        assert (await second.next())[0]["data"] == "two"
        first.leave()
        await trio.testing.wait_all_tasks_blocked()
        assert numbers.running == service.statistics().streams == 1
        await second.request("unsubscribe", args=["numbers"])
        await trio.testing.wait_all_tasks_blocked()
        assert numbers.running == service.statistics().streams == 0
        assert service.statistics().ledger.subscriptions_closed == 2


async def test_one_generator_serves_all_where_it_is_shared(autojump_clock):
    numbers = Numbers()
    async with serving(None) as (service, join):
        service.add_stream("numbers", numbers, shared=True)
        await trio.sleep(60)
        assert numbers.users == []
        peers = [await join(user, "numbers") for user in "456"]
        assert numbers.users == [""]
        await numbers.send(7)
        assert [(await peer.next())[0]["data"] for peer in peers] == [7, 7, 7]
        late = await join("7", "numbers")
        assert (await late.next())[0]["type"] == "snapshot"
        for peer in (*peers, late):
            peer.leave()
        await trio.testing.wait_all_tasks_blocked()
        assert numbers.running == 0
        again = await join("4", "numbers")  # what it is given first is old, and said to be
        await trio.sleep(2)
        assert [each.get("state", each["type"]) for each in again.sent] == ["snapshot", "stale"]
        await numbers.send(8, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert [each.get("data", each.get("state")) for each in again.sent[2:]] == ["live", 8]
        assert numbers.most == 1


@pytest.mark.parametrize("kind", ["state", "events"])
@pytest.mark.parametrize("shared", [False, True])
async def test_a_stream_that_yields_late_is_down_or_quiet_until_then(autojump_clock, shared, kind):
    numbers = Numbers()
    async with serving(None) as (service, join):
        service.add_stream("numbers", numbers, shared=shared, kind=kind)
        began = trio.current_time()
        peer = await join("4", "numbers")
        [status] = await peer.next()
        assert trio.current_time() - began == pytest.approx(1)
        if kind == "events":
            assert (status["state"], status["reason"]) == ("live", "quiet")
            await numbers.send(1)
            assert [each["type"] for each in await peer.next()] == ["snapshot"]
            return
        assert (status["state"], status["reason"]) == ("down", "no_data")
        await numbers.send(1)
        assert [each.get("state", each["type"]) for each in await peer.next(2)] == [
            "live",
            "snapshot",
        ]


@pytest.mark.parametrize("shared", [False, True])
async def test_a_stream_that_fails_is_made_anew(autojump_clock, caplog, shared):
    numbers = Numbers()
    async with serving(None) as (service, join):
        service.add_stream("numbers", numbers, shared=shared)
        peer = await join("4", "numbers")
        await numbers.send(1)
        await peer.next()
        await numbers.send(RuntimeError("a bug"))
        [status] = await peer.next()
        assert (status["state"], status["reason"]) == ("stale", "source_error")
        assert service.statistics().streams == 0
        await trio.sleep(1.1)
        await numbers.send(2, 1)
        live, update = await peer.next(2)
        assert (live["state"], update["data"]) == ("live", 2)
        assert (update["prev"], update["seq"]) == (1, 2)
        assert service.statistics().failures == {"streams": 1}
        await numbers.send(object(), 1)  # nothing that JSON knows
        assert (await peer.next())[0]["state"] == "stale"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert errors[0].getMessage() == "❌ 数据流numbers出错: RuntimeError: a bug - 1秒后重启"


@pytest.mark.parametrize("shared", [False, True])
async def test_a_stream_that_ends_is_said_to_have_ended(autojump_clock, shared):
    numbers = Numbers()
    async with serving(None) as (service, join):
        service.add_stream("numbers", numbers, shared=shared)
        peer = await join("4", "numbers")
        await numbers.send(1)
        await numbers.ends[0].aclose()
        update, status = await peer.next(2)
        assert update["data"] == 1
        assert (status["state"], status["reason"]) == ("down", "ended")
        await trio.sleep(100)
        assert len(numbers.users) == 1


async def test_a_generator_waits_for_a_peer_that_does_not_read(autojump_clock):
    yielded, closed = 0, False

    async def eager(user: str) -> AsyncIterator[int]:
        nonlocal yielded, closed
        try:
            while True:
                yielded += 1
                yield yielded
        finally:
            closed = True

    async with serving(None) as (service, join):
        service.add_stream("eager", eager)
        peer = await join("4", "eager")
        while yielded < 100:
            await trio.lowlevel.checkpoint()
        peer.reading = trio.Event()
        await trio.sleep(1)
        stopped_at = yielded
        await trio.sleep(5)
        assert yielded == stopped_at
        peer.reading.set()
        await trio.lowlevel.checkpoint()
        await peer.next(stopped_at)
        pushes = await peer.next(200)
        assert [each["data"] for each in pushes] == list(range(stopped_at + 1, stopped_at + 201))
        assert all("dropped" not in each for each in pushes)
        peer.reading = trio.Event()
        await trio.sleep(1)
        peer.leave()  # while it is the generator that waits, at its yield
        await trio.sleep(11)
        assert service.statistics().connections == 0
        assert closed


async def test_of_a_state_the_latest_value_counts(autojump_clock):
    numbers = Numbers()
    async with serving(None) as (service, join):
        service.add_stream("numbers", numbers, kind="state")
        peer = await join("4", {"channel": "numbers", "max_hz": 1})
        for number in range(100):
            await numbers.send(number)
            await trio.sleep(0.1)
        await trio.sleep(1)
        assert 8 < len(peer.sent) < 14
        assert peer.sent[-1]["data"] == 99
        assert sum(each.get("merged", 1) for each in peer.sent) == 100


async def test_a_stream_cannot_be_resumed_nor_published_to(autojump_clock):
    async with serving(None) as (service, join):
        service.add_stream("numbers", Numbers())
        since = {"epoch": "0", "seq": 1}
        peer = await join("4")
        reply = await peer.request("subscribe", args=[{"channel": "numbers", "since": since}])
        assert reply["results"][0] == {"channel": "numbers", "ok": True, "recovered": False}
        with pytest.raises(ValueError, match="from its generator"):
            await service.publish("numbers", 1, user="4")
        with pytest.raises(ConfigurationError, match="twice"):
            service.add_stream("pnl", Numbers())
    with pytest.raises(ServiceClosed):
        service.add_stream("late", Numbers())


async def test_every_generator_has_ended_with_the_service(autojump_clock):
    own, shared = Numbers(), Numbers()
    async with serving(None) as (service, join):
        service.add_stream("own", own)
        service.add_stream("shared", shared, shared=True)
        for user in "4567":
            await join(user, "own", "shared")
        await trio.testing.wait_all_tasks_blocked()
        assert (own.running, shared.running) == (4, 1)
    assert (own.running, shared.running) == (0, 0)


async def test_a_finally_may_await_behind_a_shield_with_a_deadline(autojump_clock):
    closed = []

    async def session(user: str) -> AsyncIterator[int]:
        try:
            yield 1
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await trio.sleep(0.5)
                closed.append(user)

    async with serving(None) as (service, join):
        service.add_stream("session", session)
        peer = await join("4", "session")
        await peer.next()
        peer.leave()
        await trio.sleep(0.6)
        assert closed == ["4"]
        assert service.statistics().connections == 0


async def test_the_log_names_a_stream_like_any_channel(autojump_clock, caplog):
    numbers = Numbers()
    async with serving(None) as (service, join):
        service.add_stream("numbers", numbers)
        peer = await join("4", "numbers")
        await numbers.send(1)
        await peer.next()
        peer.leave()
        await trio.testing.wait_all_tasks_blocked()
    said = [line for line in lines(caplog) if "numbers" in line]
    assert said == [
        "📋 用户4订阅numbers数据",
        "📤 推送numbers数据给用户4",
        "   🚪 退出房间: numbers_4",
        "📋 用户4取消订阅numbers数据 - 剩余订阅者: 0",
    ]


@pytest.mark.parametrize("endpoint", ["linked", "native"])
def test_of_five_hundred_who_are_cut_every_generator_ends_within_a_second(endpoint):
    with (
        embed("--limits", limits(), exact_memory=False) as server,
        Crowd(server.ports[endpoint]) as crowd,
    ):
        rng = random.Random(7)
        members = crowd.join(500, "numbers", "shared")
        crowd.until(lambda: all(each.pushes > 2 for each in members), "pushes")
        assert faults(members) == []
        assert server.look()["streams"] == 501
        rng.shuffle(members)
        for member in members:
            if rng.random() < 0.1:
                crowd.during(rng.random() / 20)
            rng.choice((member.reset, member.leave))()
        cut_at = time.monotonic()
        at_rest(server)
        seen = server.look_until(lambda seen: seen["streams"] == 0, "the end of every generator")
        assert seen["numbers"]["begun"] == seen["numbers"]["ended"] == 501
        assert seen["numbers"]["last_ended_at"] - cut_at < 1
        assert server.process.traces() == []
        assert json.dumps(seen["failures"]) == "{}"


@pytest.mark.parametrize("shared", [False, True])
async def test_an_error_beside_a_cancellation_ends_nothing_else(autojump_clock, shared):
    async def stream(*user: str) -> AsyncIterator[int]:
        yield 1
        await failing_when_cancelled()

    async with serving(None) as (service, join):
        service.add_stream("stream", stream, shared=shared)
        peer = await join("4", "stream")
        await trio.sleep(3)
        await peer.request("unsubscribe", args=["stream"])
        await trio.sleep(3)
        assert peer.closed_with is None
        assert (await (await join("5", "stream")).next())[0]["type"] == "snapshot"


async def test_a_shared_stream_does_not_run_for_nobody(autojump_clock):
    numbers = Numbers()
    async with serving(None) as (service, join):
        service.add_stream("numbers", numbers, shared=True)
        peer = await join("4")
        # The registry is busy, as with a long fan-out, and then does both at once.
        service._registry._command(lambda: iter([None] * 50))
        peer.say("subscribe", args=["numbers"])
        peer.say("unsubscribe", args=["numbers"])
        await peer.next(2)
        await trio.sleep(100)
        assert service.statistics().subscribers_by_data_type == {}
        assert service.statistics().streams == 0


async def test_a_stream_stops_where_a_send_has_failed(autojump_clock):
    yielded = 0

    async def eager(user: str) -> AsyncIterator[int]:
        nonlocal yielded
        while True:
            yielded += 1
            yield yielded

    async with serving(None) as (service, join):
        service.add_stream("eager", eager)
        peer = await join("4", "eager")
        await peer.next(5)
        peer.reading = trio.Event()
        await trio.testing.wait_all_tasks_blocked()
        before = yielded
        peer._gone = True  # the next send fails, and no end is read
        peer.reading.set()
        for _ in range(1000):
            await trio.lowlevel.checkpoint()
        assert yielded - before < 5


async def test_a_shared_stream_that_takes_long_to_end_leaves_no_live_value(autojump_clock):
    async def stream() -> AsyncIterator[int]:
        try:
            yield 1
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(15)

    async with serving(None) as (service, join):
        service.add_stream("stream", stream, shared=True, kind="state")
        peer = await join("4", "stream")
        await peer.next()
        peer.leave()
        await trio.sleep(1)
        again = await join("4", "stream")
        assert [each.get("state", each["type"]) for each in await again.next(2)] == [
            "snapshot",
            "stale",
        ]


@pytest.mark.parametrize("kind", ["state", "events"])
@pytest.mark.parametrize("how", ["ended", "source_error"])
async def test_how_a_stream_fared_without_a_value_is_not_told_of_the_next(
    autojump_clock, kind, how
):
    numbers = Numbers()
    async with serving(None) as (service, join):
        service.add_stream("numbers", numbers, shared=True, kind=kind)
        peer = await join("4", "numbers")
        if how == "ended":
            await numbers.ends[0].aclose()
        else:
            await numbers.send(RuntimeError("a bug"))
        [status] = await peer.next()
        assert (status["state"], status["reason"]) == ("down", how)
        peer.leave()
        await trio.testing.wait_all_tasks_blocked()
        again = await join("4", "numbers")
        [status] = await again.next()
        expected = ("live", "quiet") if kind == "events" else ("down", "no_data")
        assert (status["state"], status["reason"]) == expected


async def test_who_comes_as_the_last_one_goes_is_told_of_the_next_stream(autojump_clock):
    numbers = Numbers()
    async with serving(None) as (service, join):
        service.add_stream("numbers", numbers, shared=True)
        first, second = await join("4", "numbers"), await join("5")
        await numbers.ends[0].aclose()
        await first.next()
        # The registry is busy: the second one's reply is written before the first one has gone.
        service._registry._command(lambda: iter([None] * 50))
        first.say("unsubscribe", args=["numbers"])
        await first.next()
        second.say("subscribe", args=["numbers"])
        with trio.fail_after(60):
            told = [each.get("reason") for each in (await second.next(3))[1:]]
        assert told == ["ended", "quiet"]
        await numbers.send(1, 1)
        assert (await second.next())[0]["data"] == 1


@pytest.mark.parametrize("last", [2, RuntimeError("a bug"), None])
async def test_what_a_cancelled_stream_still_says_does_not_count(autojump_clock, last):
    made, go_on = 0, trio.Event()

    async def stream() -> AsyncIterator[int]:
        nonlocal made
        made += 1
        if made > 1:
            await trio.sleep_forever()
        yield 1
        await go_on.wait()
        if isinstance(last, Exception):
            raise last
        if last is not None:
            yield last

    async with serving(None) as (service, join):
        service.add_stream("stream", stream, shared=True, kind="state")
        peer = await join("4", "stream")
        await peer.next()
        # The registry comes to both without a pause: the stream goes on only when it is cancelled.
        service._registry._command(lambda: iter([None] * 50))
        service._registry.call(go_on.set)
        peer.say("unsubscribe", args=["stream"])
        await trio.testing.wait_all_tasks_blocked()
        again = await join("4", "stream")
        snapshot, status = await again.next(2)
        assert snapshot["data"] == 1
        assert (status["state"], status["reason"]) == ("stale", "not_watched")
        assert made == 2


@pytest.mark.parametrize("end", ["leave", "unsubscribe"])
async def test_the_last_subscriber_may_go_when_the_registry_has_closed(autojump_clock, caplog, end):
    numbers = Numbers()
    async with serving(None) as (service, join):
        service.add_stream("numbers", numbers, shared=True)
        peer = await join("4", "numbers")
        await numbers.send(1)
        await peer.next()
        [connection] = service.context.connections
        if end == "leave":
            peer.leave()
        else:
            member = connection._member
            service._registry.unsubscribe(member, list(member.subscriptions.values()))
        service._registry.close()
        await trio.testing.wait_all_tasks_blocked()
    assert service.statistics().failures == {}
    assert not [line for line in lines(caplog) if line.startswith("❌") or "处理出错" in line]
