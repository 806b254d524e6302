"""Hostile JSON at every endpoint: a typed error for each message, and the connection lives."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import trio

from harness.endpoints import open_endpoint
from harness.json_cases import BIG, GOOD, ITEMS, REFUSED, every_case
from harness.sessions import answer, make
from harness.support import token

from trading_push.settings.schema import Limits

ENDPOINTS = ["linked", "plain", "native", "memory"]
# Each message is answered for itself: neither the rate nor the row of bad ones ends it.
PATIENT = Limits(bad_messages=10**6, messages_burst=10**6)
ERROR_KEYS = {"code", "message", "retryable"}


@pytest.fixture(autouse=True)
def no_trace(caplog):
    """Nothing that a peer says shows a trace."""
    caplog.set_level(logging.INFO)
    yield
    assert not [record for record in caplog.get_records("call") if record.exc_info]


@pytest.mark.parametrize("user", [None, "4"], ids=["a stranger", "a user"])
@pytest.mark.parametrize("kind", ENDPOINTS)
async def test_each_bad_message_has_its_typed_reply_and_the_connection_lives(
    kind, certificates, user
):
    async with (
        open_endpoint(kind, certificates, limits=PATIENT) as endpoint,
        endpoint.connect(user, *([] if user is None else ["balance", "ticker.A"])) as client,
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


@pytest.mark.parametrize("kind", ENDPOINTS)
async def test_what_is_odd_and_good_is_served(kind, certificates):
    async with (
        open_endpoint(kind, certificates, limits=PATIENT) as endpoint,
        endpoint.connect() as client,
    ):
        for name, (text, request_id) in GOOD.items():
            await client.socket.send_message(text)
            reply = await client_reply(client)
            assert (reply["op"], reply.get("id")) == ("pong", request_id), name


@pytest.mark.parametrize("kind", ENDPOINTS)
async def test_items_fail_one_by_one(kind, certificates):
    async with (
        open_endpoint(kind, certificates, limits=PATIENT) as endpoint,
        endpoint.connect(4) as client,
    ):
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
@pytest.mark.parametrize("kind", ENDPOINTS)
async def test_the_tenth_in_a_row_is_the_last(kind, certificates, code):
    text = next(iter(REFUSED[code].values()))
    async with open_endpoint(kind, certificates) as endpoint, endpoint.connect(4) as client:
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


@pytest.mark.parametrize("kind", ENDPOINTS)
async def test_ids_come_back_from_bad_requests(kind, certificates):
    async with (
        open_endpoint(kind, certificates, limits=PATIENT) as endpoint,
        endpoint.connect() as client,
    ):
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
    async with open_endpoint("native", certificates) as endpoint, endpoint.connect() as client:
        await client.socket.send_message(json.dumps({"op": "auth", "id": 1, "token": text}))
        reply = await client_reply(client)
        assert (reply["id"], reply["error"]["code"]) == (1, "bad_token")
        with pytest.raises(Exception, match="4500"):
            await client.receive()
