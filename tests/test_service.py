"""The service as an application embeds it: publishing, subscribing, resuming, slow peers."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime
from decimal import Decimal
from itertools import pairwise

import attrs
import msgspec
import pytest
import trio
import trio.testing

from harness.room import by_name, room
from harness.support import SECRET, hypercorn_serving, token, trio_client

from trading_push import (
    Channel,
    ConfigurationError,
    JwtAuthenticator,
    MarketSink,
    PayloadError,
    ServiceClosed,
    Ticker,
    open_push_service,
)
from trading_push.protocol.payloads import encode_data
from trading_push.settings.schema import Auth, Limits, Settings
from trading_push.testing import MemoryTransport
from trading_push.topics import Topic


async def test_a_published_value_reaches_its_user_alone(autojump_clock):
    async with room() as here:
        mine, _ = await here.subscribed("balance")
        other, _ = here.join()
        other.say("auth", token="5")
        other.say("subscribe", args=["balance"])
        await other.next(2)
        await trio.testing.wait_all_tasks_blocked()
        other.sent.clear()
        await here.service.publish("balance", [{"free": Decimal("0E-8")}], user=4)
        await trio.testing.wait_all_tasks_blocked()
        assert other.sent == []
        [status, snapshot] = mine.sent
        assert status["state"] == "live"
        assert snapshot["data"] == [{"free": "0.00000000"}]


async def test_updates_carry_prev_and_seq(autojump_clock):
    async with room() as here:
        await here.service.publish("ticker.A", 0)
        peer, _ = here.join()
        peer.say("auth", token="4")
        peer.say("subscribe", id=2, args=["ticker.A"])
        _, reply, snapshot = await peer.next(3)
        assert reply["id"] == 2
        assert (snapshot["type"], snapshot["seq"], snapshot["data"]) == ("snapshot", 1, 0)
        assert "prev" not in snapshot
        for number in range(1, 6):
            await here.service.publish("ticker.A", number)
        updates = await peer.next(5)
        assert [(u["prev"], u["seq"], u["data"]) for u in updates] == [
            (n, n + 1, n) for n in range(1, 6)
        ]
        assert {u["epoch"] for u in updates} == {snapshot["epoch"]}
        assert all("merged" not in u for u in updates)


async def test_a_peer_that_is_slow_gets_the_latest_and_is_told_how_many(autojump_clock):
    async with room() as here:
        await here.service.publish("ticker.A", 0)
        peer, _ = await here.subscribed("ticker.A")
        peer.reading = trio.Event()
        for number in range(1, 6):
            await here.service.publish("ticker.A", number)
            await trio.testing.wait_all_tasks_blocked()
        peer.reading.set()
        first, merged = await peer.next(2)
        # The first was on its way when the peer stopped reading; the others were merged.
        assert (first["prev"], first["seq"], first["data"]) == (1, 2, 1)
        assert (merged["prev"], merged["seq"], merged["data"]) == (2, 6, 5)
        assert merged["merged"] == 4
        await here.service.publish("ticker.A", 6)
        assert (await peer.next())[0]["prev"] == 6


async def test_max_hz_merges(autojump_clock):
    async with room() as here:
        await here.service.publish("ticker.A", 0)
        peer, _ = await here.subscribed({"channel": "ticker.A", "max_hz": 2})
        for number in range(1, 41):
            await here.service.publish("ticker.A", number)
            await trio.sleep(0.1)
        await trio.sleep(1)
        assert 8 <= len(peer.sent) <= 10
        assert peer.sent[-1]["data"] == 40
        seq = 1
        for push in peer.sent:
            assert push["prev"] == seq
            assert push.get("merged", 1) == push["seq"] - push["prev"]
            seq = push["seq"]


EVENTS = Channel("alerts", "events")


async def test_events_are_delivered_each_and_in_order(autojump_clock):
    async with room(channels=[EVENTS]) as here:
        peer, _ = await here.subscribed("alerts")
        peer.reading = trio.Event()
        for number in range(100):
            await here.service.publish("alerts", number, user=4)
        await trio.testing.wait_all_tasks_blocked()
        peer.reading.set()
        pushes = [push for push in await peer.next(100) if push["type"] != "status"]
        assert [push["data"] for push in pushes] == list(range(100))
        assert pushes[0]["type"] == "snapshot"
        assert all(b["prev"] == a["seq"] for a, b in pairwise(pushes))


async def test_events_that_do_not_fit_are_answered_with_a_snapshot(autojump_clock):
    settings = Settings(limits=Limits(pending_bytes=65_536))
    async with room(channels=[EVENTS], settings=settings) as here:
        await here.service.publish("alerts", "first", user=4)
        peer, _ = await here.subscribed("alerts")
        peer.reading = trio.Event()
        for number in range(10):
            await here.service.publish("alerts", [number, "x" * 20_000], user=4)
            await trio.testing.wait_all_tasks_blocked()
        peer.reading.set()
        await trio.testing.wait_all_tasks_blocked()
        assert peer.sent[0]["prev"] == 1
        seen, expected = 1, 2
        for push in peer.sent:
            if push["type"] == "snapshot":
                seen += push["dropped"]
                expected += push["dropped"]
            assert push["seq"] == expected
            seen, expected = seen + 1, expected + 1
        assert seen == 11
        assert any("dropped" in push for push in peer.sent)


async def test_who_comes_back_is_sent_what_it_missed(autojump_clock):
    async with room(channels=[EVENTS]) as here:
        await here.service.publish("alerts", 0, user=4)
        await here.service.publish("ticker.A", 0)
        peer, _ = here.join()
        peer.say("auth", token="4")
        peer.say("subscribe", args=["alerts", "ticker.A"])
        _, _, alerts, ticker = await peer.next(4)
        peer.leave()
        for number in (1, 2, 3):
            await here.service.publish("alerts", number, user=4)
            await here.service.publish("ticker.A", number)
        back, _ = here.join()
        back.say("auth", token="4")
        back.say(
            "subscribe",
            args=[
                {"channel": c["channel"], "since": {"epoch": c["epoch"], "seq": c["seq"]}}
                for c in (alerts, ticker)
            ],
        )
        _, reply, *missed = await back.next(6)
        assert [result["recovered"] for result in reply["results"]] == [True, True]
        assert [(m["type"], m["data"], m["prev"]) for m in missed] == [
            ("update", 1, 1),
            ("update", 2, 2),
            ("update", 3, 3),
            ("update", 3, 1),
        ]
        assert missed[-1]["merged"] == 3


@pytest.mark.parametrize("sizes", [[100_000] * 20, [10_000] * 20])
async def test_what_is_sent_of_missed_events_is_bounded_for_a_whole_connection(
    autojump_clock, sizes
):
    """Eighty bytes of a request must not make one send of twenty megabytes."""
    channels = [Channel(f"alerts{number}", "events") for number in range(5)]
    settings = Settings(limits=Limits(pending_bytes=1_000_000))
    async with room(channels=channels, settings=settings) as here:
        for size in (1, *sizes):
            for channel in channels:
                await here.service.publish(channel.name, "x" * size, user=4)
        topics = [here.service._broker.snapshot(Topic(each.name, "4")) for each in channels]
        peer, _ = here.join()
        peer.say("auth", token="4")
        peer.say(
            "subscribe",
            args=[
                {"channel": each.topic.channel, "since": {"epoch": each.epoch, "seq": 1}}
                for each in topics
            ],
        )
        _, reply = await peer.next(2)
        recovered = [result["recovered"] for result in reply["results"]]
        fit = int(1_000_000 / (sum(sizes) + 40))
        assert recovered == [True] * fit + [False] * (5 - fit)
        sent = sum(len(push["data"]) for push in peer.sent)
        assert sent <= 1_000_000 + 5 * sizes[0]
        # Who does not get all of it gets the latest, and how many are left out.
        snapshots = peer.sent[fit * 20 :]
        assert [(push["type"], push["dropped"]) for push in snapshots] == [("snapshot", 19)] * (
            5 - fit
        )
        await here.service.publish("alerts4", "next", user=4)
        [update] = [push for push in await peer.next(fit * 20 + 6 - fit) if push.get("prev") == 21]
        assert update["seq"] == 22


async def test_another_epoch_is_answered_with_a_snapshot(autojump_clock):
    async with room() as here:
        await here.service.publish("ticker.A", 0)
        peer, _ = here.join()
        peer.say("auth", token="4")
        peer.say("subscribe", args=[{"channel": "ticker.A", "since": {"epoch": "old", "seq": 1}}])
        _, reply, snapshot = await peer.next(3)
        assert reply["results"][0]["recovered"] is False
        assert snapshot["type"] == "snapshot"


async def test_after_unsubscribing_nothing_more_comes(autojump_clock):
    async with room() as here:
        peer, _ = await here.subscribed("ticker.A", "ticker.B")
        peer.say("unsubscribe", id=3, args=["ticker.A"])
        assert (await peer.next())[0]["id"] == 3
        await here.service.publish("ticker.A", 1)
        await here.service.publish("ticker.B", 1)
        await trio.testing.wait_all_tasks_blocked()
        assert {push["channel"] for push in peer.sent} == {"ticker.B"}
        peer.say("subscribe", args=["ticker.A"])
        await trio.testing.wait_all_tasks_blocked()
        assert peer.sent[-1]["type"] == "snapshot"
        statistics = here.service.statistics()
        assert statistics.subscribers_by_symbol == {"A": 1, "B": 1}
        assert statistics.ledger.subscriptions_opened == 3
        assert statistics.ledger.subscriptions_closed == 1


async def test_what_cannot_be_published_says_so(autojump_clock):
    async with room(channels=[Channel("news", per_user=False)]) as here:
        service = here.service
        await service.publish("news", "hello")
        await service.publish("ticker.A", Ticker("A", last=Decimal("1.50")))
        for channel, user in (("nope", 4), ("balance", None), ("news", 4), ("ticker.A", 4)):
            with pytest.raises(ValueError, match=r"channel|user"):
                await service.publish(channel, 1, user=user)
        for value in (
            *(object(), Decimal("NaN"), {1j: 2}, Decimal("Infinity"), math.nan, -math.inf),
            *([None, {"a": (1.5, math.nan)}], Ticker("A", last=math.inf)),
        ):
            with pytest.raises(PayloadError):
                await service.publish("news", value)
        await service.publish("news", [None, {"a": 1.5}, msgspec.Raw(b"null")])


async def test_channels_of_the_applications_own_are_checked():
    for name in ("Balance", "ticker", "a b", "", "x" * 33):
        with pytest.raises(ConfigurationError, match="channel"):
            Channel(name)
    with pytest.raises(ConfigurationError, match="twice"):
        async with open_push_service(authenticate=by_name, channels=[Channel("pnl")]):
            pass
    with pytest.raises(ConfigurationError, match=r"0\.1"):
        Channel("margin", interval_s=0.01)


async def test_without_a_key_there_is_no_service():
    with pytest.raises(ConfigurationError, match="secret"):
        async with open_push_service():
            pass


@attrs.frozen
class Margin:
    ratio: Decimal


async def test_a_data_type_of_the_applications_own_is_polled(autojump_clock):
    class Source:
        async def fetch(self, user_id: str, data_type: str) -> object:
            return Margin(Decimal("1E+2")) if data_type == "margin" else None

    async with room(source=Source(), channels=[Channel("margin", interval_s=1)]) as here:
        peer, _ = here.join()
        peer.say("auth", token="4")
        peer.say("subscribe", args=["margin_4"])
        _, reply, push = await peer.next(3)
        assert reply["results"] == [{"channel": "margin", "ok": True}]
        assert push["data"] == {"ratio": "100"}


@pytest.mark.parametrize("direct", [True, False])
async def test_a_reply_always_comes_before_the_first_push(autojump_clock, direct):
    rng = random.Random(5)
    async with room() as here:
        peers: list[tuple[MemoryTransport, str]] = []

        async def flow() -> None:
            while True:
                for symbol in range(10):
                    await here.service.publish(f"ticker.S{symbol}", rng.random())

        for symbol in range(10):
            await here.service.publish(f"ticker.S{symbol}", 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flow)
            for user in range(1000):
                peer, _ = here.join(direct=direct)
                symbol = f"ticker.S{rng.randrange(10)}"
                peer.say("auth", token=str(user))
                peer.say("subscribe", args=[symbol])
                peers.append((peer, symbol))
                for _ in range(rng.randrange(3)):
                    await trio.lowlevel.checkpoint()
            for peer, symbol in peers:
                while len(peer.sent) < 5:
                    await trio.lowlevel.checkpoint()
                assert [m.get("op") for m in peer.sent[:3]] == ["auth", "subscribe", None]
                assert peer.sent[2]["type"] == "snapshot"
                assert peer.sent[2]["channel"] == symbol
                seq = peer.sent[2]["seq"]
                for push in peer.sent[3:]:
                    if push["type"] == "update":
                        assert push["prev"] == seq
                        seq = push["seq"]
            nursery.cancel_scope.cancel()


async def test_over_hypercorn_with_a_bearer_token_and_the_subprotocol():
    async with (
        open_push_service(authenticate=JwtAuthenticator(Auth(), SECRET)) as service,
        hypercorn_serving(service) as port,
        trio_client(
            port,
            extra_headers=[(b"authorization", b"Bearer " + token(4).encode())],
            subprotocols=["trading-push.v1"],
        ) as peer,
    ):
        assert peer.socket.subprotocol == "trading-push.v1"
        opening = await peer.receive()
        assert opening["op"] == "auth"
        assert opening["user"] == "4"
        assert "id" not in opening
        await service.publish("pnl", 5, user=4)
        assert (await peer.request("subscribe", args=["pnl"]))["ok"]
        assert (await peer.push())["data"] == 5


async def test_msgspec_raw_is_published_as_it_is(autojump_clock):
    async with room() as here:
        await here.service.publish("pnl", msgspec.Raw(b"[1,2]"), user="4")
        peer, _ = here.join()
        peer.say("auth", token="4")
        peer.say("subscribe", args=["pnl"])
        assert (await peer.next(3))[2]["data"] == [1, 2]


async def test_one_item_twice_in_a_request_is_one_stream_at_the_later_pace(autojump_clock):
    async with room() as here:
        peer, _ = here.join()
        peer.say("auth", token="4")
        peer.say("subscribe", id=2, args=["ticker.A", {"channel": "ticker.A", "max_hz": 2}])
        _, reply = await peer.next(2)
        assert reply["ok"]
        assert here.service.statistics().ledger.subscriptions_opened == 1
        assert peer.closed_with is None


async def test_a_faster_pace_counts_at_once(autojump_clock):
    async with room() as here:
        await here.service.publish("ticker.A", 0)
        peer, _ = await here.subscribed({"channel": "ticker.A", "max_hz": 0.001})
        await here.service.publish("ticker.A", 1)
        await trio.sleep(5)
        assert peer.sent == []
        peer.say("subscribe", args=[{"channel": "ticker.A", "max_hz": 10}])
        assert (await peer.next(2))[1]["data"] == 1
        assert trio.current_time() < 7


async def test_a_pace_that_is_set_later_counts_from_the_last_push_on(autojump_clock):
    async with room() as here:
        await here.service.publish("ticker.A", 0)
        peer, _ = await here.subscribed("ticker.A")
        await trio.sleep(60)
        await here.service.publish("ticker.A", 1)  # written by the fan-out itself
        await peer.next()
        pushed_at = trio.current_time()
        await peer.request("subscribe", args=[{"channel": "ticker.A", "max_hz": 0.5}])
        await here.service.publish("ticker.A", 2)
        await peer.next()
        assert trio.current_time() - pushed_at >= 2


async def test_a_value_that_comes_after_the_end_is_not_kept(autojump_clock):
    async with room() as here:
        service = here.service
        await service.publish("ticker.A", 1)
    with pytest.raises(ServiceClosed):
        await service.publish("ticker.A", 2)
    latest = service.latest("ticker.A")
    assert latest is not None
    assert bytes(latest.data) == b"1"


async def test_the_first_push_counts_in_the_pace(autojump_clock):
    async with room(channels=[EVENTS]) as here:
        await here.service.publish("alerts", 0, user=4)
        peer, _ = here.join()
        peer.say("auth", token="4")
        peer.say("subscribe", args=[{"channel": "alerts", "max_hz": 1}])
        began = trio.current_time()
        await peer.next(3)
        for number in range(1, 6):
            await here.service.publish("alerts", number, user=4)
        for number in range(1, 6):  # events keep their number, and the pace
            [push] = await peer.next()
            assert push["data"] == number
            assert trio.current_time() - began == pytest.approx(number, abs=0.01)


async def test_what_waits_is_bounded_for_a_whole_connection(autojump_clock):
    channels = [Channel(f"events{number}", "events") for number in range(20)]
    settings = Settings(limits=Limits(pending_bytes=100_000))
    async with room(channels=channels, settings=settings) as here:
        peer, connection = await here.subscribed(*(channel.name for channel in channels))
        peer.reading = trio.Event()
        for _ in range(10):
            for channel in channels:
                await here.service.publish(channel.name, "x" * 10_000, user=4)
        await trio.testing.wait_all_tasks_blocked()
        # One of each may stand beside the bound, for each is owed its latest.
        assert connection._subscriber._siblings.bytes <= 100_000 + 20 * 10_002
        peer.leave()
        await trio.testing.wait_all_tasks_blocked()
        assert connection._subscriber._siblings.bytes == 0


async def test_a_subscription_without_a_value_logs_no_push(autojump_clock, caplog):
    caplog.set_level("INFO", "trading_push")
    async with room() as here:
        peer, _ = here.join()
        peer.say("auth", token="4")
        peer.say("subscribe", args=["balance"])
        assert (await peer.next(3))[2]["type"] == "status"
        assert not [message for message in caplog.messages if "推送" in message and "📤" in message]


async def test_a_ticker_is_published_as_clients_name_it(autojump_clock):
    async with room() as here:
        await here.service.publish("ticker.btcusdt", 1)
        peer, _ = here.join()
        peer.say("auth", token="4")
        peer.say("subscribe", args=["ticker.BTCUSDT"])
        assert (await peer.next(3))[2]["data"] == 1
        for name in ("ticker.", "ticker.A\n", "ticker.A*B"):
            with pytest.raises(ValueError, match="a symbol has"):
                await here.service.publish(name, 1)


def test_values_in_plain_notation_wherever_they_stand():
    value = {
        Decimal("1E+3"): [Decimal("0E-8"), {"at": datetime(2026, 1, 1, tzinfo=UTC)}],
        "raw": msgspec.Raw(b'{"text":"NaN E+5","price":"1.50"}'),
    }
    assert json.loads(encode_data(value)) == {
        "1000": ["0.00000000", {"at": 1_767_225_600_000}],
        "raw": {"text": "NaN E+5", "price": "1.50"},
    }


async def test_a_handshake_that_is_under_way_when_the_drain_begins_is_not_forgotten(autojump_clock):
    async with room() as here:
        await here.service.drain()
        late, _ = here.join()
        await trio.testing.wait_all_tasks_blocked()
        assert late.closed_with == (1012, "service restart")
    assert here.service.statistics().ledger.balanced


async def test_a_feed_with_a_value_that_cannot_be_sent_goes_on(autojump_clock, caplog):
    class Feed:
        def knows(self, symbol: str) -> bool:
            return True

        async def run(self, sink: MarketSink) -> None:
            for _ in range(3):
                sink.update([Ticker("BAD", last=Decimal("NaN")), Ticker("A", last=Decimal(1))])
                await trio.sleep(1)
            await trio.sleep_forever()

    async with room(feed=Feed()) as here:
        await here.subscribed("ticker.A")
        await trio.sleep(5)
        assert here.service.statistics().connections == 1
    assert sum("BAD行情无法编码" in message for message in caplog.messages) == 1
