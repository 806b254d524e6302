"""The asyncio client: for FastAPI, notebooks, and whatever else runs on asyncio.

::

    async with connect(url, token, channels=["balance", "ticker.BTCUSDT"]) as client:
        async for push in client:
            print(push.channel, push.data)

It needs the library `websockets` (extra `aio`). What ends it for good is raised, on entering or
from the loop, as `trading_push.client` says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from trading_push.client import ending
from trading_push.client.core import REPLY_TIMEOUT_S, ClientCore
from trading_push.client.ending import ConnectionLost
from trading_push.client.messages import Push
from trading_push.client.tokens import Token, next_token
from trading_push.client.websockets_link import (
    CLOSE_TIMEOUT_S,
    HandshakeRejected,
    judged,
    options,
)
from trading_push.transport import websocket_url

# isort: split
# Behind the link, which says what to install.
import websockets.asyncio.client
from websockets.exceptions import InvalidStatus

__all__ = ["Client", "connect"]


class _Connection(websockets.asyncio.client.ClientConnection):
    """A connection that tells when a byte was last heard, and follows no redirect."""

    heard_at = 0.0
    """When a byte last came, pings included, on the loop's clock."""

    async def handshake(self, *args: Any, **options: Any) -> None:
        try:
            await super().handshake(*args, **options)
        except InvalidStatus as error:
            raise HandshakeRejected(error) from error

    def data_received(self, data: bytes) -> None:
        self.heard_at = self.loop.time()
        super().data_received(data)


class Client:
    """The pushes of a connection that is kept alive; made by `connect`."""

    def __init__(
        self, url: str, token: Token, channels: Sequence[str], offered: bool, attempts: int
    ) -> None:
        self._url = websocket_url.parse(url, ending.not_a_url(url)).text
        self._token = token
        self._core = ClientCore(
            url,
            channels,
            offered=offered,
            attempts=attempts,
            can_renew=not isinstance(token, str),
            back_off=ending.back_off,
        )
        self._now = asyncio.get_running_loop().time
        # Set when there may be something to take, for whoever waits for it.
        self._news = asyncio.Event()
        # Set when the first connection has come about, or the client is over.
        self._entered = asyncio.Event()
        # Around everything of `_run`; it expires when the block is left.
        self._until_left = asyncio.timeout(None)
        # Whether a connection is dropped at once, without a polite close.
        self._is_cut = False

    @property
    def user(self) -> str | None:
        """Who the server says we are."""
        return self._core.user

    @property
    def is_connected(self) -> bool:
        """Whether the channels are subscribed just now."""
        return self._core.is_connected

    @property
    def trouble(self) -> str | None:
        """Why the last connection ended; None while one is of use."""
        return self._core.trouble

    def __aiter__(self) -> Client:
        return self

    async def __anext__(self) -> Push:
        """Return the next push. Cancellation loses none.

        Raises:
            TradingPushError: What ended the client for good.
        """
        while True:
            push = self._core.take()
            if push is not None:
                return push
            if self._core.is_over:
                if self._core.error is not None:
                    raise self._core.error from None
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()

    # --- the client's own task --------------------------------------------------------------------

    async def _run(self) -> None:
        """Keep connected until left, or until it is over for good."""
        core = self._core
        try:
            async with self._until_left:
                while not core.is_over:
                    core.connecting()
                    try:
                        await self._connect_and_talk()
                    except Exception as error:
                        why = judged(error, has_succeeded=core.has_succeeded)
                        core.lost(why, self._now())
                    if not core.is_over:
                        await asyncio.sleep(core.retry_at - self._now())
        except TimeoutError:
            pass  # the block was left
        finally:
            if not core.is_over:  # somebody else has cancelled the task
                core.leave()
            self._progressed()

    def _progressed(self) -> None:
        """Wake who waits for what the core has by now."""
        if self._core.has_succeeded or self._core.is_over:
            self._entered.set()
        self._news.set()

    async def _connect_and_talk(self) -> None:
        """Live through one connection, which ends by an exception."""
        core = self._core
        token = core.check(await next_token(self._token))
        socket = await websockets.asyncio.client.connect(
            self._url, create_connection=_Connection, **options()
        )
        assert isinstance(socket, _Connection)
        try:
            core.opened(token, self._now())
            async with asyncio.TaskGroup() as tasks:
                await self._read(socket, tasks)
        finally:
            await self._close(socket)

    async def _read(self, socket: _Connection, tasks: asyncio.TaskGroup) -> NoReturn:
        """Hand what the server sends to the core, which ends the connection by raising."""
        core = self._core
        while True:
            await self._send(socket)
            text: str | bytes | None = None
            try:
                async with asyncio.timeout_at(core.deadline):
                    text = await socket.recv()
            except TimeoutError:
                core.tick(socket.heard_at, self._now())
                continue
            core.received(text, self._now())
            self._progressed()
            if core.renewal.is_due():
                tasks.create_task(self._renew(socket))

    async def _renew(self, socket: _Connection) -> None:
        """Authenticate again on the living connection, as soon as there is another token."""
        core = self._core
        while True:
            await asyncio.sleep(core.renewal.at - self._now())
            core.renewal.asking(self._now())
            try:
                token = await next_token(self._token)
            except ConnectionLost:
                core.renewal.failed(self._now())
            else:
                core.renew(token)
                await self._send(socket)
                return

    async def _send(self, socket: _Connection) -> None:
        for message in self._core.outgoing():
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                await socket.send(message)

    async def _close(self, socket: _Connection) -> None:
        """Close politely, for a second at most; cancellation drops the connection at once."""
        try:
            if not self._is_cut:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await socket.close()
        except TimeoutError:
            pass
        finally:
            socket.transport.abort()

    # --- leaving ----------------------------------------------------------------------------------

    async def _end(self, task: asyncio.Task[None], *, at_once: bool) -> None:
        """End the client's task; cancellation ends it at once, and is raised when it has ended."""
        self._core.leave()
        if task.done():
            return
        if at_once:
            self._is_cut = True
            task.cancel()
        else:
            self._until_left.reschedule(self._now())
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            self._is_cut = True
            task.cancel()
            await asyncio.wait([task])
            raise


@asynccontextmanager
async def connect(
    url: str,
    token: Token,
    *,
    channels: Sequence[str] = (),
    offered: bool = False,
    attempts: int = 3,
) -> AsyncGenerator[Client]:
    """Connect, authenticate and subscribe; then stay connected until the block is left.

    Args:
        url: Where the server is, `ws://` or `wss://`.
        token: The token, or a function that gives one (sync or async). It is called for each
            connection, and when the server says that the present token is about to expire. What it
            raises is answered with another try after the back-off; `Refused` or
            `AuthenticationError` ends the client.
        channels: What to subscribe.
        offered: Subscribe also to each channel that the server says it offers; tickers are not
            among them.
        attempts: How many tries the first connection has. Later ones are tried for ever.

    Raises:
        ConfigurationError: The URL is not one of a WebSocket.
        AuthenticationError, Refused, Unreachable: On entering, where it does not come about.

    Leaving closes the connection politely, for a second at most; cancellation ends it at once.
    Either has ended the client's task.
    """
    client = Client(url, token, channels, offered, attempts)
    task = asyncio.create_task(client._run(), name="trading_push client")
    is_cancelled = False
    try:
        await client._entered.wait()
        if client._core.error is not None and not client._core.has_succeeded:
            raise client._core.error
        yield client
    except asyncio.CancelledError:
        is_cancelled = True
        raise
    finally:
        await client._end(task, at_once=is_cancelled)
