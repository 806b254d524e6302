"""An exchange on loopback that speaks enough of Binance's REST for ccxt, and misbehaves on demand.

Paths, parameters and shapes are those of https://developers.binance.com (Spot: General Endpoints,
Account Endpoints, Market Data Endpoints; Derivatives, USDS-M Futures). Signatures are checked.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEYS = {"key-of-4": "secret-of-4", "key-of-5": "secret-of-5"}
SWAP_PRICE = "61400.50"


def _spot(base: str) -> dict[str, Any]:
    return {
        "symbol": f"{base}USDT",
        "status": "TRADING",
        "baseAsset": base,
        "quoteAsset": "USDT",
        "baseAssetPrecision": 8,
        "quotePrecision": 8,
        "orderTypes": ["LIMIT", "MARKET"],
        "isSpotTradingAllowed": True,
        "permissions": ["SPOT"],
        "filters": [
            {"filterType": "PRICE_FILTER", "tickSize": "0.01", "minPrice": "0", "maxPrice": "0"},
            {"filterType": "LOT_SIZE", "stepSize": "0.00001", "minQty": "0", "maxQty": "9000"},
        ],
    }


def _swap(base: str) -> dict[str, Any]:
    return {
        **_spot(base),
        "pair": f"{base}USDT",
        "contractType": "PERPETUAL",
        "marginAsset": "USDT",
        "pricePrecision": 2,
        "quantityPrecision": 3,
        "onboardDate": 1569398400000,
        "deliveryDate": 4133404800000,
    }


class LoopbackExchange:
    """What it has, who has asked for what, and how it is to misbehave."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.keys_seen: list[tuple[str, str]] = []
        self.together = 0
        self.most_together: Counter[str] = Counter()
        self.misbehaves: dict[str, str] = {}  # a path, and how
        self.retry_after: str | None = None  # what each answer says
        self.go_on = threading.Event()
        self.price = "61500.12345678"
        self.balances = {
            "key-of-4": [
                {"asset": "BTC", "free": "0.12345678901234567890", "locked": "0.5"},
                {"asset": "USDT", "free": "100.10", "locked": "0.00"},
                {"asset": "DUST", "free": "0.00000000", "locked": "0.00000000"},
            ],
            "key-of-5": [{"asset": "ETH", "free": "5.00000000", "locked": "0.00000000"}],
        }
        self.trades: dict[str, list[dict[str, Any]]] = {key: [] for key in KEYS}
        self._lock = threading.Lock()
        self._now: Counter[str] = Counter()
        self.url = ""

    def answer(self, path: str, query: dict[str, str], key: str) -> Any:
        match path:
            case "/api/v3/exchangeInfo":
                return {"symbols": [_spot("BTC"), _spot("ETH")]}
            case "/fapi/v1/exchangeInfo":
                return {"symbols": [_swap("BTC")]}
            case "/dapi/v1/exchangeInfo":
                return {"symbols": []}
            case "/api/v3/ticker/24hr":
                sizes = {"bidQty": "1.00000000", "askQty": "2.00000000"}
                return [self.ticker(each) | sizes for each in json.loads(query["symbols"])]
            case "/fapi/v1/ticker/24hr":
                return [self.ticker("BTCUSDT") | {"lastPrice": SWAP_PRICE}]
            case "/api/v3/account":
                return {"accountType": "SPOT", "balances": self.balances.get(key, [])}
            case "/api/v3/openOrders":
                if query.get("symbol") == "ETHUSDT":
                    return [self.order("9", "0") | {"symbol": "ETHUSDT"}]
                return [self.order("1", "0"), self.order("2", "0.5")]
            case "/api/v3/myTrades":
                since = int(query.get("startTime", 0))
                found = [each for each in self.trades[key] if each["symbol"] == query["symbol"]]
                return [each for each in found if each.get("time", since) >= since]
            case "/fapi/v1/openOrders":
                return [self.order("3", "0")]
            case "/fapi/v2/account" | "/fapi/v3/account":
                return {"assets": [], "positions": []}
            case "/fapi/v2/positionRisk" | "/fapi/v3/positionRisk":
                return [self.position("-0.250", "-12.345678"), self.position("0.000", "0")]
            case "/fapi/v1/leverageBracket":
                brackets = [{"bracket": 1, "notionalFloor": 0, "maintMarginRatio": 0.004}]
                return [{"symbol": "BTCUSDT", "brackets": brackets}]
        return None

    def ticker(self, symbol: str) -> dict[str, Any]:
        return {
            "symbol": symbol,
            "priceChange": "-95.00000001",
            "priceChangePercent": "-0.960",
            "lastPrice": self.price,
            "bidPrice": "61500.00",
            "askPrice": "61500.20",
            "openPrice": "61595.12345679",
            "highPrice": "62000.00",
            "lowPrice": "61000.00",
            "volume": "8913.30000000",
            "quoteVolume": "15.30000000",
            "closeTime": 1763600000123,
        }

    def order(self, number: str, filled: str) -> dict[str, Any]:
        return {
            "symbol": "BTCUSDT",
            "orderId": int(number),
            "clientOrderId": f"mine-{number}",
            "price": "60000.10",
            "origQty": "1.00000000",
            "executedQty": filled,
            "cummulativeQuoteQty": "0.00000000",
            "status": "PARTIALLY_FILLED" if float(filled) else "NEW",
            "timeInForce": "GTC",
            "type": "LIMIT",
            "side": "BUY",
            "time": 1763600000000,
            "updateTime": 1763600000500,
        }

    def trade(self, key: str, number: int, at: int, symbol: str = "BTCUSDT") -> None:
        """An execution of the user of a key, at a time in ms."""
        self.trades[key].append(
            {
                "symbol": symbol,
                "id": number,
                "orderId": 1000 + number,
                "price": "61500.10000000",
                "qty": "0.00100000",
                "quoteQty": "61.50010000",
                "commission": "0.00000100",
                "commissionAsset": "BTC",
                "time": at,
                "isBuyer": True,
                "isMaker": False,
                "isBestMatch": True,
            }
        )

    def position(self, amount: str, unrealized: str) -> dict[str, Any]:
        return {
            "symbol": "BTCUSDT",
            "positionSide": "BOTH",
            "positionAmt": amount,
            "entryPrice": "61450.5",
            "breakEvenPrice": "61450.5",
            "markPrice": "61499.88888888",
            "unRealizedProfit": unrealized,
            "liquidationPrice": "0",
            "isolatedMargin": "0",
            "notional": "-15374.97",
            "marginAsset": "USDT",
            "isolatedWallet": "0",
            "initialMargin": "100",
            "maintMargin": "50",
            "positionInitialMargin": "100",
            "openOrderInitialMargin": "0",
            "adl": 1,
            "bidNotional": "0",
            "askNotional": "0",
            "updateTime": 1763600000000,
        }

    @contextmanager
    def counted(self, path: str, key: str) -> Iterator[None]:
        with self._lock:
            self.calls[path] += 1
            self._now[key] += 1
            self.most_together[key] = max(self.most_together[key], self._now[key])
            if key:
                self.keys_seen.append((path, key))
        try:
            yield
        finally:
            with self._lock:
                self._now[key] -= 1


def _refused(status: int, code: int, message: str) -> tuple[int, bytes]:
    return status, json.dumps({"code": code, "msg": message}).encode()


def _reply(exchange: LoopbackExchange, target: str, key: str) -> tuple[int, bytes]:
    parts = urlsplit(target)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    match exchange.misbehaves.get(parts.path):
        case "rate limited":
            return _refused(429, -1003, f"Too many requests of {key}")
        case "down":
            return 503, b"<html>Service Unavailable</html>"
        case "garbage":
            return 200, b"<html>" + key.encode() + b"\xff"
        case "an error in words":
            return _refused(400, -1000, f"something of {key} broke")
        case "slow":
            exchange.go_on.wait(20)
        case "a little slow":
            time.sleep(0.05)
        case str(status) if status.startswith("status "):
            return int(status.removeprefix("status ")), b"<html>Log in here</html>"
    if "signature" in parts.query or "timestamp" in query:
        signed, _, signature = parts.query.partition("&signature=")
        secret = KEYS.get(key)
        if secret is None:
            return _refused(401, -2015, f"Invalid API-key {key}, IP, or permissions for action.")
        right = hmac.new(secret.encode(), signed.encode(), hashlib.sha256).hexdigest()
        if signature != right:
            return _refused(400, -1022, "Signature for this request is not valid.")
    answer = exchange.answer(parts.path, query, key)
    if answer is None:
        return _refused(404, -1, f"no {parts.path} here")
    return 200, json.dumps(answer).encode()


@contextmanager
def running() -> Iterator[LoopbackExchange]:
    """The exchange, listening on a port of its own."""
    exchange = LoopbackExchange()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            key = self.headers.get("X-MBX-APIKEY", "")
            with exchange.counted(urlsplit(self.path).path, key):
                status, body = _reply(exchange, self.path, key)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if exchange.retry_after is not None:
                self.send_header("Retry-After", exchange.retry_after)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that has given up

    with Server(("127.0.0.1", 0), Handler) as server:
        exchange.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield exchange
        finally:
            exchange.go_on.set()
            server.shutdown()
            thread.join()
