"""How the JavaScript client passes pushes on: gaps, consumers that are slow, tables, names."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from harness.scripted_server import Peer, server

pytestmark = pytest.mark.browser

OPEN = 'const client = connect({ url, token: "t", WebSocket });\n'


def refusal(code: str, *, retryable: bool = False) -> dict[str, Any]:
    return {"code": code, "message": "there is none", "retryable": retryable}


async def test_a_push_is_what_stood_on_the_wire(js):
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(7)
        raw = (
            b'{"channel":"balance","type":"update","epoch":"e","prev":7,"seq":9,"merged":2,"ts":5,'
            b'"data":{"price":"0.10","id":9007199254740993,"least":-12345678901234567890,'
            b'"small":9007199254740991,"float":0.12345678901234567,'
            b'"text":"\\"9007199254740993, 1","list":[9007199254740993]}}'
        )
        await peer.send_bytes(bytes([0x81, 126]) + len(raw).to_bytes(2, "big") + raw)
        await peer.send(channel="balance", type="status", state="stale", reason="why", ts=6)
        await peer.send(channel="balance", type="later", ts=6)
        await peer.send(op="later", channel="balance")
        await peer.send(channel="elsewhere", type="snapshot", epoch="e", seq=1, ts=6, data=1)
        await peer.push(10, 9)
        await peer.until_closed()

    code = f"""{OPEN}
    client.subscribe("balance", say);
    await until(() => client.latest("balance")?.seq === 10);
    say(client.user, client.latest("nope") ?? null);
    """
    async with server(script) as url, js.run(code, url=url) as program:
        said = await program.says(5)
    assert [each.get("type") for each in said[:4]] == ["snapshot", "update", "status", "update"]
    assert said[1] == {
        **{"channel": "balance", "type": "update", "epoch": "e", "prev": 7, "seq": 9},
        **{"merged": 2, "ts": 5},
        "data": {
            **{"price": "0.10", "id": "9007199254740993", "least": "-12345678901234567890"},
            **{"small": 9007199254740991, "float": 0.12345678901234567},
            **{"text": '"9007199254740993, 1', "list": ["9007199254740993"]},
        },
    }
    assert (said[2]["state"], said[2]["reason"]) == ("stale", "why")
    assert said[4] == ["4", None]


async def test_after_a_cut_it_resubscribes_where_it_left_off(js):
    items: list[Any] = []

    async def script(peer: Peer, number: int) -> None:
        items.append(await peer.open())
        if number == 0:
            await peer.push(3, epoch="e1")
            await peer.push(4, 3, epoch="e1")
            await trio.aclose_forcefully(peer.websocket._stream)
        else:
            await peer.push(6, 4, epoch="e2")  # what `prev` tells of is no gap in any epoch
            await peer.until_closed()

    code = f"""{OPEN}
    client.subscribe("balance", ({{ seq }}) => say(seq));
    client.subscribe("pnl", () => {{}}, {{ maxHz: 2, since: {{ epoch: "x", seq: 9 }} }});
    """
    async with server(script) as url, js.run(code, url=url) as program:
        assert await program.says(3) == [3, 4, 6]
    pnl = {"channel": "pnl", "max_hz": 2, "since": {"epoch": "x", "seq": 9}}
    assert items[0] == ["balance", pnl]
    assert items[1] == [{"channel": "balance", "since": {"epoch": "e1", "seq": 4}}, pnl]


async def test_a_gap_is_told_and_resubscribed(js):
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        await peer.push(5, 4)  # 2 to 4 are lost
        await peer.push(6, 5)  # and this one belongs to the stream that is given up
        assert (await peer.receive("unsubscribe"))["args"] == ["balance"]
        since = {"channel": "balance", "since": {"epoch": "e", "seq": 1}}
        assert await peer.subscribe() == [since]
        await peer.push(2, 1)
        await peer.push(2, 1)  # twice
        await peer.push(6, 2)
        # And again, twice in a row: the second time only a snapshot helps.
        await peer.push(9, 8)
        await peer.receive("unsubscribe")
        assert await peer.subscribe() == [{"channel": "balance", "since": {"epoch": "e", "seq": 6}}]
        await peer.push(9, 8)
        await peer.receive("unsubscribe")
        assert await peer.subscribe() == ["balance"]
        await peer.push(9)
        # So does another epoch.
        await peer.push(3, 2, epoch="other")
        await peer.receive("unsubscribe")
        assert await peer.subscribe() == ["balance"]
        await peer.push(4, epoch="other")
        await peer.until_closed()

    code = f"""{OPEN}
    tell(client, ["gap"]).subscribe("balance", ({{ type, seq }}) => say(type, seq));
    """
    async with server(script) as url, js.run(code, url=url) as program:
        said = await program.says(9)

    def gap(expected: int, prev: int) -> list[Any]:
        return ["gap", {"channel": "balance", "reason": "lost", "expected": expected, "prev": prev}]

    assert said == [
        *(["snapshot", 1], gap(1, 4), ["update", 2], ["update", 6], gap(6, 8), gap(6, 8)),
        *(["snapshot", 9], gap(9, 2), ["snapshot", 4]),
    ]


# --- consumers that are slow --------------------------------------------------------------------


async def send_states(peer: Peer) -> None:
    await peer.open()
    for seq in range(1, 7):
        await peer.push(seq, seq - 1 if seq > 1 else None)
    await peer.send(channel="balance", type="status", state="stale", reason="a", ts=1)
    await peer.send(channel="balance", type="status", state="live", ts=2)
    await peer.send(op="notice", code="done")
    await peer.until_closed()


async def test_a_slow_consumer_of_a_state_gets_the_latest_value(js):
    async def script(peer: Peer, number: int) -> None:
        await send_states(peer)

    code = f"""{OPEN}
    let isDone = false;
    client.addEventListener("notice", () => (isDone = true));
    const show = (who, {{ type, seq, prev, merged, state }}) =>
      say([who, type, seq ?? state, prev, merged]);
    client.subscribe("balance", async (push) => {{
      show("fn", push);
      await until(() => isDone);
    }});
    for await (const push of client.pushes("balance")) {{
      show("loop", push);
      await until(() => isDone);
    }}
    """
    async with server(script) as url, js.run(code, url=url) as program:
        said = await program.says(6)
    for who in ("fn", "loop"):
        assert [each[1:] for each in said if each[0] == who] == [
            ["snapshot", 1, None, None],
            ["update", 6, 1, 5],
            ["status", "live", None, None],
        ]


async def test_a_slow_consumer_of_events_keeps_the_order_and_then_sees_the_gap(js):
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        for seq in range(1, 1005):
            prev = seq - 1 if seq > 1 else None
            await peer.push(seq, prev, channel="fills")
        await peer.send(op="notice", code="done")
        await peer.until_closed()

    # `first` takes a thousand more than it has seen; for `all` there is one more than is kept.
    code = f"""
    {OPEN}
    tell(client, ["gap"]);
    let isDone = false;
    client.addEventListener("notice", () => (isDone = true));
    const seen = [];
    client.subscribe("fills", async ({{ type, seq, dropped }}) => {{
      seen.push(type === "gap" ? `gap ${{dropped}}` : seq);
      await until(() => isDone);
    }});
    const quick = [];
    client.subscribe("fills", ({{ seq }}) => void quick.push(seq));
    await until(() => seen.at(-1) === 1004);
    say(seen);
    say(quick.length, quick.every((seq, i) => seq === i + 1));
    """
    async with server(script) as url, js.run(code, url=url) as program:
        said = await program.says(3)
    assert said == [
        ["gap", {"channel": "fills", "reason": "slow", "dropped": 1000}],
        [1, "gap 1000", 1002, 1003, 1004],
        [1004, True],
    ]


async def test_who_has_left_gets_nothing_of_what_waits(js):
    async def script(peer: Peer, number: int) -> None:
        await send_states(peer)

    code = f"""{OPEN}
    let isDone = false;
    client.addEventListener("notice", () => (isDone = true));
    const stop = client.subscribe("balance", async ({{ seq }}) => {{
      say(seq);
      await until(() => isDone);
      stop();
      await pause(20);
    }});
    await until(() => isDone);
    await pause(100);
    say("end");
    """
    async with server(script) as url, js.run(code, url=url) as program:
        await program.until_said("end")
    assert program.said == [1, "end"]


async def test_a_slow_consumer_of_a_table_gets_the_union(js):
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        tickers = [{"symbol": "A", "last": "1"}, {"symbol": "B", "last": "1"}]
        bars = {"1s": [[1000, "1"], [2000, "1"]], "1m": [[0, "1"]]}
        place = {"type": "snapshot", "epoch": "e", "seq": 1, "ts": 1}
        await peer.send(channel="ticker.*", **place, data=tickers)
        await peer.send(channel="candles.A", **place, data=bars)
        for seq in (2, 3):
            place = {"type": "update", "epoch": "e", "prev": seq - 1, "seq": seq, "ts": seq}
            rows = [{"symbol": "AC"[seq - 2], "last": str(seq)}]
            bars = {"1s": [[1000 * seq, str(seq)], [1000 * seq + 1000, "0"]]}
            await peer.send(channel="ticker.*", **place, data=rows)
            await peer.send(channel="candles.A", **place, data=bars)
        await peer.send(op="notice", code="done")
        await peer.until_closed()

    code = f"""{OPEN}
    let isDone = false;
    client.addEventListener("notice", () => (isDone = true));
    for (const channel of ["ticker.*", "candles.a"]) {{
      client.subscribe(channel, async ({{ channel, type, seq, prev, data }}) => {{
        await until(() => isDone);
        say([channel, type, seq, prev, data]);
      }});
    }}
    await until(() => isDone);
    say(["latest", client.latest("ticker.*"), client.latest("candles.A")]);
    """
    async with server(script) as url, js.run(code, url=url) as program:
        said = await program.says(5)
    changed = [{"symbol": "A", "last": "2"}, {"symbol": "C", "last": "3"}]
    assert ["ticker.*", "update", 3, 1, changed] in said
    changed_bars = {"1s": [[2000, "2"], [3000, "3"], [4000, "0"]]}
    assert ["candles.A", "update", 3, 1, changed_bars] in said
    [[_, tickers, candles]] = [each for each in said if each[0] == "latest"]
    assert (tickers["type"], tickers["seq"], "prev" in tickers) == ("snapshot", 3, False)
    assert [row["symbol"] + row["last"] for row in tickers["data"]] == ["A2", "B1", "C3"]
    assert candles["data"] == {
        "1s": [[1000, "1"], [2000, "2"], [3000, "3"], [4000, "0"]],
        "1m": [[0, "1"]],
    }


async def test_candles_are_bounded(js):
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        for seq in range(1, 8):
            place = {"type": "snapshot"} if seq == 1 else {"type": "update", "prev": seq - 1}
            bars = {"1s": [[seq * 1000 + at, "1"] for at in range(100)]}
            await peer.send(channel="candles.A", **place, epoch="e", seq=seq, ts=1, data=bars)
        await peer.until_closed()

    code = f"""{OPEN}
    client.subscribe("candles.A", () => {{}});
    await until(() => client.latest("candles.A")?.seq === 7);
    const bars = client.latest("candles.A").data["1s"];
    say(bars.length, bars[0][0]);
    """
    async with server(script) as url, js.run(code, url=url) as program:
        assert await program.says(1) == [[600, 2000]]


# --- one subscription for many ------------------------------------------------------------------


async def test_the_same_channel_twice_is_one_subscription_at_the_highest_pace(js):
    requests: list[Any] = []

    async def script(peer: Peer, number: int) -> None:
        await peer.authenticate()
        requests.append(await peer.subscribe())
        await peer.push(1, channel="ticker.A")
        for _ in range(4):
            request = await peer.receive("subscribe")
            requests.append(request["args"])
            results = [{"channel": "ticker.A", "ok": True}]
            await peer.send(op="subscribe", id=request["id"], ok=True, results=results)
        requests.append((await peer.receive("unsubscribe"))["args"])
        await peer.send(op="notice", code="done")
        await peer.until_closed()

    code = f"""{OPEN}
    const late = (seq) => say("late", seq);
    const stopA = client.subscribe("ticker.a", ({{ seq }}) => say("a", seq), {{ maxHz: 2 }});
    const stopB = client.subscribe("ticker.A", ({{ seq }}) => say("b", seq), {{ maxHz: 5 }});
    await until(() => client.latest("ticker.A"));
    const stopC = client.subscribe("ticker.A", ({{ seq }}) => late(seq), {{ maxHz: 9 }});
    await pause(20);
    stopC();
    await pause(20);
    const stopD = client.subscribe("ticker.A", () => {{}});
    await pause(20);
    stopD();
    stopD();
    await pause(20);
    stopA();
    stopB();
    const again = client.subscribe("ticker.A", () => {{}}, {{ maxHz: 5 }});
    await pause(20); // nothing has changed
    again();
    client.addEventListener("notice", () => say("done"));
    """
    async with server(script) as url, js.run(code, url=url) as program:
        await program.until_said("done")
    assert program.said == [["a", 1], ["b", 1], ["late", 1], "done"]
    assert requests == [
        *([{"channel": "ticker.A", "max_hz": 5}], [{"channel": "ticker.A", "max_hz": 9}]),
        *([{"channel": "ticker.A", "max_hz": 5}], [{"channel": "ticker.A", "max_hz": 1000}]),
        *([{"channel": "ticker.A", "max_hz": 5}], ["ticker.A"]),
    ]


async def test_a_channel_goes_by_the_servers_spelling(js):
    async def script(peer: Peer, number: int) -> None:
        await peer.authenticate()
        items = await peer.subscribe(lambda name: name.removesuffix("_4"))
        assert items == ["balance", "balance_4"]
        await peer.push(1)
        await peer.push(2, 1)
        assert (await peer.receive("unsubscribe"))["args"] == ["balance"]
        await peer.send(op="notice", code="done")
        await peer.until_closed()

    code = f"""{OPEN}
    const stops = ["balance", "balance_4"].map((name) =>
      client.subscribe(name, ({{ channel, seq }}) => say(name, channel, seq)));
    await until(() => client.latest("balance_4")?.seq === 2);
    for (const stop of stops) stop();
    client.addEventListener("notice", () => say("done"));
    """
    async with server(script) as url, js.run(code, url=url) as program:
        await program.until_said("done")
    both = [[name, "balance", seq] for seq in (1, 2) for name in ("balance", "balance_4")]
    assert program.said == [*both, "done"]


async def test_an_applications_channel_is_of_the_kind_that_the_server_says(js):
    async def script(peer: Peer, number: int) -> None:
        await peer.authenticate()
        request = await peer.receive("channels")
        channels = [{"channel": "risk", "kind": "state"}, {"channel": "alerts", "kind": "events"}]
        await peer.send(op="channels", id=request["id"], ok=True, channels=channels)
        await peer.subscribe()
        for seq in range(1, 4):
            for channel in ("risk", "alerts"):
                await peer.push(seq, seq - 1 if seq > 1 else None, channel=channel)
        await peer.send(op="notice", code="done")
        await peer.until_closed()

    code = f"""{OPEN}
    let isDone = false;
    client.addEventListener("notice", () => (isDone = true));
    for (const channel of ["risk", "alerts"]) {{
      client.subscribe(channel, async ({{ seq }}) => {{
        say(channel, seq);
        await until(() => isDone);
      }});
    }}
    """
    async with server(script) as url, js.run(code, url=url) as program:
        said = await program.says(5)
    assert [seq for channel, seq in said if channel == "risk"] == [1, 3]
    assert [seq for channel, seq in said if channel == "alerts"] == [1, 2, 3]


async def test_a_refused_channel_is_told_and_ends_no_other(js):
    async def script(peer: Peer, number: int) -> None:
        await peer.authenticate()
        for attempt in range(3):
            request = await peer.receive("subscribe")
            names = request["args"]
            assert names == (["nope", "full", "balance"] if attempt == 0 else ["full"])
            errors = {
                "nope": refusal("unknown_channel"),
                "full": refusal("too_many_subscriptions", retryable=True),
            }
            if attempt == 2:
                del errors["full"]
            results = [
                {"channel": name, "ok": False, "error": errors[name]}
                if name in errors
                else {"channel": name, "ok": True}
                for name in names
            ]
            await peer.send(op="subscribe", id=request["id"], ok=False, results=results)
        await peer.push(1)
        await peer.until_closed()

    code = f"""{OPEN}
    eager(20);
    client.addEventListener("refused", ({{ detail: {{ channel, retryable }} }}) =>
      say("refused", channel, retryable));
    const loop = async () => {{
      try {{
        for await (const push of client.pushes("nope")) say(push.seq);
      }} catch (error) {{
        say(error instanceof Refused, error.message, error.word);
      }}
    }};
    loop();
    client.subscribe("full", () => {{}});
    client.subscribe("balance", ({{ seq }}) => say(seq));
    """
    async with server(script) as url, js.run(code, url=url) as program:
        await program.until_said(1)
    said = program.said
    assert said.count(["refused", "full", True]) == 2
    assert said.count(["refused", "nope", False]) == 1
    assert [True, "nope: there is none", "unknown_channel"] in said


# --- leaving ------------------------------------------------------------------------------------


async def test_leaving_is_polite_and_ends_the_loops(js):
    codes: list[int] = []

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        if number == 0:
            assert (await peer.receive("unsubscribe"))["args"] == ["balance"]
        codes.append(await peer.until_closed())

    code = """
    for (const way of ["close", "abort"]) {
      const controller = new AbortController();
      const { signal } = controller;
      const client = connect({ url, token: "t", WebSocket, signal });
      if (way === "close") {
        for await (const push of client.pushes("balance")) break;
        await pause(50);
        client.close();
        client.close();
      } else {
        for await (const push of client.pushes("balance")) controller.abort();
      }
      say(client.state);
      client.subscribe("balance", say)();
      for await (const push of client.pushes("balance")) say(push);
    }
    const aborted = connect({ url, token: "t", WebSocket, signal: AbortSignal.abort() });
    say(aborted.state);
    """
    async with server(script) as url, js.run(code, url=url) as program:
        said = await program.says(3)
        await program.until(lambda: len(codes) == 2)
    assert said == [{"state": "ended", "error": None}] * 3
    assert codes == [1000, 1000]


async def test_what_ends_the_client_comes_out_of_the_loop_after_what_came_before(js):
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        await peer.push(2, 1)
        await peer.websocket.aclose(4503, "kicked")

    code = f"""{OPEN}
    const seen = [];
    try {{
      for await (const {{ seq }} of client.pushes("balance")) {{
        seen.push(seq);
        await until(() => client.state.state === "ended");
      }}
    }} catch (error) {{
      say(seen, error.code, error === client.state.error);
    }}
    """
    async with server(script) as url, js.run(code, url=url) as program:
        assert await program.says(1) == [[[1, 2], 4503, True]]


async def test_what_is_given_wrongly_is_said_at_once(js):
    code = f"""
    const said = (act) => {{ try {{ act(); }} catch (error) {{ say(error.message); }} }};
    for (const bad of ["", "ftp://h/", "ws://", "ws://h:99999/?token=secret"]) {{
      said(() => connect({{ url: bad || "http://", token: "t", WebSocket }}));
    }}
    said(() => connect({{ url, token: 5, WebSocket }}));
    said(() => connect({{ url, WebSocket: null }}));
    {OPEN}
    said(() => client.subscribe("balance"));
    said(() => client.subscribe("", () => {{}}));
    said(() => client.pushes());
    said(() => client.pushes("balance", ""));
    say(client.latest("balance") ?? null);
    for (const maxHz of [0, -1, 1001, NaN]) {{
      said(() => client.subscribe("balance", () => {{}}, {{ maxHz }}));
    }}
    client.close();
    """
    async with js.run(code, url="ws://127.0.0.1:1/ws") as program:
        said = await program.says(15)
    assert said[:4] == ["url is no WebSocket URL: give one like wss://push.example.com/ws"] * 4
    assert said[4:8] == [
        "token is to be a string, or a function that gives one",
        "there is no WebSocket here: hand one in, as connect({ url, WebSocket })",
        "give subscribe() a function that takes the pushes",
        "name the channel to subscribe",
    ]
    assert said[8:11] == [
        "name the channels to iterate over",
        "name the channel to subscribe",
        None,
    ]
    assert said[11:] == ["maxHz is to be above 0, and at most 1000"] * 4


async def test_a_consumer_that_throws_ends_nothing(js):
    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(1)
        await peer.push(2, 1)
        await peer.until_closed()

    code = f"""
    globalThis.process?.on("uncaughtException", ({{ message }}) => say("uncaught", message));
    {OPEN}
    client.subscribe("balance", ({{ seq }}) => {{ throw new Error(`sync ${{seq}}`); }});
    client.subscribe("balance", async ({{ seq }}) => {{ throw new Error(`async ${{seq}}`); }});
    client.subscribe("balance", ({{ seq }}) => say(seq));
    """
    async with server(script) as url, js.run(code, url=url) as program:
        said = await program.says(6)
    assert [each for each in said if isinstance(each, int)] == [1, 2]
    told = {
        each[1].removeprefix("Uncaught ").removeprefix("Error: ")
        for each in said
        if isinstance(each, list)
    }
    assert told == {"sync 1", "sync 2", "async 1", "async 2"}
