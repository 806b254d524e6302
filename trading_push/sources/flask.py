"""A Flask application's own functions as a source; Flask itself is not imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from trading_push.sources.functions import FunctionSource
from trading_push.user_ids import IdKind

__all__ = ["FlaskSource"]


class FlaskApplication(Protocol):
    """The part of a `flask.Flask` that is needed."""

    def app_context(self) -> AbstractContextManager[Any]:
        """Make a new application context."""
        ...


class FlaskSource(FunctionSource):
    """Asks functions inside a fresh application context, pushed in the thread that runs them.

    So `current_app`, `g`, `db.session` and every other extension work, and a context that is open
    around the service is not shared. However a call ends, the application's teardown functions have
    run by then: sessions are rolled back, and connections returned.

    Args:
        app: The application.
        fetch: As for a `FunctionSource`.
        fetch_many: As for a `FunctionSource`.
        data_types: As for a `FunctionSource`.
        user_id: As for a `FunctionSource`.
    """

    def __init__(
        self,
        app: FlaskApplication,
        fetch: Callable[[str, str], Any],
        *,
        fetch_many: Callable[..., Any] | None = None,
        data_types: Iterable[str] | None = None,
        user_id: IdKind = "text",
    ) -> None:
        super().__init__(
            fetch,
            context=app.app_context,
            fetch_many=fetch_many,
            data_types=data_types,
            user_id=user_id,
        )
