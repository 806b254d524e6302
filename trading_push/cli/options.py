"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["config_option"]

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Read settings from a TOML file (`trading-push init` writes one). The environment "
    "(TRADING_PUSH_...) goes before it, and a flag before both.",
)
