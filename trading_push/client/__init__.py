"""A client in Python, on trio."""

from typing import TYPE_CHECKING

from trading_push.lazy import lazy

if TYPE_CHECKING:
    from trading_push.client.client import Client, open_client
    from trading_push.client.ending import Refused, Unreachable
    from trading_push.client.messages import Push
    from trading_push.client.table import Table
else:
    __getattr__ = lazy(
        __name__,
        {
            "client": "Client open_client",
            "ending": "Refused Unreachable",
            "messages": "Push",
            "table": "Table",
        },
    )

__all__ = [
    "Client",
    "Push",
    "Refused",
    "Table",
    "Unreachable",
    "open_client",
]
