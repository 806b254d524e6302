"""The Python clients, each in its own world, driven in the same way from a test on trio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import trio

from trading_push.client import aio, sync
from trading_push.client import client as on_trio
from trading_push.client.messages import Push

CLIENTS = ["trio", "aio", "sync"]


@attrs.frozen
class UnderTest:
    """A client that is connected; `client` is the object that an application has."""

    client: Any
    next: Any

    async def take(self, count: int) -> list[Push]:
        return [await self.next() for _ in range(count)]


async def in_thread(function: Any, *args: Any) -> Any:
    """Call what blocks; a test that is over does not wait for it."""
    return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True)


class Loop:
    """An asyncio loop in a thread of its own, which must have no task left in the end."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    async def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine there; a test that is cancelled cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return await in_thread(future.result)
        except trio.Cancelled:
            future.cancel()
            raise

    def close(self) -> None:
        async def others() -> list[str]:
            await asyncio.sleep(0)  # who has just been cancelled ends
            return [str(each) for each in asyncio.all_tasks() - {asyncio.current_task()}]

        left = asyncio.run_coroutine_threadsafe(others(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        assert left == []


@asynccontextmanager
async def opened(kind: str, url: str, token: Any, **options: Any) -> AsyncIterator[UnderTest]:
    """Open a client of that kind; leave it as an application does."""
    if kind == "trio":
        async with on_trio.open_client(url, token, **options) as client:
            yield UnderTest(client, client.__anext__)
    elif kind == "aio":
        loop = Loop()
        try:
            manager = aio.connect(url, token, **options)
            client = await loop.call(manager.__aenter__())

            async def next_push() -> Push:
                return await anext(client)

            try:
                yield UnderTest(client, lambda: loop.call(next_push()))
            finally:
                with trio.CancelScope(shield=True):
                    await loop.call(manager.__aexit__(None, None, None))
        finally:
            loop.close()
    else:
        client = await in_thread(partial(sync.connect, url, token, **options))
        ended = object()

        async def next_of() -> Push:
            push = await in_thread(next, client, ended)
            assert push is not ended
            return push

        try:
            yield UnderTest(client, next_of)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(client.close)
            thread = client._driver._thread
            assert not thread.is_alive()
