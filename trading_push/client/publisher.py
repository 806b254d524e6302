"""Publish from synchronous code, by `POST /publish`: Flask views, Celery tasks, cron jobs, scripts.

::

    publisher = Publisher("http://127.0.0.1:8000", token)
    publisher.publish("alerts", {"text": "margin call"}, user=4)

1. Each call has an idempotency key of its own, so that it can be tried again without publishing
   anything twice, whatever became of the first answer.
2. Each step of a try (connect, read the answer) has half of the time that is left. So a server that
   has hung is asked a second time, and the deadline holds.
3. Proxies of the environment are not used: the route is for inside.
"""

from __future__ import annotations

import os
import random
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

import msgspec

from trading_push import logs
from trading_push.client.after_commit import Value, queue_until_commit
from trading_push.errors import ConfigurationError, PublishError
from trading_push.protocol.payloads import encode_data
from trading_push.user_ids import given_user_id

if TYPE_CHECKING:
    import httpx  # noqa: ASYNC127 - httpx2 is another library
    from sqlalchemy.orm import Session, scoped_session

__all__ = ["Publisher"]

_BACKOFF_FIRST_S: Final = 0.05
_BACKOFF_MOST_S: Final = 1.0
_SHORTEST_S: Final = 0.02
"""With less time left than this, nothing more is tried."""
_AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""The statuses after which the same request may succeed."""


class _Error(msgspec.Struct, frozen=True):
    message: str = ""


class _Answer(msgspec.Struct, frozen=True):
    ok: bool = False
    published: int = -1
    error: _Error = _Error()


class _Failure(NamedTuple):
    """Why a try has failed."""

    error: PublishError
    pause_s: float | None = None
    """How long the server wants to be left alone, if it said so."""


class Publisher:
    """Publishes to the clients of a server; blocks until it is done.

    Threads may share one. It keeps its connections open, and opens them anew in a process that was
    forked. Used as a context manager, it closes them at the end.

    Args:
        url: The server's, as `http://127.0.0.1:8000`, or that of its `POST /publish` if it has
            another path.
        token: A token with the claim `publish`, or a function that returns one; it is called for
            each request, in the thread that publishes.
        timeout_s: How long a call may take, all tries together.
        after_commit_timeout_s: The same for what is published after a commit, while a request
            waits.
        ssl_context: For an https server whose certificate is of an authority of your own.

    Raises:
        ConfigurationError: The URL is not one of a server, or httpx is not installed.
    """

    def __init__(
        self,
        url: str,
        token: str | Callable[[], str],
        *,
        timeout_s: float = 10.0,
        after_commit_timeout_s: float = 1.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        if not min(timeout_s, after_commit_timeout_s) > 0:
            raise ConfigurationError("a time-out must be more than 0 s")
        self._url = _publish_url(url)
        self._token = token
        self._timeout_s = timeout_s
        self._after_commit_timeout_s = after_commit_timeout_s
        self._ssl_context = ssl_context
        self._lock = threading.Lock()  # held while the client is made or closed
        self._client: httpx.Client | None = None
        self._process = 0  # which has made the client: a fork must not share its sockets
        _httpx()

    def publish(
        self, channel: str, data: Any, user: str | int | None = None, *, key: str | None = None
    ) -> None:
        """Publish a value.

        Args:
            channel: Its channel.
            data: The value: what msgspec can encode, decimals and times as `service.publish` does.
            user: Whose channel it is; None for a channel of everyone.
            key: The idempotency key, for a task that may be run a second time as a whole. Within
                ten minutes the same values with the same key are published once.

        Raises:
            PayloadError: The value cannot be encoded.
            ValueError: There cannot be such a user.
            PublishError: The server refused it, or did not answer in time.
        """
        self.publish_many([(channel, data, user)], key=key)

    def publish_many(
        self, values: Iterable[tuple[str, Any, str | int | None]], *, key: str | None = None
    ) -> None:
        """Publish many values, at most 1,000: all of them, or none.

        Args:
            values: Channel, data and user of each; they are delivered in this order.
            key: As for `publish`.

        Raises:
            PayloadError, ValueError, PublishError: As for `publish`.
        """
        self._publish([_value(*each) for each in values], self._timeout_s, key)

    def after_commit(
        self,
        session: Session | scoped_session[Any],
        channel: str,
        data: Any,
        user: str | int | None = None,
    ) -> None:
        """Publish a value when the session's transaction has been committed, and only then.

        After a rollback nothing is published, nor what was given inside a savepoint that was rolled
        back. All that one transaction has gathered goes out in one request, after its connection
        is back in the pool. The value is encoded now: what the database fills in must have been
        flushed. If it cannot be published within `after_commit_timeout_s`, that is logged, and the
        application goes on.

        Args:
            session: SQLAlchemy's, or Flask-SQLAlchemy's `db.session`.
            channel: As for `publish`.
            data: As for `publish`.
            user: As for `publish`.

        Raises:
            PayloadError, ValueError: As for `publish`.
            TypeError: It is no such session.
        """
        queue_until_commit(session, self._committed, _value(channel, data, user))

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        with self._lock:
            client, self._client = self._client, None
            if client is not None and self._process == os.getpid():
                client.close()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _committed(self, values: list[Value]) -> None:
        try:
            self._publish(values, self._after_commit_timeout_s, None)
        except Exception as error:  # what is committed is committed: the application goes on
            logs.emit(logs.line("commit_unpublished", count=len(values), error=error))

    def _publish(self, values: list[Value], timeout_s: float, key: str | None) -> None:
        if not values:
            return
        deadline = time.monotonic() + timeout_s
        body = msgspec.json.encode(values)
        key = key or uuid.uuid4().hex
        pause_s = _BACKOFF_FIRST_S
        while True:
            failure = self._try(body, key, len(values), deadline)
            if failure is None:
                return
            wait_s = pause_s * random.uniform(0.5, 1)
            if failure.pause_s is not None:
                wait_s = max(wait_s, failure.pause_s)
            if not failure.error.retryable or time.monotonic() + wait_s + _SHORTEST_S > deadline:
                raise failure.error
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, _BACKOFF_MOST_S)

    def _try(self, body: bytes, key: str, count: int, deadline: float) -> _Failure | None:
        httpx = _httpx()
        try:
            headers = {
                "Authorization": f"Bearer {self._current_token()}",
                "Content-Type": "application/json",
                "Idempotency-Key": key,
            }
            step_s = max((deadline - time.monotonic()) / 2, _SHORTEST_S)
            answer = self._opened().post(self._url, content=body, headers=headers, timeout=step_s)
        except httpx.TimeoutException:
            message = f"{self._url} did not answer in time: the values may have been published"
            return _Failure(PublishError(message))
        except httpx.ConnectError as error:
            return _Failure(PublishError(f"{self._url} cannot be reached: {error}"))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = str(error) or type(error).__name__
            return _Failure(PublishError(f"{self._url} broke the connection: {why}"))
        return self._failure(answer, count)

    def _failure(self, answer: httpx.Response, count: int) -> _Failure | None:
        said = _decoded(answer.content)
        if answer.status_code == 200:
            if said is not None and said.ok and said.published == count:
                return None
            message = (
                f"{self._url} answered 200, and not as a trading_push server does: give the "
                "server's own URL, or have the proxy pass /publish on"
            )
            return _Failure(PublishError(message, status=200, retryable=False))
        why = said.error.message if said is not None else ""
        if not why:
            why = f"it is no POST /publish of a trading_push server ({answer.reason_phrase})"
        error = PublishError(
            f"{self._url} answered {answer.status_code}: {logs.escape(why, logs.ERROR_LENGTH)}",
            status=answer.status_code,
            retryable=answer.status_code in _AGAIN,
        )
        return _Failure(error, _seconds(answer.headers.get("retry-after", "")))

    def _current_token(self) -> str:
        token = (self._token if isinstance(self._token, str) else self._token()).strip()
        if not token.isascii() or not token.isprintable() or not token:
            message = "the token is not a JWT: trading-push token --user NAME --publish prints one"
            raise PublishError(message, retryable=False)
        return token

    def _opened(self) -> httpx.Client:
        with self._lock:
            if self._client is None or self._process != os.getpid():
                self._client = _httpx().Client(
                    trust_env=False, verify=True if self._ssl_context is None else self._ssl_context
                )
                self._process = os.getpid()
            return self._client


def _value(channel: str, data: Any, user: str | int | None = None) -> Value:
    encoded = msgspec.Raw(encode_data(data))
    if user is None:
        return {"channel": channel, "data": encoded}
    return {"channel": channel, "data": encoded, "user": given_user_id(user)}


def _publish_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ConfigurationError(
            "the URL of a Publisher is the server's, as http://127.0.0.1:8000: with http or https, "
            "and without a user"
        )
    return url.rstrip("/") + "/publish" if parts.path in ("", "/") else url


def _decoded(body: bytes) -> _Answer | None:
    try:
        return msgspec.json.decode(body, type=_Answer)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


def _seconds(retry_after: str) -> float | None:
    is_number = retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 7
    return float(retry_after) if is_number else None


def _httpx() -> Any:
    try:
        import httpx  # noqa: ASYNC127
    except ImportError:
        raise ConfigurationError(
            "a Publisher needs the library httpx: pip install 'trading_push[flask]'"
        ) from None
    return httpx
