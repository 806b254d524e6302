"""One subscription: its gate, what is pending for its peer, and its sender task.

A publication reaches the peer in one of two ways. Where the sender task is idle, the fan-out writes
the frame itself (`direct`). Otherwise it is offered: of kind `state` the latest waits for the
sender task, of kind `events` all of them do, in order, up to a bound.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import trio

from trading_push.broker.base import Message, Publication, Status, StatusChange
from trading_push.broker.keyed import KeyedPublication
from trading_push.connections.tally import Tally
from trading_push.errors import TransportClosed
from trading_push.protocol import frames
from trading_push.topics import Kind, Topic, family_of

if TYPE_CHECKING:
    from trading_push.transport.base import Transport, Writer

__all__ = ["Owner", "Siblings", "Subscription"]


@attrs.define
class Siblings:
    """What the subscriptions of one connection have in common.

    Args:
        limit: How many bytes of events may wait for the connection.
        tally: What goes out is counted in.
        bytes: How many do.
        changes: How often one of them could be written to past its sender task, and no longer can.
    """

    limit: int
    tally: Tally
    bytes: int = 0
    changes: int = 0


_LIVE: Final = Status("live")


class Owner(Protocol):
    """The connection, as the sender task of a subscription sees it; all methods are synchronous."""

    @property
    def first_value_wait_s(self) -> float:
        """Where the gate is still shut, how long to wait for the source's first answer."""
        ...

    def begin(self, subscription: Subscription) -> None:
        """That is there, or the wait is over: open the gate."""
        ...

    def sender_started(self, subscription: Subscription) -> None:
        """The sender task runs."""
        ...

    def send_failed(self, error: TransportClosed) -> None:
        """A send has found the peer gone, or has met its deadline."""
        ...

    def sender_ended(self, subscription: Subscription) -> None:
        """The sender task ends."""
        ...


_NOTHING: list[Publication] = []
_NO_FRAMES: list[bytes] = []


class _AtEachDelivery:
    # The slots of a base class come first: what the fan-out looks at is in one line of the cache,
    # beside the reference count, and not in three. Most of those are cold at each delivery.
    __slots__ = ("direct", "epoch", "sent", "writer")

    direct: bool
    epoch: str
    sent: int | None
    writer: Writer


class Subscription(_AtEachDelivery):
    """One topic of one connection. All methods but `run` are synchronous and never block.

    It is longer than 300 lines because its gate, what is pending and its sender task are one state:
    parted, they cost the fan-out a call at each delivery.

    It begins gated: nothing is sent until `open`, which its owner calls when the reply to the
    subscribe request has been written.

    Args:
        topic: What is subscribed.
        kind: Whether publications may be merged.
        transport: Where they go.
        siblings: The connection's; events over their limit are dropped, and the peer is
            resynchronised.
        max_hz: At most so many pushes a second; None for as many as there are.
    """

    __slots__ = (
        "_bytes",
        "_drained",
        "_dropped",
        "_opened",
        "_parked",
        "_pause",
        "_pending",
        "_period",
        "_sent_at",
        "_taken",
        "_told",
        "head",
        "kind",
        "settled",
        "shut",
        "siblings",
        "status",
        "topic",
        "transport",
    )

    def __init__(
        self,
        topic: Topic,
        kind: Kind,
        transport: Transport,
        siblings: Siblings,
        max_hz: float | None = None,
    ) -> None:
        self.topic = topic
        self.kind = kind
        self.transport = transport
        self.writer = transport.writer
        self.direct = False
        """Whether a frame may be written past the sender task: it is idle and keeps no pace."""
        self.head = frames.channel_head(topic.channel)
        self.sent = None
        self.epoch = ""
        self.status: StatusChange | None = None
        self.settled = False
        self._told: Status | None = _LIVE
        self._period = 0.0
        self._pause: trio.CancelScope | None = None
        self._sent_at = -math.inf
        self._opened = False
        self.shut = False
        self._parked: trio.lowlevel.Task | None = None
        # Mostly empty, and then one for all: a list or deque of its own is up to 0.7 KB of memory.
        self._pending: list[Publication] = _NOTHING
        self._taken: list[bytes] = _NO_FRAMES
        self.siblings = siblings
        self._bytes = 0
        self._dropped = 0
        self._drained: trio.Event | None = None
        if max_hz is not None:
            self.throttle(max_hz)

    def _aim(self) -> None:
        # Asked for at every delivery, changed seldom.
        direct = self._parked is not None and self._opened and not self._period
        if self.direct and not direct:
            self.siblings.changes += 1
        self.direct = direct

    def throttle(self, max_hz: float | None) -> None:
        """Push at most so many times a second, from the last push on; None for no bound."""
        if not self._period and self.sent is not None:
            # The fan-out does not note when it has pushed, for every note costs: now at the latest.
            self._sent_at = trio.current_time()
        self._period = 0.0 if max_hz is None else 1 / max_hz
        if self._pause is not None:
            self._pause.deadline = self._sent_at + self._period
        self._aim()

    def resume(self, epoch: str, seq: int, *, knows_status: bool) -> None:
        """The peer comes back and has the values up to `seq` of `epoch`.

        Where it may have been told another status since then, it is told the one of now in any
        case.
        """
        self.epoch, self.sent = epoch, seq
        if not knows_status:
            self._told = None

    def resume_without(self, lost: int) -> None:
        """The peer comes back, and of what it has missed so many events do not go out to it."""
        self._drop(lost)

    def begin(self, snapshot: Publication | None, status: StatusChange) -> bool:
        """Open the gate to the value or the status that there is by now.

        Returns:
            Whether it was the snapshot that the peer is sent.
        """
        fresh = snapshot is not None and not self._pending
        if fresh:
            assert snapshot is not None
            self.offer(snapshot)
        if status.status.state != "live" or status.status.reason is not None:
            self.offer(status)
        self.open()
        return fresh

    def open(self) -> None:
        """Open the gate: the reply, and the value that the peer begins with, are written.

        Pending publications that are not newer than that value are dropped.
        """
        if self.shut:
            return
        if self._pending:
            self._hold([each for each in self._pending if self._is_unsent(each)])
        self._opened = True
        self._wake()

    def _is_unsent(self, publication: Publication) -> bool:
        return self.sent is None or publication.epoch != self.epoch or publication.seq > self.sent

    def _is_news(self, publication: Publication) -> bool:
        # A snapshot may be taken of what the fan-out has yet to hand out: that comes once more.
        if self._pending:
            last = self._pending[-1]
            return publication.epoch != last.epoch or publication.seq > last.seq
        return self._is_unsent(publication)

    def close(self, *, keep: bool = False) -> None:
        """Shut the gate for good: nothing more is sent, and the sender task ends.

        Args:
            keep: What is pending can still be had, by `rest`.
        """
        self.shut = True
        if not (keep and self._opened):
            self._hold(_NOTHING)
            self.status = None
        self._opened = False
        if self._pause is not None:
            self._pause.cancel()
        self._tell_drained()
        self._wake()
        self._aim()

    async def wait_idle(self) -> None:
        """Wait until the sender task has taken what was offered, or the subscription is closed."""
        if not (self.idle or self.shut):
            if self._drained is None:
                self._drained = trio.Event()
            await self._drained.wait()

    def _tell_drained(self) -> None:
        if self._drained is not None:
            self._drained.set()
            self._drained = None

    def _hold(self, pending: list[Publication]) -> None:
        self._pending = pending
        self._weigh(sum(len(each.data) for each in pending) - self._bytes)

    def _weigh(self, more: int) -> None:
        """So many bytes more are pending."""
        self._bytes += more
        self.siblings.tally.pending_bytes += more
        if self.kind == "events":
            self.siblings.bytes += more

    def _drop(self, count: int) -> None:
        """So many events do not go out."""
        self._dropped += count
        self.siblings.tally.dropped[family_of(self.topic.channel)] += count

    def offer(self, message: Message) -> None:
        """Keep a message for the sender task."""
        if self.shut:
            return
        if isinstance(message, StatusChange):
            self.status = message
        elif not self._is_news(message):
            return
        elif self.kind != "events":
            self._hold([message])
        else:
            size = len(message.data)
            if self._pending and self.siblings.bytes + size > self.siblings.limit:
                # The peer cannot follow: it gets the latest as a snapshot, and the number it lost.
                self._drop(len(self._pending))
                self._hold([message])
            elif self._pending:
                self._pending.append(message)
                self._weigh(size)
            else:
                self._hold([message])
        self._wake()

    def settle(self) -> None:
        """The source has answered for the first time, with a value or without one."""
        self.settled = True
        self._wake()

    def _wake(self) -> None:
        if self._parked is not None:
            trio.lowlevel.reschedule(self._parked)
            self._parked = None
            self._aim()

    def frame_of(self, publication: Publication) -> bytes:
        """Make the frame of a publication for this peer only; it counts as sent then."""
        first = self.sent is None or publication.epoch != self.epoch or self._dropped > 0
        prev = None if first else self.sent
        if isinstance(publication, KeyedPublication):
            publication = publication.table.since(prev)
        merged = 0 if prev is None or publication.seq - prev < 2 else publication.seq - prev
        if self.kind == "events":
            merged = 0
        payload = frames.push(
            self.head,
            b"snapshot" if first else b"update",
            publication.epoch,
            prev,
            publication.seq,
            publication.ts,
            publication.data,
            merged=merged,
            dropped=self._dropped,
        )
        self._dropped = 0
        self.epoch, self.sent = publication.epoch, publication.seq
        self._sent_at = trio.current_time()
        frame = frames.frame(payload)
        self.siblings.tally.delivered(self.topic.channel, 1, len(frame), max(0, merged - 1))
        return frame

    def status_frame(self, change: StatusChange) -> bytes | None:
        """The frame of a status for this peer; None where it was told that already."""
        status, told = change.status, self._told
        if told is not None and not status.differs(told):
            # That it is live goes without saying, unless there is no value that says so (`quiet`).
            says_so = self.sent is not None or status.reason is None or status == told
            if status.state != "live" or says_so:
                return None
        self._told = status
        return frames.frame(frames.status_push(self.head, status.state, status.reason, change.ts))

    def _take(self) -> list[bytes]:
        # Events keep the pace one by one; states have been merged into one.
        count = 1 if self._period else len(self._pending)
        taken, left = self._pending[:count], self._pending[count:]
        self._hold(left or _NOTHING)
        frames = [self.frame_of(publication) for publication in taken]
        if self.status is not None and not left:
            live = self.status.status.state == "live"
            frame = self.status_frame(self.status)
            self.status = None
            if frame is not None:
                frames.insert(0 if live else len(frames), frame)
        return frames

    def rest(self) -> list[bytes]:
        """What the sender task has not sent before it was cancelled, and what waited behind it."""
        self._period = 0
        frames = self._taken if self.idle else [*self._taken, *self._take()]
        self._taken = _NO_FRAMES
        return frames

    @property
    def idle(self) -> bool:
        """Whether nothing waits for the sender task."""
        return not self._pending and self.status is None

    async def run(self, owner: Owner) -> None:
        """The sender task, started when the reply is written: deliver what is offered.

        It parks in this one frame: a task for each subscription is cheap only as long as it has
        no second frame, no scope of its own and no Event.

        Runs until `close`, until the peer is gone, or until cancelled; none of these leaves a
        half-written frame behind. The owner is told of its end in any case.
        """
        owner.sender_started(self)
        try:
            if not self._opened:
                with trio.move_on_after(owner.first_value_wait_s):
                    while not (self.settled or self.shut):
                        self._parked = trio.lowlevel.current_task()
                        await trio.lowlevel.wait_task_rescheduled(self._unpark)
                owner.begin(self)
            while not self.shut:
                if self.idle:
                    self._tell_drained()
                    self._parked = trio.lowlevel.current_task()
                    self._aim()
                    await trio.lowlevel.wait_task_rescheduled(self._unpark)
                    continue
                if self._period:
                    with trio.CancelScope(deadline=self._sent_at + self._period) as self._pause:
                        await trio.sleep_forever()
                    self._pause = None
                if frames := self._take():
                    self._taken = frames
                    await self.transport.send(frames)
                    self._taken = _NO_FRAMES
        except TransportClosed as error:
            owner.send_failed(error)
        finally:
            owner.sender_ended(self)

    def _unpark(self, raise_cancel: object) -> trio.lowlevel.Abort:
        self._parked = None
        self._aim()
        return trio.lowlevel.Abort.SUCCEEDED
