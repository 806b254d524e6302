"""The wire messages as types, to and from bytes; one WebSocket text frame for one payload.

Version 1 of the protocol. A request is decoded in two steps, so that a bad one can be answered with
its `id`: first an envelope (`op`, `id`, everything else skipped), then, by its `op`, the whole
message strictly. A member that is null counts as absent.
"""

from __future__ import annotations

import re
import struct
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from trading_push.errors import ErrorCode, PayloadError, RequestError

__all__ = [
    "SUBPROTOCOL",
    "AuthReply",
    "AuthRequest",
    "ErrorBody",
    "ErrorReply",
    "ItemResult",
    "ItemsReply",
    "ListReply",
    "ListRequest",
    "Notice",
    "PingRequest",
    "Pong",
    "Request",
    "Since",
    "SubscribeItem",
    "SubscribeRequest",
    "UnsubscribeRequest",
    "decode_request",
    "encode",
    "encode_data",
    "frame",
    "payload_of",
    "push",
    "status_push",
]

SUBPROTOCOL: Final = "trading-push.v1"
REASON_BYTES: Final = 123
"""RFC 6455 section 5.5: a control frame carries 125 bytes, and the close code is two of them."""
MAX_ITEMS: Final = 1024
"""Items of one request; more is refused whole, so that a small request has no giant reply."""

Id = int | str | None
_MAX_ID = 2**53
_MAX_ID_LENGTH = 64


# --- requests ---------------------------------------------------------------------------------


class _Strict(Struct, forbid_unknown_fields=True):
    op: str
    id: Raw = Raw(b"")


class AuthRequest(_Strict, kw_only=True):
    token: str


class Since(Struct, forbid_unknown_fields=True):
    epoch: str
    seq: Annotated[int, Meta(ge=0, le=_MAX_ID)]


class SubscribeItem(Struct, forbid_unknown_fields=True):
    """What one item of a subscribe request asks for."""

    channel: str
    max_hz: int | float | None = None
    since: Since | None = None


class SubscribeRequest(_Strict, kw_only=True):
    args: Annotated[list[Raw], Meta(max_length=MAX_ITEMS)]


class UnsubscribeRequest(_Strict, kw_only=True):
    args: Annotated[list[Raw], Meta(max_length=MAX_ITEMS)]


class ListRequest(_Strict):
    pass


class PingRequest(_Strict):
    pass


Request = AuthRequest | SubscribeRequest | UnsubscribeRequest | ListRequest | PingRequest


class _Envelope(Struct):
    op: Raw = Raw(b"")
    id: Raw = Raw(b"")


class _ItemEnvelope(Struct):
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
    "ping": msgspec.json.Decoder(PingRequest).decode,
}

# What decoding hostile JSON can raise: deep nesting is a RecursionError, a lone surrogate in the
# text a UnicodeEncodeError; DecodeError and ValidationError are MsgspecErrors.
_DECODE_ERRORS = (msgspec.MsgspecError, RecursionError, UnicodeError)


class BadRequest(RequestError):
    """A message that cannot be served; `id` is the request's own where it could be read."""

    def __init__(self, code: ErrorCode, message: str, request_id: Id = None) -> None:
        super().__init__(code, message)
        self.id = request_id


def decode_request(text: str | bytes) -> tuple[Id, Request]:
    """One request of a client, with its `id` (None where it has none).

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
    # A validation error speaks of types and paths; only the name of an unknown field is the peer's.
    return str(error)[:200] if isinstance(error, msgspec.ValidationError) else "that is not JSON"


def decode_item(raw: Raw) -> SubscribeItem:
    """One item of a subscribe request.

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
    """One item of an unsubscribe request.

    Raises:
        RequestError: `bad_request`.
    """
    try:
        return _decode_channel(raw)
    except _DECODE_ERRORS as error:
        raise RequestError(ErrorCode.BAD_REQUEST, _explain(error)) from None


def item_channel(raw: Raw) -> str | None:
    """The channel that a bad item names, where that can be read; cut at 64 characters."""
    try:
        item = _decode_item_channel(raw)
    except _DECODE_ERRORS:
        return None
    return (item if isinstance(item, str) else item.channel)[:64]


# --- replies ----------------------------------------------------------------------------------


class ErrorBody(Struct):
    code: str
    message: str
    retryable: bool

    @classmethod
    def of(cls, error: RequestError) -> ErrorBody:
        return cls(error.code.value, error.message, error.retryable)


class ErrorReply(Struct, omit_defaults=True, tag_field="op", tag="error"):
    id: Id = None
    ok: bool | UnsetType = UNSET
    error: ErrorBody | UnsetType = UNSET


class AuthReply(Struct, tag_field="op", tag="auth"):
    id: int | str | UnsetType
    ok: bool
    user: str
    conn: str
    expires_in: int | None
    heartbeat_s: int | float


class ItemResult(Struct, omit_defaults=True):
    channel: str | None
    ok: bool
    max_hz: int | float | UnsetType = UNSET
    recovered: bool | UnsetType = UNSET
    error: ErrorBody | UnsetType = UNSET


class ItemsReply(Struct):
    op: str
    id: int | str | UnsetType
    ok: bool
    results: list[ItemResult]


class ListReply(Struct, tag_field="op", tag="list"):
    id: int | str | UnsetType
    ok: bool
    channels: list[str]


class Pong(Struct, tag_field="op", tag="pong"):
    id: int | str | UnsetType
    ts: int


class Notice(Struct, omit_defaults=True, tag_field="op", tag="notice"):
    code: str
    reconnect_after_ms: int | UnsetType = UNSET
    expires_in: int | UnsetType = UNSET


Reply = ErrorReply | AuthReply | ItemsReply | ListReply | Pong | Notice

_encoder = msgspec.json.Encoder()


def encode(reply: Reply) -> bytes:
    """A reply as JSON."""
    return _encoder.encode(reply)


def error_reply(request_id: Id, error: RequestError) -> ErrorReply:
    """The reply to a request that is refused whole."""
    return ErrorReply(request_id, False, ErrorBody.of(error))


def reply_id(request_id: Id) -> int | str | UnsetType:
    """How an `id` stands in a reply: a request without one gets a reply without one."""
    return UNSET if request_id is None else request_id


# --- pushes -----------------------------------------------------------------------------------

# How str(Decimal) or str(datetime) betrays itself in JSON: an exponent, not a number, a date.
_NOT_PLAIN = re.compile(rb"E[+-]\d|NaN|Infinity|\dT\d\d:")


def encode_data(data: Any) -> bytes:
    """An application's value as the JSON of a payload.

    Args:
        data: Any object that msgspec encodes (attrs, dataclasses, Structs, dicts, lists, enums);
            decimals become strings in plain notation, times integer milliseconds since the epoch.
            `msgspec.Raw` is JSON already and goes out as it is.

    Raises:
        PayloadError: It cannot be encoded, or a decimal in it is not finite.
    """
    if isinstance(data, Raw):
        return bytes(data)
    try:
        encoded = _encoder.encode(data)
        if _NOT_PLAIN.search(encoded):
            builtins = msgspec.to_builtins(
                data, builtin_types=(Decimal, datetime), enc_hook=_decode_raw
            )
            encoded = _encoder.encode(_plain(builtins))
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise PayloadError(f"a value cannot be encoded as JSON: {error}") from error
    return encoded


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain_key(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Decimal):
        return plain_decimal(value)
    if isinstance(value, datetime):
        return milliseconds(value)
    return value


def _plain_key(key: Any) -> Any:
    plain = _plain(key)
    return str(plain) if isinstance(key, datetime) else plain


def _decode_raw(value: Any) -> Any:
    if isinstance(value, Raw):
        return msgspec.json.decode(value)
    raise TypeError(f"{type(value).__name__} is no type that JSON knows")


def plain_decimal(value: Decimal) -> str:
    """A decimal in plain notation.

    Raises:
        ValueError: It is not finite.
    """
    if not value.is_finite():
        raise ValueError(f"{value} is not a finite number")
    return format(value, "f")


def milliseconds(moment: datetime) -> int:
    """A time as milliseconds since the epoch; without a zone it is taken as UTC."""
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return round(aware.timestamp() * 1000)


def push(
    head: bytes,
    type_: bytes,
    epoch: str,
    prev: int | None,
    seq: int,
    ts: int,
    data: bytes,
    *,
    merged: int = 0,
    dropped: int = 0,
) -> bytes:
    """A snapshot (`prev` None) or update as JSON, round data that are encoded already.

    `head` is `channel_head` of the channel. The `data` of a push is by far its longest part and
    shared by all subscribers, so it is not gone through again.
    """
    middle = b"" if prev is None else b'"prev":%d,' % prev
    extra = b""
    if merged:
        extra = b'"merged":%d,' % merged
    if dropped:
        extra += b'"dropped":%d,' % dropped
    return b'%s"%s","epoch":"%s",%s"seq":%d,%s"ts":%d,"data":%s}' % (
        head,
        type_,
        epoch.encode(),
        middle,
        seq,
        extra,
        ts,
        data,
    )


@lru_cache(4096)
def channel_head(channel: str) -> bytes:
    """The beginning of every push of a channel; the same object for all who subscribe to it."""
    return b'{"channel":%s,"type":' % _encoder.encode(channel)


def status_push(head: bytes, state: str, reason: str | None, ts: int) -> bytes:
    """A status push as JSON."""
    why = b"" if reason is None else b'"reason":%s,' % _encoder.encode(reason)
    return b'%s"status","state":"%s",%s"ts":%d}' % (head, state.encode(), why, ts)


# --- frames (RFC 6455 section 5.2) --------------------------------------------------------------

_TEXT = 0x81  # FIN and the text opcode; a server does not mask
_head_16 = struct.Struct("!BBH").pack


def frame(payload: bytes) -> bytes:
    """A payload as one unmasked WebSocket text frame."""
    length = len(payload)
    if length < 126:
        return bytes((_TEXT, length)) + payload
    if length < 65536:
        return _head_16(_TEXT, 126, length) + payload
    return bytes((_TEXT, 127)) + length.to_bytes(8, "big") + payload


PING: Final = b"\x89\x00"
"""A ping frame without a payload (RFC 6455 section 5.5.2)."""


def payload_of(frame: bytes) -> bytes:
    """The payload of a frame that `frame` made."""
    length = frame[1]
    return frame[2 if length < 126 else 4 if length == 126 else 10 :]


def split(data: bytes) -> list[bytes]:
    """The frames that were joined, each made by `frame`."""
    frames = []
    while data:
        length, head = data[1], 2
        if length == 126:
            length, head = int.from_bytes(data[2:4], "big"), 4
        elif length == 127:
            length, head = int.from_bytes(data[2:10], "big"), 10
        frames.append(data[: head + length])
        data = data[head + length :]
    return frames
