"""python-socketio, asgi mode on uvicorn: each client enters a room for each topic."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import socketio
from common import SIZE, TOPICS, message, obey
from on_uvicorn import run

EVENT = "update"
OVERHEAD = len(f'42["{EVENT}",]')

server = socketio.AsyncServer(async_mode="asgi")


@server.event
async def connect(sid: str, environ: dict[str, Any]) -> None:
    for symbol in TOPICS:
        await server.enter_room(sid, symbol)


async def publish(topics: list[str], size: int) -> None:
    for symbol in topics:
        value = message(symbol)
        missing = size - OVERHEAD - len(json.dumps({**value, "pad": ""}, separators=(",", ":")))
        await server.emit(EVENT, {**value, "pad": " " * max(0, missing)}, room=symbol)


tasks: list[asyncio.Task[None]] = []


async def start() -> None:
    tasks.append(asyncio.create_task(obey(publish)))


assert SIZE > OVERHEAD
run(socketio.ASGIApp(server, on_startup=start))
