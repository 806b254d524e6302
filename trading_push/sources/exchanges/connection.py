"""One WebSocket connection to an exchange: subscribe what is wanted, read, ping, notice silence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from typing import Any, Final, Literal, NamedTuple, NoReturn, Protocol

import attrs
import trio
import trio_websocket

from trading_push import logs
from trading_push.errors import SourceError, innermost
from trading_push.sources.exchanges.amounts import UNUSABLE, reason_of
from trading_push.sources.exchanges.coalescer import TickerCoalescer
from trading_push.sources.exchanges.dialect import (
    ExchangeDialect,
    GoingDown,
    Reply,
    SymbolFrame,
)
from trading_push.sources.exchanges.frame_counts import FrameCounter
from trading_push.sources.exchanges.pacing import ConnectThrottle, RequestBudget
from trading_push.transport.outbound import CONNECTION_ERRORS, OutboundWebSocket

__all__ = ["ExchangeConnection", "FeedContext"]

MESSAGE_BYTES: Final = 4 * 2**20
BUFFERED_MESSAGES: Final = 256


@attrs.frozen
class FeedContext:
    """What all the connections of a feed share.

    Args:
        dialect: What the exchange is sent, and what its messages mean.
        tickers: Where what is known of a symbol goes.
        frames: Counts what became of the frames.
        throttle: Says when another connection may be made.
        numbers: Gives each request an id of its own.
        refuse: Called with a symbol that the exchange does not have, and what it said.
    """

    dialect: ExchangeDialect
    tickers: TickerCoalescer
    frames: FrameCounter
    throttle: ConnectThrottle
    numbers: Iterator[int]
    refuse: Callable[[str, str], None]


class _Shard(Protocol):
    """The symbols that a connection is for; see `shard.Shard`."""

    @property
    def symbols(self) -> Collection[str]:
        """The symbols that are wanted now."""
        ...

    @property
    def mute_s(self) -> float:
        """How long a connection may bring nothing of its symbols."""
        ...

    def merge(self, connection: ExchangeConnection, frame: SymbolFrame) -> bool:
        """Merge a frame that came over a connection; False where it is outdated."""
        ...

    def forget(self, symbols: Iterable[str]) -> None:
        """Drop what was merged of symbols that no connection carries any more."""
        ...

    def is_carried_elsewhere(self, symbol: str, connection: ExchangeConnection) -> bool:
        """Whether another connection carries a symbol."""
        ...

    def ended(self, connection: ExchangeConnection) -> None:
        """Note that nothing more comes over a connection; synchronous."""
        ...


class _Request(NamedTuple):
    """A request that waits for its replies.

    Args:
        symbols: The symbols that no reply has named yet; none where it unsubscribes.
        sent_at: When it was sent, on trio's clock.
        replies: How many replies are to come, where each names its symbol.
    """

    symbols: dict[str, None]
    sent_at: float
    replies: int


class ExchangeConnection:
    """One connection, from its handshake to its end.

    Args:
        context: What it shares with the feed's other connections.
        shard: The symbols that it is for.
    """

    def __init__(self, context: FeedContext, shard: _Shard) -> None:
        self._context = context
        self._shard = shard
        self._dialect = context.dialect
        self._limits = context.dialect.limits
        self._websocket = OutboundWebSocket(
            self._dialect.address,
            connect_timeout_s=self._limits.connect_timeout_s,
            message_bytes=MESSAGE_BYTES,
            buffered_messages=BUFFERED_MESSAGES,
        )
        # Cancelled to end the connection politely.
        self._scope = trio.CancelScope()
        # Set when there may be something to send.
        self._wake = trio.Event()
        # The requests that wait for their replies, by id, the oldest first.
        self._requests: dict[int, _Request] = {}
        # The parts of requests that were refused, which are to be sent again, the latest first:
        # what somebody has just asked for is not to wait for what was refused before.
        self._repeats: list[Sequence[str]] = []
        # The symbols that were missing when the last request was written.
        self._backlog: Set[str] = frozenset()
        self._budget = RequestBudget(self._limits.requests_per_hour)
        # When a message, or a pong, last came, on trio's clock.
        self._heard_at = 0.0
        # When a frame of a symbol last came, or another connection was last asked for.
        self._data_at = 0.0
        self.subscribed: dict[str, None] = {}
        """The symbols that have been asked for."""
        self.carries: set[str] = set()
        """The symbols whose frames come over this connection."""
        self.settled = trio.Event()
        """Set when all that was asked for has been answered; and at the end."""
        self.succession = trio.Event()
        """Set when another connection should take over, and at the end; the shard renews it."""
        self.over = trio.Event()
        """Set at the end."""
        self.error: SourceError | None = None
        """Why it ended; None where it was no longer wanted."""

    def wake(self) -> None:
        """Look again at which symbols are wanted; synchronous."""
        self._wake.set()

    def stop(self) -> None:
        """End politely, soon; synchronous."""
        self._scope.cancel()

    async def run(self) -> None:
        """Live until it is lost, not wanted any more, or cancelled; then `over` is set."""
        try:
            await self._websocket.run(self._live, self._scope)
        except BaseExceptionGroup as group:
            lost, other = group.split((SourceError, *CONNECTION_ERRORS))
            if other is not None:
                raise other from None
            assert lost is not None
            self.error = _explained(lost)
        finally:
            self.over.set()
            self.settled.set()
            self.succession.set()

    async def _live(self) -> None:
        try:
            await self._context.throttle.wait_for_turn()
            await self._talk(await self._websocket.connect())
        finally:
            self._shard.ended(self)  # before the polite close, which takes a while

    async def _talk(self, socket: trio_websocket.WebSocketConnection) -> None:
        self._heard_at = self._data_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_silence)
            nursery.start_soon(self._watch_muteness)
            nursery.start_soon(self._speak, socket, nursery)
            while True:
                message = await socket.get_message()
                self._heard_at = trio.current_time()
                self._handle(message)

    # --- what comes ----------------------------------------------------------------------------

    def _handle(self, message: str | bytes) -> None:
        """Handle one message, whatever it is."""
        frames = self._context.frames
        try:
            if isinstance(message, bytes):
                raise ValueError("a binary message")
            read = self._dialect.read(message)
        except UNUSABLE as error:
            frames.count_bad(reason_of(error))
            return
        match read:
            case Reply():
                self._handle_reply(read)
            case GoingDown(reason=reason):
                self._ask_for_another(reason)
            case None:
                frames.counts.unused += 1
            case SymbolFrame():
                self._handle_frame(read)
            case _:
                for frame in read:
                    self._handle_frame(frame)

    def _handle_frame(self, frame: SymbolFrame) -> None:
        counts = self._context.frames.counts
        if frame.symbol not in self.subscribed:
            counts.unused += 1
            return
        self._data_at = trio.current_time()
        if self._shard.merge(self, frame):
            counts.used += 1
        else:
            counts.outdated += 1

    def _ask_for_another(self, why: str) -> None:
        logs.emit(logs.line("exchange_replaced", exchange=self._dialect.name, error=why))
        self._data_at = trio.current_time()
        self.succession.set()

    def _handle_reply(self, reply: Reply) -> None:
        """Handle a reply. A refusal may be about any symbol of its request: halves find which.

        Raises:
            SourceError: What is refused here, another connection has.
        """
        self._wake.set()
        if reply.symbol is not None:
            self._handle_reply_about(reply.symbol, reply)
            return
        request = None if reply.id is None else self._requests.pop(reply.id, None)
        if reply.error is None:
            return
        if request is None:
            self._context.frames.count_bad(reply.error)
        elif len(request.symbols) > 1:
            symbols = list(request.symbols)
            half = len(symbols) // 2
            self._repeats += [symbols[half:], symbols[:half]]
        elif request.symbols and not reply.is_subscribed:
            [symbol] = request.symbols
            self._refuse(symbol, reply.error)

    def _handle_reply_about(self, symbol: str, reply: Reply) -> None:
        """Handle a reply that names one symbol of its request; the others have theirs."""
        request = None if reply.id is None else self._requests.get(reply.id)
        if request is not None and reply.id is not None:
            request.symbols.pop(symbol, None)
            left = request.replies - 1
            self._requests[reply.id] = request._replace(replies=left)
            if reply.error is not None and request.symbols:
                # It may be that nothing of the request has come about: the rest is asked again,
                # which does no harm where it has.
                self._repeats.append(list(request.symbols))
                left = 0
            if left <= 0:
                del self._requests[reply.id]
        if reply.error is not None and symbol in self.subscribed:
            self._refuse(symbol, reply.error)

    def _refuse(self, symbol: str, error: str) -> None:
        if self._shard.is_carried_elsewhere(symbol, self):
            # The exchange has it: this connection is the one that cannot take over.
            raise SourceError(f"{symbol} was refused, which another connection has")
        self.subscribed.pop(symbol, None)
        self.carries.discard(symbol)
        self._shard.forget([symbol])
        self._context.refuse(symbol, error)

    async def _watch_silence(self) -> NoReturn:
        silence_s = self._limits.silence_s
        while True:
            since = self._heard_at
            if self._requests:
                since = min(since, next(iter(self._requests.values())).sent_at)
            if since + silence_s <= trio.current_time():
                raise SourceError(f"nothing heard for {silence_s:g} s")
            await trio.sleep_until(since + silence_s)

    async def _watch_muteness(self) -> NoReturn:
        """Notice that nothing comes of the symbols, while pings are answered."""
        while True:
            mute_s = self._shard.mute_s
            now = trio.current_time()
            if self.subscribed and self.settled.is_set() and self._data_at + mute_s <= now:
                self._ask_for_another(f"nothing of its symbols for {mute_s:g} s")
            await trio.sleep_until(max(self._data_at, now - mute_s / 2) + mute_s)

    # --- what goes -----------------------------------------------------------------------------

    async def _speak(
        self, socket: trio_websocket.WebSocketConnection, nursery: trio.Nursery
    ) -> None:
        """Send what has to be sent, one message at a time; without symbols, end the connection."""
        ping_at = trio.current_time() + self._limits.ping_s
        while self._shard.symbols:
            ready_at = self._budget.ready_at()
            is_ready = trio.current_time() >= ready_at
            if is_ready and (request := self._next_request()) is not None:
                self._budget.spend()
                await socket.send_message(request)
            elif trio.current_time() >= ping_at:
                ping_at = trio.current_time() + self._limits.ping_s
                if (ping := self._dialect.ping(next(self._context.numbers))) is not None:
                    await socket.send_message(ping)
                else:
                    nursery.start_soon(self._ping, socket)
            else:
                # Nothing to send: wait until there is.
                if is_ready and not self._requests and not self.settled.is_set():
                    self.settled.set()
                    self._log_connected()
                with trio.move_on_at(ping_at if is_ready else min(ping_at, ready_at)):
                    await self._wake.wait()
                self._wake = trio.Event()
                continue
            await trio.sleep(self._limits.spacing_s)
        self._scope.cancel()

    def _log_connected(self) -> None:
        name, symbols = self._dialect.name, len(self.subscribed)
        logs.emit(logs.line("exchange_connected", exchange=name, symbols=symbols))

    async def _ping(self, socket: trio_websocket.WebSocketConnection) -> None:
        await socket.ping()
        self._heard_at = trio.current_time()

    def _next_request(self) -> str | None:
        """Write the next request: what is no longer wanted, then what is missing, then repeats."""
        wanted, most = self._shard.symbols, self._limits.symbols_per_request
        gone = [symbol for symbol in self.subscribed if symbol not in wanted][:most]
        if gone:
            for symbol in gone:
                del self.subscribed[symbol]
            self.carries.difference_update(gone)
            self._shard.forget(gone)
            return self._request("unsubscribe", gone)
        missing = [symbol for symbol in wanted if symbol not in self.subscribed]
        if missing:
            # What has come since the last request goes first, the latest of it: one user's
            # hundreds do not hold up another's one.
            new = [symbol for symbol in missing if symbol not in self._backlog]
            self._backlog = frozenset(missing)
            asked = new[-most:] or missing[:most]
            self.subscribed.update(dict.fromkeys(asked))
            return self._request("subscribe", asked)
        while self._repeats:
            again = [symbol for symbol in self._repeats.pop() if symbol in self.subscribed]
            if again:
                return self._request("subscribe", again)
        return None

    def _request(self, op: Literal["subscribe", "unsubscribe"], symbols: Sequence[str]) -> str:
        number = next(self._context.numbers)
        awaited = dict.fromkeys(symbols if op == "subscribe" else ())
        self._requests[number] = _Request(awaited, trio.current_time(), len(symbols))
        return self._dialect.request(op, symbols, number)


def _explained(group: BaseExceptionGroup[Any]) -> SourceError:
    """Say why a connection was lost; of several reasons, the first."""
    error = innermost(group, first=True)
    # trio says only in the cause why no address answered, or how TLS broke.
    while error.__cause__ is not None and (
        isinstance(error, trio.BrokenResourceError)
        or (isinstance(error, OSError) and error.strerror is None)
    ):
        error = innermost(error.__cause__, first=True)
    match error:
        case SourceError():
            return error
        case trio_websocket.ConnectionClosed():
            reason = error.reason
            if reason is None:
                return SourceError("the connection was closed")
            words = f"{reason.code} {reason.reason or ''}".strip()
            return SourceError(f"the connection was closed: {words}")
        case trio_websocket.ConnectionRejected():
            return SourceError(f"the handshake was refused with status {error.status_code}")
        case trio.TooSlowError():
            return SourceError("there was no answer to the handshake in time")
        case OSError():
            return SourceError(error.strerror or type(error).__name__)
    return SourceError(type(error).__name__)
