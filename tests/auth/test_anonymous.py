"""Market channels without a token: what is served, within which limits, and what the log says."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from harness.endpoints import open_endpoint, status_of
from harness.handshakes import handshake
from harness.room import lines
from harness.support import token

from trading_push import ConfigurationError, Principal, load_settings, open_push_service
from trading_push.settings.schema import Auth, Limits, Settings
from trading_push.testing import peer

TICKER = {"symbol": "BTCUSDT", "last": "1"}


def opened(channels="ticker ticker.*", **limits):
    settings = Settings(auth=Auth(anonymous_channels=channels), limits=Limits(**limits))
    return open_push_service(settings=settings, authenticate=Principal)


async def code_of(client, channel):
    reply = await client.request("subscribe", args=[channel])
    return reply["results"][0].get("error", {}).get("code", "ok")


async def test_what_is_served_without_a_user(autojump_clock):
    async with opened() as service, peer(service) as stranger:
        await service.publish("ticker.BTCUSDT", TICKER)
        reply = await stranger.request("subscribe", args=["ticker.BTCUSDT", "ticker.*"])
        assert [each["max_hz"] for each in reply["results"]] == [2, 2]
        snapshots = {push["channel"]: push["data"] for push in await stranger.next(2)}
        assert snapshots == {"ticker.BTCUSDT": TICKER, "ticker.*": [TICKER]}
        assert (await stranger.request("list"))["channels"] == ["ticker.*", "ticker.BTCUSDT"]
        for channel in ("balance", "balance_4", "fills", "margin", "ticker_BTCUSDT_4", "", "_"):
            assert await code_of(stranger, channel) == "not_authenticated", channel
        for op in ("channels", "symbols"):
            assert (await stranger.request(op))["error"]["code"] == "not_authenticated"
        assert (await stranger.request("unsubscribe", args=["ticker.*", "balance"]))["ok"] is False
        assert (await stranger.request("list"))["channels"] == ["ticker.BTCUSDT"]
        # It may stay for as long as it likes.
        stranger.last_heard = None
        await trio.sleep(3600)
        assert stranger.closed_with is None


@pytest.mark.parametrize(
    ("channels", "served"),
    [("", set()), ("ticker", {"ticker.A"}), ("ticker.*", {"ticker.*"}), ("candles", {"candles.A"})],
)
async def test_each_is_named_by_itself(channels, served, autojump_clock):
    async with opened(channels) as service, peer(service) as stranger:
        for channel in ("ticker.A", "ticker.*", "candles.A"):
            reply = await stranger.request("subscribe", args=[channel])
            assert reply["ok"] is (channel in served), channel
        if not channels:
            await trio.sleep(11)
            assert stranger.closed_with == (4502, "not authenticated in time")


@pytest.mark.parametrize("wrong", ["balance", "ticker.BTCUSDT", "*", "ticker,candles"])
def test_only_market_channels_can_be_named(wrong):
    flags = {"auth.anonymous_channels": wrong, "jwt_secret": "x" * 32}
    with pytest.raises(ConfigurationError, match=r"give some of ticker, candles, ticker\.\*"):
        load_settings(config=None, flags=flags)


async def test_its_limits(autojump_clock):
    async with opened(anonymous_subscriptions=3) as service, peer(service) as stranger:
        for symbol in "ABC":
            assert await code_of(stranger, f"ticker.{symbol}") == "ok"
        assert await code_of(stranger, "ticker.D") == "too_many_subscriptions"
        for asked, told in ((1, 1), (2, 2), (50, 2), (0.5, 0.5)):
            item = {"channel": "ticker.A", "max_hz": asked}
            reply = await stranger.request("subscribe", args=[item])
            assert reply["results"][0]["max_hz"] == told
        await stranger.request("unsubscribe", args=["ticker.A"])
        since = {"epoch": "x", "seq": 1}
        item = {"channel": "ticker.A", "since": since}
        await service.publish("ticker.A", TICKER)
        reply = await stranger.request("subscribe", args=[item])
        assert reply["results"][0]["recovered"] is False


async def test_two_pushes_a_second(autojump_clock):
    async with opened() as service, peer(service) as stranger, peer(service, "4") as four:
        await service.publish("ticker.A", TICKER)
        for each in (stranger, four):
            await each.subscribe({"channel": "ticker.A", "max_hz": 20})
        for _ in range(100):
            await service.publish("ticker.A", TICKER)
            await trio.sleep(0.1)
        assert len(four.sent) > 90
        assert 18 <= len(stranger.sent) <= 22
        # With a user, it is as it was asked for.
        stranger.sent.clear()
        assert (await stranger.request("auth", token="5"))["ok"]
        for _ in range(100):
            await service.publish("ticker.A", TICKER)
            await trio.sleep(0.1)
        assert len(stranger.sent) > 90


async def test_a_later_auth_makes_it_an_ordinary_one(autojump_clock, caplog):
    caplog.set_level("INFO", "trading_push")
    async with opened(anonymous_subscriptions=1) as service, peer(service) as stranger:
        await stranger.subscribe("ticker.A")
        await stranger.request("auth", token="4")
        await stranger.subscribe("balance", "ticker.B")
        assert (await stranger.request("list"))["channels"] == ["balance", "ticker.A", "ticker.B"]
        assert service.statistics().subscribers_by_symbol == {"A": 1, "B": 1}
        assert not service.context.seats.unauthenticated
        stranger.leave(1001)
        await trio.testing.wait_all_tasks_blocked()
        said = lines(caplog)
        begin = said.index("✅ 用户4认证成功")
        assert said[begin : begin + 3] == [
            "✅ 用户4认证成功",
            "📊 用户4订阅A行情",
            "   当前订阅者: 1",
        ]
        assert "   🚪 退出行情房间: ticker_A_4" in said
        assert service.statistics().ledger.balanced
        assert service.statistics().subscribers_by_symbol == {}


async def test_strangers_are_not_counted_and_keep_a_symbol(autojump_clock, caplog):
    caplog.set_level("INFO", "trading_push")
    async with opened() as service, peer(service) as stranger:
        await stranger.subscribe("ticker.A", "ticker.B")
        async with peer(service, "4") as four:
            await four.subscribe("ticker.A")
            assert "   当前订阅者: 1" in lines(caplog)
            assert service.statistics().subscribers_by_symbol == {"A": 1}
            await four.request("unsubscribe", args=["ticker.A"])
        said = lines(caplog)
        assert "📊 用户4取消订阅A行情 - 剩余订阅者: 0" in said
        assert "   A无订阅者，移除" not in said  # the stranger has it
        await stranger.request("unsubscribe", args=["ticker.B"])
        assert "   B无订阅者，移除" in lines(caplog)
        caplog.clear()
        stranger.leave(1001)
        await trio.testing.wait_all_tasks_blocked()
        assert lines(caplog) == [
            "🔌 连接关闭: code=1001 reason='' (客户端离开页面)",
            "🔌 WebSocket客户端断开连接 - 来自: 10.0.0.1",
            "⚠️ 未认证用户断开连接",
            "   A无订阅者，移除",
            "🔌 当前连接数: 0",
            "👤 当前在线用户数: 0",
        ]
        assert service.statistics().ledger.balanced


@pytest.mark.parametrize("kind", ["linked", "native"])
async def test_together_they_have_half_of_the_seats(kind, certificates):
    limits = Limits(connections=6, unauthenticated_per_address=100)
    async with (
        open_endpoint(
            kind, certificates, auth=Auth(anonymous_channels="ticker"), limits=limits
        ) as endpoint,
        endpoint.connect() as one,
        endpoint.connect() as two,
        endpoint.connect() as three,
    ):
        assert await status_of(endpoint, handshake(), certificates) == 503
        for each in (one, two, three):
            assert (await each.request("subscribe", args=["ticker.A"]))["ok"]
        # Who has a user makes room.
        assert (await one.request("auth", token=token(4)))["ok"]
        assert await status_of(endpoint, handshake(), certificates) == 101


async def test_a_check_of_a_token_that_hangs_is_given_up(autojump_clock):
    async def authenticate(token: str) -> Principal:
        if token == "slow":
            await trio.sleep_forever()
        return Principal(token)

    settings = Settings(auth=Auth(anonymous_channels="ticker"))
    async with (
        open_push_service(settings=settings, authenticate=authenticate) as service,
        peer(service) as stranger,
    ):
        reply = await stranger.request("auth", token="slow")
        assert reply["error"]["code"] == "internal"
        assert (await stranger.request("auth", token="4"))["ok"]
