"""The command `trading-push check`."""

from __future__ import annotations

from pathlib import Path

import click

from trading_push.cli.escaping import escaped
from trading_push.cli.exits import WRONG
from trading_push.cli.options import config_option

__all__ = ["check"]


@click.command()
@config_option
@click.option("--user", metavar="ID", help="Ask sources for this user, not for one made up.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 600),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="How long each check may take.",
)
def check(config: Path | None, user: str | None, timeout: float) -> None:
    """Check all that `serve` needs, without serving.

    Settings, keys, the address, descriptors, the log file, the market, and each query or request
    for accounts: a line each, with what to do. The exit status is 0 if nothing has failed.
    """
    # `check --help` does without the server.
    import trio

    from trading_push.check.findings import Finding
    from trading_push.check.settings import check_settings
    from trading_push.errors import ConfigurationError
    from trading_push.logs import set_language
    from trading_push.settings.loading import load_settings

    try:
        settings = load_settings(config=config, flags={})
    except ConfigurationError as error:
        findings = [Finding("failed", "settings", str(error))]
    else:
        set_language(settings.log.lang)
        findings = [Finding("ok", "settings", "they can be read, and go together")]
        findings += trio.run(check_settings, settings, user, timeout)
    for each in findings:
        text = escaped(" ".join(each.text.split()))
        click.echo(f"{each.state:8} {each.what:12} {text}")
    if any(each.state == "failed" for each in findings):
        raise SystemExit(WRONG)
