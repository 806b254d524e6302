"""What a source says it offers, and what clients of it may then name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from trading_push import Channel, ConfigurationError, FunctionSource, Principal, open_push_service
from trading_push.settings.schema import Intervals, Settings
from trading_push.testing import peer

SETTINGS = Settings(intervals=Intervals(balance=7, pnl=0.25))


def source(data_types: Iterable[str] | None) -> FunctionSource:
    return FunctionSource(lambda user, data_type: [data_type], data_types=data_types)


async def offered(data_types: Iterable[str] | None, *own: Channel) -> list[dict[str, Any]]:
    async with (
        open_push_service(
            source(data_types), settings=SETTINGS, authenticate=Principal, channels=own
        ) as service,
        peer(service, "4") as four,
    ):
        reply = await four.request("channels")
        assert reply["ok"]
        channels: list[dict[str, Any]] = reply["channels"]
        # Tickers are offered whatever the source has.
        assert channels.pop() == {"channel": "ticker.*", "kind": "keyed"}
        names = [each["channel"] for each in channels]
        subscribed = await four.request("subscribe", args=[*names, "orders"])
        refused = [each for each in subscribed["results"] if not each["ok"]]
        assert ["orders" in names, [each["channel"] for each in refused]] in (
            [True, []],
            [False, ["orders"]],
        )
        assert all(each["error"]["code"] == "unknown_channel" for each in refused)
        return channels


async def test_a_source_that_does_not_say_offers_all_four(autojump_clock):
    assert await offered(None) == [
        {"channel": "balance", "kind": "state", "interval_s": 7},
        {"channel": "positions", "kind": "state", "interval_s": 5},
        {"channel": "pnl", "kind": "state", "interval_s": 0.25},
        {"channel": "orders", "kind": "state", "interval_s": 15},
        {"channel": "fills", "kind": "events"},
    ]


@pytest.mark.parametrize("data_types", [["balance"], ("balance", "nonsense"), {"balance": 1}])
async def test_what_it_does_not_name_is_no_channel(autojump_clock, data_types):
    names = [each["channel"] for each in await offered(data_types)]
    assert names == ["balance", "fills"]


async def test_a_source_may_offer_more_than_the_four(autojump_clock):
    margin = Channel("margin", interval_s=2)
    news = Channel("news", "events", per_user=False)
    assert await offered(["margin"], margin, news) == [
        {"channel": "fills", "kind": "events"},
        {"channel": "margin", "kind": "state", "interval_s": 2},
        {"channel": "news", "kind": "events"},
    ]


async def test_what_it_does_not_offer_may_be_published(autojump_clock):
    async with (
        open_push_service(
            source(["balance"]), authenticate=Principal, channels=[Channel("pnl")]
        ) as service,
        peer(service, "4") as four,
    ):
        await service.publish("pnl", {"total": "1"}, user=4)
        await four.subscribe("pnl")
        assert (await four.push())["data"] == {"total": "1"}
        with pytest.raises(ValueError, match="no channel 'orders'"):
            await service.publish("orders", [], user=4)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (Channel("margin", interval_s=2), "does not offer margin: it offers balance"),
        (Channel("balance"), "there twice"),
        (Channel("fills", "events"), "there twice"),
    ],
)
async def test_a_channel_that_does_not_fit_is_refused_at_start(own, says):
    with pytest.raises(ConfigurationError, match=says):
        async with open_push_service(source(["balance"]), authenticate=Principal, channels=[own]):
            pass


async def test_channels_is_served_to_users_only(autojump_clock):
    async with open_push_service(authenticate=Principal) as service, peer(service) as nobody:
        refused = await nobody.request("channels")
        assert refused["error"]["code"] == "not_authenticated"


async def test_events_of_which_none_has_happened_are_told_quiet_once(autojump_clock):
    async with (
        open_push_service(source(["balance"]), authenticate=Principal) as service,
        peer(service, "4") as four,
    ):
        await four.subscribe("fills")
        status = await four.push()
        assert (status["type"], status["state"], status["reason"]) == ("status", "live", "quiet")
        await service.publish("fills", {"fill_id": "1"}, user=4)
        await service.publish("fills", {"fill_id": "2"}, user=4)
        pushes = [await four.push() for _ in range(2)]
        assert [push["type"] for push in pushes] == ["snapshot", "update"]
        assert service.statistics().topics["fills"] == {"live": 1}
