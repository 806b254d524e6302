"""The command line: serve, token, watch and init.

Whatever goes wrong is one line on standard error that says what to do, and exit status 2; `watch`
tells refused (3) and unreachable (4) apart from it.
"""

from __future__ import annotations

import errno
import importlib.resources
import ipaddress
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import trio

from trading_push.auth.demo import data_dir, demo_secret
from trading_push.auth.tokens import JwtAuthenticator, issue_token
from trading_push.client.ending import Refused, Unreachable
from trading_push.errors import (
    AuthenticationError,
    ConfigurationError,
    TradingPushError,
    innermost,
)
from trading_push.settings.loading import load_settings
from trading_push.settings.schema import Settings
from trading_push.topics import BUILTIN_CHANNELS, TICKER_PREFIX

__all__ = ["main"]

WRONG: Final = 2
REFUSED: Final = 3
UNREACHABLE: Final = 4

DEMO_USERS: Final = ("1", "2", "3", "4", "5")
DEMO_TTL_S: Final = 24 * 3600
SAMPLE: Final = "trading-push.toml"


def _fail(message: object, status: int = WRONG) -> NoReturn:
    """End with one line on standard error."""
    line = " ".join(str(message).split()) or "it failed"
    # A terminal takes orders in control characters, and a file name may hold any.
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    click.echo(f"trading-push: {line}", err=True)
    raise SystemExit(status)


class _Main(click.Group):
    """A group whose errors are one line."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs.update(standalone_mode=False, prog_name="trading-push")
        try:
            status = super().main(*args, **kwargs)
        except click.exceptions.UsageError as error:
            if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
                error.show()  # `trading-push` alone: its message is the help
                raise SystemExit(WRONG) from None
            command = error.ctx.command_path if error.ctx else "trading-push"
            _fail(f"{error.format_message()} See `{command} --help`.")
        except click.ClickException as error:
            _fail(error.format_message())
        except click.Abort:
            raise SystemExit(130) from None
        except BaseExceptionGroup as group:
            only = innermost(group)
            if not isinstance(only, TradingPushError | OSError):
                raise
            _fail(_explained(only))
        except (TradingPushError, OSError) as error:
            _fail(_explained(error))
        raise SystemExit(status if isinstance(status, int) else 0)


def _explained(error: BaseException) -> str:
    """What to do about an error of the operating system; any other says it itself."""
    if not isinstance(error, OSError):
        return str(error)
    match error.errno:
        case errno.EADDRINUSE:
            return "the port is taken: stop what listens there, or give --port 0 for any free one"
        case errno.EADDRNOTAVAIL:
            return "this machine does not have the --host address: give one that it has"
        case errno.EACCES if error.filename is None:
            return "this port is not for everyone: give a --port above 1023"
    if isinstance(error, socket.gaierror):
        return f"the --host is not known: {error.strerror}"
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


@click.group(cls=_Main)
@click.version_option(package_name="trading_push")
def main() -> None:
    """Push balance, positions, PnL, orders and tickers over WebSocket.

    \b
    Exit status:
      0  success
      2  wrong usage, configuration or environment; one line on standard error says what to do
      3  watch: the server refused the token or a channel, or said not to come back
      4  watch: no server answered
    """


_config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Read settings from a TOML file (`trading-push init` writes one). "
    "The environment, TRADING_PUSH_..., goes before it, and a flag before both.",
)


# The flags have neither types nor defaults here: the settings check values from everywhere.
@main.command(short_help="Run the push server.")
@_config_option
@click.option("--host", metavar="ADDRESS", help="Where to listen.  [127.0.0.1]")
@click.option("--port", metavar="PORT", help="0 takes any free one.  [8000]")
@click.option("--db", metavar="FILE", help="The paper exchange's SQLite file.")
@click.option("--tape", metavar="FILE", help="Play recorded exchange frames as the market.")
@click.option("--speed", metavar="X", help="How many times as fast as recorded.  [1.0]")
@click.option("--loop", is_flag=True, default=None, help="Start the tape again at its end.")
@click.option(
    "--interval",
    "intervals",
    multiple=True,
    metavar="TYPE=SECONDS",
    help="Between two polls, for example balance=2; may be given for each data type.",
)
@click.option("--lang", metavar="zh|en", help="The language of the log lines.  [zh]")
@click.option("--log-file", metavar="FILE", help="Write the log lines to a file as well.")
@click.option("--log-format", metavar="text|json", help="The form of the log lines.  [text]")
def serve(
    config: Path | None,
    host: str | None,
    port: str | None,
    db: str | None,
    tape: str | None,
    speed: str | None,
    loop: bool | None,
    intervals: Sequence[str],
    lang: str | None,
    log_file: str | None,
    log_format: str | None,
) -> None:
    """Run the push server, with a paper exchange where nothing else is configured.

    Log lines go to standard error. Ctrl-C and SIGTERM end it with exit status 0.
    """
    flags: dict[str, Any] = {
        "server.host": host,
        "server.port": port,
        "database.path": db,
        "market.tape": tape,
        "market.speed": speed,
        "market.loop": loop,
        "log.lang": lang,
        "log.file": log_file,
        "log.format": log_format,
    }
    for interval in intervals:
        data_type, equals, seconds = interval.partition("=")
        if not equals:
            raise ConfigurationError(
                f"--interval {interval!r} names no seconds: give TYPE=SECONDS, like balance=2"
            )
        flags[f"intervals.{data_type}"] = seconds
    settings = load_settings(config=config, flags=flags)
    secret, is_demo = _secret(settings)
    if is_demo and not _is_loopback(settings.server.host):
        raise ConfigurationError(
            f"--host {settings.server.host} would open the demo to others: set "
            "TRADING_PUSH_JWT_SECRET to a random text of 32 bytes or more first"
        )
    authenticate = JwtAuthenticator(settings.auth, secret)

    def on_ready(url_http: str, url_ws: str) -> None:
        lines = [
            f"Serving on {url_http} (WebSocket {url_ws})",
            f"Watch it from another shell: trading-push watch {url_ws} --token TOKEN",
        ]
        if secret is not None and is_demo:
            lines.append(f"Tokens of the demo's users, good for {DEMO_TTL_S // 3600} hours:")
            claims = _claims(settings)
            lines += [
                f"  user {user}: {issue_token(secret, user, DEMO_TTL_S, claims)}"
                for user in DEMO_USERS
            ]
        elif secret is not None:
            lines.append("`trading-push token --user ID` makes a TOKEN")
        _say(lines)

    from trading_push.server import run_server  # the other commands do without the whole server

    try:
        trio.run(lambda: run_server(settings, authenticate=authenticate, on_ready=on_ready))
    except KeyboardInterrupt:
        return  # before the server had its own ear for it


@main.command(short_help="Print a token.")
@click.option("--user", required=True, metavar="ID", help="Whose token it is.")
@click.option(
    "--ttl",
    type=click.IntRange(1, 10 * 366 * 24 * 3600),
    default=3600,
    show_default=True,
    metavar="SECONDS",
    help="For how long it is good.",
)
@click.option("--publish", is_flag=True, help="It may publish: POST /publish.")
@_config_option
def token(user: str, ttl: int, publish: bool, config: Path | None) -> None:
    """Print a token: that of the configured secret, else that of the demo's."""
    settings = load_settings(config=config, flags={})
    secret, _ = _secret(settings)
    if secret is None:
        raise ConfigurationError(
            f"auth.algorithm is {settings.auth.algorithm}, and only its private key, which this "
            "server does not have, makes tokens: ask whoever issues yours"
        )
    JwtAuthenticator(settings.auth, secret)  # what it would refuse, no token is made for
    claims = {**_claims(settings), **({"publish": True} if publish else {})}
    click.echo(issue_token(secret, user, ttl, claims))


@main.command(short_help="Show an account and tickers live.")
@click.argument("url", default="ws://127.0.0.1:8000/ws")
@click.option(
    "--token",
    "token_",
    envvar="TRADING_PUSH_TOKEN",
    metavar="TOKEN",
    help="Who to be; else the environment's TRADING_PUSH_TOKEN.",
)
@click.option(
    "--data",
    default=",".join(BUILTIN_CHANNELS),
    show_default=True,
    metavar="NAME,...",
    help="Which channels of the user's own.",
)
@click.option(
    "--ticker",
    default="BTCUSDT,ETHUSDT",
    show_default=True,
    metavar="SYMBOL,...",
    help="Whose tickers.",
)
@click.option(
    "--count", type=click.IntRange(1), metavar="N", help="End after so many pushes, with status 0."
)
def watch(url: str, token_: str | None, data: str, ticker: str, count: int | None) -> None:
    """Show an account and tickers live: tables on a terminal, else one JSON push a line.

    It reconnects by itself, with a back-off, once it has been connected. Ctrl-C ends it.

    \b
    Exit status:
      0  success, or ended by Ctrl-C or because nobody reads its output
      2  wrong usage
      3  the server refused the token or a channel, or said not to come back
      4  no server answered
    """
    if not token_ or not token_.isascii():
        raise ConfigurationError(
            "watch needs a token: give --token, or set TRADING_PUSH_TOKEN "
            "(`trading-push token --user 1` prints one)"
        )
    channels = [*_names(data), *(TICKER_PREFIX + symbol for symbol in _names(ticker))]
    if not channels:
        raise ConfigurationError("there is nothing to watch: give --data or --ticker")
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # standard output is closed
        return

    from trading_push.cli import watch as view  # rich is not needed for the other commands

    try:
        trio.run(lambda: view.watch(url, token_, channels, count=count, descriptor=descriptor))
    except (KeyboardInterrupt, BrokenPipeError):
        return
    except AuthenticationError as error:
        _fail(f"{error}: get a new one (`trading-push token --user ID`)", REFUSED)
    except Refused as error:
        _fail(error, REFUSED)
    except Unreachable as error:
        _fail(f"{error}; start it with `trading-push serve`, or give another URL", UNREACHABLE)


@main.command(short_help="Write a sample configuration.")
@click.argument("directory", metavar="[DIR]", default=Path(), type=click.Path(path_type=Path))
def init(directory: Path) -> None:
    """Write a sample configuration, all commented out; never over an existing file."""
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
    click.echo(f"{path} is written; use it with: trading-push serve --config {path}")


def _secret(settings: Settings) -> tuple[str | None, bool]:
    """The secret of HS256, and whether it is the demo's; None where a public key checks tokens."""
    if settings.auth.algorithm != "HS256":
        return None, False
    if settings.jwt_secret is not None:
        return settings.jwt_secret, False
    return demo_secret(data_dir()), True


def _claims(settings: Settings) -> dict[str, str]:
    """What else our own tokens have to say, to be accepted."""
    claims = {"aud": settings.auth.audience, "iss": settings.auth.issuer}
    return {name: value for name, value in claims.items() if value is not None}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _names(text: str) -> list[str]:
    """The names of a list with commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _say(lines: Iterable[str]) -> None:
    """Print lines at once; a reader that is gone must not end the server."""
    try:
        for line in lines:
            print(line, flush=True)  # noqa: T201
    except OSError:
        # What is left in the buffer is tried again at the exit, and must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
