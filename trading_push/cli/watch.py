"""The command `trading-push watch`."""

from __future__ import annotations

import sys

import click
import trio

from trading_push.cli.display import show
from trading_push.cli.exits import REFUSED, UNREACHABLE, fail
from trading_push.cli.program import program
from trading_push.client.ending import Refused, Unreachable
from trading_push.errors import AuthenticationError, ConfigurationError
from trading_push.topics import TICKER_PREFIX

__all__ = ["watch"]


@click.command()
@click.argument("url", default="ws://127.0.0.1:8000/ws")
@click.option(
    "--token",
    "token_",
    envvar="TRADING_PUSH_TOKEN",
    metavar="TOKEN",
    help="The token; by default that of the environment, TRADING_PUSH_TOKEN.",
)
@click.option(
    "--data",
    metavar="NAME,...",
    help="Channels to show; by default all that the server offers.",
)
@click.option(
    "--ticker",
    default="BTCUSDT,ETHUSDT",
    show_default=True,
    metavar="SYMBOL,...",
    help="Symbols whose tickers to show.",
)
@click.option(
    "--count", type=click.IntRange(1), metavar="N", help="End after N pushes, with status 0."
)
def watch(url: str, token_: str | None, data: str | None, ticker: str, count: int | None) -> None:
    """Show an account and tickers live: tables on a terminal, else one JSON push a line.

    Once it has been connected, it reconnects by itself, with a back-off. On a terminal j, k, the
    arrows, PgUp, PgDn, Home and End move what does not fit; q or Ctrl-C ends it.

    \b
    Exit status:
      0  success, or ended by q, Ctrl-C or a reader that has gone
      2  wrong usage
      3  the server refused the token or a channel, or said not to come back
      4  no server answered
    """
    if not token_ or not token_.isascii():
        raise ConfigurationError(
            "watch needs a token: give --token, or set TRADING_PUSH_TOKEN "
            f"(`{program()} token --user 1` prints one)"
        )
    channels = [*_names(data or ""), *(TICKER_PREFIX + symbol for symbol in _names(ticker))]
    if data is not None and not channels:
        raise ConfigurationError("there is nothing to watch: give --data or --ticker")
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # standard output is closed
        return

    try:
        trio.run(
            lambda: show(
                url, token_, channels, offered=data is None, count=count, descriptor=descriptor
            )
        )
    except (KeyboardInterrupt, BrokenPipeError):
        return
    except AuthenticationError as error:
        fail(f"{error}: get a new one (`{program()} token --user ID`)", REFUSED)
    except Refused as error:
        fail(error, REFUSED)
    except Unreachable as error:
        fail(f"{error}; start it with `{program()} serve`, or give another URL", UNREACHABLE)


def _names(text: str) -> list[str]:
    """The names in a list that is separated by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
