"""Parts of the service that raise: told of, counted, and started again after a growing pause."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import trio

from harness.room import by_name, lines
from harness.sources import FAST, Table

from trading_push import open_push_service
from trading_push.connections.connection import Connection
from trading_push.supervision import keep_running
from trading_push.testing import MemoryTransport, peer


async def test_the_pause_doubles_up_to_a_minute_and_begins_anew_after_a_good_while(autojump_clock):
    started: list[float] = []
    told: list[float] = []

    async def run() -> None:
        started.append(trio.current_time())
        if len(started) == 10:
            await trio.sleep(61)
        elif len(started) == 13:
            return
        raise ValueError(len(started))

    await keep_running(run, lambda error, pause: told.append(pause))
    assert told == [1, 2, 4, 8, 16, 32, 60, 60, 60, 1, 1, 2]
    gaps = [round(later - sooner) for sooner, later in pairwise(started)]
    assert gaps == [1, 2, 4, 8, 16, 32, 60, 60, 60, 62, 1, 2]


async def test_cancelled_it_ends_at_once(autojump_clock):
    told: list[Exception] = []

    async def run() -> None:
        await trio.sleep_forever()

    with trio.move_on_after(5):
        await keep_running(run, lambda error, pause: told.append(error))
    assert trio.current_time() == pytest.approx(trio.current_time())
    assert told == []


async def test_a_poller_that_raises_is_started_again_and_asks_everybody(autojump_clock, caplog):
    caplog.set_level(logging.INFO, "trading_push")
    source = Table()
    source.values["4", "pnl"] = [1]
    async with (
        open_push_service(source, settings=FAST, authenticate=by_name) as service,
        peer(service, "4") as here,
    ):
        await here.subscribe("pnl")
        assert (await here.push())["data"] == [1]
        [poller] = [each for name, each in service._upstream.pollers.items() if name == "pnl"]
        broken = [ValueError("a mistake of ours")]
        original = poller._schedule.take_due

        def due() -> list[str]:
            if broken:
                raise broken.pop()
            return original()

        poller._schedule.take_due = due
        source.values["4", "pnl"] = [2]
        assert (await here.push())["data"] == [2]
        assert service.statistics().failures == {"pnl poller": 1}
        # It goes on as before, for those who come later too.
        async with peer(service, "5") as other:
            await other.subscribe("pnl")
            assert (await other.push())["data"] == []
    said = [line for line in lines(caplog) if "pnl poller" in line]
    assert said == ["❌ pnl poller意外出错: ValueError: a mistake of ours - 1秒后重启"]
    traces = [record for record in caplog.records if record.exc_info]
    assert len(traces) == 1


async def test_a_clean_up_that_raises_is_counted(autojump_clock, caplog):
    def on_leave(member: object) -> None:
        raise ValueError("the application's own")

    async with (
        trio.open_nursery() as nursery,
        open_push_service(authenticate=by_name, on_leave=on_leave) as service,
    ):
        gone = MemoryTransport()
        nursery.start_soon(Connection(service.context, gone, service.context.seats.take()).run)
        await trio.testing.wait_all_tasks_blocked()
        gone.leave()
        await service.context.connections.wait_empty()
        await trio.testing.wait_all_tasks_blocked()
        assert service.statistics().failures == {"clean-up": 1}
