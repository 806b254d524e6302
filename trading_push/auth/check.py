"""The check of a token: whom it stands for, and whether it has been revoked."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from typing import Any, Final

import trio

from trading_push import logs
from trading_push.auth.principal import Authenticate, Handshake, Principal, takes_handshake
from trading_push.auth.revocation import RevokedTokens
from trading_push.errors import AuthenticationError, ConfigurationError, SourceError
from trading_push.logs.strangers import StrangerLines
from trading_push.settings.schema import Server
from trading_push.supervision import exits_are_errors

__all__ = ["RESULTS", "TokenCheck", "check_origins"]

RESULTS: Final = ("ok", "refused", "expired", "unavailable", "error", "abandoned")
"""What a check of a token ends with, as it is counted; `abandoned`: its time was up, or the client
has gone."""

_REPEAT_S: Final = 60
"""How often at most the log says that tokens cannot be checked."""
_TELLING: Final = 8
"""From how many characters on a text in an error may be the token, and is not said."""


class TokenCheck:
    """An application's `authenticate`, and the tokens that are refused although it takes them.

    Args:
        authenticate: Returns a token's principal, or an awaitable of it.
        leeway_s: For how long after its expiry a token is still good.
    """

    def __init__(self, authenticate: Authenticate, leeway_s: float) -> None:
        self.revoked = RevokedTokens(leeway_s)
        self.strangers = StrangerLines()
        """Bounds the lines that tell of refused tokens, and others that anyone can cause."""
        self.results: Counter[str] = Counter()
        """How the checks have ended since the start, by `RESULTS`."""
        self.use(authenticate, leeway_s)
        # When the log last said that tokens cannot be checked, on trio's clock.
        self._told_unavailable_at = -math.inf

    def use(self, authenticate: Authenticate, leeway_s: float) -> None:
        """Check tokens by another `authenticate` from now on; what is revoked stays so."""
        self.sees_handshake = takes_handshake(authenticate)
        """Whether `authenticate` is called at each handshake, also without a token."""
        self._authenticate: Any = authenticate
        self.revoked.leeway_s = leeway_s

    async def principal(
        self, token: str, address: str, handshake: Handshake | None = None
    ) -> Principal:
        """Find out whom a token stands for.

        A checkpoint if `authenticate` is one. What it does when it is cancelled is its own affair.

        Args:
            token: What stands behind `Bearer`, or in `auth`.
            address: Where it came from, for the log.
            handshake: The connection's; None for a request whose cookies do not count.

        Raises:
            AuthenticationError: The token is refused, or revoked; the log says why.
            SourceError: It cannot be checked now; the log says so once a minute at most.
            Exception: A mistake of the application's.
        """
        principal = await self.of_handshake(token, handshake or Handshake(address=address))
        if principal is None:
            error = AuthenticationError()
            self.results["refused"] += 1
            self.refused(error, token, address)
            raise error
        return principal

    async def of_handshake(self, token: str | None, handshake: Handshake) -> Principal | None:
        """Find out whom a handshake stands for, with a token or, where it is looked at, without.

        As `principal`, but None where `authenticate` leaves it open.
        """
        result = "abandoned"
        try:
            principal = await self._ask(token, handshake)
            if principal is not None:
                self.revoked.check(principal)
            result = "ok" if principal is not None else ""
        except AuthenticationError as error:
            result = "expired" if error.expired else "refused"
            self.refused(error, token, handshake.address)
            raise
        except SourceError:
            result = "unavailable"
            raise
        except Exception:
            result = "error"
            raise
        finally:
            if result:  # else it is left open who it is
                self.results[result] += 1
        return principal

    def check_again(self, principal: Principal, address: str) -> None:
        """Refuse whom a token stands for if it was revoked; raises AuthenticationError."""
        try:
            self.revoked.check(principal)
        except AuthenticationError as error:
            self.refused(error, None, address)
            raise

    def refused(self, error: AuthenticationError, token: str | None, address: str) -> None:
        """Say in the log why a token is refused, without the token."""
        why = str(error)
        if token is not None and len(token) >= _TELLING:
            why = why.replace(token, "(token)")
        self.strangers.emit(
            logs.line("token_refused", error=AuthenticationError(why), address=address)
        )

    async def _ask(self, token: str | None, handshake: Handshake) -> Principal | None:
        try:
            with exits_are_errors():
                if self.sees_handshake:
                    principal = self._authenticate(token, handshake)
                else:
                    principal = self._authenticate(token)
                if inspect.isawaitable(principal):
                    principal = await principal
        except SourceError as error:
            if trio.current_time() - self._told_unavailable_at >= _REPEAT_S:
                self._told_unavailable_at = trio.current_time()
                logs.emit(logs.line("authentication_unavailable", error=error))
            raise
        if principal is None and self.sees_handshake:
            return None
        if not isinstance(principal, Principal):
            raise TypeError(f"authenticate returned {type(principal).__name__}, not a Principal")
        return principal


def check_origins(authenticate: Authenticate, server: Server) -> None:
    """Check that only pages that are known by name can use their visitors' cookies.

    Raises:
        ConfigurationError: `authenticate` takes the handshake, and `server.origins` lets any page
            connect.
    """
    for origin in {"*", "null"}.intersection(server.origins.split()):
        if takes_handshake(authenticate):
            raise ConfigurationError(
                f"server.origins has {origin!r}, and authenticate takes the handshake: any page "
                "could connect with its visitor's cookies; name the pages that may"
            )
