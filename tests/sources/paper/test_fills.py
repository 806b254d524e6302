"""Fills: each one of the paper exchange reaches a subscriber once, in order, also across cuts."""

from __future__ import annotations

import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import trio

from harness.paper import Trader
from harness.sources import Table, serving
from harness.support import PATIENCE_S, SECRET, TrioClient, hypercorn_serving, trio_client, until

from trading_push import factory as assembly
from trading_push.settings.schema import Polling, Settings
from trading_push.settings.sources import Database
from trading_push.sources.paper import books

USER = "1"


def fills_of(path: Path, user: str = USER) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as file:
        file.row_factory = sqlite3.Row
        sql = "SELECT * FROM fills WHERE user_id = ? ORDER BY fill_id"
        return [dict(row) for row in file.execute(sql, (user,))]


class Follower:
    """A client that comes back with `since` each time it was cut, and keeps every fill."""

    def __init__(self) -> None:
        self.fills: list[dict[str, Any]] = []
        self.since: dict[str, Any] | None = None

    async def follow(self, client: TrioClient, count: int) -> None:
        args: list[Any] = ["fills"]
        if self.since is not None:
            args = [{"channel": "fills", "since": self.since}]
        reply = await client.request("subscribe", args=args)
        assert reply["ok"], reply
        assert self.since is None or reply["results"][0]["recovered"]
        with trio.fail_after(PATIENCE_S):
            for _ in range(count):
                while (push := await client.push())["type"] == "status":
                    pass
                assert push["type"] == ("snapshot" if self.since is None else "update")
                if self.since is not None:
                    assert (push["prev"], push["seq"]) == (self.since["seq"], push["prev"] + 1)
                self.since = {"epoch": push["epoch"], "seq": push["seq"]}
                self.fills.append(push["data"])


@pytest.mark.parametrize("who_trades", ["this process", "another"])
async def test_every_fill_arrives_once_and_in_order_across_cuts(
    tmp_path: Path,
    fast: None,
    monkeypatch: pytest.MonkeyPatch,
    who_trades: str,
) -> None:
    monkeypatch.setattr(books, "FILLS_KEPT", 1_000_000)
    path = tmp_path / "paper.db"
    settings = Settings(
        jwt_secret=SECRET, database=Database(path=path), polling=Polling(watch_linger_s=0.05)
    )
    follower = Follower()
    with ExitStack() as running:
        if who_trades == "another":
            trader = Trader(path)
            running.callback(trader.kill)
            assert trader.line() == "trading"
            assert trader.line()
        async with (
            assembly.open_configured_service(settings) as service,
            hypercorn_serving(service) as port,
        ):
            for cut in range(4):
                async with trio_client(port, USER) as client:
                    await follower.follow(client, 12)
                    if cut % 2:
                        client.socket._stream.socket.close()  # gone without a word
                await until(lambda: service.statistics().connections == 0)
                seen = int(follower.fills[-1]["fill_id"])
                # Some more while nobody is there, and nobody looks.
                await until(lambda s=seen: sum(f["fill_id"] > s for f in fills_of(path)) > 5)
            async with trio_client(port, USER) as client:
                await follower.follow(client, 12)
    numbers = [int(fill["fill_id"]) for fill in follower.fills]
    expected = [f for f in fills_of(path) if numbers[0] <= f["fill_id"] <= numbers[-1]]
    assert numbers == [fill["fill_id"] for fill in expected]
    first, written = follower.fills[0], expected[0]
    assert list(first) == (
        ["fill_id", "order_id", "symbol", "side", "price", "quantity", "fee", "fee_asset", "at"]
    )
    assert first == {name: str(written[name]) for name in first} | {"at": written["at"]}


async def test_nobody_gets_the_fills_of_another(tmp_path: Path, fast: None) -> None:
    settings = Settings(jwt_secret=SECRET, database=Database(path=tmp_path / "paper.db"))
    async with (
        assembly.open_configured_service(settings) as service,
        hypercorn_serving(service) as port,
        trio_client(port, USER) as one,
        trio_client(port, "2") as two,
    ):
        first, second = Follower(), Follower()
        await first.follow(one, 10)
        await second.follow(two, 10)
    mine = {fill["fill_id"] for fill in first.fills}
    assert not mine & {fill["fill_id"] for fill in second.fills}
    assert mine <= {str(fill["fill_id"]) for fill in fills_of(tmp_path / "paper.db")}


async def test_fills_are_published_where_no_source_knows_them(autojump_clock: Any) -> None:
    async with serving(Table()) as (service, join):
        peer = await join("4", "fills")
        for number in range(3):
            await service.publish("fills", {"fill_id": str(number)}, user="4")
        status, *fills = await peer.next(4)
        assert (status["state"], status["reason"]) == ("live", "quiet")
        assert [fill["data"]["fill_id"] for fill in fills] == ["0", "1", "2"]
