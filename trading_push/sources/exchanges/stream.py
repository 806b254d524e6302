"""What the feeds of exchanges share: connections that live, and recover, for what is watched.

1. A connection is open only while a symbol is watched; more symbols than one may carry get another.
2. What goes up is spaced out, so that no second holds more messages than the exchange allows; the
   requests name as many symbols as one may.
3. Pings are answered by trio-websocket. Ours go out as the exchange documents, and prove that a
   connection lives: after `silence_s` without a word it is lost, as it is when a request stays
   without its answer for so long.
4. A connection that is lost is told at once: its symbols are stale until their next frame. Another
   one comes after a back-off with jitter, and subscribes anew. Nothing merged before is used again.
5. Before the exchange ends a connection of its own accord another takes over, a moment after it has
   been acknowledged all symbols. While there are two, each frame is merged once: an older one never
   overwrites a newer.
6. What cannot be read is counted, and logged once a minute at most.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final, Literal, NamedTuple, NoReturn, Protocol

import attrs
import trio
import trio_websocket

from trading_push import logs
from trading_push.errors import SourceError
from trading_push.models import Ticker
from trading_push.sources.base import MarketSink
from trading_push.sources.exchanges.lost import LOST, explained
from trading_push.sources.exchanges.ticker_state import UNUSABLE, reason_of
from trading_push.supervision import keep_running
from trading_push.transport.outbound import Address

__all__ = ["ExchangeFeed", "FrameCounts", "Merged", "News", "Reply", "Terms"]

GIVE_S: Final = 0.02
"""The sink is given something at most this often."""
CLOSE_TIMEOUT_S: Final = 1.0
TELL_BAD_FRAMES_S: Final = 60.0
MESSAGE_BYTES: Final = 4 * 2**20
BUFFERED_MESSAGES: Final = 256


@attrs.frozen
class Terms:
    """What an exchange allows, and how patient we are with it.

    Args:
        symbols_per_connection: How many one connection carries.
        symbols_per_request: How many one request names.
        spacing_s: Between two messages of ours on a connection.
        connect_spacing_s: Between two connections of the feed.
        ping_s: How often we ping.
        silence_s: After how long without a word, or an answer, a connection is lost; longer than
            `ping_s`.
        lifetime_s: When a connection is replaced.
        connect_timeout_s: For the handshake.
        takeover_timeout_s: For a new connection to be acknowledged everything.
        overlap_s: How long the old one is heard after that.
        first_pause_s: Before the first try to come back; it doubles up to `last_pause_s`.
        last_pause_s: The longest one.
        jitter_s: How much longer, at random, a pause is at most.
    """

    symbols_per_connection: int
    symbols_per_request: int
    spacing_s: float = 1 / 3
    connect_spacing_s: float = 1.05
    ping_s: float = 20
    silence_s: float = 30
    lifetime_s: float = 23.5 * 3600
    connect_timeout_s: float = 10
    takeover_timeout_s: float = 30
    overlap_s: float = 2
    first_pause_s: float = 1
    last_pause_s: float = 60
    jitter_s: float = 1


@attrs.define
class FrameCounts:
    """What became of the market's frames since the feed was made.

    Args:
        used: Merged into a ticker.
        outdated: Older than what was merged, or the same again, or a delta without its snapshot.
        unused: Well, but of another stream, or of a symbol that is not subscribed (any more).
        bad: Not to be read; reported in the log.
    """

    used: int = 0
    outdated: int = 0
    unused: int = 0
    bad: int = 0


class Reply(NamedTuple):
    """The exchange's answer to a request.

    Args:
        id: Of which request; None where it names none.
        error: Why the request failed, if it did.
        is_subscribed: It failed because something that it names is subscribed already.
    """

    id: int | None
    error: str | None = None
    is_subscribed: bool = False


class News(NamedTuple):
    """A frame of a symbol; `event` is for its `Merged`."""

    symbol: str
    event: Any


class Merged(Protocol):
    """What the frames of one symbol have said until now."""

    def apply(self, event: Any) -> bool:
        """Merge a frame; False where it is outdated and changes nothing."""
        ...

    def ticker(self) -> Ticker:
        """What is known now."""
        ...


class ExchangeFeed(ABC):
    """A `WatchedFeed` of an exchange; what a kind of exchange adds stands in its subclass.

    Args:
        url: Where to connect, `wss://` or `ws://`.
        terms: What is allowed there.

    Raises:
        ConfigurationError: The URL is none.
    """

    name: ClassVar[str]
    """As the log calls it."""
    symbols: ClassVar[re.Pattern[str]]
    """What a symbol of the exchange looks like."""

    def __init__(self, url: str, terms: Terms) -> None:
        self.terms = terms
        self.address = Address.of(
            url, "market.url is no WebSocket URL: give one like wss://stream.example.com/stream"
        )
        self._lanes: list[_Lane] = []
        self._lane_of: dict[str, _Lane] = {}
        self._counts = FrameCounts()
        self._sink: MarketSink | None = None
        self._nursery: trio.Nursery | None = None
        self._changed: dict[str, Merged] = {}
        self._wake = trio.Event()
        self._turn = trio.Lock()
        self._connected_at = -float("inf")
        self._bad_untold = 0
        self._bad_told_at = -float("inf")
        self._last_id = 0

    # --- what an exchange says and hears -------------------------------------------------------

    @abstractmethod
    def request(
        self, op: Literal["subscribe", "unsubscribe"], symbols: Sequence[str], number: int
    ) -> str:
        """The message that subscribes, or unsubscribes, all that is told of some symbols."""

    @abstractmethod
    def ping(self, number: int) -> str | None:
        """The message of a ping; None for a ping frame of WebSocket."""

    @abstractmethod
    def read(self, message: str) -> News | Reply | None:
        """What a message says; None where it is well, but of no use here.

        Raises:
            One of UNUSABLE: It cannot be read.
        """

    @abstractmethod
    def new_symbol(self, symbol: str) -> Merged:
        """A symbol of which nothing has been heard."""

    # --- a feed --------------------------------------------------------------------------------

    def knows(self, symbol: str) -> bool:
        """Whether the exchange may have `symbol`, by its characters."""
        return self.symbols.fullmatch(symbol) is not None

    def watch(self, symbol: str) -> None:
        """Subscribe to a symbol as soon as the feed runs, one that was refused once again too."""
        if symbol in self._lane_of or not self.knows(symbol):
            return
        for lane in self._lanes:
            if len(lane.symbols) < self.terms.symbols_per_connection:
                break
        else:
            lane = _Lane(self)
            self._lanes.append(lane)
            if self._nursery is not None:
                self._nursery.start_soon(lane.run)
        self._lane_of[symbol] = lane
        lane.watch(symbol)

    def unwatch(self, symbol: str) -> None:
        """Unsubscribe a symbol; nothing of it is given from now on."""
        lane = self._lane_of.pop(symbol, None)
        if lane is not None:
            lane.unwatch(symbol)
            self._changed.pop(symbol, None)

    async def run(self, sink: MarketSink) -> None:
        """Feed the sink until cancelled.

        Cancelled, it drops its connections at once; what is watched stays so for the next run.

        Raises:
            ExceptionGroup: A mistake of ours.
        """
        self._sink = sink
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for lane in self._lanes:
                    nursery.start_soon(lane.run)
                await self._give()
        finally:
            self._nursery = self._sink = None
            self._changed.clear()

    def statistics(self) -> FrameCounts:
        """What became of the frames until now; synchronous."""
        return attrs.evolve(self._counts)

    # --- for its lanes -------------------------------------------------------------------------

    def take(self, lane: _Lane, connection: _Connection, message: str | bytes) -> None:
        """One message of a connection, whatever it is."""
        try:
            if isinstance(message, bytes):
                raise ValueError("a binary message")
            said = self.read(message)
        except UNUSABLE as error:
            self.tell_bad(reason_of(error))
            return
        if isinstance(said, Reply):
            connection.answered(said)
        elif said is None or said.symbol not in connection.subscribed:
            self._counts.unused += 1
        elif lane.merge(connection, said):
            self._counts.used += 1
        else:
            self._counts.outdated += 1

    def tell_bad(self, why: str) -> None:
        """Count a message that says nothing to us; log it, unless one was a moment ago."""
        self._counts.bad += 1
        self._bad_untold += 1
        now = trio.current_time()
        if now >= self._bad_told_at + TELL_BAD_FRAMES_S:
            logs.emit(
                logs.line(
                    "exchange_bad_frames", exchange=self.name, count=self._bad_untold, error=why
                )
            )
            self._bad_told_at, self._bad_untold = now, 0

    def give(self, symbol: str, merged: Merged) -> None:
        """Give the sink what is known of a symbol, soon."""
        self._changed[symbol] = merged
        self._wake.set()

    def stale(self, reason: str, symbols: Iterable[str]) -> None:
        """Tell the sink at once; what it has not been given yet, it never is."""
        stale = list(symbols)
        for symbol in stale:
            self._changed.pop(symbol, None)
        if stale and self._sink is not None:
            self._sink.stale(reason, stale)

    def refused(self, symbol: str, error: str) -> None:
        """The exchange does not have a symbol: it is as if nobody watched it."""
        logs.emit(logs.line("exchange_refused", exchange=self.name, symbol=symbol, error=error))
        self.stale("refused", [symbol])
        self.unwatch(symbol)

    def next_id(self) -> int:
        """Another number for a request."""
        self._last_id += 1
        return self._last_id

    async def wait_for_turn(self) -> None:
        """Wait until another connection may be made."""
        async with self._turn:
            await trio.sleep_until(self._connected_at + self.terms.connect_spacing_s)
            self._connected_at = trio.current_time()

    async def _give(self) -> NoReturn:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            if self._changed and self._sink is not None:
                tickers = [merged.ticker() for merged in self._changed.values()]
                self._changed.clear()
                self._sink.update(tickers)
            await trio.sleep(GIVE_S)


class _Lane:
    """As many symbols as one connection carries, and the connection; two while one takes over."""

    def __init__(self, feed: ExchangeFeed) -> None:
        self.feed = feed
        self.symbols: dict[str, None] = {}
        self.connections: list[_Connection] = []
        self._merged: dict[str, Merged] = {}
        self._wake = trio.Event()

    def watch(self, symbol: str) -> None:
        self.symbols[symbol] = None
        self._wake_all()

    def unwatch(self, symbol: str) -> None:
        self.symbols.pop(symbol, None)
        self._wake_all()

    def _wake_all(self) -> None:
        self._wake.set()
        for connection in self.connections:
            connection.wake()

    async def run(self) -> None:
        """Be connected whenever there are symbols, until cancelled."""
        terms = self.feed.terms
        while True:
            while not self.symbols:
                self._wake = trio.Event()
                await self._wake.wait()
            await keep_running(
                self._stay_connected,
                self._tell_lost,
                on=SourceError,
                first_s=terms.first_pause_s,
                last_s=terms.last_pause_s,
                jitter_s=terms.jitter_s,
            )

    def _tell_lost(self, error: SourceError, pause_s: float) -> None:
        logs.emit(logs.line("exchange_lost", exchange=self.feed.name, error=error, delay=pause_s))

    async def _stay_connected(self) -> None:
        """One connection after another, without a gap, until there are no symbols.

        Raises:
            SourceError: It was lost, and no other was there to go on.
        """
        terms = self.feed.terms
        if not self.symbols:
            return
        async with trio.open_nursery() as nursery:
            current = self._connect(nursery)
            renew_at = trio.current_time() + terms.lifetime_s
            while True:
                with trio.move_on_at(renew_at):
                    await current.over.wait()
                if current.over.is_set():
                    break
                fresh = self._connect(nursery)
                with trio.move_on_after(terms.takeover_timeout_s):
                    await fresh.settled.wait()
                if fresh.settled.is_set():
                    # What the old one was sent before, and is still under way, is heard too.
                    with trio.move_on_after(terms.overlap_s):
                        await fresh.over.wait()
                if fresh.settled.is_set() and not fresh.over.is_set():
                    # All is acknowledged: what is quiet has not changed, and is not stale.
                    fresh.carries |= current.carries & fresh.subscribed.keys()
                    current.stop()
                    current = fresh
                    renew_at = trio.current_time() + terms.lifetime_s
                else:
                    fresh.stop()
                    if not current.over.is_set():
                        self._tell_lost(
                            fresh.error or SourceError("the subscriptions were not acknowledged"),
                            terms.last_pause_s,
                        )
                    renew_at = trio.current_time() + terms.last_pause_s
        if current.error is not None and self.symbols:
            raise current.error

    def _connect(self, nursery: trio.Nursery) -> _Connection:
        connection = _Connection(self)
        self.connections.append(connection)
        nursery.start_soon(connection.run)
        return connection

    def merge(self, connection: _Connection, news: News) -> bool:
        """Merge a frame, and give the result where its symbol is watched."""
        symbol = news.symbol
        merged = self._merged.get(symbol)
        if merged is None:
            merged = self.feed.new_symbol(symbol)
        if not merged.apply(news.event):
            return False
        self._merged[symbol] = merged
        connection.carries.add(symbol)
        if symbol in self.symbols:
            self.feed.give(symbol, merged)
        return True

    def forget(self, symbols: Iterable[str]) -> None:
        """Use nothing again of what has been heard of symbols that no connection carries now."""
        for symbol in symbols:
            if not any(symbol in connection.carries for connection in self.connections):
                self._merged.pop(symbol, None)

    def carries_elsewhere(self, symbol: str, connection: _Connection) -> bool:
        """Whether another connection gives a symbol's frames."""
        return any(symbol in other.carries for other in self.connections if other is not connection)

    def ended(self, connection: _Connection) -> None:
        """A connection is over: what no other carries stands still; synchronous."""
        self.connections.remove(connection)
        lost = connection.carries.difference(*(other.carries for other in self.connections))
        self.forget(lost)
        connection.carries.clear()
        self.feed.stale("disconnected", sorted(lost & self.symbols.keys()))


class _Asked(NamedTuple):
    """A request that waits for its answer; of no symbols where it unsubscribes."""

    symbols: Sequence[str]
    at: float


class _Connection:
    """One WebSocket connection, from its handshake to its end.

    Attributes:
        subscribed: The symbols that have been asked for on it.
        carries: The symbols whose frames come over it.
        settled: Set when all that was asked for has been answered; and at the end.
        over: Set at the end; `error` says why, None where it was no longer wanted.
    """

    def __init__(self, lane: _Lane) -> None:
        self.subscribed: dict[str, None] = {}
        self.carries: set[str] = set()
        self.settled = trio.Event()
        self.over = trio.Event()
        self.error: SourceError | None = None
        self._lane = lane
        self._feed = lane.feed
        self._terms = lane.feed.terms
        self._scope = trio.CancelScope()
        self._wake = trio.Event()
        self._asked: dict[int, _Asked] = {}
        self._again: deque[Sequence[str]] = deque()
        self._heard_at = 0.0

    def wake(self) -> None:
        """The symbols have changed."""
        self._wake.set()

    def stop(self) -> None:
        """End politely, soon; synchronous."""
        self._scope.cancel()

    async def run(self) -> None:
        """Live until it is lost, not wanted any more, or cancelled; `over` says so."""
        stream: trio.SocketStream | trio.SSLStream[trio.SocketStream] | None = None
        try:
            # trio-websocket reads in the outer nursery, which must outlive the polite end.
            async with trio.open_nursery() as nursery:
                socket: trio_websocket.WebSocketConnection | None = None
                failure: Exception | None = None
                try:
                    with self._scope:
                        await self._feed.wait_for_turn()
                        address = self._feed.address
                        with trio.fail_after(self._terms.connect_timeout_s):
                            stream = await address.connect()
                            socket = await trio_websocket.wrap_client_stream(
                                nursery,
                                stream,
                                address.host_header,
                                address.resource,
                                message_queue_size=BUFFERED_MESSAGES,
                                max_message_size=MESSAGE_BYTES,
                            )
                        await self._talk(socket)
                except Exception as error:
                    failure = error
                finally:
                    self._lane.ended(self)
                if socket is not None:
                    # It would wait without limit for the other's close frame.
                    with trio.move_on_after(CLOSE_TIMEOUT_S):
                        await socket.aclose()
                nursery.cancel_scope.cancel()
                if failure is not None:
                    raise failure
        except BaseExceptionGroup as group:
            lost, other = group.split(LOST)
            if other is not None:
                raise other from None
            assert lost is not None
            self.error = explained(lost)
        finally:
            if stream is not None:
                await trio.aclose_forcefully(stream)
            self.over.set()
            self.settled.set()

    async def _talk(self, socket: trio_websocket.WebSocketConnection) -> None:
        self._heard_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_silence)
            nursery.start_soon(self._speak, socket, nursery)
            while True:
                message = await socket.get_message()
                self._heard_at = trio.current_time()
                self._feed.take(self._lane, self, message)

    async def _watch_silence(self) -> NoReturn:
        while True:
            since = self._heard_at
            if self._asked:
                since = min(since, next(iter(self._asked.values())).at)
            if since + self._terms.silence_s <= trio.current_time():
                raise SourceError(f"nothing heard for {self._terms.silence_s:g} s")
            await trio.sleep_until(since + self._terms.silence_s)

    async def _speak(
        self, socket: trio_websocket.WebSocketConnection, nursery: trio.Nursery
    ) -> None:
        """Say what has to be said, one thing at a time; ends the connection without symbols."""
        terms = self._terms
        ping_at = trio.current_time() + terms.ping_s
        while self._lane.symbols:
            if (request := self._next_request()) is not None:
                await socket.send_message(request)
            elif trio.current_time() >= ping_at:
                ping_at = trio.current_time() + terms.ping_s
                if (ping := self._feed.ping(self._feed.next_id())) is not None:
                    await socket.send_message(ping)
                else:
                    nursery.start_soon(self._ping, socket)
            else:
                if not self._asked and not self.settled.is_set():
                    self.settled.set()
                    logs.emit(
                        logs.line(
                            "exchange_connected",
                            exchange=self._feed.name,
                            symbols=len(self.subscribed),
                        )
                    )
                with trio.move_on_at(ping_at):
                    await self._wake.wait()
                self._wake = trio.Event()
                continue
            await trio.sleep(terms.spacing_s)
        self._scope.cancel()

    async def _ping(self, socket: trio_websocket.WebSocketConnection) -> None:
        await socket.ping()
        self._heard_at = trio.current_time()

    def _next_request(self) -> str | None:
        """What has to be asked for next: what is too much, then what is missing."""
        wanted, most = self._lane.symbols, self._terms.symbols_per_request
        gone = [symbol for symbol in self.subscribed if symbol not in wanted][:most]
        if gone:
            for symbol in gone:
                del self.subscribed[symbol]
            self.carries.difference_update(gone)
            self._lane.forget(gone)
            return self._ask("unsubscribe", gone)
        while self._again:
            again = [symbol for symbol in self._again.popleft() if symbol in self.subscribed]
            if again:
                return self._ask("subscribe", again)
        missing = [symbol for symbol in wanted if symbol not in self.subscribed][:most]
        if not missing:
            return None
        self.subscribed.update(dict.fromkeys(missing))
        return self._ask("subscribe", missing)

    def _ask(self, op: Literal["subscribe", "unsubscribe"], symbols: Sequence[str]) -> str:
        number = self._feed.next_id()
        asked_for = symbols if op == "subscribe" else ()
        self._asked[number] = _Asked(asked_for, trio.current_time())
        return self._feed.request(op, symbols, number)

    def answered(self, reply: Reply) -> None:
        """An answer has come. A refusal may be of any symbol of its request: halves find which.

        Raises:
            SourceError: Refused is what another connection has.
        """
        asked = None if reply.id is None else self._asked.pop(reply.id, None)
        self._wake.set()
        if reply.error is None:
            return
        if asked is None:
            self._feed.tell_bad(reply.error)
        elif len(asked.symbols) > 1:
            half = len(asked.symbols) // 2
            self._again += [asked.symbols[:half], asked.symbols[half:]]
        elif asked.symbols and not reply.is_subscribed:
            [symbol] = asked.symbols
            if self._lane.carries_elsewhere(symbol, self):
                # The exchange has it: this connection is the one that cannot take over.
                raise SourceError(f"{symbol} was refused, which another connection has")
            self.subscribed.pop(symbol, None)
            self.carries.discard(symbol)
            self._lane.forget([symbol])
            self._feed.refused(symbol, reply.error)
