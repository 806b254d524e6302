"""Replies that a session puts together from what there is: channels, symbols, results of items."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection

from msgspec import UNSET

from trading_push.errors import RequestError
from trading_push.protocol import messages
from trading_push.protocol.messages import Id, ItemResult
from trading_push.topics import ALL_TICKERS, ASCII_UPPER, Channels

__all__ = ["channels", "failed", "items", "result_of", "symbols"]


def channels(request_id: Id, known: Channels) -> messages.ChannelsReply:
    """What the server offers, the channels of single symbols left out."""
    offered = [
        messages.OfferedChannel(
            each.name, each.kind, UNSET if each.interval_s is None else each.interval_s
        )
        for each in known
    ]
    offered.append(messages.OfferedChannel(ALL_TICKERS.channel, "keyed"))
    return messages.ChannelsReply(messages.reply_id(request_id), True, offered)


def symbols(
    request_id: Id, request: messages.SymbolsRequest, known: tuple[Collection[str], bool]
) -> messages.SymbolsReply:
    """Find symbols by a part of their names; those that begin with it come first.

    Args:
        request_id: The request's.
        request: What is looked for.
        known: The symbols that are known, and whether those are all that there are.
    """
    names, are_all = known
    # As symbols are spelled, but it may begin or end with a blank.
    part = unicodedata.normalize("NFC", request.like or "").translate(ASCII_UPPER)
    found = sorted(
        (symbol for symbol in names if part in symbol),
        key=lambda symbol: (not symbol.startswith(part), symbol),
    )
    limit = messages.SYMBOLS if request.limit is None else request.limit
    more = len(found) > limit or not are_all
    return messages.SymbolsReply(messages.reply_id(request_id), True, found[:limit], more)


def failed(channel: str | None, error: RequestError) -> ItemResult:
    """The result of an item that is refused."""
    return ItemResult(channel, False, error=messages.ErrorBody.of(error))


def items(op: str, request_id: Id, results: list[ItemResult]) -> messages.ItemsReply:
    """The reply to a request of several items; it is ok if each of them is."""
    ok = all(result.ok for result in results)
    return messages.ItemsReply(op, messages.reply_id(request_id), ok, results)


def result_of(reply: messages.Reply) -> str:
    """What a request has ended with, for counts: `ok`, or the code of the (first) error."""
    match reply:
        case messages.ErrorReply(error=messages.ErrorBody(code=code)):
            return code
        case messages.ItemsReply(ok=False, results=results):
            errors = (each.error for each in results)
            return next(error.code for error in errors if isinstance(error, messages.ErrorBody))
    return "ok"
