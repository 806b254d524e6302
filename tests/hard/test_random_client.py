"""A random client at a service that fails at random: the protocol is kept, and nothing stays.

`TESTS_RANDOM_S` says for how many simulated seconds each seed of the suite runs. The long runs are
of `nox -s soak`: `TESTS_RANDOM_SOAK_S` simulated ones (900), and `TESTS_RANDOM_SOCKETS_S` at real
sockets (900).
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from harness.embedded import Embedded
from harness.random_client import (
    ABSENT,
    Broken,
    Item,
    Journal,
    Leave,
    Model,
    RandomClient,
    Rules,
    Token,
)
from harness.random_drive import (
    Drive,
    MemoryWire,
    SocketWire,
    Wire,
    account,
    collected,
    socket_pair,
    tcp,
)
from harness.random_world import (
    OnPurpose,
    World,
    at_tick,
    keep_journal,
    leftovers,
    open_world,
    rush,
    shuffle_by,
)
from harness.support import PATIENCE_S, TESTS, process

from trading_push import Channel, Principal, PushService, open_push_service
from trading_push.settings.schema import Limits, Settings
from trading_push.testing import peer

SECONDS = float(os.environ.get("TESTS_RANDOM_S", "50"))
SEEDS = (1, 2, 3, 4)
CLIENTS = 20
WILD_S = 18.0
CALM_S = 8.0
BATCHES = 6
RAISED = re.compile(r"[\w.]*(Error|Exception|Group|Broken|OnPurpose)\b")
LINGERS_S = 90.0
"""After how long the last table has forgotten those who are gone."""


# --- on the simulated clock -------------------------------------------------------------------


def wires(service: PushService, world: World, nursery: trio.Nursery) -> Any:
    """What opens a client's connection: over memory, or over a pair of sockets."""

    async def open_wire(client: RandomClient, model: Model) -> Wire:
        token = model.tokens[0] if model.tokens else None
        if client.rng.random() < 0.4:
            if token is not None:
                token.ttl_s = None
            model.name += " in memory"
            return MemoryWire(service, client.rng.random() < 0.7, token)
        stream = socket_pair(service, nursery)
        wire = SocketWire(stream, client.rng, None if token is None else token.text)
        await wire.greet()
        return wire

    return open_wire


async def meddle(service: PushService, world: World, drive: Drive) -> None:
    """Kick and revoke, and tell the models whom it was meant for."""
    rng = world.rng
    while True:
        await world.pause(3)
        now = trio.current_time()
        models = drive.models
        if not models:
            continue
        model = rng.choice(models)
        match rng.randrange(3):
            case 0:
                user = rng.choice(models).client_user() or "1"
                for each in models:
                    if each.client_user() == user:
                        each.condemn(4503, now, surely=each.user == user)
                service.kick(user=user)
            case 1 if model.conn is not None:
                model.condemn(4503, now, surely=True)
                service.kick(connection=model.conn)
            case 2 if model.tokens:
                token = rng.choice(model.tokens)
                token.revoked = True
                sure = model.token is token and not model.asks_for_token
                model.condemn(4503, now, surely=sure)
                service.revoke(token.name)


def comparing(service: PushService, journal: Journal) -> Callable[[Model, float], None]:
    """What compares each subscription with the newest value and status of its topic."""

    def compare(model: Model, now: float) -> None:
        if model.user is None or model.stalls or model.ended or model.leaving or model.doomed:
            return
        for held in model.held.values():
            if not held.spec.own and not (held.max_hz is not None and held.spec.kind == "events"):
                user = model.user if held.spec.per_user else None
                latest = service.latest(held.channel, user)
                newest = None if latest is None else journal.newest(held.channel, user)
                # Without a value, too: a stream may end before its first one.
                topic = service.context.channels.topic(held.channel, user)
                state = service.context.broker.status(topic).state
                model.compare(held, newest, state, now)

    return compare


class Traces(logging.Handler):
    """The exceptions that were logged and that nobody raised on purpose."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, OnPurpose):
            self.seen.append(f"{record.getMessage()}: {error!r}")


async def simulate(seed: int, seconds: float, monkeypatch: Any) -> tuple[Drive, Any]:
    """Run a service and its random clients for so long; what was found, and what is left."""
    shuffle_by(seed)
    rng = random.Random(seed)
    rules = Rules(replaces=rng.random() < 0.5)
    journal = Journal(complete=True)
    world = World(rng, rules, journal)
    keep_journal(monkeypatch, journal)
    if rng.random() < 0.7:
        rush(monkeypatch)
    # Tokens end by the clock on the wall, which goes as fast as the simulated one here.
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began + trio.current_time())
    traces = Traces()
    logger = logging.getLogger("trading_push")
    logger.addHandler(traces)
    logger.propagate = False  # thousands of lines about what fails on purpose
    try:
        async with trio.open_nursery() as nursery, open_world(world, nursery) as service:
            drive = Drive(
                rules,
                journal,
                wires(service, world, nursery),
                is_calm=lambda: world.calm,
                moment=at_tick,
                compare=comparing(service, journal),
            )
            async with trio.open_nursery() as clients:
                clients.start_soon(meddle, service, world, drive)
                drive.start(clients, seed, CLIENTS, 0.4)
                for _ in range(round(seconds / (WILD_S + CALM_S)) or 1):
                    await trio.sleep(WILD_S)
                    world.be_calm()
                    await trio.sleep(CALM_S)
                    world.be_wild()
                drive.over = True
                await trio.sleep(15)
                clients.cancel_scope.cancel()
            world.be_calm()
            await trio.sleep(LINGERS_S)
            left = leftovers(service)
            if world.running:
                left["generators that run"] = world.running
            nursery.cancel_scope.cancel()
    finally:
        monkeypatch.undo()  # outside of trio there is no such clock
        logger.propagate = True
        logger.removeHandler(traces)
    drive.faults += journal.faults
    drive.faults += [Broken("a trace", each) for each in traces.seen]
    return drive, left


@pytest.mark.parametrize("seed", SEEDS)
async def test_the_protocol_is_kept_on_the_autojump_clock(seed, autojump_clock, monkeypatch):
    drive, left = await simulate(seed, SECONDS, monkeypatch)
    assert not drive.faults, drive.account()
    assert left == {}


@pytest.mark.soak
async def test_the_protocol_is_kept_for_long_on_the_autojump_clock(autojump_clock, monkeypatch):
    seconds = float(os.environ.get("TESTS_RANDOM_SOAK_S", "900"))
    drive, left = await simulate(900, seconds, monkeypatch)
    print(f"{drive.visits} visits: {dict(sorted(drive.counts.items()))}")
    assert not drive.faults, drive.account()
    assert left == {}


# --- one fault each ---------------------------------------------------------------------------


async def test_a_batch_does_not_reach_who_has_unsubscribed_meanwhile(autojump_clock, monkeypatch):
    """150 clients of 100 tickers, of which each takes some anew at every batch of all of them."""
    symbols = [f"S{number}" for number in range(100)]
    channels = [f"ticker.{symbol}" for symbol in symbols]
    rules = Rules(subscriptions=100)
    limits = Limits(messages_burst=1000, heartbeat_s=rules.heartbeat_s, subscriptions=100)
    journal, faults, ended = Journal(complete=True), [], 0
    keep_journal(monkeypatch, journal)
    shuffle_by(1)

    async def stay(service: PushService, nursery: trio.Nursery, number: int) -> None:
        nonlocal ended
        rng = random.Random(number)
        model = Model(rules, journal, trio.current_time(), f"client {number}")
        wire = SocketWire(socket_pair(service, nursery, small=False), rng)
        await wire.greet()
        with collected(faults):
            async with trio.open_nursery() as mine:
                mine.start_soon(wire.run, model)
                wire.say(model.auth(Token("4"), ABSENT, trio.current_time()))
                items = [Item(channel, channel) for channel in channels]
                wire.say(model.subscribe(items, ABSENT, trio.current_time()))
                for tick in range(BATCHES):
                    await trio.sleep_until(1 + tick / 10)
                    items = [Item(channel, channel) for channel in rng.sample(channels, 3)]
                    wire.say(model.unsubscribe(items, 2 * tick, trio.current_time()))
                    wire.say(model.subscribe(items, 2 * tick + 1, trio.current_time()))
                await trio.sleep(1)
                model.overdue(trio.current_time())
                model.leave("close", trio.current_time(), 1000)
                wire.leave(Leave("close", 1000))
        ended += 1

    async with (
        trio.open_nursery() as nursery,
        open_push_service(
            authenticate=lambda token: Principal(token.partition("~")[0]),
            settings=Settings(limits=attrs.evolve(limits, connections_per_user=150)),
        ) as service,
    ):
        for symbol in symbols:
            await service.publish(f"ticker.{symbol}", {"symbol": symbol, "n": -1})
        for number in range(150):
            nursery.start_soon(stay, service, nursery, number)
        for tick in range(BATCHES):
            await trio.sleep_until(1 + tick / 10)
            await service.publish_many(
                [(f"ticker.{symbol}", {"symbol": symbol, "n": tick}, None) for symbol in symbols]
            )
        await trio.sleep(3)
    assert ended == 150
    assert not faults, account(faults)


async def test_a_kick_in_the_middle_of_a_batch_harms_nobody_else(autojump_clock, monkeypatch):
    """What the fan-out has left for a peer that is kicked meanwhile does not fit its buffer."""
    rush(monkeypatch)
    names = ["big", *(f"small-{number}" for number in range(12))]
    async with (
        trio.open_nursery() as nursery,
        open_push_service(
            authenticate=lambda token: Principal(token),
            channels=[Channel(name, per_user=False) for name in names],
        ) as service,
        peer(service, "4") as bystander,
    ):
        for name in names:
            await service.publish(name, -1)
        await bystander.subscribe(*names[1:])
        await trio.testing.wait_all_tasks_blocked()
        for turns_before, smalls in itertools.product(range(1, 8), range(13)):
            await service.publish("big", -1)
            stream = socket_pair(service, nursery)
            wire = SocketWire(stream, random.Random(1), "5")
            await wire.greet()
            wire.say(json.dumps({"op": "subscribe", "args": ["big"]}))
            nursery.start_soon(wire._write)
            await stream.receive_some(65536)
            await trio.testing.wait_all_tasks_blocked()
            await service.publish_many(
                [("big", "x" * 100_000, None), *((name, 0, None) for name in names[1 : 1 + smalls])]
            )
            for _ in range(turns_before - 1):
                await trio.lowlevel.checkpoint()
            service.kick(user="5")
            await trio.testing.wait_all_tasks_blocked()
            await stream.aclose()
            await trio.testing.wait_all_tasks_blocked()
        bystander.sent.clear()
        await service.publish(names[1], "still there")
        assert (await bystander.push())["data"] == "still there"
        nursery.cancel_scope.cancel()


# --- at real sockets --------------------------------------------------------------------------


@pytest.mark.soak
def test_the_protocol_is_kept_at_real_sockets():
    """200 connections, at both endpoints, of a server in a process of its own."""
    seconds = float(os.environ.get("TESTS_RANDOM_SOCKETS_S", "900"))
    program = [sys.executable, "-m", "harness.random_world", "--seed", "15"]
    with process(*program, cwd=TESTS) as running:
        server = Embedded(running)
        drive = trio.run(visit_for, list(server.ports.values()), seconds)
        print(f"{drive.visits} visits: {dict(sorted(drive.counts.items()))}")
        assert not drive.faults, drive.account()
        deadline = time.monotonic() + LINGERS_S + PATIENCE_S
        while (seen := server.look("calm"))["leftovers"] and time.monotonic() < deadline:
            time.sleep(1)
        assert seen["leftovers"] == {}
        assert seen["balanced"]
        assert seen["violations"] == []
        raised = [line for line in running.err if RAISED.match(line)]
        assert all("OnPurpose" in line for line in raised), raised


async def visit_for(ports: list[int], seconds: float) -> Drive:
    rules = Rules(exact=False, subscriptions=12)

    async def open_wire(client: RandomClient, model: Model) -> Wire:
        # Who ends connections there tells nobody.
        model.may_close.add(4503)
        token = model.tokens[0] if model.tokens else None
        stream = await tcp(client.rng.choice(ports), client.rng.random() < 0.5)
        wire = SocketWire(stream, client.rng, None if token is None else token.text)
        await wire.greet()
        return wire

    drive = Drive(rules, Journal(complete=False, kept=2000), open_wire)
    async with trio.open_nursery() as nursery:
        drive.start(nursery, 15, 200, 4)
        with trio.move_on_after(seconds):
            while not drive.faults:
                await trio.sleep(1)
        drive.over = True
        await trio.sleep(15)
        nursery.cancel_scope.cancel()
    return drive
