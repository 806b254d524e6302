"""A real PgBouncer before a PostgreSQL, in transaction mode, with few sessions for many clients."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from harness.postgres_server import PASSWORD, READER, PostgresServer
from harness.support import PATIENCE_S, free_port

_SETTINGS = """
[databases]
* = host=127.0.0.1 port={postgres}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = plain
auth_file = {home}/users
pool_mode = {mode}
default_pool_size = {sessions}
max_client_conn = 200
query_wait_timeout = 3
server_login_retry = 0.1
"""


class PgBouncer:
    """A pooler; `url` is that of a database through it, as `reader`."""

    def __init__(self, home: Path, server: PostgresServer, mode: str, sessions: int) -> None:
        self.port = free_port()
        binary = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        if binary is None:
            pytest.skip("PgBouncer is not installed")
        settings = home / "pgbouncer.ini"
        settings.write_text(
            _SETTINGS.format(
                postgres=server.port, port=self.port, home=home, mode=mode, sessions=sessions
            )
        )
        (home / "users").write_text(f'"{READER}" "{PASSWORD}"\n')
        self._log = home / "log"
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [binary, settings], stdin=subprocess.DEVNULL, stdout=log, stderr=log, **_as(home)
            )

    def wait(self) -> None:
        """Wait until it lets somebody in."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                psycopg.connect(self.url("postgres").replace("+psycopg", "")).close()
                return
            except psycopg.OperationalError:
                said = self._log.read_text()
                assert self._popen.poll() is None, said
                assert time.monotonic() < deadline, said
            time.sleep(0.02)

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait(PATIENCE_S)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://{READER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"


def _as(home: Path) -> dict[str, Any]:
    """Arguments of subprocess: PgBouncer does not run as root."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            home.chmod(0o755)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("there is no unprivileged user to run PgBouncer as")


@contextmanager
def pooling(
    server: PostgresServer, *, mode: str = "transaction", sessions: int = 2
) -> Iterator[PgBouncer]:
    """A pooler before a server, gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
    pooler = None
    try:
        pooler = PgBouncer(home, server, mode, sessions)
        pooler.wait()
        yield pooler
    finally:
        if pooler is not None:
            pooler.close()
        shutil.rmtree(home)
