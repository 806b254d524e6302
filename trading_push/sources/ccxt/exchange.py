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
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

import attrs
import trio

from trading_push.errors import ConfigurationError, SourceError

__all__ = ["CcxtExchange", "ExchangeOptions", "RequestRefused", "as_decimal"]

# The number that most exchanges give an error: the part of their text that holds no secret.
_CODE = re.compile(r'"(?:code|retCode|ret_code|sCode)"\s*:\s*"?(-?\d{1,9})\b')

# The errors that the same call would meet again, because of what it asks for ...
_OF_THE_REQUEST = ("ArgumentsRequired", "BadRequest", "NotSupported")
# ... or because of who asks, and from where; ccxt also makes these of a proxy's 401, 407 or 511.
_OF_THE_CALLER = ("AuthenticationError", "ManualInteractionNeeded", "RestrictedLocation")


class RequestRefused(SourceError):
    """The exchange does not have what was asked for; it would answer other questions."""


@attrs.frozen
class ExchangeOptions:
    """How an exchange is reached.

    Args:
        exchange: Its name in ccxt, as `binance`.
        url: Another place for its servers: scheme and host for all of them.
        sandbox: Whether to use its own test network.
        market_type: `spot`, `swap` or `future`; None for ccxt's default.
        timeout_s: How long it may leave a request unanswered.
    """

    exchange: str
    url: str | None = None
    sandbox: bool = False
    market_type: str | None = None
    timeout_s: float = 10


class CcxtExchange:
    """A ccxt exchange object.

    Args:
        options: Which, and where.
        credentials: As ccxt names them (`apiKey`, `secret`, ...); none for public data only.

    Raises:
        ConfigurationError: ccxt is not installed, does not know the exchange, or knows no test
            network of it.

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
        chosen: dict[str, Any] = {"warnOnFetchOpenOrdersWithoutSymbol": False}
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
            SourceError: It failed; `retryable` where the same call may succeed later.

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

    def _fetch_json(self, *args: Any, **named: Any) -> Any:
        # Of a text that is not JSON, such as a proxy's page, ccxt makes an empty account.
        answer = self._fetch(*args, **named)
        if isinstance(answer, str | bytes):
            raise self._ccxt.BadResponse
        return answer

    def _call(self, method: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        try:
            return method(*args)
        except Exception as error:
            raise self._explained(error) from None
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
            return RequestRefused(text, retryable=False)
        return SourceError(text, retryable=not self._is_one(error, _OF_THE_CALLER))

    def _is_one(self, error: Exception, names: tuple[str, ...]) -> bool:
        return isinstance(error, tuple(getattr(self._ccxt, name) for name in names))


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
