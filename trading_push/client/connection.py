"""One connection of the client: handshake, auth, subscribe; then read, renew and ping.

What outlives a connection is handed in: the tokens, where each channel stands (`Subscription`),
and the queue of pushes. How a connection ended is judged in `ending`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn

import attrs
import trio
import trio_websocket

from trading_push.client import ending
from trading_push.client.ending import FINAL, ConnectionLost, Refused
from trading_push.client.messages import ErrorBody, Message, Push, encode, parse, push_of
from trading_push.errors import AuthenticationError, ErrorCode
from trading_push.protocol.messages import SUBPROTOCOL
from trading_push.transport.outbound import Address, OutboundWebSocket

__all__ = ["ClientConnection", "Subscription", "Token", "Tokens"]

NOTICE_MOST_S: Final = 60.0
"""The longest advice of a server, on when to come back, that is followed."""
REPLY_TIMEOUT_S: Final = 10.0
CONNECT_TIMEOUT_S: Final = 5.0
MESSAGE_BYTES: Final = 16 * 2**20
_AUTH_ID: Final = 0
"""The `id` of each `auth`; other requests count up from it."""

Token = str | Callable[[], str | Awaitable[str]]


class Tokens:
    """Where the tokens come from: one string, or the application's function.

    Args:
        token: The token, or the function.
    """

    def __init__(self, token: Token) -> None:
        self._token = token
        # The last token that the server called expired; the same one again ends the client.
        self._expired: str | None = None

    @property
    def can_change(self) -> bool:
        """Whether another token may be had."""
        return not isinstance(self._token, str)

    def expire(self, token: str) -> None:
        """Note that the server has called a token expired."""
        self._expired = token

    async def next(self) -> str:
        """Return the token for the next connection or renewal.

        Raises:
            ConnectionLost: The application's function failed; it may succeed the next time.
            AuthenticationError: It is the expired one again, or the function says so.
            Refused: The function says that there is no other.
        """
        token = self._token
        if not isinstance(token, str):
            try:
                answer = token()
                token = await answer if inspect.isawaitable(answer) else answer
            except FINAL:
                raise
            except Exception as error:  # the application's own, which may succeed the next time
                why = f"{type(error).__name__}: {error}"
                raise ConnectionLost(f"the function that gives the token failed: {why}") from error
        if token == self._expired:
            raise AuthenticationError("the token has expired: get a new one", expired=True)
        return token


@attrs.define
class Subscription:
    """Where one channel stands."""

    epoch: str | None = None
    """Within which `seq` counts; None where only a snapshot helps."""
    seq: int = 0
    """The last publication that was passed on."""
    request: int | None = None
    """The request whose reply is awaited; pushes that come before it are of an older stream."""
    is_doubtful: bool = False
    """Whether there was a gap, and no push has come since."""
    is_of_events: bool = False
    """Whether the server has said that each push is an event of its own."""


@attrs.frozen
class _Request:
    """A request that waits for its reply."""

    names: list[str]
    deadline: float


class _HeardStream(trio.abc.Stream):
    """The socket below trio-websocket, which does not tell two things that we must know.

    One is when a byte was last heard, pings included. The other is that the peer hung up during the
    handshake, which trio-websocket would wait out.
    """

    def __init__(self, below: trio.abc.Stream) -> None:
        self._below = below
        # When a byte last came, on trio's clock.
        self.heard_at = trio.current_time()
        # Whether the handshake is done.
        self.is_open = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._below.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._below.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._below.receive_some(max_bytes)
        except trio.BrokenResourceError:
            if self.is_open:
                raise
            data = b""
        if not data and not self.is_open:
            raise ConnectionResetError("the server hung up during the handshake")
        self.heard_at = trio.current_time()
        return data

    async def aclose(self) -> None:
        await self._below.aclose()


class ClientConnection:
    """One connection, from its handshake to its end.

    Args:
        address: Where the server is.
        tokens: Where tokens come from.
        subscriptions: Where each channel stands, by name; a name that the server spells otherwise
            is replaced by the server's.
        offered: Whether to subscribe to all that the server offers, too.
        first_id: The `id` of the first request after `auth`.
        pushes: Where pushes are put; it waits while nobody takes them.
        authenticated: Called with the user that the server names.
        ready: Called when a request for channels has been granted, with whether all have been.
    """

    def __init__(
        self,
        address: Address,
        tokens: Tokens,
        subscriptions: dict[str, Subscription],
        first_id: int,
        pushes: trio.MemorySendChannel[Push],
        *,
        offered: bool,
        authenticated: Callable[[str | None], None],
        ready: Callable[[bool], None],
    ) -> None:
        self._tokens = tokens
        self._subscriptions = subscriptions
        self._offered = offered
        self._pushes = pushes
        self._tell_authenticated = authenticated
        self._tell_ready = ready
        self._websocket = OutboundWebSocket(
            address,
            connect_timeout_s=CONNECT_TIMEOUT_S,
            message_bytes=MESSAGE_BYTES,
            subprotocols=[SUBPROTOCOL],
        )
        # The requests that wait for their replies, by `id`, the oldest first.
        self._requests: dict[int | str | None, _Request] = {}
        # Set while a newer token is due.
        self._expiring = trio.Event()
        self.next_id = first_id
        """The `id` of the next request."""
        self.advice_s: float | None = None
        """When to come back, in seconds, as the server's last notice said; None without one."""
        # The socket, from the handshake on.
        self._stream: _HeardStream | None = None
        self.ready_at: float | None = None
        """Since when the connection is of use, on trio's clock; None before."""
        for subscription in subscriptions.values():
            subscription.request = None

    @property
    def heard_at(self) -> float:
        """When a byte last came, on trio's clock; minus infinity before the first one."""
        return -math.inf if self._stream is None else self._stream.heard_at

    async def run(self, scope: trio.CancelScope, *, has_succeeded: bool) -> None:
        """Live until it is lost, or `scope` is cancelled, which closes it politely.

        Args:
            scope: Cancelled to leave.
            has_succeeded: Whether the client has been connected before.

        Raises:
            AuthenticationError, Refused: The client is over for good.
            ConnectionLost: The connection is over.
            BaseExceptionGroup: A bug, or a cancellation from outside.
        """
        try:
            await self._websocket.run(self._talk, scope)
        except BaseExceptionGroup as group:
            socket = self._websocket.socket
            raise ending.end_of(
                group, socket, advice_s=self.advice_s, has_succeeded=has_succeeded
            ) from None

    async def _talk(self) -> None:
        """Connect, authenticate, subscribe, and pass the pushes on."""
        token = await self._tokens.next()
        stream: _HeardStream | None = None

        def heard(below: trio.abc.Stream) -> _HeardStream:
            nonlocal stream
            stream = _HeardStream(below)
            return stream

        socket = await self._websocket.connect(heard)
        assert stream is not None
        self._stream = stream
        stream.is_open = True
        heartbeat_s = await self._authenticate(socket, token)
        if self._offered:
            await self._add_offered(socket)
        async with trio.open_nursery() as nursery:
            if self._tokens.can_change:
                nursery.start_soon(self._renew, socket)
            if self._subscriptions:
                await self._subscribe(socket, list(self._subscriptions))
            else:
                self._become_ready()
            await self._read(socket, stream, heartbeat_s)

    async def _read(
        self,
        socket: trio_websocket.WebSocketConnection,
        stream: _HeardStream,
        heartbeat_s: float,
    ) -> NoReturn:
        """Handle what the server sends, until it falls silent or does not answer."""
        while True:
            text: str | bytes | None = None
            if any(asked.deadline < trio.current_time() for asked in self._requests.values()):
                raise ConnectionLost("the server does not answer")
            with trio.move_on_after(min(heartbeat_s, REPLY_TIMEOUT_S)):
                text = await socket.get_message()
            if text is not None:
                await self._handle(socket, text)
                continue
            silent_s = trio.current_time() - stream.heard_at
            if silent_s >= 2 * heartbeat_s:
                raise ConnectionLost("the server fell silent")
            if silent_s >= heartbeat_s:
                await self._send(socket, {"op": "ping"})

    async def _authenticate(self, socket: trio_websocket.WebSocketConnection, token: str) -> float:
        """Authenticate by the first message; return the server's heartbeat in seconds."""
        message = await self._ask(socket, {"op": "auth", "id": _AUTH_ID, "token": token})
        error = message.error
        if message.op == "auth" and error is None and message.ok:
            self._tell_authenticated(message.user)
            return min(max(message.heartbeat_s, 0.1), 300)
        # Refused: whether another try may help is the error's to say.
        error = error or ErrorBody(message="the server refused the token")
        if error.code == ErrorCode.TOKEN_EXPIRED:
            # One more try, where each try asks for a token; the same one again raises in `next`.
            self._tokens.expire(token)
            if not self._tokens.can_change:
                raise AuthenticationError(error.message, expired=True)
            raise ConnectionLost(error.message)
        if error.retryable:
            raise ConnectionLost(error.message)
        if error.code == ErrorCode.BAD_TOKEN:
            raise AuthenticationError(error.message)
        raise Refused(error.message)

    async def _add_offered(self, socket: trio_websocket.WebSocketConnection) -> None:
        """Ask what the server offers, before anything is subscribed, and have it subscribed."""
        message = await self._ask(socket, {"op": "channels", "id": self.next_id})
        self.next_id += 1
        if message.error is not None:
            error = message.error
            if error.code == ErrorCode.UNKNOWN_OP:  # an older server
                raise Refused("the server does not tell what it offers: name the channels")
            raise ConnectionLost(error.message) if error.retryable else Refused(error.message)
        for each in message.channels:
            if not isinstance(each, dict) or each.get("kind") == "keyed":
                continue  # a table of what the market gives: for who asks for it
            if isinstance(name := each.get("channel"), str):
                subscription = self._subscriptions.setdefault(name, Subscription())
                subscription.is_of_events = each.get("kind") == "events"

    async def _ask(
        self, socket: trio_websocket.WebSocketConnection, request: dict[str, Any]
    ) -> Message:
        """Send a request while nothing is subscribed yet, and return the reply."""
        await self._send(socket, request)
        with trio.fail_after(REPLY_TIMEOUT_S):
            while True:
                message = parse(await socket.get_message())
                self._heed_notice(message)
                if message.op == request["op"] or (
                    message.op == "error" and message.id in (request["id"], None)
                ):
                    return message

    async def _renew(self, socket: trio_websocket.WebSocketConnection) -> NoReturn:
        """Authenticate again on the living connection whenever its token is about to expire."""
        tries = 0
        tried_at = -math.inf
        while True:
            await self._expiring.wait()
            # A token that expires soon is due again at once: the pauses grow then, too.
            tries = tries + 1 if trio.current_time() - tried_at < ending.LASTING_S else 0
            if tries:
                await trio.sleep(ending.back_off(tries))
            tried_at = trio.current_time()
            self._expiring = trio.Event()
            try:
                token = await self._tokens.next()
            except ConnectionLost:  # there is none now, and the connection is none the worse for it
                self._expiring.set()
            else:
                await self._send(socket, {"op": "auth", "id": _AUTH_ID, "token": token})

    async def _subscribe(
        self,
        socket: trio_websocket.WebSocketConnection,
        names: list[str],
        *,
        again: bool = False,
    ) -> None:
        """Subscribe to some channels, each from where it stands.

        Args:
            socket: The connection.
            names: The channels.
            again: Whether they are subscribed on this connection already.
        """
        args: list[object] = []
        for name in names:
            subscription = self._subscriptions[name]
            subscription.request = self.next_id
            if subscription.epoch is None:
                args.append(name)
            else:
                since = {"epoch": subscription.epoch, "seq": subscription.seq}
                args.append({"channel": name, "since": since})
        number = self.next_id
        self.next_id += 1
        self._requests[number] = _Request(names, trio.current_time() + REPLY_TIMEOUT_S)
        if again:
            # Subscribing twice starts nothing new: the old stream has to end first.
            await self._send(socket, {"op": "unsubscribe", "args": names})
        await self._send(socket, {"op": "subscribe", "id": number, "args": args})

    async def _handle(self, socket: trio_websocket.WebSocketConnection, text: str | bytes) -> None:
        """Handle one message of the server."""
        message = parse(text)
        self._heed_notice(message)
        if message.id in self._requests:
            self._handle_reply(message)
            return
        if message.id == _AUTH_ID:
            # A renewal that is refused leaves the session as it was, until its token expires.
            if message.error is not None and message.error.retryable:
                self._expiring.set()
            return
        # A push, of interest where its channel's subscription has been granted.
        subscription = self._subscriptions.get(message.channel or "")
        if message.op is not None or subscription is None or subscription.request is not None:
            return
        if message.type in ("snapshot", "update"):
            if _is_gap(subscription, message):
                if subscription.is_doubtful or message.epoch != subscription.epoch:
                    subscription.epoch = None  # only a snapshot helps
                subscription.is_doubtful = True
                await self._subscribe(socket, [message.channel or ""], again=True)
                return
            seq = message.seq or 0
            if message.type == "update" and seq <= subscription.seq:
                return  # seen already
            subscription.epoch, subscription.seq = message.epoch, seq
            subscription.is_doubtful = False
        elif message.type != "status":
            return  # of a later version
        await self._pushes.send(push_of(message, text))

    def _heed_notice(self, message: Message) -> None:
        if message.op != "notice":
            return
        if message.reconnect_after_ms is not None:
            self.advice_s = min(max(message.reconnect_after_ms / 1000, 0), NOTICE_MOST_S)
        if message.code == "token_expires":
            self._expiring.set()

    def _handle_reply(self, message: Message) -> None:
        names = self._requests.pop(message.id).names
        if message.error is not None or len(message.results) != len(names):
            error = message.error or ErrorBody(
                message="the server's reply does not fit", retryable=True
            )
            raise ConnectionLost(error.message) if error.retryable else Refused(error.message)
        for name, result in zip(names, message.results, strict=True):
            if not result.ok:
                error = result.error or ErrorBody(message="the server refuses it")
                why = f"{name}: {error.message}"
                raise ConnectionLost(why) if error.retryable else Refused(why)
            subscription = self._subscriptions.pop(name)
            subscription.request = None
            # Pushes carry the server's spelling: an older room name, say, comes back as a channel.
            self._subscriptions[result.channel or name] = subscription
        self._become_ready()

    def _become_ready(self) -> None:
        if self.ready_at is None:
            self.ready_at = trio.current_time()
        self._tell_ready(not self._requests)

    async def _send(
        self, socket: trio_websocket.WebSocketConnection, request: dict[str, Any]
    ) -> None:
        with trio.fail_after(REPLY_TIMEOUT_S):
            await socket.send_message(encode(request))


def _is_gap(subscription: Subscription, message: Message) -> bool:
    """Whether something was lost before this push."""
    if message.type == "snapshot":
        return False
    if subscription.epoch is None or message.epoch != subscription.epoch:
        return True
    return message.prev != subscription.seq and (message.seq or 0) > subscription.seq
