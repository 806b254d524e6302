"""What an embedding application tests its own channels with."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import attrs
import pytest
import trio

from trading_push import Channel, Principal, open_push_service
from trading_push.testing import peer

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
