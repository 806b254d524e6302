"""What an embedding application tests its own channels with."""

from __future__ import annotations

import threading
from decimal import Decimal
from typing import Any

import attrs
import pytest
import trio
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from trading_push import (
    Channel,
    ConfigurationError,
    Principal,
    PublishError,
    open_push_service,
)
from trading_push.testing import peer, sync_peer

MARGIN = Channel("margin", interval_s=2)


@attrs.frozen
class Margin:
    ratio: Decimal


class Source:
    def __init__(self) -> None:
        self.ratio = Decimal("0.5")

    async def fetch(self, user_id: str, data_type: str) -> Any:
        return Margin(self.ratio)


def anybody(token: str) -> Principal:
    return Principal(token)


async def test_an_applications_own_channel(autojump_clock):
    source = Source()
    async with (
        open_push_service(source, authenticate=anybody, channels=[MARGIN]) as service,
        peer(service, "4") as four,
    ):
        await four.subscribe("margin")
        assert (await four.push())["data"] == {"ratio": "0.5"}
        source.ratio = Decimal("0.25")
        update = await four.push()
        assert (update["type"], update["data"]) == ("update", {"ratio": "0.25"})
        assert trio.current_time() <= 2
        assert service.statistics().users_online == 1
        with pytest.raises(AssertionError, match="unknown_channel"):
            await four.subscribe("nope")
        assert (await four.request("list"))["channels"] == ["margin"]
    assert service.statistics().ledger.balanced


async def test_the_next_push_of_one_channel_leaves_those_of_others(autojump_clock):
    channels = [Channel(name, kind="events") for name in ("a", "b", "c")]
    async with (
        open_push_service(authenticate=anybody, channels=channels) as service,
        peer(service, "4") as four,
    ):
        await four.subscribe("a", "b", "c")
        for name in ("a", "b", "c"):
            assert (await four.push(name))["reason"] == "quiet"
        taken: dict[str, list[Any]] = {name: [] for name in ("a", "b", "c")}

        async def wait_for(name: str) -> None:
            for _ in range(3):
                taken[name].append((await four.push(name))["data"])

        async with trio.open_nursery() as nursery:
            for name in ("c", "b", "a"):
                nursery.start_soon(wait_for, name)
            await trio.testing.wait_all_tasks_blocked()
            for number in range(3):
                await service.publish_many((name, number, "4") for name in ("a", "b", "c"))
        assert taken == {name: [0, 1, 2] for name in ("a", "b", "c")}
        assert four.sent == []


async def test_a_push_that_does_not_come_and_one_that_is_cancelled(autojump_clock):
    async with (
        open_push_service(Source(), authenticate=anybody, channels=[MARGIN]) as service,
        peer(service, "4") as four,
    ):
        await four.subscribe("margin")
        begin = trio.current_time()
        with pytest.raises(AssertionError, match=r"no push of balance within 30 s; .* margin"):
            await four.push("balance", timeout_s=30)
        assert trio.current_time() - begin == pytest.approx(30)
        assert (await four.push("margin"))["type"] == "snapshot"
        with pytest.raises(AssertionError, match="no push within 60 s; there are none"):
            await four.push()
        with trio.move_on_after(1) as scope:
            await four.push("margin")
        assert scope.cancelled_caught
        await service.publish("margin", 7, user="4")
        assert (await four.push("margin"))["data"] == 7
        await service.drain()
        with pytest.raises(AssertionError, match="closed with 1012"):
            await four.push("margin")


async def test_a_peer_without_a_token_and_one_that_is_closed(autojump_clock):
    async with (
        open_push_service(Source(), authenticate=anybody) as service,
        peer(service) as nobody,
    ):
        assert (await nobody.request("list"))["error"]["code"] == "not_authenticated"
        nobody.say_text(b"binary")
        with pytest.raises(AssertionError, match="closed with 1003"):
            await nobody.next()
        with pytest.raises(AssertionError, match="closed with 1003"):
            await nobody.request("list")
        assert nobody.closed_with[0] == 1003


def test_a_synchronous_test_sees_what_is_published_and_fetched():
    source = Source()
    channels = [MARGIN, Channel("alerts", kind="events")]
    with sync_peer("4", source, channels=channels) as four:
        four.subscribe("margin", "alerts")
        assert four.push("margin")["data"] == {"ratio": "0.5"}
        assert four.push("alerts")["reason"] == "quiet"
        for key in ("a", "a", "b", None, None):
            four.publisher.publish("alerts", Decimal("1.50"), user=4, key=key)
        assert [four.push("alerts")["data"] for _ in range(4)] == ["1.50"] * 4
        with Session(create_engine("sqlite://")) as session:
            four.publisher.after_commit(session, "alerts", "rolled back", user=4)
            session.rollback()
            four.publisher.after_commit(session, "alerts", "committed", user="4")
            session.commit()
            session.get_bind().dispose()
        assert four.push("alerts")["data"] == "committed"
        assert four.request("list")["channels"] == ["alerts", "margin"]
        with pytest.raises(AssertionError, match="no push of margin within"):
            four.push("margin", timeout_s=0.01)
        with pytest.raises(AssertionError, match="unknown_channel"):
            four.subscribe("nope")
        with pytest.raises(PublishError, match="nope") as error:
            four.publisher.publish("nope", 1)
        assert (error.value.status, error.value.retryable) == (400, False)
    assert not [each for each in threading.enumerate() if each.name == "sync_peer"]


def test_what_fails_in_a_synchronous_test_s_service_is_raised_in_the_test():
    with pytest.raises(ConfigurationError, match="twice"), sync_peer("4", channels=[MARGIN] * 2):
        pass
    with pytest.raises(ZeroDivisionError), sync_peer("4"):
        raise ZeroDivisionError
    assert not [each for each in threading.enumerate() if each.name == "sync_peer"]
