"""One batch of publications to the subscriptions of its topics; run by the registry task.

A frame is the same bytes for every subscriber that was sent the publication before it: it is built
once. Only a subscriber that merged, joined or resumed gets a frame of its own (its `prev` differs).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence

from trading_push import protocol
from trading_push.broker.base import Message, Publication, StatusChange
from trading_push.subscription import Subscription
from trading_push.topics import Topic
from trading_push.transport.base import Transport, try_write

__all__ = ["deliver"]

SLICE_S = 0.002
"""How long the fan-out goes on before it lets other tasks run."""
_CHUNK = 64
"""How many deliveries there are between two looks at the clock."""

Table = Mapping[Topic, Collection[Subscription]]


def deliver(batch: Sequence[Message], table: Table) -> Iterator[None]:
    """Hand a batch to its subscribers, each connection's frames in one write where it takes them.

    Yields whenever it has run for 2 ms: other tasks must be let run then. The table must not change
    meanwhile.
    """
    deadline = time.perf_counter() + SLICE_S
    channel = batch[0].topic.channel
    # Nobody watches two topics of one channel: there is nothing to join, and it costs less so.
    alone = all(message.topic.channel == channel for message in batch)
    for _ in _one_by_one(batch, table) if alone else _many(batch, table):
        if time.perf_counter() > deadline:
            yield
            deadline = time.perf_counter() + SLICE_S


def _one_by_one(batch: Sequence[Message], table: Table) -> Iterator[None]:
    for message in batch:
        subscribers = table.get(message.topic)
        if not subscribers:
            continue
        if isinstance(message, StatusChange):
            for subscription in subscribers:
                subscription.offer(message)
        else:
            yield from _one(message, list(subscribers))


def _one(message: Publication, subscribers: list[Subscription]) -> Iterator[None]:
    seq, epoch, prev = message.seq, message.epoch, message.seq - 1
    frame = _shared_frame(message, subscribers[0].head)
    size = len(frame)
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
                except OSError:
                    subscription.offer(message)
                    continue
                if written != size:
                    writer.flush_later(frame[written:])
                subscription.sent = seq
            else:
                subscription.offer(message)
        yield


def _many(batch: Sequence[Message], table: Table) -> Iterator[None]:
    # Each connection's frames, with the subscriptions that they are for.
    groups: dict[Transport, tuple[list[bytes], list[Subscription]]] = {}
    published: dict[bytes, Publication] = {}
    for message in batch:
        subscribers = table.get(message.topic)
        if not subscribers:
            continue
        if isinstance(message, StatusChange):
            for subscription in subscribers:
                subscription.offer(message)
            continue
        seq, epoch, prev = message.seq, message.epoch, message.seq - 1
        frame = _shared_frame(message, next(iter(subscribers)).head)
        published[frame] = message
        for subscription in subscribers:
            if subscription.direct and subscription.sent == prev and subscription.epoch == epoch:
                group = groups.get(subscription.transport)
                if group is None:
                    group = groups[subscription.transport] = ([], [])
                group[0].append(frame)
                group[1].append(subscription)
                subscription.sent = seq
            else:
                subscription.offer(message)
        yield
    # Those who watch the same get the same bytes: they are joined once.
    last: list[bytes] = []
    joined = b""
    for transport, (frames, subscriptions) in groups.items():
        if frames != last:
            last, joined = frames, b"".join(frames)
        if not try_write(transport.writer, joined):
            _take_back(frames, subscriptions, published)
        yield


def _take_back(
    frames: Sequence[bytes],
    subscriptions: Sequence[Subscription],
    published: Mapping[bytes, Publication],
) -> None:
    publications = [published[frame] for frame in frames]
    for subscription, publication in zip(
        reversed(subscriptions), reversed(publications), strict=True
    ):
        subscription.sent = publication.seq - 1
    for subscription, publication in zip(subscriptions, publications, strict=True):
        subscription.offer(publication)


def _shared_frame(publication: Publication, head: bytes) -> bytes:
    return protocol.frame(
        protocol.push(
            head,
            b"update",
            publication.epoch,
            publication.seq - 1,
            publication.seq,
            publication.ts,
            publication.data,
        )
    )
