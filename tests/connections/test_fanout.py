"""The fan-out: what it decides of a connection it does at once, and no stream ends the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trading_push.broker.base import Publication
from trading_push.connections import fanout
from trading_push.connections.subscription import Siblings, Subscription
from trading_push.connections.tally import Tally
from trading_push.testing import MemoryTransport
from trading_push.topics import Topic, ticker_topic

SYMBOLS = [f"S{number}" for number in range(3)]


class Peer(MemoryTransport):
    """Takes as much at once as the test lets it, or raises."""

    takes = True
    error: Exception | None = None
    aborted = 0

    def _write(self, data: bytes) -> int:
        if self.error is not None:
            raise self.error
        if self.takes:
            return super()._write(data)
        raise BlockingIOError

    def abort(self) -> None:
        self.aborted += 1
        super().abort()


def subscribed(transport: MemoryTransport, *symbols: str, sent: int = 0) -> list[Subscription]:
    """Subscriptions that have been sent the publication `sent`, as if their senders were idle."""
    made = []
    for symbol in symbols:
        each = Subscription(ticker_topic(symbol), "state", transport, Siblings(1000, Tally()))
        each.direct, each.epoch, each.sent = True, "e", sent
        made.append(each)
    return made


def batch(seq: int, *symbols: str) -> list[Publication]:
    return [
        Publication(ticker_topic(each), "state", "e", seq, 0, b'"%s %d"' % (each.encode(), seq))
        for each in symbols
    ]


def table(*subscriptions: Subscription) -> dict[Topic, dict[Subscription, None]]:
    found: dict[Topic, dict[Subscription, None]] = {}
    for each in subscriptions:
        found.setdefault(each.topic, {})[each] = None
    return found


async def in_slices(
    monkeypatch: pytest.MonkeyPatch, messages: Any, where: Any, between: Callable[[], None]
) -> None:
    """Deliver, with something else at each yield; every look at the clock is one."""
    monkeypatch.setattr(fanout, "SLICE_S", -1)
    for _ in fanout.deliver(messages, where, Tally(), 0.0):
        between()


@pytest.mark.parametrize("symbols", [SYMBOLS, SYMBOLS[:1]])
async def test_who_leaves_while_others_are_served_is_sent_nothing(monkeypatch, symbols):
    transports = [Peer() for _ in range(200)]
    mine = [subscribed(each, *symbols) for each in transports]
    where = table(*(each for group in mine for each in group))

    def leave() -> None:
        for each in mine[-1]:
            each.close()

    await in_slices(monkeypatch, batch(1, *symbols), where, leave)
    assert [len(each.sent) for each in transports] == [len(symbols)] * 199 + [0]


async def test_whose_pace_changes_meanwhile_is_left_to_its_sender_tasks(monkeypatch):
    transport = Peer()
    mine = subscribed(transport, *SYMBOLS)
    for each in mine[1:]:
        each.siblings = mine[0].siblings
    others = [subscribed(Peer(), *SYMBOLS) for _ in range(3)]
    throttled: list[bool] = []

    def throttle() -> None:
        if not throttled:
            throttled.append(mine[0].direct)
            mine[0].throttle(1)

    await in_slices(
        monkeypatch,
        batch(1, *SYMBOLS),
        table(*mine, *(each for group in others for each in group)),
        throttle,
    )
    assert throttled == [True]
    assert transport.sent == []
    assert [each.sent for each in mine] == [0, 0, 0]
    assert [[pending.seq for pending in each._pending] for each in mine] == [[1], [1], [1]]
    assert all(len(group[0].transport.sent) == 3 for group in others)


async def test_of_what_is_not_taken_nothing_is_lost_and_nothing_doubled(monkeypatch):
    transport = Peer()
    transport.takes = False
    events = Subscription(Topic("x"), "events", transport, Siblings(1000, Tally()))
    state = Subscription(Topic("y"), "state", transport, Siblings(1000, Tally()))
    for each in (events, state):
        each.direct, each.epoch, each.sent = True, "e", 0
    messages = [
        Publication(Topic("x"), "events", "e", seq, 0, b"%d" % seq) for seq in (1, 2, 3)
    ] + [Publication(Topic("y"), "state", "e", 1, 0, b"1")]
    await in_slices(monkeypatch, messages, table(events, state), lambda: None)
    assert [each.seq for each in events._pending] == [1, 2, 3]
    assert (events.sent, state.sent) == (0, 0)
    assert [each.seq for each in state._pending] == [1]


@pytest.mark.parametrize("symbols", [SYMBOLS, SYMBOLS[:1]])
@pytest.mark.parametrize("error", [RuntimeError("Nursery is closed"), KeyError("x"), OSError()])
async def test_whatever_a_stream_raises_the_others_are_served(monkeypatch, caplog, symbols, error):
    broken, whole = Peer(), Peer()
    broken.error = error
    where = table(*subscribed(broken, *symbols), *subscribed(whole, *symbols))
    await in_slices(monkeypatch, batch(1, *symbols), where, lambda: None)
    assert len(whole.sent) == len(symbols)
    is_bug = not isinstance(error, OSError)  # which a socket that takes nothing raises
    assert broken.aborted == is_bug
    assert len([record for record in caplog.records if record.exc_info]) == is_bug
