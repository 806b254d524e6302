"""The command `trading-push record`."""

from __future__ import annotations

import math
from pathlib import Path

import click
import trio

from trading_push.cli.display import follow
from trading_push.cli.exits import REFUSED, UNREACHABLE, fail
from trading_push.cli.program import program
from trading_push.cli.recording import Recording
from trading_push.client.client import Client
from trading_push.client.ending import Refused, Unreachable
from trading_push.errors import AuthenticationError, ConfigurationError
from trading_push.topics import TICKER_PREFIX

__all__ = ["record"]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
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
    help="Channels of the user's own; by default all that the server offers.",
)
@click.option(
    "--ticker",
    default="BTCUSDT,ETHUSDT",
    show_default=True,
    metavar="SYMBOL,...",
    help="Symbols whose tickers to record.",
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N pushes.")
@click.option(
    "--for",
    "for_s",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="End after so long.",
)
@click.option(
    "--rotate-bytes",
    type=click.IntRange(1),
    metavar="N",
    help="Go on in another file (FILE with a number) when one has N bytes.",
)
def record(
    file: Path,
    url: str,
    token_: str | None,
    data: str | None,
    ticker: str,
    count: int | None,
    for_s: float | None,
    rotate_bytes: int | None,
) -> None:
    """Record an account and tickers in FILE, one push a line, for `serve --tape FILE`.

    FILE is written anew, readable by you only; gzip if its name ends in .gz. What has come is in
    the file within a second. Ctrl-C ends it.

    \b
    Exit status:
      0  success, or ended by Ctrl-C
      2  wrong usage, or the file cannot be written
      3  the server refused the token or a channel, or said not to come back
      4  no server answered
    """
    if not token_ or not token_.isascii():
        raise ConfigurationError(
            "record needs a token: give --token, or set TRADING_PUSH_TOKEN "
            f"(`{program()} token --user 1` prints one)"
        )
    channels = [*_names(data or ""), *(TICKER_PREFIX + symbol for symbol in _names(ticker))]
    if data is not None and not channels:
        raise ConfigurationError("there is nothing to record: give --data or --ticker")

    recording = Recording(file, math.inf if rotate_bytes is None else rotate_bytes)
    seconds = math.inf if for_s is None else for_s

    async def use(client: Client) -> None:
        with trio.move_on_after(seconds):
            await recording.write_all(client, count)

    try:
        trio.run(follow, url, token_, channels, data is None, use)
    except KeyboardInterrupt:
        pass
    except AuthenticationError as error:
        fail(f"{error}: get a new one (`{program()} token --user ID`)", REFUSED)
    except Refused as error:
        fail(error, REFUSED)
    except Unreachable as error:
        fail(f"{error}; start it with `{program()} serve`, or give another URL", UNREACHABLE)
    finally:
        recording.close()
    files = " ".join(map(str, recording.files))
    click.echo(f"recorded {recording.count} pushes in {files}", err=True)


def _names(text: str) -> list[str]:
    """The names in a list that is separated by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
