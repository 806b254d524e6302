"""What the JavaScript client does about tokens, and about silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from harness.scripted_server import Peer, server

pytestmark = pytest.mark.browser


async def cut(peer: Peer) -> None:
    await trio.aclose_forcefully(peer.websocket._stream)


# The function gives these one after the other; an object is thrown.
TOKENS = """
eager(50);
const token = async () => {
  const next = given.tokens.shift();
  if (typeof next === "string") return next;
  if (next === null) return undefined;
  throw next.refused ? new Refused(next.refused) : Object.assign(new Error("no"), next);
};
const client = tell(connect({ url, token, WebSocket, attempts: 50 }), ["state"]);
client.subscribe("balance", ({ seq }) => say(seq));
"""


def ended(said: list[Any]) -> list[Any]:
    """The error that a `state` of the end has told."""
    [error] = [each[1]["error"] for each in said if isinstance(each, list) and "error" in each[1]]
    return error


async def test_a_refused_token_ends_it(js):
    connections = 0

    async def script(peer: Peer, number: int) -> None:
        nonlocal connections
        connections += 1
        await peer.refuse("bad_token" if number == 0 else "forbidden")
        await peer.until_closed()

    async with server(script) as url:
        for code, word in ((4500, "bad_token"), (0, "forbidden")):
            async with js.run(TOKENS, url=url, tokens=["a", "b"]) as program:
                await program.until(lambda p=program: "error" in json.dumps(p.said))
                assert ended(program.said) == ["Refused", "no way", code, word]
    assert connections == 2


async def test_an_expired_token_is_replaced_and_the_same_again_ends_it(js):
    seen: list[str] = []

    async def script(peer: Peer, number: int) -> None:
        if number in (0, 2):
            seen.append(await peer.refuse("token_expired"))
            await peer.websocket.aclose(4003)
            return
        seen.append(await peer.authenticate())
        await peer.subscribe()
        await peer.push(number)
        await peer.websocket.aclose(4003, "token expired")

    tokens = ["old", "new", "newer", "newer", "never"]
    async with server(script) as url, js.run(TOKENS, url=url, tokens=tokens) as program:
        await program.until(lambda: "error" in json.dumps(program.said))
    assert seen == ["old", "new", "newer"]
    expected = ["Refused", "the token has expired: get a new one", 4003, "token_expired"]
    assert ended(program.said) == expected


async def test_an_expired_string_ends_it(js):
    async def script(peer: Peer, number: int) -> None:
        assert number == 0
        await peer.refuse("token_expired", message="late")
        await peer.until_closed()

    code = 'tell(connect({ url, token: "t", WebSocket }), ["state"]);'
    async with server(script) as url, js.run(code, url=url) as program:
        await program.until(lambda: "error" in json.dumps(program.said))
    assert ended(program.said) == ["Refused", "late", 4003, "token_expired"]


async def test_a_token_that_is_not_valid_yet_is_tried_again(js):
    seen: list[str] = []

    async def script(peer: Peer, number: int) -> None:
        if number < 3:
            seen.append(await peer.refuse("bad_token", retryable=True))
            await peer.websocket.aclose(4003, "not valid yet")
        else:
            seen.append(await peer.authenticate())
            await peer.subscribe()
            await peer.push(7)
            await peer.until_closed()

    async with (
        server(script) as url,
        js.run(TOKENS, url=url, tokens=["early"] * 9) as program,
    ):
        await program.until_said(7)
    assert seen == ["early"] * 4


async def test_a_token_that_cannot_be_had_costs_one_try(js):
    async def script(peer: Peer, number: int) -> None:
        assert await peer.authenticate() == "t"
        await peer.subscribe()
        await peer.push(number)
        if number:
            await peer.until_closed()
        else:
            await cut(peer)

    tokens = [{}, None, "t", {}, None, "t"]
    async with server(script) as url, js.run(TOKENS, url=url, tokens=tokens) as program:
        await program.until_said(1)
    reasons = [each[1].get("reason") for each in program.said if isinstance(each, list)]
    assert reasons.count("the function that gives the token failed: Error: no") == 2


@pytest.mark.parametrize("final", [{"refused": "signed out"}, {"final": True}])
@pytest.mark.parametrize("is_renewal", [False, True])
async def test_a_function_that_refuses_a_token_ends_it(js, final, is_renewal):
    async def script(peer: Peer, number: int) -> None:
        assert number == 0
        await peer.open()
        if is_renewal:
            await peer.send(op="notice", code="token_expires", expires_in=9)
            await peer.until_closed()
        else:
            await cut(peer)

    async with server(script) as url, js.run(TOKENS, url=url, tokens=["t", final]) as program:
        await program.until(lambda: "error" in json.dumps(program.said))
    name, message, *_ = ended(program.said)
    assert (name, message) in (("Refused", "signed out"), ("Error", "no"))


async def test_a_token_is_renewed_on_the_living_connection(js):
    seen: list[str] = []

    async def script(peer: Peer, number: int) -> None:
        assert number == 0
        await peer.open()
        await peer.push(1)
        await peer.send(op="notice", code="token_expires", expires_in=29)
        # Not yet: another one. Refused for good: the session is as it was.
        seen.append(await peer.refuse("bad_token", retryable=True))
        seen.append(await peer.refuse("bad_token"))
        await peer.push(2, 1)
        await peer.send(op="notice", code="token_expires", expires_in=9)
        seen.append(await peer.authenticate())
        await peer.push(3, 2)
        await peer.until_closed()

    tokens = ["a", {}, "b", "c", {}, "d"]
    async with server(script) as url, js.run(TOKENS, url=url, tokens=tokens) as program:
        await program.until_said(3)
    assert seen == ["b", "c", "d"]
    assert [each for each in program.said if isinstance(each, int)] == [1, 2, 3]


async def test_without_a_token_it_asks_for_what_strangers_may_have(js):
    async def script(peer: Peer, number: int) -> None:
        if number == 0:
            # As a session by cookie begins.
            await peer.send(op="auth", ok=True, user="7", heartbeat_s=15)
            await peer.subscribe()
            await peer.push(1)
            await cut(peer)
        else:
            request = await peer.receive("subscribe")
            error = {"code": "not_authenticated", "message": "auth first", "retryable": False}
            await peer.send(op="error", id=request["id"], ok=False, error=error)
            await peer.until_closed()

    code = """
    eager(50);
    const client = tell(connect({ url, WebSocket }), ["state"]);
    client.subscribe("balance", ({ seq }) => say([seq, client.user]));
    """
    async with server(script) as url, js.run(code, url=url) as program:
        await program.until(lambda: "error" in json.dumps(program.said))
    assert [1, "7"] in program.said
    expected = "the server wants a token: give connect() one"
    assert ended(program.said) == ["Refused", expected, 0, "not_authenticated"]


# --- silence ----------------------------------------------------------------------------------


async def test_a_silent_server_is_left_for_a_new_connection(js):
    pings: list[int] = []

    async def script(peer: Peer, number: int) -> None:
        await peer.authenticate(heartbeat_s=0.2)
        await peer.subscribe()
        await peer.push(number)
        if number == 0:
            for _ in range(2):  # the first silence is broken
                request = await peer.receive("ping")
                pings.append(request["id"])
                if len(pings) == 1:
                    await peer.send(op="pong", id=request["id"], ts=1)
        await peer.until_closed()

    code = """
    const client = tell(connect({ url, token: "t", WebSocket }), ["state", "rtt"]);
    client.subscribe("balance", ({ seq }) => say(seq));
    """
    async with server(script) as url, js.run(code, url=url) as program:
        await program.until_said(1)
    states = [each for each in program.said if isinstance(each, list)]
    reasons = [each[1]["reason"] for each in states if "reason" in each[1]]
    assert reasons == ["the server fell silent"]
    rtts = [each[1]["ms"] for each in states if each[0] == "rtt"]
    assert rtts
    assert all(0 <= ms < 10_000 for ms in rtts)


async def test_a_server_that_answers_nothing_is_left(js):
    async def script(peer: Peer, number: int) -> None:
        if number == 0:
            await peer.until_closed()  # no reply to `auth`
        elif number == 1:
            await peer.authenticate()
            await peer.until_closed()  # none to `subscribe`
        else:
            await peer.open()
            await peer.push(number)
            await peer.until_closed()

    code = """
    hasten(10);
    const client = connect({ url, token: "t", WebSocket });
    client.addEventListener("state", ({ detail }) => detail.reason && say(detail.reason));
    client.subscribe("balance", ({ seq }) => say(seq));
    """
    async with server(script) as url, js.run(code, url=url) as program:
        await program.until_said(2)
    assert program.said == ["the server does not answer"] * 2 + [2]


@pytest.mark.parametrize("answers", [True, False])
async def test_a_machine_that_slept_asks_before_it_gives_up(js, answers):
    is_awake = trio.Event()

    async def script(peer: Peer, number: int) -> None:
        await peer.open()
        await peer.push(number + 1)
        if number == 0:
            request = await peer.receive("ping")
            await is_awake.wait()
            if answers:
                await peer.send(op="pong", id=request["id"], ts=1)
                await peer.push(2, 1)
        await peer.until_closed()

    # The machine sleeps for an hour while a ping waits for its answer. With a second sleep in a
    # row, as the timers of a hidden tab see it, it is not waited for again.
    code = """
    hasten(10);
    const client = tellStates(connect({ url, token: "t", WebSocket }));
    client.subscribe("balance", async ({ seq }) => {
      say(seq);
      if (seq !== 1) return;
      client.ping();
      doze(3_600_000);
      await pause(5_200); // the five seconds that the ping had are over, as its timer sees it
      say("awake");
      if (!given.answers) doze(3_600_000);
    });
    """
    async with server(script) as url, js.run(code, url=url, answers=answers) as program:
        await program.until_said("awake")
        is_awake.set()
        await program.until_said(2)
    again = [] if answers else ["waiting", "connecting", "open"]
    assert program.said == ["connecting", "open", 1, "awake", *again, 2]


async def test_a_page_that_comes_back_to_life_tries_at_once_or_asks(js):
    if js.kind != "chromium":
        pytest.skip("only a page has these events")
    pings = 0

    async def script(peer: Peer, number: int) -> None:
        nonlocal pings
        if number < 8:
            await cut(peer)
            return
        await peer.open()
        await peer.push(number)
        if number == 9:
            await peer.until_closed()
        await peer.send(op="notice", code="here")
        await peer.receive("ping")  # which is not answered
        pings += 1
        await peer.until_closed()

    # Seven back-offs take 20 s at least, and a silence 30.
    code = """
    const client = connect({ url, token: "t", WebSocket });
    const news = [
      () => window.dispatchEvent(new Event("online")),
      () => document.dispatchEvent(new Event("visibilitychange")),
      () => document.dispatchEvent(new Event("resume")),
      () => window.dispatchEvent(new PageTransitionEvent("pageshow", { persisted: true })),
    ];
    let count = 0;
    client.addEventListener("state", ({ detail }) => {
      if (detail.state === "waiting") setTimeout(news[count++ % 4]);
    });
    client.addEventListener("notice", () => {
      hasten(10);
      window.dispatchEvent(new PageTransitionEvent("pageshow", { persisted: false }));
      news[3]();
    });
    client.subscribe("balance", ({ seq }) => say(seq));
    """
    started = trio.current_time()
    async with server(script) as url, js.run(code, url=url) as program:
        await program.until_said(9)
    assert trio.current_time() - started < 10
    assert pings == 1
