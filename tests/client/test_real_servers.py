"""Every Python client against the real server: under Hypercorn, and as the native endpoint."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import trio

from harness.endpoints import open_endpoint
from harness.python_clients import CLIENTS, UnderTest, opened
from harness.support import SECRET, serving, token, until

from trading_push import Channel, JwtAuthenticator
from trading_push.client import ending
from trading_push.client.ending import Refused
from trading_push.client.messages import Push
from trading_push.client.table import Table
from trading_push.errors import AuthenticationError, CloseCode
from trading_push.settings.schema import Auth, Limits

pytestmark = [
    pytest.mark.parametrize("kind", CLIENTS),
    pytest.mark.parametrize("endpoint", ["linked", "native"]),
]
ALERTS = Channel("alerts", kind="events")


@pytest.fixture(autouse=True)
def _quick_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "BACKOFF_FIRST_S", 0.01)


def url_of(server: Any) -> str:
    return f"ws://127.0.0.1:{server.port}/ws"


async def values(client: UnderTest, count: int) -> list[Push]:
    """The next pushes that are no statuses."""
    found: list[Push] = []
    while len(found) < count:
        push = await client.next()
        if push.type != "status":
            found.append(push)
    return found


async def test_a_snapshot_and_updates(endpoint: str, kind: str, certificates: Any) -> None:
    async with (
        open_endpoint(endpoint, certificates, channels=[ALERTS]) as server,
        opened(kind, url_of(server), token(4), channels=["alerts", "ticker_BTCUSDT_4"]) as client,
    ):
        assert client.client.user == "4"
        await server.service.publish("alerts", {"n": 1}, user="4")
        await server.service.publish("alerts", {"n": 2}, user="5")
        await server.service.publish("alerts", {"n": 3}, user="4")
        first, second = await values(client, 2)
        assert [first.data, second.data] == [{"n": 1}, {"n": 3}]
        assert second.prev == first.seq
        await server.service.publish("ticker.BTCUSDT", {"symbol": "BTCUSDT", "last": "1"})
        [ticker] = await values(client, 1)
        assert (ticker.channel, ticker.data["last"]) == ("ticker.BTCUSDT", "1")


async def test_after_a_cut_events_come_on_without_a_gap(
    endpoint: str, kind: str, certificates: Any
) -> None:
    async with (
        open_endpoint(endpoint, certificates, channels=[ALERTS]) as server,
        opened(kind, url_of(server), token(4), channels=["alerts"]) as client,
    ):
        for n in range(3):
            await server.service.publish("alerts", n, user="4")
        assert [push.data for push in await values(client, 3)] == [0, 1, 2]
        [connection] = server.service.context.connections
        connection.stop(CloseCode.TOO_SLOW, "cut by the test")
        for n in range(3, 6):
            await server.service.publish("alerts", n, user="4")
        pushes = await values(client, 3)
        assert [push.data for push in pushes] == [3, 4, 5]
        assert not any(push.gap for push in pushes)


async def test_a_kick_ends_it(endpoint: str, kind: str, certificates: Any) -> None:
    async with (
        open_endpoint(endpoint, certificates) as server,
        opened(kind, url_of(server), token(4)) as client,
    ):
        assert server.service.kick(user="4") == 1
        with pytest.raises(Refused) as caught:
            await client.next()
        assert caught.value.code == CloseCode.KICKED


async def test_a_bad_token_ends_it(endpoint: str, kind: str, certificates: Any) -> None:
    async with open_endpoint(endpoint, certificates) as server:
        with pytest.raises(AuthenticationError):
            async with opened(kind, url_of(server), "no token"):
                pytest.fail("it must not get in")


async def test_an_expired_token_is_replaced_on_the_living_connection(
    endpoint: str, kind: str, certificates: Any
) -> None:
    given: list[str] = []

    def next_token() -> str:
        given.append(token(ttl_s=3 if len(given) < 2 else 60))
        return given[-1]

    async with (
        open_endpoint(
            endpoint,
            certificates,
            limits=Limits(expiry_notice_s=2),
            auth=Auth(leeway_s=0),
            authenticate=JwtAuthenticator(Auth(leeway_s=0), SECRET),
        ) as server,
        opened(kind, url_of(server), next_token) as client,
    ):
        [connection] = server.service.context.connections
        until_s = time.time() + 4
        await until(lambda: time.time() > until_s)  # the first has expired by then
        assert list(server.service.context.connections) == [connection]
        assert client.client.is_connected
    assert len(given) >= 2


async def test_a_path_that_nobody_serves(endpoint: str, kind: str, certificates: Any) -> None:
    async with open_endpoint(endpoint, certificates) as server:
        with pytest.raises(Refused, match="check its host and its path"):
            async with opened(kind, url_of(server) + "/nope", token(4)):
                pytest.fail("it must not get in")


async def test_all_tickers_in_a_table(endpoint: str, kind: str, certificates: Any) -> None:
    async def tick(**last: str) -> None:
        await server.service.publish_many(
            [
                (f"ticker.{symbol}", {"symbol": symbol, "last": each}, None)
                for symbol, each in last.items()
            ]
        )

    async with (
        open_endpoint(endpoint, certificates) as server,
        opened(kind, url_of(server), token(4), channels=["ticker.*"]) as client,
    ):
        table = Table()

        async def until_shown(expected: dict[str, str]) -> None:
            with trio.fail_after(10):
                while {key: row["last"] for key, row in table.rows.items()} != expected:
                    table.apply(await client.next())

        await tick(A="1", B="2")
        await until_shown({"A": "1", "B": "2"})
        await tick(B="3", C="4")
        await until_shown({"A": "1", "B": "3", "C": "4"})


async def test_all_that_the_server_offers(endpoint: str, kind: str, certificates: Any) -> None:
    async with (
        open_endpoint(endpoint, certificates, channels=[ALERTS]) as server,
        opened(kind, url_of(server), token(4), offered=True) as client,
    ):
        await server.service.publish("alerts", {"n": 1}, user="4")
        [alert] = await values(client, 1)
        assert (alert.channel, alert.data) == ("alerts", {"n": 1})


async def test_a_server_that_is_started_anew(endpoint: str, kind: str, tmp_path: Any) -> None:
    """A real process: it says when to come back, and the client does."""
    if endpoint == "native":
        pytest.skip("trading-push serve is Hypercorn; the native endpoint is the application's")
    start = partial(serving, tmp_path)
    with start() as first:
        port = first.url.rsplit(":", 1)[1].split("/")[0]
        async with opened(kind, first.url, token(4), channels=["balance"]) as client:
            [before] = await values(client, 1)
            await trio.to_thread.run_sync(first.stop)
            with start("--port", port):
                while (push := await client.next()).epoch == before.epoch:
                    pass
                assert push.channel == "balance"
