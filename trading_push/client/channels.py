"""Where each channel of a client stands: what was passed on last, and whether something is missing.

It is kept from connection to connection, and each subscribes from there. The rules:

1. An update follows the push before it if its `prev` is that one's `seq`, whatever its epoch.
2. Otherwise something is missing. The channel is subscribed anew, from where it stands.
3. Where that has not helped, or the epoch is another, it is subscribed without a position: it
   begins with a snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from trading_push.client.messages import Message
from trading_push.topics import BUILTIN_CHANNELS, symbol_of

__all__ = ["Channels", "Position"]


@attrs.define
class Position:
    """Where one channel stands."""

    is_state: bool
    """Whether it is known to be of kind *state*: a newer value replaces an older one."""
    is_of_events: bool = False
    """Whether the server has said that each push is an event of its own."""
    epoch: str | None = None
    """Within which `seq` counts; None where only a snapshot helps."""
    seq: int = 0
    """The last publication that was passed on."""
    request: int | None = None
    """The request whose reply is awaited; pushes that come before it are of an older stream."""
    is_doubtful: bool = False
    """Whether something was missing, and no push has come since."""
    has_gap: bool = False
    """Whether the next value that is passed on comes after a gap."""
    was_full: bool = False
    """Whether the application let too many pile up, and has taken none since."""

    def lacks(self, message: Message) -> bool:
        """Whether something is missing before this push."""
        if message.type == "snapshot":
            return False
        if self.epoch is None:
            return True
        if message.prev == self.seq:
            return False
        return message.epoch != self.epoch or (message.seq or 0) > self.seq

    def move_to(self, message: Message) -> bool:
        """Take a value, before which nothing is missing; return whether it is a new one."""
        seq = message.seq or 0
        if message.type == "update" and message.epoch == self.epoch and seq <= self.seq:
            return False
        self.epoch, self.seq = message.epoch, seq
        self.is_doubtful = False
        return True

    def doubt(self, message: Message) -> None:
        """Note that something is missing before this push."""
        if self.is_doubtful or message.epoch != self.epoch:
            self.epoch = None  # only a snapshot helps
        self.is_doubtful = self.has_gap = True


class Channels:
    """The channels of a client, by name.

    Args:
        names: What the application asks for.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._positions = {name: Position(_is_state(name)) for name in names}

    def __bool__(self) -> bool:
        return bool(self._positions)

    @property
    def names(self) -> list[str]:
        """The names, in the server's spelling where it has granted them."""
        return list(self._positions)

    def get(self, name: str) -> Position | None:
        """Return where a channel stands; None for one that is not subscribed."""
        return self._positions.get(name)

    def begin(self) -> None:
        """Begin a new connection, on which nothing is subscribed."""
        for position in self._positions.values():
            position.request = None

    def offer(self, offered: Iterable[Any]) -> None:
        """Add what the server says it offers."""
        for each in offered:
            if not isinstance(each, dict) or each.get("kind") == "keyed":
                continue  # a table of what the market gives: for who asks for it
            if isinstance(name := each.get("channel"), str):
                position = self._positions.setdefault(name, Position(is_state=False))
                position.is_state = each.get("kind") == "state"
                position.is_of_events = each.get("kind") == "events"

    def items(self, names: Iterable[str], request: int) -> list[object]:
        """Return the items of a subscription, each from where its channel stands.

        Args:
            names: The channels.
            request: The `id` of the request.
        """
        items: list[object] = []
        for name in names:
            position = self._positions[name]
            position.request = request
            if position.epoch is None:
                items.append(name)
            else:
                since = {"epoch": position.epoch, "seq": position.seq}
                items.append({"channel": name, "since": since})
        return items

    def grant(self, name: str, spelled: str) -> None:
        """Note that a channel is subscribed.

        Args:
            name: What was asked for.
            spelled: The server's spelling, which its pushes carry: an older room name, say, comes
                back as a channel.
        """
        position = self._positions.pop(name)
        position.request = None
        if spelled != name:
            position.is_state = position.is_state or _is_state(spelled)
        self._positions[spelled] = position


def _is_state(name: str) -> bool:
    """Whether the protocol itself says that a channel is of kind *state*."""
    return name in BUILTIN_CHANNELS or symbol_of(name) is not None
