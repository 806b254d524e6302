"""A client in Python, on trio."""

from typing import TYPE_CHECKING

from trading_push.lazy import lazy

if TYPE_CHECKING:
    from trading_push.client.client import Client, Push, Refused, Unreachable, open_client
else:
    __getattr__ = lazy(
        __name__,
        {
            "client": "Client Push Refused Unreachable open_client",
        },
    )

__all__ = [
    "Client",
    "Push",
    "Refused",
    "Unreachable",
    "open_client",
]
