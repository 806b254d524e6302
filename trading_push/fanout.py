"""One batch of publications to the subscriptions of its topics; run by the registry task.

Rules, each learnt where it was broken:

1. Whether a frame may go to a subscription is decided in the same step in which it is written: the
   fan-out lets other tasks run between two connections only, never between the two. In the
   meantime a subscription may have ended, or been sent something else.
2. A frame is the same bytes for every subscriber that was sent the publication before it: it is
   built once. A subscriber that merged, joined or resumed gets a frame of its own (its `prev`
   differs), by its sender task.
3. A connection whose stream raises is dropped, and the others are served.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from trading_push import logs, protocol
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


class _Shared:
    """A publication, with what it takes to send it as the same bytes to many."""

    __slots__ = ("epoch", "frame", "message", "prev", "seq")

    def __init__(self, message: Publication, head: bytes) -> None:
        self.message = message
        self.epoch = message.epoch
        self.seq = message.seq
        self.prev = message.seq - 1
        """Who was sent this one last, and no other, is sent `frame`."""
        self.frame = protocol.frame(
            protocol.push(
                head,
                b"update",
                message.epoch,
                self.prev,
                message.seq,
                message.ts,
                message.data,
            )
        )


def deliver(batch: Sequence[Message], table: Table) -> Iterator[None]:
    """Hand a batch to its subscribers, each connection's frames in one write where it takes them.

    Yields whenever it has run for 2 ms: other tasks must be let run then. The table must not change
    meanwhile.
    """
    deadline = time.perf_counter() + SLICE_S
    for _ in _deliveries(batch, table):
        if time.perf_counter() > deadline:
            yield
            deadline = time.perf_counter() + SLICE_S


def _deliveries(batch: Sequence[Message], table: Table) -> Iterator[None]:
    channel = batch[0].topic.channel
    # Nobody watches two topics of one channel: there is nothing to join, and it costs less so.
    alone = all(message.topic.channel == channel for message in batch)
    by_connection: dict[Transport, tuple[list[Subscription], list[_Shared]]] = {}
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
        if alone:
            yield from _to_each(list(subscribers), shared)
            continue
        for subscription in subscribers:
            group = by_connection.get(subscription.transport)
            if group is None:
                group = by_connection[subscription.transport] = ([], [])
            group[0].append(subscription)
            group[1].append(shared)
        yield
    # Who watches the same gets the same bytes: they are joined once.
    last: list[_Shared] = []
    joined = b""
    for transport, (subscriptions, publications) in by_connection.items():
        if publications != last:
            last, joined = publications, _join(publications)
        _to_one(transport, subscriptions, publications, joined)
        yield


def _to_each(subscribers: Sequence[Subscription], shared: _Shared) -> Iterator[None]:
    """Hand one publication to each of its subscribers."""
    frame, seq, epoch, prev = shared.frame, shared.seq, shared.epoch, shared.prev
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
                    if written != size:
                        writer.flush_later(frame[written:])
                    subscription.sent = seq
                    continue
                except OSError:
                    pass
                except Exception as error:
                    _drop(subscription.transport, error)
            subscription.offer(shared.message)
        yield


def _to_one(
    transport: Transport,
    subscriptions: Sequence[Subscription],
    publications: Sequence[_Shared],
    joined: bytes,
) -> None:
    """Hand one connection all that the batch has for it, in one write where it takes that."""
    late: list[_Shared] = []
    for subscription, shared in zip(subscriptions, publications, strict=True):
        if (
            subscription.direct
            and subscription.sent == shared.prev
            and subscription.epoch == shared.epoch
        ):
            subscription.sent = shared.seq
        else:
            late.append(shared)
    if late:
        joined = _join([each for each in publications if each not in late])
    try:
        written = not joined or try_write(transport.writer, joined)
    except Exception as error:
        written = False
        _drop(transport, error)
    if written and not late:
        return
    deliveries = list(zip(subscriptions, publications, strict=True))
    if not written:
        for subscription, shared in reversed(deliveries):
            if shared not in late:
                subscription.sent = shared.prev
    for subscription, shared in deliveries:
        subscription.offer(shared.message)  # where that was written, it is no news


def _join(publications: Iterable[_Shared]) -> bytes:
    return b"".join([each.frame for each in publications])


def _drop(transport: Transport, error: Exception) -> None:
    logs.emit(
        logs.line("internal_error", address=transport.peer, error=error)._replace(exception=error)
    )
    with suppress(Exception):
        transport.abort()
