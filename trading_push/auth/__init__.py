"""Who a connection is: tokens, their keys, and those that are revoked."""

from typing import TYPE_CHECKING

from trading_push.lazy import lazy

if TYPE_CHECKING:
    from trading_push.auth.tokens import (
        Authenticate,
        JwtAuthenticator,
        Principal,
        data_dir,
        demo_secret,
        issue_token,
    )
else:
    __getattr__ = lazy(
        __name__,
        {
            "tokens": "Authenticate JwtAuthenticator Principal data_dir demo_secret issue_token",
        },
    )

__all__ = [
    "Authenticate",
    "JwtAuthenticator",
    "Principal",
    "data_dir",
    "demo_secret",
    "issue_token",
]
