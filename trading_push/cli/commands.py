"""The command `trading-push`: finds the module of a command, and makes one line of an error.

Whatever goes wrong is one line on standard error that says what to do, and exit status 2. `watch`
has statuses of its own for a refusal (3) and for a server that does not answer (4).
"""

from __future__ import annotations

import errno
import importlib
from typing import Any, Final, NoReturn

import click

from trading_push.cli.exits import WRONG, fail
from trading_push.errors import TradingPushError, innermost

__all__ = ["main"]

# The line of each command in the help; its module in this package has its name, or stands in
# `_MODULES`. A module is imported only when its command is called: `watch` and `token` must not
# load the server.
_COMMANDS: Final = {
    "check": "Check all that a server needs, without serving.",
    "init": "Write a sample configuration.",
    "kick": "Close connections of a running server.",
    "online": "Print who is connected to a running server.",
    "record": "Record an account and tickers, for `serve --tape`.",
    "revoke": "Refuse a token at a running server.",
    "serve": "Run the push server.",
    "stats": "Print the statistics of a running server.",
    "token": "Print a token.",
    "watch": "Show an account and tickers live.",
}
_MODULES: Final = dict.fromkeys(("kick", "online", "revoke", "stats"), "admin")


class _Main(click.Group):
    """A group that loads its commands when they are called, and whose errors are one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = _MODULES.get(cmd_name, cmd_name)
        command = getattr(importlib.import_module(f"trading_push.cli.{module}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name]) for name in self.list_commands(ctx)])

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs.update(standalone_mode=False, prog_name="trading-push")
        try:
            status = super().main(*args, **kwargs)

        # Errors of usage.
        except click.exceptions.UsageError as error:
            if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
                error.show()  # `trading-push` without anything: its message is the help
                raise SystemExit(WRONG) from None
            command = error.ctx.command_path if error.ctx else "trading-push"
            fail(f"{error.format_message()} See `{command} --help`.")
        except click.ClickException as error:
            fail(error.format_message())
        except click.Abort:
            raise SystemExit(130) from None

        # Errors that say what to do. Anything else is a bug, and shows its trace.
        except BaseExceptionGroup as group:
            only = innermost(group)
            if not isinstance(only, TradingPushError | OSError):
                raise
            fail(_explained(only))
        except (TradingPushError, OSError) as error:
            fail(_explained(error))
        raise SystemExit(status if isinstance(status, int) else 0)


def _explained(error: BaseException) -> str:
    """Say what to do about an error of the operating system; any other says it itself."""
    if not isinstance(error, OSError):
        return str(error)
    match error.errno:
        case errno.EADDRINUSE:
            return "the port is taken: stop what listens there, or give --port 0 for any free one"
        case errno.EADDRNOTAVAIL:
            return "this machine does not have the --host address: give one that it has"
        case errno.EACCES if error.filename is None:
            return "this user may not listen on the port: give a --port above 1023"
    import socket  # which not every command needs

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
      3  the server refused the token or a channel, or said not to come back
      4  no server answered
    """


if __name__ == "__main__":
    main()
