"""`trading-push record`, and `serve --tape` that plays what it has written."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from harness.support import free_port, serving, token, trio_client

RECORD = [sys.executable, "-m", "trading_push", "record"]


def record(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RECORD, *args], capture_output=True, text=True, timeout=60, check=False, **options
    )


def pushes(*files: Path) -> list[dict[str, Any]]:
    found = []
    for path in files:
        raw = path.read_bytes()
        text = gzip.decompress(raw) if path.suffix == ".gz" else raw
        found += [json.loads(line) for line in text.splitlines()]
    return found


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port
    return port


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of user 4 of the demo: 200 pushes, their account among them."""
    home = tmp_path_factory.mktemp("home")
    path = home / "day.jsonl.gz"
    with serving(home, "--interval", "balance=0.2", "--interval", "pnl=0.2") as server:
        done = record(str(path), server.url, "--token", token(4), "--count", "200")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith(f"recorded 200 pushes in {path}")
    return path


def test_what_is_recorded(day: Path) -> None:
    lines = pushes(day)
    assert len(lines) == 200
    assert {line["user"] for line in lines} == {"4"}
    channels = {line["push"]["channel"] for line in lines}
    assert channels >= {"balance", "pnl", "positions", "orders", "ticker.BTCUSDT"}
    times = [line["recv_ns"] for line in lines]
    assert times == sorted(times)
    assert day.stat().st_mode & 0o777 == 0o600


async def test_a_recording_is_played_the_account_too(day: Path, tmp_path: Path) -> None:
    lines = pushes(day)
    said: dict[str, list[Any]] = {}
    for line in lines:
        if "data" in line["push"]:
            said.setdefault(line["push"]["channel"], []).append(line["push"]["data"])
    with serving(tmp_path, "--tape", str(day), "--loop") as server:
        async with trio_client(port_of(server.url), 4) as four:
            reply = await four.request("subscribe", args=["balance", "pnl", "ticker.BTCUSDT"])
            assert reply["ok"]
            wanted = {"balance", "pnl", "ticker.BTCUSDT"}
            while wanted:
                push = await four.push()
                if push.get("type") in ("snapshot", "update"):
                    assert push["data"] in said[push["channel"]], push
                    wanted.discard(push["channel"])
            reply = await four.request("subscribe", args=["ticker.NOPE"])
            assert reply["results"][0]["error"]["code"] == "unknown_channel"
        async with trio_client(port_of(server.url), 5) as five:
            await five.request("subscribe", args=["balance"])
            push = await five.push()
            assert (push["state"], push["reason"]) == ("down", "no_data")


def test_it_is_rotated_and_ends_in_time(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with serving(home) as server:
        args = ["--token", token(4), "--for", "1.5", "--rotate-bytes", "2000"]
        done = record(str(tmp_path / "day.jsonl"), server.url, *args)
        assert done.returncode == 0, done.stderr
        files = [Path(word) for word in done.stderr.split(" in ")[1].split()]
        assert [path.name for path in files[:3]] == ["day.jsonl", "day-2.jsonl", "day-3.jsonl"]
        assert all(path.stat().st_size >= 2000 for path in files[:-1])
        count = int(done.stderr.split()[1])
        assert len(pushes(*files)) == count > 5
        # Nothing is written over.
        again = record(str(tmp_path / "day.jsonl"), server.url, *args)
        assert again.returncode == 2
        assert "is there already" in again.stderr


def test_what_has_come_is_in_the_file_within_a_moment(tmp_path: Path) -> None:
    """Killed, it leaves what can be played."""
    path = tmp_path / "day.jsonl.gz"
    with serving(tmp_path / "home") as server:
        args = [*RECORD, str(path), server.url, "--token", token(4)]
        with subprocess.Popen(args, stderr=subprocess.DEVNULL) as process:
            lines: list[bytes] = []
            while len(lines) < 5:
                if path.exists():
                    lines = zlib.decompressobj(wbits=31).decompress(path.read_bytes()).splitlines()
                assert process.poll() is None
            process.kill()
    assert json.loads(lines[0])["push"]
    with serving(tmp_path / "again", "--tape", str(path)) as server:
        assert server.url


@pytest.mark.parametrize(
    ("args", "status", "complaint"),
    [
        (["{there}/day.jsonl"], 2, "record needs a token"),
        (["{there}/day.jsonl", "--token", "t", "--data", ",", "--ticker", ","], 2, "nothing to"),
        (["{there}/none/day.jsonl", "--token", "t"], 2, "No such file"),
        (["{there}/day.jsonl", "ws://127.0.0.1:{port}/ws", "--token", "t"], 4, "cannot reach"),
        (["{there}/day.jsonl", "http://x", "--token", "t"], 2, "give one like ws://"),
    ],
)
def test_what_cannot_be_recorded(
    tmp_path: Path, args: list[str], status: int, complaint: str
) -> None:
    done = record(*(arg.format(there=tmp_path, port=free_port()) for arg in args))
    assert (done.returncode, done.stdout) == (status, "")
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
