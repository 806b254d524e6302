"""The file: whether it is a paper exchange, which process trades on it, opening and making it."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from contextlib import ExitStack, closing
from pathlib import Path

import attrs

from trading_push.errors import ConfigurationError
from trading_push.models import Ticker
from trading_push.sources import sqlite
from trading_push.sources.paper.books import Books, read_tickers
from trading_push.sources.paper.engine import MatchingEngine
from trading_push.sources.paper.schema import APPLICATION_ID, SCHEMA, SCHEMA_VERSION
from trading_push.sources.paper.traders import demo_engine
from trading_push.sources.sqlite import open_sqlite

__all__ = ["OpenedFile", "open_file"]


@attrs.define
class OpenedFile:
    """An exchange's file as it was found.

    Args:
        tickers: The market as it was kept.
        engine: The accounts as they were kept; empty where another process trades.
        books: What writes the file; None where another process trades.
        held: The connection, and the lock beside the file.
    """

    tickers: dict[str, Ticker]
    engine: MatchingEngine = attrs.field(factory=MatchingEngine)
    books: Books | None = None
    _held: ExitStack = attrs.field(factory=ExitStack)

    def close(self) -> None:
        """Close the file, and let another process trade on it."""
        self._held.close()


def open_file(path: Path) -> OpenedFile:
    """Open the file to trade on it, or to read it where another process trades.

    A file that is not there is made.

    Raises:
        ConfigurationError: The path is not of a paper exchange, and cannot become one.
    """
    # Before anything else: not even a lock is put beside a file of another program.
    _holds_exchange(path)
    try:
        with ExitStack() as held:
            lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            held.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return OpenedFile(_wait_for_tickers(path))
            # Once more, because another process may have made it before it released the lock.
            if not _holds_exchange(path):
                _make(path)
            books = Books(held.enter_context(closing(open_sqlite(path, "rw"))))
            engine, tickers = books.load()
            return OpenedFile(tickers, engine, books, held.pop_all())
    except (OSError, sqlite3.Error) as error:
        raise ConfigurationError(
            f"{path} cannot be used for the accounts ({error}): give a path that can be written"
        ) from None


def _holds_exchange(path: Path) -> bool:
    """Whether the file is an exchange already (False: it can become one); nothing is written.

    Raises:
        ConfigurationError: It is something else, or cannot be read.
    """
    hint = "give another path, or one where there is no file yet"
    try:
        if path.is_dir():
            raise ConfigurationError(f"{path} is a directory: give the path of a file")
        if not path.parent.is_dir():
            raise ConfigurationError(f"there is no directory {path.parent}: make it, or {hint}")
        if not path.exists() or path.stat().st_size == 0:
            return False
        with path.open("rb") as file:
            if file.read(16) != b"SQLite format 3\0":
                raise ConfigurationError(f"{path} is no SQLite database: {hint}")
        with closing(open_sqlite(path, "ro")) as connection:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except (OSError, sqlite3.Error) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): {hint}") from None
    if application == APPLICATION_ID and version == SCHEMA_VERSION:
        return True
    if application == APPLICATION_ID:
        raise ConfigurationError(
            f"{path} was written by another version of the paper exchange: {hint}"
        )
    if application or version or tables:
        raise ConfigurationError(f"{path} is another program's database: {hint}")
    return False


def _make(path: Path) -> None:
    """Make the file beside its place, then move it there: it is there whole, or not at all."""
    path = path.resolve()
    new = path.with_name(path.name + ".new")
    # Left by a kill, or by someone who deleted only the file itself.
    for leftover in (f"{new}", f"{new}-wal", f"{new}-shm", f"{path}-wal", f"{path}-shm"):
        Path(leftover).unlink(missing_ok=True)
    new.touch(mode=0o600)
    with closing(open_sqlite(new, "rw")) as connection:
        books = Books(connection)
        connection.executescript(SCHEMA)
        books.save(demo_engine(), (), now=0)
    new.replace(path)


def _wait_for_tickers(path: Path) -> dict[str, Ticker]:
    """Read the file's tickers, as soon as the process that trades on it has made the file."""
    deadline = time.monotonic() + sqlite.BUSY_TIMEOUT_S
    while not _holds_exchange(path) and time.monotonic() < deadline:
        time.sleep(0.02)
    with closing(open_sqlite(path, "ro")) as connection:
        return read_tickers(connection)
