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
from trading_push.transport.base import Transport

__all__ = ["deliver"]

SLICE_S = 0.005
"""How long the fan-out goes on before it lets other tasks run."""
_CHUNK = 64
"""How many deliveries there are between two looks at the clock."""

Table = Mapping[Topic, Collection[Subscription]]


def deliver(batch: Sequence[Message], table: Table) -> Iterator[None]:
    """Hand a batch to its subscribers, each connection's frames in one write where it takes them.

    Yields whenever it has run for 5 ms: other tasks must be let run then. The table must not change
    meanwhile.
    """
    deadline = time.perf_counter() + SLICE_S
    for _ in _one(batch[0], table) if len(batch) == 1 else _many(batch, table):
        if time.perf_counter() > deadline:
            yield
            deadline = time.perf_counter() + SLICE_S


def _one(message: Message, table: Table) -> Iterator[None]:
    subscribers = list(table.get(message.topic, ()))
    if not subscribers:
        return
    if isinstance(message, StatusChange):
        for subscription in subscribers:
            subscription.offer(message)
        return
    seq, epoch, prev = message.seq, message.epoch, message.seq - 1
    frame = _shared_frame(message, subscribers[0].head)
    for start in range(0, len(subscribers), _CHUNK):
        for subscription in subscribers[start : start + _CHUNK]:
            if (
                subscription.direct
                and subscription.sent == prev
                and subscription.epoch == epoch
                and subscription.write(frame)
            ):
                subscription.sent = seq
            else:
                subscription.offer(message)
        yield


def _many(batch: Sequence[Message], table: Table) -> Iterator[None]:
    by_transport: dict[Transport, list[tuple[Subscription, Message]]] = {}
    for message in batch:
        for subscription in table.get(message.topic, ()):
            by_transport.setdefault(subscription.transport, []).append((subscription, message))
        yield
    shared: dict[int, bytes] = {}
    for transport, messages in by_transport.items():
        _together(transport, messages, shared)
        yield


def _together(
    transport: Transport, messages: Sequence[tuple[Subscription, Message]], shared: dict[int, bytes]
) -> None:
    frames: list[bytes] = []
    written: list[tuple[Subscription, Publication]] = []
    for subscription, message in messages:
        if (
            isinstance(message, Publication)
            and subscription.direct
            and subscription.sent == message.seq - 1
            and subscription.epoch == message.epoch
        ):
            frame = shared.get(id(message))
            if frame is None:
                frame = shared[id(message)] = _shared_frame(message, subscription.head)
            frames.append(frame)
            written.append((subscription, message))
            subscription.sent = message.seq
        else:
            subscription.offer(message)
    if frames and not transport.try_send(frames):
        for subscription, publication in reversed(written):
            subscription.sent = publication.seq - 1
        for subscription, publication in written:
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
