"""Hand out tokens to the users who are logged in to a Flask application.

::

    app.register_blueprint(push_blueprint("wss://push.example.com/ws", secret))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from trading_push.auth.tokens import issue_token
from trading_push.errors import ConfigurationError, ErrorCode
from trading_push.user_ids import user_id_text

try:
    from flask import Blueprint, Response, jsonify
except ImportError:
    raise ConfigurationError(
        "trading_push.flask needs Flask: pip install 'trading_push[flask]'"
    ) from None

__all__ = ["push_blueprint"]

_ANYBODY: Final = "-"


def push_blueprint(
    url: str,
    secret: str,
    *,
    user: Callable[[], str | int | None] | None = None,
    ttl_s: int = 900,
    claims: Mapping[str, Any] | None = None,
) -> Blueprint:
    """Make a blueprint with `GET /push-token`.

    It answers `{"token", "url", "expires_in"}` for the user who is logged in, and 401 if nobody is.
    No cache keeps the answer, and no page of another origin can read it.

    Args:
        url: The WebSocket that the user's page connects to, as `wss://push.example.com/ws`.
        secret: The push server's (`TRADING_PUSH_JWT_SECRET`).
        user: Returns the id of the user who is logged in, or None; called within the request. If it
            is not given, that is the `current_user` of Flask-Login.
        ttl_s: For how many seconds a token is valid.
        claims: Further claims: `aud` and `iss`, if the server wants them.

    Raises:
        ConfigurationError: The URL or the secret cannot be used, or there is neither `user` nor
            Flask-Login.
    """
    if not url.startswith(("ws://", "wss://")):
        raise ConfigurationError(
            f"{url!r} is no WebSocket: give its whole URL, as wss://push.example.com/ws"
        )
    if ttl_s < 1:
        raise ConfigurationError(f"a token cannot be valid for {ttl_s} s: give 1 or more")
    issue_token(secret, _ANYBODY, ttl_s, claims)  # what is wrong is said now, not to a user
    whose = _user_of_flask_login() if user is None else user
    blueprint = Blueprint("trading_push", __name__)

    @blueprint.get("/push-token")
    def push_token() -> Response:
        found = whose()
        if found is None:
            message = "nobody is logged in: log in, and ask again"
            error = {"code": ErrorCode.NOT_AUTHENTICATED, "message": message}
            answer = jsonify(ok=False, error=error)
            answer.status_code = 401
        else:
            token = issue_token(secret, user_id_text(found), ttl_s, claims)
            answer = jsonify(token=token, url=url, expires_in=ttl_s)
        answer.headers.update({"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})
        return answer

    return blueprint


def _user_of_flask_login() -> Callable[[], str | int | None]:
    try:
        from flask_login import current_user
    except ImportError:
        raise ConfigurationError(
            "push_blueprint must know who is logged in: give user=, a function that returns the "
            "user's id, or install Flask-Login"
        ) from None

    def user() -> str | int | None:
        if not current_user.is_authenticated:
            return None
        found: str | int | None = current_user.get_id()
        return found

    return user
