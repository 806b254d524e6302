"""Open an SQLite file that is there, for reading or for writing."""

from __future__ import annotations

import sqlite3
import urllib.parse
from pathlib import Path
from typing import Literal

__all__ = ["BUSY_TIMEOUT_S", "is_in_wal_mode", "open_sqlite"]

BUSY_TIMEOUT_S = 5.0
"""How long a statement waits for another process that writes."""


def open_sqlite(path: Path | str, mode: Literal["ro", "rw"]) -> sqlite3.Connection:
    """Open a file without transactions of the driver's own; never make one.

    The connection may pass from thread to thread, but must not be used by two at the same time.
    """
    return sqlite3.connect(
        f"file:{urllib.parse.quote(str(path))}?mode={mode}",
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        check_same_thread=False,
        isolation_level=None,
    )


def is_in_wal_mode(path: Path | str) -> bool:
    """Whether a file is in WAL mode, as its header says (section 1.3.3 of SQLite's file format)."""
    try:
        with open(path, "rb") as file:
            return file.read(20)[18:] == b"\2\2"
    except OSError:
        return False
