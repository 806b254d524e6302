"""The tokens that are refused although they are good otherwise."""

from __future__ import annotations

import time

from trading_push.auth.tokens import Principal
from trading_push.errors import AuthenticationError

__all__ = ["RevokedTokens"]


class RevokedTokens:
    """The ids of revoked tokens, each for as long as its token could be used.

    Args:
        leeway_s: For how long after its expiry a token is still good.
    """

    def __init__(self, leeway_s: float) -> None:
        self._leeway_s = leeway_s
        self._until: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._until)

    def add(self, token_id: str, expires_at: float) -> None:
        """Refuse a token from now on; `expires_at` is its own, in seconds since the epoch."""
        now = time.time()
        for old in [old for old, until in self._until.items() if until < now]:
            del self._until[old]
        self._until[token_id] = expires_at + self._leeway_s

    def check(self, principal: Principal) -> None:
        """Refuse whom a revoked token stands for.

        Asked again wherever time has passed since the token was checked: it may have been revoked
        in the meantime.

        Raises:
            AuthenticationError: It is revoked.
        """
        if principal.token_id in self._until:
            raise AuthenticationError("the token was revoked")
