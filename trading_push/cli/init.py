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
SAMPLES: Final = (SAMPLE, "trading-push.service", "nginx.conf", "Caddyfile")


@click.command()
@click.argument("directory", metavar="[DIR]", default=Path(), type=click.Path(path_type=Path))
def init(directory: Path) -> None:
    """Write samples: a configuration, all commented out, a systemd unit, nginx and Caddy.

    It never replaces an existing file.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigurationError(f"{str(directory)!r} is a file: give a directory") from None
    paths = [directory / name for name in SAMPLES]
    for path in paths:
        if path.exists():  # before any is written
            raise _is_there(path)
    for path in paths:
        sample = importlib.resources.files("trading_push").joinpath("data", path.name)
        try:
            with path.open("xb") as file:
                file.write(sample.read_bytes())
        except FileExistsError:
            raise _is_there(path) from None
    command = f"{program()} serve --config {shlex.quote(str(paths[0]))}"
    click.echo(f"{paths[0]} is written; use it with: {command}")
    click.echo(f"Beside it are samples to run it in production: {', '.join(SAMPLES[1:])}")


def _is_there(path: Path) -> ConfigurationError:
    return ConfigurationError(
        f"{str(path)!r} is there already: move it away, or give another directory"
    )
