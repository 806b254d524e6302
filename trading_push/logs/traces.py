"""Stack traces in which no text of a peer can pass for a line of the log."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Final

from trading_push.logs.lines import one_line, safe_str, without_tokens

__all__ = ["LINE_LENGTH", "trace"]

LINE_LENGTH: Final = 1000
"""How many characters of one line of a trace are printed."""
_EXCEPTIONS: Final = 50
"""How many exceptions one trace shows: causes, contexts and members of groups."""

_CAUSE: Final = "The above exception was the direct cause of the following exception:"
_CONTEXT: Final = "During handling of the above exception, another exception occurred:"


def trace(error: BaseException) -> str:
    """The stack trace of an exception, in the form in which Python prints it.

    An exception's text may be a peer's: it is escaped, cut and kept in one line, because a line
    feed in it could begin a line that reads like one of the catalogue.
    """
    return "\n".join(_lines(error, set()))


def _lines(error: BaseException, shown: set[int]) -> Iterator[str]:
    # `shown` has the id of each exception that was printed: causes may form a circle.
    shown.add(id(error))

    # What came before it, as Python prints it.
    earlier, why = error.__cause__, _CAUSE
    if earlier is None and not error.__suppress_context__:
        earlier, why = error.__context__, _CONTEXT
    if earlier is not None and id(earlier) not in shown and len(shown) < _EXCEPTIONS:
        yield from _lines(earlier, shown)
        yield from ("", why, "")

    # The frames, the exception itself and its notes.
    yield "Traceback (most recent call last):"
    for frame in traceback.format_tb(error.__traceback__):
        for text in frame.splitlines():
            yield one_line(text, LINE_LENGTH)
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    said = safe_str(error)
    yield _cleaned(f"{name}: {said}" if said else name)
    notes = getattr(error, "__notes__", ())
    for note in notes if isinstance(notes, list) else ():
        yield _cleaned(f"note: {safe_str(note)}")

    # The members of a group, indented.
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            if id(each) not in shown and len(shown) < _EXCEPTIONS:
                yield from (f"  | {text}" for text in _lines(each, shown))


def _cleaned(text: str) -> str:
    return one_line(without_tokens(text, LINE_LENGTH), LINE_LENGTH)
