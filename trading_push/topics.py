"""Channels that clients name, the topics behind them, and the log's room names.

A *channel* is what a client names (`balance`, `ticker.BTCUSDT`); a *topic* is what is published to
and subscribed (`balance` of user 4; `ticker.BTCUSDT` of everyone); a *room* is the log's old name
for a user's membership (`balance_4`, `ticker_BTCUSDT_4`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final, Literal, NamedTuple

import attrs

from trading_push.errors import ConfigurationError, ErrorCode, RequestError

__all__ = [
    "ALL_TICKERS",
    "ASCII_UPPER",
    "BUILTIN_CHANNELS",
    "CANDLES_PREFIX",
    "SYMBOL_RULE",
    "Channel",
    "Channels",
    "Topic",
    "candles_topic",
    "canonical_symbol",
    "family_of",
    "market_name",
    "market_symbol",
    "room_of",
    "symbol_of",
    "ticker_topic",
]

TICKER_PREFIX = "ticker."
CANDLES_PREFIX = "candles."
_MARKET_PREFIXES: Final = (TICKER_PREFIX, CANDLES_PREFIX)
SYMBOL_RULE = (
    "a symbol has 1 to 64 characters: letters and digits of any script, . _ : / - & ^ = $ @ + and "
    "spaces inside"
)
"""The rule of `canonical_symbol`, for error messages."""
_SYMBOL_LENGTH = 64
_SYMBOL = re.compile(r"[A-Z0-9._:/&^=$@+ -]+")
_SYMBOL_MARKS = frozenset("._:/-&^=$@+ ")
_LETTERS_AND_DIGITS = frozenset({"Lu", "Ll", "Lt", "Lm", "Lo", "Nd"})
# The Hangul fillers count as letters, and are invisible: two symbols would look the same.
_INVISIBLE = frozenset("\u115f\u1160\u3164\uffa0")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
ASCII_UPPER: Final = {code: code - 32 for code in range(ord("a"), ord("z") + 1)}
"""A table for `str.translate` that turns ASCII letters only."""

Kind = Literal["state", "events", "keyed"]


class Topic(NamedTuple):
    """What is published to and subscribed; `user` is None for a topic of everyone."""

    channel: str
    user: str | None = None


ALL_TICKERS: Final = Topic(TICKER_PREFIX + "*")
"""The topic of all tickers together, a table with a row for each symbol."""


@attrs.frozen
class Channel:
    """A channel that clients can name: a built-in one, or one an application adds.

    Args:
        name: Lower-case ASCII letter, then letters, digits, `_` or `-`; 32 characters at most.
        kind: `state` (the latest value replaces the one before) or `events` (each is delivered).
        per_user: Every user has their own topic behind it; otherwise all share one.
        interval_s: Seconds between two polls of the source; None for a channel that is only
            published to.
    """

    name: str
    kind: Kind = "state"
    per_user: bool = True
    interval_s: float | None = None

    def __attrs_post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in ("ticker", "candles"):
            raise ConfigurationError(
                f"{self.name!r} cannot name a channel: use a-z, then a-z, 0-9, _ or -, "
                "32 characters at most, and not 'ticker' or 'candles'"
            )
        if self.kind not in ("state", "events"):
            raise ConfigurationError(f"{self.name} is of kind {self.kind!r}: give state or events")
        if self.interval_s is not None and not self.interval_s >= 0.1:
            raise ConfigurationError(
                f"the interval of {self.name} is {self.interval_s}: give 0.1 seconds or more"
            )
        if self.interval_s is not None and not self.per_user:
            raise ConfigurationError(f"{self.name} cannot be polled: only a per-user channel can")


BUILTIN_CHANNELS = ("balance", "positions", "pnl", "orders")


def canonical_symbol(text: str) -> str | None:
    """Spell a symbol as the channel of its ticker does; None if it cannot name one.

    Clients, publishers, tapes and feeds all come through here: `SYMBOL_RULE`, in Unicode's form
    NFC, with ASCII letters in upper case.
    """
    # A long text is none, before anything is made of it.
    if not 0 < len(text) <= 4 * _SYMBOL_LENGTH:
        return None
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    # Only ASCII letters: str.upper() would turn 'ß' into 'SS' and 'ı' into 'I'.
    symbol = text.translate(ASCII_UPPER)
    if len(symbol) > _SYMBOL_LENGTH or symbol[0] == " " or symbol[-1] == " ":
        return None
    if symbol.isascii():
        is_good = _SYMBOL.fullmatch(symbol) is not None
    else:
        is_good = all(
            character in _SYMBOL_MARKS
            or (
                unicodedata.category(character) in _LETTERS_AND_DIGITS
                and character not in _INVISIBLE
            )
            for character in symbol
        )
    # Marks alone name nothing; "." and ".." would even be paths.
    return symbol if is_good and not _SYMBOL_MARKS.issuperset(symbol) else None


def symbol_of(channel: str) -> str | None:
    """The symbol of a ticker channel in its new spelling; None for any other channel."""
    if channel.startswith(TICKER_PREFIX) and channel != ALL_TICKERS.channel:
        return channel[len(TICKER_PREFIX) :]
    return None


def market_symbol(channel: str) -> str | None:
    """The symbol that a channel of the market is about; None for all tickers, and elsewhere."""
    if channel.startswith(CANDLES_PREFIX):
        return channel[len(CANDLES_PREFIX) :]
    return symbol_of(channel)


@lru_cache(4096)
def family_of(channel: str) -> str:
    """What counts call a channel: its name, but `ticker` and `candles` for those of any symbol."""
    if channel.startswith(CANDLES_PREFIX):
        return "candles"
    return channel if symbol_of(channel) is None else "ticker"


def market_name(channel: str) -> str | None:
    """What the log calls a channel of the market.

    The symbol for a ticker, `*` for all of them, `candles.SYMBOL` for candles.
    """
    if channel.startswith(CANDLES_PREFIX):
        return channel
    return channel[len(TICKER_PREFIX) :] if channel.startswith(TICKER_PREFIX) else None


@lru_cache(4096)
def ticker_topic(symbol: str) -> Topic:
    """The topic of a symbol's ticker; the same object for all who subscribe to it."""
    return Topic(TICKER_PREFIX + symbol)


@lru_cache(4096)
def candles_topic(symbol: str) -> Topic:
    """The topic of a symbol's candles, a table with a row for each; the same object for all."""
    return Topic(CANDLES_PREFIX + symbol)


def room_of(channel: str, user: str) -> str:
    """The log's name for the membership of `user` in `channel`."""
    for prefix in (TICKER_PREFIX, CANDLES_PREFIX):
        if channel.startswith(prefix):
            channel = f"{prefix[:-1]}_{channel[len(prefix) :]}"
    return f"{channel}_{user}"


class Channels:
    """The channels that a service knows, in the order in which the log names them.

    Args:
        channels: The user channels and an application's own.
    """

    def __init__(self, channels: Iterable[Channel]) -> None:
        self._by_name: dict[str, Channel] = {}
        self._rank: dict[str, int] = {}
        for channel in channels:
            self.add(channel)

    def add(self, channel: Channel) -> None:
        """Know one more, the last in the log's order.

        Raises:
            ConfigurationError: There is one of that name already.
        """
        if channel.name in self._by_name:
            raise ConfigurationError(f"the channel {channel.name!r} is there twice")
        self._rank[channel.name] = len(self._by_name)
        self._by_name[channel.name] = channel

    def __iter__(self) -> Iterator[Channel]:
        return iter(self._by_name.values())

    def get(self, name: str) -> Channel | None:
        """The channel of that name; None for one of the market and for what is not known."""
        return self._by_name.get(name)

    def kind_of(self, topic: Topic) -> Kind:
        """Whether a topic holds a state or a sequence of events."""
        channel = self._by_name.get(topic.channel)
        if channel is None:
            is_table = topic == ALL_TICKERS or topic.channel.startswith(CANDLES_PREFIX)
            return "keyed" if is_table else "state"
        return channel.kind

    def rank_of(self, name: str) -> int:
        """Where a channel that is not the market's stands in the log's order."""
        return self._rank.get(name, len(self._rank))

    def market(self, name: str) -> Topic | None:
        """The topic of a channel of the market in any spelling; None for another channel."""
        if name == ALL_TICKERS.channel:
            return ALL_TICKERS
        for prefix, topic in ((TICKER_PREFIX, ticker_topic), (CANDLES_PREFIX, candles_topic)):
            if name.startswith(prefix):
                symbol = canonical_symbol(name[len(prefix) :])
                return None if symbol is None else topic(symbol)
        return None

    def topic(self, name: str, user: str | None) -> Topic:
        """The topic that an application names.

        Args:
            name: A channel's name, or `ticker.SYMBOL`.
            user: Whose topic it is, for a channel where every user has their own.

        Raises:
            ValueError: There is no such channel, or a user is missing or too much.
        """
        market = self.market(name)
        if market is not None:
            if market is ALL_TICKERS or symbol_of(market.channel) is None:
                raise ValueError(f"{name!r} is made of the tickers: publish to ticker.SYMBOL")
            if user is not None:
                raise ValueError("a ticker is everyone's: leave out the user")
            return market
        channel = self._by_name.get(name)
        if channel is None and name.startswith(_MARKET_PREFIXES):
            raise ValueError(f"{name[:80]!r} cannot be subscribed: {SYMBOL_RULE}")
        if channel is None:
            raise ValueError(f"there is no channel {name!r}: add it to channels=")
        if channel.per_user != (user is not None):
            hint = "give the user" if channel.per_user else "leave out the user"
            raise ValueError(f"{name!r} is {'not ' * (not channel.per_user)}per user: {hint}")
        return Topic(name, user)

    def resolve(self, name: str, user: str) -> Topic:
        """The topic that `user` means by `name`, in the new spelling or as one of their own rooms.

        Raises:
            RequestError: `unknown_channel`, or `forbidden` for the room of another user.
        """
        topic = self._by_channel_name(name, user)
        if topic is None and name.endswith("_" + user):
            room = name[: -len(user) - 1]
            for prefix in _MARKET_PREFIXES:
                if room.startswith(f"{prefix[:-1]}_"):
                    room = prefix + room[len(prefix) :]
            topic = self._by_channel_name(room, user)
        if topic is None:
            if any(c.per_user and name.startswith(c.name + "_") for c in self):
                raise RequestError(
                    ErrorCode.FORBIDDEN, "that is another user's room: name the channel only"
                )
            if name.startswith(_MARKET_PREFIXES):
                raise RequestError(ErrorCode.UNKNOWN_CHANNEL, SYMBOL_RULE)
            raise RequestError(ErrorCode.UNKNOWN_CHANNEL, "there is no channel of that name")
        return topic

    def _by_channel_name(self, name: str, user: str) -> Topic | None:
        channel = self._by_name.get(name)
        if channel is None:
            return self.market(name)
        # The channel's own name: the peer's is another string for each connection.
        return Topic(channel.name, user if channel.per_user else None)
