"""A Flask application's own functions as a source; Flask itself is not imported."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from trading_push.sources.function import FunctionSource

__all__ = ["FlaskSource"]


class FlaskApplication(Protocol):
    """What is needed of a `flask.Flask`."""

    def app_context(self) -> AbstractContextManager[Any]:
        """A new application context."""
        ...


class FlaskSource(FunctionSource):
    """Asks functions inside a fresh application context, pushed in the thread that runs them.

    So `current_app`, `g`, `db.session` and every other extension work, a context that is open
    round the service is not shared, and the application's teardown functions have run, with
    sessions rolled back and connections returned, when a call has ended, however it has.

    Args:
        app: The application.
        fetch: As a `FunctionSource`'s.
        fetch_many: As a `FunctionSource`'s.
    """

    def __init__(
        self,
        app: FlaskApplication,
        fetch: Callable[[str, str], Any],
        *,
        fetch_many: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(fetch, context=app.app_context, fetch_many=fetch_many)
