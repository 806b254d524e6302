"""The command `trading-push serve`."""

from __future__ import annotations

import os
import shlex
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from trading_push.cli.options import config_option
from trading_push.cli.program import program
from trading_push.errors import ConfigurationError
from trading_push.settings.definition import descriptions
from trading_push.settings.schema import Settings

__all__ = ["serve"]

DEMO_TTL_S: Final = 24 * 3600
"""How long the tokens of the demo are valid that are printed at the start."""

# The settings that have a flag of their own, and what the flag shows for a value; no such text
# makes a switch. The flags have neither types nor defaults: the settings check values from
# everywhere.
_FLAGS: Final = {
    "host": ("server.host", "ADDRESS"),
    "port": ("server.port", "PORT"),
    "db": ("database.path", "FILE"),
    "tape": ("market.tape", "FILE"),
    "speed": ("market.speed", "X"),
    "loop": ("market.loop", ""),
    "lang": ("log.lang", "zh|en|auto"),
    "log-file": ("log.file", "FILE"),
    "log-format": ("log.format", "text|json"),
}

_Command = TypeVar("_Command", bound=Callable[..., None])


def _setting_options(command: _Command) -> _Command:
    """Add the flags of settings to a command, each with the description of its setting."""
    described = {each.path: each for each in descriptions(Settings)}
    for flag, (path, metavar) in reversed(_FLAGS.items()):
        meaning, default = described[path].meaning, described[path].default
        if metavar:
            shown = meaning if default is None else f"{meaning}  [{default}]"
            option = click.option(f"--{flag}", metavar=metavar, help=shown)
        else:
            option = click.option(f"--{flag}", is_flag=True, default=None, help=meaning)
        command = option(command)
    return command


@click.command()
@config_option
@_setting_options
@click.option(
    "--interval",
    "intervals",
    multiple=True,
    metavar="TYPE=SECONDS",
    help="The time between two polls of a data type, as in balance=2; one for each type.",
)
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
def serve(config: Path | None, intervals: Sequence[str], opens: bool, **values: Any) -> None:
    """Run the push server, with a paper exchange if nothing else is configured.

    Log lines go to standard error. Ctrl-C and SIGTERM end it with exit status 0; SIGHUP loads
    the settings anew, or ends it where standard error is a terminal.
    """
    # `serve --help` does without the server, and without what it needs.
    import trio

    from trading_push.auth.demo import DemoTokens, has_key, secret_of
    from trading_push.auth.tokens import JwtAuthenticator, required_claims
    from trading_push.server import run_server
    from trading_push.settings.consistency import check_demo, has_paper_exchange
    from trading_push.settings.loading import load_settings

    flags = {path: values[flag.replace("-", "_")] for flag, (path, _) in _FLAGS.items()}
    flags.update(_intervals(intervals))
    settings = load_settings(config=config, flags=flags)
    secret, is_demo = secret_of(settings)
    if is_demo:
        check_demo(settings)
    demo = None
    if secret is not None and is_demo and has_paper_exchange(settings):
        demo = DemoTokens(secret, required_claims(settings.auth))
    authenticate = JwtAuthenticator(settings.auth, secret)

    def reload() -> tuple[Settings, JwtAuthenticator]:
        loaded = load_settings(config=config, flags=flags)
        if not is_demo and not has_key(loaded):
            raise ConfigurationError(
                "there is no secret any more, and the demo's is not used in its place: set "
                "auth.secret_file or jwt_secret"
            )
        return loaded, JwtAuthenticator(loaded.auth, secret_of(loaded)[0])

    def on_ready(url_http: str, url_ws: str) -> None:
        _say(_greeting(settings, config, url_http, url_ws, secret, is_demo))
        if opens:
            # It may take seconds, or not come back before the browser is closed.
            threading.Thread(target=webbrowser.open, args=(url_http,), daemon=True).start()

    try:
        trio.run(
            lambda: run_server(
                settings, authenticate=authenticate, on_ready=on_ready, demo=demo, reload=reload
            )
        )
    except KeyboardInterrupt:
        return  # it came before the server listened for signals


def _intervals(given: Sequence[str]) -> dict[str, str]:
    """The settings that the flags `--interval TYPE=SECONDS` stand for."""
    flags = {}
    for interval in given:
        data_type, equals, seconds = interval.partition("=")
        if not equals:
            raise ConfigurationError(
                f"--interval {interval!r} names no seconds: give TYPE=SECONDS, like balance=2"
            )
        flags[f"intervals.{data_type}"] = seconds
    return flags


def _greeting(
    settings: Settings,
    config: Path | None,
    url_http: str,
    url_ws: str,
    secret: str | None,
    is_demo: bool,
) -> list[str]:
    """What is printed when the server answers: where it is, and how to get a token."""
    from trading_push.auth.demo import DEMO_USERS
    from trading_push.auth.tokens import issue_token, required_claims

    called = program()
    watch = f"{called} watch {shlex.quote(url_ws)} --token"
    serving = f"Serving on {url_http} (WebSocket {url_ws})"
    if secret is None:
        return [serving, f"Watch it, with a token of whoever issues them: {watch} TOKEN"]
    if not is_demo:
        # Another shell has the environment that it has: the file, at least, can be named.
        file = "" if config is None else f" --config {shlex.quote(str(config.absolute()))}"
        token = f'"$({called} token --user 1{file})"'
        return [serving, f"Watch it from another shell with the same settings: {watch} {token}"]
    claims = required_claims(settings.auth)
    tokens = {user: issue_token(secret, user, DEMO_TTL_S, claims) for user in DEMO_USERS}
    return [
        serving,
        f"Watch it from another shell: {watch} {tokens[DEMO_USERS[0]]}",
        f"Tokens of the demo's users, valid for {DEMO_TTL_S // 3600} hours:",
        *(f"  user {user}: {token}" for user, token in tokens.items()),
    ]


def _say(lines: Iterable[str]) -> None:
    """Print lines at once; a reader that has gone must not end the server."""
    try:
        for line in lines:
            print(line, flush=True)  # noqa: T201
    except OSError:
        # The interpreter tries again at its exit to write what is left, and must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
