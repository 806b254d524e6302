"""The contract of a broker, for every one there is: numbers, values kept, statuses, what is lost.

A broker is added to `BROKERS`: what makes one of some channels, with what takes its messages and
with how many events it keeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

from trading_push import Channel
from trading_push.broker.base import Broker, Message, Publication, Status, StatusChange
from trading_push.broker.memory import MemoryBroker
from trading_push.errors import ServiceClosed
from trading_push.topics import BUILTIN_CHANNELS, Channels, Topic, ticker_topic

CHANNELS = Channels([*map(Channel, BUILTIN_CHANNELS), Channel("news", "events", per_user=False)])
STATE, OTHER, EVENTS = Topic("balance", "4"), Topic("balance", "5"), Topic("news")
LIVE, STALE, DOWN = Status("live"), Status("stale", "source_error"), Status("down", "disconnected")
NO_DATA = Status("down", "no_data")
QUIET = Status("live", "quiet")
HISTORY = 5

Deliver = Callable[[Sequence[Message]], None]


def memory(deliver: Deliver) -> Broker:
    return MemoryBroker(CHANNELS, deliver, history=HISTORY)


BROKERS: list[Callable[[Deliver], Broker]] = [memory]

state_and_events = pytest.mark.parametrize("topic", [STATE, EVENTS], ids=["state", "events"])


class Delivered:
    """What a broker hands on, one list for each call of `deliver`."""

    def __init__(self) -> None:
        self.batches: list[list[Message]] = []
        self.closed = False

    def __call__(self, batch: Sequence[Message]) -> None:
        if self.closed:
            raise ServiceClosed("the registry runs no more")
        self.batches.append(list(batch))

    def taken(self) -> list[object]:
        """What came since the last look, of all batches: each value's bytes, each new status."""
        flat = [message for batch in self.batches for message in batch]
        self.batches.clear()
        return [each.data if isinstance(each, Publication) else each.status for each in flat]


@pytest.fixture
def delivered() -> Delivered:
    return Delivered()


@pytest.fixture(params=BROKERS, ids=lambda make: make.__name__)
def broker(request: pytest.FixtureRequest, delivered: Delivered) -> Broker:
    return request.param(delivered)


def publish(broker: Broker, topic: Topic, *values: int) -> None:
    """Each value in a batch of its own."""
    for value in values:
        broker.publish([(topic, b"%d" % value)])


def last(broker: Broker, topic: Topic) -> Publication:
    found = broker.snapshot(topic)
    assert found is not None
    return found


def since(broker: Broker, topic: Topic, seq: int) -> list[bytes] | None:
    """What was published after `seq` of the epoch of now."""
    found = broker.since(topic, last(broker, topic).epoch, seq)
    return None if found is None else [each.data for each in found]


# --- values -------------------------------------------------------------------------------------


def test_of_what_was_never_published_nothing_is_known(broker, delivered):
    assert broker.snapshot(STATE) is None
    assert broker.status(STATE) == NO_DATA
    assert broker.since(STATE, "", 0) is None
    assert broker.turned_at(STATE) == 0
    assert broker.states() == {}
    assert delivered.batches == []


def test_events_of_which_none_has_happened_are_live_and_quiet(broker, delivered):
    assert broker.status(EVENTS) == QUIET
    broker.mark([EVENTS], QUIET)
    assert broker.states() == {"news": {"live": 1}}
    assert delivered.batches == []
    publish(broker, EVENTS, 1)  # the value itself says that it is live
    assert delivered.taken() == [b"1"]
    assert broker.status(EVENTS) == LIVE


def test_events_that_have_failed_before_the_first_are_quiet_again(broker, delivered):
    broker.mark([EVENTS], DOWN)
    broker.mark([EVENTS], LIVE)
    assert delivered.taken() == [DOWN, QUIET]
    broker.mark([EVENTS], DOWN)
    publish(broker, EVENTS, 1)
    assert delivered.taken() == [DOWN, LIVE, b"1"]
    assert broker.states() == {"news": {"live": 1}}


def test_asking_makes_no_topic(broker):
    for topic in (STATE, EVENTS, ticker_topic("A")):
        broker.snapshot(topic)
        broker.status(topic)
        broker.since(topic, "e", 1)
        broker.turned_at(topic)
        broker.forget(topic)
    assert broker.states() == {}


@state_and_events
def test_the_publications_of_a_topic_are_numbered_from_1(broker, delivered, topic):
    publish(broker, topic, 10, 11, 12)
    made = [each for batch in delivered.batches for each in batch if isinstance(each, Publication)]
    assert [(each.seq, each.data) for each in made] == [(1, b"10"), (2, b"11"), (3, b"12")]
    assert {(each.topic, each.kind) for each in made} == {(topic, CHANNELS.kind_of(topic))}
    assert len({each.epoch for each in made}) == 1


def test_topics_are_numbered_each_for_itself(broker):
    publish(broker, STATE, 1, 2, 3)
    publish(broker, OTHER, 1)
    assert (last(broker, STATE).seq, last(broker, OTHER).seq) == (3, 1)
    assert last(broker, STATE).epoch != last(broker, OTHER).epoch


def test_a_batch_is_handed_on_whole_and_in_order(broker, delivered):
    values = [(STATE, b"1"), (EVENTS, b"2"), (STATE, b"3"), (OTHER, b"4")]
    broker.publish(values)
    [batch] = delivered.batches
    assert [(each.topic, each.data) for each in batch if isinstance(each, Publication)] == values
    assert last(broker, STATE).seq == 2


def test_batches_are_handed_on_in_the_order_of_the_calls(broker, delivered):
    publish(broker, STATE, 1)
    broker.mark([STATE], STALE)
    publish(broker, OTHER, 2)
    publish(broker, STATE, 3)
    assert delivered.taken() == [LIVE, b"1", STALE, LIVE, b"2", LIVE, b"3"]


def test_an_empty_batch_is_not_handed_on(broker, delivered):
    broker.publish([])
    broker.mark([], STALE)
    assert delivered.batches == []


@state_and_events
def test_the_snapshot_is_the_last_value_that_was_handed_on(broker, delivered, topic):
    publish(broker, topic, 1, 2)
    made = delivered.batches[-1][-1]
    assert isinstance(made, Publication)
    found = last(broker, topic)
    assert (found.topic, found.kind, found.epoch, found.seq, found.ts, found.data) == (
        *(made.topic, made.kind, made.epoch, made.seq, made.ts, made.data),
    )


def test_a_value_is_there_when_it_is_handed_on(broker, delivered, monkeypatch):
    """Who is subscribed while it is delivered begins with it, and is not sent the one before."""
    seen = []
    take = Delivered.__call__

    def look(self: Delivered, batch: Sequence[Message]) -> None:
        seen.append((last(broker, STATE).data, broker.status(STATE)))
        take(self, batch)

    monkeypatch.setattr(Delivered, "__call__", look)
    publish(broker, STATE, 1, 2)
    assert seen == [(b"1", LIVE), (b"2", LIVE)]


def test_times_are_of_now_in_milliseconds(broker, delivered):
    before = time.time_ns() // 1_000_000
    publish(broker, STATE, 1)
    broker.mark([STATE], STALE)
    after = time.time_ns() // 1_000_000
    messages = [each for batch in delivered.batches for each in batch]
    assert len(messages) == 3
    assert all(before <= each.ts <= after for each in messages)


# --- statuses -----------------------------------------------------------------------------------


def test_publishing_makes_a_topic_live_and_says_so_first(broker, delivered):
    publish(broker, STATE, 1)
    [[change, value]] = delivered.batches
    assert isinstance(change, StatusChange)
    assert (change.topic, change.status) == (STATE, LIVE)
    assert isinstance(value, Publication)
    assert broker.status(STATE) == LIVE


def test_a_topic_that_is_live_is_not_said_to_be_live_again(broker, delivered):
    publish(broker, STATE, 1)
    delivered.taken()
    publish(broker, STATE, 2)
    broker.publish([(STATE, b"3"), (STATE, b"4")])
    broker.mark([STATE], LIVE)
    assert delivered.taken() == [b"2", b"3", b"4"]


@pytest.mark.parametrize("status", [STALE, DOWN], ids=lambda status: status.state)
def test_what_is_published_after_a_failure_is_live_again(broker, delivered, status):
    publish(broker, STATE, 1)
    broker.mark([STATE], status)
    delivered.taken()
    assert broker.status(STATE) == status
    publish(broker, STATE, 2)
    assert delivered.taken() == [LIVE, b"2"]
    assert broker.status(STATE) == LIVE


def test_only_changes_of_the_state_are_handed_on(broker, delivered):
    publish(broker, STATE, 1)
    publish(broker, OTHER, 1)
    broker.mark([STATE], STALE)
    delivered.taken()
    broker.mark([STATE, OTHER, STATE], STALE)
    assert delivered.taken() == [STALE]
    assert broker.status(STATE) == broker.status(OTHER) == STALE


def test_another_reason_is_kept_but_is_no_change(broker, delivered):
    publish(broker, STATE, 1)
    broker.mark([STATE], STALE)
    delivered.taken()
    late = Status("stale", "source_timeout")
    broker.mark([STATE], late)
    assert delivered.taken() == []
    assert broker.status(STATE) == late


def test_what_was_never_live_is_down_for_another_reason_without_a_word(broker, delivered):
    broker.mark([STATE], DOWN)
    assert delivered.batches == []
    assert broker.status(STATE) == DOWN
    assert broker.snapshot(STATE) is None


def test_marking_keeps_the_value_and_its_number(broker):
    publish(broker, STATE, 1, 2)
    broker.mark([STATE], DOWN)
    assert (last(broker, STATE).seq, last(broker, STATE).data) == (2, b"2")
    publish(broker, STATE, 3)
    assert last(broker, STATE).seq == 3


@state_and_events
def test_turned_at_is_the_last_value_before_the_status_changed(broker, topic):
    publish(broker, topic, 1)
    assert broker.turned_at(topic) == 0  # when it became live there was none
    publish(broker, topic, 2)
    assert broker.turned_at(topic) == 0
    broker.mark([topic], STALE)
    assert broker.turned_at(topic) == 2
    broker.mark([topic], Status("stale", "source_timeout"))
    assert broker.turned_at(topic) == 2
    publish(broker, topic, 3, 4)
    assert broker.turned_at(topic) == 2  # and live again behind the same one
    broker.mark([topic], LIVE)
    assert broker.turned_at(topic) == 2
    broker.mark([topic], DOWN)
    assert broker.turned_at(topic) == 4


def test_states_counts_topics_by_channel_and_all_symbols_as_ticker(broker):
    for user in "123":
        publish(broker, Topic("balance", user), 1)
    publish(broker, EVENTS, 1)
    for symbol in ("A", "B"):
        publish(broker, ticker_topic(symbol), 1)
    broker.mark([Topic("pnl", "1")], DOWN)
    broker.mark([Topic("balance", "1"), ticker_topic("B")], STALE)
    assert broker.states() == {
        "balance": {"live": 2, "stale": 1},
        "news": {"live": 1},
        "ticker": {"live": 1, "stale": 1},
        "pnl": {"down": 1},
    }


def test_states_that_were_looked_at_stay_as_they_were(broker):
    publish(broker, STATE, 1)
    seen = broker.states()
    seen["balance"]["live"] = 7
    seen["pnl"] = {}
    assert broker.states() == {"balance": {"live": 1}}
    publish(broker, OTHER, 1)
    assert seen["balance"]["live"] == 7


# --- what a client has missed -------------------------------------------------------------------


@state_and_events
def test_since_the_last_value_nothing_is_missed(broker, topic):
    publish(broker, topic, 1, 2)
    assert since(broker, topic, 2) == []


def test_of_a_state_the_last_value_stands_for_all_that_was_missed(broker):
    publish(broker, STATE, *range(1, 100))
    for seq in (0, 1, 50, 98):
        assert since(broker, STATE, seq) == [b"99"]


def test_of_events_each_one_that_was_missed_comes_in_order(broker):
    publish(broker, EVENTS, 1, 2, 3, 4)
    for seq in range(5):
        assert since(broker, EVENTS, seq) == [b"%d" % value for value in range(seq + 1, 5)]
    [second, *_] = broker.since(EVENTS, last(broker, EVENTS).epoch, 1)
    assert (second.seq, second.kind, second.topic) == (2, "events", EVENTS)


def test_of_events_that_are_no_longer_kept_it_says_so(broker):
    publish(broker, EVENTS, *range(1, HISTORY + 4))  # the first three are gone
    assert since(broker, EVENTS, 2) is None
    assert since(broker, EVENTS, 0) is None
    assert since(broker, EVENTS, 3) == [b"4", b"5", b"6", b"7", b"8"]


@state_and_events
def test_of_another_epoch_nothing_is_known(broker, topic):
    publish(broker, topic, 1, 2)
    epoch = last(broker, topic).epoch
    for other in ("", "e", epoch[:-1], f"{epoch}0", last_epoch_of_another_topic(broker)):
        assert broker.since(topic, other, 1) is None


def last_epoch_of_another_topic(broker: Broker) -> str:
    publish(broker, OTHER, 1)
    return last(broker, OTHER).epoch


@state_and_events
def test_of_a_seq_that_is_yet_to_come_nothing_is_known(broker, topic):
    publish(broker, topic, 1, 2)
    assert since(broker, topic, 3) is None
    assert since(broker, topic, 2**53) is None


@state_and_events
def test_a_change_of_the_status_is_nothing_that_was_missed(broker, topic):
    publish(broker, topic, 1, 2)
    broker.mark([topic], DOWN)
    assert since(broker, topic, 2) == []
    assert since(broker, topic, 1) == [b"2"]


def test_since_a_mark_without_a_value_nothing_is_known(broker):
    broker.mark([STATE], STALE)
    assert broker.since(STATE, "", 0) is None


# --- forgetting, and the end --------------------------------------------------------------------


@state_and_events
def test_what_is_forgotten_begins_anew_in_another_epoch(broker, delivered, topic):
    publish(broker, topic, 1, 2)
    broker.mark([topic], STALE)
    old = last(broker, topic).epoch
    delivered.taken()
    broker.forget(topic)
    assert delivered.batches == []  # nobody watches
    assert broker.snapshot(topic) is None
    assert broker.status(topic) == (QUIET if topic == EVENTS else NO_DATA)
    assert broker.turned_at(topic) == 0
    assert broker.states() == {}
    assert broker.since(topic, old, 2) is None
    publish(broker, topic, 3)
    # Of events the value itself says that they are live: they were `quiet` before.
    assert delivered.taken() == ([b"3"] if topic == EVENTS else [LIVE, b"3"])
    assert last(broker, topic).seq == 1
    assert last(broker, topic).epoch != old
    assert broker.since(topic, old, 0) is None


def test_forgetting_one_topic_leaves_the_others(broker):
    publish(broker, STATE, 1)
    publish(broker, OTHER, 1)
    broker.forget(STATE)
    broker.forget(STATE)
    assert last(broker, OTHER).data == b"1"
    assert broker.states() == {"balance": {"live": 1}}


def test_after_the_end_publishing_raises(broker, delivered):
    publish(broker, STATE, 1)
    delivered.closed = True
    with pytest.raises(ServiceClosed):
        publish(broker, STATE, 2)


def test_after_the_end_marking_raises_nothing(broker, delivered):
    publish(broker, STATE, 1)
    delivered.closed = True
    broker.mark([STATE], DOWN)
    assert broker.status(STATE) == DOWN


def test_the_tickers_are_those_with_a_value(broker):
    a, b, c = (ticker_topic(symbol) for symbol in "ABC")
    broker.publish([(a, b"1"), (b, b"1"), (STATE, b"1"), (a, b"2")])
    broker.mark([b, c], Status("stale", "source_timeout"))
    assert {last.topic: (last.data, status.state) for last, status in broker.tickers()} == {
        a: (b"2", "live"),
        b: (b"1", "stale"),
    }
    broker.forget(a)
    assert [last.topic for last, _ in broker.tickers()] == [b]
    assert broker.published == {"ticker": 3, STATE.channel: 1}
