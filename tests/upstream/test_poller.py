"""The push loops: who is asked, when, and what is pushed."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from harness.room import lines
from harness.sources import Table, serving
from harness.support import hypercorn_serving, trio_client, until

from trading_push import JwtAuthenticator, SourceError, open_push_service
from trading_push.protocol.frames import payload_of, split
from trading_push.settings.schema import Auth, Intervals, Limits, Polling, Settings
from trading_push.sources.base import NO_VALUE
from trading_push.testing import MemoryTransport


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO, "trading_push")


async def test_the_first_subscription_asks_at_once(autojump_clock):
    source = Table()
    source.values["4", "pnl"] = {"total": "1"}
    async with serving(source) as (_, join):
        await trio.sleep(0.3)
        began = trio.current_time()
        peer = await join("4", "pnl")
        [snapshot] = await peer.next()
        assert trio.current_time() == began
        assert snapshot["type"] == "snapshot"
        assert snapshot["data"] == {"total": "1"}
        assert source.calls == [(began, "4", "pnl")]


async def test_an_unchanged_value_is_not_pushed_again_a_changed_one_is(autojump_clock):
    source = Table()
    async with serving(source) as (_, join):
        peer = await join("4", "pnl")
        [snapshot] = await peer.next()
        await trio.sleep(10)
        assert len(source.calls) >= 10
        assert peer.sent == []
        source.values["4", "pnl"] = [1]
        changed_at = trio.current_time()
        [update] = await peer.next()
        assert trio.current_time() - changed_at <= 1
        assert (update["type"], update["data"]) == ("update", [1])
        assert (update["prev"], update["seq"]) == (snapshot["seq"], snapshot["seq"] + 1)


async def test_only_who_is_subscribed_is_asked(autojump_clock):
    source = Table()
    async with serving(source) as (_, join):
        await trio.sleep(60)
        assert source.calls == []
        tabs = [await join("4", "pnl") for _ in range(3)]
        other = await join("5", "orders")
        await trio.sleep(10.5)
        asked = Counter((user, data_type) for _, user, data_type in source.calls)
        assert set(asked) == {("4", "pnl"), ("5", "orders")}
        assert 10 <= asked["4", "pnl"] <= 12
        for tab in tabs[:2]:
            tab.leave()
        await trio.sleep(5)
        assert ("4", "pnl") in {call[1:] for call in source.calls[-2:]}
        tabs[2].leave()
        other.leave()
        await trio.sleep(1.1)  # they are still asked for, should the page only be loaded again
        source.calls.clear()
        await trio.sleep(60)
        assert source.calls == []


async def test_a_page_that_is_loaded_again_does_not_ask_anew(autojump_clock):
    source = Table()
    settings = Settings(intervals=Intervals(pnl=10))
    async with serving(source, settings=settings) as (_, join):
        for _ in range(5):
            peer = await join("4", "pnl")
            peer.leave()
            await trio.sleep(0.5)
        assert len(source.calls) == 1
        await trio.sleep(1)
        await join("4", "pnl")
        await trio.testing.wait_all_tasks_blocked()
        assert len(source.calls) == 2


async def test_what_is_published_stands_until_the_source_changes(autojump_clock):
    source = Table()
    source.values["4", "pnl"] = "source 1"
    async with serving(source) as (service, join):
        peer = await join("4", "pnl")
        await peer.next()
        await service.publish("pnl", "published 1", "4")
        await trio.sleep(5)
        assert [push["data"] for push in await peer.next()] == ["published 1"]
        assert peer.sent == []  # though the source said "source 1" all the time
        source.values["4", "pnl"] = "source 2"
        await trio.sleep(1.5)
        assert [push["data"] for push in await peer.next()] == ["source 2"]
        await service.publish("pnl", "source 3", "4")
        source.values["4", "pnl"] = "source 3"  # it only follows
        await trio.sleep(5)
        assert [push["data"] for push in await peer.next()] == ["source 3"]
        assert peer.sent == []


async def test_what_was_published_before_anybody_came_stands_too(autojump_clock):
    source = Table()
    source.values["4", "pnl"] = "source 1"
    async with serving(source) as (service, join):
        await service.publish("pnl", "published", "4")
        peer = await join("4", "pnl")
        await trio.sleep(5)
        assert [push["data"] for push in await peer.next()] == ["published"]
        assert peer.sent == []
        source.values["4", "pnl"] = "source 2"
        await trio.sleep(1.5)
        assert (await peer.next())[0]["data"] == "source 2"


async def test_a_value_without_an_answer_for_too_long_is_stale(autojump_clock, caplog):
    source = Table()
    source.values["4", "pnl"] = 1
    settings = Settings(intervals=Intervals(pnl=2), polling=Polling(stale_after_s=9))
    async with serving(source, settings=settings) as (service, join):
        peer = await join("4", "pnl")
        await peer.next()
        assert service.statistics().topics == {"pnl": {"live": 1}}
        source.stuck.add("4")
        began = trio.current_time()
        [status] = await peer.next()
        assert (status["state"], status["reason"]) == ("stale", "source_timeout")
        assert 9 <= trio.current_time() - began <= 9 + 2 + 2
        assert service.statistics().topics == {"pnl": {"stale": 1}}
        latest = service.latest("pnl", "4")
        assert latest is not None
        assert (bytes(latest.data), latest.status.state) == (b"1", "stale")
        source.stuck.clear()
        [status] = await peer.next()
        assert status["state"] == "live"
        assert [line for line in lines(caplog) if "用户4的pnl" in line] == [
            "⚠️ 用户4的pnl数据已过期",
            "✅ 用户4的pnl数据已恢复",
        ]


async def test_a_newer_answer_is_never_overtaken_by_an_older_one():
    class Slow:
        """A plain function that answers when the test lets it, with what was so when asked."""

        def __init__(self) -> None:
            self.value = 1
            self.gates: list[threading.Event] = []
            self.sink: Any = None

        def fetch(self, user_id: str, data_type: str) -> int:
            value, gate = self.value, threading.Event()
            self.gates.append(gate)
            gate.wait(10)
            return value

        async def watch(self, sink: Any) -> None:
            self.sink = sink
            await trio.sleep_forever()

    source = Slow()
    slow = Settings(intervals=Intervals(pnl=600))
    async with serving(source, settings=slow) as (_, join), trio.open_nursery() as nursery:

        async def asked(times: int) -> None:
            await until(lambda: len(source.gates) >= times)

        peers: list[MemoryTransport] = []

        async def come() -> None:
            peers.append(await join("4", "pnl"))

        nursery.start_soon(come)
        await asked(1)
        source.value = 2
        source.sink.changed([("4", "pnl")])
        source.gates[0].set()
        await asked(2)
        source.value = 3
        source.sink.changed([("4", "pnl")])
        await trio.sleep(0.1)
        assert len(source.gates) == 2  # one at a time
        source.gates[1].set()
        await asked(3)
        source.gates[2].set()
        await until(lambda: peers and [p.get("data") for p in peers[0].sent][-1:] == [3])
        assert [push["data"] for push in peers[0].sent if "data" in push] == [1, 2, 3]


async def test_a_system_without_threads_is_no_end(autojump_clock, monkeypatch):
    class Plain:
        def fetch(self, user_id: str, data_type: str) -> int:
            return 1

    async def refused(*args: Any, **kwargs: Any) -> Any:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("can't start new thread")

    settings = Settings(intervals=Intervals(pnl=1), polling=Polling(fetches=3))
    async with serving(Plain(), settings=settings) as (service, join):
        with monkeypatch.context() as patched:
            patched.setattr(trio.to_thread, "run_sync", refused)
            await join("4", "pnl")
            await trio.sleep(10)
        await until(lambda: service.statistics().topics == {"pnl": {"live": 1}})


async def test_none_pushes_nothing_and_leaves_the_last_value(autojump_clock):
    source = Table()
    source.values["4", "pnl"] = 7
    async with serving(source) as (_, join):
        peer = await join("4", "pnl")
        await peer.next()
        source.values["4", "pnl"] = None
        await trio.sleep(5)
        assert peer.sent == []
        second = await join("4", "pnl")
        assert (await second.next())[0]["data"] == 7


async def test_a_value_that_is_gone_is_not_shown_to_who_comes_later(autojump_clock):
    source = Table()
    source.values["4", "pnl"] = 7
    async with serving(source) as (_, join):
        peer = await join("4", "pnl")
        [before] = await peer.next()
        source.values["4", "pnl"] = NO_VALUE
        await trio.sleep(5)
        assert [(push["state"], push["reason"]) for push in peer.sent] == [("down", "no_data")]
        second = await join("4", {"channel": "pnl", "since": {"epoch": before["epoch"], "seq": 1}})
        [status] = await second.next()
        assert (status["type"], status["state"], status["reason"]) == ("status", "down", "no_data")
        peer.sent.clear()
        source.values["4", "pnl"] = 8
        await trio.sleep(2)
        for each in (peer, second):
            told = {push["type"]: push for push in each.sent}
            assert told["status"]["state"] == "live"
            assert [push["data"] for push in each.sent if "data" in push] == [8]
        # It goes on without a gap.
        update = peer.sent[-1]
        assert update["type"] == "snapshot" or update["prev"] == before["seq"]


async def test_no_value_leaves_what_the_application_has_published(autojump_clock):
    source = Table()
    source.values["4", "pnl"] = NO_VALUE
    async with serving(source) as (service, join):
        await service.publish("pnl", 5, "4")
        peer = await join("4", "pnl")
        await trio.sleep(5)
        assert [push["data"] for push in peer.sent] == [5]


async def test_where_there_is_no_value_yet_the_status_says_so(autojump_clock):
    source = Table()
    source.values["4", "pnl"] = None
    async with serving(source) as (_, join):
        peer = await join("4", "pnl")
        [status] = await peer.next()
        assert (status["type"], status["state"], status["reason"]) == ("status", "down", "no_data")
        source.values["4", "pnl"] = 1
        status, snapshot = sorted(await peer.next(2), key=lambda push: push["type"], reverse=True)
        assert (status["type"], status["state"]) == ("status", "live")
        assert (snapshot["type"], snapshot["data"]) == ("snapshot", 1)


async def test_a_slow_first_answer_is_waited_for_one_second(autojump_clock):
    source = Table()
    source.stuck = {"4"}
    async with serving(source) as (_, join):
        began = trio.current_time()
        peer = await join("4", "pnl")
        [status] = await peer.next()
        assert trio.current_time() - began == pytest.approx(1)
        assert (status["state"], status["reason"]) == ("down", "no_data")
        pushes = await peer.next(2)
        assert trio.current_time() - began == pytest.approx(30, abs=0.1)
        assert {push["type"] for push in pushes} == {"status", "snapshot"}


async def test_a_failing_source_is_logged_once_a_minute_and_recovers(autojump_clock, caplog):
    source = Table()
    source.values["4", "pnl"] = 1
    async with serving(source) as (service, join):
        peer = await join("4", "pnl")
        await peer.next()
        caplog.clear()
        source.error = ConnectionError("no way\nto the database")
        await trio.sleep(59)
        line = "❌ 获取用户4的pnl数据失败: ConnectionError: no way"
        assert [each for each in lines(caplog) if "获取" in each] == [line]
        assert service.statistics().failing_fetches == 1
        await trio.sleep(60)
        logged = [each for each in lines(caplog) if "获取" in each]
        assert logged == [line, f"{line}（另有59次）"]
        assert [push["state"] for push in peer.sent] == ["stale"]
        source.error = None
        await trio.sleep(2)
        assert lines(caplog)[-1] == "✅ 用户4的pnl数据已恢复"
        assert [push["state"] for push in peer.sent] == ["stale", "live"]
        assert service.statistics().failing_fetches == 0
        assert not [record for record in caplog.records if record.exc_info]


async def test_a_value_that_cannot_be_encoded_is_a_failure_of_that_user_alone(
    autojump_clock, caplog
):
    source = Table()
    source.values["4", "pnl"] = object()
    source.values["5", "pnl"] = 1
    async with serving(source) as (_, join):
        broken, whole = await join("4", "pnl"), await join("5", "pnl")
        assert (await whole.next())[0]["data"] == 1
        assert (await broken.next())[0]["reason"] == "source_error"
        assert any("获取用户4的pnl数据失败" in line for line in lines(caplog))


async def test_a_user_who_blocks_in_async_code_delays_nobody(autojump_clock):
    source = Table()
    source.stuck = {"blocked"}
    async with serving(source) as (_, join):
        await join("blocked", "pnl")
        peers = {name: await join(name, "pnl") for name in ("a", "b", "c")}
        await trio.sleep(30)
        times: dict[str, list[float]] = {}
        for at, user, _ in source.calls:
            times.setdefault(user, []).append(at)
        for name in peers:
            # The first is at once, where the subscription fell; from then on it is the tick.
            gaps = [b - a for a, b in pairwise(times[name][1:])]
            assert len(gaps) >= 25
            assert all(0.8 <= gap <= 1.2 for gap in gaps), gaps
        assert len(times["blocked"]) <= 2


class Blocking:
    """A source with a plain `fetch`, which blocks its thread for one user."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.count = 0

    def fetch(self, user_id: str, data_type: str) -> Any:
        if user_id == "blocked":
            self.release.wait(60)
        self.count += 1
        return self.count


async def test_a_user_who_blocks_a_thread_delays_nobody():
    source = Blocking()
    polling = Polling(fetch_timeout_s=60)
    settings = Settings(intervals=Intervals(pnl=1), polling=polling)
    async with (
        open_push_service(
            source,
            settings=settings,
            authenticate=JwtAuthenticator(Auth(), "a secret of at least thirty-two bytes"),
        ) as service,
        hypercorn_serving(service) as port,
        trio_client(port, "blocked", "pnl"),
        trio_client(port, "5", "pnl") as peer,
    ):
        stamps: list[int] = []
        while len(stamps) < 2 or stamps[-1] - stamps[1] < 30_000:
            push = await peer.push()
            if push["type"] in ("snapshot", "update"):
                stamps.append(push["ts"])
        # The first is at once, where the subscription fell; from then on it is the tick.
        gaps = [b - a for a, b in pairwise(stamps[1:])]
        assert all(800 <= gap <= 1200 for gap in gaps), gaps
        source.release.set()


class Batch(Table):
    """A source that answers for many users at once."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[str, ...]] = []

    async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any]:
        self.batches.append(tuple(user_ids))
        return {user: await self.fetch(user, data_type) for user in user_ids}


async def test_many_users_are_asked_for_in_one_go(autojump_clock):
    source = Batch()
    settings = Settings(intervals=Intervals(pnl=1), polling=Polling(fetch_batch=40))
    async with serving(source, settings=settings) as (_, join):
        peers = [await join(str(user), "pnl") for user in range(100)]
        await trio.testing.wait_all_tasks_blocked()
        source.batches.clear()
        await trio.sleep(1.5)
        assert sorted(map(len, source.batches)) == [20, 40, 40]
        assert len({user for batch in source.batches for user in batch}) == 100
        assert all(peer.sent[0]["type"] == "snapshot" for peer in peers)


async def test_what_is_due_at_one_time_reaches_a_connection_in_one_write(
    autojump_clock, monkeypatch
):
    types = ("balance", "positions", "pnl", "orders")
    intervals = Intervals(balance=4, positions=2, pnl=2, orders=6)

    class Changing(Batch):
        async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any]:
            await trio.sleep(0.005 * types.index(data_type))  # never all at once
            return {user: trio.current_time() for user in user_ids}

    written: list[list[str]] = []
    write = MemoryTransport._write

    def seen(transport: MemoryTransport, data: bytes) -> int:
        pushes = [msgspec.json.decode(payload_of(frame)) for frame in split(data)]
        written.append([push["channel"] for push in pushes])
        return write(transport, data)

    monkeypatch.setattr(MemoryTransport, "_write", seen)
    async with serving(Changing(), settings=Settings(intervals=intervals)) as (_, join):
        for user in range(30):
            await join(str(user), *types)
        await trio.sleep(1)
        written.clear()
        await trio.sleep(12)
    assert Counter(frozenset(channels) for channels in written) == {
        frozenset({"positions", "pnl"}): 2 * 30,
        frozenset({"balance", "positions", "pnl"}): 2 * 30,
        frozenset({"positions", "pnl", "orders"}): 30,
        frozenset(types): 30,
    }


async def test_an_answer_of_no_use_spoils_no_other(autojump_clock, caplog):
    class HalfBroken(Batch):
        async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Any:
            answers = await super().fetch_many(user_ids, data_type)
            return None if data_type == "balance" else answers

    source = HalfBroken()
    async with serving(source) as (service, join):
        for user in range(30):
            await join(str(user), "balance", "pnl")
        await trio.sleep(5)
        for user in range(30):
            assert service.latest("balance", user=str(user)) is None
            assert service.latest("pnl", user=str(user)).status.state == "live"
    assert not [line for line in lines(caplog) if "获取" in line and "balance" not in line]


async def test_a_rush_of_new_users_goes_in_few_batches(autojump_clock):
    class Slow(Batch):
        async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any]:
            await trio.sleep(0.5)
            return await super().fetch_many(user_ids, data_type)

    source = Slow()
    polling = Polling(fetches=2, fetch_batch=20)
    async with serving(source, settings=Settings(polling=polling)) as (_, join):
        # Who came first is asked for at once, alone; two fetches run, and the others gather.
        peers = [await join(f"u{number}", "pnl") for number in range(30)]
        for peer in peers:
            await peer.next()
        asked = source.batches
        assert sorted(map(len, asked)) == [1, 1, 8, 20]
        assert sorted(user for users in asked for user in users) == sorted(
            f"u{number}" for number in range(30)
        )


async def test_a_user_left_out_of_a_batch_keeps_the_last_value(autojump_clock):
    class Sparse(Batch):
        async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any]:
            answers = await super().fetch_many(user_ids, data_type)
            return {user: answer for user, answer in answers.items() if user != "5"}

    source = Sparse()
    async with serving(source) as (_, join):
        four, five = await join("4", "pnl"), await join("5", "pnl")
        assert (await four.next())[0]["type"] == "snapshot"
        assert (await five.next())[0]["state"] == "down"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("plain", [False, True])
async def test_each_fetch_has_a_context_of_its_own(asynchronous, plain):
    entered: list[int] = []
    left: list[int] = []
    threads: set[int] = set()

    @contextmanager
    def context() -> Any:
        number = len(entered)
        entered.append(number)
        threads.add(threading.get_ident())
        yield number
        left.append(number)

    @asynccontextmanager
    async def async_context() -> Any:
        await trio.lowlevel.checkpoint()
        with context() as number:
            yield number

    class Plain:
        def fetch(self, user_id: str, data_type: str) -> Any:
            assert len(entered) == len(left) + 1
            return len(entered)

    class Async:
        async def fetch(self, user_id: str, data_type: str) -> Any:
            assert len(entered) == len(left) + 1
            return len(entered)

    settings = Settings(intervals=Intervals(pnl=0.1))
    async with serving(
        Plain() if plain else Async(),
        settings=settings,
        fetch_context=async_context if asynchronous else context,
    ) as (_, join):
        peer = await join("4", "pnl")
        while len(peer.sent) < 3:
            await peer.next(1)
            if len(entered) >= 3:
                break
    assert entered == left or entered == [*left, entered[-1]]
    # A synchronous context of a plain fetch is entered and left in the thread that runs it.
    assert (threading.get_ident() not in threads) == (plain and not asynchronous)


async def test_a_fetch_that_takes_too_long_is_given_up(autojump_clock, caplog):
    source = Table()
    source.stuck = {"4"}
    settings = Settings(intervals=Intervals(pnl=1), polling=Polling(fetch_timeout_s=5))
    async with serving(source, settings=settings) as (_, join):
        peer = await join("4", "pnl")
        await trio.sleep(6)
        assert any("获取用户4的pnl数据失败: TooSlowError" in line for line in lines(caplog))
        assert [push["reason"] for push in peer.sent] == ["no_data"]


async def test_raw_json_goes_out_as_it_is(autojump_clock):
    source = Table()
    source.values["4", "pnl"] = msgspec.Raw(b'{"a": 1.50}')
    async with serving(source) as (_, join):
        peer = await join("4", "pnl")
        assert (await peer.next())[0]["data"] == {"a": 1.5}


async def test_a_user_who_comes_back_is_not_shown_an_old_value(autojump_clock):
    source = Table()
    source.values["4", "pnl"] = "old"
    async with serving(source) as (_, join):
        peer = await join("4", "pnl")
        await peer.next()
        peer.leave()
        await trio.sleep(30)
        source.values["4", "pnl"] = "new"
        peer = await join("4", "pnl")
        assert (await peer.next())[0]["data"] == "new"


async def test_an_idle_topic_is_forgotten_and_comes_back_with_a_new_epoch(autojump_clock):
    source = Table()
    async with serving(source) as (_, join):
        first = await join("4", "pnl")
        [before] = await first.next()
        first.leave()
        await trio.sleep(30)
        back = await join("4", {"channel": "pnl", "since": {"epoch": before["epoch"], "seq": 1}})
        back.leave()
        await trio.sleep(120)
        again = await join("4", "pnl")
        [after] = await again.next()
        assert after["epoch"] != before["epoch"]


async def test_a_recovery_with_nothing_new_takes_the_stale_back(autojump_clock):
    source = Table()
    source.values["4", "pnl"] = 1
    async with serving(source) as (_, join):
        peer = await join("4", "pnl")
        await peer.next()
        source.error = ConnectionError()
        await trio.sleep(3)
        source.error, source.values["4", "pnl"] = None, None
        await trio.sleep(3)
        assert [push["state"] for push in peer.sent] == ["stale", "live"]


async def test_coming_back_does_not_make_a_failure_news_again(autojump_clock, caplog):
    source = Table()
    source.error = ConnectionError()
    async with serving(source) as (_, join):
        for _ in range(5):
            peer = await join("4", "pnl")
            await trio.sleep(2)
            peer.leave()
            await trio.sleep(2)
    assert sum("获取用户4的pnl数据失败" in line for line in lines(caplog)) == 1


async def test_coming_and_going_does_not_make_the_source_work_harder(autojump_clock):
    source = Table()
    source.values["4", "pnl"] = 1
    settings = Settings(intervals=Intervals(pnl=60), limits=Limits(messages_burst=1000))
    async with serving(source, settings=settings) as (_, join):
        peer = await join("4")
        for _ in range(100):
            peer.say("subscribe", args=["pnl"])
            assert (await peer.next(2))[1]["data"] == 1
            peer.say("unsubscribe", args=["pnl"])
            await peer.next()
        assert len(source.calls) == 1


async def test_a_bad_value_of_one_user_leaves_the_others_of_the_batch_theirs(
    autojump_clock, caplog
):
    class Strict(Batch):
        async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any]:
            self.batches.append(tuple(user_ids))
            if "7" in user_ids:
                raise SourceError("what user 7 has is no amount", retryable=False)
            return dict.fromkeys(user_ids, len(self.batches))

    async with serving(Strict()) as (_, join):
        peers = {user: await join(user, "pnl") for user in map(str, range(20))}
        await trio.sleep(3)
        for user, peer in peers.items():
            types = [push["type"] for push in peer.sent]
            assert types == ["status"] if user == "7" else types.count("update") >= 2
        failed = [line for line in lines(caplog) if "失败" in line]
        assert failed == ["❌ 获取用户7的pnl数据失败: what user 7 has is no amount"]


async def test_a_thread_that_hangs_is_one_thread(caplog):
    source = Blocking()
    polling = Polling(fetch_timeout_s=0.1, fetches=2)
    settings = Settings(intervals=Intervals(pnl=0.1), polling=polling)
    async with serving(source, settings=settings) as (_, join):
        await join("blocked", "pnl")
        other = await join("5", "pnl")
        pushes = await other.next(12)  # more rounds than there are threads
        assert all(push["type"] != "status" for push in pushes)
        source.release.set()
    assert sum("获取用户blocked的pnl数据失败" in line for line in lines(caplog)) == 1


async def test_an_exception_that_cannot_even_be_told_ends_nothing(autojump_clock, caplog):
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    source = Table()
    source.error = Unspeakable()
    async with serving(source) as (_, join):
        peer = await join("4", "pnl")
        assert (await peer.next())[0]["reason"] == "source_error"
    assert "❌ 获取用户4的pnl数据失败: Unspeakable" in lines(caplog)


@pytest.mark.parametrize("away_s", [0.1, 0.5, 0.9, 5, 90])
async def test_who_comes_back_without_a_value_is_told_so_again(autojump_clock, away_s):
    source = Table()
    source.values["4", "pnl"] = None
    polling = Polling(watch_linger_s=0.2)
    settings = Settings(intervals=Intervals(pnl=60), polling=polling)
    async with serving(source, settings=settings) as (service, join):
        for _ in range(3):
            peer = await join("4", "pnl")
            [told] = await peer.next()
            assert (told["type"], told["state"], told["reason"]) == ("status", "down", "no_data")
            assert service.statistics().topics in ({}, {"pnl": {"down": 1}})
            peer.leave()
            await trio.sleep(away_s)


async def test_who_comes_back_to_a_source_that_fails_is_not_told_that_it_is_live(autojump_clock):
    """It answered a moment ago, and has failed since."""
    source = Table()
    source.values["4", "pnl"] = 1
    polling = Polling(watch_linger_s=0)
    settings = Settings(intervals=Intervals(pnl=0.2), polling=polling)
    async with serving(source, settings=settings) as (service, join):
        peer = await join("4", "pnl")
        await peer.next()
        source.error = ConnectionError()
        await trio.sleep(0.3)
        assert peer.sent[-1]["state"] == "stale"
        peer.leave()
        await trio.testing.wait_all_tasks_blocked(0.01)
        back = await join("4", "pnl")
        await trio.sleep(2)
        assert [(m["type"], m.get("state")) for m in back.sent] == [
            ("snapshot", None),
            ("status", "stale"),
        ]
        assert service.statistics().topics == {"pnl": {"stale": 1}}


async def test_who_resumes_after_a_stale_is_told_that_it_is_over(autojump_clock):
    """Also where nothing was missed; and whoever was told that it is live is not told again."""
    source = Table()
    source.values["4", "pnl"] = 1
    settings = Settings(intervals=Intervals(pnl=1), polling=Polling(watch_linger_s=60))
    async with serving(source, settings=settings) as (_, join):
        peer = await join("4", "pnl")
        [value] = await peer.next()
        since = {"channel": "pnl", "since": {"epoch": value["epoch"], "seq": value["seq"]}}
        # From the first publication on it may have been told that there was no value.
        back = await join("4", since)
        assert [m["state"] for m in back.sent] in ([], ["live"])
        back.leave()
        source.values["4", "pnl"] = 2
        [update] = await peer.next()
        since["since"]["seq"] = update["seq"]
        back = await join("4", since)
        assert back.sent == []
        back.leave()
        source.error = ConnectionError()
        await trio.sleep(2)
        assert peer.sent[-1]["state"] == "stale"
        peer.leave()
        source.error = None
        await trio.sleep(2)  # the linger goes on: it is live again
        back = await join("4", since)
        assert [m["state"] for m in back.sent] == ["live"]
        source.values["4", "pnl"] = 3
        await back.next(2)
        again = await join("4", since)
        assert [(m["type"], m.get("state")) for m in again.sent] == [
            ("update", None),
            ("status", "live"),
        ]
