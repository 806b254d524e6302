"""Too many messages: refused with `rate_limited`, then closed with 4501, at every endpoint."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress

import pytest
import trio
import trio_websocket

from harness.endpoints import KINDS, open_endpoint
from harness.room import room
from harness.support import until

from trading_push.settings.schema import Limits, Settings


@pytest.mark.parametrize("kind", KINDS)
async def test_a_flood_is_refused_and_then_cut_and_the_others_are_served(kind, certificates):
    async with (
        open_endpoint(kind, certificates) as endpoint,
        endpoint.connect(5) as other,
        endpoint.connect(4) as client,
    ):
        replies: Counter[str] = Counter()
        async with trio.open_nursery() as nursery:
            for number in range(200):
                text = json.dumps({"op": "ping", "id": number})
                nursery.start_soon(_send, client.socket, text)
            with pytest.raises(trio_websocket.ConnectionClosed) as closed:
                while True:
                    reply = json.loads(await client.socket.get_message())
                    replies[reply["op"] if reply.get("ok", True) else reply["error"]["code"]] += 1
        assert (closed.value.reason.code, closed.value.reason.reason) == (4501, "too many messages")
        # `auth` was the first of the sixty.
        assert replies == {"pong": 59, "rate_limited": 61}
        assert (await other.request("list"))["channels"] == []
        await until(lambda: len(endpoint.service.context.connections) == 1)


async def _send(socket: trio_websocket.WebSocketConnection, text: str) -> None:
    with suppress(trio_websocket.ConnectionClosed):
        await socket.send_message(text)


async def test_what_was_refused_can_be_said_again_later(autojump_clock):
    settings = Settings(limits=Limits(messages_per_s=1, messages_burst=4))
    async with room(settings=settings) as here:
        peer, _ = await here.subscribed("balance")  # two messages
        assert [(await peer.request("ping"))["op"] for _ in range(3)] == ["pong", "pong", "error"]
        await trio.sleep(4)
        assert (await peer.request("ping"))["op"] == "pong"
