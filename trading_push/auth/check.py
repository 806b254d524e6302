"""The check of a token: whom it stands for, and whether it has been revoked."""

from __future__ import annotations

import inspect
import math
from typing import Final

import trio

from trading_push import logs
from trading_push.auth.principal import Authenticate, Principal
from trading_push.auth.revocation import RevokedTokens
from trading_push.errors import SourceError
from trading_push.supervision import exits_are_errors

__all__ = ["TokenCheck"]

_REPEAT_S: Final = 60
"""How often at most the log says that tokens cannot be checked."""


class TokenCheck:
    """An application's `authenticate`, and the tokens that are refused although it takes them.

    Args:
        authenticate: Returns a token's principal, or an awaitable of it.
        leeway_s: For how long after its expiry a token is still good.
    """

    def __init__(self, authenticate: Authenticate, leeway_s: float) -> None:
        self.revoked = RevokedTokens(leeway_s)
        self._authenticate = authenticate
        # When the log last said that tokens cannot be checked, on trio's clock.
        self._told_unavailable_at = -math.inf

    async def principal(self, token: str) -> Principal:
        """Find out whom a token stands for.

        A checkpoint if `authenticate` is one. What it does when it is cancelled is its own affair.

        Raises:
            AuthenticationError: The token is refused, or revoked.
            SourceError: It cannot be checked now; the log says so once a minute at most.
            Exception: A mistake of the application's.
        """
        try:
            with exits_are_errors():
                principal = self._authenticate(token)
                if inspect.isawaitable(principal):
                    principal = await principal
        except SourceError as error:
            if trio.current_time() - self._told_unavailable_at >= _REPEAT_S:
                self._told_unavailable_at = trio.current_time()
                logs.emit(logs.line("authentication_unavailable", error=error))
            raise
        if not isinstance(principal, Principal):
            raise TypeError(f"authenticate returned {type(principal).__name__}, not a Principal")
        self.revoked.check(principal)
        return principal
