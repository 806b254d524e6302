"""The token of the HTTP source: in a file, or by a command; and its certificates."""

from __future__ import annotations

import os
import ssl
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
import trustme

from harness.http_service import answering, failure, reading, scripted
from harness.sources import Service

from trading_push import ConfigurationError
from trading_push.sources.http.source import HttpSource

URL = "https://host/{user_id}/{data_type}"


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    # As whoever changes it at once does: another file in its place.
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(mode)
    new.replace(path)
    return path


def sent(service: Service) -> list[str]:
    return [headers["authorization"].removeprefix("Bearer ") for headers in service.headers]


def needs(service: Service, good: list[str]) -> None:
    """Answer 401 to any token but the first one of a list."""

    def answer(path: str) -> tuple[int, bytes, dict[str, str]]:
        return (200 if sent(service)[-1] == good[0] else 401), b"1", {}

    service.answer = answer


# --- a file ---------------------------------------------------------------------------------------


async def test_a_token_file_is_read_again_when_it_has_changed(
    service: Service, tmp_path: Path
) -> None:
    path = written(tmp_path / "token", "\ufefffirst\n")
    async with reading(service.url(), token_file=path) as source:
        await source.fetch("4", "balance")
        written(path, "second\r\n")
        await source.fetch("4", "balance")
        path.write_text("third-one")  # in place
        await source.fetch("4", "balance")
    assert sent(service) == ["first", "second", "third-one"]


@pytest.mark.parametrize("bad", ["", "two words", None, "mode"])
async def test_a_file_that_cannot_be_used_leaves_the_token_as_it_was(
    service: Service, tmp_path: Path, bad: str | None
) -> None:
    path = written(tmp_path / "token", "first")
    good = ["first"]
    needs(service, good)
    async with reading(service.url(), token_file=path) as source:
        await source.fetch("4", "balance")
        if bad is None:
            path.unlink()
        else:
            written(path, "s3cret" if bad == "mode" else bad, 0o640 if bad == "mode" else 0o600)
        await source.fetch("4", "balance")
        good[0] = "second"
        error = await failure(source)
        assert "answered 401: look after http.token_file" in str(error)
        assert "s3cret" not in str(error)
        written(path, "second")
        await source.fetch("4", "balance")
    assert set(sent(service)) == {"first", "second"}


@pytest.mark.parametrize("bad", ["", "two words", None, "mode", "directory", "pipe", "ü"])
def test_a_file_that_cannot_be_used_at_the_start(tmp_path: Path, bad: str | None) -> None:
    path = tmp_path / "token"
    if bad == "directory":
        path.mkdir(mode=0o700)
    elif bad == "pipe":
        os.mkfifo(path, 0o600)
    elif bad is not None:
        written(path, bad, 0o644 if bad == "mode" else 0o600)
    with pytest.raises(ConfigurationError, match=r"http\.token_file") as caught:
        HttpSource(URL, token_file=path)
    assert str(path) in str(caught.value)


# --- a command ------------------------------------------------------------------------------------


class Command:
    """A command that writes the tokens `t1`, `t2`, …, or what it is told to."""

    def __init__(self, directory: Path) -> None:
        self._ran = directory / "ran"
        self._says = directory / "says"
        script = directory / "get token.py"  # a space: it is no shell that takes it apart
        script.write_text(
            "import os, pathlib, sys\n"
            "ran, says = map(pathlib.Path, sys.argv[1:3])\n"
            "count = len(ran.read_text()) + 1 if ran.exists() else 1\n"
            "ran.write_text('x' * count)\n"
            "print('s3cret on its error', file=sys.stderr)\n"
            "text = says.read_text() if says.exists() else f't{count}'\n"
            "exec(text) if text.startswith('import') else print(text)\n"
        )
        self.line = f'{sys.executable} "{script}" {self._ran} {self._says}'

    @property
    def runs(self) -> int:
        return len(self._ran.read_text()) if self._ran.exists() else 0

    def say(self, text: str) -> None:
        self._says.write_text(text)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


async def test_a_command_is_run_once_and_again_before_its_token_is_too_old(
    service: Service, command: Command, mock_clock: trio.testing.MockClock, capfd: Any
) -> None:
    options = {"token_command": command.line, "token_command_s": 60}
    async with reading(service.url(), **options) as source:
        async with trio.open_nursery() as nursery:
            for user in range(5):
                nursery.start_soon(source.fetch, str(user), "balance")
        assert (set(sent(service)), command.runs) == ({"t1"}, 1)
        mock_clock.jump(59)
        await source.fetch("4", "balance")
        mock_clock.jump(2)
        await source.fetch("4", "balance")
        # One that fails leaves the token as it was.
        command.say("import sys; sys.exit(3)")
        mock_clock.jump(61)
        await source.fetch("4", "balance")
        await source.fetch("4", "balance")
    assert (sent(service)[5:], command.runs) == (["t1", "t2", "t2", "t2"], 3)
    assert capfd.readouterr() == ("", "")


async def test_a_byte_order_mark_before_a_token_is_passed_over(
    service: Service, command: Command, tmp_path: Path
) -> None:
    command.say("\ufefft1\r")
    path = tmp_path / "token"
    path.write_bytes(b"\xef\xbb\xbft1\r\n")
    path.chmod(0o600)
    for options in ({"token_command": command.line}, {"token_file": path}):
        async with reading(service.url(), **options) as source:
            await source.fetch("4", "balance")
    assert sent(service) == ["t1", "t1"]


async def test_a_command_is_run_again_when_its_token_is_refused(
    service: Service, command: Command, mock_clock: trio.testing.MockClock
) -> None:
    good = ["t2"]
    needs(service, good)
    async with reading(service.url(), token_command=command.line) as source:
        async with trio.open_nursery() as nursery:
            for user in range(5):
                nursery.start_soon(source.fetch, str(user), "balance")
        assert command.runs == 2
        assert sent(service).count("t1") == 5
        # The same again is not asked for at full pace.
        good[0] = "other"
        command.say("t2")
        for _ in range(5):
            error = await failure(source)
            assert "answered 401: look after http.token_command" in str(error)
        assert command.runs == 3
        mock_clock.jump(10.1)
        command.say("other")
        await source.fetch("4", "balance")
        assert command.runs == 4


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("", "wrote something else than a token"),
        ("two s3crets", "wrote something else than a token"),
        ("import sys; print('s3cret'); sys.exit(3)", "ended with status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with status -9"),
    ],
)
async def test_a_command_that_gives_no_token(
    service: Service, command: Command, says: str, told: str
) -> None:
    command.say(says)
    async with reading(service.url(), token_command=command.line) as source:
        error = await failure(source)
        assert (error.retryable, str(error)) == (True, f"http.token_command {told}")
        command.say("good")
        await source.fetch("4", "balance")
    assert sent(service) == ["good"]


async def test_a_command_that_hangs(
    service: Service, command: Command, tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    command.say(f"import time; open({str(begun)!r}, 'w').close(); time.sleep(1000)")
    async with (
        reading(service.url(), token_command=command.line) as source,
        trio.open_nursery() as nursery,
    ):

        async def fail() -> None:
            assert "took longer than 10 s" in str(await failure(source))

        nursery.start_soon(fail)
        await trio.to_thread.run_sync(lambda: open(begun).close())
        mock_clock.jump(10.1)


@pytest.mark.parametrize("line", ["/nowhere/at-all", 'unclosed "', " ", "no-such-program x"])
def test_a_command_that_cannot_be_run(line: str) -> None:
    with pytest.raises(ConfigurationError, match=r"http\.token_command is not usable"):
        HttpSource(URL, token_command=line)


# --- certificates ---------------------------------------------------------------------------------


async def test_an_authority_and_a_certificate_of_ones_own(tmp_path: Path) -> None:
    authority = trustme.CA()
    ca_file, cert, key = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem"))
    authority.cert_pem.write_to_path(ca_file)
    issued = authority.issue_cert("client@example.com")
    cert.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    both = tmp_path / "both.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(both)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.maximum_version = ssl.TLSVersion.TLSv1_2  # the refusal comes in the handshake
    authority.issue_cert("localhost").configure_cert(tls)
    authority.configure_trust(tls)

    async def refuse(peer: Any) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await peer.stream.receive_some()

    async with scripted(answering, tls=tls) as (url, _):
        for files in ({"client_cert": cert, "client_key": key}, {"client_cert": both}):
            async with reading(url, ca_file=ca_file, **files) as source:
                assert bytes(await source.fetch("4", "balance")) == b'"/4/balance"'
    async with (
        scripted(refuse, tls=tls) as (url, _),
        reading(url, ca_file=ca_file) as source,
    ):
        assert (await failure(source)).retryable

    # What cannot be used is told at the start.
    other = authority.issue_cert("localhost")
    other_key = tmp_path / "other.pem"
    other.private_key_pem.write_to_path(other_key)
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    nowhere = tmp_path / "nowhere.pem"
    for options, name in (
        ({"ca_file": nowhere}, "ca_file"),
        ({"ca_file": empty}, "ca_file"),
        ({"client_cert": nowhere}, "client_cert"),
        ({"client_cert": cert}, "client_cert"),
        ({"client_cert": cert, "client_key": other_key}, "client_key"),
        ({"client_cert": cert, "client_key": empty}, "client_key"),
    ):
        with pytest.raises(ConfigurationError, match=rf"http\.{name}|http\.client_cert"):
            HttpSource(URL, **options)
