"""Write log lines from a thread behind a bounded queue, as text or as JSON.

A file that is renamed, as `logrotate` does, is followed by a new one of the name, and none is lost.
A library that is embedded in an application attaches no handler: `attached` is for programs.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from trading_push.errors import ConfigurationError
from trading_push.logs.catalogue import set_language, template
from trading_push.logs.lines import one_line
from trading_push.logs.process import taken_over
from trading_push.logs.traces import LINE_LENGTH, trace

__all__ = [
    "JsonFormatter",
    "Output",
    "SafeFormatter",
    "attached",
    "attached_outputs",
    "chunks",
    "lines_dropped",
    "set_level",
]

UNITS_AT_ONCE: Final = 500
"""How many units the thread takes from the queue before it writes them."""
PAUSE_S: Final = 0.01
"""How long the thread sleeps after writing. Woken for each line of a burst, it would take the
interpreter away from the event loop."""
LAST_LINES_S: Final = 2
"""How long the last lines may take at the end, when nothing is written any more."""
PROGRESS_S: Final = 2
"""At the end: how often the thread must have written something to be waited for longer. On a busy
machine a reader that is there may read nothing for more than half a second."""
EXTRA_S: Final = 6
"""At the end: how much longer it is waited for while it writes. Thousands of clients that leave at
the end make tens of thousands of lines."""
_STDERR: Final = 2


class SafeFormatter(logging.Formatter):
    """Format each record as one line, with its stack trace below (see `traces`)."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, without the trace that another handler's formatter left in it."""
        if record.exc_info:
            record.exc_text = None
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Put the record in one line, also where another library wrote its text."""
        return one_line(super().formatMessage(record), LINE_LENGTH)

    def formatException(self, ei: Any) -> str:
        """Format the stack trace."""
        return "" if ei[1] is None else trace(ei[1])


class JsonFormatter(SafeFormatter):
    """Format each record as a JSON object: `at` (ms), `level`, `logger`, `event`, `message`,
    `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as JSON, with its stack trace as `trace`."""
        entry = {
            "at": int(record.created * 1000),
            "level": record.levelname,
            "logger": record.name,
            "event": getattr(record, "event", None),
            "message": one_line(record.getMessage(), LINE_LENGTH),
            "fields": getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry, enc_hook=str).decode()


class Output(logging.Handler):
    """Write lines to a descriptor from a thread, so that a full pipe blocks only that thread.

    Lines wait in the queue as text, because records would be work for the garbage collector. What
    finds the queue full is counted, and the count is written as a line. There is no file object:
    at the end of the process it would wait for the lock of a write that is stuck.
    """

    def __init__(
        self,
        descriptor: int,
        formatter: logging.Formatter,
        lines: int,
        path: Path | None = None,
    ) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._descriptor = descriptor
        self._path = path  # the file's, which is opened anew when it is another one
        self._bound = lines  # how many lines may wait
        self._dropped = 0  # lines that were dropped since the last one was queued
        self.lost = 0  # lines that were dropped since the start
        self._queued = 0  # lines queued so far, counted by the threads that emit
        self._taken = 0  # lines taken from the queue so far, counted by the thread
        self._written = 0  # calls of write() so far
        # Units of lines that stay together; None ends the thread. A SimpleQueue has no bound and
        # no condition to signal, and a line costs a third of what it costs with a Queue.
        self._units: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def enqueue(self, lines: list[str]) -> None:
        """Queue the texts of some lines, with no other between them."""
        assert self.lock is not None
        with self.lock:
            self._enqueue(lines)

    def emit(self, record: logging.LogRecord) -> None:
        self._enqueue([self._text(record)])

    def _enqueue(self, unit: list[str]) -> None:
        # Each counter has one thread that writes it, so that no further lock is needed.
        if self._queued - self._taken + bool(self._dropped) >= self._bound:
            self._dropped += len(unit)
            self.lost += len(unit)
            return
        if self._dropped:
            unit = [self._text(self._dropped_record()), *unit]
            self._dropped = 0
        self._queued += len(unit)
        self._units.put(unit)

    def _text(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception:  # a record of another library
            record = logging.LogRecord(
                record.name, record.levelno, "", 0, f"cannot be formatted: {record.name}", (), None
            )
            return self.format(record)

    def _dropped_record(self) -> logging.LogRecord:
        text = template("lines_dropped").format(dropped=self._dropped)
        record = logging.LogRecord("trading_push.logs", logging.WARNING, "", 0, text, (), None)
        record.event = "lines_dropped"
        record.fields = {"dropped": self._dropped}
        return record

    def end(self, timeout_s: float) -> None:
        """Write what is queued and close the descriptor.

        A thread that takes longer than `timeout_s` is given up, or somewhat later if it is still
        writing, which means that there is a reader.
        """
        self._units.put(None)
        given_up_at = time.monotonic() + timeout_s + EXTRA_S
        while self._thread.is_alive() and time.monotonic() < given_up_at:
            written = self._written
            self._thread.join(timeout_s)
            if self._written == written:
                break
            timeout_s = PROGRESS_S
        if self._descriptor != _STDERR and not self._thread.is_alive():
            os.close(self._descriptor)

    def _run(self) -> None:
        last = False
        while not last:
            units = [self._units.get()]
            while len(units) < UNITS_AT_ONCE and not self._units.empty():
                units.append(self._units.get())
            last = units[-1] is None
            self._taken += sum(len(unit) for unit in units if unit is not None)
            for chunk in chunks(unit for unit in units if unit is not None):
                if self._path is not None:
                    self._follow(self._path)
                self._write(chunk)
            if not last:
                time.sleep(PAUSE_S)

    def _follow(self, path: Path) -> None:
        """Write to the file that has the name now; to the old one where it cannot be opened."""
        try:
            with suppress(FileNotFoundError):
                there, ours = os.stat(path), os.fstat(self._descriptor)
                if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                    return
            opened = _open(path)
        except OSError:
            return
        os.close(self._descriptor)
        self._descriptor = opened

    def _write(self, chunk: bytes) -> None:
        data = memoryview(chunk)
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
                self._written += 1
            except BlockingIOError:  # another program has made the terminal non-blocking
                writable = select.poll()  # `select` takes no descriptor above 1,023
                writable.register(self._descriptor, select.POLLOUT)
                writable.poll()
            except OSError:
                return  # the reader has gone, or the disk is full


attached_outputs: Final[list[Output]] = []
"""The outputs of `attached`, while all of them write the bare text of a line."""


_running: Final[list[Output]] = []
_lost_before: Final = [0]  # lines that outputs had dropped which run no more


def lines_dropped() -> int:
    """How many lines the outputs of `attached` have dropped since the start of the process."""
    return _lost_before[0] + sum(output.lost for output in _running)


def chunks(units: Iterable[list[str]]) -> Iterator[bytes]:
    """Join whole units, or whole lines of a long one, to pieces that a pipe takes at once.

    Workers share a pipe, and the kernel may mix a longer piece with what another worker writes.
    """
    chunk = b""
    for unit in units:
        whole = "".join([f"{line}\n" for line in unit]).encode("utf-8", "backslashreplace")
        if chunk and len(chunk) + len(whole) > select.PIPE_BUF:
            yield chunk
            chunk = b""
        chunk += whole
        while len(chunk) > select.PIPE_BUF:
            end = chunk.rfind(b"\n", 0, select.PIPE_BUF) + 1 or chunk.index(b"\n") + 1
            yield chunk[:end]
            chunk = chunk[end:]
    if chunk:
        yield chunk


def set_level(level: str) -> None:
    """Write the package's lines from a level on: `info`, `warning` or `error`."""
    logging.getLogger("trading_push").setLevel(level.upper())


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


@contextmanager
def attached(
    *,
    lang: str = "zh",
    level: str = "info",
    json: bool = False,
    file: Path | None = None,
    queue_lines: int = 100_000,
) -> Iterator[None]:
    """Print the lines to standard error, and to `file` as well, while the context is open.

    Threads behind bounded queues do the writing, so that a full pipe without a reader never stops
    the service. What other libraries log is written in the same form, unless the application has
    configured the root logger. Leaving waits two seconds for lines that are still queued, and
    longer as long as they are being read.

    Args:
        lang: The language of the lines of the whole process, `zh`, `en`, or as the locale is
            (`auto`).
        level: The least level that is written, `info`, `warning` or `error`.
        json: Print JSON objects instead of text.
        file: Append the lines to this file, with time, logger and level.
        queue_lines: How many lines may wait before further ones are dropped, and counted.

    Raises:
        ConfigurationError: The file cannot be opened.
    """
    set_language(lang)
    plain = JsonFormatter() if json else SafeFormatter("%(message)s")
    outputs = [Output(_STDERR, plain, queue_lines)]
    if file is not None:
        try:
            descriptor = _open(file)
        except OSError as error:
            raise ConfigurationError(
                f"the log file {file} cannot be opened ({error.strerror}): give another"
            ) from None
        stamped = SafeFormatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s")
        outputs.append(Output(descriptor, plain if json else stamped, queue_lines, file))

    _running.extend(outputs)

    # Take the loggers over, and remember how they were.
    loggers = [logging.getLogger("trading_push"), logging.getLogger("hypercorn.error")]
    kept = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger, least in zip(loggers, (level.upper(), "WARNING"), strict=True):
        for output in outputs:
            logger.addHandler(output)
        logger.propagate = False
        logger.disabled = False
        logger.setLevel(least)
    if file is None and not json:
        attached_outputs[:] = outputs
    try:
        with taken_over(outputs):
            yield
    finally:
        attached_outputs.clear()
        for output in outputs:
            _running.remove(output)
            _lost_before[0] += output.lost
        for logger, old_level, propagate in kept:
            for output in outputs:
                logger.removeHandler(output)
            logger.setLevel(old_level)
            logger.propagate = propagate
        deadline = time.monotonic() + LAST_LINES_S
        for output in reversed(outputs):  # the file first: standard error may be a full pipe
            output.end(max(0, deadline - time.monotonic()))
