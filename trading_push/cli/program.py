"""How this program is called from another shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Final

__all__ = ["program"]

_NAME: Final = "trading-push"


def program() -> str:
    """The words that a shell runs this program by, whatever directory it is in.

    That is the command's name where a shell finds this installation by it, else the whole path, or
    `python -m trading_push`.
    """
    started = Path(sys.argv[0]).absolute()
    installed = Path(sys.executable).with_name(_NAME)
    found = shutil.which(_NAME)
    for candidate in (started, installed):
        if candidate.name == _NAME and os.access(candidate, os.X_OK):
            is_found = found is not None and Path(found).samefile(candidate)
            return _NAME if is_found else shlex.quote(str(candidate))
    return f"{shlex.quote(sys.executable)} -m trading_push"
