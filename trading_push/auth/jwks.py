"""The public keys behind a JWKS URL (RFC 7517)."""

from __future__ import annotations

import http.client
import math
from typing import Final

import jwt
import trio

from trading_push.errors import AuthenticationError, SourceError

__all__ = ["Jwks"]

LIFESPAN_S = 300
"""How long fetched keys are used before they are fetched again."""
COOLDOWN_S = 30
"""How long after a fetch an unknown key id may cause the next one; anyone can invent key ids."""
RETRY_S = 5
"""How long after a failed fetch the next one may be tried."""
TIMEOUT_S = 5
"""How long a fetch may wait for the server."""

# What a network, or a proxy that answers in place of the server, can make of a fetch.
_FETCH_ERRORS: Final = (
    jwt.PyJWTError,
    OSError,
    ValueError,
    RecursionError,
    http.client.HTTPException,
)


class Jwks:
    """Fetch the keys in a worker thread, and keep them for a while.

    Args:
        url: Where the key set is.
    """

    def __init__(self, url: str) -> None:
        self._client = jwt.PyJWKClient(url, cache_jwk_set=False, timeout=TIMEOUT_S)
        self._keys: dict[str | None, jwt.PyJWK] = {}  # the last key set, by key id
        self._fetched_at = -math.inf  # when it was fetched, by trio's clock
        self._failed_at = -math.inf  # when a fetch last failed
        self._lock = trio.Lock()  # one fetch at a time

    async def get(self, key_id: str | None) -> jwt.PyJWK:
        """The key of this id; without an id the only key, if there is only one.

        A checkpoint only if keys have to be fetched. Cancellation abandons that fetch.

        Raises:
            AuthenticationError: There is no such key; `not_yet` if a later fetch may have it.
            SourceError: The keys cannot be fetched.
        """
        asked_at = trio.current_time()
        if self._is_due(key_id):
            async with self._lock:  # one fetch serves all that wait for it
                if self._is_due(key_id):
                    await self._fetch()
        key = self._keys.get(key_id)
        if key is None and key_id is None and len(self._keys) == 1:
            (key,) = self._keys.values()
        if key is None:
            # Not every unknown id causes a fetch, so this key may be newer than the last one.
            if key_id is not None and self._fetched_at < asked_at:
                raise AuthenticationError(
                    "the token names a key that is not known yet", not_yet=True
                )
            raise AuthenticationError("the token names a key that is not known")
        return key

    def _is_due(self, key_id: str | None) -> bool:
        age = trio.current_time() - self._fetched_at
        return age > LIFESPAN_S or (age > COOLDOWN_S and key_id not in self._keys)

    async def _fetch(self) -> None:
        if trio.current_time() - self._failed_at < RETRY_S:
            return self._use_old_keys("the last fetch failed a moment ago")
        try:
            # Abandoned when cancelled: a thread cannot be stopped, and this one only reads.
            jwk_set = await trio.to_thread.run_sync(
                self._client.get_jwk_set, True, abandon_on_cancel=True
            )
        except _FETCH_ERRORS as error:
            self._failed_at = trio.current_time()
            return self._use_old_keys(type(error).__name__)
        self._fetched_at = trio.current_time()
        self._keys = {
            key.key_id: key for key in jwk_set.keys if key.public_key_use in ("sig", None)
        }
        return None

    def _use_old_keys(self, why: str) -> None:
        if not self._keys:
            raise SourceError(f"cannot fetch the keys of auth.jwks_url: {why}")
