"""A thousand clients and more: who stall, are cut, abort, are told to go, or all come back."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from harness.crowd import MANY, Crowd, at_rest, faults, limits
from harness.embedded import embed
from harness.support import PATIENCE_S, SIX, plain_hypercorn, serving

ENDPOINTS = pytest.mark.parametrize("endpoint", ["linked", "native"])


@ENDPOINTS
def test_who_does_not_read_is_cut_and_nobody_else_notices(endpoint):
    flow = ["ticker.BTCUSDT", "ticker.ETHUSDT", "balance", "positions", "pnl", "orders"]
    with (
        embed("--limits", limits(send_timeout_s=2), "--hz", "20") as server,
        Crowd(server.ports[endpoint]) as crowd,
    ):
        readers = crowd.join(800, "ticker.BTCUSDT", "ticker.ETHUSDT")
        crowd.during(1)
        before = server.look()
        crowd.join(200, *flow, reads=False, users=5)
        deadline = time.monotonic() + PATIENCE_S
        while (seen := server.look())["connections"] > len(readers):
            assert time.monotonic() < deadline, seen
            crowd.during(1)  # a look holds the server for a while
        # Each sender task that waited behind the first counts, too.
        assert 200 <= len(seen["stalled_s"]) <= 200 * len(flow)
        # The stream itself was refused a moment before its first sender was.
        assert 1.5 <= max(seen["stalled_s"]) <= 4
        pushes = [member.pushes for member in readers]
        crowd.during(2)
        assert all(
            member.pushes >= before + 20 for member, before in zip(readers, pushes, strict=True)
        )
        assert faults(readers) == []
        assert not any(member.gone for member in readers)
        after = server.look()
        assert after["in_use_kib"] <= 1.05 * before["in_use_kib"], (before, after)
        assert after["violations"] == []
        assert server.process.traces() == []


def abort_at_some_point(crowd: Crowd, rng: random.Random, count: int) -> int:
    """So many clients come, a hundred at a time, and are gone by RST, each at another moment.

    Returns:
        How many of them had subscribed by then.
    """
    served = 0
    for _ in range(count // 100):
        first = len(crowd.members)
        for _ in range(100):
            crowd.add(str(rng.randrange(50)), *SIX[: rng.randrange(1, 7)])
        newest = crowd.members[first:]
        # How far they come: some to be subscribed, however slow the machine is, and the others to
        # anywhere in the handshake before that.
        hasty = [member for member in newest if rng.random() < 0.6]
        share = rng.choice((0.3, 0.1, 0.01))
        while not all(member.ready or member.gone for member in newest):
            crowd.turn(0.002)
            for member in hasty:
                if rng.random() < share:
                    member.reset()
        served += sum(member.ready for member in newest)
        for member in newest:
            member.reset()
        assert faults(newest) == []
        del crowd.members[first:]
    return served


@ENDPOINTS
def test_thousands_who_come_and_abort_leave_nothing(endpoint):
    count = int(os.environ.get("TESTS_ABORTS", "2000"))
    with embed("--limits", limits()) as server, Crowd(server.ports[endpoint]) as crowd:
        rng = random.Random(4)
        abort_at_some_point(crowd, rng, 500)
        before = at_rest(server)
        served = abort_at_some_point(crowd, rng, count)
        assert 0.2 * count < served < 0.9 * count  # or it has shown only one of the two
        began = time.monotonic()
        after = server.look_until(
            lambda seen: (
                seen["balanced"]
                and seen["tasks"] <= before["tasks"]
                and seen["descriptors"] <= before["descriptors"]
            ),
            "the end of all",
        )
        assert time.monotonic() - began < 10
        assert after["connections"] == after["users_online"] == 0
        assert after["in_use_kib"] - before["in_use_kib"] <= 5 * 1024, (before, after)
        assert server.process.traces() == []
        assert after["violations"] == []


@ENDPOINTS
def test_a_thousand_resets_in_the_middle_of_a_push_do_not_hold_the_loop(endpoint):
    with (
        embed("--limits", limits(), exact_memory=False) as server,
        Crowd(server.ports[endpoint]) as crowd,
    ):
        rng = random.Random(5)
        lag_s = 0.0
        for _ in range(10):
            members = crowd.join(100, *SIX, users=20)
            server.look()
            for member in members:
                pushes = member.pushes
                crowd.until(lambda m=member, p=pushes: m.pushes > p, "a push")
                if rng.random() < 0.5:
                    crowd.turn(0)
                member.reset()
            lag_s = max(lag_s, server.look()["lag_s"])
        at_rest(server)
        assert lag_s < 0.1
        assert server.process.traces() == []


def told(crowd: Crowd, live: list, server: object) -> None:
    crowd.until(lambda: all(member.gone for member in live), "everybody is told to go", 20)
    assert {member.close for member in live} == {1012}
    assert all(member.notice and member.notice["code"] == "shutdown" for member in live)
    waits = [member.notice["reconnect_after_ms"] for member in live]
    assert len(set(waits)) > len(waits) / 4  # they do not all come back at the same time
    assert faults(live) == []


def test_a_stop_with_two_thousand_of_whom_twenty_stall(tmp_path):
    env = {f"TRADING_PUSH_LIMITS_{name.upper()}": str(value) for name, value in MANY.items()}
    with serving(tmp_path, "--interval", "pnl=0.2", env=env) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        with Crowd(port) as crowd:
            live = crowd.join(1980, *SIX, users=5)
            crowd.join(20, *SIX, reads=False, users=5)
            crowd.during(1)
            began = time.monotonic()
            server.popen.send_signal(signal.SIGTERM)
            told(crowd, live, server)
            assert server.popen.wait(10) == 0
            assert time.monotonic() - began < 4 + 2
        server.stop()
        assert sum("已退出所有房间并清理订阅" in line for line in server.err) == 2000
        assert server.err[-2:] == ["🔌 当前连接数: 0", "👤 当前在线用户数: 0"]
        assert server.traces() == []


def test_a_stop_of_a_whole_process_group(tmp_path):
    env = {f"TRADING_PUSH_LIMITS_{name.upper()}": str(value) for name, value in MANY.items()}
    env["TRADING_PUSH_INTERVALS_PNL"] = "0.2"
    with plain_hypercorn(tmp_path, "-w", "2", env=env) as server:
        server.wait_for_line("启动交易数据WebSocket推送服务", count=2)
        port = int(server.url.split(":")[2].split("/")[0])
        with Crowd(port) as crowd:
            live = crowd.join(1980, *SIX, users=5)
            crowd.join(20, *SIX, reads=False, users=5)
            began = time.monotonic()
            os.killpg(server.popen.pid, signal.SIGTERM)
            told(crowd, live, server)
            assert server.popen.wait(10) == 0
            assert time.monotonic() - began < 4 + 2
        server.stop()
        assert sum("已退出所有房间并清理订阅" in line for line in server.err) == 2000
        assert server.traces() == []


@ENDPOINTS
def test_a_storm_of_those_who_come_back_misses_nothing(endpoint):
    count = int(os.environ.get("TESTS_STORM", "1000"))
    with (
        embed("--limits", limits(), "--hz", "2", exact_memory=False) as server,
        Crowd(server.ports[endpoint]) as crowd,
    ):
        members = crowd.join(count, "reports", "ticker.BTCUSDT")
        crowd.during(1)
        server.look()
        rng = random.Random(6)
        now = time.monotonic()
        # As the notice of a shutdown asks: each after a time of its own.
        back = sorted(((now + rng.uniform(0.5, 3), each) for each in members), key=lambda b: b[0])
        for member in members:
            member.reset()
        for at, member in back:
            crowd.until(lambda at=at: time.monotonic() >= at, "its time")
            member.connect()
        crowd.until(lambda: all(member.ready for member in members), "all are back", 60)
        took_s = time.monotonic() - now
        gap_s = server.look()["accept_gap_s"]
        pushes = [member.pushes for member in members]
        crowd.until(
            lambda: all(m.pushes > p for m, p in zip(members, pushes, strict=True)), "a push each"
        )
        assert faults(members) == []
        seen = at_rest(server, count)
        assert seen["subscribers_by_data_type"]["reports"] == count
        print(
            f"{endpoint}: {count} back in {took_s:.1f} s, {gap_s:.2f} s between two accepts at most"
        )
        assert gap_s < 1
        assert server.process.traces() == []
