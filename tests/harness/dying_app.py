"""The application of `trading_push.asgi`, whose registry dies when user 13 authenticates."""

from __future__ import annotations

from typing import Any

from trading_push.asgi import app
from trading_push.connections.registry import Registry

__all__ = ["app"]


def _install() -> None:
    original = Registry._authenticated

    def authenticated(self: Registry, member: Any, user: str) -> None:
        if user == "13":
            raise RuntimeError("a mistake of ours")
        original(self, member, user)

    Registry._authenticated = authenticated


_install()
