"""Check JWTs and issue them."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from trading_push.auth.jwks import Jwks
from trading_push.auth.principal import USER_CHARACTERS, Principal, is_user
from trading_push.errors import AuthenticationError, ConfigurationError
from trading_push.settings.consistency import check_auth
from trading_push.settings.schema import Auth
from trading_push.settings.validators import SECRET_BYTES

__all__ = ["JwtAuthenticator", "issue_token", "required_claims"]

TOKEN_CHARACTERS: Final = 8192
"""How long a token may be."""

_BAD_SUB: Final = f"the token's sub is not a text of 1 to {USER_CHARACTERS} characters"
# The claim that an error of PyJWT is about.
_CLAIM: Final = re.compile(r"\((exp|nbf|iat)\)")

PublicKey = (
    rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey
)


class JwtAuthenticator:
    """Check JWTs of the one configured algorithm; an `Authenticate`.

    A token must have `exp` and `sub`.

    Args:
        settings: The algorithm, the key of an asymmetric one, and the claims to check.
        secret: The secret of HS256, 32 bytes or more; the other algorithms do not use it.

    Raises:
        ConfigurationError: The key is missing, cannot be read or does not fit the algorithm.
    """

    def __init__(self, settings: Auth, secret: str | None) -> None:
        self._settings = settings
        # One of the two: keys that are fetched, or the only key.
        self._jwks: Jwks | None = None
        self._key: PublicKey | jwt.PyJWK | None = None
        check_auth(settings)
        if settings.algorithm == "HS256":
            self._key = _prepared(_hmac_key(secret))
        elif settings.jwks_url is not None:
            self._jwks = Jwks(settings.jwks_url)
        elif settings.public_key_file is not None:
            self._key = _public_key(settings.public_key_file, settings.algorithm)

    async def __call__(self, token: str) -> Principal:
        """Check a token and return its principal.

        A checkpoint only if keys have to be fetched. Cancellation abandons that fetch.

        Raises:
            AuthenticationError: The token is refused; the text never holds the token.
            SourceError: The keys of the JWKS URL cannot be fetched.
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
                raise jwt.InvalidAlgorithmError  # before it can cause a fetch of keys
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
        if not is_user(user):
            raise AuthenticationError(_BAD_SUB)
        # PyJWT also accepts "1763600000" and true as times.
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
    """HMAC with a key that was checked once; PyJWT's own class checks it for each token."""

    def prepare_key(self, key: str | bytes) -> bytes:
        return cast(bytes, key)


def _prepared(secret: bytes) -> jwt.PyJWK:
    encoded = jwt.utils.base64url_encode(secret).decode()
    key = jwt.PyJWK({"kty": "oct", "k": encoded}, "HS256")
    key.key = key.Algorithm.prepare_key(key.key)
    key.Algorithm = _PreparedHmac(jwt.algorithms.HMACAlgorithm.SHA256)
    return key


class _refusing(contextlib.AbstractContextManager[None]):
    """Turn what PyJWT raises for a bad token into an AuthenticationError without the token."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        match error:
            case None:
                return
            case jwt.ExpiredSignatureError():
                refusal = AuthenticationError("the token has expired", expired=True)
            case jwt.MissingRequiredClaimError():
                refusal = AuthenticationError(f"the token has no {error.claim}")
            case jwt.InvalidAudienceError():
                refusal = AuthenticationError("the token's aud is not the configured one")
            case jwt.InvalidIssuerError():
                refusal = AuthenticationError("the token's iss is not the configured one")
            case jwt.ImmatureSignatureError():
                # The clocks differ by more than the leeway: it will be valid in a moment.
                refusal = AuthenticationError("the token is not valid yet", not_yet=True)
            case jwt.InvalidAlgorithmError():
                refusal = AuthenticationError("the token's algorithm is not the configured one")
            case jwt.InvalidSignatureError():
                refusal = AuthenticationError("the token's signature is not valid")
            case jwt.exceptions.InvalidSubjectError():
                refusal = AuthenticationError(_BAD_SUB)
            case jwt.exceptions.InvalidIssuedAtError():
                refusal = AuthenticationError("the token's iat is not a number")
            case jwt.exceptions.InvalidJTIError():
                refusal = AuthenticationError("the token's jti is not a text")
            case jwt.DecodeError():
                claim = _CLAIM.search(str(error))  # whose text holds nothing of the token
                refusal = AuthenticationError(
                    "the token is not a JWT"
                    if claim is None
                    else f"the token's {claim[1]} is not a number"
                )
            # A signed token may hold what PyJWT does not expect: a NaN, or a list as `iss`.
            case jwt.PyJWTError() | ValueError() | TypeError() | ArithmeticError():
                refusal = AuthenticationError()
            case RecursionError():
                refusal = AuthenticationError()
            case _:
                return
        raise refusal from None


def _hmac_key(secret: str | None) -> bytes:
    if secret is None or len(secret.encode(errors="replace")) < SECRET_BYTES:
        raise ConfigurationError(
            f"HS256 needs a secret: set TRADING_PUSH_JWT_SECRET to a random text of {SECRET_BYTES} "
            "bytes or more"
        )
    try:
        # It refuses a PEM, because anyone with the public key could sign with it.
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


def issue_token(
    secret: str, user: str, ttl_s: float, claims: Mapping[str, Any] | None = None
) -> str:
    """Issue an HS256 token.

    Args:
        secret: 32 bytes or more.
        user: The token's `sub`, 1 to 64 characters.
        ttl_s: For how many seconds from now it is valid.
        claims: Further claims, for example `aud` and `iss`.

    Raises:
        ConfigurationError: The secret or the user cannot be used.
    """
    if not is_user(user):
        raise ConfigurationError(
            f"there cannot be a user {user[:80]!r}: give 1 to {USER_CHARACTERS} characters"
        )
    now = time.time()
    payload = {**(claims or {}), "sub": user, "iat": int(now), "exp": int(now + ttl_s)}
    return jwt.encode(payload, _hmac_key(secret), algorithm="HS256")


def required_claims(auth: Auth) -> dict[str, str]:
    """The `aud` and `iss` that a token must have to be accepted."""
    claims = {"aud": auth.audience, "iss": auth.issuer}
    return {name: value for name, value in claims.items() if value is not None}
