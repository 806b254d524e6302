"""SIGHUP: changed settings are taken over by a running server, and no connection notices."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from harness.support import SECRET, Process, client, serving

from trading_push import issue_token

OTHER = "another secret of at least 32 bytes"
CONFIG = """
[auth]
secret_file = "secret"
[server]
origins = "{origins}"
[log]
file = "log"
quiet = "{quiet}"
queue_lines = {queue}
[limits]
connections_per_user = {per_user}
"""


class Site:
    """A configuration that can be changed, with its secret in a file."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.config = home / "c.toml"
        self.secret(SECRET)
        self.write()

    def secret(self, secret: str, mode: int = 0o600) -> None:
        path = self.home / "secret"
        path.write_text(secret + "\n")
        path.chmod(mode)

    def write(
        self, origins: str = "", queue: int = 1000, quiet: str = "", per_user: int = 50
    ) -> None:
        text = CONFIG.format(origins=origins, queue=queue, quiet=quiet, per_user=per_user)
        self.config.write_text(text)

    def serving(self):
        return serving(self.home, "--config", str(self.config), secret=None)


def reload(server: Process, line: str = "配置已重新加载") -> None:
    seen = sum(line in each for each in server.err)
    server.popen.send_signal(signal.SIGHUP)
    server.wait_for_line(line, count=seen + 1)


def headers(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {issue_token(secret, '4', 3600)}"}


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_a_changed_secret_refuses_old_tokens_and_cuts_nobody(site):
    async def drive(server: Process) -> None:
        async with client(server.url, additional_headers=headers(SECRET)) as four:
            assert (await four.request("subscribe", args=["balance"]))["ok"]
            site.secret(OTHER)
            await asyncio.to_thread(reload, server)
            with pytest.raises(InvalidStatus) as refused:
                async with client(server.url, additional_headers=headers(SECRET)):
                    pass
            assert refused.value.response.status_code == 401
            async with client(server.url, additional_headers=headers(OTHER)) as other:
                assert (await other.request("ping"))["ok"]
            assert (await four.request("list"))["ok"]

    with site.serving() as server:
        asyncio.run(drive(server))
        assert server.traces() == []


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda site: site.secret("short"), "32"),
        (lambda site: site.secret(OTHER, 0o644), "chmod 600"),
        (lambda site: (site.home / "secret").unlink(), "secret_file"),
        (lambda site: site.config.write_text("[limits]\nconnections = 'x'"), "limits.connections"),
        (lambda site: site.config.write_text("[log]\nquiet = ''"), "no secret any more"),
        (lambda site: site.config.unlink(), "c.toml"),
    ],
    ids=["short", "readable", "no file", "bad value", "no secret", "no configuration"],
)
def test_what_cannot_be_used_changes_nothing(site, spoil, why):
    async def drive(server: Process) -> None:
        async with client(server.url, additional_headers=headers(SECRET)) as four:
            assert (await four.request("ping"))["ok"]

    with site.serving() as server:
        site.write(quiet="pushed")
        spoil(site)
        reload(server, "配置未重新加载")
        [said] = [line for line in server.err if "配置未重新加载" in line]
        assert why in said
        assert OTHER not in said
        asyncio.run(drive(server))
        assert server.traces() == []


def test_what_needs_a_restart_is_named(site):
    with site.serving() as server:
        site.write(origins="https://app.example.com", queue=900, quiet="pushed", per_user=1)
        reload(server)
        server.wait_for_line("需重启")
        [said] = [line for line in server.err if "需重启" in line]
        assert said.endswith(": log.queue_lines")
        reload(server)  # said again as long as it is so
        server.wait_for_line("需重启", count=2)


def test_limits_and_origins_are_taken_over(site):
    async def drive(server: Process) -> None:
        page = {"origin": "https://app.example.com"}
        with pytest.raises(InvalidStatus):
            async with client(server.url, **page):
                pass
        async with client(server.url, 4) as first:
            site.write(origins="https://app.example.com", per_user=1)
            await asyncio.to_thread(reload, server)
            async with client(server.url, **page):
                pass
            async with client(server.url) as second:
                with pytest.raises(ConnectionClosed) as closed:
                    await second.authenticate(4)
                assert closed.value.rcvd.code == 4504
            assert (await first.request("list"))["ok"]

    with site.serving() as server:
        asyncio.run(drive(server))


def test_where_standard_error_is_a_terminal_it_ends(tmp_path):
    ours, theirs = pty.openpty()
    env = {**os.environ, "TRADING_PUSH_JWT_SECRET": SECRET, "XDG_DATA_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "trading_push", "serve", "--port", "0"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=theirs) as server:
        assert server.stdout is not None
        assert b"Serving on" in server.stdout.readline()
        server.send_signal(signal.SIGHUP)
        assert server.wait(30) == 0
    os.close(theirs)
    os.close(ours)
