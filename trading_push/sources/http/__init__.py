"""Accounts from an HTTP service."""

from typing import TYPE_CHECKING

from trading_push.lazy import lazy

if TYPE_CHECKING:
    from trading_push.sources.http.source import HttpBatchSource, HttpSource
else:
    __getattr__ = lazy(
        __name__,
        {
            "source": "HttpBatchSource HttpSource",
        },
    )

__all__ = [
    "HttpBatchSource",
    "HttpSource",
]
