"""Accounts from an HTTP service."""

from typing import TYPE_CHECKING

from trading_push.lazy import lazy

if TYPE_CHECKING:
    from trading_push.sources.http.source import HttpSource
else:
    __getattr__ = lazy(
        __name__,
        {
            "source": "HttpSource",
        },
    )

__all__ = [
    "HttpSource",
]
