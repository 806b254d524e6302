"""Start upstream work for a topic when its first watcher arrives; stop it when the last has left.

It stops only after a linger, because a page that is loaded again must not start everything anew.
With a user's first topic the session of that user is opened, and with the first user the watch over
the source begins.
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

__all__ = ["Interest", "SessionFactory"]

SessionFactory = Callable[[str], AbstractAsyncContextManager[Any]]
"""Opens the session of a user, by the user's id; see `sources.base.SessionSource.session`."""

_JITTER_S: Final = 0.5
"""Keeps the sessions of all users, cut at the same moment, from coming back all at once."""
_CLOSE_S: Final = 1.0
"""How long a session may take to close before it is cancelled."""


@attrs.define(eq=False)
class _User:
    """A user with a topic that is held."""

    topics: dict[Topic, None] = attrs.field(factory=dict)
    session: _UserSession | None = None


class _UserSession:
    """The session of one user: about to be opened, open, or closing."""

    def __init__(self) -> None:
        self.is_open = False
        self.has_failed = False
        """Whether it could not be opened, or broke, and has not been opened since."""
        self.waits_for: _UserSession | None = None
        """The user's session before this one, which has not ended yet."""
        self.released = trio.Event()
        """Set when the session is to close."""
        self.ended = trio.Event()
        """Set when it has closed; the next one of the user may open then."""
        self.scope = trio.CancelScope(shield=True)
        """Around the session; shielded, so that a cancelled service closes it in order, too."""

    def release(self) -> None:
        """Let the session close, within `_CLOSE_S`."""
        self.released.set()
        self.scope.deadline = trio.current_time() + _CLOSE_S


class Interest:
    """Turns the comings and goings of watchers into work upstream.

    Args:
        linger_s: How long a topic is held after its last watcher has left.
        begin: Called with a topic that is held from now on, once its user's session is open.
        end: Called with a topic that is no longer held, or whose user's session has failed.
        failed: Called with whose session has failed (None where it was the watch), the exception,
            and the seconds until the next try.
        session: What is held open for each user, if anything.
        watch: What is run while any user is held, if anything.
    """

    def __init__(
        self,
        linger_s: float,
        *,
        begin: Callable[[Topic], None],
        end: Callable[[Topic], None],
        failed: Callable[[str | None, Exception, float], None],
        session: SessionFactory | None = None,
        watch: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._linger_s = linger_s
        self._begin = begin
        self._end = end
        self._failed = failed
        self._session = session
        self._watch = watch
        # The topics that are watched, or linger.
        self._held: set[Topic] = set()
        # Until when the topics that linger are held, the next one first.
        self._leaving: dict[Topic, float] = {}
        # The users with a topic that is held.
        self._users: dict[str, _User] = {}
        # The last session of each user that has not ended; it may outlive its user's entry above.
        self._sessions: dict[str, _UserSession] = {}
        # Set while there is a user.
        self._anybody = trio.Event()
        # Cancelled when the last user has left; None while the watch does not run.
        self._watching: trio.CancelScope | None = None
        # Where sessions run; None before `run` and after its end has begun.
        self._nursery: trio.Nursery | None = None
        # Set when a topic begins to linger.
        self._wake = trio.Event()

    def holds(self, topic: Topic) -> bool:
        """Whether a topic is watched, or was until a moment ago."""
        return topic in self._held

    def topics_of(self, user: str) -> Iterable[Topic]:
        """Return the topics of a user that are held."""
        return () if user not in self._users else tuple(self._users[user].topics)

    def session_failed(self, user: str) -> bool:
        """Whether a user's session is not open because it has failed."""
        held = self._users.get(user)
        return held is not None and held.session is not None and held.session.has_failed

    def watched(self, topic: Topic, watched: bool) -> None:
        """Note that a topic's first watcher has arrived, or its last one has left; synchronous."""
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
                user.session = _UserSession()
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
        """Work until cancelled; then every session is closed, within `_CLOSE_S`."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self._watch is not None:
                nursery.start_soon(self._watch_while_held)
            task_status.started()
            try:
                # Let go of each topic whose linger is over.
                while True:
                    with trio.move_on_at(next(iter(self._leaving.values()), math.inf)):
                        await self._wake.wait()
                    self._wake = trio.Event()
                    now = trio.current_time()
                    for topic in [each for each, until in self._leaving.items() if until <= now]:
                        del self._leaving[topic]
                        self._let_go(topic)
            finally:
                self._nursery = None  # for a user who comes from now on nothing is opened
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
                await trio.sleep_forever()  # the watch has returned: it has nothing more to tell
            self._watching = None

    async def _keep_open(self, user: str, session: _UserSession, topics: Iterable[Topic]) -> None:
        session.waits_for = self._sessions.get(user)
        self._sessions[user] = session
        try:
            with session.scope:
                # Sessions of one user never overlap.
                while session.waits_for is not None:
                    await session.waits_for.ended.wait()
                    # That one may have been cancelled while it waited itself.
                    session.waits_for = session.waits_for.waits_for
                await keep_running(
                    partial(self._open, user, session, topics),
                    partial(self._session_failed, user, session),
                    jitter_s=_JITTER_S,
                )
        finally:
            session.ended.set()
            if self._sessions.get(user) is session:
                if session.waits_for is None:
                    del self._sessions[user]
                else:
                    self._sessions[user] = session.waits_for

    def _session_failed(
        self, user: str, session: _UserSession, error: Exception, delay: float
    ) -> None:
        session.has_failed = True
        self._failed(user, error, delay)

    async def _open(self, user: str, session: _UserSession, topics: Iterable[Topic]) -> None:
        assert self._session is not None
        if session.released.is_set():
            return
        try:
            async with self._session(user):
                session.is_open, session.has_failed = True, False
                for topic in topics:
                    self._begin(topic)
                await session.released.wait()
            if not session.released.is_set():
                raise SourceError("it has ended by itself")
        finally:
            # It may have ended by itself, with an exception: nothing is asked until it is open.
            session.is_open = False
            for topic in topics:
                self._end(topic)
