"""Tokens made by hand, with whatever claims and key."""

from __future__ import annotations

import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

SECRET = "0123456789abcdef0123456789abcdef"
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def pem(key: Any) -> bytes:
    public: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return public


def claims(**changes: Any) -> dict[str, Any]:
    """Those of a good token; a change to None leaves a claim out."""
    now = int(time.time())
    changed = {"sub": "4", "exp": now + 60, "iat": now} | changes
    return {name: value for name, value in changed.items() if value is not None}


def signed(key: Any = SECRET, algorithm: str = "HS256", **changes: Any) -> str:
    """A token whose claims are not looked at, unlike those that PyJWT makes."""
    payload = json.dumps(claims(**changes)).encode()
    return jwt.PyJWS().encode(payload, key, algorithm, {"typ": "JWT"})
