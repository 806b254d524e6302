"""The session: every message has exactly one reply, and nothing that a peer says raises."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.sessions import NOW, answer, make

from trading_push import ErrorCode, Principal
from trading_push.errors import CloseCode
from trading_push.protocol.actions import Subscribe
from trading_push.protocol.session import Session
from trading_push.settings.schema import Limits


def ask(session: Session, **message: Any) -> dict[str, Any]:
    [reply], ends = answer(session, json.dumps(message))
    assert not ends
    return reply


def test_auth_is_answered_as_the_protocol_says():
    assert ask(make(), op="auth", id=1, token="good 4") == {
        "op": "auth",
        "id": 1,
        "ok": True,
        "user": "4",
        "conn": "c1",
        "expires_in": 900,
        "heartbeat_s": 15,
    }


def test_before_authentication_only_auth_and_ping_are_served():
    session = make()
    assert ask(session, op="ping", id="p") == {"op": "pong", "id": "p", "ts": 1_000_000}
    for op in ("subscribe", "unsubscribe"):
        assert ask(session, op=op, args=[])["error"]["code"] == "not_authenticated"
    assert ask(session, op="list", id=3) == {
        "op": "error",
        "id": 3,
        "ok": False,
        "error": {
            "code": "not_authenticated",
            "message": "send `auth` with a token first",
            "retryable": False,
        },
    }


@pytest.mark.parametrize(
    ("token", "code", "retryable", "close", "reason"),
    [
        ("bad", "bad_token", False, 4500, "bad_token"),
        ("expired", "token_expired", False, 4003, "token_expired"),
        ("not yet", "bad_token", True, 4003, "not valid yet"),
    ],
)
def test_a_first_auth_that_fails_is_the_end(token, code, retryable, close, reason):
    [reply], [end] = answer(make(), json.dumps({"op": "auth", "id": 7, "token": token}))
    assert (reply["op"], reply["id"], reply["ok"]) == ("error", 7, False)
    assert reply["error"]["code"] == code
    assert reply["error"]["retryable"] is retryable
    assert (end.code, end.reason) == (close, reason)


def test_a_failed_renewal_leaves_the_session_as_it_was():
    session = make("4")
    [reply], ends = answer(session, json.dumps({"op": "auth", "token": "expired"}))
    assert reply["error"]["code"] == "token_expired"
    assert not ends
    assert session.user == "4"
    assert ask(session, op="auth", token="good 5")["error"]["code"] == "forbidden"
    assert session.user == "4"


def test_a_renewal_extends_and_never_shortens():
    session = make("4")
    session.authenticated(None, Principal("4", 5000.0))
    assert session.principal.expires_at == 5000.0
    session.authenticated(None, Principal("4", 1200.0))
    assert session.principal.expires_at == 5000.0


def test_subscribe_item_by_item():
    reply = ask(
        make("4"),
        op="subscribe",
        id=2,
        args=[
            "balance",
            "ticker.btcusdt",
            {"channel": "positions", "max_hz": 2},
            "nope",
            "pnl_4",
            "pnl_5",
            "ticker_ETHUSDT_4",
            "ticker.NOPE",
            {"channel": "orders", "max_hz": 0},
            {"channel": "orders", "x": 1},
            7,
            "orders",
        ],
    )
    assert (reply["op"], reply["id"], reply["ok"]) == ("subscribe", 2, False)
    seen = [(r["channel"], r["ok"] or r["error"]["code"]) for r in reply["results"]]
    assert seen == [
        ("balance", True),
        ("ticker.BTCUSDT", True),
        ("positions", True),
        ("nope", "unknown_channel"),
        ("pnl", True),
        ("pnl_5", "forbidden"),
        ("ticker.ETHUSDT", True),
        ("ticker.NOPE", "unknown_channel"),
        ("orders", "bad_request"),
        ("orders", "bad_request"),
        (None, "bad_request"),
        ("orders", "too_many_subscriptions"),
    ]
    assert reply["results"][2]["max_hz"] == 2


def test_subscribing_twice_starts_no_second_stream_and_list_tells():
    session = make("4")
    assert ask(session, op="subscribe", args=["pnl", "ticker.BTCUSDT"])["ok"]
    [action] = session.receive('{"op":"subscribe","args":["pnl",{"channel":"pnl","max_hz":3}]}')
    assert isinstance(action, Subscribe)
    assert action.wanted == ()
    assert [(topic.channel, hz) for topic, hz in action.throttled] == [("pnl", 3.0)]
    assert action.reply.ok
    assert ask(session, op="list", id=4)["channels"] == ["pnl", "ticker.BTCUSDT"]


def test_unsubscribing_what_is_not_subscribed_succeeds():
    session = make("4")
    reply = ask(session, op="unsubscribe", id=3, args=["pnl", "ticker.XYZ", "nope"])
    assert [r["ok"] for r in reply["results"]] == [True, True, False]


@pytest.mark.parametrize(
    ("message", "code", "request_id"),
    [
        ("{", "bad_json", None),
        ('{"op":"ping","id":NaN}', "bad_json", None),
        ("[" * 30_000, "bad_request", None),
        ('{"op":"ping","id":7,"deep":' + "[" * 30_000 + "]" * 30_000 + "}", "bad_json", None),
        ('{"op":"ping","id":1e999}', "bad_request", None),
        ('{"op":"ping","id":' + "9" * 5000 + "}", "bad_request", None),
        ('{"op":"ping","id":"\\ud800"}', "bad_json", None),
        ('{"op":"ping","id":' + json.dumps("x" * 65) + "}", "bad_request", None),
        ('{"op":"ping","id":9007199254740993}', "bad_request", None),
        ('{"op":"ping","id":7,"extra":1}', "bad_request", 7),
        ('{"op":"auth","id":"a"}', "bad_request", "a"),
        ('{"op":"auth","id":"a","token":5}', "bad_request", "a"),
        ('{"op":"dance","id":"a"}', "unknown_op", "a"),
        ('{"id":"a"}', "bad_request", "a"),
        ('{"op":5,"id":"a"}', "bad_request", "a"),
        ("[]", "bad_request", None),
        ("null", "bad_request", None),
        ("", "bad_json", None),
    ],
)
def test_a_bad_message_is_answered_with_its_id(message, code, request_id):
    [reply], ends = answer(make("4"), message)
    assert (reply["op"], reply.get("id"), reply["ok"]) == ("error", request_id, False)
    assert reply["error"]["code"] == code
    assert not ends


def test_of_duplicate_keys_the_last_counts():
    assert ask_text(make("4"), '{"op":"list","op":"ping","id":1,"id":2}')["id"] == 2


def ask_text(session: Session, text: str) -> dict[str, Any]:
    [reply], _ = answer(session, text)
    return reply


def test_ten_bad_messages_in_a_row_are_the_end():
    session = make("4")
    for _ in range(9):
        assert answer(session, "{")[1] == []
    answer(session, '{"op":"subscribe","args":["nope"]}')  # refused, not bad: the row is broken
    for _ in range(9):
        assert answer(session, '{"op":"dance"}')[1] == []
    replies, [end] = answer(session, "[]")
    assert len(replies) == 1
    assert end.code == CloseCode.TOO_MANY_BAD_REQUESTS


def test_a_binary_message_is_the_end():
    assert [end.code for end in answer(make("4"), b"{}")[1]] == [CloseCode.UNSUPPORTED_DATA]


@pytest.mark.parametrize(
    "name",
    [
        "Balance", "BALANCE", "balance ", " balance", "balance\n", "balаnce",  # a Cyrillic letter
        "ｂalance", "balance_5", "balance_04", "balance_4 ", "balance_４", "balance_4_4",
        "ticker.", "ticker", "ticker.BTCUSDT_", "ticker. A", "ticker.A*", "ticker.A\n",
        "ticker." + "A" * 65, "ticker_BTCUSDT_5", "", "ticker.BTC\u00a0USDT", "_4", "news_5",
    ],
)  # fmt: skip
def test_no_other_spelling_names_anything_of_another_user(name):
    session = make("4")
    [result] = ask(session, op="subscribe", args=[name])["results"]
    if name == "ticker.BTCUSDT_":
        assert result["ok"]  # an odd symbol, but a symbol
        return
    assert not result["ok"]
    assert result["error"]["code"] in ("unknown_channel", "forbidden")
    assert not session.topics


# --- properties -------------------------------------------------------------------------------

REAL = ["balance", "positions", "pnl", "orders", "news", "ticker.BTCUSDT", "ticker.eth"]
names = st.sampled_from([*REAL, "pnl_4"]) | st.text(max_size=20)
items = (
    names
    | st.fixed_dictionaries(
        {"channel": names},
        optional={
            "max_hz": st.sampled_from([0, 1, 2.5, 1000, 1001, -1, True, None]),
            "since": st.fixed_dictionaries({"epoch": st.text(max_size=5), "seq": st.integers()}),
            "extra": st.none(),
        },
    )
    | st.integers()
)
ids = st.integers() | st.text(max_size=70) | st.none() | st.floats(allow_nan=False)
requests = st.fixed_dictionaries(
    {"op": st.sampled_from(["auth", "subscribe", "unsubscribe", "list", "ping", "dance"])},
    optional={
        "id": ids,
        "args": st.lists(items, max_size=8),
        "token": st.sampled_from(["good", "good 4", "good 5", "bad", "expired"]),
    },
).map(json.dumps)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3)
    ),
    max_leaves=10,
).map(json.dumps)
TOKENS = ["good", "good 5", "bad", "expired"]
well_formed = (
    st.builds(dict, op=st.sampled_from(["subscribe", "unsubscribe"]), args=st.lists(items))
    | st.builds(dict, op=st.just("auth"), token=st.sampled_from(TOKENS))
    | st.builds(dict, op=st.just("subscribe"), args=st.lists(st.sampled_from(REAL), min_size=2))
    | st.builds(dict, op=st.sampled_from(["list", "ping"]), id=st.integers(0, 9))
).map(json.dumps)
messages = (
    well_formed
    | requests
    | json_values
    | st.text(st.characters(codec=None))
    | st.binary(max_size=20)
)

seen_codes: set[str] = set()
seen_ops: set[str] = set()


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(messages, max_size=25), st.booleans())
def test_every_message_has_exactly_one_reply(conversation, authenticated):
    session = make("4" if authenticated else None, limits=Limits(subscriptions=2))
    for message in conversation:
        replies, ends = answer(session, message)
        if isinstance(message, bytes):
            assert replies == []
        else:
            assert len(replies) == 1
            note(replies[0])
        assert len(session.topics) <= 2
        if ends:
            assert len(ends) == 1
            assert isinstance(message, bytes) or ends[0].code in (4003, 4500, 4501)
            return


def note(reply: dict[str, Any]) -> None:
    seen_ops.add(reply["op"])
    if "error" in reply:
        seen_codes.add(reply["error"]["code"])
    for result in reply.get("results", ()):
        if "error" in result:
            seen_codes.add(result["error"]["code"])


def test_the_properties_have_met_every_op_and_every_code_of_a_session():
    test_every_message_has_exactly_one_reply()
    assert seen_ops == {"auth", "subscribe", "unsubscribe", "list", "pong", "error"}
    # `rate_limited` and `internal` are not a session's to give.
    assert seen_codes == {code.value for code in ErrorCode} - {"rate_limited", "internal"}


def test_messages_over_the_rate_are_refused_and_then_end_it():
    limits = Limits(messages_per_s=2, messages_burst=6)
    session = make("4", limits)
    for _ in range(6):
        replies, _ = answer(session, '{"op":"ping"}')
        assert replies[0]["op"] == "pong"
    for number in range(6):
        replies, ends = answer(session, f'{{"op":"ping","id":{number}}}')
        assert (replies[0]["id"], replies[0]["error"]["code"]) == (number, "rate_limited")
        assert not ends
    [reply], [end] = answer(session, '{"op":"ping","id":7}')
    assert reply["error"]["code"] == "rate_limited"
    assert end.code == 4501
    NOW[0] += 3  # six in three seconds are two in one
    replies, ends = answer(session, '{"op":"ping"}')
    assert replies[0]["op"] == "pong"
    assert not ends


def test_bad_messages_are_counted_against_the_rate_too():
    session = make("4", Limits(messages_per_s=1, messages_burst=2, bad_messages=10))
    codes = [answer(session, "rubbish")[0][0]["error"]["code"] for _ in range(4)]
    assert codes == ["bad_json", "bad_json", "rate_limited", "rate_limited"]


def test_items_and_large_answers_cost():
    limits = Limits(messages_per_s=20, messages_burst=60, subscriptions=1000)
    NOW[0] = 100.0
    session = make("4", limits)
    symbols = [f"ticker.S{number}" for number in range(1000)]
    for _ in range(5):  # eleven messages each
        assert ask(session, op="subscribe", args=symbols[:200])["ok"]
    assert ask(session, op="unsubscribe", args=symbols[:80])["ok"]  # and five more
    assert ask(session, op="ping")["error"]["code"] == "rate_limited"
    NOW[0] += 3
    # One that costs more than a window has is served by an untouched one, and by no other.
    small = make("4", Limits(messages_per_s=1, messages_burst=2, subscriptions=1000))
    assert ask(small, op="subscribe", args=symbols[:100])["ok"]
    assert ask(small, op="ping")["error"]["code"] == "rate_limited"
    for _ in range(2):  # six messages take three windows of two
        NOW[0] += 2
        assert ask(small, op="ping")["error"]["code"] == "rate_limited"
    NOW[0] += 2
    assert ask(small, op="ping")["op"] == "pong"
    # What an answer turns out to weigh is paid by the windows that follow, and no longer.
    session.charge(65_536)  # as much as a message may have anyway
    session.charge(130 * 65_536)
    waited = 0
    while ask(session, op="ping")["op"] == "error":
        NOW[0] += 3
        waited += 3
    assert waited == 6
    NOW[0] = 0.0
