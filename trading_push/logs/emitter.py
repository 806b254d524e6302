"""Emit lines of the catalogue through `logging`.

The lines are part of the product: operators watch and grep them. One line is one record. The lines
of one `emit` stand together: no other `trading_push` record comes between them, from whatever
thread. A record carries the event's name (`record.event`) and its fields (`record.fields`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from trading_push.logs.catalogue import CATALOGUE, template
from trading_push.logs.lines import Line, escape, line
from trading_push.logs.output import Output, attached_outputs
from trading_push.logs.traces import trace

__all__ = ["emit", "emit_pushed", "enabled", "set_quiet"]

_PACKAGE: Final = logging.getLogger("trading_push")
_LOGGERS: Final = {
    event: logging.getLogger(f"trading_push.{texts[0]}") for event, texts in CATALOGUE.items()
}
_LEVELS: Final = {
    event: (
        logging.WARNING
        if texts[1].startswith("⚠️")
        else logging.ERROR
        if texts[1].startswith("❌")
        else logging.INFO
    )
    for event, texts in CATALOGUE.items()
}


_quiet: dict[str, int] = {}


def set_quiet(events: Iterable[str]) -> None:
    """Write no line of some events from now on, and those of all others again."""
    _LEVELS.update(_quiet)
    _quiet.clear()
    for event in events:
        _quiet[event] = _LEVELS[event]
        _LEVELS[event] = logging.NOTSET  # below the level of every logger


def enabled(event: str) -> bool:
    """Whether a line of this event would be written; saves making it on hot paths."""
    return _LOGGERS[event].isEnabledFor(_LEVELS[event])


def emit(*lines: Line) -> None:
    """Log lines, with no other record of the package between them.

    No handler, filter or record factory of the application makes it raise.
    """
    texts = _bare_texts(lines)
    if texts is not None:
        for output in attached_outputs if texts else ():
            output.enqueue(texts)
    elif len(lines) == 1:
        _emit_record(lines[0])
    else:
        with _unbroken(_LOGGERS[lines[0].event]):
            for each in lines:
                _emit_record(each)


def emit_pushed(pushed: Sequence[tuple[str, str]]) -> None:
    """Log the push of each (data type, user); these are by far the most lines of all."""
    if not enabled("pushed"):
        return
    if _only_outputs(_LOGGERS["pushed"]):
        # A data type is a channel's name and needs no escaping.
        text = template("pushed").format(data_type="%s", user="%s")
        texts = [text % (data_type, escape(user)) for data_type, user in pushed]
        for output in attached_outputs:
            output.enqueue(texts)
    else:
        emit(*(line("pushed", data_type=data_type, user=user) for data_type, user in pushed))


def _bare_texts(lines: Sequence[Line]) -> list[str] | None:
    """The text of each line; None if one of them needs a record.

    A line that goes through a record costs three times as much.
    """
    texts: list[str] = []
    last: logging.Logger | None = None
    for event, fields, exception in lines:
        logger = _LOGGERS[event]
        if exception is not None or (logger is not last and not _only_outputs(logger)):
            return None
        last = logger
        if logger.isEnabledFor(_LEVELS[event]):
            texts.append(template(event).format_map(fields))
    return texts


def _emit_record(each: Line) -> None:
    event, fields, exception = each
    logger, level = _LOGGERS[event], _LEVELS[event]
    if logger.disabled and any(isinstance(handler, Output) for handler in _PACKAGE.handlers):
        # By `logging.config`, which an application's module may call on import: it disables every
        # logger that it does not name. A module must not silence the program that imports it.
        logger.disabled = False
    if not logger.isEnabledFor(level):
        return
    text = template(event).format_map(fields)
    info = None if exception is None else (type(exception), exception, exception.__traceback__)
    # The application's factory, filter or handler may raise, also inside the registry task, which
    # a line must not end.
    with suppress(Exception):
        record = logging.getLogRecordFactory()(logger.name, level, "", 0, text, None, info)
        record.event = event
        record.fields = fields
        if exception is not None:  # formatters print this as the trace
            record.exc_text = trace(exception)
        logger.handle(record)


def _only_outputs(logger: logging.Logger) -> bool:
    """Whether a record of this logger could reach nothing but the outputs, unchanged.

    False as soon as the application has a handler, a filter or a record class of its own.
    """
    return (
        bool(attached_outputs)
        and logger.parent is _PACKAGE
        and not (logger.handlers or logger.filters or logger.disabled or _PACKAGE.propagate)
        and _PACKAGE.handlers == attached_outputs
        and not any(output.filters or output.level for output in attached_outputs)
        and logging.getLogRecordFactory() is logging.LogRecord
    )


@contextmanager
def _unbroken(logger: logging.Logger | None) -> Iterator[None]:
    """Keep the records of other threads from the handlers of this logger.

    A record reaches its handlers one by one, each under the handler's own re-entrant lock. Holding
    all of these locks makes the other threads wait.
    """
    held = []
    try:
        while logger is not None:
            for handler in logger.handlers:
                if handler.lock is not None:
                    handler.lock.acquire()
                    held.append(handler.lock)
            logger = logger.parent if logger.propagate else None
        yield
    finally:
        for lock in reversed(held):
            lock.release()
