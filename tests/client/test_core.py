"""What the core of every Python client decides, by a clock that the test turns; without I/O."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trading_push.client import ending
from trading_push.client.channels import Channels, Position
from trading_push.client.core import NOTICE_MOST_S, REPLY_TIMEOUT_S, ClientCore, State
from trading_push.client.ending import ConnectionLost, Refused, Unreachable
from trading_push.client.mailbox import BUFFERED_PUSHES, ORDERED_PUSHES
from trading_push.errors import AuthenticationError


class Driver:
    """A core with a clock, and what a server says to it."""

    def __init__(self, *channels: str, offered: bool = False, can_renew: bool = True) -> None:
        self.now = 1000.0
        self.core = ClientCore(
            "ws://h/ws",
            channels,
            offered=offered,
            attempts=3,
            can_renew=can_renew,
            back_off=float,  # as many seconds as there were failures in a row
        )

    def sent(self) -> list[dict[str, Any]]:
        return [json.loads(message) for message in self.core.outgoing()]

    def hear(self, **message: object) -> None:
        self.core.received(json.dumps(message), self.now)

    def connect(self, token: str = "t") -> None:
        self.core.connecting()
        self.core.opened(self.core.check(token), self.now)
        assert self.sent() == [{"op": "auth", "id": 0, "token": token}]

    def authenticate(self, heartbeat_s: float = 15) -> None:
        self.hear(op="auth", id=0, ok=True, user="4", heartbeat_s=heartbeat_s)

    def grant(self) -> list[Any]:
        """Grant the subscription that has been asked for; the items."""
        request = self.sent()[-1]
        assert request["op"] == "subscribe"
        names = [item if isinstance(item, str) else item["channel"] for item in request["args"]]
        results = [{"channel": name, "ok": True} for name in names]
        self.hear(op="subscribe", id=request["id"], ok=True, results=results)
        return request["args"]

    def open(self, **auth: Any) -> list[Any]:
        self.connect()
        self.authenticate(**auth)
        return self.grant()

    def push(
        self, seq: int, prev: int | None = None, channel: str = "balance", epoch: str = "e"
    ) -> None:
        place = {"type": "snapshot"} if prev is None else {"type": "update", "prev": prev}
        self.hear(channel=channel, **place, epoch=epoch, seq=seq, ts=1, data=[seq])

    def lose(self, error: Exception | None = None, after_s: float = 0) -> float:
        """Lose the connection; returns for how long the next one has to wait."""
        self.now += after_s
        self.core.lost(error or ConnectionLost("gone"), self.now)
        return self.core.retry_at - self.now

    def taken(self) -> list[Any]:
        pushes = []
        while (push := self.core.take()) is not None:
            pushes.append(push)
        return pushes


def test_the_states_of_a_connection():
    driver = Driver("balance")
    assert driver.core.state is State.CONNECTING
    driver.connect()
    driver.authenticate()
    assert driver.core.user == "4"
    assert (driver.core.state, driver.core.is_connected) == (State.CONNECTING, False)
    assert driver.grant() == ["balance"]
    assert (driver.core.state, driver.core.is_connected) == (State.OPEN, True)
    driver.lose(ConnectionLost("why"))
    assert (driver.core.state, driver.core.trouble) == (State.WAITING, "why")
    driver.open()
    assert (driver.core.state, driver.core.trouble) == (State.OPEN, None)
    driver.lose(Refused("no", 4503))
    assert driver.core.is_over
    assert driver.core.error.code == 4503


def test_without_channels_it_is_open_when_authenticated():
    driver = Driver()
    driver.connect()
    driver.authenticate()
    assert driver.core.is_connected


def test_the_back_off_counts_failures_until_a_connection_lasted():
    driver = Driver("balance")
    waits = []
    for lasted_s in (0, 14.9, 1, 15, 0):
        driver.open()
        waits.append(driver.lose(after_s=lasted_s))
    assert waits == [1, 2, 3, 1, 2]
    driver.core.connecting()
    assert driver.lose(after_s=100) == 3  # it was never of use, however long it took


def test_the_first_connection_has_so_many_tries():
    driver = Driver()
    for _ in range(2):
        driver.core.connecting()
        driver.lose()
    assert not driver.core.is_over
    driver.lose(ConnectionLost("refused"))
    assert isinstance(driver.core.error, Unreachable)
    assert str(driver.core.error) == "cannot reach ws://h/ws: refused"


def test_later_ones_are_tried_for_ever():
    driver = Driver("balance")
    driver.open()
    for _ in range(1000):
        driver.lose()
        driver.core.connecting()
    assert not driver.core.is_over


@pytest.mark.parametrize(
    ("asked_ms", "waited_s"), [(400, 0.4), (1e9, NOTICE_MOST_S), (-5, 0), (None, 1)]
)
def test_the_notice_of_a_shutdown_says_when_to_come_back(asked_ms, waited_s):
    driver = Driver("balance")
    driver.open()
    driver.hear(op="notice", code="shutdown", reconnect_after_ms=asked_ms)
    assert driver.lose() == pytest.approx(waited_s)
    driver.open()
    assert driver.lose() == 2  # it holds for the one connection


def test_silence_is_answered_with_a_ping_and_then_with_another_connection():
    driver = Driver("balance")
    driver.open(heartbeat_s=20)
    heard_at = driver.now
    assert driver.core.deadline == heard_at + 20
    driver.now += 20
    driver.core.tick(heard_at, driver.now)
    assert driver.sent() == [{"op": "ping"}]
    assert driver.core.deadline == driver.now + 20
    driver.now += 19.9
    driver.core.tick(heard_at, driver.now)
    assert driver.sent() == []
    driver.now += 0.2
    with pytest.raises(ConnectionLost, match="silent"):
        driver.core.tick(heard_at, driver.now)


def test_any_byte_ends_the_silence():
    driver = Driver("balance")
    driver.open(heartbeat_s=20)
    heard_at = driver.now
    driver.now += 20
    driver.core.tick(heard_at, driver.now)
    driver.sent()
    heard_at = driver.now = driver.now + 10  # a ping frame, say, which no message tells
    driver.now += 10
    driver.core.tick(heard_at, driver.now)
    assert driver.core.deadline == heard_at + 20
    driver.now += 10
    driver.hear(op="pong")
    assert driver.core.deadline == driver.now + 20


def test_a_program_that_slept_asks_before_it_gives_the_connection_up():
    driver = Driver("balance")
    driver.open(heartbeat_s=20)
    heard_at = driver.now
    driver.now += 3600
    driver.core.tick(heard_at, driver.now)
    assert driver.sent() == [{"op": "ping"}]


@pytest.mark.parametrize(("told", "believed"), [(0, 0.1), (-1, 0.1), (1e9, 300)])
def test_a_heartbeat_is_believed_within_bounds(told, believed):
    driver = Driver("balance")
    driver.open(heartbeat_s=told)
    assert driver.core.deadline == pytest.approx(driver.now + believed)


@pytest.mark.parametrize("owed", ["auth", "channels", "subscribe"])
def test_a_reply_that_is_owed_for_too_long_costs_the_connection(owed):
    driver = Driver("balance", offered=owed == "channels")
    driver.connect()
    if owed != "auth":
        driver.authenticate(heartbeat_s=300)
        assert driver.sent()[-1]["op"] == owed
    assert driver.core.deadline == driver.now + REPLY_TIMEOUT_S
    driver.now += REPLY_TIMEOUT_S
    with pytest.raises(ConnectionLost, match="does not answer"):
        driver.core.tick(driver.now, driver.now)


def test_what_is_missing_is_asked_for_and_a_second_time_without_a_position():
    driver = Driver("balance")
    driver.open()
    driver.push(1)
    driver.push(5, 4)
    driver.push(6, 5)  # of the stream that is given up
    unsubscribe, subscribe = driver.sent()
    assert unsubscribe == {"op": "unsubscribe", "args": ["balance"]}
    since = {"channel": "balance", "since": {"epoch": "e", "seq": 1}}
    assert subscribe["args"] == [since]
    results = [{"channel": "balance", "ok": True}]
    driver.hear(op="subscribe", id=subscribe["id"], ok=True, results=results)
    driver.push(7, 6)
    assert driver.grant() == ["balance"]
    driver.push(7)
    driver.push(8, 7)
    assert [(push.seq, push.gap) for push in driver.taken()] == [(1, False), (7, True), (8, False)]


def test_an_update_that_follows_is_no_gap_whatever_its_epoch():
    driver = Driver("balance")
    driver.open()
    driver.push(7, epoch="a")
    driver.push(8, 7, epoch="b")
    driver.push(9, 8, epoch="b")
    assert driver.sent() == []
    assert [(push.epoch, push.seq) for push in driver.taken()] == [("a", 7), ("b", 8), ("b", 9)]
    driver.lose()
    since = {"channel": "balance", "since": {"epoch": "b", "seq": 9}}
    assert driver.open() == [since]


def test_what_comes_twice_is_passed_on_once():
    driver = Driver("balance")
    driver.open()
    driver.push(1)
    for seq, prev in ((2, 1), (2, 1), (1, 0), (3, 2)):
        driver.push(seq, prev)
    assert [push.seq for push in driver.taken()] == [1, 2, 3]
    assert driver.sent() == []


def test_an_update_before_any_snapshot_is_a_gap():
    driver = Driver("balance")
    driver.open()
    driver.push(5, 4)
    assert driver.taken() == []
    assert driver.grant() == ["balance"]


def test_a_token_that_is_called_expired_is_not_sent_again():
    driver = Driver()
    driver.connect("old")
    error = {"code": "token_expired", "message": "late", "retryable": False}
    with pytest.raises(ConnectionLost, match="late"):
        driver.hear(op="error", id=0, ok=False, error=error)
    driver.lose()
    with pytest.raises(AuthenticationError) as caught:
        driver.connect("old")
    assert caught.value.expired
    driver.connect("new")


def test_a_refusal_of_what_could_not_be_read_is_one_of_the_auth():
    driver = Driver()
    driver.connect()
    with pytest.raises(Refused, match="no JSON"):
        driver.hear(op="error", error={"code": "bad_json", "message": "no JSON"})


def test_pauses_between_renewals_grow_while_they_follow_each_other_closely():
    driver = Driver()
    driver.connect()
    driver.authenticate()
    waits = []
    for _ in range(3):
        driver.hear(op="notice", code="token_expires")
        assert driver.core.renewal.is_due()
        assert not driver.core.renewal.is_due()  # told once
        driver.hear(op="notice", code="token_expires")
        assert not driver.core.renewal.is_due()  # it is under way
        waits.append(driver.core.renewal.at - driver.now)
        driver.core.renewal.asking(driver.now)
        driver.core.renew("new")
        assert driver.sent() == [{"op": "auth", "id": 0, "token": "new"}]
        driver.authenticate()
    driver.now += ending.LASTING_S
    driver.hear(op="notice", code="token_expires")
    waits.append(driver.core.renewal.at - driver.now)
    assert waits == [0, 1, 2, 0]


def test_a_string_is_not_renewed():
    driver = Driver(can_renew=False)
    driver.connect()
    driver.authenticate()
    driver.hear(op="notice", code="token_expires")
    assert not driver.core.renewal.is_due()


# --- an application that is slow -----------------------------------------------------------------


def test_who_is_slow_gets_the_latest_value_of_a_state():
    driver = Driver("balance", "ticker.BTCUSDT")
    driver.open()
    driver.push(1, channel="ticker.BTCUSDT")
    driver.push(1)
    for seq in range(2, 1001):
        driver.push(seq, seq - 1)
    driver.hear(channel="balance", type="status", state="stale", ts=1)
    driver.hear(channel="balance", type="status", state="live", ts=2)
    ticker, value, status = driver.taken()
    assert (ticker.channel, ticker.seq) == ("ticker.BTCUSDT", 1)
    assert (value.type, value.seq, value.prev, value.data) == ("snapshot", 1000, None, [1000])
    assert (status.state, status.ts) == ("live", 2)
    # And who has caught up gets each.
    for seq in range(1001, 1001 + BUFFERED_PUSHES):
        driver.push(seq, seq - 1)
    assert [push.prev for push in driver.taken()] == list(range(1000, 1000 + BUFFERED_PUSHES))
    assert driver.sent() == []


def test_a_merged_update_says_how_many_it_stands_for():
    driver = Driver("balance")
    driver.open()
    driver.push(1)
    driver.taken()
    for seq in range(2, 102):
        driver.push(seq, seq - 1)
    [update] = driver.taken()
    assert (update.type, update.prev, update.seq, update.merged) == ("update", 1, 101, 100)


@pytest.mark.parametrize("channel", ["fills", "ticker.*", "of-my-own"])
def test_what_is_no_state_keeps_its_order_up_to_a_bound(channel):
    driver = Driver(channel)
    driver.open()
    driver.push(1, channel=channel)
    driver.push(2, 1, channel=channel)
    assert [push.seq for push in driver.taken()] == [1, 2]
    for seq in range(3, ORDERED_PUSHES + 3):
        driver.push(seq, seq - 1, channel=channel)
    assert driver.sent() == []
    driver.push(ORDERED_PUSHES + 3, ORDERED_PUSHES + 2, channel=channel)
    # It is asked for again from what the application has taken.
    since = {"channel": channel, "since": {"epoch": "e", "seq": 2}}
    assert driver.grant() == [since]
    driver.push(3, 2, channel=channel)
    assert [(push.seq, push.gap) for push in driver.taken()] == [(3, True)]


def test_who_takes_nothing_at_all_is_given_a_snapshot_the_next_time():
    driver = Driver("fills")
    driver.open()
    driver.push(1, channel="fills")
    driver.taken()
    for expected in ({"channel": "fills", "since": {"epoch": "e", "seq": 1}}, "fills"):
        for seq in range(2, ORDERED_PUSHES + 3):
            driver.push(seq, seq - 1, channel="fills")
        assert driver.grant() == [expected]
    driver.push(5000, channel="fills")
    [snapshot] = driver.taken()
    assert (snapshot.type, snapshot.seq, snapshot.gap) == ("snapshot", 5000, True)


def test_a_full_channel_leaves_the_others_alone():
    driver = Driver("fills", "balance")
    driver.open()
    driver.push(1)
    driver.push(1, channel="fills")
    for seq in range(2, ORDERED_PUSHES + 2):
        driver.push(seq, seq - 1, channel="fills")
    assert driver.grant() == ["fills"]
    assert [push.channel for push in driver.taken()] == ["balance"]


def test_kinds_are_learned_from_what_the_server_offers():
    driver = Driver("alerts", offered=True)
    driver.connect()
    driver.authenticate()
    [request] = driver.sent()
    offered = [
        {"channel": "balance", "kind": "state"},
        {"channel": "alerts", "kind": "state"},
        {"channel": "ticker.*", "kind": "keyed"},
        "nonsense",
    ]
    driver.hear(op="channels", id=request["id"], ok=True, channels=offered)
    assert driver.grant() == ["alerts", "balance"]
    driver.push(1, channel="alerts")
    for seq in range(2, 5000):
        driver.push(seq, seq - 1, channel="alerts")
    assert [push.seq for push in driver.taken()] == [4999]


def test_nothing_waits_for_who_has_left():
    driver = Driver("balance")
    driver.open()
    driver.push(1)
    driver.core.leave()
    assert driver.taken() == []
    assert driver.core.is_over
    assert driver.core.error is None
    driver.lose(Refused("too late"))
    assert driver.core.error is None


def test_the_end_is_the_end():
    driver = Driver("balance")
    driver.connect()
    driver.authenticate()
    request = driver.sent()[-1]
    driver.core.leave()
    results = [{"channel": "balance", "ok": True}]
    driver.hear(op="subscribe", id=request["id"], ok=True, results=results)
    driver.push(1)
    driver.core.connecting()
    driver.lose()
    assert driver.core.is_over
    assert driver.taken() == []


def test_a_room_that_comes_back_as_a_channel_is_of_its_kind():
    channels = Channels(["ticker_BTCUSDT_4"])
    channels.grant("ticker_BTCUSDT_4", "ticker.BTCUSDT")
    assert channels.names == ["ticker.BTCUSDT"]
    assert channels.get("ticker.BTCUSDT") == Position(is_state=True)
