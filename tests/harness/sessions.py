"""A protocol session alone, and what it answers."""

from __future__ import annotations

import json
from typing import Any

from trading_push import AuthenticationError, Channel, Principal
from trading_push.errors import ErrorCode, RequestError
from trading_push.protocol import messages
from trading_push.protocol.actions import CheckToken, End, Reply, Subscribe, Unsubscribe
from trading_push.protocol.rate_limit import MessageRate
from trading_push.protocol.session import Session
from trading_push.settings.schema import Limits
from trading_push.topics import BUILTIN_CHANNELS, Channels

CHANNELS = Channels([*map(Channel, BUILTIN_CHANNELS), Channel("news", "events", per_user=False)])
LIMITS = Limits(subscriptions=5, messages_burst=10_000)
NOW = [0.0]


class _Market:
    """Has every symbol but NOPE, and says some of them."""

    def knows(self, symbol: str) -> bool:
        return symbol != "NOPE"

    def admit(self, user: str, symbol: str) -> None:
        if symbol == "FULL":
            code = ErrorCode.TOO_MANY_SUBSCRIPTIONS
            raise RequestError(code, "there are too many", retryable=True)

    def symbols(self) -> tuple[list[str], bool]:
        return ["ETHBTC", "BTCUSDT", "币安人生USDT", "ADAUSDT"], True


MARKET = _Market()


def make(user: str | None = None, limits: Limits = LIMITS) -> Session:
    session = Session(
        CHANNELS,
        limits,
        "c1",
        market=MARKET,
        rate=MessageRate(limits, lambda: NOW[0]),
        clock=lambda: 1000.0,
    )
    if user is not None:
        session.authenticated(None, Principal(user, 1900.0))
    return session


def answer(session: Session, message: str | bytes) -> tuple[list[dict[str, Any]], list[End]]:
    """Carry out what the session asks for, as a connection does; replies and ends."""
    replies, ends = [], []
    actions = list(session.receive(message))
    while actions:
        match actions.pop(0):
            case Reply(message=reply):
                replies.append(json.loads(messages.encode(reply)))
            case CheckToken(id=request_id, token=token):
                if token.startswith("good"):
                    user = token.removeprefix("good ") or "4"
                    actions += session.authenticated(request_id, Principal(user, 1900.0))
                else:
                    error = AuthenticationError(
                        expired=token == "expired", not_yet=token == "not yet"
                    )
                    actions += session.refused(request_id, error)
            case Subscribe(reply=reply) | Unsubscribe(reply=reply):
                replies.append(json.loads(messages.encode(reply)))
            case End() as end:
                ends.append(end)
    return replies, ends
