"""How a command ends that cannot do what it was asked for."""

from __future__ import annotations

from typing import Final, NoReturn

import click

__all__ = ["REFUSED", "UNREACHABLE", "WRONG", "fail"]

WRONG: Final = 2
"""The usage, the configuration or the environment is wrong."""
REFUSED: Final = 3
"""`watch`: the server refused the token or a channel, or said not to come back."""
UNREACHABLE: Final = 4
"""`watch`: no server answered."""


def fail(message: object, status: int = WRONG) -> NoReturn:
    """Print one line on standard error and exit."""
    line = " ".join(str(message).split()) or "it failed"
    # Control characters are commands to a terminal, and a file name may hold any of them.
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    click.echo(f"trading-push: {line}", err=True)
    raise SystemExit(status)
