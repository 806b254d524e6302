"""Health, readiness, and what operators ask and do, over HTTP and from the command line."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import trio

from harness.room import lines
from harness.support import (
    PATIENCE_S,
    SECRET,
    hypercorn_serving,
    plain_hypercorn,
    token,
    trio_client,
    until,
)

from trading_push import SourceError, issue_token, open_push_service
from trading_push.settings.schema import Intervals, Settings
from trading_push.testing import peer
from trading_push.web import slices

ADMIN = issue_token(SECRET, "ops", 3600, {"admin": True})
GETS = ("/online", "/stats", "/connections")
POSTS = ("/kick", "/revoke")


def serving(source: Any = None):
    return open_push_service(
        source, settings=Settings(jwt_secret=SECRET, intervals=Intervals(*4 * [0.1]))
    )


async def ask(
    port: int, path: str, body: Any = None, bearer: str | None = ADMIN, **headers: str
) -> tuple[int, Any]:
    def blocking() -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        if bearer is not None:
            headers["Authorization"] = f"Bearer {bearer}"
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body)
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, sent, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    return await trio.to_thread.run_sync(blocking)


async def test_healthy_and_ready():
    async with serving() as service, hypercorn_serving(service) as port:
        assert await ask(port, "/healthz", bearer=None) == (200, {"status": "ok"})
        status, answer = await ask(port, "/readyz", bearer=None)
        assert (status, answer["status"]) == (200, "ok")
        assert answer["checks"] == {"accepting": "ok", "loop": "ok", "registry": "ok"}


async def test_in_a_drain_it_lives_and_is_not_ready():
    async with (
        serving() as service,
        hypercorn_serving(service) as port,
        trio_client(port, 4) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(service.drain, 5)
        await until(lambda: not service.context.connections.accepting)
        assert (await ask(port, "/healthz", bearer=None))[0] == 200
        status, answer = await ask(port, "/readyz", bearer=None)
        assert (status, answer["checks"]["accepting"]) == (503, "failed")
        assert (await ask(port, "/publish", {}))[0] == 503
        await client.socket.aclose()


async def test_a_source_that_is_away_is_degraded_and_503_where_that_is_asked_for():
    class Away:
        async def fetch(self, user_id: str, data_type: str) -> Any:
            raise SourceError("gone", everyone=True)

        async def fetch_many(self, users: Any, data_type: str) -> Any:
            raise SourceError("gone", everyone=True)

    async with (
        serving(Away()) as service,
        hypercorn_serving(service) as port,
        trio_client(port, 4, "balance"),
    ):
        await until(lambda: not service._upstream.state()["source"])
        status, answer = await ask(port, "/readyz", bearer=None)
        assert (status, answer["status"]) == (200, "degraded")
        assert answer["checks"]["source"] == "degraded"
        assert "gone" not in json.dumps(answer)
        assert (await ask(port, "/readyz?strict", bearer=None))[0] == 503


@pytest.mark.parametrize("bearer", [None, "rubbish", token(4), token("ops")])
async def test_nobody_else_administers(bearer):
    async with serving() as service, hypercorn_serving(service) as port:
        expected = 403 if bearer and bearer != "rubbish" else 401
        for path in GETS:
            assert (await ask(port, path, bearer=bearer))[0] == expected
        for path in POSTS:
            assert (await ask(port, path, {"user": "4"}, bearer=bearer))[0] == expected
        assert service.statistics().connections == 0


@pytest.mark.parametrize("claim", [False, 1, "true", ["admin"], None])
async def test_the_claim_is_true_and_nothing_else(claim):
    async with serving() as service, hypercorn_serving(service) as port:
        bearer = issue_token(SECRET, "ops", 60, {"admin": claim})
        assert (await ask(port, "/stats", bearer=bearer))[0] == 403


async def test_who_is_there():
    async with (
        serving() as service,
        hypercorn_serving(service) as port,
        trio_client(port, 4, "balance", "ticker.BTCUSDT"),
        trio_client(port, 4),
        trio_client(port, "bob"),
    ):
        status, answer = await ask(port, "/online")
        assert (status, answer) == (200, {"users_online": 2, "users": {"4": 2, "bob": 1}})
        status, answer = await ask(port, "/connections")
        assert (status, answer["total"]) == (200, 3)
        [row] = [row for row in answer["connections"] if row["channels"]]
        assert row["channels"] == ["balance", "ticker.BTCUSDT"]
        assert (row["user"], row["address"]) == ("4", "127.0.0.1")
        for query, count in (("q=bob", 1), ("q=127.0.0", 3), ("q=nobody", 0), ("limit=2", 2)):
            answer = (await ask(port, f"/connections?{query}"))[1]
            assert len(answer["connections"]) == count
        pages = [
            (await ask(port, f"/connections?limit=1&offset={offset}"))[1]["connections"]
            for offset in range(4)
        ]
        assert [len(page) for page in pages] == [1, 1, 1, 0]
        assert len({page[0]["id"] for page in pages[:3]}) == 3
        assert (await ask(port, "/connections?limit=x"))[0] == 400
        status, answer = await ask(port, "/stats")
        assert (status, answer["users_online"], answer["connections"]) == (200, 2, 3)


async def test_connections_come_and_go_while_they_are_listed(monkeypatch):
    monkeypatch.setattr(slices, "_SLICE_S", -1)
    monkeypatch.setattr(slices, "_CHUNK", 1)
    monkeypatch.setattr(slices, "_SORTED_AT_ONCE", 7)
    async with (
        serving() as service,
        hypercorn_serving(service) as port,
        trio.open_nursery() as nursery,
    ):

        async def stay(user: int, task_status: trio.TaskStatus[None]) -> None:
            async with peer(service, str(user)):
                task_status.started()
                await trio.sleep_forever()

        async def come_and_go() -> None:
            while True:
                async with peer(service, "passing"):
                    await trio.lowlevel.checkpoint()

        for user in range(50):
            await nursery.start(stay, user)
        nursery.start_soon(come_and_go)
        users = {str(user) for user in range(50)}
        status, answer = await ask(port, "/connections")
        assert status == 200
        ids = [row["id"] for row in answer["connections"]]
        assert ids == sorted(set(ids))
        assert users <= {row["user"] for row in answer["connections"]}
        status, answer = await ask(port, "/online")
        assert status == 200
        assert users <= answer["users"].keys()
        nursery.cancel_scope.cancel()


async def test_kick_says_who_did_it(caplog):
    caplog.set_level("INFO", "trading_push")
    async with serving() as service, hypercorn_serving(service) as port:
        async with trio_client(port, 4), trio_client(port, 4), trio_client(port, 5) as five:
            status, answer = await ask(port, "/kick", {"user": 4, "reason": "fraud"})
            assert (status, answer) == (200, {"ok": True, "closed": 2})
            assert "👮 ops断开了2个连接（4）: fraud" in lines(caplog)
            [row] = (await ask(port, "/connections?q=5"))[1]["connections"]
            assert row["user"] == "5"
            assert (await ask(port, "/kick", {"connection": row["id"]}))[1]["closed"] == 1
            await until(lambda: five.socket.closed)
            assert five.socket.closed.code == 4503
        async with trio_client(port, 4), trio_client(port, 5):
            assert (await ask(port, "/kick", {"all": True}))[1]["closed"] == 2


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"user": 4, "all": True},
        {"user": "4", "connection": "x"},
        {"user": ""},
        {"user": 4, "reason": 124 * "x"},
        {"user": 4, "reason": 42 * "断"},
        {"usr": 4},
        [],
        b"{",
        b"\xff",
        b"[" * 4000,
    ],
)
async def test_what_cannot_be_kicked(body):
    async with serving() as service, hypercorn_serving(service) as port:
        status, answer = await ask(port, "/kick", body)
        assert (status, answer["error"]["code"]) == (400, "bad_request")
        assert (await ask(port, "/kick", 5000 * b"x"))[0] == 413


async def test_no_page_of_another_origin_does_it():
    async with serving() as service, hypercorn_serving(service) as port:
        own = f"http://127.0.0.1:{port}"
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            assert (await ask(port, "/kick", {"all": True}, Origin=origin))[0] == 403
        assert (await ask(port, "/kick", {"all": True}, Origin=own))[0] == 200
        assert (await ask(port, "/kick", {"all": True}, bearer=None, Cookie="a=b"))[0] == 401


async def test_revoke():
    async with serving() as service, hypercorn_serving(service) as port:
        bearer = issue_token(SECRET, "4", 60, {"jti": "one"})
        headers = {"extra_headers": [(b"authorization", b"Bearer " + bearer.encode())]}
        async with trio_client(port, **headers) as client:
            answer = (await ask(port, "/revoke", {"token_id": "one"}))[1]
            assert answer == {"ok": True, "closed": 1}
            await until(lambda: client.socket.closed)
        assert (await ask(port, "/online", bearer=bearer))[0] == 401


async def run(port: int, *command: str, bearer: str = ADMIN) -> tuple[int, str, str]:
    def blocking() -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "trading_push", *command],
            env={**os.environ, "TRADING_PUSH_TOKEN": bearer},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return await trio.to_thread.run_sync(blocking)


async def test_the_same_from_the_command_line():
    async with serving() as service, hypercorn_serving(service) as port:
        url = f"http://127.0.0.1:{port}"
        async with trio_client(port, 4), trio_client(port, 5):
            assert await run(port, "online", url) == (0, "4 1\n5 1\n", "")
            status, out, _ = await run(port, "stats", url)
            assert (status, json.loads(out)["connections"]) == (0, 2)
            assert await run(port, "kick", url, "--user", "4") == (0, "1 closed\n", "")
            assert await run(port, "kick", url, "--all") == (0, "1 closed\n", "")
            assert await run(port, "revoke", url, "--token-id", "x") == (0, "0 closed\n", "")
        status, _, err = await run(port, "online", url, bearer=token(4))
        assert status == 3
        assert "claim `admin`" in err
        assert (await run(port, "kick", url))[0] == 2
        assert (await run(port, "online", "http://127.0.0.1:1"))[0] == 4
        assert (await run(port, "online", "ws://127.0.0.1"))[0] == 2


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_publishing_to_one_of_several_processes_is_refused(tmp_path, workers):
    def start() -> tuple[int, list[str]]:
        with plain_hypercorn(tmp_path, "-w", workers) as server:
            port = int(server.url.split(":")[2].split("/")[0])
            value = {"channel": "balance", "user": "4", "data": 1}
            bearer = issue_token(SECRET, "back end", 60, {"publish": True})
            status = trio.from_thread.run(ask, port, "/publish", value, bearer)[0]
            return status, list(server.err)

    status, said = await trio.to_thread.run_sync(start)
    assert status == (200 if workers == "1" else 501)
    assert any("POST /publish 被拒绝" in line for line in said) == (workers == "2")
