"""A real MariaDB for the tests, in a directory of its own, that can be stopped and restarted."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.support import PATIENCE_S, free_port

READER, PASSWORD = "reader", "sekrit"


def _binary(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        pytest.skip(f"MariaDB is not installed ({name} is missing)")
    return found


class MariaDbServer:
    """A server 8 hours ahead of UTC, with an owner (by its socket) and `reader` (over TCP)."""

    def __init__(self, home: Path) -> None:
        pytest.importorskip("pymysql", reason="PyMySQL is not installed")
        self.port = free_port()
        self._home = home
        self._server = _binary("mariadbd")
        self._popen: subprocess.Popen[bytes] | None = None
        subprocess.run(
            [
                *(_binary("mariadb-install-db"), "--no-defaults", f"--datadir={home / 'data'}"),
                *("--auth-root-authentication-method=normal", "--skip-test-db", *_as_root()),
            ],
            check=True,
            capture_output=True,
        )

    def start(self) -> None:
        """Start it, and wait until it lets somebody in."""
        # Anew each time: a refused connect would leave one of PyMySQL's sockets open.
        with (self._home / "log").open("wb") as log:
            self._popen = subprocess.Popen(
                [
                    *(
                        self._server,
                        "--no-defaults",
                        f"--datadir={self._home / 'data'}",
                        *_as_root(),
                    ),
                    *(f"--socket={self._home / 'socket'}", f"--port={self.port}"),
                    *("--bind-address=127.0.0.1", "--default-time-zone=+08:00"),
                    *("--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=16M"),
                    f"--pid-file={self._home / 'pid'}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + PATIENCE_S
        while "ready for connections" not in (said := (self._home / "log").read_text()):
            assert self._popen.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.02)

    def stop(self) -> None:
        """End every session and the server, as if it had crashed."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait(PATIENCE_S)
            self._popen = None

    def create_database(self, name: str, *statements: str) -> None:
        """A database, the tables of which `reader` may read and write."""
        self.admin(f"CREATE DATABASE `{name}`")
        self.admin(f"GRANT ALL ON `{name}`.* TO '{READER}'@'%' IDENTIFIED BY '{PASSWORD}'")
        for statement in statements:
            self.admin(statement, name)

    def admin(self, sql: str, database: str | None = None) -> tuple[tuple[Any, ...], ...]:
        """Run a statement as the owner, on a connection of its own."""
        import pymysql

        connection = pymysql.connect(
            unix_socket=str(self._home / "socket"),
            user="root",
            database=database,
            autocommit=True,
            charset="utf8mb4",
        )
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall()

    def url(self, database: str) -> str:
        """As `reader`, over TCP."""
        return f"mysql+pymysql://{READER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"


def _as_root() -> list[str]:
    return ["--user=root"] if os.getuid() == 0 else []


@contextmanager
def running() -> Iterator[MariaDbServer]:
    """A server, gone with everything in it afterwards."""
    home = Path(tempfile.mkdtemp(prefix="mariadb-"))  # short, for the socket
    server = None
    try:
        server = MariaDbServer(home)
        server.start()
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(home)
