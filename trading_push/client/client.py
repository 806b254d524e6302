"""The trio client: one connection kept alive, its channels resubscribed where they left off.

::

    async with open_client(url, token, channels=["balance", "ticker.BTCUSDT"]) as client:
        async for push in client:
            print(push.channel, push.data)

What ends it for good is raised, on entering or from the loop::

    ConfigurationError    the URL is not one of a WebSocket
    AuthenticationError   the token is refused, or has expired and no other is to be had
    Refused               the server said not to come back, or has no such channel
    Unreachable           the first tries got no answer

Anything else that ends a connection is answered with another one, after a back-off. `core` decides,
and `ending` has the rules.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import trio

from trading_push.client import ending
from trading_push.client.connection import ClientConnection
from trading_push.client.core import ClientCore
from trading_push.client.messages import Push
from trading_push.client.tokens import Token
from trading_push.transport.outbound import Address

__all__ = ["Client", "open_client"]


class Client:
    """The pushes of a connection that is kept alive; made by `open_client`."""

    def __init__(
        self, url: str, token: Token, channels: Sequence[str], offered: bool, attempts: int
    ) -> None:
        self._address = Address.of(url, ending.not_a_url(url))
        self._token = token
        self._core = ClientCore(
            url,
            channels,
            offered=offered,
            attempts=attempts,
            can_renew=not isinstance(token, str),
            back_off=ending.back_off,
        )
        # Whoever waits for the next push.
        self._waiting = trio.lowlevel.ParkingLot()
        # Set when the first connection has come about, or the client is over.
        self._entered = trio.Event()
        # Around whatever is to be cancelled when the block is left; replaced again and again.
        self._scope = trio.CancelScope()
        # The connection that there is now, or was last.
        self._connection: ClientConnection | None = None

    @property
    def heard_at(self) -> float:
        """When the server was last heard of, on trio's clock; minus infinity for not at all.

        On a connection that is ready, a channel that is `live` was confirmed at that moment.
        """
        return -math.inf if self._connection is None else self._connection.heard_at

    def is_of_events(self, channel: str) -> bool:
        """Whether each push of a channel is an event of its own, as far as the server has said."""
        return self._core.is_of_events(channel)

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
        await trio.lowlevel.checkpoint()
        while True:
            push = self._core.take()
            if push is not None:
                return push
            if self._core.is_over:
                if self._core.error is not None:
                    raise self._core.error from None
                raise StopAsyncIteration
            await self._waiting.park()

    def _leave(self) -> None:
        self._core.leave()
        self._scope.cancel()
        self._waiting.unpark_all()

    def _scope_until_left(self) -> trio.CancelScope:
        """Make a scope that is cancelled when the client is left."""
        self._scope = trio.CancelScope()
        if self._core.is_over:
            self._scope.cancel()
        return self._scope

    async def _run(self) -> None:
        """Keep connected until left, or until it is over for good."""
        core = self._core
        while not core.is_over:
            core.connecting()
            connection = ClientConnection(self._address, self._token, core, self._progressed)
            self._connection = connection
            try:
                await connection.run(self._scope_until_left())
            except Exception as error:
                core.lost(error, trio.current_time())
            if not core.is_over:
                with self._scope_until_left():
                    await trio.sleep_until(core.retry_at)
        self._entered.set()
        self._waiting.unpark_all()

    def _progressed(self) -> None:
        """Wake who waits for what the core has by now."""
        if self._core.has_succeeded:
            self._entered.set()
        self._waiting.unpark_all()


@asynccontextmanager
async def open_client(
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

    The body's own exceptions come out as they are, not in a group. Leaving closes the connection
    politely, for a second at most; cancellation ends it at once. Either leaves nothing behind.
    """
    client = Client(url, token, channels, offered, attempts)
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client._run)
            try:
                await client._entered.wait()
                if client._core.error is not None and not client._core.has_succeeded:
                    raise client._core.error
                yield client
            except trio.Cancelled:
                raise
            except BaseException as error:
                raised = error  # and not out of the nursery, which would cancel a polite close
            finally:
                client._leave()
    except BaseExceptionGroup:
        # What the body raised comes out alone. Where it was cancelled, the group says by what.
        if raised is None:
            raise
    if raised is not None:
        raise raised
