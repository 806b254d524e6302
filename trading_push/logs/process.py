"""Give all else that a process writes to standard error the form of the log's lines.

Other libraries' loggers, warnings, and exceptions that nobody catches. What reads the log reads it
line by line, and a trace in between is no line.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["adopt", "taken_over"]

_PYTHON = logging.getLogger("python")

_handlers: list[logging.Handler] = []


def adopt(logger: logging.Logger) -> None:
    """Let a logger with handlers of its own write as all others do, where they are taken over."""
    if _handlers:
        logger.handlers.clear()
        logger.propagate = True


@contextmanager
def taken_over(handlers: Sequence[logging.Handler]) -> Iterator[None]:
    """Send what nobody else handles to some handlers while the context is open.

    Where the root logger has handlers, an application has decided, and nothing is changed.
    """
    root = logging.getLogger()
    if root.handlers:
        yield
        return
    hooks = sys.unraisablehook, threading.excepthook
    for handler in handlers:
        root.addHandler(handler)
    _handlers[:] = handlers
    sys.unraisablehook, threading.excepthook = _unraisable, _uncaught
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        sys.unraisablehook, threading.excepthook = hooks
        _handlers.clear()
        for handler in handlers:
            root.removeHandler(handler)


def _unraisable(unraisable: Any) -> None:
    # An exception in a `__del__`, or in a callback of C code.
    what = unraisable.err_msg or "Exception ignored in"
    _log(f"{what}: {unraisable.object!r}", unraisable)


def _uncaught(thrown: Any) -> None:
    if thrown.exc_type is not SystemExit:
        name = "-" if thrown.thread is None else thrown.thread.name
        _log(f"Exception in thread {name}", thrown)


def _log(message: str, raised: Any) -> None:
    info = (raised.exc_type, raised.exc_value, raised.exc_traceback)
    _PYTHON.error("%s", message, exc_info=info)
