"""Who a connection is: tokens, the keys that check them, and tokens that are revoked."""

from typing import TYPE_CHECKING

from trading_push.lazy import lazy

if TYPE_CHECKING:
    from trading_push.auth.demo import data_dir, demo_secret
    from trading_push.auth.principal import Authenticate, Handshake, Principal
    from trading_push.auth.tokens import JwtAuthenticator, issue_token
else:
    __getattr__ = lazy(
        __name__,
        {
            "demo": "data_dir demo_secret",
            "principal": "Authenticate Handshake Principal",
            "tokens": "JwtAuthenticator issue_token",
        },
    )

__all__ = [
    "Authenticate",
    "Handshake",
    "JwtAuthenticator",
    "Principal",
    "data_dir",
    "demo_secret",
    "issue_token",
]
