"""The commands `online`, `stats`, `kick` and `revoke`, which ask a running server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from trading_push.cli.escaping import escaped
from trading_push.cli.exits import REFUSED, UNREACHABLE, WRONG, fail

__all__ = ["kick", "online", "revoke", "stats"]

_PATIENCE_S: Final = 30.0

_Command = TypeVar("_Command", bound=Callable[..., None])


def _server(command: _Command) -> _Command:
    """Add what names the server, and who asks."""
    command = click.option(
        "--token",
        envvar="TRADING_PUSH_TOKEN",
        required=True,
        help="A token with the claim `admin` (`trading-push token --user ops --admin`); or "
        "TRADING_PUSH_TOKEN.",
    )(command)
    return click.argument("url", default="http://127.0.0.1:8000")(command)


@click.command()
@_server
def online(url: str, token: str) -> None:
    """Print who is connected to the server at URL, and by how many connections."""
    for user, count in sorted(_ask(url, token, "/online")["users"].items()):
        click.echo(f"{escaped(user)} {count}")


@click.command()
@_server
def stats(url: str, token: str) -> None:
    """Print the statistics of the server at URL, as JSON."""
    click.echo(json.dumps(_ask(url, token, "/stats"), indent=2, ensure_ascii=False))


@click.command()
@_server
@click.option("--user", metavar="ID", help="Close every connection of this user.")
@click.option("--connection", metavar="ID", help="Close this connection.")
@click.option("--all", "everybody", is_flag=True, help="Close all connections.")
@click.option("--reason", default="kicked", show_default=True, help="What the clients are told.")
def kick(
    url: str, token: str, user: str | None, connection: str | None, everybody: bool, reason: str
) -> None:
    """Close connections of the server at URL; their clients do not come back by themselves."""
    asked = {"user": user, "connection": connection, "all": everybody or None, "reason": reason}
    body = {name: value for name, value in asked.items() if value is not None}
    if len(body) != 2:
        raise click.UsageError("Give one of --user, --connection and --all.")
    click.echo(f"{_ask(url, token, '/kick', body)['closed']} closed")


@click.command()
@_server
@click.option("--token-id", required=True, metavar="JTI", help="The `jti` of the token.")
def revoke(url: str, token: str, token_id: str) -> None:
    """Refuse a token at the server at URL from now on, and close what was opened with it."""
    click.echo(f"{_ask(url, token, '/revoke', {'token_id': token_id})['closed']} closed")


def _ask(url: str, token: str, path: str, body: dict[str, Any] | None = None) -> Any:
    if not url.startswith(("http://", "https://")):
        raise click.UsageError(f"{url!r} is no URL of a server: give http://HOST:PORT.")
    request = urllib.request.Request(
        url.rstrip("/") + path,
        None if body is None else json.dumps(body).encode(),
        {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        fail(_why(error), REFUSED if error.code in (401, 403) else WRONG)
    except urllib.error.URLError as error:
        fail(f"{url} does not answer: {error.reason}", UNREACHABLE)
    except (OSError, ValueError) as error:
        fail(f"{url} does not answer as a trading_push server does: {error}", UNREACHABLE)


def _why(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {error.code} {error.reason}"
