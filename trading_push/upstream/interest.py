"""Who is watched upstream: it begins with a topic's first watcher, and ends a while after the last.

A page that is loaded again must not start everything anew: so a topic is held for a linger after
its last watcher has gone. With a user's first topic a session of theirs is opened, and with the
first user the watch over the source begins.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final

import attrs
import trio

from trading_push.errors import SourceError
from trading_push.supervision import keep_running
from trading_push.topics import Topic

__all__ = ["Demand", "Session"]

Session = Callable[[str], AbstractAsyncContextManager[Any]]
"""Takes a user's id; see `sources.base.SessionSource.session`."""

_JITTER_S: Final = 0.5
"""So that the sessions of all users, cut at the same moment, do not all come back at another."""
_CLOSE_S: Final = 1.0
"""How long a session may take to close before it is cancelled."""


@attrs.define(eq=False)
class _User:
    """A user with a topic that is held."""

    topics: dict[Topic, None] = attrs.field(factory=dict)
    session: _Session | None = None


class _Session:
    """What is held open for a user, or is about to be."""

    def __init__(self) -> None:
        self.is_open = False
        self.waits_for: _Session | None = None
        """The one before, which has not ended."""
        self.released = trio.Event()
        self.ended = trio.Event()
        # A cancelled service closes sessions in order, too.
        self.scope = trio.CancelScope(shield=True)

    def release(self) -> None:
        """Let it close, within its time."""
        self.released.set()
        self.scope.deadline = trio.current_time() + _CLOSE_S


class Demand:
    """Turns the comings and goings of watchers into work upstream.

    Args:
        linger_s: How long a topic is held after its last watcher has gone.
        begin: Called with a topic that is held from now on, when its user's session is open.
        end: Called with a topic that is no longer held, or whose user's session has failed.
        failed: Told whose session has failed (None: it was the watch), the exception, and the
            seconds until the next try.
        session: Held open for each user; None for nothing.
        watch: Run while any user is held; None for nothing.
    """

    def __init__(
        self,
        linger_s: float,
        *,
        begin: Callable[[Topic], None],
        end: Callable[[Topic], None],
        failed: Callable[[str | None, Exception, float], None],
        session: Session | None = None,
        watch: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._linger_s = linger_s
        self._begin = begin
        self._end = end
        self._failed = failed
        self._session = session
        self._watch = watch
        self._held: set[Topic] = set()
        self._leaving: dict[Topic, float] = {}  # until when they are held, the next one first
        self._users: dict[str, _User] = {}
        self._sessions: dict[str, _Session] = {}  # the last of each user that has not ended
        self._anybody = trio.Event()
        self._watching: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._wake = trio.Event()

    def holds(self, topic: Topic) -> bool:
        """Whether a topic is watched, or was until a moment ago."""
        return topic in self._held

    def watched(self, topic: Topic, watched: bool) -> None:
        """A topic's first watcher has come, or its last one has gone; synchronous."""
        if not watched:
            self._leaving[topic] = trio.current_time() + self._linger_s
            self._wake.set()
        elif self._leaving.pop(topic, None) is None:
            self._hold(topic)

    def _hold(self, topic: Topic) -> None:
        self._held.add(topic)
        if topic.user is None:
            self._begin(topic)
            return
        user = self._users.get(topic.user)
        if user is None:
            user = self._users[topic.user] = _User()
            self._anybody.set()
            if self._session is not None and self._nursery is not None:
                user.session = _Session()
                self._nursery.start_soon(self._keep_open, topic.user, user.session, user.topics)
        user.topics[topic] = None
        if user.session is None or user.session.is_open:
            self._begin(topic)

    def _let_go(self, topic: Topic) -> None:
        self._held.remove(topic)
        self._end(topic)
        if topic.user is None:
            return
        user = self._users[topic.user]
        del user.topics[topic]
        if not user.topics:
            del self._users[topic.user]
            if user.session is not None:
                user.session.release()
        if not self._users:
            self._anybody = trio.Event()
            if self._watching is not None:
                self._watching.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled; every session has been left then, within a second."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self._watch is not None:
                nursery.start_soon(self._watch_while_held)
            task_status.started()
            try:
                while True:
                    with trio.move_on_at(next(iter(self._leaving.values()), math.inf)):
                        await self._wake.wait()
                    self._wake = trio.Event()
                    now = trio.current_time()
                    for topic in [each for each, until in self._leaving.items() if until <= now]:
                        del self._leaving[topic]
                        self._let_go(topic)
            finally:
                self._nursery = None  # who comes while the service ends has nothing opened
                for user in self._users.values():
                    if user.session is not None:
                        user.session.release()

    async def _watch_while_held(self) -> None:
        assert self._watch is not None
        while True:
            await self._anybody.wait()
            if not self._users:
                continue
            with trio.CancelScope() as self._watching:
                await keep_running(self._watch, partial(self._failed, None))
                await trio.sleep_forever()  # it has nothing more to tell
            self._watching = None

    async def _keep_open(self, user: str, session: _Session, topics: Iterable[Topic]) -> None:
        session.waits_for = self._sessions.get(user)
        self._sessions[user] = session
        try:
            with session.scope:
                while session.waits_for is not None:
                    await session.waits_for.ended.wait()
                    # That one may have been cancelled while it waited itself.
                    session.waits_for = session.waits_for.waits_for
                await keep_running(
                    partial(self._open, user, session, topics),
                    partial(self._failed, user),
                    jitter_s=_JITTER_S,
                )
        finally:
            session.ended.set()
            if self._sessions.get(user) is session:
                if session.waits_for is None:
                    del self._sessions[user]
                else:
                    self._sessions[user] = session.waits_for

    async def _open(self, user: str, session: _Session, topics: Iterable[Topic]) -> None:
        assert self._session is not None
        if session.released.is_set():
            return
        try:
            async with self._session(user):
                session.is_open = True
                for topic in topics:
                    self._begin(topic)
                await session.released.wait()
            if not session.released.is_set():
                raise SourceError("it has ended by itself")
        finally:
            # It may have ended by itself, with an exception: nothing is asked meanwhile.
            session.is_open = False
            for topic in topics:
                self._end(topic)
