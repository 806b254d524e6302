"""One batch of publications to the subscriptions of its topics; run by the registry task.

Rules, each learnt where it was broken:

1. The fan-out lets other tasks run between what it does for two connections. What was decided for a
   connection before that is written only if none of its subscriptions has changed since: it may
   have ended, or keep another pace. Otherwise the decision is taken back.
2. A frame is the same bytes for every subscriber that was sent the publication before it: it is
   built once. A subscriber that merged, joined or resumed gets a frame of its own (its `prev`
   differs), by its sender task.
3. A connection whose stream raises is dropped, and the others are served.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress

from trading_push import logs
from trading_push.broker.base import Message, Publication, StatusChange
from trading_push.connections.subscription import Siblings, Subscription
from trading_push.connections.tally import Tally
from trading_push.protocol import frames
from trading_push.topics import Topic, family_of
from trading_push.transport.base import Transport, try_write

__all__ = ["deliver"]

SLICE_S = 0.002
"""How long the fan-out goes on before it lets other tasks run."""
_CHUNK = 64
"""How many deliveries there are between two looks at the clock."""

Table = Mapping[Topic, Collection[Subscription]]


class _Shared:
    """A publication, with what it takes to send it as the same bytes to many."""

    __slots__ = ("direct", "epoch", "frame", "message", "prev", "seq")

    def __init__(self, message: Publication, head: bytes) -> None:
        self.message = message
        self.direct = 0
        """How many were sent `frame`, as far as is decided."""
        self.epoch = message.epoch
        self.seq = message.seq
        self.prev = message.seq - 1
        """The `seq` that a subscriber must have been sent last to be sent `frame`."""
        self.frame = frames.frame(
            frames.push(
                head,
                b"update",
                message.epoch,
                self.prev,
                message.seq,
                message.ts,
                message.data,
            )
        )


def deliver(
    batch: Sequence[Message], table: Table, tally: Tally, published_at: float
) -> Iterator[None]:
    """Hand a batch to its subscribers, each connection's frames in one write where it takes them.

    Yields whenever it has run for 2 ms: other tasks must be let run then. The table must not change
    meanwhile.

    Args:
        batch: What was published, or has changed.
        table: Who subscribes to what.
        tally: What is sent is counted in.
        published_at: When it was published, by `time.perf_counter`.
    """
    shared: list[_Shared] = []
    deadline = time.perf_counter() + SLICE_S
    for _ in _deliveries(batch, table, shared):
        if time.perf_counter() > deadline:
            yield
            deadline = time.perf_counter() + SLICE_S
    # Counted once a publication, not once a delivery.
    if shared:
        deliveries, size = tally.deliveries, 0
        for each in shared:
            deliveries[family_of(each.message.topic.channel)] += each.direct
            size += each.direct * len(each.frame)
        tally.delivered_bytes += size
        tally.to_socket.observe(time.perf_counter() - published_at, len(shared))


def _deliveries(batch: Sequence[Message], table: Table, made: list[_Shared]) -> Iterator[None]:
    channel = batch[0].topic.channel
    # No connection has two topics of one channel: there is nothing to join, and it costs less so.
    is_one_channel = all(message.topic.channel == channel for message in batch)
    groups: dict[Transport, _Group] = {}
    for message in batch:
        subscribers = table.get(message.topic)
        if not subscribers:
            continue
        if isinstance(message, StatusChange):
            for subscription in subscribers:
                subscription.offer(message)
            yield
            continue
        shared = _Shared(message, next(iter(subscribers)).head)
        made.append(shared)
        if is_one_channel:
            yield from _to_each(list(subscribers), shared)
        else:
            _decide(subscribers, shared, groups)
            yield
    # Connections that watch the same get the same bytes: they are joined once.
    last: list[_Shared] = []
    joined = b""
    for group in groups.values():
        if group.publications != last:
            last = group.publications
            joined = b"".join([each.frame for each in last])
        group.write(joined)
        yield


def _to_each(subscribers: Sequence[Subscription], shared: _Shared) -> Iterator[None]:
    """Hand one publication to each of its subscribers."""
    frame, seq, epoch, prev = shared.frame, shared.seq, shared.epoch, shared.prev
    size = len(frame)
    offered = 0
    for start in range(0, len(subscribers), _CHUNK):
        for subscription in subscribers[start : start + _CHUNK]:
            # `try_write` written out: every call counts here.
            writer = subscription.writer
            if (
                subscription.direct
                and subscription.sent == prev
                and subscription.epoch == epoch
                and (write := writer.write_now) is not None
            ):
                try:
                    written = write(frame)
                    if written != size:
                        writer.flush_later(frame[written:])
                    subscription.sent = seq
                    continue
                except OSError:
                    pass
                except Exception as error:
                    _drop(subscription.transport, error)
            subscription.offer(shared.message)
            offered += 1
        yield
    shared.direct = len(subscribers) - offered


class _Group:
    """What a batch has for one connection, to go out in one write."""

    __slots__ = ("_changes", "_siblings", "late", "publications", "subscriptions")

    def __init__(self, siblings: Siblings) -> None:
        self.publications: list[_Shared] = []
        self.subscriptions: list[Subscription] = []
        """Which of the connection's each of them is for."""
        self.late: list[tuple[Subscription, Publication]] = []
        """What came behind these for a subscription that waits for its sender task."""
        self._siblings = siblings
        self._changes = siblings.changes

    def write(self, joined: bytes) -> None:
        """Write the joined frames now, or leave all of it to the sender tasks."""
        transport, written = self.subscriptions[0].transport, False
        try:
            if self._siblings.changes == self._changes:
                written = try_write(transport.writer, joined)
        except Exception as error:
            _drop(transport, error)
        if not written:
            deliveries = list(zip(self.subscriptions, self.publications, strict=True))
            for subscription, shared in reversed(deliveries):
                subscription.sent = shared.prev
                shared.direct -= 1
            for subscription, shared in deliveries:
                subscription.offer(shared.message)
        for subscription, message in self.late:
            subscription.offer(message)


def _decide(
    subscribers: Collection[Subscription], shared: _Shared, groups: dict[Transport, _Group]
) -> None:
    """Put one publication into the groups of those who can be sent the shared frame."""
    seq, epoch, prev = shared.seq, shared.epoch, shared.prev
    offered = 0
    for subscription in subscribers:
        group = groups.get(subscription.transport)
        if subscription.direct and subscription.sent == prev and subscription.epoch == epoch:
            if group is None:
                group = groups[subscription.transport] = _Group(subscription.siblings)
            group.publications.append(shared)
            group.subscriptions.append(subscription)
            # Taken back if it is not written: nothing else is sent to this one meanwhile.
            subscription.sent = seq
            continue
        offered += 1
        if group is None:
            subscription.offer(shared.message)
        else:
            group.late.append((subscription, shared.message))
    shared.direct = len(subscribers) - offered


def _drop(transport: Transport, error: Exception) -> None:
    logs.emit(logs.traced("internal_error", error, address=transport.peer))
    with suppress(Exception):
        transport.abort()
