"""What clients ask of an exchange: its list of symbols, the bounds, and who goes first."""

from __future__ import annotations

import logging
from functools import partial

import attrs
import pytest
import trio
import trio.testing

from harness.exchange_server import Dialect, exchange
from harness.feeds import KINDS, QUICK, feed_of, news, running, shown
from harness.room import Room, lines, room
from harness.support import until

from trading_push import BinanceFeed, BybitFeed, ConfigurationError
from trading_push.broker.base import Status
from trading_push.settings.schema import Limits, Market, Polling, Settings
from trading_push.sources.exchanges import binance, okx, symbol_list
from trading_push.sources.exchanges.okx import OkxFeed
from trading_push.sources.exchanges.pacing import RequestBudget
from trading_push.sources.exchanges.stream import ExchangeFeed
from trading_push.testing import MemoryTransport

ALL: list[Dialect] = [*KINDS, "spot"]
every = pytest.mark.parametrize("dialect", ALL)
REAL = [f"R{number}USDT" for number in range(200)]
MADE_UP = [f"X{number}USDT" for number in range(200)]


# --- the list ------------------------------------------------------------------------------------


@every
async def test_what_the_list_lacks_is_unknown_and_never_asked_for(
    dialect: Dialect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    async with exchange(dialect) as there:
        there.listed = [*REAL, "BTCUSDT", "币安人生USDT", "a bad name*"]
        there.unknown = set(MADE_UP)
        feed = feed_of(there, listed=True)
        assert feed.knows("NOPE")  # nothing is known yet
        assert feed.symbols() is None
        async with shown(feed, "NOPE", "BTCUSDT") as here:
            await until(feed.symbols)
            await until(lambda: here.status("NOPE") == Status("down", "refused"))
            assert not feed.knows("NOPE")
            assert feed.knows("BTCUSDT")
            assert sorted(feed.symbols() or ()) == sorted(there.listed[:-1])
            await until(lambda: there.has("BTCUSDT"))
            here.market.watch("NADA")  # which was subscribed a moment before the list came
            assert here.status("NADA") == Status("down", "refused")
        assert [line for line in lines(caplog) if "NOPE" in line] == [
            f"⚠️ {feed.name}没有已订阅的1个交易对: NOPE"
        ]
        pages = {"binance": 1, "okx": 3}.get(dialect, 3)  # 203 symbols in pages of 100
        assert len(there.rest_calls) == pages


async def test_a_list_that_cannot_be_read_is_survived_and_asked_for_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    for name, value in (("FIRST_PAUSE_S", 0.02), ("EVERY_S", 0.05), ("JITTER_S", 0.0)):
        monkeypatch.setattr(symbol_list, name, value)
    async with exchange("binance") as there:
        there.rest_status = 418
        feed = feed_of(there, listed=True)
        async with running(feed, "BTCUSDT") as sink:
            await until(lambda: len(there.rest_calls) >= 3)
            assert feed.knows("NOPE")
            await until(lambda: there.has("BTCUSDT"))
            assert "127.0.0.1 answered 418" in lines(caplog)[0]
            there.rest_status = 200  # with an empty list
            await until(lambda: any("the list is empty" in line for line in lines(caplog)))
            there.listed = ["BTCUSDT", "ETHUSDT"]
            await until(feed.symbols)
            # It is read again and again; what is taken from the market is told.
            there.listed = ["ETHUSDT"]
            await until(lambda: sink.stale_calls)
            assert sink.stale_calls == [("refused", ["BTCUSDT"])]
            await until(lambda: not there.has("BTCUSDT"))
            there.rest_status = 503
            seen = len(there.rest_calls)
            await until(lambda: len(there.rest_calls) >= seen + 2)
            assert feed.symbols() == ("ETHUSDT",)


@every
async def test_a_symbol_that_a_list_lacked_and_the_next_one_has_comes_back(
    dialect: Dialect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symbol_list, "EVERY_S", 0.05)
    async with exchange(dialect) as there:
        there.listed = ["BTCUSDT", "ETHUSDT", "币安人生USDT"]
        feed = feed_of(there, listed=True)
        async with shown(feed, "BTCUSDT", "币安人生USDT", "NEWUSDT", "GONEUSDT") as here:
            # Whatever its characters are, a symbol of the list can be watched.
            await until(lambda: there.has("BTCUSDT", "币安人生USDT"))
            await until(lambda: here.status("NEWUSDT") == Status("down", "refused"))
            there.listed = ["ETHUSDT"]
            await until(lambda: not there.sessions)
            here.market.unwatch("GONEUSDT")
            here.market.unwatch("币安人生USDT")
            there.listed = ["BTCUSDT", "ETHUSDT", "币安人生USDT", "NEWUSDT", "GONEUSDT"]
            await until(lambda: there.has("BTCUSDT", "NEWUSDT"))
            assert not there.has("币安人生USDT")
            assert not there.has("GONEUSDT")
            await there.say(news(dialect, "100"))
            await until(lambda: here.is_live("BTCUSDT"))


BODIES = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",  # and no more
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b",
    b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n",
    b"rubbish\r\n\r\n",
    b"",
]


async def test_a_service_that_answers_nonsense_is_asked_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "trading_push")
    monkeypatch.setattr(symbol_list, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(symbol_list, "EVERY_S", 0.001)
    monkeypatch.setattr(symbol_list, "JITTER_S", 0.0)
    answers = iter(BODIES)

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(next(answers, b"HTTP/1.1 500 X\r\n\r\n"))

    def told() -> list[str]:
        return [line for line in lines(caplog) if "交易对列表" in line]

    async with exchange("binance") as there, trio.open_nursery() as nursery:
        listen = partial(trio.serve_tcp, handle, 0, host="127.0.0.1")
        [listener] = await nursery.start(listen)
        port = listener.socket.getsockname()[1]
        limits = attrs.evolve(binance.LIMITS, **QUICK)
        feed = BinanceFeed(there.url, limits=limits, rest_url=f"http://127.0.0.1:{port}")
        async with running(feed, "BTCUSDT"):
            await until(lambda: len(told()) > len(BODIES))
            await until(lambda: there.has("BTCUSDT"))
            assert feed.symbols() is None
        nursery.cancel_scope.cancel()


def test_whose_list_is_read() -> None:
    assert BinanceFeed()._list is not None
    assert BybitFeed()._list is not None
    assert OkxFeed()._list is not None
    for url in ("wss://stream.bybit.com/v5/public/linear", "ws://127.0.0.1:1/v5/public/spot"):
        assert BybitFeed(url)._list is None
        assert BybitFeed(url, rest_url="https://api.bybit.com")._list is not None
    for url in ("wss://x", "https://", "https://x/?a=b", "https://x y", "x", "https://h:port"):
        with pytest.raises(ConfigurationError, match="rest_url"):
            BinanceFeed(rest_url=url)


# --- through the service -------------------------------------------------------------------------


def settings(symbols: int = 1000) -> Settings:
    limits = Limits(messages_burst=10_000, messages_per_s=10_000)
    return Settings(
        limits=limits, market=Market(symbols=symbols), polling=Polling(watch_linger_s=0.2)
    )


async def joined(here: Room, user: str) -> MemoryTransport:
    peer, _ = here.join()
    await peer.request("auth", token=user)
    return peer


async def results(peer: MemoryTransport, *symbols: str) -> list[tuple[str, bool | None]]:
    reply = await peer.request("subscribe", args=[f"ticker.{symbol}" for symbol in symbols])
    return [
        ("ok", None) if each["ok"] else (each["error"]["code"], each["error"]["retryable"])
        for each in reply["results"]
    ]


async def test_symbols_are_found_by_a_part_of_their_names() -> None:
    async with exchange("binance") as there:
        there.listed = ["ETHBTC", "BTCUSDT", "BTCEUR", "币安人生USDT", "ADAUSDT"]
        feed = feed_of(there, listed=True)
        async with room(feed=feed, settings=settings()) as here:
            await until(feed.symbols)
            peer = await joined(here, "4")
            reply = await peer.request("symbols", id=7, like="btc", limit=2)
            assert reply == {
                **{"op": "symbols", "id": 7, "ok": True},
                **{"symbols": ["BTCEUR", "BTCUSDT"], "more": True},
            }
            reply = await peer.request("symbols", like="btc")
            assert (reply["symbols"], reply["more"]) == (["BTCEUR", "BTCUSDT", "ETHBTC"], False)
            assert (await peer.request("symbols", like="人生"))["symbols"] == ["币安人生USDT"]
            assert len((await peer.request("symbols", like=None, limit=None))["symbols"]) == 5
            for bad in ({"limit": 0}, {"limit": 1001}, {"like": 5}, {"like": "A" * 65}, {"x": 1}):
                reply = await peer.request("symbols", **bad)
                assert reply["error"]["code"] == "bad_request"
            assert await results(peer, "BTCEUR", "NOPE") == [
                ("ok", None),
                ("unknown_channel", False),
            ]


async def test_without_a_list_the_symbols_that_were_seen_are_found() -> None:
    async with exchange("binance") as there, room(feed=feed_of(there)) as here:
        peer = await joined(here, "4")
        reply = await peer.request("symbols")
        assert (reply["symbols"], reply["more"]) == ([], True)
        await results(peer, "BTCUSDT")
        await until(lambda: there.has("BTCUSDT"))
        await there.say(news("binance", "100"))
        await until(lambda: here.service.latest("ticker.BTCUSDT"))
        assert (await peer.request("symbols"))["symbols"] == ["BTCUSDT"]
    async with room() as here:
        await here.service.publish("ticker.X", 1)
        peer = await joined(here, "4")
        assert (await peer.request("symbols", like="x"))["symbols"] == ["X"]


def patient(dialect: Dialect, url: str, rest_url: str | None) -> ExchangeFeed:
    """A feed with the limits of the exchange itself."""
    if dialect == "binance":
        return BinanceFeed(url, rest_url=rest_url)
    return (OkxFeed if dialect == "okx" else BybitFeed)(url, rest_url=rest_url)


@every
@pytest.mark.parametrize("listed", [True, False])
async def test_what_others_ask_does_not_delay_a_first_tick(dialect: Dialect, listed: bool) -> None:
    """One client asks for what does not exist, ten for 200 symbols; another's tick comes soon."""
    async with exchange(dialect, messages_per_s=5) as there:
        there.listed = [*REAL, "BTCUSDT"]
        there.unknown = set() if dialect == "binance" else set(MADE_UP)
        feed = patient(dialect, there.url, there.rest_url if listed else None)
        async with room(feed=feed, settings=settings()) as here:
            if listed:
                await until(feed.symbols)
            bad = await joined(here, "mischief")
            expected = ("unknown_channel", False) if listed else ("ok", None)
            assert set(await results(bad, *MADE_UP)) == {expected}
            for number in range(10):
                peer = await joined(here, f"good{number}")
                assert set(await results(peer, *REAL)) == {("ok", None)}
            other = await joined(here, "other")
            began = trio.current_time()
            assert await results(other, "BTCUSDT") == [("ok", None)]
            await until(lambda: there.has("BTCUSDT"))
            await there.say(news(dialect, "100"))
            while "last" not in str((await other.push()).get("data")):
                pass
            assert trio.current_time() - began < 2
            if listed:
                await until(lambda: there.has(*REAL[:20]))
            # One carries the symbols that there are; without a list, one more those that are not.
            assert there.opened <= (1 if listed else 3)


async def test_the_symbols_of_all_and_of_one_user_are_bounded() -> None:
    async with exchange("binance") as there:
        feed = feed_of(there)
        async with room(feed=feed, settings=settings(symbols=8)) as here:
            greedy = await joined(here, "greedy")
            full = ("too_many_subscriptions", True)
            assert await results(greedy, "A", "B", "C") == [("ok", None), ("ok", None), full]
            again = await joined(here, "greedy")
            assert await results(again, "A", "D") == [("ok", None), full]
            others = [await joined(here, f"user{number}") for number in range(4)]
            for number, peer in enumerate(others[:3]):
                # What is watched anyway costs nothing.
                taken = await results(peer, "A", "B", f"E{number}", f"F{number}")
                assert taken == [("ok", None)] * 4
            assert await results(others[3], "A", "G") == [("ok", None), full]
            # What nobody watches is free again after a moment.
            await others[0].request("unsubscribe", args=["ticker.E0"])
            await until(lambda: not there.has("E0") and there.has("F0"))
            assert await results(others[3], "G") == [("ok", None)]


async def test_a_symbol_is_on_the_account_of_who_watches_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Feed:
        def knows(self, symbol: str) -> bool:
            return True

        def watch(self, symbol: str) -> None: ...

        def unwatch(self, symbol: str) -> None: ...

        async def run(self, sink: object) -> None:
            await trio.sleep_forever()

    async with room(feed=Feed(), settings=settings(symbols=8)) as here:
        first, second = await joined(here, "first"), await joined(here, "second")
        full = ("too_many_subscriptions", True)
        assert await results(first, "A", "B", "C") == [("ok", None), ("ok", None), full]
        assert await results(second, "A", "B") == [("ok", None)] * 2
        await first.request("unsubscribe", args=["ticker.A", "ticker.B"])
        await trio.sleep(2)
        assert await results(first, "C", "D") == [("ok", None)] * 2
        assert await results(second, "E") == [full]


async def test_who_was_told_that_there_is_no_value_is_told_that_none_will_come(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Feed:
        def knows(self, symbol: str) -> bool:
            return True

        def watch(self, symbol: str) -> None: ...

        def unwatch(self, symbol: str) -> None: ...

        async def run(self, sink: object) -> None:
            await trio.sleep(1)
            sink.stale("refused", ["A"])  # type: ignore[attr-defined]
            await trio.sleep_forever()

    async with room(feed=Feed()) as here:
        peer = await joined(here, "4")
        assert await results(peer, "A") == [("ok", None)]
        told = [await peer.push() for _ in range(2)]
        assert [(each["state"], each["reason"]) for each in told] == [
            ("down", "no_data"),
            ("down", "refused"),
        ]


def test_the_limits_of_an_hour_are_kept() -> None:
    """Whatever is asked, no sixty minutes hold more than 480 requests of OKX."""
    clock = trio.testing.MockClock()
    sent: list[float] = []

    async def main() -> None:
        async with trio.open_nursery():
            budget = RequestBudget(okx.LIMITS.requests_per_hour)
            while trio.current_time() < 3 * 3600:
                if budget.ready_at() <= trio.current_time():
                    budget.spend()
                    sent.append(trio.current_time())
                clock.jump(1 / 3)
                await trio.lowlevel.checkpoint()

    trio.run(main, clock=clock)
    assert len(sent) > 2.5 * 420
    assert sent[59] - sent[0] < 30  # the first ones go at once
    most = max(sum(at <= other < at + 3600 for other in sent) for at in sent)
    assert most <= 480
