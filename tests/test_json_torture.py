"""Hostile JSON at every door: a typed error for each message, and the connection lives."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import trio
from support import token
from test_doors import certificates, open_door
from test_session import answer, make

from trading_push.settings.schema import Limits

__all__ = ["certificates"]

DOORS = ["linked", "plain", "native", "memory"]
# Each message is answered for itself: neither the rate nor the row of bad ones ends it.
PATIENT = Limits(bad_messages=10**6, messages_burst=10**6)
BIG = "9" * 5000
DEEP = 30_000
ERROR_KEYS = {"code", "message", "retryable"}

NOT_JSON = {
    "empty": "",
    "a blank": " \r\n\t",
    "a zero byte": "\x00",
    "no value": "nothing",
    "a byte order mark": '\ufeff{"op":"ping"}',
    "half an object": '{"op":"ping"',
    "an open text": '{"op":"ping',
    "a comma too many": '{"op":"ping",}',
    "no colon": '{"op" "ping"}',
    "single quotes": "{'op':'ping'}",
    "a bare key": '{op:"ping"}',
    "a comment": '{"op":"ping"/**/}',
    "two values": '{"op":"ping"}{"op":"ping"}',
    "something behind": '{"op":"ping"} x',
    "a control character": '{"op":"pi\nng"}',
    "an unknown escape": '{"op":"\\x70ing"}',
    "half an escape": '{"op":"\\u00"}',
    "a lone low surrogate as a key": '{"\\udc00":1,"op":"ping"}',
    "a lone high surrogate": '{"op":"ping","id":1,"x":"\\ud800"}',
    "a leading zero": '{"op":"ping","x":01}',
    "a leading plus": '{"op":"ping","x":+1}',
    "a point without digits": '{"op":"ping","x":1.}',
    "hexadecimal": '{"op":"ping","x":0x10}',
    "NaN": "NaN",
    "NaN in a field": '{"op":"ping","x":NaN}',
    "Infinity": '{"op":"ping","x":Infinity}',
    "-Infinity": '{"op":"ping","x":-Infinity}',
    "a lone surrogate as the id": '{"op":"ping","id":"\\ud800"}',
    "a lone surrogate as a token": '{"op":"auth","token":"\\ud800"}',
    "a lone surrogate in an item": '{"op":"subscribe","args":["balance","\\ud800"]}',
    "deep objects": '{"a":' * (DEEP // 3),
    "deep lists in an unknown field": '{"op":"ping","x":' + "[" * DEEP + "]" * DEEP + "}",
}
NO_OBJECT = {
    "null": "null",
    "true": "true",
    "a number": "1",
    "a huge number": BIG,
    "a number that is none": "1e999",
    "a text": '"ping"',
    "a list": '[{"op":"ping"}]',
    "deep lists": "[" * DEEP,
    "deep and whole lists": "[" * DEEP + "]" * DEEP,
}
WRONG = ["null", "true", "1", "-1.5", "1e999", BIG, "[]", "{}", '["ping"]', '{"a":1}']
NO_TEXT = {f"{value[:6]}": value for value in WRONG}
BAD_REQUESTS = {
    "no op": "{}",
    "no op but an id": '{"id":1}',
    "an op in capitals only": '{"OP":"ping"}',
    "an unknown key": '{"op":"ping","x":1}',
    "an unknown key that is huge": '{"op":"ping","' + "x" * 30_000 + '":1}',
    "an unknown key with a zero byte": '{"op":"ping","\\u0000":1}',
    "an unknown key of every request": '{"op":"list","args":[]}',
    "a key of the prototype": '{"op":"ping","__proto__":{}}',
    "auth without a token": '{"op":"auth"}',
    "subscribe without args": '{"op":"subscribe"}',
    "too many args": json.dumps({"op": "subscribe", "args": ["balance"] * 1025}),
    **{f"op: {name}": f'{{"op":{value}}}' for name, value in NO_TEXT.items()},
    **{f"token: {name}": f'{{"op":"auth","token":{value}}}' for name, value in NO_TEXT.items()},
    **{
        f"args: {value[:6]}": f'{{"op":"subscribe","args":{value}}}'
        for value in [*WRONG, '"balance"']
        if not value.startswith("[")
    },
    **{
        f"id: {value[:6]}": f'{{"op":"ping","id":{value}}}'
        for value in [
            *WRONG,
            str(2**53 + 1),
            str(-(2**53) - 1),
            "1.0e0",
            "-0.5",
            '"' + "x" * 65 + '"',
        ]
        if value not in ("1", "null")
    },
}
UNKNOWN_OPS = {
    "no text": '{"op":""}',
    "in capitals": '{"op":"PING"}',
    "a blank behind": '{"op":"ping "}',
    "a zero byte": '{"op":"ping\\u0000"}',
    "an attribute": '{"op":"__class__"}',
    "a reply's": '{"op":"pong"}',
    "a huge one": '{"op":"' + "x" * 30_000 + '"}',
    "a full-width letter": '{"op":"\uff50ing"}',
    "the last of two": '{"op":"ping","op":"pong"}',
}
REFUSED = {
    "bad_json": NOT_JSON,
    "bad_request": {**NO_OBJECT, **BAD_REQUESTS},
    "unknown_op": UNKNOWN_OPS,
}

# What reads oddly and is good, with the id of its reply.
GOOD: dict[str, tuple[str, Any]] = {
    "no id": ('{"op":"ping"}', None),
    "an id of null": ('{"op":"ping","id":null}', None),
    "null bytes escaped in the id": ('{"op":"ping","id":"a\\u0000"}', "a\x00"),
    "escapes in keys and values": ('{"\\u006fp":"\\u0070ing","\\u0069d":1}', 1),
    "a pair of surrogates": ('{"op":"ping","id":"\\ud83d\\ude00"}', "😀"),
    "the last of two ids": ('{"op":"ping","id":1,"id":2}', 2),
    "the last of two ops": ('{"op":"nope","op":"ping","id":1}', 1),
    "the largest id": (f'{{"op":"ping","id":{2**53}}}', 2**53),
    "the smallest id": (f'{{"op":"ping","id":{-(2**53)}}}', -(2**53)),
    "the longest id": ('{"op":"ping","id":"' + "é" * 64 + '"}', "é" * 64),
    "blanks": (' \t\r\n{ "op" :\n"ping" , "id" : 1 } ', 1),
    "no characters in the id": ('{"op":"ping","id":""}', ""),
}

# Items fail one by one; the second value is what fails, by its code, None for what does not.
ITEMS: list[tuple[str, str | None]] = [
    *((value, "bad_request") for value in WRONG),
    *((f'{{"channel":{value}}}', "bad_request") for value in WRONG),
    *(
        (f'{{"channel":"balance","max_hz":{value}}}', "bad_request")
        for value in ["true", '"2"', "0", "-1", "1e999", "1001", BIG, "[]", "{}", "1e-999"]
    ),
    *(
        (f'{{"channel":"balance","since":{value}}}', "bad_request")
        for value in [
            *(
                "1",
                "[]",
                "{}",
                '{"epoch":null,"seq":1}',
                '{"epoch":"e"}',
                '{"seq":1}',
                '{"epoch":1,"seq":1}',
            ),
            *('{"epoch":"e","seq":-1}', '{"epoch":"e","seq":1.5}', '{"epoch":"e","seq":"1"}'),
            f'{{"epoch":"e","seq":{2**53 + 1}}}',
            f'{{"epoch":"e","seq":{BIG}}}',
            '{"epoch":"e","seq":1,"x":1}',
        ]
    ),
    ('{"channel":"balance","x":1}', "bad_request"),
    ('""', "unknown_channel"),
    ('"nope"', "unknown_channel"),
    ('"balance "', "unknown_channel"),
    ('"balance_5"', "forbidden"),
    ('"ticker."', "unknown_channel"),
    ('"ticker.ß"', "unknown_channel"),
    ('"ticker.\\u0000"', "unknown_channel"),
    ('"ticker.' + "X" * 33 + '"', "unknown_channel"),
    ('"' + "x" * 5_000 + '"', "unknown_channel"),
    ('{"channel":"nope","channel":"balance"}', None),
    ('{"channel":"pnl","max_hz":1e3}', None),
    ('{"channel":"orders","max_hz":null,"since":null}', None),
]


@pytest.fixture(autouse=True)
def no_trace(caplog):
    """Nothing that a peer says shows a trace."""
    caplog.set_level(logging.INFO)
    yield
    assert not [record for record in caplog.get_records("call") if record.exc_info]


def every_case() -> list[tuple[str, str, str]]:
    return [(code, name, text) for code, cases in REFUSED.items() for name, text in cases.items()]


@pytest.mark.parametrize("user", [None, "4"], ids=["a stranger", "a user"])
@pytest.mark.parametrize("kind", DOORS)
async def test_each_bad_message_has_its_typed_reply_and_the_connection_lives(
    kind, certificates, user
):
    async with (
        open_door(kind, certificates, limits=PATIENT) as door,
        door.connect(user, *([] if user is None else ["balance", "ticker.A"])) as client,
    ):
        for number, (code, name, text) in enumerate(every_case()):
            if kind != "memory" and len(text.encode("utf-8", "surrogatepass")) > 65_536:
                continue  # over the limit of a message
            await client.socket.send_message(text)
            await client.socket.send_message(json.dumps({"op": "ping", "id": number}))
            reply, pong = await client_reply(client), await client_reply(client)
            assert (reply["op"], reply["ok"]) == ("error", False), name
            assert reply["error"]["code"] == code, (name, reply)
            assert set(reply["error"]) == ERROR_KEYS
            assert len(json.dumps(reply)) < 500, name
            assert (pong["op"], pong["id"]) == ("pong", number), name


async def client_reply(client: Any) -> dict[str, Any]:
    with trio.fail_after(10):
        while "op" not in (message := await client.receive()):
            pass
        return message


@pytest.mark.parametrize("kind", DOORS)
async def test_what_is_odd_and_good_is_served(kind, certificates):
    async with open_door(kind, certificates, limits=PATIENT) as door, door.connect() as client:
        for name, (text, request_id) in GOOD.items():
            await client.socket.send_message(text)
            reply = await client_reply(client)
            assert (reply["op"], reply.get("id")) == ("pong", request_id), name


@pytest.mark.parametrize("kind", DOORS)
async def test_items_fail_one_by_one(kind, certificates):
    async with open_door(kind, certificates, limits=PATIENT) as door, door.connect(4) as client:
        texts = ",".join(text for text, _ in ITEMS)
        await client.socket.send_message(f'{{"op":"subscribe","id":1,"args":[{texts}]}}')
        reply = await client_reply(client)
        assert (reply["op"], reply["id"], reply["ok"]) == ("subscribe", 1, False)
        found = [result.get("error", {}).get("code") for result in reply["results"]]
        expected = [code for _, code in ITEMS]
        assert found == expected, [
            (text, is_, should)
            for (text, should), is_ in zip(ITEMS, found, strict=True)
            if is_ != should
        ]
        assert (await client.request("list"))["channels"] == ["balance", "orders", "pnl"]
        for text, code in ITEMS:
            await client.socket.send_message(f'{{"op":"unsubscribe","id":1,"args":[{text}]}}')
            [result] = (await client_reply(client))["results"]
            if text.startswith("{"):  # an unsubscribed channel is a text
                code = "bad_request"
            assert result.get("error", {}).get("code") == code, text


@pytest.mark.parametrize("user", [None, "4"], ids=["a stranger", "a user"])
def test_raw_surrogates_in_the_text_are_no_json(user):
    # No socket gives such a text: a frame that has one is closed with 1007.
    for text in ('"\ud800"', '{"op":"ping","id":"\udfff"}', '{"op":"\ud83d"}', "\udc80"):
        [reply], ends = answer(make(user), text)
        assert reply["error"]["code"] == "bad_json"
        assert not ends


@pytest.mark.parametrize("code", REFUSED)
@pytest.mark.parametrize("kind", DOORS)
async def test_the_tenth_in_a_row_is_the_last(kind, certificates, code):
    text = next(iter(REFUSED[code].values()))
    async with open_door(kind, certificates) as door, door.connect(4) as client:
        for _ in range(2):  # a good one between begins the row anew
            for _ in range(9):
                await client.socket.send_message(text)
                assert (await client_reply(client))["error"]["code"] == code
            assert (await client.request("ping", id=1))["op"] == "pong"
        for _ in range(10):
            await client.socket.send_message(text)
            assert (await client_reply(client))["error"]["code"] == code
        with pytest.raises(Exception, match="4501"):
            await client.receive()


@pytest.mark.parametrize("kind", DOORS)
async def test_ids_come_back_from_bad_requests(kind, certificates):
    async with open_door(kind, certificates, limits=PATIENT) as door, door.connect() as client:
        for text, request_id in (
            ('{"id":7}', 7),
            ('{"id":"é","op":1}', "é"),
            ('{"op":"nope","id":3}', 3),
            ('{"op":"auth","token":[],"id":4}', 4),
            ('{"op":"ping","x":1e999,"id":5}', 5),
            ('{"op":"ping","id":1.5}', None),
            ('{"op":"ping","id":' + BIG + "}", None),
            ('{"op":"ping","id":6', None),
        ):
            await client.socket.send_message(text)
            reply = await client_reply(client)
            assert reply["op"] == "error"
            assert reply.get("id") == request_id, text


@pytest.mark.parametrize("text", [token(4) + "\x00", "é", "a.b.c", "." * 60_000, "\ud83d\ude00"])
async def test_an_odd_token_is_a_bad_one(certificates, text):
    async with open_door("native", certificates) as door, door.connect() as client:
        await client.socket.send_message(json.dumps({"op": "auth", "id": 1, "token": text}))
        reply = await client_reply(client)
        assert (reply["id"], reply["error"]["code"]) == (1, "bad_token")
        with pytest.raises(Exception, match="4500"):
            await client.receive()
