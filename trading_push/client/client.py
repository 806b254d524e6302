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

Anything else that ends a connection is answered with another one, after a back-off. `ending` has
the rules.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from trading_push.client import ending
from trading_push.client.connection import ClientConnection, Subscription, Token, Tokens
from trading_push.client.ending import ConnectionLost, Unreachable
from trading_push.client.messages import Push
from trading_push.transport.outbound import Address

__all__ = ["Client", "open_client"]

BUFFERED_PUSHES: Final = 64


class Client:
    """The pushes of a connection that is kept alive; made by `open_client`."""

    def __init__(
        self, url: str, token: Token, channels: Sequence[str], offered: bool, attempts: int
    ) -> None:
        self._address = Address.of(
            url, f"{url[:200]!r} is no WebSocket URL: give one like ws://127.0.0.1:8000/ws"
        )
        self._url = url
        self._tokens = Tokens(token)
        # Whether to subscribe to all that the server offers, too.
        self._offered = offered
        # How many tries the first connection has.
        self._attempts = attempts
        # Where each channel stands, by its name; kept from connection to connection.
        self._subscriptions = {name: Subscription() for name in channels}
        self._next_id = 1
        # From the connection to whoever iterates; its end is the end of the client.
        self._pushes_in, self._pushes = trio.open_memory_channel[Push](BUFFERED_PUSHES)
        # Set when the first connection has come about, or the client is over.
        self._entered = trio.Event()
        # What ended the client for good.
        self._error: Exception | None = None
        # Set once, when the block is left.
        self._left = False
        # Around whatever is to be cancelled when the block is left; replaced again and again.
        self._scope = trio.CancelScope()
        # The connection that there is now, or was last.
        self._connection: ClientConnection | None = None
        self.user: str | None = None
        """Who the server says we are."""
        self.is_connected = False
        """Whether the channels are subscribed just now."""
        self.trouble: str | None = None
        """Why the last connection ended; None while one is of use."""

    def __aiter__(self) -> Client:
        return self

    async def __anext__(self) -> Push:
        """Return the next push. Cancellation loses none.

        Raises:
            TradingPushError: What ended the client for good.
        """
        try:
            return await self._pushes.receive()
        except trio.EndOfChannel:
            if self._error is not None:
                raise self._error from None
            raise StopAsyncIteration from None

    @property
    def heard_at(self) -> float:
        """When the server was last heard of, on trio's clock; minus infinity for not at all.

        On a connection that is ready, a channel that is `live` was confirmed at that moment.
        """
        return -math.inf if self._connection is None else self._connection.heard_at

    def is_of_events(self, channel: str) -> bool:
        """Whether each push of a channel is an event of its own, as far as the server has said."""
        subscription = self._subscriptions.get(channel)
        return subscription is not None and subscription.is_of_events

    def _leave(self) -> None:
        self._left = True
        self._scope.cancel()

    def _scope_until_left(self) -> trio.CancelScope:
        """Make a scope that is cancelled when the client is left."""
        self._scope = trio.CancelScope()
        if self._left:
            self._scope.cancel()
        return self._scope

    async def _run(self) -> None:
        """Keep connected until left, or until it is over for good."""
        try:
            await self._keep_connected()
        except Exception as error:
            self._error = error  # for whoever reads the pushes
        self.is_connected = False
        self._entered.set()
        self._pushes_in.close()

    async def _keep_connected(self) -> None:
        failures = 0
        while not self._left:
            # One connection, to its end.
            after_s: float | None = None
            connection = ClientConnection(
                self._address,
                self._tokens,
                self._subscriptions,
                self._next_id,
                self._pushes_in,
                offered=self._offered,
                authenticated=self._authenticated,
                ready=self._ready,
            )
            self._connection = connection
            scope = self._scope_until_left()
            try:
                await connection.run(scope, has_succeeded=self._entered.is_set())
            except ConnectionLost as lost:
                self.trouble, after_s = str(lost), lost.after_s
            self._next_id = connection.next_id
            self.is_connected = False
            # How it went says how long to wait for the next.
            ready_at = connection.ready_at
            if ready_at is not None and trio.current_time() - ready_at >= ending.LASTING_S:
                failures = 0
            failures += 1
            if not self._entered.is_set() and failures >= self._attempts:
                raise Unreachable(f"cannot reach {self._url}: {self.trouble}")
            with self._scope_until_left():
                await trio.sleep(ending.back_off(failures) if after_s is None else after_s)

    def _authenticated(self, user: str | None) -> None:
        self.user = user

    def _ready(self, is_complete: bool) -> None:
        self.is_connected = is_complete
        self.trouble = None
        self._entered.set()


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
                if client._error is not None:
                    raise client._error
                yield client
            except trio.Cancelled:
                raise
            except BaseException as error:
                raised = error  # and not out of the nursery, which would cancel a polite close
            finally:
                client._leave()
                client._pushes.close()  # a push that is not taken any more holds nothing up
    except BaseExceptionGroup:
        # What the body raised comes out alone. Where it was cancelled, the group says by what.
        if raised is None:
            raise
    if raised is not None:
        raise raised
