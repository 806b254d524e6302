"""The JavaScript client against the real server, behind both of its endpoints."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from harness.endpoints import RAW, open_endpoint
from harness.javascript import Place
from harness.support import SECRET, token, until

from trading_push import Channel, JwtAuthenticator, PushService
from trading_push.models import Ticker
from trading_push.settings.schema import Auth, Limits, Server

pytestmark = pytest.mark.browser


@attrs.frozen
class Served:
    """A service, and the place where the client runs."""

    js: Place
    kind: str
    certificates: Any

    def open(self, **options: Any) -> Any:
        # The browser's pages are of this machine; the native endpoint needs them named.
        return open_endpoint(self.kind, self.certificates, server=Server(origins="*"), **options)


@pytest.fixture(params=RAW)
def served(request, js, certificates) -> Served:
    return Served(js, request.param, certificates)


def is_subscribed(service: PushService) -> bool:
    counted = service.statistics()
    return bool(counted.subscribers_by_data_type or counted.subscribers_by_symbol)


def url(endpoint: Any) -> str:
    return f"ws://127.0.0.1:{endpoint.port}/ws"


async def test_values_come_and_go_on_after_a_cut(served):
    code = """
    eager(5);
    const client = tell(connect({ url, token: given.token, WebSocket }), ["state", "gap"]);
    client.subscribe("positions", ({ type, seq, data }) => say(type, seq, data));
    """
    async with (
        served.open() as endpoint,
        served.js.run(code, url=url(endpoint), token=token(4)) as program,
    ):
        service = endpoint.service
        await until(lambda: is_subscribed(service))
        await service.publish("positions", ["a"], user="4")
        await program.until_said(["snapshot", 1, ["a"]])
        await service.publish("positions", ["b"], user="4")
        await program.until_said(["update", 2, ["b"]])
        [connection] = service.context.connections
        connection.stop(1011, "cut")
        await until(lambda: connection not in list(service.context.connections))
        await service.publish("positions", ["c"], user="4")
        await program.until_said(["update", 3, ["c"]])
        assert "gap" not in {each[0] for each in program.said}
        await service.publish("positions", ["not for them"], user="5")
        service.kick(user="4", reason="enough")
        await program.until(lambda: "ended" in str(program.said))
        [error] = [each[1]["error"] for each in program.said if "error" in str(each)]
    assert error[2] == 4503
    assert "not for them" not in str(program.said)


async def test_the_table_of_all_tickers(served):
    code = """
    const client = connect({ url, token: given.token, WebSocket });
    client.subscribe("ticker.*", () => {});
    client.subscribe("ticker.btc", ({ data }) => data && say(data.last), { maxHz: 1000 });
    await until(() => client.latest("ticker.*")?.data.find(({ last }) => last === "3"));
    const rows = client.latest("ticker.*").data.map(({ symbol, last }) => [symbol, last]);
    say(rows, client.latest("ticker.BTC").data.last);
    client.close();
    """
    async with (
        served.open() as endpoint,
        served.js.run(code, url=url(endpoint), token=token(4)) as program,
    ):
        service = endpoint.service
        await until(lambda: is_subscribed(service))
        for last, symbol in (("1", "BTC"), ("2", "ETH"), ("3", "BTC")):
            await service.publish(f"ticker.{symbol}", Ticker(symbol, last))
            if symbol == "BTC":
                await program.until_said(last)
        said = await program.says(3)
    assert said[-1] == [[["BTC", "3"], ["ETH", "2"]], "3"]


async def test_one_connection_outlives_its_tokens(served):
    code = """
    tell(connect({ url, token: () => given.tokens.shift(), WebSocket }), ["state"]);
    await until(() => !given.tokens.length);
    await pause(2_500);
    say(["outlived"]);
    """
    limits = Limits(expiry_notice_s=1)
    check = JwtAuthenticator(Auth(leeway_s=0), SECRET)
    tokens = [token(4, ttl_s=2), token(4, ttl_s=3), token(4)]
    async with (
        served.open(limits=limits, authenticate=check) as endpoint,
        served.js.run(code, url=url(endpoint), tokens=tokens) as program,
    ):
        await program.until_said(["outlived"])
    states = [each[1]["state"] for each in program.said if each[0] == "state"]
    assert states == ["connecting", "open"]


async def test_events_resume_where_they_were(served):
    code = """
    eager(5);
    const client = connect({ url, token: given.token, WebSocket });
    client.subscribe("alerts", async (push) => {
      if (push.data) say(push.data);
    });
    """
    channels = [Channel("alerts", kind="events")]
    async with (
        served.open(channels=channels) as endpoint,
        served.js.run(code, url=url(endpoint), token=token(4)) as program,
    ):
        service = endpoint.service
        await until(lambda: is_subscribed(service))
        await service.publish("alerts", 1, user="4")
        await program.until_said(1)
        [connection] = service.context.connections
        connection.stop(4001, "too slow")
        await until(lambda: connection not in list(service.context.connections))
        for number in range(2, 30):
            await service.publish("alerts", number, user="4")
        await program.says(29)
    assert program.said == list(range(1, 30))


@pytest.mark.parametrize("given", ["nonsense", ""])
async def test_a_bad_token_ends_it(served, given):
    code = 'tell(connect({ url, token: given.token, WebSocket }), ["state"]);'
    async with (
        served.open() as endpoint,
        served.js.run(code, url=url(endpoint), token=given) as program,
    ):
        await program.until(lambda: program.said and program.said[-1][1]["state"] == "ended")
    name, _, code_, word = program.said[-1][1]["error"]
    assert (name, code_, word) == ("Refused", 4500, "bad_token")


async def test_anonymous_channels_need_no_token(served):
    code = """
    const client = connect({ url, WebSocket });
    client.addEventListener("refused", ({ detail: { channel, code } }) => say([channel, code]));
    client.subscribe("ticker.BTC", ({ data }) => data && say(data.last), { maxHz: 50 });
    client.subscribe("balance", say);
    """
    async with (
        served.open(auth=Auth(anonymous_channels="ticker")) as endpoint,
        served.js.run(code, url=url(endpoint)) as program,
    ):
        service = endpoint.service
        await program.until_said(["balance", "not_authenticated"])
        await service.publish("ticker.BTC", Ticker("BTC", "1"))
        await program.until_said("1")
