"""Check what this machine has: keys, an address, descriptors, a place for the log."""

from __future__ import annotations

import errno
import json
import os
import urllib.request
from functools import partial
from typing import Final

import trio

from trading_push.auth.demo import DEMO_FILE, data_dir, demo_secret, has_key, secret_of
from trading_push.auth.jwks import Jwks
from trading_push.auth.tokens import JwtAuthenticator
from trading_push.check.findings import Finding
from trading_push.errors import AuthenticationError, ConfigurationError, SourceError
from trading_push.server import listen
from trading_push.settings.consistency import check_demo
from trading_push.settings.schema import Settings
from trading_push.transport.descriptors import fitting_connections

__all__ = ["address", "descriptors", "log_file", "tokens"]

_NEIGHBOUR_S: Final = 2.0


async def tokens(settings: Settings) -> list[Finding]:
    """Whether tokens can be checked; the demo's secret is not made."""
    algorithm, url = settings.auth.algorithm, settings.auth.jwks_url
    if not has_key(settings):
        check_demo(settings)
        if (data_dir() / DEMO_FILE).exists():  # else `serve` makes it
            demo_secret(data_dir())
        text = "the demo's secret, for this machine only: set auth.secret_file for any other use"
        return [Finding("ok", "tokens", text)]
    JwtAuthenticator(settings.auth, secret_of(settings)[0])
    if url is None or algorithm == "HS256":
        return [Finding("ok", "tokens", f"{algorithm}, with the key that is set")]
    try:
        await Jwks(url).get("a key that no set has")
    except AuthenticationError:
        pass  # it has been looked for
    except SourceError as error:
        return [Finding("failed", "tokens", f"{error}: correct it, or start what serves it")]
    return [Finding("ok", "tokens", f"{algorithm}, with the keys of auth.jwks_url")]


async def address(settings: Settings) -> list[Finding]:
    """Whether the address can be listened on, unless a server does so already."""
    host, port = settings.server.host, settings.server.port
    try:
        listen(host, port).close()
        return [Finding("ok", "address", f"{host} port {port} is free")]
    except ConfigurationError as error:
        refused, why = error, error.__context__
    if isinstance(why, OSError) and why.errno == errno.EADDRINUSE:
        is_ours = partial(_is_a_server, host, port)
        if await trio.to_thread.run_sync(is_ours, abandon_on_cancel=True):
            return [Finding("warning", "address", f"a server is running at {host} port {port}")]
    raise refused


def _is_a_server(host: str, port: int) -> bool:
    at = f"[{host}]" if ":" in host else host
    try:
        with urllib.request.urlopen(f"http://{at}:{port}/healthz", timeout=_NEIGHBOUR_S) as answer:
            return bool(json.load(answer) == {"status": "ok"})
    except (OSError, ValueError):
        return False


def descriptors(settings: Settings) -> list[Finding]:
    """Whether the process may have as many descriptors as connections."""
    wanted = settings.limits.connections
    fitting = fitting_connections(wanted)
    if fitting == wanted:
        return [Finding("ok", "descriptors", f"enough for {wanted} connections")]
    text = (
        f"enough for {fitting} connections, and limits.connections is {wanted}: raise the limit "
        "(ulimit -Hn, LimitNOFILE= of systemd), or lower the setting"
    )
    return [Finding("warning", "descriptors", text)]


def log_file(settings: Settings) -> list[Finding]:
    """Whether the log's file can be written, or made."""
    file = settings.log.file
    if file is None:
        return []
    if file.exists():
        os.close(os.open(file, os.O_WRONLY | os.O_APPEND))
    elif not os.access(file.parent, os.W_OK | os.X_OK):
        text = f"{file} cannot be made: make its directory, or let this user write there"
        return [Finding("failed", "log file", text)]
    return [Finding("ok", "log file", str(file))]
