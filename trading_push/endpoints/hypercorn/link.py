"""The link to Hypercorn's trio worker: puts our classes where Hypercorn looks its own up.

- TCPServer: a firewall round each connection (`server`).
- WSStream: close codes, no compression, bounded messages (`websocket`).
- SocketListener: a connection for which there is no descriptor is answered all the same. Trio's
  class is final, so Hypercorn's worker is given a stand-in for the module.
- WorkerContext: the application can end the worker, and say good-bye before Hypercorn cuts.

Only this package knows Hypercorn's inside; what it leans on is checked when it is installed.
"""

from __future__ import annotations

import inspect
import logging
import os
from types import ModuleType
from typing import Any, Final

import hypercorn
import hypercorn.config
import hypercorn.logging
import hypercorn.protocol.h2
import hypercorn.protocol.h11
import hypercorn.protocol.ws_stream
import hypercorn.trio.run
import hypercorn.typing
import trio
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h2 import StreamBuffer
from hypercorn.protocol.ws_stream import WebsocketBuffer, WSStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import EventWrapper, TrioSingleTask, WorkerContext
from wsproto.events import TextMessage

from trading_push import logs
from trading_push.endpoints.hypercorn.server import GuardedTCPServer, GuardedWorkerContext, guard
from trading_push.endpoints.hypercorn.websocket import GuardedWSStream
from trading_push.errors import LinkError
from trading_push.settings.schema import Limits
from trading_push.transport.descriptors import SparingListener

__all__ = ["check", "guard_hypercorn", "install"]

UNGUARDED: Final = "TRADING_PUSH_UNGUARDED"

# What the link leans on: (class, method, its parameters).
_EXPECTED: Final[tuple[tuple[type, str, str], ...]] = (
    (TCPServer, "__init__", "self app config context state stream"),
    (TCPServer, "__await__", "self"),
    (TCPServer, "run", "self"),
    (TCPServer, "protocol_send", "self event"),
    (TCPServer, "_read_data", "self"),
    (TCPServer, "_idle_timeout", "self"),
    (TCPServer, "_close", "self"),
    (TrioSingleTask, "restart", "self task_group action"),
    (TrioSingleTask, "stop", "self"),
    (EventWrapper, "set", "self"),
    (
        ProtocolWrapper,
        "__init__",
        "self app config context task_group state ssl client server send alpn_protocol",
    ),
    (
        WSStream,
        "__init__",
        "self app config context task_group ssl client server send stream_id",
    ),
    (WSStream, "handle", "self event"),
    (WSStream, "app_send", "self message"),
    (WSStream, "_accept", "self message"),
    (WSStream, "_handle_events", "self"),
    (WSStream, "_send_wsproto_event", "self event"),
    (TaskGroup, "spawn_app", "self app config scope send"),
    (WebsocketBuffer, "__init__", "self max_length"),
    (WebsocketBuffer, "extend", "self event"),
    (WorkerContext, "__init__", "self max_requests"),
    (StreamBuffer, "drain", "self"),
    (TextMessage, "__init__", "self data frame_finished message_finished"),
)


class _Trio(ModuleType):
    """Trio, with our listener in place of its own."""

    SocketListener = SparingListener

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


class _Logger(hypercorn.logging.Logger):
    """Hypercorn's logger, whose lines have the log's form where its own output is not asked for.

    Made once, when a worker begins to listen, it is also where a worker's configuration is seen.
    """

    def __init__(self, config: hypercorn.config.Config) -> None:
        super().__init__(config)
        guard.workers = config.workers
        if config.workers > 1:
            logs.emit(logs.line("several_processes", count=config.workers))
        if config.errorlog == "-" and config.logconfig is None and config.logconfig_dict is None:
            logs.adopt(logging.getLogger("hypercorn.error"))


_PLACES: Final[tuple[tuple[Any, str, Any, Any], ...]] = (
    (hypercorn.trio.run, "trio", trio, _Trio("trio")),
    (hypercorn.config.Config, "logger_class", hypercorn.logging.Logger, _Logger),
    (hypercorn.trio.run, "TCPServer", TCPServer, GuardedTCPServer),
    (hypercorn.trio.run, "WorkerContext", WorkerContext, GuardedWorkerContext),
    (hypercorn.protocol.h11, "WSStream", WSStream, GuardedWSStream),
    (hypercorn.protocol.h2, "WSStream", WSStream, GuardedWSStream),
)


def install(limits: Limits) -> bool:
    """Guard every Hypercorn server of this process that starts from now on.

    Returns:
        False where the installed Hypercorn differs and TRADING_PUSH_UNGUARDED=1 bears that.

    Raises:
        LinkError: It differs; the text names the symbol.
    """
    guard.limits = limits
    if guard.installed:
        return True
    try:
        check()
    except LinkError as error:
        if os.environ.get(UNGUARDED) != "1":
            raise
        logs.emit(logs.line("plain_form", reason=str(error)))
        return False
    for module, name, _, guarded in _PLACES:
        setattr(module, name, guarded)
    guard.installed = True
    return True


guard_hypercorn = install
"""What `trading_push` calls it."""


def check() -> None:
    """Compare the installed Hypercorn with what the link was made for.

    Raises:
        LinkError: The text names what differs and what to do.
    """
    hint = f"install hypercorn==0.18.*, or set {UNGUARDED}=1 to run without protection"
    for module, name, stock, _ in _PLACES:
        if getattr(module, name, None) is not stock:
            raise LinkError(f"{module.__name__}.{name} is not Hypercorn's own: {hint}")
    if "SocketListener" not in hypercorn.trio.run.worker_serve.__code__.co_names:
        raise LinkError(f"hypercorn.trio.run.worker_serve names no SocketListener: {hint}")
    for owner, method, expected in _EXPECTED:
        found = " ".join(inspect.signature(getattr(owner, method, lambda: None)).parameters)
        if found != expected:
            raise LinkError(
                f"{owner.__module__}.{owner.__qualname__}.{method} takes ({found}), "
                f"not ({expected}): {hint}"
            )
