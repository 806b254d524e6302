"""For tests of an application that embeds the service: a peer in memory, without a socket.

::

    async def test_margin(autojump_clock):
        async with (
            open_push_service(MySource(), authenticate=..., channels=[MARGIN]) as service,
            peer(service, "4") as four,
        ):
            await four.subscribe("margin")
            assert (await four.push("margin"))["data"] == {"ratio": "0.5"}

Everything between the peer and the source is the real thing: the connection's nursery, the
registry, the push loops; only the bytes on the wire are not. With pytest-trio's `autojump_clock`
no test waits. For an application that is synchronous, as Flask's are, `sync_peer` does the same
from a thread.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import trio

from trading_push.auth.principal import Principal
from trading_push.client.after_commit import Value
from trading_push.client.publisher import Publisher
from trading_push.connections.connection import Connection
from trading_push.connections.opening import Opening
from trading_push.errors import PublishError, SendTimeout, TransportClosed, innermost
from trading_push.protocol.frames import PING, payload_of, split
from trading_push.service import PushService, open_push_service
from trading_push.sources.base import Source
from trading_push.transport.base import Close

__all__ = ["MemoryTransport", "SyncPeer", "peer", "sync_peer"]


class MemoryTransport:
    """A `Transport` whose peer is the test.

    Args:
        direct: Whether the fan-out may write past the sender tasks, as over a plain socket.
        send_timeout_s: How long a send waits for a peer that does not read.
        pinged: Whether silence counts: the service then pings the peer, and drops it.
    """

    peer = "10.0.0.1"
    """The peer's address, as the log shows it."""

    def __init__(
        self, *, direct: bool = True, send_timeout_s: float = 10, pinged: bool = False
    ) -> None:
        self.sent: list[dict[str, Any]] = []
        """What has been sent to the peer and not been taken by the test."""
        self.closed_with: tuple[int, str] | None = None
        """The code and reason that the service has closed with."""
        self.peer_close: Close | None = None
        self.last_heard = trio.current_time() if pinged else None
        """When the peer was last heard, where silence counts; each message moves it."""
        self.pings = 0
        """How many pings have been sent; the peer does not answer them."""
        self.reading = trio.Event()
        """Replaced by an event that is not set, it makes the peer stop reading: sends get stuck."""
        self.reading.set()
        self._direct = direct
        self._send_timeout_s = send_timeout_s
        self._turn = trio.Lock()
        self._stuck: trio.CancelScope | None = None
        self._gone = False
        self._left = False
        self._messages, self._inbox = trio.open_memory_channel[str | bytes](math.inf)
        self._news = trio.Event()

    # --- what the test does --------------------------------------------------------------

    def say(self, op: str, **fields: Any) -> None:
        """Send a request; synchronous."""
        self.say_text(json.dumps({"op": op, **fields}))

    def say_text(self, message: str | bytes) -> None:
        """Send anything; bytes are a binary message."""
        if self.last_heard is not None:
            self.last_heard = trio.current_time()
        self._messages.send_nowait(message)

    async def next(self, count: int = 1) -> list[dict[str, Any]]:
        """Take the next messages, replies and pushes alike; waits until there are so many.

        Cancelled, it has taken none. A checkpoint only if it has to wait.

        Raises:
            AssertionError: The service has closed, so that they never come.
        """
        while len(self.sent) < count:
            await self._wait_for_news()
        taken, self.sent = self.sent[:count], self.sent[count:]
        return taken

    async def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request and take its reply; pushes and notices that came before stay in `sent`.

        Raises:
            AssertionError: The service has closed, so that it never comes.
        """
        self.say(op, **fields)
        return await self._take_first(lambda message: message.get("op", "notice") != "notice")

    async def _take_first(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            for index, message in enumerate(self.sent):
                if wanted(message):
                    return self.sent.pop(index)
            await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        if self.closed_with is not None:
            code, reason = self.closed_with
            raise AssertionError(f"closed with {int(code)} {reason!r}")
        await self._news.wait()

    def _tell(self) -> None:
        # Whoever waits has this event, and whoever comes later the next one.
        self._news.set()
        self._news = trio.Event()

    async def subscribe(self, *args: Any) -> None:
        """Subscribe to channels.

        Raises:
            AssertionError: One of them was refused.
        """
        reply = await self.request("subscribe", args=list(args))
        assert reply["ok"], reply

    async def push(self, channel: str | None = None, *, timeout_s: float = 60) -> dict[str, Any]:
        """Take the next message, or the next push of one channel; waits until there is one.

        What came before it on other channels stays in `sent`, for whoever waits for that.
        Cancelled, it has taken nothing. A checkpoint only if it has to wait.

        Args:
            channel: The channel; None takes whatever comes next. A push is a snapshot, an update or
                a status.
            timeout_s: How long it may take, by trio's clock: with `autojump_clock` no time at all.

        Raises:
            AssertionError: It has not come in time; the text says what has come instead. Or the
                service has closed, so that it never comes.
        """
        with trio.move_on_after(timeout_s):
            if channel is None:
                return (await self.next())[0]
            return await self._take_first(lambda message: message.get("channel") == channel)
        others = sorted({str(each.get("channel", each.get("op"))) for each in self.sent})
        raise AssertionError(
            f"no push{'' if channel is None else f' of {channel}'} within {timeout_s:g} s; "
            f"there are {', '.join(others) or 'none'}"
        )

    def leave(self, code: int | None = None, reason: str = "") -> None:
        """Go; with a close frame where `code` is given."""
        if code is not None and not self._left:
            self.peer_close = Close(code, reason)
        self._left = True
        self._gone = True
        self._messages.close()

    # --- what the connection does: see `transport.base.Transport` -----------------------------

    endpoint = "memory"

    @property
    def gone(self) -> bool:
        """Whether the test has left."""
        return self._gone

    def start(self, nursery: trio.Nursery) -> None:
        """No task of its own is needed here."""

    async def receive(self) -> str | bytes:
        """The next message of the test."""
        try:
            return await self._inbox.receive()
        except trio.EndOfChannel:
            raise TransportClosed("the peer is gone") from None

    @property
    def writer(self) -> MemoryTransport:
        """Writes at once, too."""
        return self

    @property
    def write_now(self) -> Callable[[bytes], int] | None:
        """Takes frames, unless the peer does not read or another send is under way."""
        if not self._direct or self._gone or self._turn.locked() or not self.reading.is_set():
            return None
        return self._write

    def _write(self, data: bytes) -> int:
        self._take(split(data))
        return len(data)

    def flush_later(self, rest: bytes) -> None:
        """Nothing is ever left over here."""

    async def send(self, frames: Sequence[bytes]) -> None:
        """Send in turn; waits while the peer does not read."""
        async with self._turn:  # a checkpoint, after which the turns are in the order of the calls
            if self._gone or self.closed_with is not None:
                raise TransportClosed("the peer is gone")
            deadline = trio.current_time() + self._send_timeout_s
            with trio.CancelScope(deadline=deadline, shield=True) as self._stuck:
                await self.reading.wait()
            if self._stuck.cancelled_caught:
                self._gone = True
                raise SendTimeout("the peer did not take a send in time")
            self._take(frames)

    def _take(self, frames: Sequence[bytes]) -> None:
        assert self.closed_with is None, "sent after a close"
        for frame in frames:
            if frame == PING:
                self.pings += 1
            else:
                self.sent.append(json.loads(payload_of(frame)))
        self._tell()

    def shorten_deadline(self, grace_s: float) -> None:
        """Give a stuck send, and each later one, no longer than this."""
        self._send_timeout_s = min(self._send_timeout_s, grace_s)
        if self._stuck is not None:
            self._stuck.deadline = min(self._stuck.deadline, trio.current_time() + grace_s)

    async def close(self, code: int, reason: str) -> None:
        """Close; the test finds `closed_with`."""
        assert self.closed_with is None, "closed twice"
        if not self._gone:
            self.closed_with = code, reason
            self._tell()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Drop the peer."""
        self._gone = True
        self._messages.close()


@asynccontextmanager
async def peer(
    service: PushService, user: str | None = None, **options: Any
) -> AsyncIterator[MemoryTransport]:
    """A peer of a running service, connected while the context is open.

    Args:
        service: The service.
        user: Authenticated as this user from the start, as by a header of the handshake; the reply
            that opens the connection is taken already. None leaves it to the test.
        options: For `MemoryTransport`.
    """
    transport = MemoryTransport(**options)
    opening = Opening(None if user is None else Principal(user))

    async def run(task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        seat = service.context.seats.take()
        try:
            await Connection(service.context, transport, seat, opening).run()
        finally:
            seat.leave()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        if user is not None:
            await transport.next()
        try:
            yield transport
        finally:
            transport.leave()


class _PublishesHere(Publisher):
    """A `Publisher` to a service of this process, for the application under test."""

    def __init__(self, service: PushService, trio_token: trio.lowlevel.TrioToken) -> None:
        super().__init__("http://localhost", "no token is needed here")
        self._service = service
        self._trio_token = trio_token
        self._keys: set[str] = set()  # of the publications so far

    def _publish(self, values: list[Value], timeout_s: float, key: str | None) -> None:
        if key in self._keys:
            return
        given = [(each["channel"], each["data"], each.get("user")) for each in values]
        try:
            trio.from_thread.run(self._service.publish_many, given, trio_token=self._trio_token)
        except ValueError as error:
            raise PublishError(str(error), status=400, retryable=False) from None
        if key is not None:
            self._keys.add(key)


class SyncPeer:
    """A peer for synchronous tests; see `sync_peer`.

    Its methods block. They are those of `MemoryTransport`, and raise what those raise.
    """

    def __init__(
        self,
        service: PushService,
        transport: MemoryTransport,
        trio_token: trio.lowlevel.TrioToken,
    ) -> None:
        self._transport = transport
        self._trio_token = trio_token
        self.publisher: Publisher = _PublishesHere(service, trio_token)
        """Publishes to the service, in place of the application's own; `after_commit` too."""

    def subscribe(self, *args: Any) -> None:
        """Subscribe to channels; AssertionError if one of them is refused."""
        trio.from_thread.run(self._transport.subscribe, *args, trio_token=self._trio_token)

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request and take its reply."""

        async def request() -> dict[str, Any]:
            return await self._transport.request(op, **fields)

        return trio.from_thread.run(request, trio_token=self._trio_token)

    def push(self, channel: str | None = None, *, timeout_s: float = 10) -> dict[str, Any]:
        """Take the next message, or the next push of one channel; waits until there is one.

        AssertionError if it has not come in time, by a real clock.
        """

        async def push() -> dict[str, Any]:
            return await self._transport.push(channel, timeout_s=timeout_s)

        return trio.from_thread.run(push, trio_token=self._trio_token)


@contextmanager
def sync_peer(user: str, source: Source | None = None, **options: Any) -> Iterator[SyncPeer]:
    """A peer for tests of synchronous code, with a service of its own that runs in a thread.

    ::

        def test_deposit():
            with sync_peer("4", FlaskSource(app, fetch)) as four:
                four.subscribe("balance")
                ...  # the application commits, and publishes by `four.publisher`
                assert four.push("balance")["data"] == ...

    Args:
        user: The user that the peer is authenticated as.
        source: As for `open_push_service`.
        options: For `open_push_service`. Without `authenticate`, a token is the user's id.

    Raises:
        What `open_push_service` raises.
    """
    opened: queue.SimpleQueue[SyncPeer | None] = queue.SimpleQueue()
    end = trio.Event()
    failures: list[BaseException] = []

    async def run() -> None:
        async with (
            open_push_service(source, **{"authenticate": Principal, **options}) as service,
            peer(service, user) as transport,
        ):
            opened.put(SyncPeer(service, transport, trio.lowlevel.current_trio_token()))
            await end.wait()

    def run_in_thread() -> None:
        try:
            trio.run(run)
        except BaseException as error:  # noqa: ASYNC103 - raised in the test's own thread
            failures.append(innermost(error, first=True))
        finally:
            opened.put(None)

    thread = threading.Thread(target=run_in_thread, name="sync_peer", daemon=True)
    thread.start()
    found = opened.get()
    if found is not None:
        try:
            yield found
        finally:
            with suppress(trio.RunFinishedError):  # the service has failed: raised below
                trio.from_thread.run_sync(end.set, trio_token=found._trio_token)
            thread.join()
    if failures:
        raise failures[0]
