"""The engine of the SQL source: its URL, its pool, and the deadline of each statement."""

from __future__ import annotations

import sqlite3
import time
import urllib.parse
from collections.abc import Callable
from contextlib import closing
from typing import Any

import msgspec
import sqlalchemy
from sqlalchemy import (
    Connection,
    Engine,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from trading_push.errors import ConfigurationError

__all__ = ["is_sqlite_file", "make_engine", "parse"]


BUSY_TIMEOUT_S = 5.0


# How libpq (section 34.1.2 of PostgreSQL's manual) is told to give up: on a server that does not
# answer a connect, and on one that has vanished in the midst of an answer. The URL goes before it.
_LIBPQ = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "25000",
    "application_name": "trading_push",
}


# SQLite looks at the clock after so many steps of its virtual machine, about 10 ms of them.
_STEPS = 1_000_000


def parse(url: str | URL) -> URL:
    """The URL, with what libpq needs to give up in time.

    Raises:
        ConfigurationError: It cannot be read, or names no SQLite file.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The text itself may hold a password.
        raise ConfigurationError(
            "the database's url cannot be read: give one like "
            "postgresql+psycopg://user:password@host/name or sqlite:////path/to/file"
        ) from None
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError(
            "the database's url names no file: give one like sqlite:////path/to/file"
        )
    if parsed.drivername in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"):
        return parsed.set(query={**_LIBPQ, **parsed.query})
    return parsed


def is_sqlite_file(url: URL) -> bool:
    """Whether it is a file for Python's own SQLite driver; a URL with options is left as it is."""
    return url.drivername in ("sqlite", "sqlite+pysqlite") and not url.query


def make_engine(url: URL, threads: int, statement_timeout_s: float) -> Engine:
    options: dict[str, Any] = {
        "pool_size": threads,
        "max_overflow": 0,
        "poolclass": sqlalchemy.QueuePool,
        # Every fetch is reading alone: no transaction to begin and roll back around it.
        "isolation_level": "AUTOCOMMIT",
    }
    backend = url.get_backend_name()
    if is_sqlite_file(url):
        options["creator"] = lambda: _open_sqlite(str(url.database))
    elif backend != "sqlite":
        options["pool_pre_ping"] = True
    if backend == "postgresql":
        # JSON goes on as the server wrote it: as floats its numbers would lose digits.
        options["json_deserializer"] = msgspec.Raw
    try:
        engine = create_engine(url, **options)
    except (NoSuchModuleError, ImportError):
        raise ConfigurationError(
            f"there is no driver {url.drivername!r} for the database's url: {_advice(backend)}"
        ) from None
    except (SQLAlchemyError, TypeError, ValueError):
        raise ConfigurationError(
            f"the database's url is not one for {url.drivername!r}: correct it"
        ) from None
    if is_sqlite_file(url):
        event.listen(engine, "before_cursor_execute", _sqlite_deadline(statement_timeout_s))
    elif backend == "postgresql":
        event.listen(engine, "connect", _postgres_deadline(statement_timeout_s))
    return engine


def _advice(backend: str) -> str:
    if backend == "postgresql":
        return "pip install 'trading_push[postgres]', and begin the url with postgresql+psycopg://"
    return "install it, or name another (as in postgresql+psycopg://)"


def _postgres_deadline(seconds: float) -> Callable[..., None]:
    def on_connect(connection: Any, _record: object) -> None:
        # Not among the options of the connect, which a URL may have, and a pooler refuses.
        with closing(connection.cursor()) as cursor:
            cursor.execute(f"SET statement_timeout = {round(seconds * 1000)}")
        connection.commit()  # else a driver that has begun a transaction takes it back

    return on_connect


def _sqlite_deadline(seconds: float) -> Callable[..., None]:
    def before_execute(connection: Connection, *_: object) -> None:
        end = time.monotonic() + seconds
        driver: Any = connection.connection.driver_connection
        driver.set_progress_handler(lambda: time.monotonic() > end, _STEPS)

    return before_execute


def _open_sqlite(path: str) -> sqlite3.Connection:
    # The pool hands a connection from thread to thread, but never to two at the same time.
    return sqlite3.connect(
        f"file:{urllib.parse.quote(path)}?mode=ro",
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        check_same_thread=False,
    )
