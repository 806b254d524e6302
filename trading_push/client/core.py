"""The logic of every Python client: states, back-off, gaps, resuming, tokens, deadlines. Sans-I/O.

Three clients drive it: `client` on trio, `aio` on asyncio, `sync` on threads. Each goes round this
loop, by its own clock, and hands the time of that clock in::

    while not core.is_over:
        core.connecting()
        try:
            token = core.check(...)              # a function that fails: ending.no_token(error)
            ...                                  # connect
            core.opened(token, now)
            while True:
                ...                              # send what core.outgoing() returns
                ...                              # wait for a message until core.deadline
                core.received(text, now)         # or, at the deadline: core.tick(heard_at, now)
        except Exception as error:
            core.lost(error, now)
        ...                                      # wait until core.retry_at

What ends a connection is raised by `check`, `received` and `tick`, or made by `ending` of what a
library raised; `lost` decides what follows. Pushes wait in the core until the application takes
them, so that one that is slow does not keep the client from reading, and from answering pings.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import attrs

from trading_push.client import ending
from trading_push.client.channels import Channels
from trading_push.client.ending import ConnectionLost, Refused, Unreachable
from trading_push.client.mailbox import Mailbox
from trading_push.client.messages import ErrorBody, Message, Push, encode, parse, push_of
from trading_push.client.renewal import Renewal
from trading_push.errors import AuthenticationError, ErrorCode

__all__ = ["ClientCore", "State"]

NOTICE_MOST_S: Final = 60.0
"""The longest advice of a server, on when to come back, that is followed."""
REPLY_TIMEOUT_S: Final = 10.0
CONNECT_TIMEOUT_S: Final = 5.0
"""How long TCP, TLS and the handshake may take together; it is for the drivers to hold."""
MESSAGE_BYTES: Final = 16 * 2**20
"""How long a message of the server may be; it is for the drivers to hold."""
_HEARTBEAT_S: Final = (0.1, 300.0)
"""The least and the most that the server's heartbeat is believed to be."""
_AUTH_ID: Final = 0
"""The `id` of each `auth`; other requests count up from it."""


class State(enum.StrEnum):
    """What a client is doing."""

    CONNECTING = "connecting"
    OPEN = "open"
    WAITING = "waiting"
    ENDED = "ended"


@attrs.frozen
class _Request:
    """A request that waits for its reply."""

    op: str
    deadline: float
    names: Sequence[str] = ()


class ClientCore:
    """One client, from its first connection to its end.

    It is one class, over 300 lines long, because what it decides hangs on all of its state; what
    has a state of its own stands in `channels`, `mailbox` and `renewal`.

    Args:
        url: Where the server is, for the texts of errors.
        channels: What to subscribe.
        offered: Whether to subscribe all that the server offers, too.
        attempts: How many tries the first connection has.
        can_renew: Whether another token may be had.
        back_off: Computes the wait after so many failures in a row, in seconds.
    """

    def __init__(
        self,
        url: str,
        channels: Iterable[str],
        *,
        offered: bool,
        attempts: int,
        can_renew: bool,
        back_off: Callable[[int], float],
    ) -> None:
        self._url = url
        self._channels = Channels(channels)
        self._mailbox = Mailbox()
        self._offered = offered
        self._attempts = attempts
        self._can_renew = can_renew
        self._back_off = back_off
        # How many connections in a row did not last.
        self._failures = 0
        # The last token that the server called expired; the same one again ends the client.
        self._expired: str | None = None
        self._next_id = _AUTH_ID + 1

        # --- of the present connection ---
        self._outgoing: list[str] = []
        # The requests that wait for their replies, by `id`, the oldest first.
        self._requests: dict[int | str | None, _Request] = {}
        # The token it was opened with; None before.
        self._token: str | None = None
        # Within what time something must be heard; from `auth`.
        self._heartbeat_s = math.inf
        self._heard_at = 0.0
        # When the server was pinged because of its silence; None if it has been heard since.
        self._pinged_at: float | None = None
        # Since when it is of use; None before.
        self._ready_at: float | None = None
        # When to come back, in seconds, as the server's last notice said; None without one.
        self._advice_s: float | None = None
        self.renewal = Renewal(can_renew, back_off)
        """The renewals of the token on it."""

        self.state = State.CONNECTING
        self.has_succeeded = False
        """Whether the channels have been subscribed once."""
        self.retry_at = 0.0
        """When the next connection is due, while the state is `WAITING`."""
        self.trouble: str | None = None
        """Why the last connection ended; None while one is of use."""
        self.error: BaseException | None = None
        """What ended the client for good; None where the application left it."""
        self.user: str | None = None
        """Who the server says we are."""

    # --- a connection begins and ends -------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether there is no further connection."""
        return self.state is State.ENDED

    def connecting(self) -> None:
        """Begin another connection; after the end nothing begins."""
        if self.is_over:
            return
        self.state = State.CONNECTING
        self._channels.begin()
        self._outgoing = []
        self._requests = {}
        self._token = self._ready_at = self._advice_s = self._pinged_at = None
        self._heartbeat_s = math.inf
        self.renewal = Renewal(self._can_renew, self._back_off)

    def check(self, token: str) -> str:
        """Return the token that the application gives.

        Raises:
            AuthenticationError: It is one that the server has called expired.
        """
        if token == self._expired:
            raise AuthenticationError("the token has expired: get a new one", expired=True)
        return token

    def opened(self, token: str, now: float) -> None:
        """Take note that the handshake is done."""
        self._token = token
        self._heard_at = now
        self._requests[_AUTH_ID] = _Request("auth", now + REPLY_TIMEOUT_S)
        self._send({"op": "auth", "id": _AUTH_ID, "token": token})

    def lost(self, error: BaseException, now: float) -> None:
        """Take note of what ended the connection; wait for the next one, or end.

        Args:
            error: A `ConnectionLost`, or what ends the client: one of `FINAL`, or a bug.
            now: The time.
        """
        if self.is_over:
            return
        if not isinstance(error, ConnectionLost):
            self._end(error)
            return
        self.trouble = str(error)
        if self._ready_at is not None and now - self._ready_at >= ending.LASTING_S:
            self._failures = 0
        self._failures += 1
        if not self.has_succeeded and self._failures >= self._attempts:
            self._end(Unreachable(f"cannot reach {self._url}: {self.trouble}"))
            return
        self.state = State.WAITING
        advice_s = self._advice_s
        self.retry_at = now + (self._back_off(self._failures) if advice_s is None else advice_s)

    def leave(self) -> None:
        """End, because the application has left; pushes that wait are not wanted any more."""
        self._mailbox.clear()
        if not self.is_over:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self.error = error
        self.state = State.ENDED

    def renew(self, token: str) -> None:
        """Authenticate anew on the living connection.

        Raises:
            AuthenticationError: The server has called that token expired.
        """
        token = self.check(token)
        self.renewal.done()
        self._send({"op": "auth", "id": _AUTH_ID, "token": token})

    # --- what goes out, and when ------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """When `tick` is due, unless a message comes before."""
        if self._pinged_at is not None:
            quiet_until = self._pinged_at + self._heartbeat_s
        else:
            quiet_until = self._heard_at + self._heartbeat_s
        for request in self._requests.values():
            return min(request.deadline, quiet_until)
        return quiet_until

    def outgoing(self) -> list[str]:
        """Remove and return the messages that are to be sent."""
        messages, self._outgoing = self._outgoing, []
        return messages

    def tick(self, heard_at: float, now: float) -> None:
        """Act on the time that has passed.

        Args:
            heard_at: When the connection last brought anything, pings and parts of messages
                included.
            now: The time.

        Raises:
            ConnectionLost: The server has been silent for too long, or owes a reply.
        """
        for request in self._requests.values():
            if request.deadline <= now:
                raise ConnectionLost("the server does not answer")
            break
        if heard_at > self._heard_at:
            self._heard(heard_at)
        if self._pinged_at is not None:
            if now - self._pinged_at >= self._heartbeat_s:
                raise ConnectionLost("the server fell silent")
        elif now - self._heard_at >= self._heartbeat_s:
            self._pinged_at = now
            self._send({"op": "ping"})

    def _heard(self, at: float) -> None:
        self._heard_at = at
        self._pinged_at = None

    def _send(self, request: dict[str, Any]) -> None:
        self._outgoing.append(encode(request))

    # --- what comes in ----------------------------------------------------------------------------

    def received(self, text: str | bytes, now: float) -> None:
        """Take one message of the server; after the end none counts.

        Raises:
            ConnectionLost: The connection is over.
            AuthenticationError, Refused: The client is over for good.
        """
        if self.is_over:
            return  # of threads, one may leave while another has a message in its hands
        self._heard(now)
        message = parse(text)
        match message.op:
            case None:
                self._take_push(message, text, now)
            case "notice":
                self._take_notice(message, now)
            case _:
                self._take_reply(message, now)

    def _take_push(self, message: Message, text: str | bytes, now: float) -> None:
        name = message.channel or ""
        position = self._channels.get(name)
        if position is None or position.request is not None:
            return
        gap = False
        if message.type in ("snapshot", "update"):
            if position.lacks(message):
                position.doubt(message)
                self._subscribe([name], now, again=True)
                return
            if not position.move_to(message):
                return  # seen already
            gap, position.has_gap = position.has_gap, False
        elif message.type != "status":
            return  # of a later version
        push = push_of(message, text, gap=gap)
        if self._mailbox.put(push, is_state=position.is_state):
            return
        # The application is so slow that its channel is full. What it has not taken is dropped, and
        # asked for again; if that has not helped before, it gets a snapshot.
        first = self._mailbox.drop(name) or push
        is_told = first.prev is not None and not position.was_full
        position.epoch = first.epoch if is_told else None
        position.seq = first.prev or 0
        position.has_gap = position.was_full = True
        self._subscribe([name], now, again=True)

    def _take_notice(self, message: Message, now: float) -> None:
        if message.reconnect_after_ms is not None:
            self._advice_s = min(max(message.reconnect_after_ms / 1000, 0), NOTICE_MOST_S)
        if message.code == "token_expires":
            self.renewal.want(now)

    def _take_reply(self, message: Message, now: float) -> None:
        number = message.id
        if number is None and message.op == "error" and not self.has_user:
            number = _AUTH_ID  # it could not be read
        request = self._requests.pop(number, None)
        if request is None:
            # A renewal that is refused leaves the session as it was, until its token expires.
            if number == _AUTH_ID and message.error is not None and message.error.retryable:
                self.renewal.want(now)
            return
        match request.op:
            case "auth":
                self._take_auth(message, now)
            case "channels":
                self._take_offer(message, now)
            case _:
                self._take_results(request.names, message, now)

    @property
    def has_user(self) -> bool:
        """Whether the present connection is authenticated."""
        return self._heartbeat_s != math.inf

    def _take_auth(self, message: Message, now: float) -> None:
        error = message.error
        if message.op == "auth" and error is None and message.ok:
            self.user = message.user
            least, most = _HEARTBEAT_S
            self._heartbeat_s = min(max(message.heartbeat_s, least), most)
            if self._offered:
                number = self._number()
                self._requests[number] = _Request("channels", now + REPLY_TIMEOUT_S)
                self._send({"op": "channels", "id": number})
            else:
                self._subscribe_all(now)
            return
        # Refused: whether another try may help is the error's to say.
        error = error or ErrorBody(message="the server refused the token")
        if error.code == ErrorCode.TOKEN_EXPIRED:
            # One more try, where each try asks for a token; the same one again raises in `check`.
            self._expired = self._token
            if not self._can_renew:
                raise AuthenticationError(error.message, expired=True)
            raise ConnectionLost(error.message)
        if error.code == ErrorCode.BAD_TOKEN and not error.retryable:
            raise AuthenticationError(error.message)
        raise _judged(error)

    def _take_offer(self, message: Message, now: float) -> None:
        if message.error is not None:
            if message.error.code == ErrorCode.UNKNOWN_OP:  # an older server
                raise Refused("the server does not tell what it offers: name the channels")
            raise _judged(message.error)
        self._channels.offer(message.channels)
        self._subscribe_all(now)

    def _take_results(self, names: Sequence[str], message: Message, now: float) -> None:
        if message.error is not None or len(message.results) != len(names):
            misfit = ErrorBody(message="the server's reply does not fit", retryable=True)
            raise _judged(message.error or misfit)
        for name, result in zip(names, message.results, strict=True):
            if not result.ok:
                raise _judged(result.error or ErrorBody(message="the server refuses it"), name)
            self._channels.grant(name, result.channel or name)
        self._become_ready(now)

    # --- subscribing ------------------------------------------------------------------------------

    def _subscribe_all(self, now: float) -> None:
        if self._channels:
            self._subscribe(self._channels.names, now)
        else:
            self._become_ready(now)

    def _subscribe(self, names: list[str], now: float, *, again: bool = False) -> None:
        """Subscribe some channels, each from where it stands; `again`: they are subscribed now."""
        number = self._number()
        self._requests[number] = _Request("subscribe", now + REPLY_TIMEOUT_S, names)
        if again:
            # Subscribing twice starts nothing new: the old stream has to end first.
            self._send({"op": "unsubscribe", "args": names})
        args = self._channels.items(names, number)
        self._send({"op": "subscribe", "id": number, "args": args})

    def _number(self) -> int:
        number = self._next_id
        self._next_id += 1
        return number

    def _become_ready(self, now: float) -> None:
        if self._ready_at is None:
            self._ready_at = now
        self.state = State.OPEN
        self.trouble = None
        self.has_succeeded = True

    # --- for the application ----------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether the channels are subscribed just now."""
        return self.state is State.OPEN

    def is_of_events(self, channel: str) -> bool:
        """Whether each push of a channel is an event, as far as the server has said."""
        position = self._channels.get(channel)
        return position is not None and position.is_of_events

    def take(self) -> Push | None:
        """Return the next push that waits; None where none does."""
        push = self._mailbox.take()
        if push is not None and (position := self._channels.get(push.channel)) is not None:
            position.was_full = False
        return push


def _judged(error: ErrorBody, channel: str = "") -> Exception:
    """Judge an error of the server: another connection may help, or it does not."""
    why = f"{channel}: {error.message}" if channel else error.message
    return ConnectionLost(why) if error.retryable else Refused(why)
