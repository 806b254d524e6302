"""One subscription alone: what is offered is sent once, in order, and not before the gate opens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from trading_push.broker.base import Publication, Status, StatusChange
from trading_push.connections.subscription import Siblings, Subscription
from trading_push.connections.tally import Tally
from trading_push.testing import MemoryTransport
from trading_push.topics import Kind, Topic

TOPIC = Topic("x")
LIVE = StatusChange(TOPIC, Status("live"), 0)


def publication(seq: int, kind: Kind, epoch: str = "e") -> Publication:
    return Publication(TOPIC, kind, epoch, seq, 0, b"%d" % seq)


class Owner:
    first_value_wait_s = 1

    def begin(self, subscription: Subscription) -> None:
        subscription.begin(None, LIVE)

    def sender_started(self, subscription: Subscription) -> None: ...

    def send_failed(self, error: Exception) -> None: ...

    def sender_ended(self, subscription: Subscription) -> None: ...


@asynccontextmanager
async def subscription(kind: Kind) -> AsyncIterator[tuple[Subscription, MemoryTransport]]:
    transport = MemoryTransport()
    made = Subscription(TOPIC, kind, transport, Siblings(1000, Tally()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run, Owner())
        yield made, transport
        nursery.cancel_scope.cancel()


def chain(transport: MemoryTransport) -> list[tuple[str, int | None, int]]:
    return [(push["type"], push.get("prev"), push["seq"]) for push in transport.sent]


@pytest.mark.parametrize("kind", ["state", "events"])
async def test_a_snapshot_that_the_fan_out_has_yet_to_hand_out_is_sent_once(autojump_clock, kind):
    async with subscription(kind) as (made, transport):
        made.begin(publication(5, kind), LIVE)
        made.offer(publication(5, kind))  # before it is sent
        await trio.testing.wait_all_tasks_blocked()
        made.offer(publication(5, kind))  # and after
        made.offer(publication(4, kind))
        await trio.testing.wait_all_tasks_blocked()
        made.offer(publication(6, kind))
        await trio.testing.wait_all_tasks_blocked()
        assert chain(transport) == [("snapshot", None, 5), ("update", 5, 6)]


@pytest.mark.parametrize("kind", ["state", "events"])
async def test_what_is_not_newer_than_the_beginning_is_dropped_at_the_gate(autojump_clock, kind):
    transport = MemoryTransport()
    made = Subscription(TOPIC, kind, transport, Siblings(1000, Tally()))
    made.offer(publication(4, kind))
    made.offer(publication(5, kind))
    made.frame_of(publication(5, kind))  # its frame goes with the reply
    made.open()  # which is written; the sender task is started now
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run, Owner())
        await trio.testing.wait_all_tasks_blocked()
        assert transport.sent == []
        made.offer(publication(6, kind))
        await trio.testing.wait_all_tasks_blocked()
        assert chain(transport) == [("update", 5, 6)]
        nursery.cancel_scope.cancel()


async def test_a_new_epoch_is_a_snapshot(autojump_clock):
    async with subscription("state") as (made, transport):
        made.begin(publication(5, "state"), LIVE)
        await trio.testing.wait_all_tasks_blocked()
        made.offer(publication(1, "state", epoch="later"))
        await trio.testing.wait_all_tasks_blocked()
        assert chain(transport) == [("snapshot", None, 5), ("snapshot", None, 1)]


async def test_after_it_is_shut_nothing_is_sent(autojump_clock):
    async with subscription("events") as (made, transport):
        made.offer(publication(1, "events"))
        made.close()
        made.open()
        made.offer(publication(2, "events"))
        await trio.sleep(2)
        assert transport.sent == []
        assert made.idle
