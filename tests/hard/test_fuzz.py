"""Random input, the same at every run: nothing that a peer sends raises, leaks or is noticed.

`TESTS_FUZZ` is the number of inputs; a fifth of them go to live sockets after the handshake.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterator

import pytest
import trio
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st

from harness.bystanders import (
    NEWS,
    RawPeer,
    admission,
    bystanders,
    close_code,
    frames_of,
    raw_peer,
    show_no_trace,
)
from harness.endpoints import RAW, open_endpoint
from harness.frames import masked
from harness.json_cases import GOOD, ITEMS, every_case
from harness.sessions import answer, make
from harness.support import token

from trading_push.errors import ErrorCode
from trading_push.settings.schema import Limits

INPUTS = int(os.environ.get("TESTS_FUZZ", "50_000"))
AT_THE_SOCKET = INPUTS // 5
OF_HYPOTHESIS = 20
"""How many messages hypothesis makes for one conversation."""
PATIENT = Limits(bad_messages=10**6, messages_burst=10**6, subscriptions=5)
CODES = {code.value for code in ErrorCode}
WORKERS = 8
MESSAGES = 200
"""How many well-formed frames one connection sends."""


# --- near-valid messages -------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-10, 10),
    st.integers(),
    st.sampled_from([2**53, 2**53 + 1, -(2**53) - 1, 10**300]),
    st.floats(),
)
WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "balance", "pnl", "news", "ticker.A", "ticker.", "balance_4", "balance_5", "x" * 65]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
ITEMS_OF_REQUESTS = st.one_of(
    WORDS,
    VALUES,
    st.fixed_dictionaries(
        {"channel": WORDS},
        optional={
            "max_hz": st.one_of(st.integers(1, 1000), VALUES),
            "since": st.one_of(
                st.fixed_dictionaries({"epoch": WORDS, "seq": st.integers(0, 9)}), VALUES
            ),
            "x": VALUES,
        },
    ),
)
OPS = st.one_of(st.sampled_from(["auth", "subscribe", "unsubscribe", "list", "ping"]), VALUES)
REQUESTS = st.fixed_dictionaries(
    {"op": OPS},
    optional={
        "id": VALUES,
        "token": st.one_of(st.sampled_from(["good 4", "good 5", "expired", "bad"]), VALUES),
        "args": st.one_of(st.lists(ITEMS_OF_REQUESTS, max_size=6), VALUES),
        "x": VALUES,
    },
).map(json.dumps)
# Any text, lone surrogates among it, which no socket gives but an application's own transport may.
TEXTS = st.text(st.characters(), max_size=60)


def check_a_conversation(messages: list[str], user: str | None) -> None:
    """Each message has one reply, which is JSON of a known form, and the session works after it."""
    session = make(user, limits=PATIENT)
    for message in messages:
        replies, ends = answer(session, message)
        assert len(replies) == 1, message
        [reply] = replies
        assert reply["op"] in ("auth", "subscribe", "unsubscribe", "list", "pong", "error")
        if reply["op"] == "error":
            assert reply["ok"] is False
            assert reply["error"]["code"] in CODES
        for result in reply.get("results", ()):
            assert result["ok"] or result["error"]["code"] in CODES
        if ends:  # a first token that is not good
            assert [end.code for end in ends] in ([4500], [4003])
            assert session.principal is None
            break
        assert len(session.topics) <= PATIENT.subscriptions
        assert len(json.dumps(reply)) <= 500 + 10 * len(message)
    [pong], _ = answer(session, '{"op":"ping","id":1}')
    assert (pong["op"], pong["id"]) == ("pong", 1)


@seed(6455)
@settings(
    max_examples=INPUTS // 10 // OF_HYPOTHESIS,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@example(["\ud800", "[" * 30_000, ""], None)
@given(
    st.lists(st.one_of(TEXTS, REQUESTS, REQUESTS), min_size=OF_HYPOTHESIS, max_size=OF_HYPOTHESIS),
    st.sampled_from([None, "4"]),
)
def test_the_session_bears_every_conversation(messages, user):
    check_a_conversation(messages, user)


# --- mutations of what is known ------------------------------------------------------------------

SEEDS = [
    *(text for _, _, text in every_case() if len(text) < 2000),
    *(text for text, _ in GOOD.values()),
    *(f'{{"op":"subscribe","id":1,"args":[{text},"ticker.A"]}}' for text, _ in ITEMS),
    '{"op":"auth","id":1,"token":"good 4"}',
    '{"op":"subscribe","id":"a","args":["balance","ticker.BTCUSDT",{"channel":"pnl","max_hz":2}]}',
    '{"op":"unsubscribe","id":2,"args":["balance","ticker.BTCUSDT"]}',
    '{"op":"list","id":3}',
]
ATOMS = ['"', "\\", "{", "}", "[", "]", ":", ",", "0", "-", "e9", "null", "\\u0000", "\\ud800"]
ATOMS += ["\ufeff", "\x00", "é", "😀", "1" * 400, "[" * 1100, '"op":', '"id":', '"ping"', " "]

CHARACTERS = '\x00\n"\\\x7f\xff\u2028\uffff'


def mutated_text(rng: random.Random) -> str:
    """One of the seeds with some of it cut, doubled, replaced, or spliced with another."""
    text = rng.choice(SEEDS)
    for _ in range(rng.randrange(5)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((0, 1, 1, 2, 5, 20)))
        other = rng.choice(SEEDS)
        place = rng.randrange(len(other) + 1)
        text = {
            0: text[:start] + text[end:],
            1: text[:end] + text[start:],
            2: text[:start] + rng.choice(ATOMS) + text[end:],
            3: text[:start] + rng.choice(ATOMS) + text[start:],
            4: text[:start]
            + chr(rng.choice((0, 10, 34, 92, 127, 255, 0x2028, 0xFFFF)))
            + text[end:],
            5: text[:start] + other[place:],
        }[rng.randrange(6)]
    return text


def is_auth(text: str) -> bool:
    try:
        request = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(request, dict) and request.get("op") == "auth"


def test_the_session_bears_every_mutation():
    rng = random.Random(7159)
    for _ in range((INPUTS - AT_THE_SOCKET - INPUTS // 10) // MESSAGES):
        messages = [mutated_text(rng) for _ in range(MESSAGES)]
        for number, message in enumerate(messages):
            # A refused token ends a session: what comes behind it begins another.
            if is_auth(message):
                check_a_conversation([message], None)
                messages[number] = "{}"
        check_a_conversation(messages, rng.choice((None, "4")))


def mutated_frames(rng: random.Random) -> bytes:
    """Some frames, with bits flipped, bytes cut, doubled or replaced, and headers made up."""
    mask = rng.randbytes(4)
    data = bytearray()
    for _ in range(rng.randrange(1, 4)):
        payload = rng.choice((mutated_text(rng).encode(), rng.randbytes(rng.randrange(40))))
        kinds = (0x81, 0x81, 0x81, 0x01, 0x80, 0x00, 0x82, 0x88, 0x89, 0x8A, rng.randrange(256))
        first = rng.choice(kinds)
        if first == 0x88:
            code = rng.choice((1000, 1001, 1012, 3000, 4999, rng.randrange(2**16)))
            payload = code.to_bytes(2, "big") + rng.choice((payload[:123], "再见 é".encode()))
        elif first & 0x08:
            payload = payload[:125]
        data += masked(first, payload, mask)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 8))):
        place = rng.randrange(len(data))
        match rng.randrange(6):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place] = rng.randrange(256)
            case 2:
                del data[place:]
            case 3:
                del data[place : place + rng.randrange(1, 5)]
            case 4:
                data[place:place] = rng.randbytes(rng.randrange(1, 8))
            case 5:
                data[place:place] = data[: rng.randrange(20)]
        if not data:
            break
    return bytes(data)


@pytest.fixture
def no_trace(caplog):
    caplog.set_level(logging.WARNING)  # so many connections have very many lines
    yield
    show_no_trace(caplog)


async def one_stream_of_bytes(port: int, data: bytes, before: bytes) -> None:
    """What is behind the handshake, then the end of file: the server ends, too, in every case."""
    async with raw_peer(port) as peer:
        await peer.send(before + data)
        await peer.leave()
        code = close_code(await peer.rest())
        assert code is None or 1000 <= code < 5000


@pytest.mark.parametrize("kind", RAW)
@pytest.mark.usefixtures("no_trace")
async def test_a_live_socket_bears_every_stream_of_bytes(kind, certificates):
    rng = random.Random(f"bytes {kind}")
    inputs = [
        (mutated_frames(rng), admission("balance", "news") if rng.random() < 0.2 else b"")
        for _ in range(AT_THE_SOCKET // 4)
    ]

    async def work(port: int, work: Iterator[tuple[bytes, bytes]]) -> None:
        for data, before in work:
            await one_stream_of_bytes(port, data, before)

    async with open_endpoint(kind, certificates, channels=[NEWS], limits=PATIENT) as endpoint:
        async with bystanders(endpoint), trio.open_nursery() as nursery:
            for worker in range(WORKERS):
                nursery.start_soon(work, endpoint.port, iter(inputs[worker::WORKERS]))
        ledger = endpoint.service.statistics().ledger
        assert ledger.connections_opened >= len(inputs)


async def one_conversation(peer: RawPeer, messages: list[str]) -> None:
    """Frames that are whole: each message has its reply, and the connection lives to the last."""
    sent = b"".join(masked(0x81, message.encode(), b"mask") for message in messages)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.send, sent)
        answer = await peer.until(lambda frames: replies_in(frames) >= len(messages))
    for opcode, payload in frames_of(answer):
        assert opcode == 1
        message = json.loads(payload)
        assert message.get("op", "push") in (
            *("push", "auth", "subscribe", "unsubscribe", "list", "pong", "error"),
        )


def replies_in(frames: list[tuple[int, bytes]]) -> int:
    return sum(payload.startswith(b'{"op"') for _, payload in frames)


@pytest.mark.parametrize("kind", RAW)
@pytest.mark.usefixtures("no_trace")
async def test_a_live_socket_bears_every_message(kind, certificates):
    rng = random.Random(f"messages {kind}")
    good = json.dumps({"op": "auth", "token": token(4)})

    def message() -> str:
        text = mutated_text(rng)
        return '{"op":"ping"}' if is_auth(text) else text

    async def work(port: int, count: int) -> None:
        for number in range(count):
            messages = [message() for _ in range(MESSAGES)]
            async with raw_peer(port) as peer:
                await one_conversation(peer, [good, *messages] if number % 2 else messages)

    async with (
        open_endpoint(kind, certificates, channels=[NEWS], limits=PATIENT) as endpoint,
        bystanders(endpoint),
        trio.open_nursery() as nursery,
    ):
        for _ in range(4):
            nursery.start_soon(work, endpoint.port, AT_THE_SOCKET // 4 // MESSAGES // 4 + 1)
