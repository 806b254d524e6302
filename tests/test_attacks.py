"""Hostile and broken peers on real sockets, at every door: ten healthy clients lose nothing."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from bystanders import (
    NEWS,
    admission,
    bystanders,
    frames_of,
    masked,
    raw_peer,
    said,
)
from test_close_codes import raw
from test_doors import RAW, Door, certificates, open_door

from trading_push.settings import Limits

__all__ = ["certificates"]

DOORS = ["linked", "plain", "native"]
at_every_door = pytest.mark.parametrize("kind", DOORS)


@pytest.fixture(autouse=True)
def no_trace(caplog):
    """Nothing that a peer does shows a trace."""
    caplog.set_level(logging.INFO)
    yield
    records = caplog.get_records("call")
    assert not [record for record in records if record.exc_info]
    lines = [record.getMessage() for record in records]
    assert not [line for line in lines if "Traceback" in line]
    # Behind the handshake nothing is so broken that it takes the firewall to stop it.
    assert not [line for line in lines if "已拦截异常连接" in line]


@asynccontextmanager
async def attacked(kind: str, certificates: Any, **limits: Any) -> AsyncIterator[Door]:
    """A door with ten healthy clients; when it is left, they alone are there, and lost nothing."""
    # None of the others answers a close frame.
    quick = Limits(close_timeout_s=0.1, **limits)
    async with (
        open_door(kind, certificates, limits=quick, channels=[NEWS]) as door,
        bystanders(door),
    ):
        yield door


def closes(caplog: pytest.LogCaptureFixture) -> list[int]:
    """The codes of the connections that have ended, from the log."""
    lines = [message for message in caplog.messages if "连接关闭: code=" in message]
    return [int(line.split("code=")[1].split()[0]) for line in lines]


TEXT, MORE, LAST = 0x81, 0x01, 0x80  # a whole text; the first part of one; its last part
BINARY, CLOSE, PING = 0x82, 0x88, 0x89


@at_every_door
async def test_as_many_fragments_as_a_message_may_have_work(kind, certificates):
    async with attacked(kind, certificates) as door, raw_peer(door.port) as peer:
        for number in range(3):  # each message has as many
            sent = masked(MORE, b"") + masked(0x00, b"") * 1087
            await peer.send(sent + masked(LAST, b'{"op":"ping","id":%d}' % number))
            [(_, pong)] = frames_of(await peer.until(lambda frames: frames))
            assert json.loads(pong)["id"] == number


@pytest.mark.parametrize("kind", RAW)
@pytest.mark.parametrize("parts", [1, 2, 7])
async def test_a_message_of_just_the_limit_works(kind, certificates, parts):
    async with attacked(kind, certificates) as door, raw_peer(door.port) as peer:
        text = b'{"op":"ping","id":1' + b" " * (65_536 - 20) + b"}"
        size = len(text) // parts
        for place in range(parts):
            end = len(text) if place == parts - 1 else (place + 1) * size
            first = (MORE if place == 0 else 0x00) | (LAST if place == parts - 1 else 0x00)
            await peer.send(masked(first, text[place * size : end]))
        [(_, pong)] = frames_of(await peer.until(lambda frames: frames))
        assert json.loads(pong)["id"] == 1


@at_every_door
async def test_a_flood_that_is_not_served_leaves_nothing_behind(kind, certificates):
    requests = said(op="ping") * 100_000

    def flood(port: int, before: bytes) -> None:
        with raw(f"ws://127.0.0.1:{port}/ws") as sock:
            sock.sendall(before)
            pour(sock, requests, 1)  # and goes, with its answers unread

    async with attacked(kind, certificates, handler_timeout_s=1, send_timeout_s=1) as door:
        for before in (b"", admission("news", "balance")) * 2:
            await trio.to_thread.run_sync(flood, door.port, before)


def pour(sock: socket.socket, data: bytes, times: int) -> None:
    """Send it again and again, until the server has gone."""
    with suppress(ConnectionError):
        for _ in range(times):
            sock.sendall(data)
