"""A real PostgreSQL for the tests, in a directory of its own, that can be stopped and restarted."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from harness.support import PATIENCE_S, free_port

READER, PASSWORD = "reader", "sekrit"
# The owner comes in by the socket, everybody else over TCP with a password.
_HBA = """
local all postgres trust
host all all 127.0.0.1/32 scram-sha-256
"""
_FASTER = ("fsync=off", "full_page_writes=off", "autovacuum=off")


def _binaries() -> Path:
    # Debian keeps them out of the PATH, by version.
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda at: float(at.parent.name))
    if found := shutil.which("initdb"):
        places.append(Path(found).resolve().parent)
    if not places:
        pytest.skip("PostgreSQL is not installed")
    return places[-1]


def _unprivileged() -> dict[str, Any]:
    """Arguments of subprocess: PostgreSQL does not run as root."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("there is no unprivileged user to run PostgreSQL as")


class PostgresServer:
    """A cluster with a superuser `postgres` (by its socket) and a role `reader` (over TCP)."""

    def __init__(self, home: Path) -> None:
        self.port = free_port()
        self._home = home
        self._binaries = _binaries()
        self._as = _unprivileged()
        self._popen: subprocess.Popen[bytes] | None = None
        if self._as:
            os.chown(home, self._as["user"], self._as["group"])
        initdb = [self._binaries / "initdb", "-D", home / "data", "-U", "postgres", "-A", "trust"]
        subprocess.run(
            [*initdb, "-E", "UTF8", "--locale=C", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=home,
            **self._as,
        )
        (home / "data" / "pg_hba.conf").write_text(_HBA)

    def start(self) -> None:
        """Start it, and wait until it lets somebody in."""
        settings = [f"port={self.port}", f"unix_socket_directories={self._home}", *_FASTER]
        with (self._home / "log").open("ab") as log:
            self._popen = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._home / "data"]
                + [part for setting in settings for part in ("-c", setting)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._home,
                **self._as,
            )
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.admin("SELECT 1")
                return
            except psycopg.OperationalError:
                said = (self._home / "log").read_text()
                assert self._popen.poll() is None, said
                assert time.monotonic() < deadline, said
            time.sleep(0.02)

    def stop(self, *, immediately: bool = False) -> None:
        """End every session and the server: in order, or as if it had crashed."""
        if self._popen is not None:
            self._popen.send_signal(signal.SIGQUIT if immediately else signal.SIGINT)
            self._popen.wait(PATIENCE_S)
            self._popen = None

    def restart(self, *, immediately: bool = False) -> None:
        self.stop(immediately=immediately)
        self.start()

    def create_database(self, name: str, sql: str = "") -> None:
        """A database, the tables of which `reader` may read."""
        self.admin(f'CREATE DATABASE "{name}"')
        self.admin(f"ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO {READER}; {sql}", name)

    def sessions(self, database: str) -> list[str]:
        """The last statement of each session of `reader` there."""
        return [
            query
            for (query,) in self.admin(
                f"SELECT query FROM pg_stat_activity WHERE usename = '{READER}' "
                f"AND datname = '{database}'"
            )
        ]

    def admin(self, sql: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run SQL as the superuser, on a connection of its own; the rows of the last statement."""
        with psycopg.connect(
            host=str(self._home), port=self.port, user="postgres", dbname=database, autocommit=True
        ) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def psql(self, sql: str, database: str) -> list[str]:
        """The command by which another program runs SQL as the superuser."""
        return [
            *(str(self._binaries / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1"),
            *("-h", str(self._home), "-p", str(self.port), "-U", "postgres"),
            *("-d", database, "-c", sql),
        ]

    def url(self, database: str, *, password: str = PASSWORD) -> str:
        """As `reader`, over TCP."""
        return f"postgresql+psycopg://{READER}:{password}@127.0.0.1:{self.port}/{database}"


@contextmanager
def running() -> Iterator[PostgresServer]:
    """A server with the role `reader`, gone with everything in it afterwards."""
    # Not below pytest's own directory, which nobody else may enter; and short, for the socket.
    home = Path(tempfile.mkdtemp(prefix="pg-"))
    server = None
    try:
        server = PostgresServer(home)
        server.start()
        server.admin(f"CREATE ROLE {READER} LOGIN PASSWORD '{PASSWORD}'")
        yield server
    finally:
        if server is not None:
            server.stop(immediately=True)
        shutil.rmtree(home)
