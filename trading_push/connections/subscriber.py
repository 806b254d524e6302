"""The subscriptions of one connection: how each begins, what it is sent first, and its end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

import trio

from trading_push import logs
from trading_push.broker.base import Publication, StatusChange
from trading_push.connections.context import Context
from trading_push.connections.members import Member
from trading_push.connections.subscription import Owner, Siblings, Subscription
from trading_push.protocol import frames, messages
from trading_push.protocol.actions import Subscribe, Unsubscribe, Wanted
from trading_push.topics import Topic
from trading_push.transport.base import Transport

__all__ = ["Carrier", "Subscriber"]

# Trio makes a name for each task anew where it is given none.
_SENDER = "trading_push.connections.subscription.Subscription.run"


class Carrier(Owner, Protocol):
    """The connection, as its subscriptions see it."""

    async def send(self, frames: list[bytes]) -> None:
        """Send some frames, in order; raises TransportClosed when the peer is gone."""
        ...

    def charge(self, size: int) -> None:
        """Count so many bytes that a request was answered with."""
        ...


class Subscriber:
    """The subscriptions of one connection, each with its sender task in the connection's nursery.

    Args:
        context: What the connection shares with others.
        transport: The peer.

    It does not know the connection, which it is a part of: a circle of the two would stay in memory
    until the next full garbage collection.
    """

    __slots__ = (
        "_context",
        "_member",
        "_nursery",
        "_siblings",
        "_streams",
        "_subscriptions",
        "_transport",
    )

    def __init__(self, context: Context, transport: Transport) -> None:
        self._context = context
        self._transport = transport
        self._member: Member
        self._nursery: trio.Nursery
        self._subscriptions: dict[Topic, Subscription] = {}
        # What cancels the generator of each subscription to a stream of its own; made with the
        # first one.
        self._streams: dict[Topic, trio.CancelScope] | None = None
        self._siblings = Siblings(context.limits.pending_bytes, context.registry.tally)

    def start(self, nursery: trio.Nursery, member: Member) -> None:
        """Take the connection's nursery, and the registry's name for the connection."""
        self._nursery = nursery
        self._member = member

    def close(self, *, keep: bool) -> None:
        """Shut every subscription for good.

        Args:
            keep: What is pending can still be had, by `rest`.
        """
        for subscription in self._subscriptions.values():
            subscription.close(keep=keep)

    def rest(self) -> list[bytes]:
        """The frames that the sender tasks have not sent before they were cancelled."""
        return [frame for each in self._subscriptions.values() for frame in each.rest()]

    async def subscribe(self, action: Subscribe, carrier: Carrier) -> None:
        context = self._context
        begun: list[Subscription] = []
        for wanted in action.wanted:
            subscription = Subscription(
                wanted.topic,
                context.channels.kind_of(wanted.topic),
                self._transport,
                self._siblings,
                wanted.max_hz,
            )
            self._subscriptions[wanted.topic] = subscription
            begun.append(subscription)
        self.throttle(action.throttled)
        # What is published from here on is offered to them, and waits behind the gate.
        context.registry.subscribe(self._member, begun)
        values: list[bytes] = []
        ready: list[Subscription] = []
        pushed: list[Topic] = []
        room = context.limits.pending_bytes - self._siblings.bytes
        for subscription, wanted in zip(begun, action.wanted, strict=True):
            first = self._first(subscription, wanted, room)
            recovered = wanted.result.recovered
            if isinstance(recovered, bool):
                context.registry.tally.resumes[recovered] += 1
            if first is None:
                continue
            if subscription.kind == "events":
                room -= sum(len(each.data) for each in first)
            ready.append(subscription)
            values += map(subscription.frame_of, first)
            status = subscription.status_frame(self._status(wanted.topic))
            if status is not None:
                values.append(status)
            if first:
                pushed.append(wanted.topic)
        carrier.charge(sum(map(len, values)))
        await carrier.send([frames.frame(messages.encode(action.reply)), *values])
        for topic in pushed:
            self._log_pushed(topic)
        for subscription in ready:
            subscription.open()
        for subscription in begun:
            self._nursery.start_soon(subscription.run, carrier, name=_SENDER)
            if subscription.topic.channel in context.streams.own:
                self._start_stream(subscription)

    def throttle(self, rates: Iterable[tuple[Topic, float | None]]) -> None:
        """Set how often subscriptions are pushed to, times a second; None for no bound."""
        for topic, max_hz in rates:
            self._subscriptions[topic].throttle(max_hz)

    def _start_stream(self, subscription: Subscription) -> None:
        scope = trio.CancelScope()
        if self._streams is None:
            self._streams = {}
        self._streams[subscription.topic] = scope
        self._nursery.start_soon(self._run_stream, subscription, scope)

    async def _run_stream(self, subscription: Subscription, scope: trio.CancelScope) -> None:
        topic = subscription.topic
        with scope:
            await self._context.streams.run_for(subscription, lambda: self._log_pushed(topic))

    def _first(
        self, subscription: Subscription, wanted: Wanted, room: int
    ) -> Sequence[Publication] | None:
        """What a subscription begins with; None where its value is yet to come.

        Args:
            subscription: Which.
            wanted: What the peer has asked for.
            room: How many bytes of missed events may be sent at once.
        """
        broker, topic = self._context.broker, wanted.topic
        if wanted.since is not None:
            missed = broker.since(topic, wanted.since.epoch, wanted.since.seq)
            lost = 0
            if missed and subscription.kind == "events":
                fits = sum(len(each.data) for each in missed) <= room
                lost = 0 if fits else len(missed) - 1
            wanted.result.recovered = missed is not None and not lost
            if lost:
                subscription.resume_without(lost)
            elif missed is not None:
                seq = wanted.since.seq
                subscription.resume(
                    wanted.since.epoch, seq, knows_status=broker.turned_at(topic) < seq
                )
                return missed
        if self._context.awaits_source(topic):
            return None
        snapshot = broker.snapshot(topic)
        return () if snapshot is None else (snapshot,)

    def _status(self, topic: Topic) -> StatusChange:
        return StatusChange(topic, self._context.broker.status(topic), round(time.time() * 1000))

    def _log_pushed(self, topic: Topic) -> None:
        if topic.user is not None and logs.enabled("pushed"):
            logs.emit(logs.line("pushed", data_type=topic.channel, user=topic.user))

    async def unsubscribe(self, action: Unsubscribe, carrier: Carrier) -> None:
        ended = [self._subscriptions.pop(topic) for topic in action.topics]
        for subscription in ended:
            subscription.close()
            if self._streams and subscription.topic in self._streams:
                self._streams.pop(subscription.topic).cancel()
        if ended:
            self._context.registry.unsubscribe(self._member, ended)
        await carrier.send([frames.frame(messages.encode(action.reply))])

    # --- what a sender task asks of the connection: see `subscription.Owner` ---------------

    def begin(self, subscription: Subscription) -> None:
        """Give a subscription the value or the status that there is by now."""
        topic = subscription.topic
        if topic.channel in self._context.streams.own:
            if subscription.idle:
                subscription.offer(self._status(topic))
            subscription.open()
        elif not subscription.shut and subscription.begin(
            self._context.broker.snapshot(topic), self._status(topic)
        ):
            self._log_pushed(topic)

    def sender_started(self, subscription: Subscription) -> None:
        """The source may have answered while the reply was being written."""
        if not self._context.awaits_source(subscription.topic):
            subscription.settle()
