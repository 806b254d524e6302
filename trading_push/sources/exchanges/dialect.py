"""What one kind of exchange adds to the feed: its limits, its messages, what its frames mean."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import attrs

from trading_push.models import Ticker
from trading_push.sources.exchanges.rest import RestService
from trading_push.transport.outbound import Address
from trading_push.transport.outbound_proxies import OutboundProxies

__all__ = [
    "ExchangeDialect",
    "ExchangeLimits",
    "GoingDown",
    "Read",
    "Reply",
    "SymbolFrame",
    "SymbolState",
]


@attrs.frozen
class ExchangeLimits:
    """What an exchange allows, and how long we wait for it.

    Args:
        symbols_per_connection: How many one connection carries.
        symbols_per_request: How many one request names.
        requests_per_hour: How many requests an hour one connection is sent; None where the spacing
            says it all.
        spacing_s: Between two messages that we send on a connection.
        connect_spacing_s: Between two connections of the feed.
        ping_s: How often we ping.
        silence_s: How long a connection may stay silent, or a request unanswered, before the
            connection counts as lost; longer than `ping_s`.
        mute_s: How long a connection may bring nothing of its symbols, although it answers, before
            another one takes over. It doubles as long as nothing comes over the next one, either.
        lifetime_s: When a connection is replaced.
        connect_timeout_s: For the handshake.
        takeover_timeout_s: How long a new connection may take until all of its subscriptions are
            acknowledged.
        overlap_s: How long the old one is read after that.
        first_pause_s: Before the first try to come back; it doubles up to `last_pause_s`.
        last_pause_s: The longest pause.
        jitter_s: Up to how many random seconds a pause is extended by.
    """

    symbols_per_connection: int
    symbols_per_request: int
    requests_per_hour: int | None = None
    spacing_s: float = 1 / 3
    connect_spacing_s: float = 1.05
    ping_s: float = 20
    silence_s: float = 30
    mute_s: float = 60
    lifetime_s: float = 23.5 * 3600
    connect_timeout_s: float = 10
    takeover_timeout_s: float = 30
    overlap_s: float = 2
    first_pause_s: float = 1
    last_pause_s: float = 60
    jitter_s: float = 1


class Reply(NamedTuple):
    """The exchange's reply to a request.

    Args:
        id: Of which request; None where it names none.
        error: Why the request failed, if it did.
        symbol: Which of the request's symbols it is about; None where it is about all.
        is_subscribed: Whether it failed because something that it names is subscribed already.
    """

    id: int | None
    error: str | None = None
    symbol: str | None = None
    is_subscribed: bool = False


class GoingDown(NamedTuple):
    """The exchange says that it will end the connection soon.

    Args:
        reason: What it says, for the log.
    """

    reason: str


class SymbolFrame(NamedTuple):
    """A frame about one symbol; `event` is for its `SymbolState`."""

    symbol: str
    event: Any


Read: TypeAlias = SymbolFrame | Sequence[SymbolFrame] | Reply | GoingDown | None
"""What a message may be: None for one that is well-formed, but of no use here."""


class SymbolState(Protocol):
    """One symbol as its frames have shown it until now."""

    def apply(self, event: Any) -> bool:
        """Merge a frame; False where it is outdated and changes nothing."""
        ...

    def ticker(self) -> Ticker:
        """Return what is known now."""
        ...


class ExchangeDialect(ABC):
    """What an exchange is sent, and what its messages mean.

    Args:
        url: Where to connect, `wss://` or `ws://`.
        limits: What is allowed there.

    Raises:
        ConfigurationError: The URL is not one of a WebSocket.
    """

    name: ClassVar[str]
    """The exchange's name in the log."""
    symbol_pattern: ClassVar[re.Pattern[str]]
    """What a symbol of the exchange looks like, as far as characters tell."""

    def __init__(self, url: str, limits: ExchangeLimits) -> None:
        self.limits = limits
        self.address = Address.of(
            url, "market.url is no WebSocket URL: give one like wss://stream.example.com/stream"
        )

    def reach_through(self, proxies: OutboundProxies) -> None:
        """Connect through the proxy that leads to the exchange; synchronous, before it runs.

        Raises:
            ConfigurationError: The proxy needs a library that is not installed.
        """
        self.address = self.address.through(proxies)

    @abstractmethod
    def request(
        self, op: Literal["subscribe", "unsubscribe"], symbols: Sequence[str], number: int
    ) -> str:
        """Write the request that subscribes, or unsubscribes, all streams of some symbols."""

    @abstractmethod
    def ping(self, number: int) -> str | None:
        """Write a ping; None where the exchange wants a ping frame of WebSocket."""

    @abstractmethod
    def read(self, message: str) -> Read:
        """Read a message.

        Raises:
            One of UNUSABLE: It cannot be read.
        """

    @abstractmethod
    async def load_symbols(self, service: RestService) -> Set[str]:
        """Read the list of the symbols that the exchange has.

        Raises:
            SourceError: It cannot be read, or is not whole.
        """

    @abstractmethod
    def new_symbol(self, symbol: str) -> SymbolState:
        """Make the state of a symbol of which nothing has been heard."""
