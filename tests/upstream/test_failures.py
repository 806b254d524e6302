"""Sources that fail: for one user, for some, for everybody, for ever, or by asking for a pause."""

from __future__ import annotations

import functools
import logging
import random
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing

from harness.room import lines
from harness.sources import serving
from harness.support import until

from trading_push import Principal, SourceError, open_push_service
from trading_push.connections.connection import Connection
from trading_push.settings.schema import Intervals, Limits, Polling, Settings
from trading_push.testing import MemoryTransport
from trading_push.upstream.failure_log import FailureLog

SETTINGS = Settings(
    intervals=Intervals(pnl=10, balance=10),
    limits=Limits(connections_per_user=1000, unauthenticated_per_address=10_000),
)


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO, "trading_push")


def told_of(caplog: Any) -> list[str]:
    return [line for line in lines(caplog) if "获取" in line or "已恢复" in line]


class Many:
    """Answers for many users at once; it fails for `bad`, for everybody if `down`."""

    def __init__(self, *bad: str) -> None:
        self.bad: dict[str, Exception] = dict.fromkeys(
            bad, ValueError("year 12025 is out of range")
        )
        self.down: Exception | None = None
        self.slow_s = 0.0
        self.calls: list[tuple[float, tuple[str, ...]]] = []
        self.answered: dict[str, list[float]] = {}

    async def fetch(self, user_id: str, data_type: str) -> Any:
        raise AssertionError("it has fetch_many")

    async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any]:
        now = trio.current_time()
        self.calls.append((now, tuple(user_ids)))
        await trio.lowlevel.checkpoint()
        if self.down is not None:
            raise self.down
        for user in user_ids:
            if user in self.bad:
                await trio.sleep(self.slow_s)
                raise self.bad[user]
        for user in user_ids:
            self.answered.setdefault(user, []).append(now)
        return dict.fromkeys(user_ids, now)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("year 12025 is out of range"),
        SourceError("more than one row returned by a subquery"),
        SourceError("the HTTP service answered 500", retryable=False),
        KeyError("7"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        ExceptionGroup("several", [OSError()]),
    ],
)
async def test_a_user_that_a_batch_fails_for_takes_nobody_elses_data_away(
    autojump_clock, caplog, error
):
    source = Many()
    source.bad["7"] = error
    async with serving(source, settings=SETTINGS) as (_, join):
        peers = {user: await join(user, "pnl") for user in map(str, range(10))}
        await trio.sleep(60)
        for user, peer in peers.items():
            if user == "7":
                assert [push["reason"] for push in peer.sent] == ["source_error"]
            else:
                assert sum("data" in push for push in peer.sent) >= 6
    assert sum("失败" in line for line in lines(caplog)) == 1
    assert "获取用户7的pnl数据失败" in told_of(caplog)[0]


async def test_whom_a_batch_fails_for_is_remembered_and_asked_for_alone(autojump_clock, caplog):
    bad = [str(user) for user in range(0, 500, 20)]
    source = Many(*bad)
    async with serving(source, settings=SETTINGS) as (service, join):
        for user in map(str, range(500)):
            await join(user, "pnl")
        await trio.sleep(60)
        assert service.statistics().failing_fetches == len(bad)
        source.calls.clear()
        await trio.sleep(600)
        # 60 polls of all the good ones, and the bad ones now and then.
        good = [users for _, users in source.calls if not set(users) & set(bad)]
        alone = [users for _, users in source.calls if set(users) & set(bad)]
        assert {len(users) for users in alone} == {1}
        assert {user for users in alone for user in users} == set(bad)
        assert len(source.calls) <= 1.75 * len(good)
        # The log names them, and once.
        [_, *later] = [line for line in lines(caplog) if "失败" in line]
        assert len(later) <= 11
        # Once one of them is well again, the others are tried without delay.
        source.bad.clear()
        await trio.sleep(90)
        assert service.statistics().failing_fetches == 0


async def test_a_bad_user_who_is_well_again_comes_back(autojump_clock, caplog):
    source = Many("7")
    async with serving(source, settings=SETTINGS) as (_, join):
        peers = {user: await join(user, "pnl") for user in map(str, range(10))}
        await trio.sleep(30)
        del source.bad["7"]
        await trio.sleep(60)
        assert any("data" in push for push in peers["7"].sent)
        assert told_of(caplog)[-1] == "✅ 用户7的pnl数据已恢复"
        source.calls.clear()
        await trio.sleep(9.9)
        assert {len(users) for _, users in source.calls} != {1}


async def test_slow_users_delay_the_others_by_two_time_outs_at_most(autojump_clock):
    source = Many(*(str(user) for user in range(0, 500, 100)))
    async with serving(source, settings=SETTINGS) as (_, join):
        for user in map(str, range(500)):
            await join(user, "pnl")
        await trio.sleep(100)
        source.bad, bad, source.slow_s = {}, source.bad, 1.0
        await trio.sleep(400)
        source.answered.clear()
        began = trio.current_time()
        source.bad = bad
        await trio.sleep(60)
        for user, times in source.answered.items():
            if user not in bad:
                gaps = [b - a for a, b in zip([began, *times], times, strict=False)]
                assert max(gaps) <= 10 + 2 * 1.0 + 0.5, user
        assert len(source.answered) == 495 or set(bad) & set(source.answered)


async def test_an_outage_is_one_line_and_no_search(autojump_clock, caplog):
    source = Many()
    polling = Polling(fetch_batch=100)
    settings = Settings(intervals=Intervals(pnl=10), polling=polling)
    async with serving(source, settings=settings) as (service, join):
        peers = [await join(str(user), "pnl") for user in range(1000)]
        await trio.sleep(20)
        source.down = ConnectionError("no route to host")
        source.calls.clear()
        await trio.sleep(30)
        assert service.statistics().topics == {"pnl": {"stale": 1000}}
        # Ten batches may be under way when it begins; then one call after another tries.
        assert len(source.calls) <= 10 + 9 * 7
        assert len([line for line in lines(caplog) if "失败" in line]) == 1
        await trio.sleep(300)
        source.calls.clear()
        await trio.sleep(100)
        assert len(source.calls) <= 10 * 9
        # Everybody is asked for as soon as it is over.
        source.down = None
        await trio.sleep(10.5)
        assert service.statistics().topics == {"pnl": {"live": 1000}}
        assert service.statistics().failing_fetches == 0
        recovered = [line for line in lines(caplog) if "已恢复" in line]
        await trio.sleep(5)
        assert 1 <= len(recovered) <= 3
        assert all(peer.sent[-1].get("state") in (None, "live") for peer in peers)


async def test_an_outage_whose_error_changes_is_one_line(autojump_clock, caplog):
    source = Many()
    async with serving(source) as (_, join):  # an interval of one second
        await join("4", "pnl")
        for number in range(50):
            source.down = ConnectionError(f"refused for the {number}th time")
            await trio.sleep(1)
        assert told_of(caplog) == [
            "❌ 获取用户4的pnl数据失败: ConnectionError: refused for the 0th time"
        ]
        await trio.sleep(20)
        assert len(told_of(caplog)) == 2
        source.down = None
        await trio.sleep(3)
        assert told_of(caplog)[-1] == "✅ 用户4的pnl数据已恢复"


async def test_who_comes_in_an_outage_is_told_of_it_at_once(autojump_clock):
    source = Many()
    async with serving(source, settings=SETTINGS) as (_, join):
        for user in map(str, range(5)):
            await join(user, "pnl")
        await trio.sleep(20)
        source.down = ConnectionError()
        await trio.sleep(15)
        began = trio.current_time()
        peer = await join("new", "pnl")
        [status] = await peer.next()
        assert (status["state"], status["reason"]) == ("down", "source_error")
        assert trio.current_time() - began < 1
        source.down = None
        await trio.sleep(10.5)
        assert any("data" in push for push in peer.sent)


async def test_an_error_in_place_of_a_value_is_of_that_user_alone(autojump_clock, caplog):
    class Mixed(Many):
        async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any]:
            values = dict(await super().fetch_many(user_ids, data_type))
            for user in {"3", "4"} & {*user_ids}:
                values[user] = SourceError("the id is refused", retryable=False, reason="refused")
            return values

    source = Mixed()
    async with serving(source, settings=SETTINGS) as (_, join):
        peers = {user: await join(user, "pnl") for user in map(str, range(10))}
        source.calls.clear()
        await trio.sleep(35)
        assert {len(users) for _, users in source.calls[1:]} == {10}  # nothing is searched
        for user, peer in peers.items():
            if user in ("3", "4"):
                assert [(p["state"], p["reason"]) for p in peer.sent] == [("down", "refused")]
            else:
                assert sum("data" in push for push in peer.sent) == 4
    failed = [line for line in lines(caplog) if "失败" in line]
    assert failed == ["❌ 获取用户3的pnl数据失败: the id is refused"]


async def test_a_pause_that_is_told_for_a_user_holds_for_that_user(autojump_clock):
    class Limited:
        def __init__(self) -> None:
            self.asked: Counter[str] = Counter()

        async def fetch(self, user_id: str, data_type: str) -> Any:
            self.asked[user_id] += 1
            if user_id == "4":
                raise SourceError("429", pause_s=45)
            return self.asked[user_id]

    source = Limited()
    async with serving(source) as (_, join):  # an interval of one second
        for user in ("4", "5"):
            await join(user, "pnl")
        await trio.sleep(40)
        for _ in range(3):  # whoever comes meanwhile
            await join("4", "pnl")
        assert source.asked["4"] == 1
        assert source.asked["5"] >= 40
        await trio.sleep(10)
        assert source.asked["4"] == 2


@pytest.mark.parametrize("many", [False, True])
async def test_a_pause_that_is_told_for_everybody_holds_for_everybody(autojump_clock, many):
    calls: list[float] = []

    async def refuse(*_: Any) -> Any:
        calls.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        raise SourceError("banned", pause_s=100, everyone=True)

    class Banned:
        fetch = staticmethod(refuse)

    if many:
        Banned.fetch_many = staticmethod(refuse)  # type: ignore[attr-defined]
    async with serving(Banned()) as (_, join):
        for user in map(str, range(20)):
            await join(user, "pnl")
        await trio.sleep(90)
        assert len(calls) <= 20
        before = len(calls)
        await trio.sleep(100)
        assert len(calls) == before + 1
        await trio.sleep(95)
        assert len(calls) == before + 2


async def test_many_notifications_of_a_user_are_few_questions(autojump_clock):
    class Noisy:
        asked = 0
        sink: Any = None

        async def fetch(self, user_id: str, data_type: str) -> Any:
            self.asked += 1
            return self.asked

        async def watch(self, sink: Any) -> None:
            self.sink = sink
            await trio.sleep_forever()

    source = Noisy()
    async with serving(source, settings=SETTINGS) as (_, join):
        peer = await join("4", "pnl")
        await trio.sleep(0.5)
        for _ in range(300):
            source.sink.changed([("4", "pnl")])
            await trio.sleep(0.01)
        assert source.asked <= 1 + 10 + 3 / 0.2 + 1
        # The last of them is not lost.
        source.sink.changed([("4", "pnl")])
        await trio.sleep(0.25)
        seen = source.asked
        await trio.sleep(5)
        assert source.asked == seen
        assert peer.sent[-1]["data"] == seen


async def test_calls_that_hang_are_told_and_replaced():
    release = threading.Event()
    hung: set[str] = set()

    class Hanging:
        def fetch(self, user_id: str, data_type: str) -> Any:
            if user_id.startswith("hung"):
                hung.add(user_id)
                release.wait(60)
            return 1

    polling = Polling(fetches=4, fetch_timeout_s=0.2)
    settings = Settings(intervals=Intervals(pnl=0.2), polling=polling)
    async with serving(Hanging(), settings=settings) as (service, join):
        for number in range(4):
            await join(f"hung{number}", "pnl")
        await until(lambda: len(hung) == 4)
        peer = await join("5", "pnl")
        await until(lambda: any("data" in push for push in peer.sent))
        await until(lambda: service.statistics().hung_fetches == 4)
        release.set()
        await until(lambda: service.statistics().hung_fetches == 0)


async def test_calls_that_hang_are_logged(caplog):
    await test_calls_that_hang_are_told_and_replaced()
    [line] = [line for line in lines(caplog) if "仍未结束" in line]
    assert line.startswith("⚠️ ")
    assert "pnl" in line


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("hangs", ["entered", "left"])
async def test_a_context_that_hangs_gives_its_slot_back(caplog, plain, hangs):
    contexts: list[str] = []

    @asynccontextmanager
    async def context():
        contexts.append(hangs)
        is_bad = len(contexts) <= 2
        async with trio.open_nursery():
            if is_bad and hangs == "entered":
                await trio.sleep_forever()
            yield
            if is_bad and hangs == "left":
                await trio.sleep_forever()

    class Source:
        async def fetch(self, user_id: str, data_type: str) -> int:
            return 1

    class PlainSource:
        def fetch(self, user_id: str, data_type: str) -> int:
            return 1

    settings = Settings(
        intervals=Intervals(pnl=0.2), polling=Polling(fetches=2, fetch_timeout_s=0.2)
    )
    source = PlainSource() if plain else Source()
    async with serving(source, settings=settings, fetch_context=context) as (_, join):
        peers = [await join(str(number), "pnl") for number in range(4)]
        for peer in peers:
            await until(lambda peer=peer: any("data" in push for push in peer.sent))
    assert told_of(caplog)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("exits", [SystemExit("no database"), SystemExit(3)])
async def test_a_function_that_ends_the_process_has_failed(caplog, plain, exits):
    class Plain:
        def fetch(self, user_id: str, data_type: str) -> Any:
            if user_id == "4":
                sys.exit(exits.code)
            return 1

    class Async:
        async def fetch(self, user_id: str, data_type: str) -> Any:
            return Plain().fetch(user_id, data_type)

    async with serving(Plain() if plain else Async()) as (service, join):
        bad, good = await join("4", "pnl"), await join("5", "pnl")
        assert (await good.next())[0]["data"] == 1
        assert (await bad.next())[0]["state"] == "down"
        await until(lambda: service.statistics().failing_fetches == 1)
    assert any("end the process" in line for line in lines(caplog))


async def test_nothing_else_of_an_application_ends_the_process(autojump_clock, caplog):
    """Neither its feed, its streams, its sessions, its check of tokens nor its hooks."""

    async def authenticate(token: str) -> Any:
        if token == "exit":
            sys.exit(1)
        await trio.lowlevel.checkpoint()
        return Principal(token)

    @asynccontextmanager
    async def session(user: str) -> Any:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            if user == "5":
                sys.exit(1)
            yield
            nursery.cancel_scope.cancel()

    async def ticks(user: str) -> Any:
        yield 1
        sys.exit(1)

    class Feed:
        def knows(self, symbol: str) -> bool:
            return True

        async def run(self, sink: Any) -> None:
            await trio.sleep(1)
            sys.exit(1)

    def leave(*_: Any) -> None:
        sys.exit(1)

    async with (
        trio.open_nursery() as nursery,
        open_push_service(
            Many(),
            feed=Feed(),
            user_session=session,
            on_leave=leave,
            authenticate=authenticate,
            settings=SETTINGS,
        ) as service,
    ):
        service.add_stream("ticks", ticks)

        async def come(name: str) -> MemoryTransport:
            transport = MemoryTransport()
            nursery.start_soon(
                Connection(service.context, transport, service.context.seats.take()).run
            )
            transport.say("auth", token=name)
            transport.say("subscribe", args=["pnl", "ticks", "ticker.BTCUSDT"])
            await trio.sleep(5)
            return transport

        await come("exit")
        await come("5")
        (await come("4")).leave()
        peer = await come("6")
        assert any("data" in push for push in peer.sent)


async def test_an_async_function_behind_a_plain_decorator_is_awaited():
    def plainly(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return function(*args)

        return call

    class Decorated:
        @plainly
        async def fetch(self, user_id: str, data_type: str) -> Any:
            await trio.lowlevel.checkpoint()
            return [user_id]

    async with serving(Decorated()) as (_, join):
        peer = await join("4", "pnl")
        assert (await peer.next())[0]["data"] == ["4"]


async def test_a_coroutine_function_that_returns_a_plain_value_is_used():
    class Marked:
        def fetch(self, user_id: str, data_type: str) -> Any:
            return [user_id]

    if sys.version_info >= (3, 12):
        import inspect

        inspect.markcoroutinefunction(Marked.fetch)
    async with serving(Marked()) as (_, join):
        peer = await join("4", "pnl")
        assert (await peer.next())[0]["data"] == ["4"]


@pytest.mark.parametrize("seed", range(20))
async def test_what_is_held_back_is_logged_when_its_time_has_come(autojump_clock, seed):
    """At odd times, whose sums and differences are rounded."""
    rng = random.Random(seed)
    log = FailureLog("pnl")
    for _ in range(50):
        await trio.sleep(rng.random())
        log.failed({"4": True}, ValueError(str(rng.randrange(3))))
        log.recovered(["4", "5"])
        while (at := log.next_flush()) < trio.current_time() + 30:
            await trio.sleep_until(at)
            log.flush()
            assert log.next_flush() > trio.current_time()


async def test_one_bad_user_in_a_hundred_costs_the_others_nothing(autojump_clock, caplog):
    """As of a database with three threads for a data type and a time-out of a second."""

    class Database(Many):
        threads = trio.CapacityLimiter(3)

        async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any]:
            async with self.threads:
                await trio.sleep(0.01)
                return await super().fetch_many(user_ids, data_type)

    source = Database()
    polling = Polling(fetch_batch=100)
    async with serving(source, settings=Settings(intervals=Intervals(pnl=10), polling=polling)) as (
        _,
        join,
    ):
        for user in map(str, range(2000)):
            await join(user, "pnl")
        await trio.sleep(40)
        source.calls.clear()
        await trio.sleep(100)
        clean_calls = len(source.calls)
        bad = [str(user) for user in range(0, 2000, 100)]
        source.slow_s = 1.0
        source.bad.update(dict.fromkeys(bad, TimeoutError("canceling statement due to timeout")))
        caplog.clear()
        await trio.sleep(60)
        source.calls.clear()
        source.answered.clear()
        await trio.sleep(200)
        assert len(source.calls) <= 1.2 * 2 * clean_calls
        assert len(source.answered) == 2000 - len(bad)
        for user, times in source.answered.items():
            assert all(8 <= b - a <= 12 for a, b in pairwise(times)), user
    assert len([line for line in lines(caplog) if "失败" in line]) <= 5
