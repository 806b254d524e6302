"""`GET /metrics`: what is counted, how it is told, and to whom."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections import defaultdict
from contextlib import closing
from functools import partial
from typing import Any

import jwt
import pytest
import trio
import trio.testing
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from harness.crowd import Crowd
from harness.readme import ROOT, block
from harness.support import PATIENCE_S, SECRET, hypercorn_serving, token, trio_client, until

from trading_push import Channel, SourceError, issue_token, open_push_service
from trading_push.endpoints.admission import REASONS
from trading_push.errors import CloseCode
from trading_push.histogram import Histogram
from trading_push.settings.schema import Intervals, Limits, Server, Settings, Web
from trading_push.testing import peer

ADMIN = issue_token(SECRET, "ops", 3600, {"admin": True})
METRICS = issue_token(SECRET, "prometheus", 3600, {"metrics": True})

# The list of the design, with the labels of each; a histogram is named without its parts.
EXPECTED = {
    "build_info": {"version", "python"},
    "connections": {"endpoint"},
    "users": set(),
    "subscriptions": {"channel"},
    "topics": {"channel", "state"},
    "connections_opened_total": {"endpoint"},
    "connections_closed_total": {"code"},
    "handshakes_refused_total": {"reason"},
    "authentications_total": {"result"},
    "requests_total": {"op", "result"},
    "resumes_total": {"recovered"},
    "publications_total": {"channel"},
    "deliveries_total": {"channel"},
    "delivered_bytes_total": set(),
    "merged_total": {"channel"},
    "dropped_total": {"channel"},
    "pending_bytes": set(),
    "fetches_total": {"channel", "result"},
    "fetch_duration_seconds": {"channel"},
    "source_age_seconds": set(),
    "publish_to_socket_seconds": set(),
    "loop_lag_seconds": set(),
    "feed_up": {"feed"},
    "ledger_open": {"what"},
    "log_lines_dropped_total": set(),
}
CHANNELS = {
    "balance",
    "positions",
    "pnl",
    "orders",
    "fills",
    "news",
    "ticker",
    "ticker.*",
    "candles",
}
WEBSOCKET = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec_WebSocket_Version": "13",
    "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
NEWS = Channel("news", "events", per_user=False)


class AFeed:
    async def run(self, sink: Any) -> None:
        await trio.sleep_forever()

    def knows(self, symbol: str) -> bool:
        return True


class ASource:
    """Answers, or fails, as the test says."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def fetch_many(self, users: Any, data_type: str) -> Any:
        if self.error is not None:
            raise self.error
        return {user: [] for user in users}

    async def fetch(self, user: str, data_type: str) -> Any:
        return (await self.fetch_many([user], data_type))[user]


def serving(who: str = "local", source: Any = None, feed: Any = None, **more: Any) -> Any:
    settings = Settings(
        jwt_secret=SECRET, intervals=Intervals(*4 * [0.1]), web=Web(metrics=who), **more
    )
    return open_push_service(source, settings=settings, feed=feed, channels=[NEWS])


async def ask(
    port: int, path: str = "/metrics", bearer: str | None = None, **headers: str
) -> tuple[int, str, str]:
    """The status, the type and the text of an answer."""

    def blocking() -> tuple[int, str, str]:
        if bearer is not None:
            headers["Authorization"] = f"Bearer {bearer}"
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        with closing(connection):
            connection.request("GET", path, None, sent)
            response = connection.getresponse()
            return response.status, response.headers["content-type"], response.read().decode()

    return await trio.to_thread.run_sync(blocking)


class Scraped:
    """The samples of one answer."""

    def __init__(self, text: str, parse: Any = text_string_to_metric_families) -> None:
        self.families = {family.name: family for family in parse(text)}
        self.samples = [sample for each in self.families.values() for sample in each.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of what has these labels."""
        found = [
            sample.value
            for sample in self.samples
            if sample.name == f"trading_push_{name}" and labels.items() <= sample.labels.items()
        ]
        assert found, name
        return sum(found)

    def labels(self, name: str) -> list[dict[str, str]]:
        return [each.labels for each in self.samples if each.name == f"trading_push_{name}"]


async def scrape(port: int) -> Scraped:
    status, _, text = await ask(port)
    assert status == 200, text
    return Scraped(text)


@pytest.mark.parametrize("openmetrics", [False, True])
async def test_every_metric_is_there_from_zero_with_every_label(openmetrics):
    async with (
        serving(source=ASource(), feed=AFeed()) as service,
        hypercorn_serving(service) as port,
    ):
        accept = "application/openmetrics-text; version=1.0.0; charset=utf-8" if openmetrics else ""
        status, kind, text = await ask(port, accept=accept)
    assert status == 200
    begins = "application/openmetrics-text; version=1.0.0" if openmetrics else "text/plain"
    assert kind.startswith(begins)
    seen = Scraped(text, openmetrics_families if openmetrics else text_string_to_metric_families)
    own = {name for name in seen.families if name.startswith("trading_push_")}
    assert {name.removeprefix("trading_push_") for name in own} == {
        name.removesuffix("_total") for name in EXPECTED
    }
    for name, labels in EXPECTED.items():
        is_histogram = seen.families[f"trading_push_{name.removesuffix('_total')}"].type
        found = seen.labels(name + "_count" * (is_histogram == "histogram"))
        assert found, name
        assert all(set(each) == labels for each in found), name
    for name, labels in EXPECTED.items():
        if "channel" in labels and not name.startswith("fetch"):
            assert {each["channel"] for each in seen.labels(name)} == CHANNELS, name
    codes = {str(int(code)) for code in CloseCode} | {"other"}
    assert {each["code"] for each in seen.labels("connections_closed_total")} == codes
    assert {each["endpoint"] for each in seen.labels("connections")} == {"asgi", "native"}
    assert {each["recovered"] for each in seen.labels("resumes_total")} == {"true", "false"}
    assert {each["result"] for each in seen.labels("fetches_total")} == {"ok", "error", "timeout"}
    ones = {"trading_push_build_info", "trading_push_feed_up"}
    for sample in seen.samples:
        # How late the loop was, and which lines were dropped, is told of the whole process.
        if sample.name.startswith("trading_push_") and not re.search(
            "loop_lag|lines_dropped", sample.name
        ):
            assert sample.value == (sample.name in ones), sample
    assert seen.families["process_resident_memory_bytes"].samples[0].value > 0


async def test_promtool_has_nothing_to_say():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    async with (
        serving(source=ASource(), feed=AFeed()) as service,
        hypercorn_serving(service) as port,
    ):
        _, _, text = await ask(port)
        done = await trio.run_process(
            [promtool, "check", "metrics"],
            stdin=text.encode(),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


async def test_on_this_machine_no_token_is_asked_for_unless_a_proxy_stands_between():
    async with serving("local") as service, hypercorn_serving(service) as port:
        assert (await ask(port))[0] == 200
        for header in ("X-Forwarded-For", "X-Real-IP", "Via", "Forwarded", "X-Forwarded-Host"):
            assert (await ask(port, **{header: "127.0.0.1"}))[0] == 401
        assert (await ask(port, Host="evil.example"))[0] == 401  # a page that DNS points here
        for bearer in (ADMIN, METRICS):
            assert (await ask(port, bearer=bearer, Via="1.1 proxy"))[0] == 200
        assert (await ask(port, bearer=token(4), Via="1.1 proxy"))[0] == 403
    trusting = serving("local", server=Server(trusted_proxies="10.0.0.1"))
    async with trusting as service, hypercorn_serving(service) as port:
        assert (await ask(port))[0] == 401


@pytest.mark.parametrize("claim", [False, 1, "true", ["metrics"], None])
async def test_a_claim_is_true_and_nothing_else(claim):
    async with serving("token") as service, hypercorn_serving(service) as port:
        bearer = issue_token(SECRET, "prometheus", 60, {"metrics": claim, "admin": claim})
        assert (await ask(port, bearer=bearer))[0] == 403


async def test_with_a_token_only_and_off():
    async with serving("token") as service, hypercorn_serving(service) as port:
        assert (await ask(port))[0] == 401
        assert (await ask(port, bearer="rubbish"))[0] == 401
        assert (await ask(port, bearer=token(4)))[0] == 403
        for bearer in (ADMIN, METRICS):
            assert (await ask(port, bearer=bearer))[0] == 200
        # It reads the metrics, and nothing else.
        assert (await ask(port, "/stats", bearer=METRICS))[0] == 403
    async with serving("off") as service, hypercorn_serving(service) as port:
        assert (await ask(port, bearer=ADMIN))[0] == 404


def test_the_page_lists_them():
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    table = page.partition("| metric | labels | meaning |\n|---|---|---|\n")[2].partition("\n\n")[0]
    rows = [row.strip("|").split("|", 2) for row in table.splitlines()]
    printed = {
        name.strip().strip("`"): set(re.findall(r"`(\w+)`", labels)) for name, labels, _ in rows
    }
    assert printed == EXPECTED
    reasons = next(meaning for name, _, meaning in rows if "handshakes_refused" in name)
    for reason in REASONS:
        assert f"`{reason}`" in reasons


async def test_a_prometheus_scrapes_as_printed(tmp_path):
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    credentials, config = tmp_path / "token", tmp_path / "prometheus.yml"
    credentials.write_text(METRICS)
    async with serving("token") as service, hypercorn_serving(service) as port:
        printed = block("scrape").replace("/etc/prometheus/trading-push-token", str(credentials))
        printed = printed.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        config.write_text(f"global:\n  scrape_interval: 1s\n{printed}")
        with socket.create_server(("127.0.0.1", 0)) as free:
            own = free.getsockname()[1]
        query = f"http://127.0.0.1:{own}/api/v1/query?query=trading_push_build_info"

        def found() -> list[Any]:
            try:
                with urllib.request.urlopen(query, timeout=PATIENCE_S) as answer:
                    return json.load(answer)["data"]["result"]
            except OSError:
                return []

        async with trio.open_nursery() as nursery:
            arguments = [
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{own}",
            ]
            command = [prometheus, *arguments]
            run = partial(trio.run_process, command, capture_stderr=True, check=False)
            nursery.start_soon(run)
            with trio.fail_after(PATIENCE_S):
                while not (result := await trio.to_thread.run_sync(found)):
                    await trio.sleep(0.2)
            nursery.cancel_scope.cancel()
    assert [each["metric"]["job"] for each in result] == ["trading-push"]


@pytest.mark.parametrize("accept", ["*/*", "application/openmetrics-text; version=x", "\xff", ""])
async def test_whatever_is_accepted_there_is_an_answer(accept):
    async with serving() as service, hypercorn_serving(service) as port:
        assert (await ask(port, accept=accept))[0] == 200


async def test_a_users_token_gets_403_on_every_route_but_the_public_ones():
    async with serving("token") as service, hypercorn_serving(service) as port:
        routes = {
            (route.path, method)
            for route in service.asgi_app.http.routes
            for method in route.methods - {"HEAD"}
        }
        public = {("/", "GET"), ("/healthz", "GET"), ("/readyz", "GET"), ("/demo/token", "POST")}
        public |= {each for each in routes if each[0].startswith(("/static/", "/trading-push.js"))}
        assert public < routes
        assert ("/metrics", "GET") in routes
        for path, method in sorted(routes - public):

            def blocking(path: str = path, method: str = method) -> tuple[int, str]:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
                with closing(connection):
                    headers = {"Authorization": f"Bearer {token(4)}"}
                    connection.request(method, path, b"{}" if method == "POST" else None, headers)
                    response = connection.getresponse()
                    return response.status, json.loads(response.read())["error"]["code"]

            assert await trio.to_thread.run_sync(blocking) == (403, "forbidden"), path


async def test_the_counters_are_what_the_clients_and_the_ledger_count():
    clients, publications = 40, 2500
    limits = Limits(unauthenticated_per_address=clients)
    async with serving(limits=limits) as service, hypercorn_serving(service) as port:
        with Crowd(port) as many:
            await trio.to_thread.run_sync(lambda: many.join(clients, "ticker.BTCUSDT", "news"))
            expected = 0

            def received() -> int:
                return sum(each.pushes + each.merged for each in many.members)

            async def all_received() -> None:
                await trio.to_thread.run_sync(
                    lambda: many.until(lambda: received() >= expected, "not all has come")
                )

            for number in range(publications):
                values = [("ticker.BTCUSDT", {"last": str(number)}, None)]
                if number % 10 == 0:  # in one write with the other
                    values.append(("news", number, None))
                await service.publish_many(values)
                expected += clients * len(values)
                if number % 50 in (0, 49):  # few enough for the sockets' buffers
                    await all_received()
            seen = await scrape(port)
            assert [fault for each in many.members for fault in each.faults] == []
            assert received() == expected
            assert sum(each.pushes for each in many.members) >= 100_000
            assert seen("deliveries_total") == sum(each.pushes for each in many.members)
            assert seen("merged_total") == sum(each.merged for each in many.members)
            assert seen("delivered_bytes_total") == sum(each.bytes for each in many.members)
            assert seen("deliveries_total", channel="news") == clients * publications // 10
            assert seen("publications_total", channel="ticker") == publications
            assert seen("publications_total", channel="news") == publications // 10
            assert seen("publish_to_socket_seconds_count") == publications + publications // 10
            assert seen("dropped_total") == seen("pending_bytes") == 0
            ledger = service.statistics().ledger
            assert seen("connections_opened_total") == ledger.connections_opened == clients
            assert seen("connections", endpoint="asgi") == clients
            assert seen("subscriptions") == ledger.subscriptions_opened == 2 * clients
            assert seen("requests_total", op="auth", result="ok") == clients
            assert seen("requests_total", op="subscribe", result="ok") == clients
            assert seen("requests_total") == 2 * clients
            assert seen("ledger_open", what="senders") == 2 * clients
        await until(lambda: service.statistics().ledger.balanced)
        seen = await scrape(port)
        assert seen("connections_closed_total") == clients
        assert seen("ledger_open") == seen("connections") == seen("subscriptions") == 0
        assert seen("users") == seen("pending_bytes") == 0


async def test_what_is_merged_dropped_and_waits(autojump_clock):
    async with (
        serving(limits=Limits(pending_bytes=65_536)) as service,
        peer(service, "4") as slow,
        peer(service, "5") as quick,
    ):
        tally = service.context.registry.tally
        await slow.subscribe("ticker.A", {"channel": "ticker.B", "max_hz": 1}, "news")
        await quick.subscribe("ticker.A", "ticker.B", "news")
        await service.publish_many([(f"ticker.{symbol}", -1, None) for symbol in "AB"])
        await service.publish("news", "first")
        await trio.testing.wait_all_tasks_blocked()
        slow.reading = trio.Event()
        text = 10_000 * "x"
        for number in range(10):
            await service.publish_many(
                [("ticker.A", number, None), ("ticker.B", number, None), ("news", text, None)]
            )
            await trio.testing.wait_all_tasks_blocked()
        assert tally.pending_bytes > 0
        assert tally.dropped["news"] > 0
        slow.reading.set()
        await trio.sleep(2)
        pushes = [push for each in (slow, quick) for push in each.sent if "seq" in push]
        assert sum(tally.deliveries.values()) == len(pushes)
        assert tally.merged["ticker"] == sum(push.get("merged", 1) - 1 for push in pushes) > 0
        assert tally.dropped["news"] == sum(push.get("dropped", 0) for push in pushes)
        assert tally.pending_bytes == 0
        # What waits for a peer that goes without having read it does not wait any more.
        slow.reading = trio.Event()
        for number in range(3):
            await service.publish("ticker.A", number + 20)
            await trio.testing.wait_all_tasks_blocked()
        assert tally.pending_bytes > 0
        slow.leave()
        await trio.sleep(20)
        assert tally.pending_bytes == 0


async def test_what_a_drain_could_not_send_waits_no_more(autojump_clock):
    async with serving() as service, peer(service, "4") as slow:
        await slow.subscribe("ticker.A", "news")
        slow.reading = trio.Event()
        for number in range(3):
            await service.publish_many([("ticker.A", number, None), ("news", number, None)])
            await trio.testing.wait_all_tasks_blocked()
        tally = service.context.registry.tally
        assert tally.pending_bytes > 0
        slow.leave(1000)  # its own close frame counts, found while the service ends
        await service.drain()
        await trio.testing.wait_all_tasks_blocked()
        assert tally.pending_bytes == 0
        assert tally.closed == {1000: 1}


class Watched(defaultdict[str, int]):
    """A counter that tells how often it was touched, and by how much it went up."""

    def __init__(self) -> None:
        super().__init__(int)
        self.steps: list[tuple[str, int]] = []

    def __setitem__(self, name: str, value: int) -> None:
        self.steps.append((name, value - self.get(name, 0)))
        super().__setitem__(name, value)


async def test_the_fan_out_counts_once_a_publication(autojump_clock):
    async with serving() as service, trio.open_nursery() as nursery:
        deliveries = service.context.registry.tally.deliveries = Watched()

        async def watch(task_status: trio.TaskStatus[None]) -> None:
            async with peer(service, "4") as one:
                await one.subscribe("ticker.A", "ticker.B")
                task_status.started()
                await trio.sleep_forever()

        for _ in range(50):
            await nursery.start(watch)
        for symbols in ("A", "B", "AB"):  # the first is a snapshot for each, by its own sender
            await service.publish_many([(f"ticker.{symbol}", 1, None) for symbol in symbols])
            await trio.testing.wait_all_tasks_blocked()
        deliveries.clear()
        deliveries.steps.clear()
        await service.publish("ticker.A", 2)
        await trio.testing.wait_all_tasks_blocked()
        assert [step for step in deliveries.steps if step[1]] == [("ticker", 50)]
        await service.publish_many([("ticker.A", 3, None), ("ticker.B", 3, None)])
        await trio.testing.wait_all_tasks_blocked()
        assert [step for step in deliveries.steps if step[1]] == 3 * [("ticker", 50)]
        nursery.cancel_scope.cancel()


async def test_what_is_asked_and_refused():
    async with serving() as service, hypercorn_serving(service) as port:
        for path, status, header in (
            ("/nowhere", 404, {}),
            ("/ws", 403, {"Origin": "https://evil.example"}),
            ("/ws", 401, {"Authorization": "Bearer x"}),
        ):
            assert (await ask(port, path, **WEBSOCKET, **header))[0] == status
        async with trio_client(port, 4) as client:
            for message in ("{", '{"op":"nope"}', '{"op":"ping"}', '{"op":"list"}'):
                await client.socket.send_message(message)
            await client.socket.send_message('{"op":"subscribe","args":["news","nothing"]}')
            await until(lambda: service.context.registry.tally.requests.total() == 6)
            last = {"epoch": "x", "seq": 1}
            item = {"channel": "ticker.A", "since": last}
            await client.socket.send_message(json.dumps({"op": "subscribe", "args": [item]}))
            await until(lambda: service.context.registry.tally.requests.total() == 7)
            seen = await scrape(port)
        for reason in ("path", "origin", "token"):
            assert seen("handshakes_refused_total", reason=reason) == 1
        assert seen("handshakes_refused_total") == 3
        assert seen("authentications_total", result="ok") == 1
        assert seen("authentications_total", result="refused") == 1
        assert seen("requests_total", op="other", result="bad_json") == 1
        assert seen("requests_total", op="other", result="unknown_op") == 1
        assert seen("requests_total", op="ping", result="ok") == 1
        assert seen("requests_total", op="list", result="ok") == 1
        assert seen("requests_total", op="subscribe", result="unknown_channel") == 1
        assert seen("resumes_total", recovered="false") == 1


async def test_what_the_source_did(autojump_clock):
    source = ASource()
    async with serving(source=source) as service, peer(service, "4") as one:
        await one.subscribe("balance")
        fetcher = service._upstream.pollers["balance"].fetcher
        await trio.sleep(1)
        answered = fetcher.results["ok"]
        assert answered > 5
        assert service._upstream.source_age_s() <= 0.11
        source.error = SourceError("gone", everyone=True)
        await trio.sleep(10)
        assert fetcher.results["error"] > 0
        assert 9 < service._upstream.source_age_s() <= 10.2
        assert sum(fetcher.duration.counts) == fetcher.results.total()
    assert math.isclose(fetcher.duration.total, 0, abs_tol=1)


async def test_nobody_watched_is_no_age(autojump_clock):
    async with serving(source=ASource()) as service:
        async with peer(service, "4") as one:
            await one.subscribe("balance")
            await trio.sleep(1)
        await trio.sleep(100)
        assert service._upstream.source_age_s() == 0


def test_a_histogram_takes_a_bound_into_its_own_bucket():
    histogram = Histogram([1, 2])
    for value, times in ((0, 1), (1, 2), (1.5, 1), (2, 3), (9, 1)):
        histogram.observe(value, times)
    assert (histogram.counts, histogram.total) == ([3, 4, 1], 18.5)


def test_a_token_for_the_metrics():
    done = subprocess.run(
        [sys.executable, "-m", "trading_push", "token", "--user", "prometheus", "--metrics"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRADING_PUSH_JWT_SECRET": SECRET},
        check=True,
    )
    claims = jwt.decode(done.stdout.strip(), SECRET, algorithms=["HS256"])
    assert (claims["metrics"], "admin" in claims) == (True, False)
