"""Streams of an application's own: async generators, one for each subscription or one for all.

A generator is run, and closed, in one task: when its subscriber leaves it is cancelled where it
waits, and its `finally` has run before that task ends.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final

import trio

from trading_push import logs
from trading_push.broker.base import Broker, Publication, Status, StatusChange
from trading_push.connections.subscription import Subscription
from trading_push.errors import innermost
from trading_push.models import now_ms
from trading_push.protocol.payloads import encode_data
from trading_push.supervision import keep_running
from trading_push.topics import Kind, Topic

__all__ = ["SharedStream", "Stream", "Streams"]

Stream = Callable[..., AsyncGenerator[Any, None]]
"""Returns an async generator of objects that msgspec encodes."""

_Put = Callable[[bytes], Awaitable[None]]
_Tell = Callable[[Status], None]

_LIVE: Final = Status("live")
_FAILED: Final = Status("stale", "source_error")
_ENDED: Final = Status("down", "ended")
_NOT_WATCHED: Final = Status("stale", "not_watched")
_NO_DATA: Final = Status("down", "no_data")


class Streams:
    """The streams of a service, by channel, and how many of their generators run."""

    def __init__(self) -> None:
        self.own: dict[str, Stream] = {}
        """Those with a generator for each subscription; called with the user's id."""
        self.shared: dict[str, SharedStream] = {}
        self.running = 0
        self.failures = 0

    async def run(
        self, name: str, make: Callable[[], AsyncGenerator[Any, None]], put: _Put, tell: _Tell
    ) -> None:
        """Hand on what a generator yields until it ends; one that raises is made anew.

        Args:
            name: The channel, for the log.
            make: Returns the generator.
            put: Takes each value as JSON.
            tell: Takes what the subscribers are to know of it.
        """

        def failed(error: Exception, delay: float) -> None:
            self.failures += 1
            inner = innermost(error)
            logs.emit(logs.traced("stream_failed", inner, channel=name, delay=delay))
            tell(_FAILED)

        async def once() -> None:
            self.running += 1
            try:
                async with aclosing(make()) as values:
                    async for value in values:
                        await put(encode_data(value))
            finally:
                self.running -= 1

        await keep_running(once, failed)
        tell(_ENDED)

    async def run_for(self, subscription: Subscription, pushed: Callable[[], None]) -> None:
        """Run the generator of one subscription until cancelled, or until it ends.

        Of kind `events` it is asked for the next value when the peer has taken the one before.

        Args:
            subscription: The subscription that it runs for.
            pushed: Called for each value.
        """
        topic, epoch, seq = subscription.topic, secrets.token_hex(8), 0
        stream, is_live = self.own[topic.channel], False

        def tell(status: Status) -> None:
            nonlocal is_live
            is_live = status is _LIVE
            if not seq and not is_live:
                status = Status("down", status.reason)
            subscription.offer(StatusChange(topic, status, now_ms()))
            subscription.settle()

        async def put(data: bytes) -> None:
            nonlocal seq
            if subscription.shut:
                await trio.sleep_forever()
            if not is_live:
                tell(_LIVE)
            seq += 1
            subscription.offer(Publication(topic, subscription.kind, epoch, seq, now_ms(), data))
            pushed()
            await trio.lowlevel.checkpoint()
            if subscription.kind == "events":
                await subscription.wait_idle()

        await self.run(topic.channel, lambda: stream(topic.user), put, tell)


class SharedStream:
    """One generator for all subscribers of a channel, while there are any.

    A generator that was cancelled may still come to its next value or its end before it meets a
    checkpoint; neither counts then. It has no subscribers, and those who come are the next one's.
    """

    def __init__(
        self,
        streams: Streams,
        topic: Topic,
        kind: Kind,
        stream: Stream,
        broker: Broker,
        settled: Callable[[Sequence[Topic]], None],
    ) -> None:
        self.awaited = True
        """Whether the generator has yet to yield since it runs."""
        self._tell_settled = settled
        self._streams = streams
        self._topic = topic
        # The status while nothing has been yielded.
        self._initial = _LIVE if kind == "events" else _NO_DATA
        self._stream = stream
        self._broker = broker
        # Set while there are subscribers.
        self._watched = trio.Event()
        # Around the generator that runs; the last one's until the next begins.
        self._scope = trio.CancelScope()

    def watched(self, watched: bool) -> None:
        """The first subscriber has come, or the last one has gone; synchronous."""
        if watched:
            self._watched.set()
        else:
            self._watched = trio.Event()
            self.awaited = True
            # How this generator fared without a value says nothing about the next one.
            is_empty = self._broker.snapshot(self._topic) is None
            self._broker.mark([self._topic], self._initial if is_empty else _NOT_WATCHED)
            self._scope.cancel()

    async def run(self) -> None:
        """Run a generator whenever there are subscribers, one after the other."""
        while True:
            await self._watched.wait()
            if not self._watched.is_set():
                continue
            with trio.CancelScope() as self._scope:
                await self._streams.run(self._topic.channel, self._stream, self._put, self._mark)
                await trio.sleep_forever()

    async def _put(self, data: bytes) -> None:
        if self._scope.cancel_called:
            await trio.sleep_forever()
        self._broker.publish([(self._topic, data)])
        self._settle()
        await trio.lowlevel.checkpoint()

    def _mark(self, status: Status) -> None:
        if self._scope.cancel_called:
            return
        if status.state != "live" and self._broker.snapshot(self._topic) is None:
            status = Status("down", status.reason)
        self._broker.mark([self._topic], status)
        self._settle()

    def _settle(self) -> None:
        if self.awaited:
            self.awaited = False
            self._tell_settled([self._topic])
