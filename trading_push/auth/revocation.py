"""Refuse tokens that were revoked before they expire."""

from __future__ import annotations

import time

from trading_push.auth.principal import Principal
from trading_push.errors import AuthenticationError

__all__ = ["RevokedTokens"]


class RevokedTokens:
    """The ids of revoked tokens, each for as long as its token could be used.

    Args:
        leeway_s: How long after its expiry a token is still accepted.
    """

    def __init__(self, leeway_s: float) -> None:
        self.leeway_s = leeway_s
        self._until: dict[str, float] = {}  # when each can be forgotten, in seconds since the epoch

    def __len__(self) -> int:
        return len(self._until)

    def add(self, token_id: str, expires_at: float) -> None:
        """Refuse a token from now on.

        Args:
            token_id: Its `jti`.
            expires_at: When it expires, in seconds since the epoch.
        """
        now = time.time()
        for old in [old for old, until in self._until.items() if until < now]:
            del self._until[old]
        self._until[token_id] = expires_at + self.leeway_s

    def check(self, principal: Principal) -> None:
        """Refuse a principal whose token is revoked.

        To be called again whenever time has passed since the token was checked, because it may
        have been revoked in the meantime.

        Raises:
            AuthenticationError: It is revoked.
        """
        if principal.token_id in self._until:
            raise AuthenticationError("the token was revoked")
