"""The JavaScript client against a small real WebSocket server that follows a script."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from harness.scripted_server import Peer, server

pytestmark = pytest.mark.browser


OPEN = 'const client = connect({ url, token: "t", WebSocket });\n'


async def cut(peer: Peer) -> None:
    await trio.aclose_forcefully(peer.websocket._stream)


FINAL = [1002, 1003, 1007, 1009, 4500, 4501, 4502, 4503, 4504, 4505, 4999]


async def test_closes_that_end_it(js):
    connections = 0

    async def script(peer: Peer, number: int) -> None:
        nonlocal connections
        connections += 1
        await peer.authenticate()
        with suppress(trio.BrokenResourceError):
            await peer.websocket.aclose(FINAL[number], "bye")

    code = """
    eager(100);
    for (const code of given.codes) {
      const client = connect({ url, token: "t", WebSocket });
      client.addEventListener("state", ({ detail: { state, error } }) => {
        if (state === "ended") say(error.code, error instanceof Refused, error.message);
        if (state === "waiting") say("waiting");
      });
      await until(() => client.state.state === "ended");
      await pause(30_000);
    }
    say("done");
    """
    async with server(script) as url, js.run(code, url=url, codes=FINAL) as program:
        said = await program.says(len(FINAL) + 1)
    expected = [[n, True, f'the server closed the connection: {n} "bye"'] for n in FINAL]
    assert said == [*expected, "done"]
    assert connections == len(FINAL)


COMES_BACK = [1000, 1001, 1008, 1011, 1012, 1013, 3000, 4000, 4001, 4002, 4003, 4499, 5000]


def close_frame(code: int) -> bytes:
    return bytes([0x88, 2]) + code.to_bytes(2, "big")


# What is no close frame that the server has sent, or has no code, or one that no server sends.
WEATHER = {
    "no code": bytes([0x88, 0]),
    "a proxy's 1014": close_frame(1014),
    "1015": close_frame(1015),
    "5000": close_frame(5000),
    "half a code": bytes([0x88, 1, 3]),
    "a reason that is no UTF-8": bytes([0x88, 3, 3, 0xE8, 0xFF]),
    "a reserved bit": b"\xc1\x00",
    "a masked frame": b"\x81\x80\x00\x00\x00\x00",
    "HTTP": b"HTTP/1.1 504 Gateway Time-out\r\nContent-Length: 0\r\n\r\n",
    "bad UTF-8": b"\x81\x01\xff",
    "a binary message": b"\x82\x02{}",
    "no JSON": b"\x81\x03{:}",
    "no object": b"\x81\x01[",
    "a list": b"\x81\x02[]",
    "null": b"\x81\x04null",
    "a number as op": b'\x81\x08{"op":5}',
    "a text as seq": b'\x81\x19{"channel":"x","seq":"x"}',
    "an empty object": b"\x81\x02{}",
}


async def test_whatever_else_ends_a_connection_it_comes_back(js):
    codes = [code for code in COMES_BACK if code != 5000]
    frames = list(WEATHER.values())
    count = len(codes) + len(frames) + 1

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(number)
        await peer.receive("ping")  # so the push has been read, whatever comes now
        if number < len(codes):
            await peer.websocket.aclose(codes[number])
        elif number < len(codes) + len(frames):
            await peer.send_bytes(frames[number - len(codes)])
            with trio.move_on_after(1):
                await peer.until_closed()
        elif number == len(codes) + len(frames):
            await cut(peer)
        else:
            await peer.until_closed()

    code = f"""
    eager(100);
    {OPEN}
    client.addEventListener("state", ({{ detail }}) => {{
      if (detail.state === "ended") say("ended", String(detail.error));
    }});
    client.subscribe("balance", ({{ seq }}) => {{
      say(seq);
      client.ping();
    }});
    """
    async with server(script) as url, js.run(code, url=url) as program:
        said = await program.says(count + 1)
    assert said == list(range(count + 1))


async def test_the_back_off_grows_and_begins_anew_after_a_connection_that_lasted(js):
    has_lasted = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        if number == 12:
            await peer.push(1)
            await has_lasted.wait()
        await cut(peer)

    code = f"""
    eager(100);
    {OPEN}
    client.addEventListener("state", ({{ detail }}) => {{
      if (detail.state === "waiting") say(Math.round(detail.retryAt - Date.now()));
    }});
    client.subscribe("balance", () => {{
      doze(16_000);
      say("lasted");
    }});
    """
    async with server(script) as url, js.run(code, url=url) as program:
        await program.until_said("lasted")
        has_lasted.set()
        said = await program.says(15)
    waits = [each for each in said if each != "lasted"]
    assert len({*waits}) > 8  # at random
    # The twelve connections before were open, too, and changed nothing.
    for wait, number in zip(waits, [*range(12), 0, 1], strict=True):
        longest = min(15_000, 200 * 2**number)
        assert longest * 0.5 - 5 <= wait <= longest + 5, waits


NOTHING_HERE = [200, 302, 400, 401, 403, 404, 421]
TRIED_AGAIN = [405, 408, 425, 426, 429, 460, 500, 502, 503, 504]


async def test_a_handshake_refused_before_the_first_success(js):
    statuses = [*NOTHING_HERE, *TRIED_AGAIN]
    handshakes: list[int] = []
    which = [0]

    async def script(peer: Peer, number: int) -> None:
        raise AssertionError

    def reject(number: int) -> int:
        handshakes.append(number)
        return statuses[which[0]]

    code = """
    eager(20);
    const secret = `${url}?token=secret`;
    const client = connect({ url: secret, token: "t", WebSocket, attempts: 4 });
    client.addEventListener("state", ({ detail: { state, error } }) => {
      if (state === "ended") say(error.name, error.message);
    });
    """
    async with server(script, reject=reject) as url:
        for number, status in enumerate(statuses):
            which[0] = number
            handshakes.clear()
            async with js.run(code, url=url) as program:
                [[name, message]] = await program.says(1)
            assert "secret" not in message
            # Only `ws` tells the status.
            if status in NOTHING_HERE and js.kind == "node":
                assert (name, len(handshakes)) == ("Refused", 1)
                assert f"HTTP {status};" in message
            else:
                # Node's own WebSocket tries each handshake twice by itself after a 421.
                twice = status == 421 and js.kind == "node-own"
                assert (name, len(handshakes)) == ("Unreachable", 8 if twice else 4)
                assert message.startswith(f"cannot reach {url}: ")


async def test_a_handshake_refused_after_the_first_success_is_weather(js):
    statuses = [*NOTHING_HERE, *TRIED_AGAIN]

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(number)
        if number:
            await peer.until_closed()
        else:
            await cut(peer)

    def reject(number: int) -> int | None:
        return statuses[number - 1] if 0 < number <= len(statuses) else None

    code = """
    eager(100);
    const client = connect({ url, token: "t", WebSocket, attempts: 1 });
    client.subscribe("balance", ({ seq }) => say(seq));
    """
    async with server(script, reject=reject) as url, js.run(code, url=url) as program:
        assert await program.says(2) == [0, len(statuses) + 1]


async def test_nobody_there_is_said_and_tried_for_ever(js):
    code = """
    eager(200);
    let waits = 0;
    const client = connect({ url: "ws://127.0.0.1:1/ws", token: "t", WebSocket });
    client.addEventListener("state", ({ detail: { state, reason } }) => {
      if (state === "waiting" && ++waits === 12) say(typeof reason, reason.length > 10);
      if (state === "ended") say("ended");
    });
    """
    async with js.run(code) as program:
        assert await program.says(1) == [["string", True]]


async def test_a_notice_says_when_to_come_back_and_nothing_shortens_it(js):
    times: list[float] = []

    async def script(peer: Peer, number: int) -> None:
        times.append(trio.current_time())
        await peer.open()
        if number < 2:
            after = (30_000, 10_000_000)[number]
            await peer.send(op="notice", code="shutdown", reconnect_after_ms=after)
            await peer.websocket.aclose(1012)
        else:
            await peer.push(1)
            await peer.until_closed()

    code = f"""
    eager(100);
    {OPEN}
    tell(client, ["state", "notice"]);
    client.subscribe("balance", ({{ seq }}) => say(seq));
    if (typeof window !== "undefined") setInterval(() => dispatchEvent(new Event("online")), 1);
    """
    async with server(script) as url, js.run(code, url=url) as program:
        await program.until_said(1)
    # Timers run a hundred times as fast.
    assert times[1] - times[0] >= 0.29
    assert times[2] - times[1] >= 0.59
    told = [each for each in program.said if isinstance(each, list)]
    waits = [each["waitMs"] for _, each in told if "waitMs" in each]
    assert [round(wait, -2) for wait in waits] == [30_000, 60_000]
    assert ["notice", {"code": "shutdown", "reconnect_after_ms": 30_000}] in told
