"""How many connections a user may have, and how an operator ends them."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
import trio
import trio.testing
import trio_websocket

from harness.endpoints import KINDS, open_endpoint
from harness.handshakes import handshake
from harness.room import lines, room
from harness.support import SECRET, token, until

from trading_push import JwtAuthenticator, Principal, PushService, issue_token
from trading_push.connections.connection import Connection
from trading_push.connections.opening import Opening
from trading_push.endpoints import admission, asgi, native
from trading_push.endpoints.hypercorn.server import guard
from trading_push.settings.schema import Auth, Limits, Settings
from trading_push.testing import MemoryTransport


def limited(count: int, **options: str) -> Settings:
    return Settings(limits=Limits(connections_per_user=count, **options))


def lasting(token: str) -> Principal:
    """A token names its user, itself, and for how many seconds it is good."""
    user, token_id, ttl_s = token.split()
    return Principal(user, time.time() + float(ttl_s), token_id=token_id)


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
        assert set(here.service.context.seats.by_user) == {"4", "5"}
    assert here.service.context.seats.by_user == {}


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
        assert here.service.context.seats.by_user == {}


async def test_a_drain_during_the_check_leaves_no_seat_taken(autojump_clock):
    async with room() as here:
        peer, connection = here.join()
        await settled()
        connection.dismiss()
        peer.say("auth", token="4")
        await settled()
    assert here.service.context.seats.by_user == {}


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
async def test_at_every_endpoint(kind, certificates):
    limits = Limits(connections_per_user=1)
    async with (
        open_endpoint(kind, certificates, limits=limits) as endpoint,
        endpoint.connect(4) as client,
    ):
        async with endpoint.connect() as second:
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                await second.request("auth", token=token(4))
            assert closed.value.reason.code == 4504
        assert endpoint.service.kick(user=4) == 1
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


async def test_a_renewed_session_stands_on_each_of_its_tokens(autojump_clock):
    """A token that is revoked ends what it has opened, though a shorter one has renewed it."""
    for revoked in ("long", "short"):
        async with room(authenticate=lasting) as here:
            peer, _ = here.join()
            assert (await peer.request("auth", token="4 long 86400"))["expires_in"] >= 86399
            # The session keeps the longer time, and so the longer token.
            assert (await peer.request("auth", token="4 short 60"))["expires_in"] >= 86300
            assert here.service.revoke(revoked, expires_at=time.time() + 86400) == 1
            assert await settled(peer) == [4503]


async def test_of_very_many_renewals_the_first_and_the_longest_are_kept(autojump_clock):
    async with room(authenticate=lasting) as here:
        peer, _ = here.join()
        for number, ttl_s in enumerate([10, 9000, *range(20, 40)]):
            assert (await peer.request("auth", token=f"4 t{number} {ttl_s}"))["ok"]
        [connection] = here.service.context.connections
        kept = [number for number in range(22) if connection.authenticated_by(f"t{number}")]
        assert kept == [0, 1, *range(16, 22)]
        assert here.service.revoke("t1") == 1


async def test_a_revoked_token_is_refused_until_no_leeway_helps_it(autojump_clock):
    settings = Settings(auth=Auth(leeway_s=5), jwt_secret=SECRET)
    check = JwtAuthenticator(settings.auth, SECRET)
    now = time.time()
    async with room(settings=settings, authenticate=check) as here:
        token = issue_token(SECRET, "4", -2, {"jti": "late"})  # good for three seconds more
        here.service.revoke("late", expires_at=now - 2)
        here.service.revoke("another")
        peer, _ = here.join()
        peer.say("auth", token=token)
        [reply] = await peer.next()
        assert reply["error"]["message"] == "the token was revoked"
        here.service.revoke("ancient", expires_at=now - 6)
        here.service.revoke("other")
        assert len(here.service.context.tokens.revoked) == 3


async def test_a_token_revoked_during_the_handshake_opens_nothing(autojump_clock):
    async with room() as here:
        principal = Principal("4", token_id="stolen")
        here.service.revoke("stolen")
        transport = MemoryTransport()
        seat = here.service.context.seats.take()
        await Connection(here.service.context, transport, seat, Opening(principal)).run()
        assert transport.closed_with == (4500, "bad_token")
        assert [message["op"] for message in transport.sent] == ["error"]


@pytest.mark.parametrize("kind", ["linked", "native", "plain"])
async def test_at_an_endpoint_too(kind, certificates):
    """The check is over; the 101 is written; the token is revoked before the session begins."""
    service: list[PushService] = []

    async def authenticate(token: str) -> Principal:
        # What the service does next runs before the connection does.
        trio.lowlevel.current_trio_token().run_sync_soon(service[0].revoke, "stolen")
        return Principal("4", token_id="stolen")

    async with open_endpoint(kind, certificates, authenticate=authenticate) as endpoint:
        service.append(endpoint.service)
        headers = [(b"authorization", b"Bearer x")]
        async with endpoint.connect(extra_headers=headers) as client:
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                while (await client.receive())["op"] == "error":
                    pass
            assert closed.value.reason.code in (4500, 4503)
        await until(lambda: not endpoint.service.context.connections)


@pytest.mark.parametrize("kind", ["linked", "native", "native-tls"])
async def test_whoever_says_nothing_takes_a_seat_too(kind, certificates):
    async with open_endpoint(kind, certificates, limits=Limits(connections=10)) as endpoint:
        streams = [await trio.open_tcp_stream("127.0.0.1", endpoint.port) for _ in range(10)]
        seats = endpoint.service.context.seats
        places = guard.sockets if kind == "linked" else seats.connections
        await until(lambda: places.taken == 10)
        one_more = await trio.open_tcp_stream("127.0.0.1", endpoint.port)
        if kind != "native-tls":
            await one_more.send_all(handshake())
            assert (await one_more.receive_some()).startswith(b"HTTP/1.1 503")
        assert await one_more.receive_some() == b""
        assert places.taken == 10
        for stream in (*streams, one_more):
            await stream.aclose()
        await until(lambda: places.taken == 0)
        async with endpoint.connect(4) as client:
            assert (await client.request("ping"))["op"] == "pong"


@pytest.mark.parametrize("kind", ["linked", "native", "plain"])
async def test_the_limit_of_an_address_counts_handshakes_under_way(kind, certificates, monkeypatch):
    """A hundred whose 101 is held up: as many as the limit allows get one."""
    held = trio.Event()
    admit = admission.admit

    async def slow(*args: Any) -> Principal | None:
        principal = await admit(*args)
        await held.wait()
        return principal

    for module in (asgi, native):
        monkeypatch.setattr(module, "admit", slow)
    limits = Limits(unauthenticated_per_address=10)
    async with open_endpoint(kind, certificates, limits=limits) as endpoint:
        statuses: Counter[int] = Counter()
        done = trio.Event()

        async def come() -> None:
            stream = await trio.open_tcp_stream("127.0.0.1", endpoint.port)
            async with stream:
                await stream.send_all(handshake())
                statuses[int((await stream.receive_some()).split(b" ", 2)[1])] += 1
                await done.wait()

        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(come)
            await until(lambda: statuses.total() == 30)
            held.set()
            await until(lambda: statuses.total() == 40)
            done.set()
        assert statuses == {101: 10, 503: 30}
        await until(lambda: not endpoint.service.context.seats.unauthenticated)
