"""The registry task: who is connected, who subscribes to what, and the lines that tell of it.

One task owns the table and works through an inbox, one command after the other. Posting is
synchronous, so that no cancellation can lose a leave; a connection's lines are emitted as one unit.
What was posted before a publication is in force when the publication is handed out.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import trio

from trading_push import logs
from trading_push.broker.base import Message, Publication
from trading_push.connections import fanout
from trading_push.connections.lines import RegistryLines
from trading_push.connections.members import Departure, Ledger, Member
from trading_push.connections.subscription import Subscription
from trading_push.connections.tally import Tally
from trading_push.errors import ServiceClosed
from trading_push.logs.lines import Line, line
from trading_push.supervision import exits_are_errors
from trading_push.topics import Channels, Topic, candles_topic, family_of, ticker_topic

__all__ = ["Registry"]


class Registry:
    """Owns the table of subscribers. Every method but `run` is synchronous and never blocks.

    Args:
        channels: The order in which the log names them.
        on_watched: Called, by the registry task, when the first subscriber of a topic comes (True)
            and when its last one has gone (False).
        on_leave: An application's own clean-up, called for each connection that has left; what it
            raises is logged.
    """

    def __init__(
        self,
        channels: Channels,
        *,
        on_watched: Callable[[Topic, bool], None] = lambda topic, watched: None,
        on_leave: Callable[[Member], None] = lambda member: None,
    ) -> None:
        self.ledger = Ledger()
        self.tally = Tally()
        self.cleanup_failures = 0
        """How many steps of a clean-up have raised since the start."""
        self._lines = RegistryLines(channels, self._watchers_of, self.watched)
        self._on_watched = on_watched
        self._on_leave = on_leave
        self._post, self._inbox = trio.open_memory_channel[tuple[Callable[..., Any], Any]](math.inf)
        self._table: dict[Topic, dict[Subscription, None]] = {}
        self._watchers: dict[str, Counter[str]] = {}
        self._online: Counter[str] = Counter()
        self._connections = 0
        self._late: list[tuple[Member, Departure]] = []
        self._closed = False  # no command is taken any more
        self._ended = False  # nor is one that was taken before still to be worked on

    # --- what others see -----------------------------------------------------------------

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return self._connections

    def users_online(self) -> int:
        """How many users have an authenticated connection."""
        return len(self._online)

    def watched(self, topic: Topic) -> bool:
        """Whether a topic has a subscriber."""
        return topic in self._table

    def counts(self) -> dict[str, int]:
        """The number of subscribed users by channel, where there are any."""
        return {channel: len(users) for channel, users in self._watchers.items()}

    def users_of_symbol(self, symbol: str) -> Collection[str]:
        """The users who subscribe to the ticker or the candles of a symbol."""
        both = (ticker_topic(symbol), candles_topic(symbol))
        return {user for topic in both for user in self._watchers.get(topic.channel, ())}

    def _watchers_of(self, channel: str) -> int:
        return len(self._watchers.get(channel, ()))

    # --- commands ------------------------------------------------------------------------

    def _command(self, command: Callable[..., Any], *args: Any) -> None:
        self.check_running()
        self._post.send_nowait((command, args))

    def check_running(self) -> None:
        """Raise ServiceClosed where no command is taken any more."""
        if self._closed:
            raise ServiceClosed("the registry runs no more")

    def connect(self, address: str, endpoint: str = "") -> Member:
        """A connection has come from an address to an endpoint.

        Raises:
            ServiceClosed: The registry runs no more.
        """
        member = Member(secrets.token_hex(8), address, endpoint)
        self._command(self._connected, member)
        return member

    def authenticate(self, member: Member, user: str) -> None:
        """A connection has authenticated. Raises ServiceClosed."""
        self._command(self._authenticated, member, user)

    def subscribe(self, member: Member, subscriptions: Sequence[Subscription]) -> None:
        """A connection subscribes. Raises ServiceClosed."""
        self._command(self._subscribed, member, subscriptions)

    def unsubscribe(self, member: Member, subscriptions: Sequence[Subscription]) -> None:
        """A connection unsubscribes on request. Raises ServiceClosed."""
        self._command(self._unsubscribed, member, subscriptions)

    def deliver(self, batch: Sequence[Message]) -> None:
        """Hand a batch to its subscribers. Raises ServiceClosed."""
        self._command(self._deliver, batch, time.perf_counter())

    def settle(self, topics: Sequence[Topic]) -> None:
        """The source has answered for these topics for the first time. Raises ServiceClosed."""
        self._command(self._settled, topics)

    def call(self, function: Callable[[], None]) -> None:
        """Call a function when the task comes to it. Raises ServiceClosed."""
        self._command(function)

    def leave(self, member: Member, departure: Departure) -> None:
        """A connection has gone; never raises, and is counted even when the registry has ended."""
        try:
            self._command(self._left, member, departure)
        except ServiceClosed:
            if self._ended:
                self._left(member, departure)
            else:  # it still works through what this connection has posted before
                self._late.append((member, departure))

    def close(self) -> None:
        """Let the registry task end when it has worked through its inbox."""
        self._closed = True
        self._post.close()

    # --- the task ------------------------------------------------------------------------

    async def run(self) -> None:
        """Work through the inbox until `close`; shielded, so that no cancellation loses a line."""
        with trio.CancelScope(shield=True):
            try:
                await self._work()
            except BaseException as error:
                logs.emit(logs.traced("registry_died", error))
                raise
            finally:
                self._closed = self._ended = True
                self._inbox.close()
                for member, departure in self._late:
                    self._left(member, departure)

    async def _work(self) -> None:
        # One command for each turn of the event loop would be too few where very many tasks run.
        until = time.perf_counter() + fanout.SLICE_S
        while True:
            try:
                command, args = self._inbox.receive_nowait()
            except trio.WouldBlock:
                try:
                    command, args = await self._inbox.receive()
                except trio.EndOfChannel:
                    return
                until = time.perf_counter() + fanout.SLICE_S
            except trio.EndOfChannel:
                return
            for _ in command(*args) or ():
                await trio.lowlevel.checkpoint()
            if time.perf_counter() > until:
                await trio.lowlevel.checkpoint()
                until = time.perf_counter() + fanout.SLICE_S

    def _connected(self, member: Member) -> None:
        member.present = True
        self._connections += 1
        self.ledger.connections_opened += 1
        self.tally.opened[member.endpoint] += 1
        self.tally.open[member.endpoint] += 1
        logs.emit(
            line("connected", address=member.address),
            line("connection_count", connections=self._connections),
        )

    def _authenticated(self, member: Member, user: str) -> None:
        member.user = user
        self._online[user] += 1
        lines = [line("authenticated", user=user)]
        for topic in member.subscriptions:  # which it has had without a user
            lines += self._lines.subscribed(user, topic, self._count(topic, user))
        logs.emit(*lines)

    def _count(self, topic: Topic, user: str) -> int:
        """Count a user among the subscribers of a channel; how many there are then."""
        watchers = self._watchers.setdefault(topic.channel, Counter())
        watchers[user] += 1
        return len(watchers)

    def _subscribed(self, member: Member, subscriptions: Sequence[Subscription]) -> None:
        lines: list[Line] = []
        for subscription in subscriptions:
            topic = subscription.topic
            member.subscriptions[topic] = subscription
            self.ledger.subscriptions_opened += 1
            self.tally.subscriptions[family_of(topic.channel)] += 1
            subscribers = self._table.setdefault(topic, {})
            subscribers[subscription] = None
            if len(subscribers) == 1:
                self._on_watched(topic, True)
            if member.user is not None:
                count = self._count(topic, member.user)
                lines += self._lines.subscribed(member.user, topic, count)
        logs.emit(*lines)

    def _unsubscribed(self, member: Member, subscriptions: Sequence[Subscription]) -> None:
        lines: list[Line] = []
        for subscription in subscriptions:
            self._remove(member, subscription)
            lines += self._lines.unsubscribed(member.user, subscription.topic)
        logs.emit(*lines)

    def _remove(self, member: Member, subscription: Subscription) -> None:
        topic, user = subscription.topic, member.user
        if member.subscriptions.get(topic) is subscription:
            del member.subscriptions[topic]
        self.ledger.subscriptions_closed += 1
        self.tally.subscriptions[family_of(topic.channel)] -= 1
        if user is not None:
            watchers = self._watchers[topic.channel]
            watchers[user] -= 1
            if not watchers[user]:
                del watchers[user]
                if not watchers:
                    del self._watchers[topic.channel]
        subscribers = self._table[topic]
        del subscribers[subscription]
        if not subscribers:
            del self._table[topic]
            self._on_watched(topic, False)

    def _deliver(self, batch: Sequence[Message], published_at: float) -> Any:
        if logs.enabled("pushed"):
            pushed = [
                (topic.channel, user)
                for message in batch
                if (user := (topic := message.topic).user) is not None
                and topic in self._table
                and isinstance(message, Publication)
            ]
            if pushed:
                logs.emit_pushed(pushed)
        return fanout.deliver(batch, self._table, self.tally, published_at)

    def _settled(self, topics: Sequence[Topic]) -> None:
        for topic in topics:
            for subscription in self._table.get(topic, ()):
                subscription.settle()

    def _left(self, member: Member, departure: Departure) -> None:
        errors: list[Exception] = []
        subscriptions = list(member.subscriptions.values())
        for subscription in subscriptions:
            try:
                with exits_are_errors():
                    self._remove(member, subscription)
            except Exception as error:  # the hook of a room that starts and stops on watchers
                errors.append(error)
        try:
            with exits_are_errors():
                self._on_leave(member)
        except Exception as error:  # an application's own code: the unit stays whole
            errors.append(error)
        self.cleanup_failures += len(errors)
        if member.user is not None:
            self._online[member.user] -= 1
            if not self._online[member.user]:
                del self._online[member.user]
        if member.present:
            self._connections -= 1
            self.ledger.connections_closed += 1
            self.tally.open[member.endpoint] -= 1
            self.tally.closed[departure.close.code] += 1
        logs.emit(
            *self._lines.left(member, departure, [each.topic for each in subscriptions], errors),
            line("connection_count", connections=self._connections),
            line("online_count", users=len(self._online)),
        )
