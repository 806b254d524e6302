"""Keep what is to be published until an SQLAlchemy session has committed.

1. What is given belongs to the innermost savepoint that is open, or else to the whole transaction.
   It begins one if there is none, as `session.add` does: a rollback must find it.
2. A savepoint that is released hands on what it has to the one around it. Whatever else ends it, or
   the transaction, drops what it has: a rollback, `close`, a failed flush.
3. What the transaction has when it is committed goes out when it has ended: its connection is back
   in the pool by then, and nobody waits for it while a server is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session

__all__ = ["Value", "queue_until_commit"]

Value = dict[str, Any]
"""A value as `POST /publish` takes it."""

Publish = Callable[[list[Value]], None]

_KEY: Final = "trading_push.after_commit"


@attrs.define
class _Waiting:
    """A value that waits, and the savepoint that it belongs to; None for the whole transaction."""

    publish: Publish
    value: Value
    savepoint: SessionTransaction | None


class _Queue:
    """What one session has gathered."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._committed: list[_Waiting] = []  # until the transaction has ended

    def add(self, session: Session, publish: Publish, value: Value) -> None:
        """Keep a value for the end of the transaction."""
        if not session.in_transaction():
            session.begin()
        self._waiting.append(_Waiting(publish, value, session.get_nested_transaction()))

    def after_commit(self, session: Session) -> None:
        """SQLAlchemy calls it for a savepoint that is released, too."""
        released = session.get_nested_transaction()
        if released is None:
            self._committed, self._waiting = self._waiting, []
            return
        around = _savepoint_around(released)
        for each in self._waiting:
            if each.savepoint is released:
                each.savepoint = around

    def after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        """Drop what was not committed, and publish what was."""
        if transaction.nested:
            self._waiting = [each for each in self._waiting if each.savepoint is not transaction]
        elif transaction.parent is None:
            self._waiting = []
            committed, self._committed = self._committed, []
            for publish in dict.fromkeys(each.publish for each in committed):
                publish([each.value for each in committed if each.publish == publish])


def _savepoint_around(transaction: SessionTransaction) -> SessionTransaction | None:
    around = transaction.parent
    while around is not None and not around.nested:
        around = around.parent
    return around


def queue_until_commit(
    session: Session | scoped_session[Any], publish: Publish, value: Value
) -> None:
    """Keep a value until the session has committed.

    Args:
        session: The session, or the registry whose session of this thread is meant.
        publish: Called with all values of one transaction, in their order; must not raise.
        value: The value.

    Raises:
        TypeError: It is no such session.
    """
    from sqlalchemy import event
    from sqlalchemy.orm import Session, scoped_session

    own = session() if isinstance(session, scoped_session) else session
    if not isinstance(own, Session):
        raise TypeError(
            f"after_commit takes a Session of SQLAlchemy, or a scoped_session as db.session, and "
            f"not {type(own).__name__}; of an AsyncSession, its sync_session"
        )
    queue = own.info.get(_KEY)
    if queue is None:
        queue = own.info[_KEY] = _Queue()
        event.listen(own, "after_commit", queue.after_commit)
        event.listen(own, "after_transaction_end", queue.after_transaction_end)
    queue.add(own, publish, value)
