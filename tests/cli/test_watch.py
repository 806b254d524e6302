"""What `trading-push watch` shows on terminals of several sizes, and how it leaves them."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from harness.pseudo_terminal import PseudoTerminal, on_terminal

from trading_push import (
    Channel,
    FunctionSource,
    Principal,
    PushService,
    SourceError,
    open_push_service,
)
from trading_push.cli.keys import KeyReader
from trading_push.cli.numbers import Decimals, grouped
from trading_push.settings.schema import Intervals, Limits, Settings
from trading_push.topics import Topic

WATCH = [sys.executable, "-m", "trading_push", "watch"]
SYMBOLS = ("BTCUSDT", "ETHUSDT")
EVIL = "\x1b[2Jclear\x9b31m\u202e"
ACCOUNT: dict[str, Any] = {
    "balance": [
        {"asset": "USDT", "free": "1234567.5", "locked": "0", "total": "1234567.5"},
        {"asset": "BTC", "free": "0.00012345", "locked": "2", "total": "2.00012345"},
    ],
    "positions": [
        {"symbol": "币安人生USDT", "side": "long", "quantity": "1", "unrealized_pnl": "-1234.5"},
        {"symbol": EVIL, "side": "short", "quantity": "20000", "unrealized_pnl": "7.75"},
    ],
    "pnl": {
        "realized": "12.5",
        "unrealized": "-3",
        "fees": "0.1",
        "total": "-4321.25",
        "currency": "USDT",
        "by_symbol": [{"symbol": s, "realized": "1", "unrealized": "0"} for s in SYMBOLS],
    },
    "orders": [
        {
            "order_id": f"order-{number}",
            "symbol": "BTCUSDT",
            "side": "buy",
            "type": "limit",
            "price": f"{60000 + number}.5",
            "quantity": "0.25",
            "filled": "0",
            "status": "partially_filled",
        }
        for number in range(12)
    ],
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from outside, and a terminal's size that is the terminal's own."""
    for name in [*os.environ]:
        if name.startswith("TRADING_PUSH_") or name in ("COLUMNS", "LINES", "NO_COLOR"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent.parent))


@attrs.define
class Served:
    """A service with an account that does not change, and where it is."""

    service: PushService
    url: str
    fails: bool = False

    async def fill(self, number: int) -> None:
        fill = {"fill_id": f"f{number}", "symbol": "BTCUSDT", "side": "sell"}
        more = {"price": f"{number}", "quantity": "0.5", "at": 1763600000000}
        await self.service.publish("fills", {**fill, **more}, "4")


@asynccontextmanager
async def serving(heartbeat_s: float = 15, *channels: Channel) -> AsyncIterator[Served]:
    served: Served | None = None

    def fetch(user: str, data_type: str) -> Any:
        if served is not None and served.fails:
            raise SourceError("away")
        return ACCOUNT[data_type]

    async def tick(service: PushService) -> None:
        number = 0
        while True:
            for symbol in SYMBOLS:
                last = f"{60000 + number}.5"
                await service.publish(f"ticker.{symbol}", {"symbol": symbol, "last": last})
            number += 1
            await trio.sleep(0.2)

    async with (
        trio.open_nursery() as nursery,
        open_push_service(
            FunctionSource(fetch),
            settings=Settings(
                intervals=Intervals(0.2, 0.2, 0.2, 0.2), limits=Limits(heartbeat_s=heartbeat_s)
            ),
            authenticate=lambda token: Principal(token),
            channels=channels,
        ) as service,
    ):
        [listener] = await nursery.start(service.serve_native, "127.0.0.1", 0)
        port = listener.socket.getsockname()[1]
        served = Served(service, f"ws://127.0.0.1:{port}/ws")
        nursery.start_soon(tick, service)
        yield served
        nursery.cancel_scope.cancel()


def watching(served: Served, *args: str, **options: Any) -> Any:
    return on_terminal(*WATCH, served.url, "--token", "4", *args, **options)


def is_restored(terminal: PseudoTerminal) -> bool:
    return (
        not terminal.is_taken
        and terminal.has_cursor
        and terminal.modes == terminal.modes_before
        and terminal.raw.rindex(b"\x1b[?7h") > terminal.raw.rindex(b"\x1b[?7l")
    )


# --- what fits, and what does not -------------------------------------------------------------


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (40, 10), (200, 60)])
async def test_what_does_not_fit_is_told_and_can_be_reached(columns: int, lines: int) -> None:
    async with serving() as served:
        with watching(served, columns=columns, lines=lines) as terminal:
            await served.fill(1)
            left_out = f"↓ {34 - (lines - 2)} lines" if lines < 36 else "Fills"
            await terminal.until(lambda: left_out in terminal.text, "all tables")
            seen: dict[str, None] = {}
            for _ in range(40):
                shown = terminal.shown
                assert shown[0].startswith("ws://127.0.0.1")
                seen.update(dict.fromkeys(shown[1:-1]))
                below = re.search(r"↓ (\d+) lines?", shown[-1])
                if below is None:
                    break
                terminal.type(b"j")
                await terminal.until(
                    lambda was=below[0]: was not in terminal.shown[-1], "another line"
                )
            else:
                pytest.fail("there is no end")
            above = re.search(r"↑ (\d+) lines?", terminal.shown[-1])
            assert (above is None) == (lines == 60)
            text = "\n".join(seen)
            for name in ("Tickers", "Balance", "Positions", "PnL", "Open orders", "Fills"):
                assert name in text
            assert len({line for line in seen if line.startswith("all ")}) >= 1
            orders = {line.split()[3] for line in seen if "buy " in line and "limit" in line}
            assert {price.rstrip("…") for price in orders} == {
                f"60,{number:03}.50" for number in range(12)
            } or (columns == 40 and len(orders) == 12)
            # What is too wide is told, too, and can be reached.
            assert ("→" in terminal.shown[-1]) == (columns == 40)
            while "→" in terminal.shown[-1]:
                was = terminal.shown[-1]
                terminal.type(b"\x1b[C")
                await terminal.until(lambda was=was: terminal.shown[-1] != was, "more columns")
            terminal.type(b"G")
            await terminal.until(lambda: "order-11" in terminal.text, "the last column")
            terminal.type(b"q")
            assert await terminal.ended() == 0
            await terminal.until(lambda: is_restored(terminal), "what was before")
            # All of it stays on the terminal, and can be scrolled back to.
            left = terminal.raw[terminal.raw.rindex(b"\x1b[?1049l") :].decode()
            assert "-4,321.25" in left
            assert left.count("order-") == 12


async def test_columns_are_aligned_and_numbers_have_as_many_decimals() -> None:
    async with serving() as served:
        with watching(served, columns=200, lines=60) as terminal:
            await served.fill(1)
            await terminal.until(
                lambda: all(each in terminal.text for each in ("order-11", "-4,321.25", "clear")),
                "all of it",
            )
            text = terminal.text
            shown = terminal.shown
            raw = bytes(terminal.raw)
            terminal.type(b"q")
            assert await terminal.ended() == 0

    def cells(heading: str, count: int, after: str) -> list[str]:
        """The cells of a column of numbers, which end where its heading does."""
        start = next(i for i, line in enumerate(shown) if line.startswith(after))
        end = shown[start + 1].index(heading) + len(heading)
        rows = shown[start + 2 : start + 2 + count]
        assert all(row[end : end + 1] in ("", " ") and row[end - 1] != " " for row in rows)
        return [row[:end].split()[-1] for row in rows]

    assert cells("Free", 2, "Balance") == ["1,234,567.50000000", "0.00012345"]
    assert cells("Unrealized PnL", 2, "Positions") == ["-1,234.50", "7.75"]
    assert cells("Quantity", 2, "Positions") == ["1", "20,000"]
    assert cells("Total", 3, "PnL") == ["-", "-", "-4,321.25"]
    assert cells("Price", 12, "Open orders")[0] == "60,000.50"
    # A value steers no terminal.
    assert r"\u001b[2Jclear\u009b31m\u202e" in text
    assert b"\x1b[2Jclear" not in raw
    assert "\x9b" not in raw.decode()
    assert "\u202e" not in raw.decode()


async def test_fills_are_a_list() -> None:
    async with serving() as served:
        await served.fill(1)
        with watching(served, "--data", "fills", lines=12) as terminal:
            await terminal.until(lambda: "the last 1," in terminal.text, "the first")
            for number in range(2, 60):
                await served.fill(number)
            await terminal.until(lambda: "the last 50," in terminal.text, "the others")
            rows = [line for line in terminal.shown if "sell" in line]
            assert [row.split()[3] for row in rows[:3]] == ["59", "58", "57"]
            terminal.type(b"\x1b[F")
            await terminal.until(lambda: "↓" not in terminal.shown[-1], "the end")
            assert terminal.shown[-2].split()[3] == "10"
            terminal.type(b"\x1b[H")
            await terminal.until(lambda: "↑" not in terminal.shown[-1], "the beginning")


async def test_a_fill_that_comes_again_is_shown_once() -> None:
    async with serving() as served:
        await served.fill(1)
        await served.fill(2)
        with watching(served, "--data", "fills") as terminal:
            await terminal.until(lambda: "the last 1," in terminal.text, "the last one")
            # The server is another one, and begins with what it knows.
            context = served.service.context
            [connection] = context.connections
            context.broker.forget(Topic("fills", "4"))
            connection.abort()
            await served.fill(2)
            await terminal.until(
                lambda: (
                    served.service.statistics().subscribers_by_data_type.get("fills")
                    and connection not in [*context.connections]
                ),
                "the return",
            )
            await served.fill(3)
            await terminal.until(lambda: "the last 2," in terminal.text, "the next one")
            assert [line.split()[3] for line in terminal.shown if "sell" in line] == ["3", "2"]


async def test_events_of_an_application_are_a_list_and_all_tickers_a_table() -> None:
    async with serving(15, Channel("alerts", "events")) as served:
        with watching(served, "--ticker", "*", lines=60) as terminal:
            await terminal.until(lambda: "alerts" in terminal.text, "the channels")
            for number in range(3):
                await served.service.publish("alerts", {"number": number}, "4")
            await terminal.until(lambda: "the last 3," in terminal.text, "the alerts")
            at = next(i for i, line in enumerate(terminal.shown) if line.startswith("alerts"))
            assert terminal.shown[at + 2 : at + 5] == ["2", "1", "0"]
            await served.service.publish("ticker.BTCUSDT", {"symbol": "BTCUSDT", "last": "0.5"})
            await served.service.publish("ticker.NEWUSDT", {"symbol": "NEWUSDT", "last": "0.25"})
            await terminal.until(lambda: "NEWUSDT" in terminal.text, "another symbol")
            at = next(i for i, line in enumerate(terminal.shown) if line.startswith("ticker.*"))
            rows = {line.split()[0] for line in terminal.shown[at + 2 : at + 5]}
            assert rows == {*SYMBOLS, "NEWUSDT"}


async def test_the_age_is_that_of_the_last_confirmation() -> None:
    def age(terminal: PseudoTerminal) -> int:
        found = re.search(r"Balance  \w+(?: \(\w+\))? (\d+) s", terminal.text)
        return -1 if found is None else int(found[1])

    async with serving() as served:
        with watching(served, lines=60) as terminal:
            await terminal.until(lambda: age(terminal) >= 0, "the balance")
            await trio.sleep(2.5)
            assert age(terminal) <= 1  # it has not changed, and the source goes on to answer
            served.fails = True
            await terminal.until(lambda: "Balance  stale" in terminal.text, "the failure")
            await terminal.until(lambda: age(terminal) >= 3, "its age")
            served.fails = False
            await terminal.until(lambda: "Balance  live" in terminal.text, "the recovery")
            assert age(terminal) <= 1
            terminal.type(b"q")
            assert await terminal.ended() == 0


async def test_keys_and_another_size() -> None:
    async with serving() as served:
        with watching(served, lines=12) as terminal:
            await terminal.until(lambda: "below: " in terminal.text, "the tables")
            first = terminal.shown[1]

            async def after(keys: bytes, above: int | None) -> None:
                terminal.type(keys)
                expected = rf"↑ {above} lines?  ↓" if above else r"^↓"
                await terminal.until(
                    lambda: re.search(expected, terminal.shown[-1]), f"{above} after {keys!r}"
                )

            await after(b"jj", 2)
            await after(b"\x1b[B\x1bOB", 4)
            await after(b"k\x1b[A", 2)
            await after(b"\x1b[6~", 11)
            await after(b" ", 20)
            await after(b"\x1b[5~", 11)
            await after(b"bb", None)
            await after(b"\x1b", None)  # half of a key
            await after(b"[B", 1)
            await after(b"g", None)
            await after(b"x\x01\xff\xc3", None)
            assert terminal.shown[1] == first
            terminal.resize(100, 60)
            await terminal.until(
                lambda: "↓" not in terminal.text and "-4,321.25" in terminal.text, "all of it"
            )
            terminal.resize(30, 4)
            await terminal.until(lambda: terminal.shown[3].startswith("↓ "), "a small one")
            terminal.resize(5, 1)
            await terminal.until(lambda: len(terminal.shown) == 1, "a tiny one")
            terminal.resize(80, 24)
            await terminal.until(lambda: "quits" in terminal.shown[-1], "the first size")
            terminal.type(b"q")
            assert await terminal.ended() == 0


# --- how it ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end", ["q", "\x03", "\x1c", "SIGTERM", "SIGHUP", "SIGINT", "kicked", "count"]
)
async def test_the_terminal_is_given_back(end: str) -> None:
    args = ["--count", "30"] if end == "count" else []
    async with serving() as served:
        with watching(served, *args) as terminal:
            await terminal.until(lambda: "Tickers" in terminal.text, "the tables")
            assert end == "count" or terminal.is_taken
            assert end == "count" or terminal.modes != terminal.modes_before
            if end.startswith("SIG"):
                terminal.process.send_signal(getattr(signal, end))
            elif end == "kicked":
                served.service.kick(user="4")
            elif end != "count":
                terminal.type(end.encode())
            assert await terminal.ended() == (3 if end == "kicked" else 0)
            await terminal.until(lambda: is_restored(terminal), "what was before")
            assert terminal.process.stderr is not None
            assert (b"kicked" in terminal.process.stderr.read()) == (end == "kicked")


async def test_a_bug_gives_the_terminal_back_before_its_trace() -> None:
    code = (
        "from trading_push.cli import tables\n"
        "original = tables.Tables.sections\n"
        "calls = iter(range(4))\n"
        "def sections(self):\n"
        "    if next(calls, None) is None and next(once, 0): raise RuntimeError('a bug')\n"
        "    return original(self)\n"
        "once = iter([1])\n"
        "tables.Tables.sections = sections\n"
        "from trading_push.cli.commands import main\n"
        "main()"
    )
    async with serving() as served:
        args = [sys.executable, "-c", code, "watch", served.url, "--token", "4"]
        with on_terminal(*args) as terminal:
            assert await terminal.ended() == 1
            await terminal.until(lambda: is_restored(terminal), "what was before")
            assert terminal.process.stderr is not None
            assert b"RuntimeError: a bug" in terminal.process.stderr.read()


async def test_suspended_it_gives_the_terminal_back_and_takes_it_again() -> None:
    async with serving() as served:
        with watching(served) as terminal:
            process = psutil.Process(terminal.process.pid)
            await terminal.until(lambda: "Tickers" in terminal.text, "the tables")
            for _ in range(2):
                terminal.type(b"\x1a")
                await terminal.until(lambda: process.status() == psutil.STATUS_STOPPED, "the stop")
                await terminal.until(lambda: is_restored(terminal), "what was before")
                process.send_signal(signal.SIGCONT)
                await terminal.until(lambda: terminal.is_taken, "the screen")
                await terminal.until(lambda: "quits" in terminal.text, "the tables")
                assert terminal.modes != terminal.modes_before
            # Stopped without a word, and the terminal was used meanwhile.
            process.send_signal(signal.SIGSTOP)
            await terminal.until(lambda: process.status() == psutil.STATUS_STOPPED, "the stop")
            terminal.feed(b"\x1b[?1049l\x1b[2Jsomething else")
            process.send_signal(signal.SIGCONT)
            await terminal.until(lambda: terminal.is_taken, "the screen")
            await terminal.until(lambda: "quits" in terminal.text, "the tables")
            assert "something else" not in terminal.text
            terminal.type(b"q")
            assert await terminal.ended() == 0
            await terminal.until(lambda: is_restored(terminal), "what was before")


async def test_a_terminal_that_takes_no_output_holds_up_no_answer() -> None:
    async with serving(heartbeat_s=0.5) as served:
        with watching(served, "--ticker", "", "--data", "balance,fills") as terminal:
            await terminal.until(lambda: "Balance" in terminal.text, "the tables")
            [connection] = served.service.context.connections
            terminal.type(b"\x13")  # Ctrl-S
            for number in range(8):
                await served.fill(number)
                await trio.sleep(0.5)
            assert [*served.service.context.connections] == [connection]
            terminal.process.terminate()
            assert await terminal.ended() == 0
            assert terminal.modes == terminal.modes_before


async def test_a_terminal_that_can_do_nothing_gets_lines() -> None:
    async with serving() as served:
        with watching(served, "--count", "2", env={"TERM": "dumb"}, columns=500) as terminal:
            assert await terminal.ended() == 0
            lines = terminal.raw.decode().splitlines()
            assert len([json.loads(line)["channel"] for line in lines]) == 2


async def test_a_terminal_without_unicode_is_told_what_it_can_show() -> None:
    async with serving() as served:
        env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        with watching(served, env=env) as terminal:
            await terminal.until(lambda: re.search(r"^v \d+ lines", terminal.shown[-1]), "the foot")
            await terminal.until(lambda: "????USDT" in terminal.text, "the symbol")
            terminal.feed(b"\x1b[1;1Ha message to all")
            terminal.type(b"\x0c")
            await terminal.until(lambda: "ws://" in terminal.shown[0], "the head again")
            terminal.type(b"q")
            assert await terminal.ended() == 0
            assert terminal.raw.isascii()


# --- numbers and keys -------------------------------------------------------------------------


def test_numbers_as_a_person_reads_them() -> None:
    for text, decimals, shown in (
        ("1234567.891", 2, "1,234,567.89"),
        ("-1234.5", 2, "-1,234.50"),
        ("0.125", 2, "0.12"),
        ("0.135", 2, "0.14"),
        ("0.995", 2, "1.00"),
        ("-0", 2, "0.00"),
        ("0.00000000012", 8, "0.00000000012"),
        ("007", 0, "7"),
        ("1e5", 2, "1e5"),
        ("NaN", 2, "NaN"),
        ("٣", 2, "٣"),
        ("", 2, ""),
        ("1.", 2, "1."),
        ("9" * 5000, 2, "9" * 5000),
    ):
        assert grouped(text, decimals) == shown
    decimals = Decimals()
    for text in ("1", "2.5", "3"):
        decimals.note("price", text)
    assert decimals.show("price", "4") == "4.00"
    assert decimals.show("other", "4") == "4"
    decimals.note("price", "0.1234567891")
    assert decimals.show("price", "0.1234567891") == "0.12345679"


@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=6, min_value=-(10**20), max_value=10**20
    )
)
def test_no_number_is_shown_as_another(number: Any) -> None:
    shown = grouped(f"{number:f}", 8)
    assert type(number)(shown.replace(",", "")) == number
    assert re.fullmatch(r"-?\d{1,3}(,\d{3})*\.\d{8}", shown)


@given(st.lists(st.integers(1, 5)))
def test_a_key_may_come_in_pieces(sizes: list[int]) -> None:
    data, keys = b"j\x1b[6~\x1bOAx\x1b[1;5Cq\x1b\x1b[H", []
    reader = KeyReader()
    for size in [*sizes, len(data)]:
        keys += reader.feed(data[:size])
        data = data[size:]
    assert keys == ["down", "page down", "up", "quit", "home"]
