"""Who gets in at the real endpoints, and that nobody there gets anything of another user's."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import random
import time
import unicodedata
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
import trio_websocket
from cryptography.hazmat.primitives.asymmetric import rsa

from harness.endpoints import answer_of, open_endpoint, served, status_of
from harness.handshakes import handshake
from harness.support import PATIENCE_S, SECRET, TrioClient, trio_client, until
from harness.tokens import RSA, claims, pem
from harness.tokens import signed as signed_with

from trading_push import JwtAuthenticator, PushService, open_push_service
from trading_push.endpoints.hypercorn.server import guard
from trading_push.settings.schema import Auth, Intervals, Limits, Settings
from trading_push.topics import BUILTIN_CHANNELS

at_each_endpoint = pytest.mark.parametrize("kind", ["linked", "plain", "native"])


def signed(key: Any = SECRET, algorithm: str = "HS256", **changes: Any) -> str:
    return signed_with(key, algorithm, **changes)


# --- tokens that are refused --------------------------------------------------------------------


def coded(part: Any) -> str:
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def unsigned(algorithm: Any, signature: bytes = b"") -> str:
    return f"{coded({'alg': algorithm, 'typ': 'JWT'})}.{coded(claims())}.{coded(signature)}"


def signed_by_hand(header: dict[str, Any], key: bytes) -> str:
    """HS256 with any key: PyJWT makes none with a public key's text."""
    said = f"{coded(header)}.{coded(claims())}"
    return f"{said}.{coded(hmac.new(key, said.encode(), hashlib.sha256).digest())}"


def in_s(seconds: float) -> int:
    return int(time.time() + seconds)


OTHER_SECRET = "another secret of at least thirty-two bytes"
OTHER_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
HS = {"alg": "HS256", "typ": "JWT"}
EXPIRED = ("token_expired", 4003)
BAD = ("bad_token", 4500)
NOT_YET = ("bad_token", 4003)

Case = tuple[Callable[[], Any], tuple[str, int]]
BY_SECRET: dict[str, Case] = {
    "expired": (lambda: signed(exp=in_s(-60)), EXPIRED),
    "expired just now": (lambda: signed(exp=in_s(-6)), EXPIRED),
    "expired long ago": (lambda: signed(exp=0), EXPIRED),
    "not yet valid": (lambda: signed(nbf=in_s(60)), NOT_YET),
    "made by a clock that is ahead": (lambda: signed(iat=in_s(8)), NOT_YET),
    "expired before it was valid": (lambda: signed(exp=in_s(-60), nbf=in_s(60)), NOT_YET),
    "another key": (lambda: signed(OTHER_SECRET), BAD),
    "another key and expired": (lambda: signed(OTHER_SECRET, exp=in_s(-60)), BAD),
    "alg none": (lambda: unsigned("none"), BAD),
    "alg None": (lambda: unsigned("None"), BAD),
    "alg nOnE with a signature": (lambda: unsigned("nOnE", b"x" * 32), BAD),
    "alg missing": (lambda: signed_by_hand({"typ": "JWT"}, SECRET.encode()), BAD),
    "alg empty": (lambda: unsigned(""), BAD),
    "alg a list": (lambda: unsigned(["HS256"]), BAD),
    "alg null": (lambda: unsigned(None), BAD),
    "another algorithm": (lambda: signed(SECRET * 2, "HS512"), BAD),
    "RS256 where it is HS256": (lambda: signed(RSA, "RS256"), BAD),
    "a header that brings its key": (
        lambda: signed_by_hand({**HS, "jwk": {"kty": "oct", "k": coded(b"x" * 32)}}, b"x" * 32),
        BAD,
    ),
    "without a signature": (lambda: signed().rpartition(".")[0] + ".", BAD),
    "without its last part": (lambda: signed().rpartition(".")[0], BAD),
    "a critical header": (lambda: signed_by_hand({**HS, "crit": ["x"]}, SECRET.encode()), BAD),
    "without exp": (lambda: signed(exp=None), BAD),
    "without sub": (lambda: signed(sub=None), BAD),
    "sub a number": (lambda: signed(sub=4), BAD),
    "sub true": (lambda: signed(sub=True), BAD),
    "sub a list": (lambda: signed(sub=["4"]), BAD),
    "sub an object": (lambda: signed(sub={"4": "4"}), BAD),
    "sub empty": (lambda: signed(sub=""), BAD),
    "sub of 65 characters": (lambda: signed(sub="4" * 65), BAD),
    "sub a lone surrogate": (lambda: signed(sub="\ud800"), BAD),
    "8 KiB and more": (lambda: signed(padding="x" * 7000), BAD),
    "empty": (lambda: "", BAD),
    "blank": (lambda: " ", BAD),
    "dots": (lambda: "..", BAD),
    "rubbish": (lambda: "rubbish.rubbish.rubbish", BAD),
    "not ASCII": (lambda: "é.ß.ı", BAD),
    "control characters": (lambda: "\x00\x1b[2J\u202e", BAD),
    "a line more": (lambda: signed() + "\n", BAD),
    "twice": (lambda: signed() + "." + signed(), BAD),
}
BY_PUBLIC_KEY: dict[str, Case] = {
    "another key": (lambda: signed(OTHER_RSA, "RS256"), BAD),
    "expired": (lambda: signed(RSA, "RS256", exp=in_s(-60)), EXPIRED),
    "the public key as a secret": (lambda: signed_by_hand(HS, pem(RSA)), BAD),
    "the public key's text, stripped": (lambda: signed_by_hand(HS, pem(RSA).strip()), BAD),
    "the public key as a secret, said to be RS256": (
        lambda: signed_by_hand({"alg": "RS256", "typ": "JWT"}, pem(RSA)),
        BAD,
    ),
    "a secret": (lambda: signed(), BAD),
    "alg none": (lambda: unsigned("none"), BAD),
}
OURS = {"aud": "push", "iss": "issuer"}
BY_AUDIENCE: dict[str, Case] = {
    "another aud": (lambda: signed(**OURS | {"aud": "other"}), BAD),
    "aud of other case": (lambda: signed(**OURS | {"aud": "Push"}), BAD),
    "aud that begins so": (lambda: signed(**OURS | {"aud": "push2"}), BAD),
    "no aud": (lambda: signed(**OURS | {"aud": None}), BAD),
    "no aud in a list": (lambda: signed(**OURS | {"aud": []}), BAD),
    "another iss": (lambda: signed(**OURS | {"iss": "other"}), BAD),
    "no iss": (lambda: signed(**OURS | {"iss": None}), BAD),
}


@pytest.fixture(scope="module")
def authenticators(tmp_path_factory):
    path = tmp_path_factory.mktemp("key") / "key.pem"
    path.write_bytes(pem(RSA))
    return {
        "secret": JwtAuthenticator(Auth(), SECRET),
        "public key": JwtAuthenticator(Auth(algorithm="RS256", public_key_file=path), None),
        "audience": JwtAuthenticator(Auth(audience="push", issuer="issuer"), SECRET),
    }


WAYS: dict[str, tuple[dict[str, Case], Callable[[], str]]] = {
    "secret": (BY_SECRET, lambda: signed()),
    "public key": (BY_PUBLIC_KEY, lambda: signed(RSA, "RS256")),
    "audience": (BY_AUDIENCE, lambda: signed(**OURS)),
}


@pytest.fixture
def everything_logged(caplog):
    """All that any logger says, at every level."""
    caplog.set_level(logging.DEBUG)
    return caplog


def assert_unsaid(caplog: pytest.LogCaptureFixture, token: str) -> None:
    """Neither the token nor its claims or signature, which would do as well, are in the log."""
    for part in {token, *token.split(".")}:
        if len(part) >= 16:
            assert part not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


async def ends_with(client: TrioClient) -> tuple[int, str]:
    with pytest.raises(trio_websocket.ConnectionClosed) as closed, trio.fail_after(5):
        while True:
            await client.receive()
    return closed.value.reason.code, closed.value.reason.reason or ""


@at_each_endpoint
@pytest.mark.parametrize("way", WAYS)
async def test_a_bad_token_in_a_request_is_the_end(
    kind, way, authenticators, certificates, everything_logged
):
    cases, good = WAYS[way]
    async with open_endpoint(kind, certificates, authenticate=authenticators[way]) as endpoint:
        stopped = endpoint.service.statistics().connections_stopped
        for name, (make, (error, code)) in cases.items():
            bad = make()
            async with endpoint.connect() as client:
                reply = await client.request("auth", id=name, token=bad)
                assert (reply["id"], reply["ok"]) == (name, False)
                assert reply["error"]["code"] == error, name
                not_yet = (error, code) == NOT_YET
                assert reply["error"]["retryable"] is not_yet, name
                if len(bad) >= 16:
                    assert bad not in json.dumps(reply)
                reason = "not valid yet" if not_yet else error
                assert await ends_with(client) == (code, reason), name
            assert_unsaid(everything_logged, bad)
        async with endpoint.connect() as client:
            taken = good()
            assert (await client.request("auth", token=taken))["user"] == "4"
        assert_unsaid(everything_logged, taken)
        # All that was refused in good order: no firewall had to end anything.
        assert endpoint.service.statistics().connections_stopped == stopped


@at_each_endpoint
@pytest.mark.parametrize("way", WAYS)
async def test_a_bad_token_in_the_handshake_is_a_401(
    kind, way, authenticators, certificates, everything_logged
):
    cases, good = WAYS[way]
    async with open_endpoint(kind, certificates, authenticate=authenticators[way]) as endpoint:
        for name, (make, end) in cases.items():
            bad = make().encode()
            if bad.strip() == b"" or any(byte < 32 for byte in bad):
                continue  # not to be told from no token, or no header of HTTP
            header = b"Authorization: Bearer " + bad
            answer = await answer_of(endpoint, handshake(header), certificates)
            status = int(answer.split(b" ")[1])
            # A header that is not ASCII is no HTTP to the native endpoint's library.
            assert status == 401 or (status == 400 and not bad.isascii()), name
            assert (b"not valid yet" in answer) == (end == NOT_YET), name
            assert_unsaid(everything_logged, bad.decode())
        taken = good().encode()
        header = b"Authorization: Bearer " + taken
        assert await status_of(endpoint, handshake(header), certificates) == 101
        assert_unsaid(everything_logged, taken.decode())


@at_each_endpoint
async def test_a_bad_renewal_leaves_the_session_as_it_was(
    kind, authenticators, certificates, everything_logged
):
    authenticate = authenticators["secret"]
    limits = Limits(messages_per_s=1000, messages_burst=1000)
    async with (
        open_endpoint(kind, certificates, authenticate=authenticate, limits=limits) as endpoint,
        endpoint.connect() as client,
    ):
        assert (await client.request("auth", token=signed()))["ok"]
        for name, (make, (error, _)) in BY_SECRET.items():
            bad = make()
            reply = await client.request("auth", token=bad)
            assert reply["error"]["code"] == error, name
            assert_unsaid(everything_logged, bad)
        # Another user's good one is refused as well, however alike.
        for other in ("5", "44", "4 ", " 4", "４", "4\0", "٤"):
            reply = await client.request("auth", token=signed(sub=other))
            assert reply["error"]["code"] == "forbidden"
        assert (await client.request("subscribe", args=["balance"]))["ok"]
        await endpoint.service.publish("balance", "mine", user=4)
        while (push := await client.push())["type"] == "status":
            pass
        assert push["data"] == "mine"


@at_each_endpoint
async def test_what_is_no_text_is_a_bad_request(kind, certificates):
    async with open_endpoint(kind, certificates) as endpoint:
        for wrong in (None, 4, True, ["x"], {"x": 1}):
            async with endpoint.connect() as client:
                reply = await client.request("auth", id=1, token=wrong)
                assert reply["error"]["code"] == "bad_request"
                reply = await client.request("auth", id=2)  # and none at all
                assert reply["error"]["code"] == "bad_request"
                reply = await client.request("subscribe", id=3, args=["balance"])
                assert reply["error"]["code"] == "not_authenticated"


@at_each_endpoint
async def test_a_token_of_100_kb(kind, certificates, everything_logged):
    long = signed(padding="x" * 75_000)
    assert len(long) > 100_000
    async with open_endpoint(kind, certificates) as endpoint:
        async with endpoint.connect(4, "balance") as healthy:
            async with endpoint.connect() as client:
                await client.socket.send_message(json.dumps({"op": "auth", "token": long}))
                if kind == "plain":  # where the server has a limit of its own, and a higher one
                    assert (await client.receive())["error"]["code"] == "bad_token"
                    assert await ends_with(client) == (4500, "bad_token")
                else:
                    assert (await ends_with(client))[0] == 1009
            header = b"Authorization: Bearer " + long.encode()
            # A request of that size is no request, and nobody looks for a token in it.
            assert await status_of(endpoint, handshake(header), certificates) in (400, 431)
            await endpoint.service.publish("balance", "on", user=4)
            while (push := await healthy.push())["type"] == "status":
                pass
            assert push["data"] == "on"
        assert_unsaid(everything_logged, long)


# --- another user's channels --------------------------------------------------------------------

# Users, each of whom somebody may take for another one.
ALIKE = [
    *("5", "x_5", "5_5", "_5", "05", "5.0", "+5", "5 ", " 5", "5\0", "5\u200b", "５", "٥", "⑤"),
    *("alice", "Alice", "ALICE", "аlice", "alice\n"),
    *("ß", "ss", "SS", "ẞ", "ſs", "i", "I", "ı", "İ", "i̇", "k", "K", "\u212a"),
    *(unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"), "ﬁ", "fi"),
    *("balance", "balance_5", "ticker.BTCUSDT", "BTCUSDT", "BTCUSDT_5", "ticker_BTCUSDT_5"),
    *("*", "%", "null", "None", "../5", "5;x", "a" * 64, "a" * 63),
]


def spellings(victim: str) -> list[str]:
    """How a stranger may try to name this user's channels."""
    names = []
    for channel in BUILTIN_CHANNELS:
        names += [
            *(f"{channel}{mark}{victim}" for mark in "_.:/-@#\0 "),
            *(f"{channel}_{victim}{tail}" for tail in (" ", "\0", "\t", "\u200b", "_", "\n")),
            *(f"{channel}_{form(victim)}" for form in (str.upper, str.lower, str.casefold)),
            *(f"{channel.upper()}_{victim}", f"{channel.capitalize()}_{victim}"),
            *(f" {channel}_{victim}", f"{channel}__{victim}", f"{channel}_x_{victim}"),
            f"ticker_{channel}_{victim}",
            f"ticker.{channel}_{victim}",
            "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in f"{channel}_{victim}"),
            channel.replace("a", "а").replace("s", "ѕ").replace("o", "о"),
            channel.replace("s", "ſ").replace("n", "\u0578") + f"_{victim}",
            *(channel + tail for tail in (" ", "\0", "\t", "\n", "\u200b", "_", ".", "_*", "_%")),
        ]
    return [name for name in dict.fromkeys(names) if name not in BUILTIN_CHANNELS]


def assert_own(result: Mapping[str, Any], name: str, user: str) -> None:
    """What was accepted is a ticker, which is everyone's, or the old name of the user's own."""
    channel = result["channel"]
    assert channel.startswith("ticker.") or name == f"{channel}_{user}", (user, name)


@at_each_endpoint
@pytest.mark.parametrize("victim", ["5", "x_5", "ß", "i", "k", "alice", "ticker.BTCUSDT"])
async def test_no_spelling_names_another_users_channel(kind, victim, certificates, caplog):
    limits = Limits(messages_per_s=1000, messages_burst=1000, subscriptions=1000)
    names = spellings(victim)
    async with open_endpoint(kind, certificates, limits=limits) as endpoint:
        for channel in BUILTIN_CHANNELS:
            await endpoint.service.publish(channel, f"a secret of {victim}", user=victim)
        for stranger in ALIKE:
            if stranger == victim:
                continue
            async with endpoint.connect(stranger) as client:
                for op, args in (
                    ("subscribe", names),
                    ("unsubscribe", names),
                    ("subscribe", [{"channel": name, "max_hz": 1000} for name in names]),
                ):
                    reply = await client.request(op, args=args)
                    for name, result in zip(names, reply["results"], strict=True):
                        if result["ok"]:
                            assert_own(result, name, stranger)
                        else:
                            assert result["error"]["code"] in ("forbidden", "unknown_channel")
                await endpoint.service.publish("balance", f"a secret of {victim}", user=victim)
                reply = await client.request("list")
                assert "a secret of" not in json.dumps([reply, client.pushes])
    assert not [record for record in caplog.records if record.exc_info]


# --- everybody's frames are their own -------------------------------------------------------

USERS = 500
VISITS = 2


class Owned:
    """A source whose values carry their owner and change at every fetch."""

    def __init__(self) -> None:
        self._count = 0

    async def fetch(self, user_id: str, data_type: str) -> Any:
        return (await self.fetch_many([user_id], data_type))[user_id]

    async def fetch_many(self, user_ids: Sequence[str], data_type: str) -> Mapping[str, Any]:
        await trio.lowlevel.checkpoint()
        self._count += 1
        mixed = sorted(user_ids, key=hash)  # in no order that was asked for
        return {user: owned(user, data_type, self._count) for user in mixed}


def owned(user: str, channel: str, count: int) -> list[dict[str, Any]]:
    # Of many lengths, so that a frame that was cut or put together wrongly shows.
    return [{"owner": user, "channel": channel, "count": count, "pad": "x" * (count % 300)}]


class Trader:
    """One client, who looks at every frame that comes."""

    def __init__(self, user: str, rng: random.Random) -> None:
        self.user = user
        self.frames: Counter[str] = Counter()
        self._rng = rng
        self._last: dict[str, dict[str, Any]] = {}

    def check(self, push: Mapping[str, Any]) -> None:
        if push["type"] == "status":
            return
        (value,) = push["data"]
        assert (value["owner"], value["channel"]) == (self.user, push["channel"]), push
        assert len(value["pad"]) == value["count"] % 300
        self.frames[push["channel"]] += 1
        self._last[push["channel"]] = {"epoch": push["epoch"], "seq": push["seq"]}

    async def request(self, client: TrioClient, op: str, **fields: Any) -> dict[str, Any]:
        reply = await client.request(op, **fields)
        while client.pushes:
            self.check(client.pushes.pop(0))
        return reply

    def items(self, places: list[dict[str, Any]]) -> list[Any]:
        """All four channels, some from where it was, some from where somebody else was."""
        items: list[Any] = []
        for channel in self._rng.sample(BUILTIN_CHANNELS, 4):
            since = self._rng.choice([None, self._last.get(channel), self._rng.choice(places)])
            items.append(channel if since is None else {"channel": channel, "since": since})
        return items

    async def visit(self, port: int, places: list[dict[str, Any]]) -> None:
        rng = self._rng
        async with trio_client(port, self.user) as client:
            reply = await self.request(client, "subscribe", args=self.items(places))
            assert reply["ok"], reply
            for _ in range(rng.randrange(2, 5)):
                for _ in range(rng.randrange(1, 6)):
                    self.check(await client.push())
                away = rng.sample(BUILTIN_CHANNELS, rng.randrange(5))
                assert (await self.request(client, "unsubscribe", args=away))["ok"]
                back = rng.sample(self.items(places), 4)
                assert (await self.request(client, "subscribe", args=back))["ok"]
            while any(self.frames[channel] < 1 for channel in BUILTIN_CHANNELS):
                self.check(await client.push())
            places += self._last.values()
            if rng.random() < 0.3:  # without a word
                client.socket._stream.socket.close()


async def publish_for_ever(service: PushService, users: list[str], rng: random.Random) -> None:
    count = 0
    while True:
        batch = []
        for user in rng.sample(users, 60):
            for channel in rng.sample(BUILTIN_CHANNELS, rng.randrange(1, 5)):
                count += 1
                batch.append((channel, owned(user, channel, count), user))
        rng.shuffle(batch)
        await service.publish_many(batch)
        # As fast as everybody reads, whatever the machine.
        await trio.testing.wait_all_tasks_blocked(0.005)


@asynccontextmanager
async def owned_service(kind: str, certificates: Any) -> AsyncIterator[tuple[PushService, int]]:
    limits = Limits(messages_per_s=1000, messages_burst=1000, unauthenticated_per_address=2 * USERS)
    settings = Settings(limits=limits, intervals=Intervals(2, 2, 2, 2))
    old, guard.limits = guard.limits, limits
    try:
        async with (
            open_push_service(
                Owned(), settings=settings, authenticate=JwtAuthenticator(Auth(), SECRET)
            ) as service,
            served(kind, service, certificates) as port,
        ):
            yield service, port
    finally:
        guard.limits = old


@pytest.mark.parametrize("kind", ["linked", "native"])
async def test_nobody_of_500_gets_a_frame_of_another_users(kind, certificates, caplog):
    rng = random.Random(500)
    users = [*ALIKE, *(f"{number}" for number in range(1000, 1000 + USERS - len(ALIKE)))]
    assert len(set(users)) == USERS
    places: list[dict[str, Any]] = [{"epoch": "none", "seq": 1}]
    async with owned_service(kind, certificates) as (service, port):
        traders = [Trader(user, random.Random(rng.random())) for user in users]

        async def comes_and_goes(trader: Trader, starts_in_s: float) -> None:
            await trio.sleep(starts_in_s)
            for _ in range(VISITS):
                await trader.visit(port, places)

        async with trio.open_nursery() as background:
            background.start_soon(publish_for_ever, service, users, rng)
            with trio.fail_after(4 * PATIENCE_S):
                async with trio.open_nursery() as everyone:
                    for trader in traders:
                        everyone.start_soon(comes_and_goes, trader, rng.random() * 3)
            background.cancel_scope.cancel()
        await until(lambda: not service.statistics().connections)
        assert service.statistics().ledger.connections_opened == USERS * VISITS
        assert service.statistics().ledger.balanced
    for trader in traders:
        assert set(trader.frames) == set(BUILTIN_CHANNELS)
    assert sum(sum(trader.frames.values()) for trader in traders) > 10 * USERS
    assert not [record for record in caplog.records if record.exc_info]
