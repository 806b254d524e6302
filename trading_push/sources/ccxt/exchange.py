"""One ccxt exchange object, called in worker threads; shared by the feed and the accounts.

1. Calls of an object run one at a time, as its rate limiter needs, each with ccxt's own time-out.
   A thread cannot be cancelled: one that is abandoned counts until it has ended.
2. Numbers stay as the exchange wrote them: ccxt is told to make strings of them (`number`).
3. No text of ccxt is in the text of an error, because it holds URLs with signatures, and what the
   exchange said. ccxt's own logging is silenced, because it logs headers.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import attrs
import trio

from trading_push.errors import ConfigurationError, SourceError
from trading_push.sources.retry_after import retry_after_s
from trading_push.transport.outbound_proxies import OutboundProxies

__all__ = ["CcxtExchange", "ExchangeOptions", "RequestRefused", "as_decimal"]

# The number that most exchanges give an error: the part of their text that holds no secret.
_CODE = re.compile(r'"(?:code|retCode|ret_code|sCode)"\s*:\s*"?(-?\d{1,9})\b')

# The errors that the same call would meet again, because of what it asks for ...
_OF_THE_REQUEST = ("ArgumentsRequired", "BadRequest", "NotSupported")
# ... or because of who asks, and from where; ccxt also makes these of a proxy's 401, 407 or 511.
_OF_THE_CALLER = ("AuthenticationError", "ManualInteractionNeeded", "RestrictedLocation")


# ... or because of how much has been asked of it, by whomever at this address.
_OF_THE_RATE = ("RateLimitExceeded", "DDoSProtection")

PAUSE_S: Final = 10.0
"""How long an exchange is left alone that refuses the rate and does not say how long."""


class RequestRefused(SourceError):
    """The exchange does not have what was asked for; it would answer other questions.

    Attributes:
        needs_symbol: It answers for one market at a time only.
    """

    needs_symbol = False


class ExchangePause:
    """Until when an exchange wants to be left alone, by everyone at this address."""

    def __init__(self) -> None:
        self._until = -math.inf  # on trio's clock

    def check(self, name: str) -> None:
        """Refuse a call in a pause.

        Raises:
            SourceError: With what is left of the pause.
        """
        left_s = self._until - trio.current_time()
        if left_s > 0:
            text = f"{name} asked for a pause, of which {math.ceil(left_s)} s are left"
            raise SourceError(text, pause_s=left_s, everyone=True)

    def begin(self, pause_s: float) -> None:
        """Note a pause that the exchange has asked for."""
        self._until = max(self._until, trio.current_time() + pause_s)


@attrs.frozen
class ExchangeOptions:
    """How an exchange is reached.

    Args:
        exchange: Its name in ccxt, as `binance`.
        url: Another place for its servers: scheme and host for all of them.
        sandbox: Whether to use its own test network.
        market_type: `spot`, `swap` or `future`; None for ccxt's default.
        timeout_s: How long it may leave a request unanswered.
        options: ccxt's own options of the exchange.
        proxies: Which proxy leads to its servers; None for none.
        pause: Shared by all objects that are made of these options.
    """

    exchange: str
    url: str | None = None
    sandbox: bool = False
    market_type: str | None = None
    timeout_s: float = 10
    options: Mapping[str, Any] = attrs.field(factory=dict)
    proxies: OutboundProxies | None = None
    pause: ExchangePause = attrs.field(factory=ExchangePause, init=False, eq=False, repr=False)


class CcxtExchange:
    """A ccxt exchange object.

    Args:
        options: Which, and where.
        credentials: As ccxt names them (`apiKey`, `secret`, ...); none for public data only.

    Raises:
        ConfigurationError: ccxt is not installed, does not know the exchange, or knows no test
            network or no markets of this type of it.

    Making one takes some tens of milliseconds, and does not use the network.
    """

    def __init__(
        self, options: ExchangeOptions, credentials: Mapping[str, str] | None = None
    ) -> None:
        self._ccxt = _import_ccxt()
        if options.exchange not in self._ccxt.exchanges:
            alike = difflib.get_close_matches(options.exchange, self._ccxt.exchanges, n=1)
            hint = f"did you mean {alike[0]}?" if alike else "give one that ccxt lists"
            raise ConfigurationError(f"ccxt knows no exchange {options.exchange!r}: {hint}")
        chosen: dict[str, Any] = {"warnOnFetchOpenOrdersWithoutSymbol": False, **options.options}
        if options.market_type is not None:
            chosen["defaultType"] = options.market_type
        self.name = options.exchange
        """Its name in ccxt."""
        # Read for what it knows (`has`, `markets`, `options`); its methods go through `call`.
        self.api: Any = getattr(self._ccxt, options.exchange)(
            {
                **(credentials or {}),
                "enableRateLimit": True,
                "timeout": round(options.timeout_s * 1000),
                "options": chosen,
            }
        )
        _check_market_type(self.api, options)
        self._pause = options.pause
        self._proxies = options.proxies
        self.api.number = str
        self.api.logger = _SILENT
        self._fetch = self.api.fetch
        self.api.fetch = self._fetch_json
        if options.sandbox:
            try:
                self.api.set_sandbox_mode(True)
            except (self._ccxt.NotSupported, TypeError):  # no URL, or null in its place
                raise ConfigurationError(
                    f"ccxt knows no test network of {self.name}: remove ccxt.sandbox"
                ) from None
        if options.url is not None:
            self.api.urls["api"] = _moved(self.api.urls["api"], options.url.rstrip("/"))
        self._limiter = trio.CapacityLimiter(1)
        self._closed = False

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method of ccxt in a worker thread, once the calls before have ended.

        Raises:
            SourceError: It failed, or the exchange asked for a pause; `retryable` where the same
                call may succeed later.

        Cancellation abandons the thread, which ends by itself once the exchange has been silent for
        ccxt's time-out; a whole call may take longer than that.
        """
        return await trio.to_thread.run_sync(
            self._call,
            getattr(self.api, method),
            args,
            abandon_on_cancel=True,
            limiter=self._limiter,
        )

    def close(self) -> None:
        """Close its connections; one that is in use, when its thread has ended. Synchronous."""
        self._closed = True
        self.api.close()

    def _fetch_json(self, url: str, *args: Any, **named: Any) -> Any:
        proxy = None if self._proxies is None else self._proxies.of(url)
        if proxy is not None:
            # The proxy resolves the host's name, as everywhere.
            whole = proxy.whole_url.replace("socks5://", "socks5h://", 1)
            self.api.proxies = {"http": whole, "https": whole}
        # Of a text that is not JSON, such as a proxy's page, ccxt makes an empty account.
        answer = self._fetch(url, *args, **named)
        if isinstance(answer, str | bytes):
            raise self._ccxt.BadResponse
        return answer

    def _call(self, method: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        # Here, for it has waited for the calls before, which may have met a pause.
        trio.from_thread.run_sync(self._pause.check, self.name)
        try:
            return method(*args)
        except Exception as error:
            explained = self._explained(error)
            if explained.pause_s > 0:
                trio.from_thread.run_sync(self._pause.begin, explained.pause_s)
            raise explained from None
        finally:
            if self._closed:
                self.api.close()

    def _explained(self, error: Exception) -> SourceError:
        kind = type(error).__name__
        if not isinstance(error, self._ccxt.BaseError):
            return SourceError(f"{self.name} gave what ccxt cannot read ({kind})")
        code = _CODE.search(str(error))
        text = f"{self.name}: {kind}" + (f", code {code[1]}" if code else "")
        if self._is_one(error, _OF_THE_REQUEST):
            refused = RequestRefused(text, retryable=False)
            refused.needs_symbol = self._is_one(error, ("ArgumentsRequired",))
            return refused
        if self._is_one(error, _OF_THE_RATE):
            # ccxt keeps the headers of the last answer.
            headers = self.api.last_response_headers or {}
            pause_s = retry_after_s(headers.get("Retry-After", "")) or PAUSE_S
            text += f", and asked for a pause of {math.ceil(pause_s)} s"
            return SourceError(text, pause_s=pause_s, everyone=True)
        return SourceError(text, retryable=not self._is_one(error, _OF_THE_CALLER))

    def _is_one(self, error: Exception, names: tuple[str, ...]) -> bool:
        return isinstance(error, tuple(getattr(self._ccxt, name) for name in names))


def _check_market_type(api: Any, options: ExchangeOptions) -> None:
    wanted = options.market_type
    has = [each for each in ("spot", "swap", "future") if api.has.get(each)]
    if wanted is not None and wanted not in has and has:
        raise ConfigurationError(
            f"{options.exchange} has no {wanted} markets that ccxt knows: set ccxt.market_type to "
            f"{' or '.join(has)}"
        )


def as_decimal(number: object) -> Decimal | None:
    """Convert a number of ccxt; None where there is none, or it is not finite."""
    try:
        value = Decimal(str(number))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


_SILENT = logging.Logger("ccxt", logging.CRITICAL)


def _import_ccxt() -> Any:
    try:
        return importlib.import_module("ccxt")
    except ImportError:
        raise ConfigurationError(
            "ccxt is not installed: pip install 'trading_push[ccxt]'"
        ) from None


def _moved(urls: Any, base: str) -> Any:
    """Replace scheme and host of URLs, in whatever they are nested."""
    if isinstance(urls, dict):
        return {name: _moved(each, base) for name, each in urls.items()}
    if isinstance(urls, list):
        return [_moved(each, base) for each in urls]
    # The host may be a template, as in https://api.{hostname}.
    return re.sub(r"^https?://[^/]+", lambda _: base, urls) if isinstance(urls, str) else urls
