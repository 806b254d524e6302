"""The trio client: one connection kept alive, its channels resubscribed where they left off.

::

    async with open_client(url, token, channels=["balance", "ticker.BTCUSDT"]) as client:
        async for push in client:
            print(push.channel, push.data)

What ends it for good is raised, on entering or from the loop::

    ConfigurationError    the URL is none
    AuthenticationError   the token is refused, or has expired and no other is to be had
    Refused               the server said not to come back, or has no such channel
    Unreachable           nobody answered the first tries

Anything else that ends a connection is answered with another one, after a back-off. Who says it
counts:

1. The server's word is its messages, and the code of a close frame that it sent.
2. An HTTP status may be anybody's who stands between. One that says there is no such thing here
   (200, 3xx, 400, 401, 403, 404, 421) is believed until the client has been connected once.
3. A close code that no frame brought is our own library's: 1006, the 1002 that wsproto makes of a
   1014, the 1009 of a message over our own limit. It never ends the client.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, NoReturn

import attrs
import h11
import msgspec
import trio
import trio_websocket
import wsproto.utilities
from wsproto.connection import ConnectionState

from trading_push.errors import (
    AuthenticationError,
    CloseCode,
    ErrorCode,
    TradingPushError,
    may_reconnect,
)
from trading_push.protocol.messages import SUBPROTOCOL
from trading_push.transport.outbound import Address

__all__ = ["Client", "Push", "Refused", "Unreachable", "open_client"]

BACKOFF_FIRST_S: Final = 0.2
BACKOFF_MOST_S: Final = 15.0
LASTING_S: Final = 15.0
"""A connection that was of use for so long lets the back-off begin anew."""
NOTICE_MOST_S: Final = 60.0
"""How long a server's own advice on when to come back is followed at most."""
REPLY_TIMEOUT_S: Final = 10.0
CONNECT_TIMEOUT_S: Final = 5.0
CLOSE_TIMEOUT_S: Final = 1.0
MESSAGE_BYTES: Final = 16 * 2**20
_AUTH_ID: Final = 0
"""The `id` of each `auth`; those of other requests are above it."""
BUFFERED_PUSHES: Final = 64

Token = str | Callable[[], str | Awaitable[str]]


class Refused(TradingPushError):
    """The server said not to come back; `code` is its close code, 0 where it sent none.

    A function that gives tokens raises it to end the client: there will be no other token.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Unreachable(TradingPushError):
    """No connection came about."""


@attrs.frozen
class Push:
    """One push of the server, as it stood on the wire.

    Args:
        channel: The channel's name as the server spells it.
        type: A value (`snapshot`, `update`), or `status` with `state` and `reason`.
        ts: When it was sent, ms since the epoch.
        epoch: Within which `seq` counts the publications of the topic.
        prev: The `seq` of the push before; None in a snapshot.
        merged: How many publications this one stands for; 0 where just one.
        dropped: How many events were lost before this snapshot.
        data: The payload; decimals are strings.
        json: The whole message.
    """

    channel: str
    type: str
    ts: int
    epoch: str | None = None
    seq: int | None = None
    prev: int | None = None
    merged: int = 0
    dropped: int = 0
    data: Any = None
    state: str | None = None
    reason: str | None = None
    json: str = attrs.field(default="", repr=False)


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""
    retryable: bool = False


class _Result(msgspec.Struct):
    channel: str | None = None
    ok: bool = False
    error: _Error | None = None


class _Message(msgspec.Struct):
    """Whatever a server of this protocol may send."""

    op: str | None = None
    code: str | None = None
    id: int | str | None = None
    ok: bool = True
    error: _Error | None = None
    results: list[_Result] = []
    user: str | None = None
    heartbeat_s: float = 15
    reconnect_after_ms: float | None = None
    channel: str | None = None
    type: str | None = None
    ts: int = 0
    epoch: str | None = None
    seq: int | None = None
    prev: int | None = None
    merged: int = 0
    dropped: int = 0
    data: Any = None
    state: str | None = None
    reason: str | None = None


_decode = msgspec.json.Decoder(_Message).decode
_encode = msgspec.json.Encoder().encode


class _Lost(Exception):
    """The connection is over and another one is due, after a wait that may be given."""

    def __init__(self, why: str, after_s: float | None = None) -> None:
        super().__init__(why)
        self.after_s = after_s


# What a network, or a peer that is no server of ours, can make of a connection.
_LOST: Final = (
    _Lost,
    OSError,
    UnicodeError,  # a host name that IDNA refuses
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    trio_websocket.ConnectionClosed,
    trio_websocket.HandshakeError,
    wsproto.utilities.ProtocolError,  # also raised by a ping that comes after our own close
    h11.ProtocolError,  # a handshake so wrong that trio-websocket fails at answering it
)
_FINAL: Final = (AuthenticationError, Refused)
_NOTHING_HERE: Final = frozenset({200, *range(300, 400), 400, 401, 403, 404, 421})
"""Statuses of a handshake that trying again does not change, if they are the server's."""


@attrs.define
class _Subscription:
    """Where one channel stands."""

    epoch: str | None = None
    seq: int = 0
    request: int | None = None
    """The request whose reply is awaited; until it comes, pushes are not this subscription's."""
    is_doubtful: bool = False
    """There was a gap, and no push has come since."""


@attrs.frozen
class _Asked:
    """A request that waits for its reply."""

    names: list[str]
    deadline: float


class _Stream(trio.abc.Stream):
    """The socket below trio-websocket, which does not tell us two things that we must know.

    When a byte was last heard, pings included; and that the peer hung up during the handshake,
    which trio-websocket would wait out.
    """

    def __init__(self, below: trio.abc.Stream) -> None:
        self._below = below
        self.heard_at = trio.current_time()
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


class Client:
    """The pushes of a connection that is kept alive; made by `open_client`.

    Attributes:
        user: Who the server says we are.
        is_connected: Whether the channels are subscribed just now.
        trouble: Why the last connection ended.
    """

    def __init__(self, url: str, token: Token, channels: Sequence[str], attempts: int) -> None:
        self._address = Address.of(
            url, f"{url[:200]!r} is no WebSocket URL: give one like ws://127.0.0.1:8000/ws"
        )
        self._url = url
        self._token = token
        self._refused_token: str | None = None
        self._attempts = attempts
        self._subscriptions = {name: _Subscription() for name in channels}
        self._asked: dict[int | str | None, _Asked] = {}
        self._next_id = 0
        self._pushes_in, self._pushes = trio.open_memory_channel[Push](BUFFERED_PUSHES)
        self._entered = trio.Event()
        self._error: Exception | None = None
        self._left = False
        self._scope: trio.CancelScope | None = None
        # What the connection's last notice said: when to come back after it, in seconds.
        self._advice_s: float | None = None
        # Since when the present connection is of use, on trio's clock.
        self._ready_at: float | None = None
        # Set while a newer token is due on the present connection.
        self._expiring = trio.Event()
        self.user: str | None = None
        self.is_connected = False
        self.trouble: str | None = None

    def __aiter__(self) -> Client:
        return self

    async def __anext__(self) -> Push:
        """The next push. Cancellation loses none.

        Raises:
            TradingPushError: What ended the client for good.
        """
        try:
            return await self._pushes.receive()
        except trio.EndOfChannel:
            if self._error is not None:
                raise self._error from None
            raise StopAsyncIteration from None

    def _leave(self) -> None:
        self._left = True
        if self._scope is not None:
            self._scope.cancel()

    @contextmanager
    def _until_left(self) -> Generator[None]:
        """What is in here is cancelled when the client is left; what is not may end politely."""
        with trio.CancelScope() as scope:
            if self._left:
                scope.cancel()
            self._scope = scope
            yield

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
            self._advice_s = self._ready_at = None
            after_s: float | None = None
            try:
                await self._connection()
            except _Lost as lost:
                self.trouble, after_s = str(lost), lost.after_s
            self.is_connected = False
            if self._ready_at is not None and trio.current_time() - self._ready_at >= LASTING_S:
                failures = 0
            failures += 1
            if not self._entered.is_set() and failures >= self._attempts:
                raise Unreachable(f"cannot reach {self._url}: {self.trouble}")
            with self._until_left():
                await trio.sleep(_back_off(failures) if after_s is None else after_s)

    async def _connection(self) -> None:
        """One connection, from its beginning to its end.

        Raises:
            AuthenticationError, Refused: It is over for good.
            _Lost: It is over.
        """
        for subscription in self._subscriptions.values():
            subscription.request = None
        self._asked.clear()
        self._expiring = trio.Event()
        stream: _Stream | None = None
        socket: trio_websocket.WebSocketConnection | None = None
        try:
            async with trio.open_nursery() as nursery:
                error: Exception | None = None
                try:
                    with self._until_left():
                        token = await self._next_token()
                        with trio.fail_after(CONNECT_TIMEOUT_S):
                            stream = _Stream(await self._address.connect())
                            socket = await trio_websocket.wrap_client_stream(
                                nursery,
                                # It says SocketStream and uses what any Stream has.
                                stream,  # type: ignore[arg-type]
                                self._address.host_header,
                                self._address.resource,
                                subprotocols=[SUBPROTOCOL],
                                max_message_size=MESSAGE_BYTES,
                            )
                        stream.is_open = True
                        await self._talk(socket, stream, token)
                except Exception as raised:
                    error = raised
                if socket is not None:
                    # It would wait without limit for the peer's own close frame.
                    with trio.move_on_after(CLOSE_TIMEOUT_S):
                        await socket.aclose()
                nursery.cancel_scope.cancel()
                if error is not None:
                    raise error
        except BaseExceptionGroup as group:
            raise self._end(group, socket) from None
        finally:
            if stream is not None:
                await trio.aclose_forcefully(stream)

    async def _next_token(self) -> str:
        token = self._token
        if not isinstance(token, str):
            try:
                answer = token()
                token = await answer if inspect.isawaitable(answer) else answer
            except _FINAL:
                raise
            except Exception as error:  # the application's own, which may be well the next time
                why = f"{type(error).__name__}: {error}"
                raise _Lost(f"the function that gives the token failed: {why}") from error
        if token == self._refused_token:
            raise AuthenticationError("the token has expired: get a new one", expired=True)
        return token

    async def _talk(
        self, socket: trio_websocket.WebSocketConnection, stream: _Stream, token: str
    ) -> None:
        """Authenticate, subscribe, and pass the pushes on."""
        heartbeat_s = await self._authenticate(socket, token)
        async with trio.open_nursery() as nursery:
            if not isinstance(self._token, str):
                nursery.start_soon(self._renew, socket)
            if self._subscriptions:
                await self._subscribe(socket, list(self._subscriptions))
            else:
                self._is_ready()
            await self._read(socket, stream, heartbeat_s)

    async def _read(
        self,
        socket: trio_websocket.WebSocketConnection,
        stream: _Stream,
        heartbeat_s: float,
    ) -> NoReturn:
        """Take what the server sends, until it falls silent."""
        while True:
            text: str | bytes | None = None
            if any(asked.deadline < trio.current_time() for asked in self._asked.values()):
                raise _Lost("the server does not answer")
            with trio.move_on_after(min(heartbeat_s, REPLY_TIMEOUT_S)):
                text = await socket.get_message()
            if text is not None:
                await self._take(socket, text)
                continue
            silent_s = trio.current_time() - stream.heard_at
            if silent_s >= 2 * heartbeat_s:
                raise _Lost("the server fell silent")
            if silent_s >= heartbeat_s:
                await self._send(socket, {"op": "ping"})

    async def _authenticate(self, socket: trio_websocket.WebSocketConnection, token: str) -> float:
        """Authenticate by the first message; returns the server's heartbeat in seconds."""
        await self._send(socket, {"op": "auth", "id": _AUTH_ID, "token": token})
        with trio.fail_after(REPLY_TIMEOUT_S):
            while True:
                message = _parsed(await socket.get_message())
                self._note(message)
                if message.op == "auth" or (
                    message.op == "error" and message.id in (_AUTH_ID, None)
                ):
                    break
        error = message.error
        if message.op == "auth" and error is None and message.ok:
            self.user = message.user
            return min(max(message.heartbeat_s, 0.1), 300)
        error = error or _Error(message="the server refused the token")
        if error.code == ErrorCode.TOKEN_EXPIRED:
            # Once more, for a token that is asked for each time; the same one raises above.
            self._refused_token = token
            if isinstance(self._token, str):
                raise AuthenticationError(error.message, expired=True)
            raise _Lost(error.message)
        if error.retryable:
            raise _Lost(error.message)
        if error.code == ErrorCode.BAD_TOKEN:
            raise AuthenticationError(error.message)
        raise Refused(error.message)

    async def _renew(self, socket: trio_websocket.WebSocketConnection) -> NoReturn:
        """Authenticate again on the living connection whenever its token is about to expire."""
        tries = 0
        tried_at = -math.inf
        while True:
            await self._expiring.wait()
            # A token that expires soon is due again at once: the pauses grow then, too.
            tries = tries + 1 if trio.current_time() - tried_at < LASTING_S else 0
            if tries:
                await trio.sleep(_back_off(tries))
            tried_at = trio.current_time()
            self._expiring = trio.Event()
            try:
                token = await self._next_token()
            except _Lost:  # there is none now, and the connection is none the worse for it
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
        args: list[object] = []
        self._next_id += 1
        for name in names:
            subscription = self._subscriptions[name]
            subscription.request = self._next_id
            if subscription.epoch is None:
                args.append(name)
            else:
                since = {"epoch": subscription.epoch, "seq": subscription.seq}
                args.append({"channel": name, "since": since})
        self._asked[self._next_id] = _Asked(names, trio.current_time() + REPLY_TIMEOUT_S)
        if again:
            # Subscribing twice starts nothing new: the old stream has to end first.
            await self._send(socket, {"op": "unsubscribe", "args": names})
        await self._send(socket, {"op": "subscribe", "id": self._next_id, "args": args})

    async def _take(self, socket: trio_websocket.WebSocketConnection, text: str | bytes) -> None:
        """Take one message of the server."""
        message = _parsed(text)
        self._note(message)
        if message.id in self._asked:
            self._take_reply(message)
            return
        if message.id == _AUTH_ID:
            # A renewal that is refused leaves the session as it was, until its token expires.
            if message.error is not None and message.error.retryable:
                self._expiring.set()
            return
        subscription = self._subscriptions.get(message.channel or "")
        if message.op is not None or subscription is None or subscription.request is not None:
            return
        if message.type in ("snapshot", "update"):
            if self._is_gap(subscription, message):
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
        await self._pushes_in.send(_push(message, text))

    def _note(self, message: _Message) -> None:
        if message.op != "notice":
            return
        if message.reconnect_after_ms is not None:
            self._advice_s = min(max(message.reconnect_after_ms / 1000, 0), NOTICE_MOST_S)
        if message.code == "token_expires":
            self._expiring.set()

    def _take_reply(self, message: _Message) -> None:
        names = self._asked.pop(message.id).names
        if message.error is not None or len(message.results) != len(names):
            error = message.error or _Error(
                message="the server's reply does not fit", retryable=True
            )
            raise _Lost(error.message) if error.retryable else Refused(error.message)
        for name, result in zip(names, message.results, strict=True):
            if not result.ok:
                error = result.error or _Error(message="the server refuses it")
                why = f"{name}: {error.message}"
                raise _Lost(why) if error.retryable else Refused(why)
            subscription = self._subscriptions.pop(name)
            subscription.request = None
            # Pushes carry the server's spelling: an older room name, say, comes back as a channel.
            self._subscriptions[result.channel or name] = subscription
        self._is_ready()

    def _is_ready(self) -> None:
        self.is_connected = not self._asked
        if self._ready_at is None:
            self._ready_at = trio.current_time()
        self.trouble = None
        self._entered.set()

    def _end(
        self,
        group: BaseExceptionGroup[BaseException],
        socket: trio_websocket.WebSocketConnection | None,
    ) -> BaseException:
        """The one exception that says how a connection ended.

        Its own nursery may hold several: what we made of it, and what trio-websocket's reader did.
        A bug, and a cancellation, stay the group that they are.
        """
        final = group.subgroup(_FINAL)
        if final is not None:
            return _leaf(final)
        unknown = group.split(_LOST)[1]
        if unknown is not None:
            return unknown
        error = _leaf(group.subgroup(_Lost) or group)
        match error:
            case _Lost():
                return error
            case trio_websocket.ConnectionClosed():
                by_server = socket is not None and _has_sent_close(socket)
                return _closed(error.reason, by_server, self._advice_s)
            case trio_websocket.ConnectionRejected():
                return _rejected(error.status_code, has_succeeded=self._entered.is_set())
            case trio.TooSlowError():
                return _Lost("the server does not answer")
            case OSError():
                return _Lost(error.strerror or str(error))
            case trio.BrokenResourceError() if isinstance(error.__cause__, OSError):  # of TLS
                return _Lost(error.__cause__.strerror or str(error.__cause__))
            case _:
                return _Lost("the connection was lost")

    @staticmethod
    def _is_gap(subscription: _Subscription, message: _Message) -> bool:
        """Whether something was lost before this push."""
        if message.type == "snapshot":
            return False
        if subscription.epoch is None or message.epoch != subscription.epoch:
            return True
        return message.prev != subscription.seq and (message.seq or 0) > subscription.seq

    async def _send(
        self, socket: trio_websocket.WebSocketConnection, request: Mapping[str, Any]
    ) -> None:
        with trio.fail_after(REPLY_TIMEOUT_S):
            await socket.send_message(_encode(request).decode())


def _push(message: _Message, text: str | bytes) -> Push:
    assert message.channel is not None
    assert message.type is not None
    return Push(
        channel=message.channel,
        type=message.type,
        ts=message.ts,
        epoch=message.epoch,
        seq=message.seq,
        prev=message.prev,
        merged=message.merged,
        dropped=message.dropped,
        data=message.data,
        state=message.state,
        reason=message.reason,
        json=text if isinstance(text, str) else text.decode(),
    )


def _parsed(text: str | bytes) -> _Message:
    if isinstance(text, bytes):
        raise _Lost("the server sent a binary message")
    try:
        return _decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        raise _Lost("the server sent what this protocol does not have") from None


def _back_off(failures: int) -> float:
    """How long to wait after so many failures in a row, in seconds; never the same for all."""
    longest = min(BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 30), BACKOFF_MOST_S)
    return longest * random.uniform(0.5, 1)


def _leaf(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def _has_sent_close(socket: trio_websocket.WebSocketConnection) -> bool:
    """Whether the peer has sent a close frame.

    A reason is given for any end, made up if need be. Only a close frame takes wsproto's state
    there: what it cannot parse, or what trio-websocket finds too long, leaves it open or closing.
    """
    return socket._wsproto.state in (ConnectionState.REMOTE_CLOSING, ConnectionState.CLOSED)


def _closed(
    reason: trio_websocket.CloseReason | None, by_server: bool, advice_s: float | None
) -> Exception:
    code = CloseCode.ABNORMAL if reason is None else reason.code
    words = "" if reason is None or not reason.reason else f" {reason.reason!r}"
    if not by_server:
        return _Lost(f"the connection broke: {int(code)}{words}", advice_s)
    why = f"the server closed the connection: {int(code)}{words}"
    if may_reconnect(code):
        return _Lost(why, advice_s)
    if code == CloseCode.BAD_TOKEN:
        return AuthenticationError(why)
    return Refused(why, code)


def _rejected(status: int, *, has_succeeded: bool) -> Exception:
    why = f"the server, or a proxy in front of it, refused the handshake: HTTP {status}"
    if has_succeeded or status not in _NOTHING_HERE:
        return _Lost(why)
    if status in (401, 403):
        return AuthenticationError(why)
    return Refused(f"there is no WebSocket at this URL: HTTP {status}; check its host and its path")


@asynccontextmanager
async def open_client(
    url: str, token: Token, *, channels: Sequence[str] = (), attempts: int = 3
) -> AsyncGenerator[Client]:
    """Connect, authenticate and subscribe; then stay connected until the block is left.

    Args:
        url: Where the server is, `ws://` or `wss://`.
        token: The token, or a function that gives one (sync or async): for each connection, and
            when the server says that the present one is about to expire. What it raises is answered
            with another try after the back-off; `Refused` or `AuthenticationError` ends the client.
        channels: What to subscribe.
        attempts: How many tries the first connection has. Later ones are tried for ever.

    Raises:
        ConfigurationError: The URL is none.
        AuthenticationError, Refused, Unreachable: On entering, where it does not come about.

    The body's own exceptions come out as they are, in no group. Leaving closes the connection
    politely, for a second at most; cancellation ends it at once. Either leaves nothing behind.
    """
    client = Client(url, token, channels, attempts)
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
                client._pushes.close()  # a push that nobody takes any more holds nothing up
    except BaseExceptionGroup:
        # What the body raised comes out alone. Where it was cancelled, the group says by what.
        if raised is None:
            raise
    if raised is not None:
        raise raised
