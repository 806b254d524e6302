"""A client that decides at random, and the model of the contract that it holds a server to.

Nothing here reads, writes or waits. `RandomClient` says what to do next; `Model` is told what was
sent and what came, and raises `Broken` with a full account when the protocol is not kept. Both are
driven by `random_drive.py`, over memory, over socket pairs and over TCP.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import attrs

from harness.json_cases import REFUSED

ABSENT: Any = object()
SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT")
USERS = tuple("123456")
EPSILON_S = 1e-6


# --- what there is to subscribe to ----------------------------------------------------------------


@attrs.frozen
class Spec:
    """One channel, as the service of `random_world.py` offers it."""

    kind: Literal["state", "events"] = "state"
    per_user: bool = True
    own: bool = False
    """Whether it is a stream with a generator, and an epoch, for each subscription."""


TICKER = Spec(per_user=False)
CHANNELS = {
    **dict.fromkeys(("balance", "positions", "pnl", "orders", "notes"), Spec()),
    **dict.fromkeys(("fills", "alerts"), Spec("events")),
    "board": Spec(per_user=False),
    "news": Spec("events", per_user=False),
    "gauge": Spec(own=True),
    "numbers": Spec("events", own=True),
    "wave": Spec(per_user=False),
    "pulse": Spec("events", per_user=False),
    **{f"ticker.{symbol}": TICKER for symbol in SYMBOLS},
}


def spec_of(channel: str) -> Spec:
    """What a channel is like."""
    return TICKER if channel.startswith("ticker.") else CHANNELS[channel]


@attrs.frozen
class Rules:
    """The limits of the server, as far as a client can tell that they are kept."""

    authentication_timeout_s: float = 3
    bad_messages: int = 10
    burst: int = 30
    window_s: float = 2
    close_timeout_s: float = 1
    expiry_notice_s: float = 3
    first_value_wait_s: float = 1
    heartbeat_s: float = 5
    leeway_s: float = 1
    pending_bytes: int = 65_536
    send_timeout_s: float = 3
    subscriptions: int = 8
    replaces: bool = False
    """Whether a user's connection too many takes the oldest one's place."""
    exact: bool = True
    """Whether the clock is simulated, so that nothing is late by itself."""

    @property
    def patience_s(self) -> float:
        """How late something may be that is due at once."""
        return 0.5 if self.exact else 20.0


class Broken(AssertionError):
    """The contract was broken: the rule, and how it came to that."""

    def __init__(self, rule: str, what: str, trace: Iterable[str] = ()) -> None:
        super().__init__("\n".join([f"{rule}: {what}", *(f"    {line}" for line in trace)]))
        self.rule = rule


# --- what was published -----------------------------------------------------------------------


Key = tuple[str, str | None, str]
"""A channel, whose it is, and an epoch."""


class Journal:
    """Every value that was published, by topic, epoch and `seq`.

    Args:
        complete: Whether `publish` is told of every value; else the first client to see a value
            says what it is, and all others must see the same.
        kept: How many values of an epoch are remembered.
    """

    def __init__(self, *, complete: bool, kept: int = 20_000) -> None:
        self.complete = complete
        self._kept = kept
        self._values: dict[Key, dict[int, bytes]] = {}
        self._newest: dict[tuple[str, str | None], tuple[str, int]] = {}
        self.faults: list[Broken] = []
        """What is wrong with the numbers themselves."""

    def publish(self, channel: str, user: str | None, epoch: str, seq: int, data: bytes) -> None:
        """Take a value that was published."""
        values = self._values.setdefault((channel, user, epoch), {})
        before = max(values, default=0)
        if seq != before + 1:
            self.faults.append(
                Broken("a number is left out", f"{channel} of {user}: {before}, {seq}")
            )
        values[seq] = data
        self._newest[channel, user] = epoch, seq

    def look_up(self, key: Key, seq: int, data: bytes) -> bytes | None:
        """What was published under a number; None where it never was."""
        if self.complete:
            return self._values.get(key, {}).get(seq)
        values = self._values.setdefault(key, {})
        found = values.setdefault(seq, data)
        while len(values) > self._kept:
            del values[next(iter(values))]
        return found

    def newest(self, channel: str, user: str | None) -> tuple[str, int] | None:
        """The position of a topic now, where that is known."""
        return self._newest.get((channel, user))

    def knows_epoch(self, key: Key) -> bool:
        """Whether an epoch was ever a topic's; always where not every value is told."""
        return not self.complete or key in self._values

    def size(self, key: Key, after: int, until: int) -> int:
        """How many bytes of data were published after one number, up to another."""
        values = self._values.get(key, {})
        return sum(len(values.get(seq, b"")) for seq in range(after + 1, until + 1))


# --- one connection ---------------------------------------------------------------------------


@attrs.define
class Token:
    """What an `auth` offers, and what may become of it."""

    user: str
    ttl_s: float | None = None
    name: str = "t"
    how: str = "good"
    """`good` or `slow`; or why not: `bad`, `expired`, `unavailable`, `bug`, `hang`."""
    revoked: bool = False
    """Whether it has been, or may have been, revoked."""

    @property
    def text(self) -> str:
        ttl = "" if self.ttl_s is None else f"{self.ttl_s:g}"
        return "~".join((self.user, ttl, self.name, self.how))


@attrs.define
class Item:
    """One item of a subscribe or unsubscribe request."""

    json: Any
    channel: str | None
    """The channel that it means; None where it is refused with `error`."""
    error: str | None = None
    max_hz: float | None = None
    since: tuple[str, int] | None = None
    believed: str | None = None
    """What the client last knew of the state at the position that it comes back from."""
    newest: tuple[str, int] | None = None
    """The topic's position when the request was sent."""


@attrs.define
class Held:
    """One subscription, as its client sees it."""

    channel: str
    spec: Spec
    began: float
    max_hz: float | None
    recovered: bool
    epoch: str | None = None
    seq: int | None = None
    data: Any = ABSENT
    told: str | None = "live"
    """The last state told; None while any may be told."""
    believed: str | None = "live"
    """The state as its client knows it, also from before it came back."""
    pushes: int = 0
    data_at: float = -math.inf
    paced_at: float = -math.inf
    """When its `max_hz` was changed."""
    stalled: bool = False
    """Whether the client did not read for a while since it began."""
    behind: tuple[Any, float] | None = None
    """How it differs from its topic, and since when."""
    run: tuple[int, int] | None = None
    """For a stream of its own: which generator, and its last number."""


@attrs.define
class _Pending:
    op: str
    id: Any
    at: float
    judge: Callable[[dict[str, Any], float], None]
    refusal: str | None = None
    """The code that it is refused with for its form."""
    token: Token | None = None
    text: str = ""
    cost: int = 1
    """How many messages it counts as."""


class Model:
    """What one connection may see, and what it must.

    Args:
        rules: The server's limits.
        journal: What was published.
        now: When it connected.
        name: For the account of what went wrong.
        greeted: Whom the handshake has authenticated, where it has.
    """

    def __init__(
        self, rules: Rules, journal: Journal, now: float, name: str, greeted: Token | None = None
    ) -> None:
        self.rules = rules
        self.journal = journal
        self.name = name
        self.began = now
        self.user: str | None = None
        self.conn: str | None = None
        self.held: dict[str, Held] = {}
        self.counts: Counter[str] = Counter()
        self.tokens: list[Token] = []
        self.token: Token | None = None
        """The last one that was accepted."""
        self.limit = math.inf
        """When its token ends, the leeway counted in."""
        self.may_close: set[int] = set()
        self.must_end_by = math.inf
        self.doomed = ""
        """Why no request is answered any more."""
        self.leaving: str | None = None
        self.close_sent: int | None = None
        self.reading_since = now
        self.stalls = False
        self.longest_stall_s = 0.0
        self.heard_at = now
        """When the server last heard of the client."""
        self.ended = False
        self.notice: dict[str, Any] | None = None
        self._pending: deque[_Pending] = deque()
        self._bad_in_a_row = self._bad_but_for_limits = 0
        # When messages were served, and what they cost; an answer that weighs much may cost more.
        self._served: deque[tuple[float, int, int]] = deque(maxlen=4 * rules.burst)
        self._limited: deque[float] = deque(maxlen=4 * rules.burst)
        self._last_reply_at = now
        self._waits_since = math.inf
        self._told_expiry = False
        self._trace: deque[tuple[float, str, Any]] = deque(maxlen=100)
        if greeted is not None:
            self.tokens.append(greeted)
            self._pending.append(
                _Pending("greeting", ABSENT, now, self._judge_auth(greeted), token=greeted)
            )

    # --- what the client does --------------------------------------------------------------

    def auth(self, token: Token, id_: Any, now: float) -> str:
        """Ask to be authenticated."""
        self.tokens.append(token)
        return self._ask(
            "auth", id_, now, self._judge_auth(token), token=token, fields={"token": token.text}
        )

    def subscribe(self, items: Sequence[Item], id_: Any, now: float) -> str:
        """Ask for subscriptions."""
        for item in items:
            if item.channel is not None:
                item.newest = self.journal.newest(item.channel, self._owner(item.channel))
        return self._ask(
            "subscribe",
            id_,
            now,
            lambda reply, at: self._judge_subscribe(items, reply, at),
            fields={"args": [item.json for item in items]},
            cost=1 + len(items) // 20,
        )

    def unsubscribe(self, items: Sequence[Item], id_: Any, now: float) -> str:
        """Ask for the end of subscriptions."""
        return self._ask(
            "unsubscribe",
            id_,
            now,
            lambda reply, at: self._judge_unsubscribe(items, reply),
            fields={"args": [item.json for item in items]},
            cost=1 + len(items) // 20,
        )

    def list(self, id_: Any, now: float) -> str:
        """Ask what is subscribed."""
        return self._ask("list", id_, now, lambda reply, at: self._judge_list(reply))

    def ping(self, id_: Any, now: float) -> str:
        """Ask for a pong."""
        return self._ask("ping", id_, now, lambda reply, at: self._judge_pong(reply))

    def malformed(self, text: str, code: str, id_: Any, now: float) -> str:
        """Say what is refused for its form."""
        self._note(now, "->", text)
        self._queue(_Pending("error", id_, now, self._no_judge, code, text=text[:80]))
        return text

    def _ask(
        self,
        op: str,
        id_: Any,
        now: float,
        judge: Callable[[dict[str, Any], float], None],
        *,
        token: Token | None = None,
        fields: dict[str, Any] | None = None,
        cost: int = 1,
    ) -> str:
        request = {"op": op, **({} if id_ is ABSENT else {"id": id_}), **(fields or {})}
        text = json.dumps(request)
        self._note(now, "->", text)
        self._queue(_Pending(op, id_, now, judge, token=token, text=text[:80], cost=cost))
        return text

    def _queue(self, pending: _Pending) -> None:
        self.heard_at = pending.at
        if not self._pending:
            self._waits_since = pending.at
        self._pending.append(pending)

    def leave(self, how: str, now: float, code: int | None = None) -> None:
        """The client goes, or does what it will be dropped for."""
        self._note(now, "->", f"[{how} {code or ''}]")
        self.leaving, self.close_sent = how, code

    def stall(self, now: float) -> None:
        """The client reads no more for a while."""
        self._note(now, "--", "stops reading")
        self.stalls, self._stalled_at = True, now

    def resume(self, now: float) -> None:
        """It reads again."""
        self._note(now, "--", "reads again")
        self.stalls = False
        self.longest_stall_s = max(self.longest_stall_s, now - self._stalled_at)
        self.reading_since = self._waits_since = now
        for held in self.held.values():
            held.stalled = True

    def condemn(self, code: int, now: float, *, surely: bool) -> None:
        """Somebody ends the connection with a code; `surely` where it is known to be reached."""
        self._note(now, "--", f"is ended with {code}{'' if surely else ', perhaps'}")
        self.may_close.add(code)
        if surely:
            self.must_end_by = min(self.must_end_by, now)

    # --- what comes ------------------------------------------------------------------------

    def receive(self, message: dict[str, Any], data: bytes | None, now: float) -> None:
        """Take one message, with its `data` as they came."""
        self._note(now, "<-", message)
        if self.ended:
            raise self._broken("something follows the close", str(message)[:200])
        if message.get("op") == "notice":
            self._notice(message, now)
        elif "op" in message:
            self._reply(message, now)
        else:
            self._push(message, data, now)

    def end(self, code: int | None, now: float) -> None:
        """The server has closed with a code; None where the stream has just ended."""
        self._note(now, "<-", f"[closed with {code}]")
        if self.ended:
            raise self._broken("something follows the close", f"another end: {code}")
        self.ended = True
        self.counts[f"closed with {code}"] += 1
        if not self._may_end(code, now):
            raise self._broken("a close code that nothing explains", f"{code}")

    def _may_end(self, code: int | None, now: float) -> bool:
        rules, late = self.rules, rules_late(self.rules)
        if self.leaving is not None and code is None:
            return True  # who goes, or breaks the frames, may be dropped
        if code is None:
            # What does not fit into its buffer cannot be told.
            return self.stalls or self.longest_stall_s > 0
        if code in self.may_close:
            return True
        first = next((each.token for each in self._pending if each.token is not None), None)
        match code:
            case 1002 | 1007 | 1009:
                return self.leaving == "rubbish"
            case 1003:
                return self.leaving == "binary"
            case 1012:
                return self.notice is not None or self.longest_stall_s > 0 or self.stalls
            case 4001:
                stall_s = max(self.longest_stall_s, now - self._stalled_at if self.stalls else 0)
                return stall_s >= rules.send_timeout_s - late
            case 4002:
                return now - self.heard_at >= 2 * rules.heartbeat_s - late
            case 4003:
                return self.user is not None and now >= self.limit - self.longest_stall_s - late
            case 4501:
                since = now - rules.window_s - self.longest_stall_s - late
                window = sum(at >= since for at in self._limited)
                return self._bad_but_for_limits >= rules.bad_messages or window >= rules.burst
            case 4502:
                return self.user is None and now - self.began >= (
                    rules.authentication_timeout_s - late
                )
            case 4504:
                return not rules.replaces and self.user is None and first is not None
            case 4505:
                return rules.replaces and bool(self.tokens)
        return self.leaving == "close" and code == self.close_sent

    def overdue(self, now: float) -> None:
        """Look for what should have come by now."""
        rules, patience = self.rules, self.rules.patience_s
        if self.ended or self.stalls or now - self.reading_since < patience:
            return
        pending_auth = self.asks_for_token
        if self.must_end_by + rules.close_timeout_s + patience < now and not pending_auth:
            raise self._broken("it should have ended", self.doomed or str(self.may_close))
        if self.leaving is not None:
            return
        if self._pending and not self.doomed:
            # A check of a token may take so long, and what was said behind it waits.
            wait_s = now - max(self._waits_since, self._pending[0].at)
            if wait_s > rules.authentication_timeout_s + patience:
                raise self._broken("no reply", f"to {self._pending[0].text} in {wait_s:.2f} s")
        if now > self.limit + patience + rules.close_timeout_s and not pending_auth:
            raise self._broken("the token has expired", f"at {self.limit:.2f}")
        if self.user is None and not pending_auth and not self.doomed:
            by = self.began + rules.authentication_timeout_s + rules.close_timeout_s + patience
            if now > by:
                raise self._broken("it should have ended", "not authenticated in time")
        for held in self.held.values():
            by = held.began + rules.first_value_wait_s + patience
            if not (held.pushes or held.recovered or held.stalled) and now > by:
                raise self._broken(
                    "neither a value nor a status", f"of {held.channel} since {held.began:.3f}"
                )

    def compare(self, held: Held, newest: tuple[str, int] | None, state: str, now: float) -> None:
        """Look whether a subscription has what its topic has had for a while.

        Args:
            held: The subscription.
            newest: The position of the topic's last value.
            state: Its state.
            now: The time.
        """
        mine = None if held.seq is None else (held.epoch, held.seq)
        if (mine, held.believed) == (newest, state):
            held.behind = None
            return
        period_s = 0 if held.max_hz is None else 1 / held.max_hz
        behind = (mine, held.believed), (newest, state)
        if held.behind is None or held.behind[0] != behind or self.reading_since > held.behind[1]:
            held.behind = behind, now
        elif now - held.behind[1] > self.rules.first_value_wait_s + period_s + 0.5:
            rule = "the newest value has not come" if mine != newest else "another state"
            raise self._broken(rule, f"{held.channel}: {behind[0]}, and there is {behind[1]}")

    # --- replies ---------------------------------------------------------------------------

    def _reply(self, message: dict[str, Any], now: float) -> None:
        if not self._pending:
            raise self._broken("a reply too many", str(message)[:300])
        if self.doomed:
            raise self._broken("a reply after the end was decided", f"{self.doomed}: {message}")
        pending = self._pending.popleft()
        before, self._last_reply_at = self._last_reply_at, now
        self._waits_since = now
        self.counts[f"reply to {pending.op}"] += 1
        expected = pending.id
        found = message.get("id", ABSENT)
        if expected is not _ANY and (type(found) is not type(expected) or found != expected):
            raise self._broken("another id", f"{message} to {pending.text}")
        error = message.get("error") if message.get("op") == "error" else None
        if error is not None and error.get("code") == "rate_limited":
            self._limit(pending.cost, message, before, now)
            return
        if pending.op != "greeting":
            self._count_served(pending, now)
        if pending.refusal is not None:
            self._refused(message, {pending.refusal})
            self._bad_in_a_row += 1
            self._bad_but_for_limits += 1
            if self._bad_in_a_row >= self.rules.bad_messages:
                self._doom("too many bad requests", {4501}, now)
            return
        if pending.op != "greeting":
            self._bad_in_a_row = self._bad_but_for_limits = 0
        if self.user is None and pending.op in ("subscribe", "unsubscribe", "list"):
            self._refused(message, {"not_authenticated"})
            return
        pending.judge(message, now)

    def _limit(self, cost: int, message: dict[str, Any], before: float, now: float) -> None:
        self._refused(message, {"rate_limited"})
        self._bad_in_a_row = 0
        self._limited.append(now)
        self.counts["rate_limited"] += 1
        # A message is taken when the reply before it has been written, or later; what is written
        # may have waited for the client to read.
        since = before - self.rules.window_s - self.longest_stall_s - rules_late(self.rules)
        served = sum(most for at, _, most in self._served if at >= since)
        # What an answer weighs is paid by the window after it, too.
        served += sum(
            most - least
            for at, least, most in self._served
            if since - self.rules.window_s <= at < since
        )
        if served + cost <= self.rules.burst:
            raise self._broken(
                "rate_limited too early", f"after {served} in {self.rules.window_s} s"
            )

    def _count_served(self, pending: _Pending, now: float) -> None:
        # One answer has at most the missed events of a connection, and some small values.
        heavy = 2 if pending.op == "subscribe" else 0
        self._served.append((now, pending.cost, pending.cost + heavy))
        window_s = self.rules.window_s
        if not self.rules.exact or self.reading_since > now - window_s:
            return
        served = sum(least for at, least, _ in self._served if at > now - window_s)
        if served > 2 * self.rules.burst:
            raise self._broken("the rate is not kept", f"{served} served in {window_s} s")

    def _doom(self, why: str, codes: set[int], now: float) -> None:
        self.doomed = why
        self.may_close |= codes
        self.must_end_by = min(self.must_end_by, now)

    def _refused(self, message: dict[str, Any], codes: Iterable[str]) -> None:
        self._keys(message, {"op", "ok", "error"}, {"id"})
        if message["op"] != "error" or message["ok"] is not False:
            raise self._broken("a wrong reply", f"{message}, not one of {codes}")
        self._error(message["error"], codes)

    def _error(self, error: Any, codes: Iterable[str]) -> None:
        if not isinstance(error, dict) or error.keys() != {"code", "message", "retryable"}:
            raise self._broken("the form of an error", str(error))
        if error["code"] not in codes:
            raise self._broken("another error", f"{error}, not one of {sorted(codes)}")
        if error["retryable"] is not (error["code"] in ("rate_limited", "internal")):
            raise self._broken("the form of an error", str(error))
        if not isinstance(error["message"], str) or not error["message"]:
            raise self._broken("the form of an error", str(error))

    def _keys(self, message: dict[str, Any], needed: set[str], allowed: set[str]) -> None:
        keys = set(message)
        if not needed <= keys <= needed | allowed:
            raise self._broken("the form of a message", f"{sorted(keys)} in {str(message)[:300]}")

    def _no_judge(self, message: dict[str, Any], now: float) -> None:
        raise self._broken("a wrong reply", str(message))

    def _judge_pong(self, message: dict[str, Any]) -> None:
        self._keys(message, {"op", "ts"}, {"id"})
        if message["op"] != "pong" or type(message["ts"]) is not int:
            raise self._broken("a wrong reply", str(message))

    def _judge_list(self, message: dict[str, Any]) -> None:
        self._keys(message, {"op", "ok", "channels"}, {"id"})
        if message["op"] != "list" or message["ok"] is not True:
            raise self._broken("a wrong reply", str(message))
        if message["channels"] != sorted(self.held):
            raise self._broken(
                "another list", f"{message['channels']}, and held are {sorted(self.held)}"
            )

    def _judge_auth(self, token: Token) -> Callable[[dict[str, Any], float], None]:
        def judge(message: dict[str, Any], now: float) -> None:
            if message.get("op") == "auth":
                self._authenticated(token, message, now)
            else:
                self._not_authenticated(token, message, now)

        return judge

    def _authenticated(self, token: Token, message: dict[str, Any], now: float) -> None:
        self._keys(message, {"op", "ok", "user", "conn", "expires_in", "heartbeat_s"}, {"id"})
        if token.how not in ("good", "slow") or message["ok"] is not True:
            raise self._broken("a token was accepted", f"{token}: {message}")
        if message["user"] != token.user or self.user not in (None, token.user):
            raise self._broken("another user", f"{message} for {token}, and it was {self.user}")
        if self.conn not in (None, message["conn"]):
            raise self._broken("another connection", str(message))
        renewed, old = self.user is not None, self.limit
        self.user, self.conn, self.token = token.user, message["conn"], token
        self.limit = math.inf
        if token.ttl_s is not None:
            self.limit = max(now + token.ttl_s + self.rules.leeway_s, old if renewed else 0)
        left = None if self.limit == math.inf else self.limit - now - self.rules.leeway_s
        told = message["expires_in"]
        slack = self.longest_stall_s + (1.5 if self.rules.exact else 5)
        if (told is None) is not (left is None) or (left is not None and abs(told - left) > slack):
            raise self._broken("another expiry", f"{told}, not {left}")
        if message["heartbeat_s"] != self.rules.heartbeat_s:
            raise self._broken("another heartbeat", str(message))
        self._told_expiry = False

    def _not_authenticated(self, token: Token, message: dict[str, Any], now: float) -> None:
        first = self.user is None
        if token.how in ("bug", "unavailable", "hang"):
            self._refused(message, {"internal"})
            if first or token.how == "bug":
                self._doom("an internal error", {1011}, now)
            return
        codes = {"bad": {"bad_token"}, "expired": {"token_expired"}}.get(token.how, set())
        if token.revoked:
            codes = {"bad_token"}
        if not first and token.user != self.user and not codes:
            codes = {"forbidden"}
        self._refused(message, codes)
        if first:
            self._doom("the token is bad", {4003 if "token_expired" in codes else 4500}, now)

    def _judge_unsubscribe(self, items: Sequence[Item], message: dict[str, Any]) -> None:
        for item, result in self._results("unsubscribe", items, message):
            if item.channel is None:
                continue
            self._keys(result, {"channel", "ok"}, set())
            self.held.pop(item.channel, None)

    def _judge_subscribe(self, items: Sequence[Item], message: dict[str, Any], now: float) -> None:
        for item, result in self._results("subscribe", items, message):
            channel = item.channel
            if channel is None or not result["ok"]:
                continue
            new = channel not in self.held
            wanted = {"max_hz"} if item.max_hz is not None else set()
            wanted |= {"recovered"} if new and item.since is not None else set()
            self._keys(result, {"channel", "ok"} | wanted, set())
            if item.max_hz is not None and result["max_hz"] != item.max_hz:
                raise self._broken("another max_hz", str(result))
            if not new:
                if item.max_hz is not None:
                    self.held[channel].max_hz = item.max_hz
                    self.held[channel].paced_at = now
                continue
            self._begin(item, channel, result.get("recovered", False), now)

    def _begin(self, item: Item, channel: str, recovered: bool, now: float) -> None:
        spec = spec_of(channel)
        held = Held(channel, spec, now, item.max_hz, recovered, stalled=self.stalls)
        self.held[channel] = held
        if not recovered:
            return
        assert item.since is not None
        self.counts["recovered"] += 1
        epoch, seq = item.since
        key = channel, self._owner(channel), epoch
        if spec.own or not self.journal.knows_epoch(key):
            raise self._broken("recovered from nowhere", f"{channel} {item.since}")
        held.epoch, held.seq, held.told, held.believed = epoch, seq, None, item.believed
        if spec.kind == "events" and item.newest is not None and item.newest[0] == epoch:
            size = self.journal.size(key, seq, item.newest[1])
            if size > self.rules.pending_bytes:
                raise self._broken(
                    "more at once than may be pending",
                    f"{size} bytes of {channel} from {seq} to {item.newest[1]}, recovered",
                )

    def _results(
        self, op: str, items: Sequence[Item], message: dict[str, Any]
    ) -> Iterable[tuple[Item, dict[str, Any]]]:
        # Item by item, since each changes how many subscriptions the next one finds.
        self._keys(message, {"op", "ok", "results"}, {"id"})
        results = message["results"]
        if message["op"] != op or len(results) != len(items):
            raise self._broken("a wrong reply", str(message)[:300])
        for item, result in zip(items, results, strict=True):
            self._keys(result, {"channel", "ok"}, {"max_hz", "recovered", "error"})
            error = item.error
            full = len(self.held) >= self.rules.subscriptions
            if op == "subscribe" and error is None and full and item.channel not in self.held:
                error = "too_many_subscriptions"
            if result["ok"] is not (error is None):
                raise self._broken("another result", f"{result} for {item.json}: {error}")
            if error is not None:
                self._keys(result, {"channel", "ok", "error"}, set())
                self._error(result["error"], {error})
            elif result["channel"] != item.channel:
                raise self._broken("another channel", f"{result} for {item.json}")
            yield item, result
        if message["ok"] is not all(result["ok"] for result in results):
            raise self._broken("`ok` is not that of the results", str(message)[:300])

    def _notice(self, message: dict[str, Any], now: float) -> None:
        self.counts[f"notice {message.get('code')}"] += 1
        match message.get("code"):
            case "shutdown":
                self._keys(message, {"op", "code", "reconnect_after_ms"}, set())
                self.notice = message
            case "token_expires":
                self._keys(message, {"op", "code", "expires_in"}, set())
                due = self.limit - self.rules.leeway_s - self.rules.expiry_notice_s
                late = self.longest_stall_s + rules_late(self.rules)
                if self._told_expiry or now < due - late:
                    raise self._broken("a notice without need", f"{message}, due at {due:.2f}")
                self._told_expiry = True
            case _:
                raise self._broken("an unknown notice", str(message))

    # --- pushes ----------------------------------------------------------------------------

    def _owner(self, channel: str) -> str | None:
        return self.user if spec_of(channel).per_user else None

    def _push(self, message: dict[str, Any], data: bytes | None, now: float) -> None:
        channel = message.get("channel")
        held = self.held.get(channel) if isinstance(channel, str) else None
        if held is None:
            raise self._broken("a push outside of a subscription", str(message)[:300])
        held.pushes += 1
        self.counts[f"push {message.get('type')}"] += 1
        if type(message.get("ts")) is not int:
            raise self._broken("the form of a push", str(message)[:300])
        match message.get("type"):
            case "status":
                self._status(held, message)
                return
            case "snapshot":
                self._keys(message, {"channel", "type", "epoch", "seq", "ts", "data"}, {"dropped"})
                self._snapshot(held, message)
            case "update":
                self._keys(
                    message, {"channel", "type", "epoch", "prev", "seq", "ts", "data"}, {"merged"}
                )
                self._update(held, message)
            case _:
                raise self._broken("the form of a push", str(message)[:300])
        self._value(held, message, data)
        self._pace(held, now)
        held.epoch, held.seq, held.data = message["epoch"], message["seq"], message["data"]
        held.data_at = now

    def _status(self, held: Held, message: dict[str, Any]) -> None:
        self._keys(message, {"channel", "type", "state", "ts"}, {"reason"})
        state, reason = message["state"], message.get("reason")
        if state not in ("live", "stale", "down"):
            raise self._broken("an unknown state", str(message))
        quiet = held.spec.kind == "events" and reason == "quiet" and held.pushes == 1
        if state == held.told and not quiet:
            raise self._broken("a state told twice", f"{held.channel} is {state} already")
        if state != "live" and not reason:
            raise self._broken("a state without a reason", str(message))
        if state == "stale" and held.seq is None:
            raise self._broken("stale without a value", str(message))
        held.told = held.believed = state

    def _snapshot(self, held: Held, message: dict[str, Any]) -> None:
        dropped, seq = message.get("dropped"), message["seq"]
        if dropped is not None and (held.spec.kind != "events" or dropped < 1):
            raise self._broken("dropped", str(message)[:300])
        if dropped is not None:
            self.counts["dropped"] += 1
        if held.epoch is not None and held.epoch == message["epoch"]:
            if dropped is None:
                raise self._broken(
                    "a snapshot within a chain",
                    f"{held.channel}: at {held.seq} of the same epoch, then {str(message)[:200]}",
                )
            assert held.seq is not None
            if dropped != seq - held.seq - 1:
                raise self._broken(
                    "a chain", f"{held.channel}: {held.seq}, then {seq} with dropped {dropped}"
                )
        elif held.epoch is not None:
            self.counts["new epoch"] += 1

    def _update(self, held: Held, message: dict[str, Any]) -> None:
        prev, seq, merged = message["prev"], message["seq"], message.get("merged")
        if held.seq is None:
            raise self._broken("an update before a snapshot", str(message)[:300])
        if prev != held.seq or message["epoch"] != held.epoch:
            raise self._broken(
                "a chain", f"{held.channel}: at {held.seq} of {held.epoch}, {str(message)[:200]}"
            )
        step = seq - prev
        if step < 1 or (held.spec.kind == "events" and step != 1):
            raise self._broken("a chain", f"{held.channel}: a step of {step}, {message}")
        if merged != (step if step > 1 else None):
            raise self._broken("merged", f"{held.channel}: a step of {step}, merged {merged}")
        if merged is not None:
            self.counts["merged"] += 1

    def _value(self, held: Held, message: dict[str, Any], data: bytes | None) -> None:
        value, channel = message["data"], held.channel
        if channel.startswith("ticker."):
            if value["symbol"] != channel.removeprefix("ticker."):
                raise self._broken("another symbol", str(message)[:300])
        elif not isinstance(value, dict) or value.get("user") != self._owner(channel):
            raise self._broken("another user's value", str(message)[:300])
        elif value.get("channel") != channel:
            raise self._broken("another channel's value", str(message)[:300])
        if held.spec.own:
            run, number = value["run"], value["n"]
            if held.run is not None and run == held.run[0] and number <= held.run[1]:
                raise self._broken("a stream goes back", str(message)[:300])
            if held.spec.kind == "events":
                first = held.run is None or run != held.run[0]
                if number != (0 if first else held.run[1] + 1):  # type: ignore[index]
                    raise self._broken("a stream's value is lost", str(message)[:300])
            held.run = run, number
            return
        key = channel, self._owner(channel), message["epoch"]
        shown = data if data is not None else json.dumps(value, separators=(",", ":")).encode()
        published = self.journal.look_up(key, message["seq"], shown)
        if published is None:
            raise self._broken("a value that nobody published", str(message)[:300])
        if published != shown and (data is not None or json.loads(published) != value):
            raise self._broken(
                "another value under one number", f"{str(message)[:300]}, not {published[:200]!r}"
            )

    def _pace(self, held: Held, now: float) -> None:
        # What was under way while the client did not read comes at once, and so does what it had
        # missed: that comes with the reply. Nor is called back what was under way at a change.
        if held.max_hz is None or not self.rules.exact or now in (held.began, held.paced_at):
            return
        if held.data_at <= self.reading_since:
            return
        period_s = 1 / held.max_hz
        if now - held.data_at < period_s - EPSILON_S:
            rule = "max_hz" if held.data_at > held.paced_at else "max_hz, from the last push on"
            raise self._broken(
                rule, f"{held.channel}: {now - held.data_at:.4f} s apart, not {period_s:.4f}"
            )

    # --- the account -----------------------------------------------------------------------

    @property
    def trace(self) -> Sequence[str]:
        """What was said last."""
        return [
            f"{now:9.3f} {arrow} {(said if isinstance(said, str) else json.dumps(said))[:260]}"
            for now, arrow, said in self._trace
        ]

    @property
    def asks_for_token(self) -> bool:
        """Whether it has said an `auth` whose reply has not come."""
        return any(each.token is not None for each in self._pending)

    def client_user(self) -> str | None:
        """Whom it is, or wants to be."""
        return self.user or (self.tokens[-1].user if self.tokens else None)

    def _note(self, now: float, arrow: str, said: Any) -> None:
        self._trace.append((now, arrow, said))

    def _broken(self, rule: str, what: str) -> Broken:
        self.ended = True
        return Broken(rule, f"{self.name}, user {self.user}: {what}", self.trace)


_ANY: Any = object()
"""An id that may be anything: of what is so broken that nobody can tell."""


def rules_late(rules: Rules) -> float:
    """By how much a moment may be missed."""
    return 0.1 if rules.exact else 3.0


# --- decisions --------------------------------------------------------------------------------


@attrs.frozen
class Say:
    """Send messages, one after the other at once; bytes are a binary one."""

    messages: tuple[str | bytes, ...]


@attrs.frozen
class Wait:
    """Do nothing for so many seconds, or read nothing either."""

    seconds: float
    stall: bool = False


@attrs.frozen
class Leave:
    """Go: `close` (with a code), `drop`, `eof`, `rubbish`, `binary`, or `dead`: silent for good."""

    how: str
    code: int | None = None


Step = Say | Wait | Leave

# What is refused for its form, by the code; what the contract will let stand is left out.
_MALFORMED = [
    (text, code)
    for code, texts in REFUSED.items()
    for text in texts.values()
    if len(text) < 2000 and "null" not in text and text.isprintable()
]


class RandomClient:
    """Decides what a trader's front end does next, by a seed; comes back with what it knows.

    Args:
        seed: All that it does follows from it, and from what the server says.
        number: Its own, for its name.
        pace_s: How long it waits between two steps, on an average.
    """

    def __init__(self, seed: int, number: int, *, pace_s: float = 0.4) -> None:
        self.rng = random.Random(f"{seed} {number}")
        self.number = number
        self._pace_s = pace_s
        self._visits = 0
        self._tokens = 0
        self.user = self.rng.choice(USERS)
        self.model: Model
        # The position of each topic, and what was known of its state, when it was last seen.
        self._known: dict[tuple[str, str], tuple[str, int, str | None]] = {}

    def begin(self, rules: Rules, journal: Journal, now: float, *, greeted: bool) -> Model:
        """Come, or come back."""
        self._visits += 1
        if self.rng.random() < 0.2:
            self.user = self.rng.choice(USERS)
        token = self._token("good") if greeted else None
        name = f"client {self.number}, visit {self._visits}"
        self.model = Model(rules, journal, now, name, token)
        return self.model

    def remember(self) -> None:
        """Keep where each subscription stands, to come back from."""
        user = self.model.user
        for channel, held in self.model.held.items():
            if user is not None and held.epoch is not None and held.seq is not None:
                self._known[user, channel] = held.epoch, held.seq, held.believed

    def decide(self, now: float) -> Step:
        """The next step."""
        rng, model = self.rng, self.model
        if model.user is None:
            return self._enter(now)
        dice = rng.random()
        if dice < 0.30:
            return Wait(rng.expovariate(1 / self._pace_s))
        if dice < 0.90:
            return self._ask(now)
        if dice < 0.93:
            return Say(tuple(self._bad(now) for _ in range(rng.choice((1, 1, 2, 5, 9, 11)))))
        if dice < 0.95:
            return Wait(rng.choice((0.2, 1.0, 2.0, 6.0)), stall=True)
        if dice < 0.96:
            return Say(tuple(self._any(now) for _ in range(rng.choice((10, 35, 50, 80)))))
        if dice < 0.97:
            return self._leave()
        return Wait(rng.expovariate(1 / self._pace_s))

    def calm(self, now: float) -> Step:
        """A step that changes nothing."""
        if self.model.user is None:
            return Wait(1.0)
        return Say((self.model.ping(self._id(), now),))

    def _leave(self) -> Leave:
        how = self.rng.choice(("close", "close", "drop", "eof", "rubbish", "binary", "dead"))
        return Leave(how, self.rng.choice((1000, 1001, 4000, 4999)) if how == "close" else None)

    def _enter(self, now: float) -> Step:
        rng, model = self.rng, self.model
        if any(token.how == "hang" for token in model.tokens):
            return Wait(1.0)
        dice = rng.random()
        if model.tokens:  # it is being looked at
            if dice < 0.7:
                return Wait(0.3)
            return Say((self._any(now),))
        if dice < 0.10:
            return Say((self._ask_without_leave(now),))
        if dice < 0.12:
            return Wait(rng.choice((1.0, 4.0)))
        if dice < 0.14:
            return self._leave()
        if dice < 0.16:
            return Say((self._bad(now),))
        how = "good"
        if rng.random() < 0.12:
            how = rng.choice(("slow", "bad", "expired", "unavailable", "bug", "hang"))
        said = [model.auth(self._token(how), self._id(), now)]
        if rng.random() < 0.5:
            said += [self._subscribe(now) for _ in range(rng.randrange(3))]
        return Say(tuple(said))

    def _ask_without_leave(self, now: float) -> str:
        return self.rng.choice((self._subscribe, self._unsubscribe, self._list, self._ping))(now)

    def _ask(self, now: float) -> Say:
        rng = self.rng
        dice = rng.random()
        if dice < 0.12:
            # Away and back without waiting for the reply, as a page does that is switched.
            names = self._channels(1 + rng.randrange(4), held=True)
            items = [self._wanted(name) for name in names]
            ends = [Item(name, name) for name in names]
            return Say(
                (
                    self.model.unsubscribe(ends, self._id(), now),
                    self.model.subscribe(items, self._id(), now),
                )
            )
        return Say((self._any(now),))

    def _any(self, now: float) -> str:
        dice = self.rng.random()
        if dice < 0.45:
            return self._subscribe(now)
        if dice < 0.75:
            return self._unsubscribe(now)
        if dice < 0.83:
            return self._list(now)
        if dice < 0.95:
            return self._ping(now)
        if dice < 0.98:
            return self._renew(now)
        return self._bad(now)

    def _list(self, now: float) -> str:
        return self.model.list(self._id(), now)

    def _ping(self, now: float) -> str:
        return self.model.ping(self._id(), now)

    def _renew(self, now: float) -> str:
        how = "good"
        if self.rng.random() < 0.3:
            how = self.rng.choice(("slow", "bad", "expired", "unavailable", "hang", "other"))
        if how == "other":
            token = self._token("good")
            token.user = self.rng.choice([user for user in USERS if user != self.user])
        else:
            token = self._token(how)
        return self.model.auth(token, self._id(), now)

    def _token(self, how: str) -> Token:
        self._tokens += 1
        ttl_s = self.rng.choice((None, None, None, 6.0, 15.0, 40.0))
        return Token(self.user, ttl_s, f"{self.number}-{self._tokens}", how)

    def _id(self) -> Any:
        rng = self.rng
        return rng.choice((ABSENT, rng.randrange(1000), -(2**53), 2**53, "", "x" * 64, "é\u2028"))

    # --- items -----------------------------------------------------------------------------

    def _channels(self, count: int, *, held: bool) -> list[str]:
        known = list(self.model.held) if held else []
        names = known if known and self.rng.random() < 0.8 else list(CHANNELS)
        return self.rng.sample(names, min(count, len(names)))

    def _subscribe(self, now: float) -> str:
        names = self._channels(self.rng.choice((1, 1, 2, 3, 5)), held=self.rng.random() < 0.15)
        items = [self._wanted(name) for name in names]
        if self.rng.random() < 0.1:
            items.insert(self.rng.randrange(len(items) + 1), self._odd_item())
        return self.model.subscribe(items, self._id(), now)

    def _unsubscribe(self, now: float) -> str:
        names = self._channels(self.rng.choice((1, 1, 2, 4)), held=True)
        items = [Item(self._spelt(name), name) for name in names]
        if self.rng.random() < 0.1:
            items.insert(self.rng.randrange(len(items) + 1), self._unknown_item())
        return self.model.unsubscribe(items, self._id(), now)

    def _spelt(self, channel: str) -> str:
        if self.rng.random() > 0.15:
            return channel
        if channel.startswith("ticker."):
            symbol = channel.removeprefix("ticker.")
            return self.rng.choice((f"ticker.{symbol.lower()}", f"ticker_{symbol}_{self._me}"))
        return f"{channel}_{self._me}"

    @property
    def _me(self) -> str:
        # Whose rooms it may name: requests behind an `auth` are looked at after it.
        return self.model.user or self.user

    def _wanted(self, channel: str) -> Item:
        rng = self.rng
        item = Item(self._spelt(channel), channel)
        known = self._known.get((self._me, channel))
        held = self.model.held.get(channel)
        if held is not None and held.epoch is not None and held.seq is not None:
            known = held.epoch, held.seq, held.believed
        fields: dict[str, Any] = {}
        if rng.random() < 0.25:
            item.max_hz = fields["max_hz"] = rng.choice((0.5, 1, 2, 4.0, 10, 33.3, 1000))
        if known is not None and rng.random() < 0.6:
            epoch, seq, item.believed = known
            if rng.random() < 0.2 and seq > 3:
                seq -= rng.randrange(3)
            if rng.random() < 0.05:
                epoch = "0123456789abcdef"
            item.since = epoch, seq
            fields["since"] = {"epoch": epoch, "seq": seq}
        if fields or rng.random() < 0.2:
            item.json = {"channel": item.json, **fields}
        return item

    def _odd_item(self) -> Item:
        odd: list[Any] = [
            *(1, True, [], {}, {"channel": 4}, {"max_hz": 1}, {"channel": "pnl", "x": 1}),
            *({"channel": "pnl", "max_hz": each} for each in (0, -1, 1000.5, "2", True)),
            *({"channel": "pnl", "since": each} for each in (1, {}, {"epoch": "", "seq": -1})),
        ]
        if self.rng.random() < 0.5:
            return Item(self.rng.choice(odd), None, "bad_request")
        return self._unknown_item()

    def _unknown_item(self) -> Item:
        other = self.rng.choice([user for user in USERS if user != self._me])
        names = {
            "nope": "unknown_channel",
            "": "unknown_channel",
            "ticker.": "unknown_channel",
            "BALANCE": "unknown_channel",
            "news_": "unknown_channel",
            f"balance_{other}": "forbidden",
            f"alerts_{other}": "forbidden",
            f"ticker_BTCUSDT_{other}": "unknown_channel",
        }
        name = self.rng.choice(list(names))
        return Item(name, None, names[name])

    def _bad(self, now: float) -> str:
        if self.rng.random() < 0.5:
            text, code = self.rng.choice(_MALFORMED)
            return self.model.malformed(text, code, _ANY, now)
        id_ = self._id()
        request: dict[str, Any] = {} if id_ is ABSENT else {"id": id_}
        request, code = self.rng.choice(
            [
                ({**request, "op": "nope"}, "unknown_op"),
                ({**request, "op": "ping", "x": 1}, "bad_request"),
                ({**request, "op": "subscribe"}, "bad_request"),
                ({**request, "op": "unsubscribe", "args": "balance"}, "bad_request"),
                ({**request, "op": "auth", "token": 4}, "bad_request"),
                ({**request, "op": 5}, "bad_request"),
                (request, "bad_request"),
            ]
        )
        return self.model.malformed(json.dumps(request), code, id_, now)
