"""JSON of peers: what is refused, with which code, and what reads oddly and is good."""

from __future__ import annotations

import json
from typing import Any

BIG = "9" * 5000
DEEP = 30_000
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
    ('"ticker.A*B"', "unknown_channel"),
    ('"ticker.\\u0000"', "unknown_channel"),
    ('"ticker.' + "X" * 65 + '"', "unknown_channel"),
    ('"' + "x" * 5_000 + '"', "unknown_channel"),
    ('{"channel":"nope","channel":"balance"}', None),
    ('{"channel":"pnl","max_hz":1e3}', None),
    ('{"channel":"orders","max_hz":null,"since":null}', None),
]


def every_case() -> list[tuple[str, str, str]]:
    return [(code, name, text) for code, cases in REFUSED.items() for name, text in cases.items()]
