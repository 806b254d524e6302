"""Litestar's channels with the memory backend, on uvicorn: a subscriber of each topic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common import TOPICS, obey, payload
from litestar import Litestar, WebSocket, websocket
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.memory import MemoryChannelsBackend
from on_uvicorn import run

plugin = ChannelsPlugin(backend=MemoryChannelsBackend(), channels=TOPICS)


@websocket("/ws")
async def handler(socket: WebSocket, channels: ChannelsPlugin) -> None:
    await socket.accept()
    async with (
        channels.start_subscription(TOPICS) as subscriber,
        subscriber.run_in_background(socket.send_text),
    ):
        while (await socket.receive())["type"] != "websocket.disconnect":
            continue


async def publish(topics: list[str], size: int) -> None:
    for symbol in topics:
        plugin.publish(payload(symbol, size), symbol)


@asynccontextmanager
async def lifespan(app: Litestar) -> AsyncIterator[None]:
    task = asyncio.create_task(obey(publish))
    yield
    task.cancel()


run(Litestar([handler], plugins=[plugin], lifespan=[lifespan]))
