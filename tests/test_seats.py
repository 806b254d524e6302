"""How many connections a user may have, and how an operator ends them."""

from __future__ import annotations

import time

import pytest
import trio
import trio.testing
import trio_websocket
from support import token
from test_doors import KINDS, certificates, open_door
from test_teardown import lines, room

from trading_push.settings import Limits, Settings
from trading_push.testing import MemoryTransport

__all__ = ["certificates"]


def limited(count: int, **options: str) -> Settings:
    return Settings(limits=Limits(connections_per_user=count, **options))


async def settled(*peers: MemoryTransport) -> list[int | None]:
    await trio.testing.wait_all_tasks_blocked()
    return [None if peer.closed_with is None else peer.closed_with[0] for peer in peers]


async def test_a_connection_too_many_is_refused(autojump_clock, caplog):
    caplog.set_level("INFO", "trading_push")
    async with room(settings=limited(2)) as here:
        first, _ = await here.subscribed("balance")
        second, _ = await here.subscribed("balance")
        third, _ = here.join()
        third.say("auth", token="4")
        other, _ = here.join()
        other.say("auth", token="5")
        assert await settled(first, second, third, other) == [None, None, 4504, None]
        assert third.sent == []
        assert third.closed_with == (4504, "too many connections of this user")
        assert here.service.statistics().users_online == 2
        assert "⚠️ 未认证用户断开连接" in lines(caplog)
        # One that leaves makes room, at once.
        first.leave(1000)
        await settled()
        again, _ = await here.subscribed("balance")
        assert await settled(again) == [None]
        assert set(here.service.hub.seats) == {"4", "5"}
    assert here.service.hub.seats == {}


async def test_where_so_configured_the_oldest_makes_room(autojump_clock):
    async with room(settings=limited(2, over_user_limit="replace")) as here:
        peers = [(await here.subscribed("balance"))[0] for _ in range(4)]
        assert await settled(*peers) == [4505, 4505, None, None]
        assert peers[0].closed_with == (4505, "replaced by a newer connection")
        assert here.service.statistics().connections == 2


async def test_a_renewal_takes_no_second_seat(autojump_clock):
    async with room(settings=limited(1)) as here:
        peer, _ = await here.subscribed("balance")
        assert (await peer.request("auth", token="4"))["ok"]
        peer.leave(1000)
        await settled()
        assert here.service.hub.seats == {}


async def test_a_drain_during_the_check_leaves_no_seat_taken(autojump_clock):
    async with room() as here:
        peer, connection = here.join()
        await settled()
        connection.dismiss()
        peer.say("auth", token="4")
        await settled()
    assert here.service.hub.seats == {}


async def test_a_user_or_one_connection_is_kicked(autojump_clock):
    async with room() as here:
        peers = [(await here.subscribed("balance"))[0] for _ in range(3)]
        other, _ = here.join()
        other.say("auth", token="5")
        [reply] = await other.next()
        assert here.service.kick(connection=reply["conn"], reason="maintenance") == 1
        assert here.service.kick(connection=reply["conn"]) == 0
        assert here.service.kick(user=4) == 3
        assert here.service.kick(user=4) == here.service.kick(user="nobody") == 0
        assert await settled(*peers, other) == [4503] * 4
        assert other.closed_with == (4503, "maintenance")
        for wrong in ({}, {"user": "4", "connection": "c"}):
            with pytest.raises(ValueError, match="one of them"):
                here.service.kick(**wrong)


@pytest.mark.parametrize("kind", KINDS)
async def test_at_every_door(kind, certificates):
    limits = Limits(connections_per_user=1)
    async with open_door(kind, certificates, limits=limits) as door, door.connect(4) as client:
        async with door.connect() as second:
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                await second.request("auth", token=token(4))
            assert closed.value.reason.code == 4504
        assert door.service.kick(user=4) == 1
        with trio.fail_after(5), pytest.raises(trio_websocket.ConnectionClosed) as closed:
            await client.receive()
        assert closed.value.reason.code == 4503


async def test_a_revoked_token_ends_its_connections_and_opens_none(autojump_clock, caplog):
    caplog.set_level("INFO", "trading_push")
    async with room() as here:
        peers = {}
        for name in ("old", "new"):
            peers[name], _ = here.join()
            peers[name].say("auth", token=f"4 {name}")
            await peers[name].next()
        assert here.service.revoke("old") == 1
        assert await settled(*peers.values()) == [4503, None]
        assert peers["old"].closed_with == (4503, "token revoked")
        again, _ = here.join()
        again.say("auth", token="4 old")
        [reply] = await again.next()
        assert reply["error"]["code"] == "bad_token"
        assert await settled(again) == [4500]
        # What goes on does not take it as a renewal either.
        refused = await peers["new"].request("auth", token="4 old")
        assert refused["error"]["code"] == "bad_token"
        assert (await peers["new"].request("ping"))["op"] == "pong"


async def test_a_renewed_session_stands_for_its_newest_token(autojump_clock):
    async with room() as here:
        peer, _ = here.join()
        await peer.request("auth", token="4 old")
        await peer.request("auth", token="4 new")
        assert here.service.revoke("old") == 0
        assert here.service.revoke("new", expires_at=time.time() + 60) == 1
        assert await settled(peer) == [4503]
        # Once a token has expired by itself, nobody needs to know any more.
        here.service.revoke("ancient", expires_at=1.0)
        here.service.revoke("other")
        assert set(here.service.hub.revoked) == {"old", "new", "other"}
