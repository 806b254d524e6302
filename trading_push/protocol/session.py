"""The state machine of one connection, without I/O: a message goes in, actions come out.

    new -> authenticated -> closed

1. Every message of the peer gets exactly one reply, in order.
2. Before authentication only `auth` and `ping` are served, and subscriptions to the market channels
   that are named as anonymous.
3. The owner carries out the actions. One that takes time (`CheckToken`, `Subscribe`,
   `Unsubscribe`) is finished before the next message is handed in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Final, Protocol

from msgspec import UNSET, Raw

from trading_push.auth.principal import Principal
from trading_push.errors import AuthenticationError, CloseCode, ErrorCode, RequestError
from trading_push.protocol import messages, replies
from trading_push.protocol.actions import (
    Action,
    CheckToken,
    End,
    Reply,
    Subscribe,
    Unsubscribe,
    Wanted,
)
from trading_push.protocol.messages import Id, ItemResult
from trading_push.protocol.rate_limit import MessageRate
from trading_push.settings.schema import Limits
from trading_push.topics import Channels, Topic, family_of, market_symbol

__all__ = ["Market", "Session"]

ITEMS_PER_MESSAGE: Final = 20
"""A request counts as one message more for each 20 items."""
ANSWER_BYTES: Final = 65_536
"""A subscribe request counts as one message more for each 64 KiB that it is answered with."""
ANONYMOUS_HZ: Final = 2.0
"""How often a second a subscription without a user is pushed to at most."""
TOKENS: Final = 8
"""How many token ids a session keeps, of tokens that have not expired."""


class Market(Protocol):
    """Which symbols there are, and who may subscribe to their tickers."""

    def knows(self, symbol: str) -> bool:
        """Whether there may be a ticker of a symbol."""
        ...

    def admit(self, user: str, symbol: str) -> None:
        """Let a user subscribe to a symbol that there may be.

        Raises:
            RequestError: There are too many already.
        """
        ...

    def symbols(self) -> tuple[Collection[str], bool]:
        """Return the symbols that are known, and whether those are all that there are."""
        ...


class Session:
    """What one connection may do and is subscribed to; nothing that a peer sends makes it raise.

    Args:
        channels: The channels that there are.
        limits: How many subscriptions and bad messages are allowed, and the heartbeat's interval.
        connection_id: The connection's name in the reply to `auth`.
        market: Which symbols there are.
        rate: The budget of messages.
        clock: The time in seconds since the epoch.
        anonymous: The market channels that are served without a user: `ticker`, `ticker.*`,
            `candles`.
        token_in_url: The client has sent a token in the URL, where it is not read.
        requests: What is answered is counted there, by `op` and by `ok` or the error's code.

    Attributes:
        principal: Who has authenticated, with the latest expiry; None before.
        request_id: The `id` of the request that is being served, for an error reply.
        topics: What is subscribed, in the order in which it was, each with the rate that the client
            has asked for; None for any.
    """

    __slots__ = (
        "_anonymous",
        "_bad",
        "_channels",
        "_clock",
        "_connection_id",
        "_limits",
        "_market",
        "_op",
        "_rate",
        "_requests",
        "_token_in_url",
        "_tokens",
        "principal",
        "request_id",
        "topics",
    )

    def __init__(
        self,
        channels: Channels,
        limits: Limits,
        connection_id: str,
        *,
        market: Market,
        rate: MessageRate,
        clock: Callable[[], float],
        anonymous: Collection[str] = (),
        token_in_url: bool = False,
        requests: Counter[tuple[str, str]] | None = None,
    ) -> None:
        self._channels = channels
        self._limits = limits
        self._connection_id = connection_id
        self._market = market
        self._rate = rate
        self._clock = clock
        self._anonymous = anonymous
        self._token_in_url = token_in_url
        self._requests: Counter[tuple[str, str]] = Counter() if requests is None else requests
        # The `op` of the request that is being served; None before the first.
        self._op: str | None = None
        self._bad = 0  # bad messages in a row
        # The ids of the tokens that authenticated the session, the opening one first, and when
        # each expires.
        self._tokens: tuple[tuple[str, float], ...] = ()
        self.request_id: Id = None
        self.principal: Principal | None = None
        self.topics: dict[Topic, float | None] = {}

    @property
    def user(self) -> str | None:
        """The authenticated user."""
        return None if self.principal is None else self.principal.user

    def receive(self, message: str | bytes) -> list[Action]:
        """Take one message of the peer."""
        self._op = "other"
        return self._counted(self._receive(message))

    def _counted(self, actions: list[Action]) -> list[Action]:
        """Count the reply to the request that is being served, where it is among the actions."""
        for action in actions:
            match action:
                case Reply(message=reply) | Subscribe(reply=reply) | Unsubscribe(reply=reply):
                    if self._op is not None:
                        self._requests[self._op, replies.result_of(reply)] += 1
        return actions

    def failed(self) -> messages.Reply:
        """Make the reply to a request that the server itself has failed at."""
        error = RequestError(ErrorCode.INTERNAL, "an error in the server; try again later")
        [action] = self._counted([Reply(messages.error_reply(self.request_id, error))])
        assert isinstance(action, Reply)
        return action.message

    def _receive(self, message: str | bytes) -> list[Action]:
        if not isinstance(message, str):
            return [End(CloseCode.UNSUPPORTED_DATA, "binary messages are not served")]

        # Decode it. Several bad messages in a row end the connection.
        self.request_id = None
        try:
            request_id, request = messages.decode_request(message)
        except messages.BadRequest as error:
            if not self._rate.spend():
                return self._over_rate(error.id)
            self._bad += 1
            actions: list[Action] = [Reply(messages.error_reply(error.id, error))]
            if self._bad >= self._limits.bad_messages:
                actions.append(End(CloseCode.TOO_MANY_BAD_REQUESTS, "too many bad requests"))
            return actions

        # Charge it.
        self._op = request.op
        if not self._rate.spend(_cost(request)):
            return self._over_rate(request_id)
        self._bad = 0

        # Serve it; only these two without authentication.
        self.request_id = request_id
        match request:
            case messages.AuthRequest(token=token):
                return [CheckToken(request_id, token)]
            case messages.PingRequest():
                now = int(self._clock() * 1000)
                return [Reply(messages.Pong(messages.reply_id(request_id), now))]
        without_user = (
            messages.SubscribeRequest,
            messages.UnsubscribeRequest,
            messages.ListRequest,
        )
        if self.user is None and not (self._anonymous and isinstance(request, without_user)):
            return _refuse(request_id, self._not_authenticated())
        match request:
            case messages.SubscribeRequest(args=args):
                return [self._subscribe(request_id, args, self.user)]
            case messages.UnsubscribeRequest(args=args):
                return [self._unsubscribe(request_id, args, self.user)]
            case messages.SymbolsRequest():
                return [Reply(replies.symbols(request_id, request, self._market.symbols()))]
            case messages.ListRequest():
                names = sorted(topic.channel for topic in self.topics)
                return [Reply(messages.ListReply(messages.reply_id(request_id), True, names))]
            case messages.ChannelsRequest():
                return [Reply(replies.channels(request_id, self._channels))]

    def charge(self, size: int) -> None:
        """Charge a subscribe request for the bytes that it was answered with."""
        if size > ANSWER_BYTES:
            self._rate.charge(size // ANSWER_BYTES)

    def _over_rate(self, request_id: Id) -> list[Action]:
        per_s = self._limits.messages_per_s
        actions = _refuse(
            request_id,
            RequestError(
                ErrorCode.RATE_LIMITED,
                f"over {per_s:g} messages a second, each {ITEMS_PER_MESSAGE} items counting as one "
                "more: slow down",
            ),
        )
        if not self._rate.refuse():
            actions.append(End(CloseCode.TOO_MANY_BAD_REQUESTS, "too many messages"))
        return actions

    # --- authentication ------------------------------------------------------------------

    def authenticated(self, request_id: Id, principal: Principal) -> list[Action]:
        """Take the outcome of `CheckToken`: it is good, and opens or extends the session."""
        return self._counted(self._authenticated(request_id, principal))

    def _authenticated(self, request_id: Id, principal: Principal) -> list[Action]:
        expires_at = principal.expires_at
        if self.principal is not None:
            if principal.user != self.principal.user:
                return _refuse(
                    request_id,
                    RequestError(ErrorCode.FORBIDDEN, "this connection is another user's"),
                )
            old = self.principal.expires_at
            # A renewal never shortens a session: the earlier token is still good.
            if old is None or (expires_at is not None and expires_at < old):
                expires_at = old
        self._keep(principal)
        self.principal = Principal(principal.user, expires_at)
        expires_in = None if expires_at is None else max(0, int(expires_at - self._clock()))
        return [
            Reply(
                messages.AuthReply(
                    messages.reply_id(request_id),
                    True,
                    principal.user,
                    self._connection_id,
                    expires_in,
                    self._limits.heartbeat_s,
                )
            )
        ]

    def authenticated_by(self, token_id: str) -> bool:
        """Whether a token of this id, one that has not expired, opened or extended the session."""
        return any(token_id == each for each, _ in self._tokens)

    def _keep(self, principal: Principal) -> None:
        if principal.token_id is None:
            return
        now = self._clock()
        expires_at = math.inf if principal.expires_at is None else principal.expires_at
        tokens = [
            (token_id, until)
            for token_id, until in self._tokens
            if until > now and token_id != principal.token_id
        ]
        tokens.append((principal.token_id, expires_at))
        if len(tokens) > TOKENS:  # but keep the token that opened it, and the last one to expire
            tokens.remove(min(tokens[1:], key=lambda token: token[1]))
        self._tokens = tuple(tokens)

    def refused(self, request_id: Id, error: AuthenticationError) -> list[Action]:
        """Take the outcome of `CheckToken`: it is refused, which ends an unopened session."""
        actions = self._counted(_refuse(request_id, error))
        if self.principal is None:
            if error.not_yet:
                end = End(CloseCode.TOKEN_EXPIRED, "not valid yet")
            elif error.expired:
                end = End(CloseCode.TOKEN_EXPIRED, error.code.value)
            else:
                end = End(CloseCode.BAD_TOKEN, error.code.value)
            actions.append(end)
        return actions

    # --- subscriptions -------------------------------------------------------------------

    def _not_authenticated(self) -> RequestError:
        message = "send `auth` with a token first"
        if self._token_in_url:
            message += ": a token in the URL (?token=) is not read"
        if self._anonymous:
            message += f" (without one there is only {', '.join(sorted(self._anonymous))})"
        return RequestError(ErrorCode.NOT_AUTHENTICATED, message)

    def _resolve(self, name: str, user: str | None) -> Topic:
        """The topic that a name means; without a user, one of the anonymous channels.

        Raises:
            RequestError: There is none, or it is not for this client.
        """
        if user is not None:
            return self._channels.resolve(name, user)
        topic = self._channels.market(name)
        if topic is not None and family_of(topic.channel) in self._anonymous:
            return topic
        raise self._not_authenticated()

    def rates(self) -> tuple[tuple[Topic, float | None], ...]:
        """What was subscribed without a user, with the rates that it has from now on."""
        return tuple(self.topics.items())

    def _subscribe(self, request_id: Id, args: Iterable[Raw], user: str | None) -> Subscribe:
        results: list[ItemResult] = []
        wanted: list[Wanted] = []
        throttled: list[tuple[Topic, float | None]] = []
        most = self._limits.subscriptions
        if user is None:
            most = min(most, self._limits.anonymous_subscriptions)
        for raw in args:
            # Each item succeeds or fails alone. One that is subscribed already may change its rate.
            name = messages.item_channel(raw)
            try:
                item = messages.decode_item(raw)
                topic = self._resolve(item.channel, user)
                symbol = market_symbol(topic.channel)
                if symbol is not None and not self._market.knows(symbol):
                    raise RequestError(ErrorCode.UNKNOWN_CHANNEL, "there is no such symbol")
                asked = None if item.max_hz is None else float(item.max_hz)
                told_hz = UNSET if item.max_hz is None else item.max_hz
                max_hz, since = asked, item.since
                result = ItemResult(topic.channel, True, max_hz=told_hz)
                if user is None:
                    result.max_hz = max_hz = min(asked or ANONYMOUS_HZ, ANONYMOUS_HZ)
                    if since is not None:
                        since, result.recovered = None, False
                if topic in self.topics:
                    if asked is not None:
                        self.topics[topic] = asked
                        throttled.append((topic, max_hz))
                elif len(self.topics) >= most:
                    raise RequestError(
                        ErrorCode.TOO_MANY_SUBSCRIPTIONS,
                        f"a connection has {most} subscriptions at most"
                        + " without a user: send `auth`" * (user is None),
                    )
                else:
                    if symbol is not None:
                        # All clients without a user are one to the quota of symbols.
                        self._market.admit(user or "", symbol)
                    self.topics[topic] = asked
                    wanted.append(Wanted(topic, max_hz, since, result))
                results.append(result)
            except RequestError as error:
                results.append(replies.failed(name, error))
        return Subscribe(
            replies.items("subscribe", request_id, results), tuple(wanted), tuple(throttled)
        )

    def _unsubscribe(self, request_id: Id, args: Iterable[Raw], user: str | None) -> Unsubscribe:
        results: list[ItemResult] = []
        ended: list[Topic] = []
        for raw in args:
            name = messages.item_channel(raw)
            try:
                topic = self._resolve(messages.decode_channel(raw), user)
                if topic in self.topics:
                    del self.topics[topic]
                    ended.append(topic)
                results.append(ItemResult(topic.channel, True))
            except RequestError as error:
                results.append(replies.failed(name, error))
        return Unsubscribe(replies.items("unsubscribe", request_id, results), tuple(ended))


def _cost(request: messages.Request) -> int:
    """How many messages a request counts as."""
    match request:
        case messages.SubscribeRequest(args=args) | messages.UnsubscribeRequest(args=args):
            return 1 + len(args) // ITEMS_PER_MESSAGE
        case _:
            return 1


def _refuse(request_id: Id, error: RequestError) -> list[Action]:
    return [Reply(messages.error_reply(request_id, error))]
