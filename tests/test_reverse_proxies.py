"""The samples for nginx and Caddy, in the real programs: what they pass on, and what not."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from harness.readme import ROOT, block
from harness.reverse_proxies import SAMPLES, ReverseProxy, reverse_proxy
from harness.support import PATIENCE_S, SECRET, Client, Process, client, serving

from trading_push import issue_token

ADDRESS = "127.0.0.1"
KINDS = ["nginx", "caddy"]
PUBLISHER = issue_token(SECRET, "shop", 3600, {"publish": True})


def port_of(server: Process) -> int:
    return int(server.url.rsplit(":", 1)[1].split("/")[0])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    """A server that is configured as printed, for a proxy on the same machine."""
    own = '[channels.alerts]\nkind = "events"\n[channels.blob]\nper_user = false\n'
    (tmp_path / "trading-push.toml").write_text(block("proxied") + own)
    flags = ("--config", str(tmp_path / "trading-push.toml"))
    env = {"TRADING_PUSH_LIMITS_SEND_TIMEOUT_S": "1", "TRADING_PUSH_LIMITS_CLOSE_TIMEOUT_S": "0.2"}
    with serving(tmp_path, *flags, env=env) as running:
        yield running
        assert running.traces() == []


@pytest.fixture(params=KINDS)
def proxy(request: Any, server: Process, tmp_path: Path) -> Iterator[ReverseProxy]:
    with reverse_proxy(request.param, tmp_path, port_of(server)) as running:
        wait_for(running.port)
        yield running


@pytest.fixture(params=KINDS)
def opened_proxy(request: Any, server: Process, tmp_path: Path) -> Iterator[ReverseProxy]:
    with reverse_proxy(request.param, tmp_path, port_of(server), inside=True) as running:
        wait_for(running.port)
        yield running


def wait_for(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection((ADDRESS, port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the proxy does not answer"
            time.sleep(0.05)


def options(proxy: ReverseProxy, **more: Any) -> dict[str, Any]:
    tls = {"ssl": proxy.tls} if proxy.tls else {}
    there = {"host": ADDRESS, "port": proxy.port, "origin": proxy.origin, "proxy": None}
    return {**tls, **there, **more}


def ask(
    proxy: ReverseProxy,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    source: str = ADDRESS,
) -> tuple[int, bytes]:
    """Ask the proxy; the answer's status and body."""
    connection = http.client.HTTPConnection(ADDRESS, proxy.port, PATIENCE_S, (source, 0))
    connection.connect()
    if proxy.tls:
        connection.sock = proxy.tls.wrap_socket(connection.sock, server_hostname=proxy.host)
    try:
        connection.putrequest(method, path, skip_host=True)
        for name, value in {"Host": proxy.authority, **(headers or {})}.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("name", [*SAMPLES.values(), "trading-push.service"])
def test_the_docs_print_what_init_writes(name):
    blocks = {"nginx.conf": block("nginx"), "Caddyfile": block("caddy")}
    blocks["trading-push.service"] = block("systemd")
    assert (ROOT / "trading_push" / "data" / name).read_text(encoding="utf-8") == blocks[name]


def test_a_websocket_goes_through_with_the_client_s_own_address(proxy, server):
    async def use() -> None:
        # A client that is no proxy, and says that it is another one.
        forged = {"X-Forwarded-For": "203.0.113.9"}
        more = {"local_addr": ("127.0.0.2", 0), "additional_headers": forged}
        async with client(proxy.url, 4, **options(proxy, **more)) as four:
            await four.subscribe("ticker.BTCUSDT")
            await four.until(lambda push: push["type"] == "snapshot")
            await four.socket.close(1000, "done")

    asyncio.run(use())
    server.wait_for_line("🔌 连接关闭: code=1000 reason='done'")
    server.wait_for_line("🔌 WebSocket客户端连接 - 来自: 127.0.0.2")
    assert not any("203.0.113.9" in line for line in server.err)


@pytest.mark.parametrize("origin", ["https://evil.example.com", "http://localhost:5000"])
def test_pages_of_other_hosts_are_refused(proxy, origin):
    async def use() -> None:
        with pytest.raises(InvalidStatus, match="403"):
            async with client(proxy.url, 4, **options(proxy, origin=origin)):
                pass

    asyncio.run(use())


NOT_FOR_OUTSIDE = [
    *("/publish", "/healthz", "/readyz", "/metrics", "/online", "/stats", "/connections"),
    *("/kick", "/revoke", "/admin", "/nope", "/ws/", "/wsx", "/x/ws", "//publish", "/./stats"),
    *("/ws/../publish", "/static/../publish", "/static/%2e%2e/publish", "/socket.io/..%2fpublish"),
    *("/%70ublish", "/publish/", "/static", "/trading-push.js/x"),
]


def test_all_else_is_404_and_does_not_reach_the_server(proxy, server):
    token = issue_token(SECRET, "ops", 3600, {"publish": True, "admin": True})
    headers = {"Authorization": f"Bearer {token}"}
    value = b'{"channel":"alerts","user":"4","data":1}'
    for path in NOT_FOR_OUTSIDE:
        for method, body in (("GET", None), ("POST", value)):
            status, said = ask(proxy, method, path, body, headers)
            assert status == 404, (path, said)
            assert b"published" not in said
            assert b"status" not in said
    passed = [path for path in NOT_FOR_OUTSIDE if any(f"'{path}" in line for line in server.err)]
    # What a proxy makes of "..%2f" is its own affair: the server takes a path as it comes.
    assert set(passed) <= {"/socket.io/..%2fpublish"}


def test_what_clients_use_reaches_the_server(proxy):
    # A GET without an upgrade is the server's to answer, and so are paths that it has not.
    status, said = ask(proxy, "GET", "/ws")
    assert (status, b"this is a WebSocket" in said) == (404, True)
    for path in ("/", "/static/page.css", "/trading-push.js", "/asyncapi.json", "/socket.io/?a=1"):
        status, said = ask(proxy, "GET", path)
        assert status == 200 or b"the WebSocket is at /ws" in said, path


@pytest.mark.parametrize(
    ("upgrade", "connection", "status"),
    [
        ("websocket", "Upgrade", 101),
        ("WebSocket", "keep-alive, Upgrade", 101),  # as Firefox says it
        (None, "keep-alive", 404),
    ],
)
def test_upgrade_headers(proxy, upgrade, connection, status):
    raw = socket.create_connection((ADDRESS, proxy.port), PATIENCE_S)
    stream = proxy.tls.wrap_socket(raw, server_hostname=proxy.host) if proxy.tls else raw
    with stream:
        lines = [
            "GET /ws HTTP/1.1",
            f"Host: {proxy.authority}",
            *([] if upgrade is None else [f"Upgrade: {upgrade}"]),
            f"Connection: {connection}",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ]
        stream.sendall("\r\n".join([*lines, "", ""]).encode())
        assert stream.recv(4096).split()[1] == str(status).encode()


def test_the_inside_is_opened_to_addresses_that_are_named(opened_proxy):
    proxy, headers = opened_proxy, {"Authorization": f"Bearer {PUBLISHER}"}

    async def use() -> None:
        async with client(proxy.url, 4, **options(proxy)) as four:
            await four.subscribe("alerts")
            for data in ("small", "x" * 1_000_000):
                value = {"channel": "alerts", "user": "4", "data": data}
                post = ("POST", "/publish", json.dumps(value).encode(), headers)
                status, said = await asyncio.to_thread(ask, proxy, *post)
                assert (status, json.loads(said)) == (200, {"ok": True, "published": 1})
                if data == "small":
                    assert (await four.until(lambda push: "data" in push))["data"] == data

    asyncio.run(use())
    assert ask(proxy, "POST", "/publish", b"[]")[0] == 401
    assert ask(proxy, "POST", "/publish", b"x" * 2_000_000, headers)[0] == 413
    assert ask(proxy, "GET", "/healthz")[0] == 200
    assert ask(proxy, "GET", "/publish/x")[0] == 404
    for path in ("/publish", "/healthz", "/stats"):
        refused, _ = ask(proxy, "POST", path, b"[]", headers, source="127.0.0.2")
        assert refused in (403, 404), path
    forged = {**headers, "X-Forwarded-For": ADDRESS}
    assert ask(proxy, "GET", "/healthz", None, forged, source="127.0.0.2")[0] in (403, 404)


def test_a_client_that_does_not_read_is_found_and_harms_nobody(opened_proxy, server):
    proxy, headers = opened_proxy, {"Authorization": f"Bearer {PUBLISHER}"}
    value = json.dumps({"channel": "blob", "data": "x" * 900_000}).encode()

    async def read(other: Client, seen: list[int]) -> None:
        while True:
            seen.append(len(await other.socket.recv()))

    async def use() -> None:
        big = options(proxy, max_size=None)
        async with client(proxy.url, 4, **big) as slow, client(proxy.url, 5, **big) as other:
            await slow.subscribe("blob")
            await other.subscribe("blob")
            slow.socket.transport.pause_reading()
            seen: list[int] = []
            reading = asyncio.create_task(read(other, seen))
            async with asyncio.timeout(PATIENCE_S):
                while not any("4001" in line for line in server.err):
                    status, said = await asyncio.to_thread(
                        ask, proxy, "POST", "/publish", value, headers
                    )
                    assert status == 200, said
            before = len(seen)
            await asyncio.to_thread(ask, proxy, "POST", "/publish", value, headers)
            async with asyncio.timeout(PATIENCE_S):
                while len(seen) == before:
                    await asyncio.sleep(0.01)
            reading.cancel()
            slow.socket.transport.abort()

    asyncio.run(use())


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_proxy_passes_on_is_no_request_of_this_machine(kind, tmp_path):
    loopback = "http://localhost:5000"

    async def refused(url: str, **more: Any) -> bool:
        try:
            async with client(url, 4, proxy=None, **more):
                return False
        except InvalidStatus as error:
            return error.response.status_code == 403

    # The server knows of no proxy: only what the request looks like tells.
    with serving(tmp_path) as server:
        assert not asyncio.run(refused(server.url, origin=loopback))
        foreign = f"ws://push.example.com:{port_of(server)}/ws"  # DNS that was pointed here
        there = {"host": ADDRESS, "port": port_of(server), "origin": loopback}
        assert asyncio.run(refused(foreign, **there))
        with reverse_proxy(kind, tmp_path, port_of(server)) as proxy:
            wait_for(proxy.port)
            for host in ("localhost", ADDRESS, "push.example.com"):
                for headers in ({}, {"X-Forwarded-For": ADDRESS}, {"X-Real-IP": ADDRESS}):
                    tls = {"ssl": proxy.tls, "server_hostname": proxy.host} if proxy.tls else {}
                    url = f"{'wss' if proxy.tls else 'ws'}://{host}:{proxy.port}/ws"
                    there = {"host": ADDRESS, "port": proxy.port, "origin": loopback, **tls}
                    assert asyncio.run(refused(url, additional_headers=headers, **there)), host
