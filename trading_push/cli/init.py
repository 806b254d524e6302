"""The command `trading-push init`."""

from __future__ import annotations

import importlib.resources
import shlex
from pathlib import Path
from typing import Final

import click

from trading_push.cli.program import program
from trading_push.errors import ConfigurationError

__all__ = ["init"]

SAMPLE: Final = "trading-push.toml"


@click.command()
@click.argument("directory", metavar="[DIR]", default=Path(), type=click.Path(path_type=Path))
def init(directory: Path) -> None:
    """Write a sample configuration, all commented out; it never replaces an existing file."""
    path = directory / SAMPLE
    sample = importlib.resources.files("trading_push").joinpath("data", SAMPLE).read_bytes()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigurationError(f"{str(directory)!r} is a file: give a directory") from None
    try:
        with path.open("xb") as file:
            file.write(sample)
    except FileExistsError:
        raise ConfigurationError(
            f"{str(path)!r} is there already: move it away, or give another directory"
        ) from None
    click.echo(
        f"{path} is written; use it with: {program()} serve --config {shlex.quote(str(path))}"
    )
