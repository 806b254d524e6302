"""`websockets.broadcast`, compression off, as the library's guide to broadcasting shows it."""

from __future__ import annotations

import asyncio

from common import obey, payload, say
from websockets.asyncio.server import ServerConnection, broadcast, serve

clients: set[ServerConnection] = set()


async def handler(websocket: ServerConnection) -> None:
    clients.add(websocket)
    try:
        await websocket.wait_closed()
    finally:
        clients.remove(websocket)


async def publish(topics: list[str], size: int) -> None:
    for symbol in topics:
        broadcast(clients, payload(symbol, size))


async def main() -> None:
    async with serve(handler, "127.0.0.1", 0, compression=None, backlog=4096) as server:
        say(port=server.sockets[0].getsockname()[1])
        await obey(publish)


asyncio.run(main())
