"""A service for the random client: sources, a market and streams that are slow, fail and end.

In the suite it runs in the test's own process (`open_world`). As a program it serves both
endpoints, as `embedded_server.py` does, and looks inside itself for each line on standard input.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import random
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import attrs
import trio

from harness import recorder
from harness.embedded_server import Numbers, Watch, look, open_hypercorn
from harness.random_client import CHANNELS, SYMBOLS, USERS, Broken, Journal, Rules

from trading_push import (
    AuthenticationError,
    Channel,
    MarketSink,
    PayloadError,
    Principal,
    PushService,
    SourceError,
    Ticker,
    logs,
    open_push_service,
)
from trading_push.broker.base import Publication
from trading_push.connections import fanout
from trading_push.connections.registry import Registry
from trading_push.server import tune
from trading_push.settings.schema import Auth, Intervals, Limits, Polling, Settings
from trading_push.settings.sources import Market
from trading_push.sources.functions import FunctionSource

POLLED = ("balance", "positions", "pnl", "orders")
EMPTY = {("6", "pnl"), ("6", "positions"), ("5", "pnl")}
"""Of whom the source has nothing to say."""
OWN = ("notes", "alerts", "board", "news")


TICK_S = 0.05
"""What anybody does at random is done at a tick: much happens at the same moment."""


def at_tick(at: float) -> float:
    """The next tick."""
    return math.ceil(at / TICK_S) * TICK_S


class OnPurpose(Exception):
    """What an application's own code raises here."""


class Unencodable:
    """What no encoder knows."""


@attrs.define
class World:
    """Everything round the service, by one seed; nothing changes while it is calm."""

    rng: random.Random
    rules: Rules
    journal: Journal
    pace_s: float = 0.15
    """How long the publisher waits between two steps, on an average."""
    filler: int = 600
    """How long the longest events are made by padding."""
    count: Any = attrs.field(factory=itertools.count)
    calm: bool = False
    wild: trio.Event = attrs.field(factory=trio.Event)
    running: int = 0
    """How many generators of streams run."""
    revoked: set[str] = attrs.field(factory=set)
    given: dict[tuple[str, str], Any] = attrs.field(factory=dict)
    """What the source has answered last, which it goes on answering while it is calm."""

    def be_calm(self) -> None:
        self.calm, self.wild = True, trio.Event()

    def be_wild(self) -> None:
        self.calm = False
        self.wild.set()

    def value(self, channel: str, user: str | None, **more: Any) -> dict[str, Any]:
        """A value that is like no other, and says whose it is."""
        size = self.rng.choice((0, 0, 0, 10, 100, self.filler, 3 * self.filler))
        return {"channel": channel, "user": user, "n": next(self.count), **more, "x": "x" * size}

    # --- tokens ----------------------------------------------------------------------------

    async def authenticate(self, token: str) -> Principal:
        """A token says itself what becomes of it; see `random_client.Token`."""
        user, ttl, name, how = token.split("~")
        match how:
            case "bad":
                raise AuthenticationError
            case "expired":
                raise AuthenticationError("it has expired", expired=True)
            case "unavailable":
                raise SourceError("whoever knows is away")
            case "bug":
                raise OnPurpose
            case "hang":
                await trio.sleep_forever()
            case "slow":
                await trio.sleep(self.rng.uniform(0, 0.9))
        return Principal(user, time.time() + float(ttl) if ttl else None, token_id=name)

    # --- accounts --------------------------------------------------------------------------

    async def fetch(self, user_id: str, data_type: str) -> Any:
        """One user's value, late, wrong, or not at all."""
        answer = await self.fetch_many([user_id], data_type)
        return answer.get(user_id) if isinstance(answer, dict) else answer

    async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Any:
        """Some users' values."""
        if self.calm:
            await trio.lowlevel.checkpoint()
            return {user: self.given.get((user, data_type)) for user in user_ids}
        rng = self.rng
        dice = rng.random()
        await trio.sleep(9.0 if dice < 0.02 else rng.choice((0, 0, 0.01, rng.uniform(0, 0.8))))
        if dice > 0.98:
            raise SourceError("the database is away")
        if dice > 0.95:
            raise SourceError("one of them has what cannot be given", retryable=False)
        if dice > 0.94:
            raise OnPurpose
        if dice > 0.93 and len(user_ids) > 1:
            return ["no mapping"]
        return {user: self._answer(user, data_type) for user in user_ids if rng.random() > 0.05}

    def _answer(self, user: str, data_type: str) -> Any:
        dice = self.rng.random()
        if dice < 0.1 or (user, data_type) in EMPTY:
            return None
        if dice < 0.13:
            return {"cannot": Unencodable()}
        if dice > 0.5 or (user, data_type) not in self.given:
            self.given[user, data_type] = self.value(data_type, user)
        return self.given[user, data_type]

    async def watch(self, sink: Any) -> None:
        """Tell of changes, and publish events, until it fails."""
        while True:
            await self.pause(0.5)
            users = self.rng.sample(USERS, 2)
            match self.rng.randrange(8):
                case 0:
                    sink.missed()
                case 1:
                    sink.publish([("alerts", self.value("alerts", user), user) for user in users])
                case 2:
                    sink.publish([("fills", Unencodable(), "1"), ("nowhere", 1, "1")])
                case 3 if self.rng.random() < 0.2:
                    raise OnPurpose
                case _:
                    sink.changed([(user, self.rng.choice(POLLED)) for user in users])

    @asynccontextmanager
    async def session(self, user: str) -> AsyncIterator[None]:
        """A user's session upstream, which may not open, and may break."""
        if self.rng.random() < 0.1:
            raise OnPurpose
        await trio.sleep(self.rng.choice((0, 0, 0.2)))
        yield

    # --- the market ------------------------------------------------------------------------

    def knows(self, symbol: str) -> bool:
        return symbol in SYMBOLS

    async def run(self, sink: MarketSink) -> None:
        """Tickers in bursts, with pauses that make them stale, until it fails."""
        while True:
            await self.pause(0.08)
            dice = self.rng.random()
            if dice < 0.01:
                await trio.sleep(4)
            elif dice < 0.012:
                raise OnPurpose
            elif dice < 0.04:
                symbols = self.rng.choice((None, self.rng.sample(SYMBOLS, 2)))
                sink.stale("disconnected", symbols)
            else:
                symbols = self.rng.sample(SYMBOLS, self.rng.randrange(1, 5))
                sink.update([Ticker(symbol, source_ts=next(self.count)) for symbol in symbols])

    # --- streams ---------------------------------------------------------------------------

    async def own(self, channel: str, user: str) -> AsyncGenerator[Any, None]:
        """A stream of one subscription, which says which of its generators it is."""
        run = next(self.count)
        self.running += 1
        try:
            await trio.sleep(self.rng.choice((0, 0.1, 2.0)))
            for number in itertools.count():
                yield {**self.value(channel, user), "run": run, "n": number}
                await self.pause(0.3)
                self._fail_or_not()
                if self.rng.random() < 0.01:
                    return
        finally:
            self.running -= 1

    async def shared(self, channel: str) -> AsyncGenerator[Any, None]:
        """A stream of everyone."""
        self.running += 1
        try:
            await trio.sleep(self.rng.choice((0, 0.1, 2.0)))
            while self.rng.random() > 0.01:
                yield self.value(channel, None)
                await self.pause(0.2)
                self._fail_or_not()
        finally:
            self.running -= 1

    def _fail_or_not(self) -> None:
        if self.rng.random() < 0.01:
            raise OnPurpose

    async def pause(self, mean_s: float) -> None:
        """Wait a while, and as long as it is calm."""
        await trio.sleep_until(at_tick(trio.current_time() + self.rng.expovariate(1 / mean_s)))
        while self.calm:
            await self.wild.wait()

    # --- what the application does ---------------------------------------------------------

    async def publish(self, service: PushService) -> None:
        """Publish one or many, now and then what cannot be published; for ever."""
        while True:
            await self.pause(self.pace_s)
            count = self.rng.choice((1, 1, 1, 2, 5, 20))
            batch = [self._publication() for _ in range(count)]
            if self.rng.random() < 0.05:
                batch.insert(
                    self.rng.randrange(len(batch) + 1),
                    self.rng.choice([("notes", Unencodable(), "1"), ("nowhere", 1, None)]),
                )
                with suppress(PayloadError, ValueError):
                    await service.publish_many(batch)
                    raise Broken("published what it cannot", str(batch[0]))
            elif count == 1:
                await service.publish(*batch[0])
            else:
                await service.publish_many(batch)

    def _publication(self) -> tuple[str, Any, str | None]:
        rng = self.rng
        channel = rng.choice((*OWN, *OWN, "news", "news", "fills", "balance", "orders"))
        user = rng.choice(USERS) if CHANNELS[channel].per_user else None
        return channel, self.value(channel, user), user

    async def meddle(self, service: PushService) -> None:
        """End connections for no reason that a client could know; for ever."""
        while True:
            await self.pause(5)
            if self.rng.random() < 0.5:
                service.kick(user=self.rng.choice(USERS))
            elif service.context.connections:
                each = self.rng.choice(list(service.context.connections))
                service.kick(connection=each.id)

    def settings(self) -> Settings:
        """Limits that are met all the time."""
        rules = self.rules
        limits = Limits(
            authentication_timeout_s=rules.authentication_timeout_s,
            heartbeat_s=rules.heartbeat_s,
            expiry_notice_s=rules.expiry_notice_s,
            send_timeout_s=rules.send_timeout_s,
            close_timeout_s=rules.close_timeout_s,
            subscriptions=rules.subscriptions,
            messages_per_s=rules.burst / rules.window_s,
            messages_burst=rules.burst,
            bad_messages=rules.bad_messages,
            pending_bytes=rules.pending_bytes,
            first_value_wait_s=rules.first_value_wait_s,
            over_user_limit="replace" if rules.replaces else "reject",
            connections_per_user=4 if rules.exact else 60,
            unauthenticated_per_address=2000,
        )
        return Settings(
            auth=Auth(leeway_s=rules.leeway_s),
            intervals=Intervals(0.5, 1, 1.5, 3),
            limits=limits,
            polling=Polling(fetch_timeout_s=2, fetch_batch=4, stale_after_s=4, topic_linger_s=5),
            market=Market(stale_after_s=2),
        )


class WatchedMarket:
    """The world's market, which is told what is watched."""

    def __init__(self, world: World) -> None:
        self.knows = world.knows
        self.run = world.run
        self.watched: set[str] = set()

    def watch(self, symbol: str) -> None:
        self.watched.add(symbol)

    def unwatch(self, symbol: str) -> None:
        self.watched.remove(symbol)


@asynccontextmanager
async def open_world(world: World, nursery: trio.Nursery) -> AsyncIterator[PushService]:
    """Run the service and what publishes to it; how it is put together is the seed's choice."""
    rng = world.rng
    many = world.fetch_many if rng.random() < 0.7 else None
    source: Any = FunctionSource(world.fetch, fetch_many=many)
    if rng.random() < 0.6:
        source.watch = world.watch
    async with open_push_service(
        source,
        settings=world.settings(),
        feed=WatchedMarket(world) if rng.random() < 0.5 else world,
        authenticate=world.authenticate,
        channels=[
            Channel(name, CHANNELS[name].kind, per_user=CHANNELS[name].per_user) for name in OWN
        ],
        user_session=world.session if rng.random() < 0.4 else None,
    ) as service:
        for name in ("gauge", "numbers"):
            service.add_stream(name, partial(world.own, name), kind=CHANNELS[name].kind)
        for name in ("wave", "pulse"):
            stream = partial(world.shared, name)
            service.add_stream(name, stream, shared=True, kind=CHANNELS[name].kind)
        nursery.start_soon(world.publish, service)
        yield service


def keep_journal(monkeypatch: Any, journal: Journal) -> None:
    """Write down each value that a service hands on from now on."""
    original = Registry.deliver

    def publish(registry: Registry, batch: Sequence[Any]) -> None:
        for message in batch:
            if isinstance(message, Publication):
                topic = message.topic
                journal.publish(topic.channel, topic.user, message.epoch, message.seq, message.data)
        original(registry, batch)

    monkeypatch.setattr(Registry, "deliver", publish)


def rush(monkeypatch: Any) -> None:
    """Let the fan-out give way to other tasks at every turn that it may."""
    monkeypatch.setattr(fanout, "SLICE_S", -1.0)


def shuffle_by(seed: int) -> None:
    """Let the order in which trio runs its tasks follow from a seed, and whatever else is random.

    How far a task comes until it gives way is a matter of real time in some places: two runs of one
    seed are alike, and not the same.
    """
    random.seed(seed)
    trio._core._run._r.seed(seed)


def leftovers(service: PushService) -> dict[str, Any]:
    """What is left in the tables of a service that everybody has left; all looks inside are here.

    Polled topics must have been given up, too: ask when their lingers are over.
    """
    context, registry = service.context, service.context.registry
    statistics = service.statistics()
    seen: dict[str, Any] = {
        "connections": statistics.connections,
        "users online": statistics.users_online,
        "subscribers": {**statistics.subscribers_by_data_type, **statistics.subscribers_by_symbol},
        "generators": statistics.streams,
        "failing fetches": statistics.failing_fetches,
        "ledger": () if statistics.ledger.balanced else attrs.asdict(statistics.ledger),
        "open connections": list(context.connections),
        "seats taken": context.seats.connections.taken,
        "seats of addresses": context.seats.unauthenticated,
        "seats of users": context.seats.by_user,
        "heartbeat": context.heartbeat._steps,
        "registry.table": registry._table,
        "registry.watchers": registry._watchers,
        "registry.online": registry._online,
        "registry.late": registry._late,
        "demand": [
            getattr(service._upstream.interest, name)
            for name in ("_held", "_leaving", "_users", "_sessions")
        ],
        "topics with a source": [
            topic
            for topic in service.context.broker._topics
            if topic.channel in service._upstream.pollers
        ],
        "idle topics": service._upstream._idle_since,
    }
    for poller in service._upstream.pollers.values():
        for part, names in (
            (poller._schedule, ("_watched", "_left", "_now", "_later", "_changes_until")),
            (poller._failures, ("_by_user", "_alone")),
            (poller, ("_queue", "_busy", "_again", "_given", "_settled", "_stale")),
            (poller, ("_answered_at", "_hung", "_new_failures", "_new_recoveries")),
        ):
            for name in names:
                seen[f"{poller.data_type} poller, {name}"] = getattr(part, name)
    return {name: _plain(each) for name, each in seen.items() if _plain(each)}


def _plain(seen: Any) -> Any:
    if isinstance(seen, Mapping):
        return {str(key): str(each)[:100] for key, each in seen.items()}
    if isinstance(seen, str | int):
        return seen
    if isinstance(seen, Iterable):
        return [plain for each in seen if (plain := _plain(each))]
    return str(seen)[:100]


# --- as a program -------------------------------------------------------------------------------


async def main(options: argparse.Namespace) -> None:
    recorder.install()
    tune()
    world = World(
        random.Random(options.seed), Rules(exact=False, subscriptions=12), Journal(complete=False)
    )
    watch = Watch()
    watch.accepts()
    with logs.attached():
        async with trio.open_nursery() as nursery, open_world(world, nursery) as service:
            print(await open_hypercorn(service, service.limits, nursery), flush=True)
            [listener] = await nursery.start(partial(service.serve_native, "127.0.0.1", 0))
            print(listener.socket.getsockname()[1], flush=True)
            nursery.start_soon(watch.run)
            nursery.start_soon(world.meddle, service)
            while command := await trio.to_thread.run_sync(
                sys.stdin.readline, abandon_on_cancel=True
            ):
                if command.strip() == "calm":
                    world.be_calm()
                gc.collect()
                seen = json.loads(look(service, watch, Numbers()))
                print(json.dumps({**seen, "leftovers": leftovers(service)}), flush=True)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    trio.run(main, parser.parse_args())
