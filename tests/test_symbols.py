"""The one rule for symbols: clients, publishers, tapes and feeds spell and refuse them alike."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from harness.room import lines, room, unit

from trading_push import Ticker
from trading_push.sources.base import MarketSink
from trading_push.sources.exchanges.tape import Tape
from trading_push.topics import BUILTIN_CHANNELS, Channel, Channels, canonical_symbol, symbol_of

NAMES = ["币安人生USDT", "M&M", "NIFTY 50", "^GSPC", "EURUSD=X", "BTC/USDT:USDT", "$TSLA", ".DJI"]
GOOD = [
    *((name, name) for name in NAMES),
    ("btcusdt", "BTCUSDT"),
    ("straße", "STRAßE"),  # only ASCII letters are turned
    ("٣٤", "٣٤"),
    ("A\u030a", "Å"),  # NFC
    ("\u212a", "K"),  # the sign for Kelvin is K there
    ("A" * 64, "A" * 64),
]
BAD = [
    *("", " ", " A", "A ", "A\tB", "A\n", "A*B", "*", "A,B", "A'B", 'A"B', "A\\B", "A?B", "A#B"),
    *(
        "A%B",
        "A<B",
        "A;B",
        "A(B)",
        "..",
        "-",
        "A" * 65,
        "A\u0000",
        "A\u202eB",
        "A\u00a0B",
        "A\u2028",
    ),
    *("A\u2028", "A\u200bB", "\u3164", "A\ud800", "½", "²", "😀", "A" * 100_000),
]


@pytest.mark.parametrize(("given_", "symbol"), GOOD)
def test_a_symbol_is_spelled_one_way(given_: str, symbol: str) -> None:
    assert canonical_symbol(given_) == symbol
    assert canonical_symbol(symbol) == symbol


@pytest.mark.parametrize("text", BAD, ids=lambda text: ascii(text[:8]))
def test_what_cannot_be_a_symbol(text: str) -> None:
    assert canonical_symbol(text) is None


@given(st.text(max_size=70))
def test_a_symbol_is_safe_in_a_line_and_stays_as_it_is(text: str) -> None:
    symbol = canonical_symbol(text)
    if symbol is not None:
        assert symbol.isprintable()
        assert 0 < len(symbol) <= 64
        assert unicodedata.is_normalized("NFC", symbol)
        assert not set(symbol) & set("'\"\\<>*?#%,;|`")
        assert canonical_symbol(symbol) == symbol
        channels = Channels([Channel(name) for name in BUILTIN_CHANNELS])
        for name in (f"ticker.{symbol}", f"ticker_{symbol}_4"):
            assert symbol_of(channels.resolve(name, "4").channel) == symbol


@pytest.mark.parametrize("name", NAMES)
async def test_a_name_goes_all_the_way(
    name: str, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "trading_push")
    async with room() as here:
        peer, _ = await here.subscribed(f"ticker_{name}_4")
        await here.service.publish(f"ticker.{name.lower()}", Ticker(name, last=Decimal(1)))
        # Its status is live first.
        _, push = await peer.next(2)
        assert (push["channel"], push["data"]["symbol"]) == (f"ticker.{name}", name)
        peer.leave()
        await trio.testing.wait_all_tasks_blocked()
    assert any(f"ticker_{name}_4" in line for line in unit(caplog))


async def test_the_error_says_what_a_symbol_may_be(autojump_clock: trio.testing.MockClock) -> None:
    async with room() as here:
        peer, _ = here.join()
        peer.say("auth", token="4")
        peer.say("subscribe", args=["ticker.A*B"])
        _, reply = await peer.next(2)
        [result] = reply["results"]
        assert result["error"]["code"] == "unknown_channel"
        assert "1 to 64 characters" in result["error"]["message"]
        with pytest.raises(ValueError, match="1 to 64 characters"):
            await here.service.publish("ticker.A*B", 1)


class Feed:
    """Gives some tickers once; it knows one symbol."""

    def __init__(self, *symbols: str) -> None:
        self._tickers: Sequence[Ticker] = [Ticker(each, last=Decimal(7)) for each in symbols]

    def knows(self, symbol: str) -> bool:
        return symbol == "BTCUSDT"

    async def run(self, sink: MarketSink) -> None:
        sink.update(self._tickers)
        await trio.sleep_forever()


async def test_a_ticker_that_nobody_can_subscribe_to_is_an_error_to_its_publisher(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with room(feed=Feed("a*b", "btcusdt", "a*b")) as here:
        with pytest.raises(ValueError, match="the market feed has no such symbol"):
            await here.service.publish_many([("ticker.BTCUSDT", 1, None), ("ticker.NOPE", 1, None)])
        await trio.sleep(1)
        # The feed spells as it likes, and one bad ticker takes no other's place.
        latest = here.service.latest("ticker.BTCUSDT")
        assert latest is not None
        assert msgspec.json.decode(latest.data)["symbol"] == "BTCUSDT"
        assert msgspec.json.decode(latest.data)["last"] == "7"
    [told] = [line for line in lines(caplog) if "行情无法编码" in line]
    assert "a*b" in told
    assert "1 to 64 characters" in told


async def test_a_tape_has_the_same_rule(tmp_path: Path) -> None:
    frame = {"e": "trade", "E": 1_723_000_000_000, "p": "1", "q": "1", "t": 1}
    some = [*NAMES, "a*b", "eurusd=x"]
    text = "\n".join(json.dumps(frame | {"s": name}) for name in some)
    (tmp_path / "tape.jsonl").write_text(text, encoding="utf-8")
    tape = Tape(tmp_path / "tape.jsonl")
    await tape.open()
    assert all(map(tape.knows, NAMES))
    assert tape.bad_lines == 1
    assert "1 to 64 characters" in tape.bad_examples[0].error
