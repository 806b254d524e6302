"""Tokens: which are taken, which are refused and with what words; and the demo's secret."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import os
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import jwt
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from harness.tokens import RSA, SECRET, claims, pem, signed

from trading_push.auth import jwks as jwks_keys
from trading_push.auth.demo import data_dir, demo_secret
from trading_push.auth.tokens import JwtAuthenticator, issue_token
from trading_push.errors import (
    AuthenticationError,
    ConfigurationError,
    ErrorCode,
    SourceError,
)
from trading_push.settings.schema import Auth

EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
KEYS: dict[str, Any] = {"RS256": RSA, "ES256": EC, "EdDSA": ED}


async def refusal(token: str, secret: str = SECRET, **settings: Any) -> AuthenticationError:
    with pytest.raises(AuthenticationError) as error:
        await JwtAuthenticator(Auth(**settings), secret)(token)
    text = error.value.message
    assert "\n" not in text
    assert len(text) < 100
    return error.value


async def test_a_good_token_is_its_user() -> None:
    expires_at = int(time.time()) + 60
    principal = await JwtAuthenticator(Auth(), SECRET)(signed(exp=expires_at, role="trader"))
    assert principal.user == "4"
    assert principal.expires_at == expires_at
    assert principal.claims["role"] == "trader"
    assert "trader" not in repr(principal)


async def test_what_is_issued_is_taken() -> None:
    settings = Auth(audience="a", issuer="i")
    token = issue_token(SECRET, "4", 30, {"aud": "a", "iss": "i", "sub": "5"})
    principal = await JwtAuthenticator(settings, SECRET)(token)
    assert principal.user == "4"
    assert principal.expires_at == pytest.approx(time.time() + 30, abs=3)


@pytest.mark.parametrize("user", ["", "x" * 65, "\ud800"])
def test_a_token_of_nobody_is_not_issued(user: str) -> None:
    with pytest.raises(ConfigurationError, match="1 to 64"):
        issue_token(SECRET, user, 30)


async def test_an_expired_token_is_told_apart() -> None:
    error = await refusal(signed(exp=int(time.time()) - 6))
    assert error.expired
    assert error.code is ErrorCode.TOKEN_EXPIRED
    await JwtAuthenticator(Auth(), SECRET)(signed(exp=int(time.time()) - 3))  # the leeway
    assert (await refusal(signed(exp=int(time.time()) - 3), leeway_s=0)).expired
    forged = signed("another secret of thirty-two bytes", exp=int(time.time()) - 60)
    assert not (await refusal(forged)).expired


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exp": None}, "has no exp"),
        ({"sub": None}, "has no sub"),
        ({"sub": ""}, "1 to 64"),
        ({"sub": "x" * 65}, "1 to 64"),
        ({"sub": "\ud800"}, "1 to 64"),
        ({"sub": 4}, "sub is not a text"),
        ({"sub": ["4"]}, "sub is not a text"),
        ({"exp": "soon"}, "exp is not a number"),
        ({"exp": "99999999999"}, "exp is not a number"),
        ({"exp": True}, "expired"),
        ({"exp": math.nan}, "exp is not a number"),
        ({"exp": math.inf}, "exp is not a number"),
        ({"exp": [1]}, "exp is not a number"),
        ({"iat": "soon"}, "iat is not a number"),
        ({"nbf": "soon"}, "nbf is not a number"),
        ({"jti": 7}, "jti is not a text"),
        ({"nbf": time.time() + 86_400}, "not valid yet"),
        ({"iat": time.time() + 86_400}, "not valid yet"),
    ],
)
async def test_claims_that_are_refused(changes: dict[str, Any], says: str) -> None:
    error = await refusal(signed(**changes))
    assert says in error.message
    assert error.code is (ErrorCode.TOKEN_EXPIRED if says == "expired" else ErrorCode.BAD_TOKEN)
    assert error.retryable == ("not valid yet" in says)


async def test_a_far_future_is_a_finite_number() -> None:
    principal = await JwtAuthenticator(Auth(), SECRET)(signed(exp=10**400))
    assert principal.expires_at is not None
    assert math.isfinite(principal.expires_at)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"aud": None}, "has no aud"),
        ({"aud": "other"}, "aud is not the configured one"),
        ({"aud": ["other", 5]}, "aud is not the configured one"),
        ({"iss": None}, "has no iss"),
        ({"iss": "other"}, "iss is not the configured one"),
        ({"iss": ["i"]}, "iss is not the configured one"),
    ],
)
async def test_audience_and_issuer_where_configured(changes: dict[str, Any], says: str) -> None:
    good = {"aud": ["a", "b"], "iss": "i"}
    settings = {"audience": "a", "issuer": "i"}
    await JwtAuthenticator(Auth(**settings), SECRET)(signed(**good))
    assert says in (await refusal(signed(**{**good, **changes}), **settings)).message
    # Not configured, they are not looked at.
    await JwtAuthenticator(Auth(), SECRET)(signed(**{**good, **changes}))


@pytest.mark.parametrize(
    "token",
    [
        "",
        "x",
        "..",
        "a.b.c",
        "é.b.c",
        "\ud800",
        "[" * 8000,
        base64.urlsafe_b64encode(b"[" * 4000).decode() + ".e30.e30",
    ],
)
async def test_what_is_no_token(token: str) -> None:
    await refusal(token)


async def test_a_long_token_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    token = signed(padding="x" * 8000)
    assert len(token) > 8192
    monkeypatch.setattr(jwt, "decode", lambda *a, **k: pytest.fail("it was read"))
    assert "8192" in (await refusal(token)).message


async def test_the_algorithm_is_the_configured_one(tmp_path: Path) -> None:
    none = ".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
        for part in ({"alg": "none", "typ": "JWT"}, claims())
    )
    assert "algorithm" in (await refusal(none + ".")).message
    assert "algorithm" in (await refusal(signed(SECRET * 2, "HS512"), SECRET * 2)).message
    assert "algorithm" in (await refusal(signed(RSA, "RS256"))).message
    path = tmp_path / "key.pem"
    path.write_bytes(pem(RSA))
    by_key = {"algorithm": "RS256", "public_key_file": path}
    assert "algorithm" in (await refusal(none + ".", **by_key)).message
    assert "algorithm" in (await refusal(signed(), **by_key)).message
    # The well-known confusion: the public key as the secret of HS256.
    header = base64.urlsafe_b64encode(b'{"alg":"HS256"}').decode().rstrip("=")
    payload = base64.urlsafe_b64encode(json.dumps(claims()).encode()).decode().rstrip("=")
    mac = hmac.new(pem(RSA), f"{header}.{payload}".encode(), hashlib.sha256).digest()
    confused = f"{header}.{payload}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"
    assert "algorithm" in (await refusal(confused, **by_key)).message


@pytest.mark.parametrize("algorithm", KEYS)
async def test_a_public_key_file(tmp_path: Path, algorithm: Any) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(pem(KEYS[algorithm]))
    settings = Auth(algorithm=algorithm, public_key_file=path)
    principal = await JwtAuthenticator(settings, None)(signed(KEYS[algorithm], algorithm))
    assert principal.user == "4"
    others = {
        "RS256": partial(rsa.generate_private_key, 65537, 2048),
        "ES256": partial(ec.generate_private_key, ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
    }
    forged = signed(others[algorithm](), algorithm)
    assert "signature" in (await refusal(forged, **attrs.asdict(settings))).message


@pytest.mark.parametrize(
    ("settings", "content", "says"),
    [
        ({}, b"", "HS256 needs a secret"),
        ({"algorithm": "RS256"}, b"", "set auth.public_key_file or auth.jwks_url"),
        ({"algorithm": "RS256", "jwks_url": "http://h"}, pem(RSA), "not both"),
        ({"algorithm": "HS256"}, pem(RSA), "set auth.algorithm"),
        ({"algorithm": "RS256"}, pem(EC), "no key of RS256"),
        ({"algorithm": "ES256"}, pem(ec.generate_private_key(ec.SECP384R1())), "no key of ES256"),
        ({"algorithm": "EdDSA"}, pem(RSA), "no key of EdDSA"),
        ({"algorithm": "RS256"}, b"hello", "holds no public key"),
        (
            {"algorithm": "RS256"},
            RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "holds no public key",
        ),
    ],
)
def test_keys_that_do_not_fit(
    tmp_path: Path, settings: dict[str, Any], content: bytes, says: str
) -> None:
    if content:
        settings = {**settings, "public_key_file": tmp_path / "key.pem"}
        settings["public_key_file"].write_bytes(content)
    with pytest.raises(ConfigurationError) as error:
        JwtAuthenticator(Auth(**settings), None)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_secrets_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="32 bytes"):
        JwtAuthenticator(Auth(), "short")
    with pytest.raises(ConfigurationError, match="is a public or private key"):
        JwtAuthenticator(Auth(), pem(RSA).decode())
    with pytest.raises(ConfigurationError, match="cannot read"):
        JwtAuthenticator(Auth(algorithm="RS256", public_key_file=tmp_path / "nope"), None)


@pytest.fixture
async def jwks(nursery: trio.Nursery) -> tuple[str, list[bytes], list[int]]:
    """The URL of a tiny HTTP server, the body it answers with, and how often it was asked."""
    body = [b""]
    asked = [0]

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            asked[0] += 1
            if body[0].startswith(b"SSH"):
                await stream.send_all(body[0])
                return
            status = b"200 OK" if body[0] else b"500 No"
            head = b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            await stream.send_all(head % (status, len(body[0])) + body[0])

    (listener,) = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
    return f"http://127.0.0.1:{listener.socket.getsockname()[1]}/keys", body, asked


def key_set(**keys: Any) -> bytes:
    algorithms = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256"}
    entries = []
    for key_id, key in keys.items():
        name = next((a for kind, a in algorithms.items() if isinstance(key, kind)), "EdDSA")
        jwk = jwt.get_algorithm_by_name(name).to_jwk(key.public_key(), as_dict=True)
        entries.append({**jwk, "kid": key_id, "use": "sig"})
    return json.dumps({"keys": entries}).encode()


async def test_a_byte_order_mark_is_passed_over(jwks: Any, tmp_path: Path) -> None:
    url, body, _ = jwks
    path = tmp_path / "key.pem"
    token = jwt.encode(claims(), RSA, "RS256", {"kid": "one"})
    body[0] = b"\xef\xbb\xbf" + key_set(one=RSA)
    path.write_bytes(b"\xef\xbb\xbf" + pem(RSA))
    for settings in (
        Auth(algorithm="RS256", jwks_url=url),
        Auth(algorithm="RS256", public_key_file=path),
    ):
        assert (await JwtAuthenticator(settings, None)(token)).user == "4"


async def test_keys_behind_a_url(jwks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, body, asked = jwks
    authenticate = JwtAuthenticator(Auth(algorithm="RS256", jwks_url=url), None)
    token = jwt.encode(claims(), RSA, "RS256", {"kid": "one"})

    with pytest.raises(SourceError, match="cannot fetch"):  # a server's fault, and no token's
        await authenticate(token)
    with pytest.raises(SourceError):
        await authenticate(token)
    assert asked == [1]  # not asked again a moment later
    with pytest.raises(AuthenticationError, match="algorithm"):  # which no key could help
        await authenticate(jwt.encode(claims(), SECRET, "HS256", {"kid": "one"}))
    monkeypatch.setattr(jwks_keys, "RETRY_S", 0)

    body[0] = key_set(one=RSA)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(authenticate, token)
    assert asked == [2]  # once for all, and kept
    assert (await authenticate(jwt.encode(claims(), RSA, "RS256"))).user == "4"  # the only key

    other = rsa.generate_private_key(65537, 2048)
    rotated = jwt.encode(claims(), other, "RS256", {"kid": "two"})
    body[0] = key_set(one=RSA, two=other, three=EC)
    with pytest.raises(AuthenticationError, match="key that is not known yet") as refused:
        await authenticate(rotated)
    assert refused.value.not_yet  # by then the keys will have been fetched again
    assert asked == [2]  # ids that anyone can invent make us ask only now and then
    monkeypatch.setattr(jwks_keys, "COOLDOWN_S", -1)
    assert (await authenticate(rotated)).user == "4"
    assert asked == [3]
    invented = jwt.encode(claims(), other, "RS256", {"kid": "nobody's"})
    with pytest.raises(AuthenticationError, match=r"not known$") as refused:
        await authenticate(invented)  # and asked for just now
    assert not refused.value.not_yet

    monkeypatch.setattr(jwks_keys, "LIFESPAN_S", -1)
    for outage in (b"", b"[" * 100_000, b"<html>Log in here</html>", b"SSH-2.0\r\n\r\n"):
        body[0] = outage
        assert (await authenticate(token)).user == "4"  # an outage does not forget what is known
    body[0] = b""
    monkeypatch.setattr(jwks_keys, "LIFESPAN_S", 300)
    monkeypatch.setattr(jwks_keys, "COOLDOWN_S", 30)
    for bad in (
        jwt.encode(claims(), RSA, "RS256"),  # which of them is meant?
        jwt.encode(claims(), other, "RS256", {"kid": "one"}),
        jwt.encode(claims(), RSA, "RS256", {"kid": "three"}),
        jwt.encode(claims(), EC, "ES256", {"kid": "three"}),
        jwt.encode(claims(), SECRET, "HS256", {"kid": "one"}),
    ):
        with pytest.raises(AuthenticationError):
            await authenticate(bad)


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        st.text(max_size=50),
        st.tuples(st.integers(0, 200), st.characters()).map(
            lambda change: signed()[: change[0]] + change[1] + signed()[change[0] + 1 :]
        ),
        st.dictionaries(
            st.sampled_from(["exp", "nbf", "iat", "sub", "aud", "iss", "jti"]),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
                lambda inner: st.lists(inner, max_size=2),
                max_leaves=3,
            ),
        ).map(lambda changes: signed(**changes)),
    )
)
def test_no_token_ends_in_anything_but_a_principal_or_a_refusal(token: str) -> None:
    authenticate = JwtAuthenticator(Auth(audience="a", issuer="i"), SECRET)

    async def check() -> None:
        with pytest.raises(AuthenticationError) as error:
            await authenticate(token)
        assert len(token) < 10 or token not in str(error.value)

    trio.run(check)


def test_the_data_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert data_dir() == tmp_path / "trading-push"
    assert data_dir().name == "trading-push"
    assert not data_dir().exists()


def test_the_demos_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    old = os.umask(0)
    try:
        secret = demo_secret(directory)
    finally:
        os.umask(old)
    assert len(secret) >= 32
    assert demo_secret(directory) == secret
    (path,) = directory.iterdir()  # and no draft is left
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert demo_secret(tmp_path / "other") != secret


def test_a_secret_that_others_can_read_or_that_is_damaged_is_not_used(tmp_path: Path) -> None:
    demo_secret(tmp_path)
    path = tmp_path / "jwt-secret"
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="other users can read"):
        demo_secret(tmp_path)
    path.chmod(0o600)
    path.write_text("")
    with pytest.raises(ConfigurationError, match="damaged"):
        demo_secret(tmp_path)
    with pytest.raises(ConfigurationError, match="set TRADING_PUSH_JWT_SECRET"):
        demo_secret(path)  # a file where a directory should be


def test_processes_that_race_for_the_secret_get_the_same_one(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from trading_push.auth import demo_secret; sys.stdin.readline(); "
        "print(demo_secret(pathlib.Path(sys.argv[1])))"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "data")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    secrets = {racer.communicate(timeout=30)[0] for racer in racers}
    assert len(secrets) == 1
    assert [racer.returncode for racer in racers] == [0] * 4
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["jwt-secret"]
