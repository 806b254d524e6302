"""FastAPI on uvicorn with uvloop: the connection manager of FastAPI's page on WebSockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common import obey, payload
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from on_uvicorn import run


class ConnectionManager:
    def __init__(self) -> None:
        self.active: list[WebSocket] = []

    async def connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        self.active.append(websocket)

    def disconnect(self, websocket: WebSocket) -> None:
        self.active.remove(websocket)

    async def broadcast(self, text: str) -> None:
        for connection in self.active:
            await connection.send_text(text)


manager = ConnectionManager()


async def publish(topics: list[str], size: int) -> None:
    for symbol in topics:
        await manager.broadcast(payload(symbol, size))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    task = asyncio.create_task(obey(publish))
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.websocket("/ws")
async def endpoint(websocket: WebSocket) -> None:
    await manager.connect(websocket)
    try:
        while True:
            await websocket.receive_text()
    except WebSocketDisconnect:
        manager.disconnect(websocket)


run(app)
