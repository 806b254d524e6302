"""The channel `ticker.*`: a table of all tickers, of kind `keyed`."""

from __future__ import annotations

import json

import pytest
import trio
import trio.testing

from harness.endpoints import open_endpoint
from harness.room import lines
from harness.support import token

from trading_push import ConfigurationError, Principal, open_push_service
from trading_push.broker.base import Status
from trading_push.broker.memory import MemoryBroker
from trading_push.client import Table, open_client
from trading_push.settings.schema import Settings
from trading_push.settings.sources import Market
from trading_push.testing import peer
from trading_push.topics import ALL_TICKERS, Channel, Channels, Topic, ticker_topic

at_each_endpoint = pytest.mark.parametrize("kind", ["linked", "native", "memory"])


def tickers(push):
    return {row["symbol"]: row["last"] for row in push["data"]}


async def tick(service, **last):
    await service.publish_many(
        [
            (f"ticker.{symbol}", {"symbol": symbol, "last": each}, None)
            for symbol, each in last.items()
        ]
    )


def opened(max_hz=2.0):
    settings = Settings(market=Market(all_max_hz=max_hz))
    return open_push_service(settings=settings, authenticate=Principal)


async def test_a_snapshot_of_all_and_updates_of_what_has_changed(autojump_clock):
    async with opened() as service:
        await tick(service, BTCUSDT="1", ETHUSDT="2")
        async with peer(service, "4") as four:
            await four.subscribe("ticker.*")
            first = await four.push()
            assert (first["channel"], first["type"]) == ("ticker.*", "snapshot")
            assert tickers(first) == {"BTCUSDT": "1", "ETHUSDT": "2"}
            await tick(service, ETHUSDT="3")
            update = await four.push()
            assert (update["type"], update["prev"]) == ("update", first["seq"])
            assert tickers(update) == {"ETHUSDT": "3"}
            # A newcomer gets all that there is by now, and no symbol was watched for it.
            async with peer(service, "5") as five:
                await five.subscribe("ticker.*")
                assert tickers(await five.push()) == {"BTCUSDT": "1", "ETHUSDT": "3"}
        assert service.statistics().subscribers_by_symbol == {}


async def test_at_most_so_many_times_a_second(autojump_clock):
    async with opened(max_hz=2) as service, peer(service, "4") as four:
        await four.subscribe("ticker.*")
        assert (await four.push())["state"] == "down"
        for number in range(100):
            await tick(service, BTCUSDT=str(number), **{f"X{number}": "1"})
            await trio.sleep(0.1)
        await trio.sleep(0.6)
        pushes = [each for each in four.sent if each["type"] != "status"]
        assert 20 <= len(pushes) <= 22
        assert [push["seq"] for push in pushes] == list(range(1, len(pushes) + 1))
        seen = {}
        for push in pushes:
            seen |= tickers(push)
        assert len(seen) == 101


async def test_a_throttled_subscriber_gets_the_union(autojump_clock):
    async with opened(max_hz=10) as service:
        await tick(service, A="0", B="0", C="0")
        async with peer(service, "4") as four, peer(service, "5") as five:
            await four.subscribe({"channel": "ticker.*", "max_hz": 0.5})
            await five.subscribe("ticker.*")
            first = await four.push()
            assert tickers(first) == {"A": "0", "B": "0", "C": "0"}
            for symbol in "ABA":
                await tick(service, **{symbol: "1"})
                await trio.sleep(0.2)
            await trio.sleep(2)
            update = await four.push()
            assert (update["prev"], update["seq"], update["merged"]) == (1, 4, 3)
            assert tickers(update) == {"A": "1", "B": "1"}
            assert [tickers(each) for each in await five.next(4)][1:] == [
                {"A": "1"},
                {"B": "1"},
                {"A": "1"},
            ]


async def test_a_slow_reader_gets_the_union(autojump_clock):
    async with opened(max_hz=10) as service:
        await tick(service, A="0", B="0")
        async with peer(service, "4") as four:
            await four.subscribe("ticker.*")
            first = await four.push()
            four.reading = trio.Event()
            for symbol in "ABBA":
                await tick(service, **{symbol: symbol})
                await trio.sleep(0.2)
            four.reading.set()
            shown, at = tickers(first), first["seq"]
            while at < 5:
                push = await four.push()
                assert push["prev"] == at
                shown |= tickers(push)
                at = push["seq"]
            assert shown == {"A": "A", "B": "B"}


async def test_who_resumes_gets_what_was_missed(autojump_clock):
    async with opened(max_hz=10) as service:
        await tick(service, A="0", B="0", C="0")
        async with peer(service, "5") as five:
            await five.subscribe("ticker.*")
            async with peer(service, "4") as four:
                await four.subscribe("ticker.*")
                first = await four.push()
            for symbol in "AB":
                await tick(service, **{symbol: "1"})
                await trio.sleep(0.2)
            since = {"epoch": first["epoch"], "seq": first["seq"]}
            async with peer(service, "4") as four:
                reply = await four.request(
                    "subscribe", args=[{"channel": "ticker.*", "since": since}]
                )
                assert reply["results"][0]["recovered"] is True
                push = await four.push()
                assert (push["type"], push["prev"], push["seq"]) == ("update", 1, 3)
                assert tickers(push) == {"A": "1", "B": "1"}
            stranger = {"epoch": "another", "seq": 1}
            async with peer(service, "4") as four:
                reply = await four.request(
                    "subscribe", args=[{"channel": "ticker.*", "since": stranger}]
                )
                assert reply["results"][0]["recovered"] is False
                assert tickers(await four.push()) == {"A": "1", "B": "1", "C": "0"}


async def test_nobody_watches_for_a_while(autojump_clock):
    """What changed meanwhile is in the snapshot, not in a push behind an old one."""
    async with opened() as service:
        await tick(service, A="0")
        for value in ("1", "2"):
            async with peer(service, "4") as four:
                await four.subscribe("ticker.*")
                await four.push()
            await trio.sleep(10)
            await tick(service, A=value)
            await trio.sleep(10)
            async with peer(service, "4") as four:
                await four.subscribe("ticker.*")
                assert tickers(await four.push()) == {"A": value}
                await trio.testing.wait_all_tasks_blocked()
                assert four.sent == []


async def test_while_nobody_watches_no_delivery_is_looked_at(autojump_clock):
    async with opened() as service:
        every = service._upstream.all_tickers
        await tick(service, A="0", B="0")
        assert every._changed == {}
        async with peer(service, "4") as four:
            await four.subscribe("ticker.*")
            assert tickers(await four.push()) == {"A": "0", "B": "0"}
            await tick(service, A="1")
            assert tickers(await four.push()) == {"A": "1"}
        await trio.sleep(10)
        await tick(service, A="2")
        assert every._changed == {}


async def test_what_went_stale_or_was_forgotten_while_nobody_watched(autojump_clock):
    async with opened() as service:
        broker, every = service._broker, service._upstream.all_tickers
        await tick(service, A="0", B="0", C="0")
        async with peer(service, "4") as four:
            await four.subscribe("ticker.*")
            first = await four.push()
            assert tickers(first) == {"A": "0", "B": "0", "C": "0"}
        await trio.sleep(10)
        broker.forget(ticker_topic("B"))
        every.forget(ticker_topic("B"))
        broker.forget(ticker_topic("C"))
        await tick(service, A="1", D="0")
        broker.mark([ticker_topic("A"), ticker_topic("D")], Status("stale", "source_timeout"))
        async with peer(service, "4") as four:
            since = {"epoch": first["epoch"], "seq": first["seq"]}
            await four.subscribe({"channel": "ticker.*", "since": since})
            update, status = await four.next(2)
            assert (update["type"], tickers(update)) == ("update", {"A": "1", "D": "0"})
            assert (status["type"], status["state"]) == ("status", "stale")
        async with peer(service, "5") as five:
            await five.subscribe("ticker.*")
            assert tickers(await five.push()) == {"A": "1", "D": "0"}


async def test_it_is_offered_and_no_one_publishes_to_it(autojump_clock):
    async with opened() as service, peer(service, "4") as four:
        offered = (await four.request("channels"))["channels"]
        assert {"channel": "ticker.*", "kind": "keyed"} in offered
        with pytest.raises(ValueError, match=r"publish to ticker\.SYMBOL"):
            await service.publish("ticker.*", [])
        for name in ("ticker_*_4", "ticker.*"):
            reply = await four.request("subscribe", args=[name])
            assert reply["results"][0]["channel"] == "ticker.*"
        for name in ("ticker.**", "ticker.BTC*", "ticker_*_5", "ticker.*.*"):
            reply = await four.request("subscribe", args=[name])
            assert not reply["ok"], name
        assert service.statistics().topics == {}
        await tick(service, A="0")
        await trio.sleep(1)
        assert service.statistics().topics == {"ticker": {"live": 1}, "ticker.*": {"live": 1}}
    with pytest.raises(ConfigurationError, match="state or events"):
        Channel("margin", "keyed")


async def test_the_log_calls_it_a_market(autojump_clock, caplog):
    caplog.set_level("INFO", "trading_push")
    async with opened() as service, peer(service, "4") as four:
        await four.subscribe("ticker.*", "ticker.BTCUSDT")
        four.leave(1001)
        await trio.testing.wait_all_tasks_blocked()
    said = lines(caplog)
    for line in (
        "📊 用户4订阅*行情",
        "   🚪 退出行情房间: ticker_*_4",
        "📊 用户4取消订阅*行情 - 剩余订阅者: 0",
        "   *无订阅者，移除",
    ):
        assert line in said


@at_each_endpoint
async def test_two_at_an_endpoint_see_the_same(kind, certificates):
    async with (
        open_endpoint(kind, certificates) as endpoint,
        endpoint.connect(4, "ticker.*") as four,
        endpoint.connect(5, "ticker.*") as five,
    ):
        shown = [{}, {}]
        await tick(endpoint.service, A="1", B="2")
        await tick(endpoint.service, B="3", C="4")
        for number, each in enumerate((four, five)):
            with trio.fail_after(5):
                while shown[number] != {"A": "1", "B": "3", "C": "4"}:
                    push = await each.push()
                    if push["type"] != "status":
                        shown[number] |= tickers(push)


async def test_the_client_puts_the_table_together(certificates):
    async with (
        open_endpoint("linked", certificates) as endpoint,
        open_client(
            f"ws://127.0.0.1:{endpoint.port}/ws", token(4), channels=["ticker.*"]
        ) as client,
    ):
        table = Table()
        await tick(endpoint.service, A="1", B="2")
        changed = False
        with trio.fail_after(5):
            async for push in client:
                table.apply(push)
                if len(table.rows) == 2 and not changed:
                    changed = True
                    await tick(endpoint.service, B="3")
                if changed and table.rows["B"]["last"] == "3":
                    break
        assert table.rows["A"]["last"] == "1"


def test_rows_of_another_shape():
    """Such as candles: by time frame and time, dropped as they get old."""
    delivered = []
    broker = MemoryBroker(Channels([]), delivered.extend)
    topic = Topic("ticker.*")
    assert topic == ALL_TICKERS

    def by_frame(rows):
        frames = {}
        for key, row in rows:
            frames.setdefault(key.partition("/")[0], []).append(json.loads(row))
        return json.dumps(frames).encode()

    broker.publish_rows(topic, {"1m/1": b"[1]", "1s/1": b"[1]", "1s/2": b"[2]"}, by_frame)
    broker.publish_rows(topic, {"1s/2": b"[2,3]"}, by_frame)
    last = broker.snapshot(topic)
    assert json.loads(last.data) == {"1s": [[2, 3]]}
    assert json.loads(last.table.since(None).data) == {"1m": [[1]], "1s": [[1], [2, 3]]}
    broker.drop_rows(topic, ["1s/1"])
    assert json.loads(last.table.since(None).data) == {"1m": [[1]], "1s": [[2, 3]]}
    assert last.table.since(2).data == b"{}"
