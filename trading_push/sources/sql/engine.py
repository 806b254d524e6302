"""The database: its URL, its pool of connections, and the read-only transaction of each read.

1. A connection may be shared with others: a pooler in transaction mode (PgBouncer) gives each
   transaction another session of the server. So nothing is left on it. There are no prepared
   statements, and PostgreSQL's deadline is set for one transaction only.
2. PostgreSQL, MySQL and MariaDB are read in read-only transactions, and SQLite is told to refuse
   writes. For any other database the account itself must be allowed to read only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

import msgspec
import sqlalchemy
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DisconnectionError, NoSuchModuleError, SQLAlchemyError

from trading_push.errors import ConfigurationError
from trading_push.sources.sqlite import open_sqlite

__all__ = ["MYSQL", "beginning", "is_sqlite_file", "open_engine", "parse", "transaction"]

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
_LIBPQ_DRIVERS = ("postgresql", "postgresql+psycopg", "postgresql+psycopg2")

MYSQL = ("mysql", "mariadb")
_MYSQL_DRIVERS = ("pymysql", "mysqldb")

_PREPARE = "prepare_threshold"

_STEPS = 1_000_000
"""SQLite looks at the clock after so many steps of its virtual machine, about 10 ms of them."""


def parse(url: str | URL) -> URL:
    """Parse the URL of a database, and add what its driver needs to give up in time.

    Raises:
        ConfigurationError: It cannot be read, or names no SQLite file.
    """
    try:
        parsed = make_url(url.strip("\ufeff \t\r\n") if isinstance(url, str) else url)
    except (ArgumentError, ValueError):
        # The text itself may hold a password.
        raise ConfigurationError(
            "the database's url cannot be read: give one like "
            "postgresql+psycopg://user:password@host/name or sqlite:////path/to/file"
        ) from None
    if parsed.drivername == "postgres":  # which libpq takes, and many a host gives
        parsed = parsed.set(drivername="postgresql+psycopg")
    if "@" in (parsed.host or ""):
        # What follows the first @ would be taken for the host, and shown in messages.
        raise ConfigurationError(
            "the database's url has an @ in its user or password: write it percent-encoded, as %40 "
            "(and %25 for a %, %3A for a :, %2F for a /)"
        )
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError(
            "the database's url names no file: give one like sqlite:////path/to/file"
        )
    if parsed.drivername in _LIBPQ_DRIVERS:
        # JSON is UTF-8. From a database in SQL_ASCII a driver would give bytes in place of texts.
        return parsed.set(query={**_LIBPQ, **parsed.query, "client_encoding": "utf8"})
    if parsed.get_backend_name() in MYSQL and _driver(parsed) in _MYSQL_DRIVERS:
        return parsed.set(query={"charset": "utf8mb4", **parsed.query})
    return parsed


def is_sqlite_file(url: URL) -> bool:
    """Whether it is a file for Python's own SQLite driver; a URL with options is left as it is."""
    return _is_python_sqlite(url) and not url.query


def _is_python_sqlite(url: URL) -> bool:
    return url.drivername in ("sqlite", "sqlite+pysqlite")


def _driver(url: URL) -> str:
    """Return the driver that is named, or that SQLAlchemy takes; empty if there is none."""
    try:
        return url.get_driver_name()
    except (NoSuchModuleError, ImportError):
        return ""


def open_engine(url: URL, threads: int, statement_timeout_s: float) -> Engine:
    """Make the pool of connections; it connects when it is first used.

    Args:
        url: The database.
        threads: How many connections there are at most.
        statement_timeout_s: How long SQLite, MySQL and MariaDB may take for one query.

    Raises:
        ConfigurationError: There is no such driver, or it cannot do with the URL.
    """
    options: dict[str, Any] = {
        "pool_size": threads,
        "max_overflow": 0,
        "poolclass": sqlalchemy.QueuePool,
        # The driver begins no transaction: `transaction` does.
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
    if backend == "postgresql" and _driver(url) == "psycopg":
        options["connect_args"] = {_PREPARE: _prepare_threshold(url)}
        url = url.difference_update_query((_PREPARE,))
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
        _leave_a_replaced_file(engine, str(url.database))
    if _is_python_sqlite(url):
        event.listen(engine, "connect", _on_connect("PRAGMA query_only = ON"))
        event.listen(engine, "before_cursor_execute", _sqlite_deadline(statement_timeout_s))
    elif backend in MYSQL:
        event.listen(engine, "connect", _on_connect(_mysql_session(statement_timeout_s)))
    return engine


def _prepare_threshold(url: URL) -> int | None:
    """Read after how many uses psycopg prepares a statement; by default never (rule 1)."""
    given = url.query.get(_PREPARE, "none")
    if isinstance(given, str) and given.lower() == "none":
        return None
    if isinstance(given, str) and given.isascii() and given.isdigit():
        return int(given)
    raise ConfigurationError(
        f"{_PREPARE} in the database's url is not usable: give a whole number, or none"
    )


def _advice(backend: str) -> str:
    if backend == "postgresql":
        return "pip install 'trading_push[postgres]', and begin the url with postgresql+psycopg://"
    if backend in MYSQL:
        return "pip install pymysql, and begin the url with mysql+pymysql://"
    return "install it, or name another (as in postgresql+psycopg://)"


def _on_connect(statement: str) -> Callable[..., None]:
    def on_connect(connection: Any, _record: object) -> None:
        with closing(connection.cursor()) as cursor:
            cursor.execute(statement)

    return on_connect


def _leave_a_replaced_file(engine: Engine, path: str) -> None:
    """Open a file again that was replaced by another: a connection would go on with the old one."""

    def look() -> tuple[int, int] | None:
        try:
            state = os.stat(path)
        except OSError:
            return None
        return state.st_dev, state.st_ino

    def on_connect(_connection: object, record: Any) -> None:
        record.info["file"] = look()

    def on_checkout(_connection: object, record: Any, _proxy: object) -> None:
        if record.info["file"] != look():
            raise DisconnectionError  # the pool opens another one

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "checkout", on_checkout)


def _mysql_session(statement_timeout_s: float) -> str:
    """Return what is set on a session of MySQL or MariaDB, which is ours alone."""
    # A TIMESTAMP is given in the session's time zone. Of the two deadlines each server takes its
    # own: what stands in `/*!50708` is a comment to MariaDB, and what stands in `/*M!` to MySQL.
    return (
        "SET time_zone = '+00:00'"
        f" /*!50708 , max_execution_time = {max(1, round(statement_timeout_s * 1000))} */"
        f" /*M!100101 , max_statement_time = {statement_timeout_s:f} */"
    )


def _sqlite_deadline(seconds: float) -> Callable[..., None]:
    def before_execute(connection: Connection, *_: object) -> None:
        end = time.monotonic() + seconds
        driver: Any = connection.connection.driver_connection
        driver.set_progress_handler(lambda: time.monotonic() > end, _STEPS)

    return before_execute


def beginning(url: URL, statement_timeout_s: float) -> Sequence[str]:
    """Return the commands that begin a read-only transaction; none where a database has no such.

    Args:
        url: The database.
        statement_timeout_s: How long PostgreSQL may take for one query of the transaction.
    """
    backend = url.get_backend_name()
    if backend == "postgresql":
        begin = "BEGIN READ ONLY"
        deadline = f"SET LOCAL statement_timeout = {round(statement_timeout_s * 1000)}"
        # libpq sends both at once, if it need not prepare them.
        at_once = url.drivername in _LIBPQ_DRIVERS and _PREPARE not in url.query
        return (f"{begin}; {deadline}",) if at_once else (begin, deadline)
    if backend in MYSQL:
        return ("START TRANSACTION READ ONLY",)
    return ()


@contextmanager
def transaction(connection: Connection, begin: Sequence[str]) -> Iterator[None]:
    """Keep a transaction open, if there are commands to begin one.

    Raises:
        SQLAlchemyError: It cannot be begun or ended.
    """
    for command in begin:
        _run(connection, command)
    try:
        yield
    except BaseException:
        if begin and not connection.invalidated:
            with suppress(Exception):  # a connection that is lost is known to be, from then on
                _run(connection, "ROLLBACK")
        raise
    if begin:
        _run(connection, "COMMIT")


def _run(connection: Connection, command: str) -> None:
    # With parameters, even with none, a driver could send one command only.
    connection.exec_driver_sql(command, execution_options={"no_parameters": True})
