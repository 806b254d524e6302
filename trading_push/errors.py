"""The exception tree, and the WebSocket close codes with who should come back after each.

::

    TradingPushError
    ├── ConfigurationError       a setting, file or key is wrong: the text says what to do
    ├── RequestError             the peer's mistake: answered with `code`, the connection lives
    │   └── AuthenticationError  a token that does not authenticate (`bad_token`, `token_expired`)
    ├── SourceError              a source could not give data; `retryable` says whether to go on
    ├── PayloadError             an application's data that cannot stand on the wire
    ├── PublishError             what a `Publisher` sent was not taken; `status` says more
    ├── TransportClosed          the peer is gone, or the stream is finished
    │   └── SendTimeout          ... because it did not take a send within the deadline
    ├── ServiceClosed            the service, or its registry, runs no more
    └── LinkError                the installed Hypercorn is not the one the link was made for

A mistake of the peer (RequestError) never shows a stack trace; every other exception that comes out
of a handler is a bug and shows exactly one.
"""

from __future__ import annotations

import enum

__all__ = [
    "AuthenticationError",
    "CloseCode",
    "ConfigurationError",
    "ErrorCode",
    "LinkError",
    "PayloadError",
    "PublishError",
    "RequestError",
    "SendTimeout",
    "ServiceClosed",
    "SourceError",
    "TradingPushError",
    "TransportClosed",
    "innermost",
    "may_reconnect",
]


class TradingPushError(Exception):
    """The root of every exception that this package raises on purpose."""


class ConfigurationError(TradingPushError):
    """A setting, file or key is wrong; the text is one line that says what to do."""


class ErrorCode(enum.StrEnum):
    """The `code` of an error reply; the members that the same request may be retried after are
    `retryable`, and so is `bad_token` where a token is not valid yet, and `too_many_subscriptions`
    where it is the server that watches too many symbols."""

    BAD_JSON = "bad_json"
    BAD_REQUEST = "bad_request"
    UNKNOWN_OP = "unknown_op"
    UNKNOWN_CHANNEL = "unknown_channel"
    NOT_AUTHENTICATED = "not_authenticated"
    FORBIDDEN = "forbidden"
    BAD_TOKEN = "bad_token"
    TOKEN_EXPIRED = "token_expired"
    TOO_MANY_SUBSCRIPTIONS = "too_many_subscriptions"
    RATE_LIMITED = "rate_limited"
    INTERNAL = "internal"

    @property
    def retryable(self) -> bool:
        """Whether the same request, unchanged, may succeed later."""
        return self in (ErrorCode.RATE_LIMITED, ErrorCode.INTERNAL)


class RequestError(TradingPushError):
    """A request that is refused with an error reply.

    Args:
        code: The error's code on the wire.
        message: What is wrong and what to do, for the developer of the client.
        retryable: Whether the same request, unchanged, may succeed later; None as its code says.
    """

    def __init__(self, code: ErrorCode, message: str, *, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = code.retryable if retryable is None else retryable


class AuthenticationError(RequestError):
    """A token that does not authenticate; an application's `authenticate` raises it to refuse.

    Args:
        message: Why, in words that may be shown to the client. Never the token itself.
        expired: The token was good once: the client may come back with a new one.
        not_yet: The token may be good later: the client may come back with the same one.
    """

    def __init__(
        self,
        message: str = "the token is not valid",
        *,
        expired: bool = False,
        not_yet: bool = False,
    ) -> None:
        super().__init__(ErrorCode.TOKEN_EXPIRED if expired else ErrorCode.BAD_TOKEN, message)
        self.expired = expired
        self.not_yet = self.retryable = not_yet


class SourceError(TradingPushError):
    """A source could not give data.

    Args:
        message: What went wrong, without secrets.
        retryable: Whether the next poll may succeed without anyone's doing.
        reason: What subscribers are told in a `status`, a word for programs.
        pause_s: How long the upstream wants to be left alone, in seconds.
        everyone: Whether that pause holds for all users of the source, not only for those whom this
            call asked for.
    """

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = True,
        reason: str = "source_error",
        pause_s: float = 0,
        everyone: bool = False,
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.reason = reason
        self.pause_s = pause_s
        self.everyone = everyone


class PayloadError(TradingPushError):
    """An application's data cannot stand on the wire (not JSON, a NaN, an unknown type)."""


class PublishError(TradingPushError):
    """A server did not take what a `Publisher` sent.

    Args:
        message: What went wrong and what to do, without the token.
        status: The status that the server answered with; None if there was no answer.
        retryable: Whether the same call may succeed later.
    """

    def __init__(self, message: str, *, status: int | None = None, retryable: bool = True) -> None:
        super().__init__(message)
        self.status = status
        self.retryable = retryable


class TransportClosed(TradingPushError):
    """The peer is gone, or our side of the stream is finished; nothing more can be sent."""


class SendTimeout(TransportClosed):
    """The peer did not take a send within the deadline; the stream has been aborted."""


class ServiceClosed(TradingPushError):
    """The service, or its registry, runs no more."""


class LinkError(TradingPushError):
    """The installed Hypercorn differs from the one that the link was made for."""


class CloseCode(enum.IntEnum):
    """WebSocket close codes in use (RFC 6455 section 7.4.1; 4000 and above are our own)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    NO_STATUS = 1005
    ABNORMAL = 1006
    INVALID_DATA = 1007
    TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    SERVICE_RESTART = 1012
    TOO_SLOW = 4001
    HEARTBEAT_TIMEOUT = 4002
    TOKEN_EXPIRED = 4003
    BAD_TOKEN = 4500
    TOO_MANY_BAD_REQUESTS = 4501
    AUTHENTICATION_TIMEOUT = 4502
    KICKED = 4503
    CONNECTION_LIMIT = 4504
    REPLACED = 4505


def may_reconnect(code: int) -> bool:
    """Whether a client that was closed with `code` should come back by itself.

    The peer's own polite closes (1000, 1001) count as yes: it does as it likes.
    """
    if code >= 4000:
        return code < 4500
    return code not in (
        CloseCode.PROTOCOL_ERROR,
        CloseCode.UNSUPPORTED_DATA,
        CloseCode.INVALID_DATA,
        CloseCode.TOO_BIG,
    )


def innermost(error: BaseException, *, first: bool = False) -> BaseException:
    """Take an exception out of the groups that nurseries have put it in.

    Args:
        error: An exception, or a group.
        first: Of several exceptions take the first; otherwise they stay a group.
    """
    while isinstance(error, BaseExceptionGroup) and (first or len(error.exceptions) == 1):
        error = error.exceptions[0]
    return error
