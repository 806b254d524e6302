"""Take changed settings over while the service runs, without touching a connection.

What was read from the settings once, at the start, needs a restart; what connections look up each
time does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import attrs

from trading_push import logs
from trading_push.auth.check import check_origins
from trading_push.auth.principal import Authenticate
from trading_push.endpoints.hypercorn.server import guard
from trading_push.service import PushService
from trading_push.settings.schema import Auth, Limits, Settings
from trading_push.transport.descriptors import fitting_connections

__all__ = ["reload_settings"]

_LIMITS: Final = (
    "connections",
    "unauthenticated_per_address",
    "connections_per_user",
    "over_user_limit",
    "subscriptions",
    "anonymous_subscriptions",
    "messages_per_s",
    "messages_burst",
    "bad_messages",
)
_RELOADED: Final = frozenset(
    {
        "jwt_secret",
        "server.origins",
        "server.trusted_proxies",
        "log.level",
        "log.quiet",
        *(f"auth.{field.name}" for field in attrs.fields(Auth)),
        *(f"limits.{name}" for name in _LIMITS),
    }
)


def reload_settings(
    service: PushService, old: Settings, new: Settings, authenticate: Authenticate
) -> Settings:
    """Take over what can be of new settings; all of it, or nothing.

    Connections stay as they are until their end. One line says that it is done, and another names
    what has changed and needs a restart.

    Args:
        service: The running service.
        old: The settings that it has.
        new: Those that it is to have.
        authenticate: The check of tokens that the new settings ask for.

    Returns:
        The settings that it has now.

    Raises:
        ConfigurationError: They do not fit; nothing is changed.
    """
    check_origins(authenticate, new.server)
    changed = {path for path, before, after in _pairs(old, new) if before != after}
    counts = {name: getattr(new.limits, name) for name in _LIMITS}
    sockets = guard.sockets.taken
    if counts["connections"] != old.limits.connections:
        wanted = max(0, counts["connections"] - sockets)
        counts["connections"] = sockets + fitting_connections(wanted)
    limits: Limits = attrs.evolve(service.limits, **counts)
    server = attrs.evolve(
        old.server, origins=new.server.origins, trusted_proxies=new.server.trusted_proxies
    )
    log = attrs.evolve(old.log, level=new.log.level, quiet=new.log.quiet)
    kept = attrs.evolve(
        old,
        jwt_secret=new.jwt_secret,
        auth=new.auth,
        server=server,
        log=log,
        limits=attrs.evolve(old.limits, **{name: getattr(new.limits, name) for name in _LIMITS}),
    )
    # From here on nothing fails.
    service.context.take_over(attrs.evolve(kept, limits=limits), authenticate)
    guard.limits = limits
    logs.set_level(log.level)
    logs.set_quiet(log.quiet.split())
    logs.emit(logs.line("settings_reloaded"))
    if fixed := sorted(changed - _RELOADED):
        logs.emit(logs.line("settings_need_restart", settings=", ".join(fixed)))
    return kept


def _pairs(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Give each setting's path with its two values."""
    for field in attrs.fields(type(old)):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if attrs.has(type(before)):
            yield from _pairs(before, after, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", before, after
