"""The command `trading-push token`."""

from __future__ import annotations

from pathlib import Path

import click

from trading_push.auth.demo import secret_of
from trading_push.auth.tokens import JwtAuthenticator, issue_token, required_claims
from trading_push.cli.options import config_option
from trading_push.errors import ConfigurationError
from trading_push.settings.loading import load_settings

__all__ = ["token"]

_LONGEST_S = 10 * 366 * 24 * 3600


@click.command()
@click.option("--user", required=True, metavar="ID", help="The user that it stands for.")
@click.option(
    "--ttl",
    type=click.IntRange(1, _LONGEST_S),
    default=3600,
    show_default=True,
    metavar="SECONDS",
    help="How long it is valid.",
)
@click.option("--publish", is_flag=True, help="Allow it to publish: POST /publish.")
@click.option("--admin", is_flag=True, help="Allow it to administer: kick, stats and the others.")
@click.option("--metrics", is_flag=True, help="Allow it to read GET /metrics.")
@config_option
def token(
    user: str, ttl: int, publish: bool, admin: bool, metrics: bool, config: Path | None
) -> None:
    """Print a token, signed with the configured secret, or with the demo's if there is none."""
    settings = load_settings(config=config, flags={})
    secret, _ = secret_of(settings)
    if secret is None:
        raise ConfigurationError(
            f"auth.algorithm is {settings.auth.algorithm}, and this server does not have the "
            "private key that makes tokens: ask whoever issues yours"
        )
    JwtAuthenticator(settings.auth, secret)  # make no token that the server would refuse
    allowed = {"publish": publish, "admin": admin, "metrics": metrics}
    claims = {**required_claims(settings.auth), **{name: True for name in allowed if allowed[name]}}
    click.echo(issue_token(secret, user, ttl, claims))
