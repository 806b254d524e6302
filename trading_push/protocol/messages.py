"""Requests and replies of version 1 of the protocol, from and to JSON.

A request is decoded in two steps, so that a bad one can be answered with its `id`: first an
envelope (`op` and `id`, everything else skipped), then, by its `op`, the whole message strictly. A
member that is null counts as absent.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from trading_push.errors import ErrorCode, RequestError
from trading_push.topics import Kind

__all__ = [
    "MAX_ITEMS",
    "OPS",
    "SUBPROTOCOL",
    "SYMBOLS",
    "AuthReply",
    "AuthRequest",
    "BadRequest",
    "ChannelsReply",
    "ChannelsRequest",
    "ErrorBody",
    "ErrorReply",
    "Id",
    "ItemResult",
    "ItemsReply",
    "ListReply",
    "ListRequest",
    "Notice",
    "OfferedChannel",
    "PingRequest",
    "Pong",
    "Reply",
    "Request",
    "Since",
    "SubscribeItem",
    "SubscribeRequest",
    "SymbolsReply",
    "SymbolsRequest",
    "UnsubscribeRequest",
    "decode_channel",
    "decode_item",
    "decode_request",
    "encode",
    "error_reply",
    "item_channel",
    "reply_id",
]

SUBPROTOCOL: Final = "trading-push.v1"
"""The WebSocket subprotocol, echoed if a client offers it."""
MAX_ITEMS: Final = 1024
"""How many items a request may have. One with more is refused whole, so that a small request has
no giant reply."""

SYMBOLS: Final = 50
"""How many symbols a reply has, where the request does not say."""

Id = int | str | None
"""The `id` of a request; None if it has none."""
_MAX_ID: Final = 2**53
_MAX_ID_LENGTH: Final = 64


# --- requests ---------------------------------------------------------------------------------


class _Strict(Struct, forbid_unknown_fields=True):
    """A request; a field that it does not have is refused."""

    op: str
    id: Raw = Raw(b"")


class AuthRequest(_Strict, kw_only=True):
    """Authenticate, or extend the session with a newer token."""

    token: str


class Since(Struct, forbid_unknown_fields=True):
    """Where a subscriber was when it lost the connection."""

    epoch: str
    seq: Annotated[int, Meta(ge=0, le=_MAX_ID)]


class SubscribeItem(Struct, forbid_unknown_fields=True):
    """One item of a subscribe request."""

    channel: str
    max_hz: int | float | None = None
    since: Since | None = None


class SubscribeRequest(_Strict, kw_only=True):
    """Subscribe to channels; each item is decoded by `decode_item`."""

    args: Annotated[list[Raw], Meta(max_length=MAX_ITEMS)]


class UnsubscribeRequest(_Strict, kw_only=True):
    """Unsubscribe from channels; each item is decoded by `decode_channel`."""

    args: Annotated[list[Raw], Meta(max_length=MAX_ITEMS)]


class ListRequest(_Strict):
    """Ask for the channels that the connection is subscribed to."""


class SymbolsRequest(_Strict, kw_only=True):
    """Ask for symbols whose names contain a text."""

    like: Annotated[str, Meta(max_length=64)] | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] | None = None


class ChannelsRequest(_Strict):
    """Ask for the channels that the server offers."""


class PingRequest(_Strict):
    """Ask for a `pong`."""


Request = (
    AuthRequest
    | SubscribeRequest
    | UnsubscribeRequest
    | ListRequest
    | ChannelsRequest
    | SymbolsRequest
    | PingRequest
)


class _Envelope(Struct):
    """What is read of any request, however bad the rest is."""

    op: Raw = Raw(b"")
    id: Raw = Raw(b"")


class _ItemEnvelope(Struct):
    """What is read of a bad item."""

    channel: str


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_id = msgspec.json.Decoder(int | str).decode
_decode_op = msgspec.json.Decoder(str).decode
_decode_item_channel = msgspec.json.Decoder(str | _ItemEnvelope).decode
_decode_item = msgspec.json.Decoder(str | SubscribeItem).decode
_decode_channel = msgspec.json.Decoder(str).decode
_decoders: Final[dict[str, Any]] = {
    "auth": msgspec.json.Decoder(AuthRequest).decode,
    "subscribe": msgspec.json.Decoder(SubscribeRequest).decode,
    "unsubscribe": msgspec.json.Decoder(UnsubscribeRequest).decode,
    "list": msgspec.json.Decoder(ListRequest).decode,
    "symbols": msgspec.json.Decoder(SymbolsRequest).decode,
    "channels": msgspec.json.Decoder(ChannelsRequest).decode,
    "ping": msgspec.json.Decoder(PingRequest).decode,
}

OPS: Final = (*_decoders, "other")
"""Each `op`, and what is counted for a message that has none of them."""

# What decoding hostile JSON can raise: a RecursionError for deep nesting, a UnicodeEncodeError for
# a lone surrogate in the text. DecodeError and ValidationError are MsgspecErrors.
_DECODE_ERRORS: Final = (msgspec.MsgspecError, RecursionError, UnicodeError)


class BadRequest(RequestError):
    """A message that is not a valid request.

    Attributes:
        id: The request's own, if it could be read.
    """

    def __init__(self, code: ErrorCode, message: str, request_id: Id = None) -> None:
        super().__init__(code, message)
        self.id = request_id


def decode_request(text: str | bytes) -> tuple[Id, Request]:
    """Decode a request of a client, and its `id`.

    Raises:
        BadRequest: `bad_json`, `bad_request` or `unknown_op`, with the request's id.
    """
    try:
        envelope = _decode_envelope(text)
    except msgspec.ValidationError:
        raise BadRequest(ErrorCode.BAD_REQUEST, "a request is one JSON object") from None
    except _DECODE_ERRORS:
        raise BadRequest(ErrorCode.BAD_JSON, "that is not JSON") from None
    request_id = _request_id(envelope.id)
    try:
        op = _decode_op(envelope.op)
    except _DECODE_ERRORS:
        raise BadRequest(
            ErrorCode.BAD_REQUEST, "a request needs `op`, a string", request_id
        ) from None
    decode = _decoders.get(op)
    if decode is None:
        raise BadRequest(ErrorCode.UNKNOWN_OP, f"`op` is one of {', '.join(_decoders)}", request_id)
    try:
        return request_id, decode(text)
    except _DECODE_ERRORS as error:
        raise BadRequest(ErrorCode.BAD_REQUEST, _explain(error), request_id) from None


def _request_id(raw: Raw) -> Id:
    if bytes(raw) in (b"", b"null"):
        return None
    try:
        value = _decode_id(raw)
    except _DECODE_ERRORS:
        value = None
    if isinstance(value, int) and abs(value) <= _MAX_ID:
        return value
    if isinstance(value, str) and len(value) <= _MAX_ID_LENGTH:
        return value
    raise BadRequest(
        ErrorCode.BAD_REQUEST,
        f"`id` is an integer within 2^53 or a string of {_MAX_ID_LENGTH} characters at most",
    )


def _explain(error: Exception) -> str:
    # A validation error names types and paths. The only text of the peer in it is the name of a
    # field that does not exist.
    return str(error)[:200] if isinstance(error, msgspec.ValidationError) else "that is not JSON"


def decode_item(raw: Raw) -> SubscribeItem:
    """Decode one item of a subscribe request.

    Raises:
        RequestError: `bad_request`.
    """
    try:
        item: str | SubscribeItem = _decode_item(raw)
    except _DECODE_ERRORS as error:
        raise RequestError(ErrorCode.BAD_REQUEST, _explain(error)) from None
    if isinstance(item, str):
        return SubscribeItem(item)
    if item.max_hz is not None and not 0 < item.max_hz <= 1000:
        raise RequestError(ErrorCode.BAD_REQUEST, "`max_hz` is above 0 and at most 1000")
    return item


def decode_channel(raw: Raw) -> str:
    """Decode one item of an unsubscribe request.

    Raises:
        RequestError: `bad_request`.
    """
    try:
        return _decode_channel(raw)
    except _DECODE_ERRORS as error:
        raise RequestError(ErrorCode.BAD_REQUEST, _explain(error)) from None


def item_channel(raw: Raw) -> str | None:
    """Read which channel a bad item names, cut at 64 characters; None where that fails."""
    try:
        item = _decode_item_channel(raw)
    except _DECODE_ERRORS:
        return None
    return (item if isinstance(item, str) else item.channel)[:64]


# --- replies ----------------------------------------------------------------------------------


class ErrorBody(Struct):
    """The `error` of a reply or of an item's result."""

    code: str
    message: str
    retryable: bool

    @classmethod
    def of(cls, error: RequestError) -> ErrorBody:
        """Make the body that tells of an error."""
        return cls(error.code.value, error.message, error.retryable)


class ErrorReply(Struct, omit_defaults=True, tag_field="op", tag="error"):
    """The reply to a request that is refused whole."""

    id: Id = None
    ok: bool | UnsetType = UNSET
    error: ErrorBody | UnsetType = UNSET


class AuthReply(Struct, tag_field="op", tag="auth"):
    """The token is good; `expires_in` is in seconds, None for a token without an end."""

    id: int | str | UnsetType
    ok: bool
    user: str
    conn: str
    expires_in: int | None
    heartbeat_s: int | float


class ItemResult(Struct, omit_defaults=True):
    """What became of one item; `channel` is None if the item does not name one."""

    channel: str | None
    ok: bool
    max_hz: int | float | UnsetType = UNSET
    recovered: bool | UnsetType = UNSET
    error: ErrorBody | UnsetType = UNSET


class ItemsReply(Struct):
    """The reply to `subscribe` and `unsubscribe`; `ok` if all results are."""

    op: str
    id: int | str | UnsetType
    ok: bool
    results: list[ItemResult]


class ListReply(Struct, tag_field="op", tag="list"):
    """The channels that the connection is subscribed to."""

    id: int | str | UnsetType
    ok: bool
    channels: list[str]


class SymbolsReply(Struct, tag_field="op", tag="symbols"):
    """Symbols that can be subscribed to; `more` if there are others, or may be."""

    id: int | str | UnsetType
    ok: bool
    symbols: list[str]
    more: bool


class OfferedChannel(Struct, omit_defaults=True):
    """A channel that the server offers; `interval_s` only if it is polled."""

    channel: str
    kind: Kind
    interval_s: int | float | UnsetType = UNSET


class ChannelsReply(Struct, tag_field="op", tag="channels"):
    """The channels that the server offers, tickers left out."""

    id: int | str | UnsetType
    ok: bool
    channels: list[OfferedChannel]


class Pong(Struct, tag_field="op", tag="pong"):
    """The reply to `ping`; `ts` is the server's time in milliseconds since the epoch."""

    id: int | str | UnsetType
    ts: int


class Notice(Struct, omit_defaults=True, tag_field="op", tag="notice"):
    """What the server sends unasked: `shutdown`, `token_expires`."""

    code: str
    reconnect_after_ms: int | UnsetType = UNSET
    expires_in: int | UnsetType = UNSET


Reply = (
    ErrorReply | AuthReply | ItemsReply | ListReply | ChannelsReply | SymbolsReply | Pong | Notice
)

_encode: Final = msgspec.json.Encoder().encode


def encode(reply: Reply) -> bytes:
    """Encode a reply as JSON."""
    return _encode(reply)


def error_reply(request_id: Id, error: RequestError) -> ErrorReply:
    """Make the reply to a request that is refused whole."""
    return ErrorReply(request_id, False, ErrorBody.of(error))


def reply_id(request_id: Id) -> int | str | UnsetType:
    """Put a request's `id` in the form of a reply, which has none if the request has none."""
    return UNSET if request_id is None else request_id
