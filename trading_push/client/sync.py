"""The client for plain threads: scripts, notebooks, Flask.

::

    with connect(url, token, channels=["balance", "ticker.BTCUSDT"]) as client:
        for push in client:
            print(push.channel, push.data)

It needs the library `websockets` (extra `aio`). What ends it for good is raised, by `connect` or
from the loop, as `trading_push.client` says. A thread of its own keeps the connection alive while
the program does something else; it never keeps a program from ending.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, NoReturn

from trading_push.client import ending
from trading_push.client.core import ClientCore
from trading_push.client.ending import ConnectionLost
from trading_push.client.messages import Push
from trading_push.client.websockets_link import (
    CLOSE_TIMEOUT_S,
    HandshakeRejected,
    judged,
    options,
)
from trading_push.transport import websocket_url

# isort: split
# Behind the link, which says what to install.
import websockets.sync.client
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.protocol import Event

__all__ = ["Client", "connect"]

Token = str | Callable[[], str]

_INTERRUPT_S: Final = 1.0
"""How long a wait goes on at most: on Windows, only its end lets Ctrl-C in."""

_now = time.monotonic


class _Connection(websockets.sync.client.ClientConnection):
    """A connection that tells when a frame was last heard, and follows no redirect."""

    heard_at = 0.0
    """When a frame last came, pings included."""

    def handshake(self, *args: Any, **options: Any) -> None:
        try:
            super().handshake(*args, **options)
        except InvalidStatus as error:
            raise HandshakeRejected(error) from error

    def process_event(self, event: Event) -> None:
        self.heard_at = _now()
        super().process_event(event)


class _Driver:
    """What the client's thread does; it does not know the `Client`, which may be forgotten.

    Args:
        url: Where the server is.
        token: The token, or the application's function.
        core: What decides. Whoever touches it holds `news`.
    """

    def __init__(self, url: str, token: Token, core: ClientCore) -> None:
        self._url = url
        self._token = token
        self._core = core
        # The connection, while there is one.
        self._socket: _Connection | None = None
        # Set when the client is closed.
        self._closing = threading.Event()
        self.news = threading.Condition()
        """Notified when the core has something new."""
        self.is_forgotten = False
        """Whether nobody can take pushes any more; plain, so that it is safe to set at any time."""
        self._thread = threading.Thread(target=self._run, name="trading_push client", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def close(self) -> None:
        """Close the connection politely, and wait for the thread, for a second or two at most."""
        with self.news:
            self._core.leave()
            self.news.notify_all()
            socket = self._socket
        self._closing.set()
        if socket is not None:
            socket.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)

    # --- in the client's thread -------------------------------------------------------------------

    def _run(self) -> None:
        """Keep connected until closed, or until it is over for good."""
        core = self._core
        while self._is_wanted():
            with self.news:
                core.connecting()
            try:
                self._connect_and_talk()
            except (Exception, SystemExit) as error:  # whose exit the application asks for
                with self.news:
                    core.lost(judged(error, has_succeeded=core.has_succeeded), _now())
                    self.news.notify_all()
            if self._is_wanted():
                self._closing.wait(max(0, core.retry_at - _now()))

    def _is_wanted(self) -> bool:
        with self.news:
            if self.is_forgotten:
                self._core.leave()
            return not self._core.is_over

    def _connect_and_talk(self) -> None:
        """Live through one connection, which ends by an exception."""
        token = self._core.check(self._next_token())
        with websockets.sync.client.connect(
            self._url, create_connection=_Connection, **options()
        ) as socket:
            assert isinstance(socket, _Connection)
            try:
                with self.news:
                    if self._core.is_over:
                        return  # closed while it connected
                    self._socket = socket
                    self._core.opened(token, _now())
                self._read(socket)
            finally:
                with self.news:
                    self._socket = None
                socket.close()

    def _read(self, socket: _Connection) -> NoReturn:
        """Hand what the server sends to the core, which ends the connection by raising."""
        core = self._core
        while True:
            if not self._is_wanted():
                raise ConnectionLost("nobody wants it any more")
            self._send(socket)
            text: str | bytes | None = None
            try:
                text = socket.recv(max(0, core.deadline - _now()))
            except TimeoutError:
                with self.news:
                    core.tick(socket.heard_at, _now())
                continue
            with self.news:
                core.received(text, _now())
                self.news.notify_all()
                is_due = core.renewal.is_due()
            if is_due:
                # The application's function may take its time, which must hold no push up.
                threading.Thread(
                    target=self._renew, args=[socket], name="trading_push renewal", daemon=True
                ).start()

    def _renew(self, socket: _Connection) -> None:
        """Authenticate again on the living connection, as soon as there is another token."""
        core = self._core
        renewal = core.renewal
        while not self._closing.wait(max(0, renewal.at - _now())):
            with self.news:
                renewal.asking(_now())
            try:
                token = self._next_token()
                with self.news:
                    if socket is not self._socket:
                        return  # another connection has another token
                    core.renew(token)
                self._send(socket)
            except ConnectionLost:
                with self.news:
                    renewal.failed(_now())
                continue
            except ConnectionClosed:
                pass  # the reader knows
            except (Exception, SystemExit) as error:
                with self.news:
                    core.lost(error, _now())
                    self.news.notify_all()
                socket.close()
            return

    def _next_token(self) -> str:
        if isinstance(self._token, str):
            return self._token
        try:
            return self._token()
        except Exception as error:  # the application's own, which may succeed the next time
            raise ending.no_token(error) from error

    def _send(self, socket: _Connection) -> None:
        with self.news:
            messages = self._core.outgoing()
        for message in messages:
            socket.send(message)


class Client:
    """The pushes of a connection that is kept alive; made by `connect`.

    Any thread may call any of its methods.
    """

    def __init__(
        self, url: str, token: Token, channels: Sequence[str], offered: bool, attempts: int
    ) -> None:
        self._core = ClientCore(
            url,
            channels,
            offered=offered,
            attempts=attempts,
            can_renew=not isinstance(token, str),
            back_off=ending.back_off,
        )
        parsed = websocket_url.parse(url, ending.not_a_url(url))
        self._driver = _Driver(parsed.text, token, self._core)
        self._driver.start()

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

    def __iter__(self) -> Client:
        return self

    def __next__(self) -> Push:
        """Return the next push. Ctrl-C interrupts the wait, and loses none.

        Raises:
            TradingPushError: What ended the client for good.
        """
        with self._driver.news:
            while True:
                push = self._core.take()
                if push is not None:
                    return push
                if self._core.is_over:
                    if self._core.error is not None:
                        raise self._core.error from None
                    raise StopIteration
                self._driver.news.wait(_INTERRUPT_S)

    def _enter(self) -> None:
        """Wait until the first connection has come about.

        Raises:
            TradingPushError: It has not.
        """
        with self._driver.news:
            while not self._core.has_succeeded and not self._core.is_over:
                self._driver.news.wait(_INTERRUPT_S)
            if self._core.error is not None and not self._core.has_succeeded:
                raise self._core.error

    def close(self) -> None:
        """Close the connection politely, for a second at most; loops over the pushes end."""
        self._driver.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A client that was not closed: its thread finds out by itself. No lock is taken here, which
        # whatever is being interrupted may hold.
        if hasattr(self, "_driver"):
            self._driver.is_forgotten = True


def connect(
    url: str,
    token: Token,
    *,
    channels: Sequence[str] = (),
    offered: bool = False,
    attempts: int = 3,
) -> Client:
    """Connect, authenticate and subscribe; then stay connected until closed.

    The client is a context manager, which closes it. One that is not closed lives on, in a daemon
    thread, until the object is forgotten or the program ends.

    Args:
        url: Where the server is, `ws://` or `wss://`.
        token: The token, or a function that gives one. It is called in another thread, for each
            connection, and when the server says that the present token is about to expire. What it
            raises is answered with another try after the back-off; `Refused` or
            `AuthenticationError` ends the client.
        channels: What to subscribe.
        offered: Subscribe also to each channel that the server says it offers; tickers are not
            among them.
        attempts: How many tries the first connection has. Later ones are tried for ever.

    Raises:
        ConfigurationError: The URL is not one of a WebSocket.
        AuthenticationError, Refused, Unreachable: It does not come about.
    """
    client = Client(url, token, channels, offered, attempts)
    try:
        client._enter()
    except BaseException:
        client.close()
        raise
    return client
