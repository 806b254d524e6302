"""The lines that tell who came, subscribed and left, in the order in which operators read them.

A connection that has left is one unit: how it was closed, the rooms and subscriptions that it had,
and what is left of the service's counts. The order within the unit, and each line of it, are part
of the product (see docs/logs.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trading_push import logs
from trading_push.connections.members import Departure, Member
from trading_push.logs import Line, line
from trading_push.topics import Channels, Topic, market_name, room_of

__all__ = ["RegistryLines"]


class RegistryLines:
    """Puts the registry's lines together; emits none of them.

    Args:
        channels: The order in which the log names them.
        watchers_of: How many users are subscribed to a channel now.
        is_watched: Whether anyone is subscribed to a topic now, also without a user.
    """

    def __init__(
        self,
        channels: Channels,
        watchers_of: Callable[[str], int],
        is_watched: Callable[[Topic], bool],
    ) -> None:
        self._channels = channels
        self._watchers_of = watchers_of
        self._is_watched = is_watched

    def subscribed(self, user: str, topic: Topic, subscribers: int) -> list[Line]:
        """A user has subscribed; so many users are subscribed to the channel with them."""
        symbol = market_name(topic.channel)
        return [
            line("subscribed", user=user, data_type=topic.channel)
            if symbol is None
            else line("subscribed_symbol", user=user, symbol=symbol),
            line("subscriber_count", subscribers=subscribers),
        ]

    def unsubscribed(self, user: str | None, topic: Topic) -> list[Line]:
        """A user, or somebody without one, has unsubscribed on request."""
        if user is None:
            return self._removed(topic)
        return [self._left_room(user, topic), *self._ended(user, topic)]

    def left(
        self,
        member: Member,
        departure: Departure,
        topics: Sequence[Topic],
        errors: Sequence[Exception],
    ) -> list[Line]:
        """A connection has left.

        Args:
            member: The connection.
            departure: How it was closed.
            topics: What it was subscribed to, in the order in which it subscribed.
            errors: What its clean-up has raised.
        """
        user, close = member.user, departure.close
        lines: list[Line] = []
        if departure.found_by_send and user is None:
            lines.append(line("peer_gone_unauthenticated"))
        elif departure.found_by_send:
            lines.append(line("peer_gone", user=user))
        lines += (
            logs.close_line(close.code, close.reason, ours=close.ours),
            line("disconnected", address=member.address),
        )
        if user is None:
            lines.append(line("unauthenticated_left"))
            for topic in topics:
                lines += self._removed(topic)
        else:
            lines += self._block(user, topics)
        lines += [line("cleanup_failed", error=error) for error in errors]
        if user is not None:
            lines.append(line("cleaned_up", user=user))
        return lines

    def _block(self, user: str, topics: Sequence[Topic]) -> list[Line]:
        # Data types in the order of the channels, symbols in the order subscribed.
        data = sorted(
            (topic for topic in topics if market_name(topic.channel) is None),
            key=lambda topic: self._channels.rank_of(topic.channel),
        )
        tickers = [topic for topic in topics if market_name(topic.channel) is not None]
        lines = [line("leaving_rooms", user=user)]
        for group in (data, tickers):
            lines += [self._left_room(user, topic) for topic in group]
            for topic in group:
                lines += self._ended(user, topic)
        lines.append(line("left_all_rooms", user=user))
        return lines

    def _left_room(self, user: str, topic: Topic) -> Line:
        event = "left_room" if market_name(topic.channel) is None else "left_symbol_room"
        return line(event, room=room_of(topic.channel, user))

    def _ended(self, user: str, topic: Topic) -> list[Line]:
        left = self._watchers_of(topic.channel)
        symbol = market_name(topic.channel)
        if symbol is None:
            return [line("unsubscribed", user=user, data_type=topic.channel, subscribers=left)]
        told = line("unsubscribed_symbol", user=user, symbol=symbol, subscribers=left)
        return [told, *self._removed(topic)]

    def _removed(self, topic: Topic) -> list[Line]:
        """A symbol has neither users nor strangers any more."""
        symbol = market_name(topic.channel)
        if symbol is None or self._is_watched(topic):
            return []
        return [line("symbol_removed", symbol=symbol)]
