"""The database: its URL, its pool of connections, and the deadline of each statement."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import msgspec
import sqlalchemy
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from trading_push.errors import ConfigurationError
from trading_push.sources.sqlite import open_sqlite

__all__ = ["is_sqlite_file", "open_engine", "parse"]

# How libpq (section 34.1.2 of PostgreSQL's manual) is told to give up: on a server that does not
# answer a connect, and on one that has vanished in the midst of an answer. The URL may override it.
_LIBPQ = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "25000",
    "application_name": "trading_push",
}

_STEPS = 1_000_000
"""SQLite looks at the clock after so many steps of its virtual machine, about 10 ms of them."""


def parse(url: str | URL) -> URL:
    """Parse the URL of a database, and add what libpq needs to give up in time.

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


def open_engine(url: URL, threads: int, statement_timeout_s: float) -> Engine:
    """Make the pool of connections; it connects when it is first used.

    Args:
        url: The database.
        threads: How many connections there are at most.
        statement_timeout_s: How long PostgreSQL, or an SQLite file, may take for one query.

    Raises:
        ConfigurationError: There is no such driver, or it cannot do with the URL.
    """
    options: dict[str, Any] = {
        "pool_size": threads,
        "max_overflow": 0,
        "poolclass": sqlalchemy.QueuePool,
        # A fetch only reads: there is no transaction to begin and roll back around it.
        "isolation_level": "AUTOCOMMIT",
    }
    backend = url.get_backend_name()
    if is_sqlite_file(url):
        options["creator"] = lambda: open_sqlite(str(url.database), "ro")
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
    # A statement's deadline, which the database itself holds.
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
