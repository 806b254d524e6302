"""Read a file that holds a secret, which no one but its owner may use."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from trading_push.errors import ConfigurationError

__all__ = ["read_secret_file"]

_BYTES: Final = 16 * 1024 * 1024
_BOM: Final = b"\xef\xbb\xbf"


def read_secret_file(path: Path, setting: str) -> bytes:
    """Return what is in a file, less a byte order mark.

    Args:
        path: The file.
        setting: The name of the setting that names it, for the error.

    Raises:
        ConfigurationError: It cannot be read, is no file or too long, or can be used by others than
            its owner. Nothing that stands in it is in the text.
    """
    where = f"{setting} {str(path)!r}"
    try:
        # Opening a pipe without a writer would wait.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise ConfigurationError(f"{where} is no file: name one")
            if stat.S_IMODE(state.st_mode) & 0o077:
                raise ConfigurationError(
                    f"{where} can be used by others than its owner: chmod 600 {path}"
                )
            data = file.read(_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{where} cannot be read: {error.strerror}") from None
    if len(data) > _BYTES:
        raise ConfigurationError(f"{where} is longer than {_BYTES} bytes: name another file")
    return data.removeprefix(_BOM)
