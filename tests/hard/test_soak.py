"""Minutes of a crowd that comes and goes among faults: `nox -s soak`, which prints figures.

Deselected by default; `TESTS_SOAK_S` says how long (1200 seconds).
"""

from __future__ import annotations

import math
import os
import random
import time
from statistics import linear_regression

import pytest

from harness.crowd import Crowd, Member, faults
from harness.embedded import Embedded, embed
from harness.frames import masked
from harness.support import SIX

pytestmark = pytest.mark.soak

SECONDS = float(os.environ.get("TESTS_SOAK_S", "1200"))
CLIENTS = 500
LOOK_EVERY_S = 15.0
RUBBISH = [
    b"\x81\x80\x00\x00\x00\x00",  # an empty message
    b"\x81\x05hello",  # unmasked
    b"\xc1\x80\x00\x00\x00\x00",  # a reserved bit
    b"\x83\x80\x00\x00\x00\x00",  # a reserved opcode
    b"\x81\xff" + b"\xff" * 8,  # a length of 2**64 - 1
    b"\x81\x82\x00\x00\x00\x00\xff\xfe",  # no UTF-8
    masked(0x81, b"{" * 200),
    masked(0x81, b'{"op":"subscribe","args":["balance_5"]}'),
]


class Visitors:
    """Clients who come, do one thing or another, and go; seeded."""

    def __init__(self, crowd: Crowd, seed: int) -> None:
        self.crowd = crowd
        self.rng = random.Random(seed)
        self.here: list[Member] = []
        self.came = self.faulty = 0

    def step(self) -> None:
        """Fill up to the number that is to be here, then let something happen to a few."""
        while len(self.here) < CLIENTS:
            channels = self.rng.sample([*SIX, "reports"], self.rng.randrange(1, 8))
            user = str(self.rng.randrange(100))
            self.here.append(self.crowd.add(user, *channels, reads=self.rng.random() > 0.02))
            self.came += 1
        for member in self.rng.sample(self.here, 8):
            self.meddle(member)
        gone = [member for member in self.here if member.gone]
        self.here = [member for member in self.here if not member.gone]
        for member in gone:
            assert member.rude or faults([member]) == []
            self.crowd.members.remove(member)

    def meddle(self, member: Member) -> None:
        if not member.ready:
            if self.rng.random() < 0.3:
                member.reset()
            return
        match self.rng.randrange(5):
            case 0:
                member.reset()
            case 1:
                member.leave()
            case 2:
                member.say(masked(0x88, (1000).to_bytes(2, "big")))
            case 3:
                self.faulty += 1
                member.rude = True
                member.say(self.rng.choice(RUBBISH))
            case 4:
                member.say(b"\x81\x85\x00")
                member.reset()


def figures(seen: dict) -> str:
    return (
        f"{seen['connections']} connections, {seen['tasks']} tasks, "
        f"{seen['descriptors']} descriptors, {seen['in_use_kib'] / 1024:.1f} MiB in use, "
        f"{seen['rss_kib'] / 1024:.1f} MiB resident, lag {seen['lag_s'] * 1000:.0f} ms at most"
    )


def rest(server: Embedded, visitors: Visitors, empty: dict) -> dict:
    """Everybody leaves; what is there when they have: no more than was there before."""
    for member in visitors.here:
        member.leave()
    visitors.here.clear()
    visitors.crowd.members.clear()
    return server.look_until(
        lambda seen: (
            seen["balanced"]
            and seen["users_online"] == 0
            # A fetch may be under way.
            and seen["tasks"] <= empty.get("tasks", math.inf) + 1
            and seen["descriptors"] <= empty.get("descriptors", math.inf)
        ),
        "the end of all",
    )


@pytest.mark.parametrize("endpoint", ["linked", "native"])
def test_nothing_grows(endpoint):
    flags = ["--faults", "7", "--limits"]
    limits = '{"unauthenticated_per_address": 2000, "send_timeout_s": 3, "heartbeat_s": 5}'
    with embed(*flags, limits) as server, Crowd(server.ports[endpoint]) as crowd:
        visitors = Visitors(crowd, 7)
        began = time.monotonic()
        points: list[tuple[float, int]] = []
        empty: dict = {}
        due = began + LOOK_EVERY_S
        while (now := time.monotonic()) < began + SECONDS / 2:  # for each endpoint a half
            visitors.step()
            crowd.during(0.1)
            if now >= due:
                due = now + LOOK_EVERY_S
                seen = rest(server, visitors, empty)
                empty = empty or seen
                points.append((now - began, seen["in_use_kib"]))
                print(f"[{endpoint} {now - began:5.0f} s] {visitors.came} came, {figures(seen)}")
        seen = rest(server, visitors, empty)
        assert seen["violations"] == []
        # The sources fail on purpose: what is logged of that is a line, and never a trace.
        assert server.process.traces() == []
        assert seen["failures"].get("feed", 0) > 0
        later = points[len(points) // 3 :]  # the first rounds fill caches
        slope = linear_regression(*zip(*later, strict=True)).slope * 60 if len(later) > 1 else 0
        print(
            f"{endpoint}: {visitors.came} came, {visitors.faulty} of them sent rubbish, "
            f"memory {slope:+.1f} KiB a minute, {figures(seen)}"
        )
        # In a short run the caches still fill.
        assert slope < 30 or SECONDS < 600, points
