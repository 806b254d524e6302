"""picows (Cython) on uvloop: the core API, a listener for each client, as its broadcast example."""

from __future__ import annotations

import uvloop
from common import obey, payload, say
from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

clients: set[WSTransport] = set()


class Listener(WSListener):
    def on_ws_connected(self, transport: WSTransport) -> None:
        clients.add(transport)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        clients.discard(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()


def welcome(request: WSUpgradeRequest) -> Listener:
    return Listener()


async def publish(topics: list[str], size: int) -> None:
    for symbol in topics:
        data = payload(symbol, size).encode()
        for transport in clients:
            transport.send(WSMsgType.TEXT, data)


async def main() -> None:
    server = await ws_create_server(welcome, "127.0.0.1", 0, backlog=4096)
    say(port=server.sockets[0].getsockname()[1])
    await obey(publish)


uvloop.run(main())
