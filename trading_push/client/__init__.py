"""Clients in Python: on trio here, in `aio` and in `sync`; and one that publishes."""

from typing import TYPE_CHECKING

from trading_push.lazy import lazy

if TYPE_CHECKING:
    from trading_push.client.client import Client, open_client
    from trading_push.client.ending import Refused, Unreachable
    from trading_push.client.messages import Push
    from trading_push.client.publisher import Publisher
    from trading_push.client.table import Table
else:
    __getattr__ = lazy(
        __name__,
        {
            "client": "Client open_client",
            "ending": "Refused Unreachable",
            "messages": "Push",
            "publisher": "Publisher",
            "table": "Table",
        },
    )

__all__ = [
    "Client",
    "Publisher",
    "Push",
    "Refused",
    "Table",
    "Unreachable",
    "open_client",
]
