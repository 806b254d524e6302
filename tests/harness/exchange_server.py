"""A loopback exchange: Binance, Bybit or OKX. It follows a script and keeps count.

It answers as the exchanges' documentation says, and notes whoever breaks the limits that stand
there: the test fails when it leaves. What it sends, and when it misbehaves, the test decides.
"""

from __future__ import annotations

import gzip
import json
import math
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial
from string import ascii_uppercase
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import h11
import trio
import trio_websocket
from wsproto.connection import Connection, ConnectionType
from wsproto.events import CloseConnection, Ping, Pong, TextMessage

Dialect = Literal["binance", "spot", "linear", "okx"]

STREAMS_PER_CONNECTION = 1024  # Binance, "Websocket Limits"
MESSAGES_PER_S = 5
SPOT_ARGS = 10  # Bybit, "Public channel - Args limits"
ARGS_CHARACTERS = 21_000
OKX_REQUEST_BYTES = 64 * 1024  # OKX, "Subscribe"
OKX_REQUESTS_PER_HOUR = 480
PAGE = 100
"""How many symbols a page of Bybit's list has here."""


class _Tapped(trio.abc.Stream):
    """The socket below trio-websocket: counts what the client sends, and can be deaf to it."""

    def __init__(self, below: trio.abc.Stream) -> None:
        self.below = below
        self.hears = trio.Event()
        self.hears.set()
        self.arrivals: list[tuple[float, str]] = []
        """Each ping, pong and message of the client, by its kind, with its time."""
        self._head = b""
        self._frames: Connection | None = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.below.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.below.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.below.receive_some(max_bytes)
        await self.hears.wait()
        self._count(bytes(data))
        return data

    def _count(self, data: bytes) -> None:
        if self._frames is None:
            self._head += data
            _, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self._frames = Connection(ConnectionType.SERVER)
        if not data:
            return
        self._frames.receive_data(data)
        for event in self._frames.events():
            if isinstance(event, Ping | Pong):
                self.arrivals.append((trio.current_time(), type(event).__name__.lower()))
            elif isinstance(event, TextMessage) and event.message_finished:
                self.arrivals.append((trio.current_time(), "message"))

    async def aclose(self) -> None:
        await self.below.aclose()


class Session:
    """The exchange's end of one connection."""

    def __init__(
        self, socket: trio_websocket.WebSocketConnection, tapped: _Tapped, number: int
    ) -> None:
        self.socket = socket
        self.number = number
        """The how manieth connection it is, from 1."""
        self.subscribed: set[str] = set()
        """Streams, or topics."""
        self.requests: list[dict[str, Any]] = []
        self.arrivals = tapped.arrivals
        self._tapped = tapped

    async def send(self, message: object) -> None:
        """A message: text as it is, bytes as a binary one, anything else as JSON."""
        is_ready = isinstance(message, str | bytes)
        await self.socket.send_message(message if is_ready else json.dumps(message))

    def fall_silent(self) -> None:
        """Hear nothing more, and so answer nothing; the connection stays open."""
        self._tapped.hears = trio.Event()

    async def close(self, code: int, reason: str) -> None:
        """End politely; the connection is gone when the client has answered."""
        await self.socket._send(CloseConnection(code, reason))

    async def cut(self) -> None:
        """End without a word."""
        await trio.aclose_forcefully(self._tapped.below)


class Exchange:
    """What all connections share; made by `exchange`.

    Attributes:
        sessions: The connections that are open.
        opened: How many there have been.
        broken: The limits that a client broke.
        refuses: Whether handshakes are refused with 503.
        unknown: Symbols that are refused.
        subscribes_in_part: Whether Bybit subscribes to what stands before a symbol that it refuses,
            instead of to nothing.
        acknowledges: Whether the requests of a connection are answered.
        greeting: What a subscription to one stream, or topic, is sent at once.
        listed: The symbols that the REST service lists; its address is `rest_url`.
        rest_status: What it answers with.
        rest_calls: What it was asked.
        refuses_whole: Whether OKX does nothing of a request that has a channel that does not exist.
    """

    def __init__(self, dialect: Dialect, messages_per_s: float) -> None:
        self.dialect = dialect
        self.url = ""
        self.sessions: list[Session] = []
        self.opened = 0
        self.broken: list[str] = []
        self.refuses = False
        self.unknown: set[str] = set()
        self.subscribes_in_part = False
        self.acknowledges: Callable[[Session], bool] = lambda session: True
        self.greeting: Callable[[str], Iterable[object]] = lambda name: ()
        self.rest_url = ""
        self.listed: list[str] = []
        self.rest_status = 200
        self.rest_calls: list[str] = []
        self.refuses_whole = False
        self._messages_per_s = messages_per_s

    @property
    def session(self) -> Session:
        """The only connection."""
        [only] = self.sessions
        return only

    def has(self, *symbols: str) -> bool:
        """Whether each of the symbols is subscribed, in all its streams, on some connection."""
        names = {name for symbol in symbols for name in self.names(symbol)}
        return names <= {name for session in self.sessions for name in session.subscribed}

    def names(self, symbol: str) -> list[str]:
        """The streams, or the topic, of a symbol."""
        if self.dialect == "binance":
            lower = symbol.encode().lower().decode()  # ASCII letters only
            return [f"{lower}@{kind}" for kind in ("ticker", "bookTicker", "trade")]
        if self.dialect == "okx":
            return [symbol]
        books = [f"orderbook.1.{symbol}"] if self.dialect == "spot" else []
        return [f"tickers.{symbol}", *books]

    async def say(self, *frames: dict[str, Any]) -> None:
        """Send frames to everybody who has subscribed to their stream, or topic."""
        for frame in frames:
            name = frame.get("stream") or frame.get("topic") or frame["arg"]["instId"]
            for session in list(self.sessions):
                if name in session.subscribed:
                    with suppress(trio_websocket.ConnectionClosed):
                        await session.send(frame)

    async def serve(self, stream: trio.abc.Stream) -> None:
        tapped = _Tapped(stream)
        async with trio.open_nursery() as nursery:
            request = await trio_websocket.wrap_server_stream(nursery, tapped)
            if self.refuses:
                await request.reject(503)
                await tapped.aclose()
                return
            self.opened += 1
            session = Session(await request.accept(), tapped, self.opened)
            self.sessions.append(session)
            try:
                with suppress(trio_websocket.ConnectionClosed):
                    while True:
                        await self._hear(session, await session.socket.get_message())
            finally:
                self.sessions.remove(session)
                self._check_rate(session)
                nursery.cancel_scope.cancel()
                await trio.aclose_forcefully(stream)

    async def _hear(self, session: Session, message: str | bytes) -> None:
        if self.dialect == "okx":
            if message == "ping":
                session.requests.append({"op": "ping"})
                await session.send("pong")
                return
            await self._okx(session, message)
            return
        request = json.loads(message)
        session.requests.append(request)
        answer = self._binance if self.dialect == "binance" else self._bybit
        added, reply = answer(session, request)
        if len(session.subscribed) > STREAMS_PER_CONNECTION and self.dialect == "binance":
            self.broken.append(f"{len(session.subscribed)} streams on one connection")
        if self.acknowledges(session):
            await session.send(reply)
        for name in added:
            for frame in self.greeting(name):
                await session.send(frame)

    def _binance(self, session: Session, request: dict[str, Any]) -> tuple[list[str], object]:
        assert request.keys() == {"method", "params", "id"}, request
        names = request["params"]
        assert not any(set(name.partition("@")[0]) & set(ascii_uppercase) for name in names), names
        if request["method"] == "UNSUBSCRIBE":
            session.subscribed.difference_update(names)
            return [], {"result": None, "id": request["id"]}
        assert request["method"] == "SUBSCRIBE"
        for name in names:
            if name.partition("@")[0].upper() in self.unknown:
                error = {"code": 2, "msg": f"Invalid request: unknown stream {name}"}
                return [], {"error": error, "id": request["id"]}
        session.subscribed.update(names)
        return names, {"result": None, "id": request["id"]}

    async def _okx(self, session: Session, message: str | bytes) -> None:
        if len(message) > OKX_REQUEST_BYTES:
            self.broken.append("a request of more than 64 KB")
        request = json.loads(message)
        session.requests.append(request)
        if sum(each["op"] != "ping" for each in session.requests) > OKX_REQUESTS_PER_HOUR:
            self.broken.append("more than 480 requests in one hour")
        assert request.keys() == {"id", "op", "args"}, request
        assert request["id"].isalnum(), request
        replies: list[dict[str, Any]] = []
        is_refused = any(arg["instId"] in self.unknown for arg in request["args"])
        for arg in request["args"]:
            assert arg.keys() == {"channel", "instId"}, request
            assert arg["channel"] == "tickers", request
            symbol = arg["instId"]
            reply = {"id": request["id"], "connId": "a4d3ae55"}
            if symbol in self.unknown:
                words = f"Wrong URL or channel:tickers,instId:{symbol} doesn't exist."
                replies.append({**reply, "event": "error", "code": "60018", "msg": words})
                if self.refuses_whole:
                    break
                continue
            if self.refuses_whole and is_refused:
                continue
            if request["op"] == "subscribe":
                session.subscribed.add(symbol)
            else:
                session.subscribed.discard(symbol)
            replies.append({**reply, "event": request["op"], "arg": arg})
        if self.acknowledges(session):
            for each in replies:
                await session.send(each)

    def _rest(self, target: str) -> object:
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        match parts.path:
            case "/api/v3/exchangeInfo":
                return {"timezone": "UTC", "symbols": [{"symbol": each} for each in self.listed]}
            case "/v5/market/instruments-info":
                assert query["category"] == self.dialect
                start = int(query.get("cursor", 0))
                page = [{"symbol": each} for each in self.listed[start : start + PAGE]]
                more = str(start + PAGE) if start + PAGE < len(self.listed) else ""
                return {"retCode": 0, "result": {"list": page, "nextPageCursor": more}}
            case "/api/v5/public/instruments":
                listed = self.listed if query["instType"] == "SPOT" else []
                return {"code": "0", "msg": "", "data": [{"instId": each} for each in listed]}
        return None

    async def serve_rest(self, stream: trio.SocketStream) -> None:
        """Answer one request for the list of symbols."""
        http = h11.Connection(h11.SERVER)
        async with stream:
            while not isinstance(event := http.next_event(), h11.Request):
                http.receive_data(bytes(await stream.receive_some(65536)))
            target = event.target.decode()
            self.rest_calls.append(target)
            body = gzip.compress(json.dumps(self._rest(target)).encode())
            head = [("Content-Encoding", "gzip"), ("Transfer-Encoding", "chunked")]
            data = http.send(h11.Response(status_code=self.rest_status, headers=head)) or b""
            for start in range(0, len(body), 1000):
                data += http.send(h11.Data(data=body[start : start + 1000])) or b""
            await stream.send_all(data + (http.send(h11.EndOfMessage()) or b""))

    def _bybit(self, session: Session, request: dict[str, Any]) -> tuple[list[str], object]:
        reply = {
            "success": True,
            "ret_msg": request["op"],
            "conn_id": "465772b1-7630-4fdc-a492-e003e6f0f260",
            "req_id": request.get("req_id", ""),
            "op": request["op"],
        }
        if request["op"] == "ping":
            return [], reply | {"ret_msg": "pong"}
        names = request["args"]
        if self.dialect == "spot" and len(names) > SPOT_ARGS:
            self.broken.append(f"{len(names)} args in one request")
        if request["op"] == "unsubscribe":
            session.subscribed.difference_update(names)
            return [], reply
        assert request["op"] == "subscribe"
        before = frozenset(session.subscribed)
        for name in names:
            if name in before:
                error = f"error:already subscribed,topic:{name}"
                return [], reply | {"success": False, "ret_msg": error}
            if name.rpartition(".")[2] in self.unknown:
                error = f"error:handler not found,topic:{name}"
                return [], reply | {"success": False, "ret_msg": error}
            if self.subscribes_in_part:
                session.subscribed.add(name)
        session.subscribed.update(names)
        if len(json.dumps(sorted(session.subscribed))) > ARGS_CHARACTERS:
            self.broken.append("more than 21,000 characters of topics on one connection")
        return names, reply

    def _check_rate(self, session: Session) -> None:
        times = [at for at, _ in session.arrivals]
        for first, at in enumerate(times):
            count = sum(at <= other < at + 1 for other in times[first:])
            if count > self._messages_per_s:
                self.broken.append(f"{count} messages in one second")
                return


@asynccontextmanager
async def exchange(
    dialect: Dialect,
    *,
    messages_per_s: float = math.inf,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[Exchange]:
    """An exchange on a free port while the context is open; none of its limits may be broken.

    Args:
        dialect: Binance, or the category of Bybit.
        messages_per_s: How many messages of a client one second may hold; unbounded for tests
            whose clients have no time to be slow.
        ssl_context: Serve over TLS with this, as `localhost`.
    """
    made = Exchange(dialect, messages_per_s)
    path = {"binance": "/stream", "okx": "/ws/v5/public"}.get(dialect, f"/v5/public/{dialect}")

    async def serve(stream: trio.SocketStream) -> None:
        if ssl_context is None:
            await made.serve(stream)
        else:
            await made.serve(trio.SSLStream(stream, ssl_context, server_side=True))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            listen = partial(trio.serve_tcp, serve, 0, host="127.0.0.1")
            [listener] = await nursery.start(listen)
            port = listener.socket.getsockname()[1]
            address = f"127.0.0.1:{port}" if ssl_context is None else f"localhost:{port}"
            [rest] = await nursery.start(
                partial(trio.serve_tcp, made.serve_rest, 0, host="127.0.0.1")
            )
            made.rest_url = f"http://127.0.0.1:{rest.socket.getsockname()[1]}"
            made.url = f"{'ws' if ssl_context is None else 'wss'}://{address}{path}"
            yield made
            for session in made.sessions:
                made._check_rate(session)
            nursery.cancel_scope.cancel()
    assert made.broken == []
