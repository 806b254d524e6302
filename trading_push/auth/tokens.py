"""Tokens to principals: the check of a JWT, the making of one, and the secret of the demo.

An application may pass an `authenticate` of its own (`Authenticate`) instead of `JwtAuthenticator`.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import attrs
import jwt
import platformdirs
import trio
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from trading_push.errors import AuthenticationError, ConfigurationError, SourceError
from trading_push.settings.schema import Auth
from trading_push.settings.validators import SECRET_BYTES

__all__ = [
    "Authenticate",
    "JwtAuthenticator",
    "Principal",
    "data_dir",
    "demo_secret",
    "issue_token",
]

TOKEN_CHARACTERS = 8192
USER_CHARACTERS = 64

JWKS_LIFESPAN_S = 300
"""How long fetched keys are used before they are fetched again."""
JWKS_COOLDOWN_S = 30
"""How often at most a key id that is not known makes us fetch again; anyone can invent ids."""
JWKS_RETRY_S = 5
"""How long after a failed fetch the next one is tried at the earliest."""
JWKS_TIMEOUT_S = 5
# What a network, or a proxy's answer in place of the keys, can make of a fetch.
_FETCH_ERRORS = (jwt.PyJWTError, OSError, ValueError, RecursionError, http.client.HTTPException)

PublicKey = (
    rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey
)


_NO_CLAIMS: Mapping[str, Any] = MappingProxyType({})


def _none_for_ever(at: float | None) -> float | None:
    return None if at == math.inf else at


@attrs.frozen
class Principal:
    """Who a token stands for.

    Args:
        user: The user's id, 1 to 64 characters.
        expires_at: Until when, in seconds since the epoch, without any leeway; None for ever.
        claims: What else the token says; a connection keeps nothing of it.
        token_id: The token's own name (`jti`, RFC 7519 section 4.1.7), by which it can be revoked.
    """

    user: str
    expires_at: float | None = attrs.field(default=None, converter=_none_for_ever)
    claims: Mapping[str, Any] = attrs.field(default=_NO_CLAIMS, repr=False)
    token_id: str | None = None


Authenticate = Callable[[str], Principal | Awaitable[Principal]]
"""Takes a token and returns its principal, at once or when awaited.

It raises AuthenticationError to refuse; any other exception is a mistake of ours.
"""


class JwtAuthenticator:
    """An `Authenticate` for JWTs of one configured algorithm; `exp` and `sub` are required.

    Args:
        settings: The algorithm, the key of an asymmetric one, and the claims to check.
        secret: The secret of HS256, 32 bytes or more; not used by the others.

    Raises:
        ConfigurationError: The key is missing, unreadable or not one of that algorithm.
    """

    def __init__(self, settings: Auth, secret: str | None) -> None:
        self._settings = settings
        self._jwks: _Jwks | None = None
        self._key: PublicKey | jwt.PyJWK | None = None
        by_public_key = settings.public_key_file is not None or settings.jwks_url is not None
        if settings.algorithm == "HS256":
            if by_public_key:
                raise ConfigurationError(
                    "auth has a public key, and auth.algorithm is HS256, which has none: "
                    "set auth.algorithm to RS256, ES256 or EdDSA"
                )
            self._key = _prepared(_hmac_key(secret))
        elif settings.public_key_file is not None and settings.jwks_url is not None:
            raise ConfigurationError("set auth.public_key_file or auth.jwks_url, not both")
        elif settings.jwks_url is not None:
            self._jwks = _Jwks(settings.jwks_url)
        elif settings.public_key_file is not None:
            self._key = _public_key(settings.public_key_file, settings.algorithm)
        else:
            raise ConfigurationError(
                f"auth.algorithm is {settings.algorithm}: "
                "set auth.public_key_file or auth.jwks_url to the key that tokens are checked with"
            )

    async def __call__(self, token: str) -> Principal:
        """The principal of a token.

        A checkpoint only where keys have to be fetched. Cancellation abandons that fetch.

        Raises:
            AuthenticationError: The token is refused; its text never holds the token.
            SourceError: The keys of the JWKS URL cannot be had; nobody's token is to blame.
        """
        if not isinstance(token, str) or not token or not token.isascii():
            raise AuthenticationError("the token is not a JWT")
        if len(token) > TOKEN_CHARACTERS:
            raise AuthenticationError(f"the token is longer than {TOKEN_CHARACTERS} characters")
        key: PublicKey | jwt.PyJWK
        if self._jwks is not None:
            key = await self._jwks.get(self._key_id(token))
        else:
            assert self._key is not None
            key = self._key
        return self._principal(self._claims(token, key))

    def _key_id(self, token: str) -> str | None:
        with _refusing():
            header = jwt.get_unverified_header(token)
            if header.get("alg") != self._settings.algorithm:
                raise jwt.InvalidAlgorithmError  # before it can make us fetch keys
            key_id = header.get("kid")
            return key_id if isinstance(key_id, str) else None

    def _claims(self, token: str, key: PublicKey | jwt.PyJWK) -> dict[str, Any]:
        settings = self._settings
        required = ["exp", "sub"]
        required += ["aud"] * (settings.audience is not None)
        required += ["iss"] * (settings.issuer is not None)
        with _refusing():
            return jwt.decode(
                token,
                key,
                algorithms=[settings.algorithm],
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=settings.leeway_s,
                options={
                    "require": required,
                    "verify_aud": settings.audience is not None,
                    "verify_iss": settings.issuer is not None,
                },
            )

    @staticmethod
    def _principal(claims: Mapping[str, Any]) -> Principal:
        user, expires_at = claims["sub"], claims["exp"]
        if not _is_user(user):
            raise AuthenticationError(
                f"the token's sub is not a text of 1 to {USER_CHARACTERS} characters"
            )
        # PyJWT takes "1763600000" and true for times as well.
        if isinstance(expires_at, bool) or not isinstance(expires_at, int | float):
            raise AuthenticationError("the token's exp is not a number")
        token_id = claims.get("jti")
        return Principal(
            user,
            float(min(expires_at, 2**53)),
            claims,
            token_id if isinstance(token_id, str) else None,
        )


class _PreparedHmac(jwt.algorithms.HMACAlgorithm):
    """HMAC with a key that was looked at once; PyJWT's own looks at it for each token."""

    def prepare_key(self, key: str | bytes) -> bytes:
        return cast(bytes, key)


def _prepared(secret: bytes) -> jwt.PyJWK:
    encoded = jwt.utils.base64url_encode(secret).decode()
    key = jwt.PyJWK({"kty": "oct", "k": encoded}, "HS256")
    key.key = key.Algorithm.prepare_key(key.key)
    key.Algorithm = _PreparedHmac(jwt.algorithms.HMACAlgorithm.SHA256)
    return key


class _refusing(contextlib.AbstractContextManager[None]):
    """Turns whatever PyJWT makes of a bad token into one AuthenticationError without the token."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        match error:
            case None:
                return
            case jwt.ExpiredSignatureError():
                refusal = AuthenticationError("the token has expired", expired=True)
            case jwt.MissingRequiredClaimError():
                refusal = AuthenticationError(f"the token has no {error.claim}")
            case jwt.InvalidAudienceError():
                refusal = AuthenticationError("the token's aud is not ours")
            case jwt.InvalidIssuerError():
                refusal = AuthenticationError("the token's iss is not ours")
            case jwt.ImmatureSignatureError():
                # The clocks differ by more than the leeway: in a moment it will be good.
                refusal = AuthenticationError("the token is not valid yet", not_yet=True)
            case jwt.InvalidAlgorithmError():
                refusal = AuthenticationError("the token's algorithm is not the configured one")
            case jwt.InvalidSignatureError():
                refusal = AuthenticationError("the token's signature is not valid")
            # A signed token may still hold what PyJWT has not thought of: a NaN, a list for `iss`.
            case jwt.PyJWTError() | ValueError() | TypeError() | ArithmeticError():
                refusal = AuthenticationError()
            case RecursionError():
                refusal = AuthenticationError()
            case _:
                return
        raise refusal from None


class _Jwks:
    """The public keys behind a JWKS URL, fetched in a worker thread and kept for a while."""

    def __init__(self, url: str) -> None:
        self._client = jwt.PyJWKClient(url, cache_jwk_set=False, timeout=JWKS_TIMEOUT_S)
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fetched_at = -math.inf
        self._failed_at = -math.inf
        self._lock = trio.Lock()

    async def get(self, key_id: str | None) -> jwt.PyJWK:
        """The key of that id; without an id the only key, where there is one alone.

        Raises:
            AuthenticationError: There is no such key; `not_yet` if a later fetch may have it.
            SourceError: The keys cannot be fetched.
        """
        asked_at = trio.current_time()
        if self._is_due(key_id):
            async with self._lock:  # one fetch for all who wait
                if self._is_due(key_id):
                    await self._fetch()
        key = self._keys.get(key_id)
        if key is None and key_id is None and len(self._keys) == 1:
            (key,) = self._keys.values()
        if key is None:
            # Keys are not fetched for each id that somebody invents: this one may be of today.
            if key_id is not None and self._fetched_at < asked_at:
                raise AuthenticationError(
                    "the token names a key that is not known yet", not_yet=True
                )
            raise AuthenticationError("the token names a key that is not known")
        return key

    def _is_due(self, key_id: str | None) -> bool:
        age = trio.current_time() - self._fetched_at
        return age > JWKS_LIFESPAN_S or (age > JWKS_COOLDOWN_S and key_id not in self._keys)

    async def _fetch(self) -> None:
        if trio.current_time() - self._failed_at < JWKS_RETRY_S:
            return self._use_what_there_is("the last fetch failed a moment ago")
        try:
            # Abandoned when cancelled: a thread cannot be stopped, and this one only reads.
            jwk_set = await trio.to_thread.run_sync(
                self._client.get_jwk_set, True, abandon_on_cancel=True
            )
        except _FETCH_ERRORS as error:
            self._failed_at = trio.current_time()
            return self._use_what_there_is(type(error).__name__)
        self._fetched_at = trio.current_time()
        self._keys = {
            key.key_id: key for key in jwk_set.keys if key.public_key_use in ("sig", None)
        }
        return None

    def _use_what_there_is(self, why: str) -> None:
        if not self._keys:
            raise SourceError(f"cannot fetch the keys of auth.jwks_url: {why}")


def _hmac_key(secret: str | None) -> bytes:
    if secret is None or len(secret.encode(errors="replace")) < SECRET_BYTES:
        raise ConfigurationError(
            f"HS256 needs a secret: set TRADING_PUSH_JWT_SECRET to a random text of {SECRET_BYTES} "
            "bytes or more"
        )
    try:
        # It refuses a PEM: who knows the public key could otherwise sign with it.
        jwt.get_algorithm_by_name("HS256").prepare_key(secret)
    except jwt.InvalidKeyError:
        raise ConfigurationError(
            "jwt_secret is a public or private key: give a random text, or set "
            "auth.public_key_file and auth.algorithm"
        ) from None
    return secret.encode(errors="replace")


def _public_key(path: Path, algorithm: str) -> PublicKey:
    where = f"auth.public_key_file {str(path)!r}"
    try:
        pem = path.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"cannot read {where}: {why}") from error
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(
            f"{where} holds no public key: give PEM that begins with -----BEGIN PUBLIC KEY-----"
        ) from error
    match algorithm, key:
        case "RS256", rsa.RSAPublicKey() if key.key_size >= 2048:
            return key
        case "ES256", ec.EllipticCurvePublicKey() if isinstance(key.curve, ec.SECP256R1):
            return key
        case "EdDSA", ed25519.Ed25519PublicKey() | ed448.Ed448PublicKey():
            return key
    kinds = {"RS256": "RSA, 2048 bits or more", "ES256": "EC on P-256", "EdDSA": "Ed25519 or Ed448"}
    raise ConfigurationError(f"{where} is no key of {algorithm}: it takes {kinds[algorithm]}")


def _is_user(user: object) -> bool:
    if not isinstance(user, str) or not 1 <= len(user) <= USER_CHARACTERS:
        return False
    try:
        user.encode()
    except UnicodeEncodeError:  # a lone surrogate, which could not be written anywhere
        return False
    return True


def issue_token(
    secret: str, user: str, ttl_s: float, claims: Mapping[str, Any] | None = None
) -> str:
    """A new HS256 token.

    Args:
        secret: 32 bytes or more.
        user: The token's `sub`, 1 to 64 characters.
        ttl_s: For how many seconds from now it is good.
        claims: What else it says, for example `aud` and `iss`.

    Raises:
        ConfigurationError: The secret or the user cannot be used.
    """
    if not _is_user(user):
        raise ConfigurationError(
            f"a token cannot be of user {user[:80]!r}: give 1 to {USER_CHARACTERS} characters"
        )
    now = time.time()
    payload = {**(claims or {}), "sub": user, "iat": int(now), "exp": int(now + ttl_s)}
    return jwt.encode(payload, _hmac_key(secret), algorithm="HS256")


def data_dir() -> Path:
    """The user's data directory for this program; it may not exist yet."""
    return platformdirs.user_data_path("trading-push", appauthor=False)


def demo_secret(directory: Path) -> str:
    """The secret of the demo, kept in `directory` with mode 0600; made when first asked for.

    Two processes that ask at the same moment get the same one.

    Raises:
        ConfigurationError: It cannot be made or read, or others can read it.
    """
    path = directory / "jwt-secret"
    try:
        if not path.exists():
            _make_secret(path)
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise ConfigurationError(
                f"others can read the demo's secret {str(path)!r}: delete it, a new one is made"
            )
        secret = path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"cannot keep the demo's secret in {str(path)!r}: {why}; "
            "set TRADING_PUSH_JWT_SECRET to a random text of 32 bytes or more"
        ) from error
    if len(secret) < SECRET_BYTES:
        raise ConfigurationError(
            f"the demo's secret {str(path)!r} is damaged: delete it, a new one is made"
        )
    return secret


def _make_secret(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        # A link appears whole or not at all, and never over a secret that another process made.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
