"""Who is handed a token by a Flask application, and what with."""

from __future__ import annotations

import builtins
import time

import flask_login
import jwt
import pytest
from flask import Flask, request, session

from harness.support import SECRET

from trading_push import ConfigurationError, JwtAuthenticator
from trading_push.flask import push_blueprint
from trading_push.settings.schema import Auth

URL = "wss://push.example.com/ws"


def application(**options) -> Flask:
    app = Flask("shop")
    app.secret_key = "a secret of the cookies"
    app.register_blueprint(push_blueprint(URL, SECRET, **options))

    @app.post("/login")
    def login() -> str:
        session["user"] = request.form["user"]
        return ""

    return app


async def test_a_token_of_the_user_who_is_logged_in():
    app = application(user=lambda: session.get("user"), ttl_s=60)
    mine, other = app.test_client(), app.test_client()
    mine.post("/login", data={"user": "4"})
    answer = mine.get("/push-token")
    assert answer.status_code == 200
    assert set(answer.json) == {"token", "url", "expires_in"}
    assert (answer.json["url"], answer.json["expires_in"]) == (URL, 60)
    principal = await JwtAuthenticator(Auth(), SECRET)(answer.json["token"])
    assert principal.user == "4"
    assert 55 < principal.expires_at - time.time() <= 60
    assert not {"publish", "admin"} & set(principal.claims)
    for each in (answer, other.get("/push-token")):
        assert each.headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in each.headers
    nobody = other.get("/push-token")
    assert nobody.status_code == 401
    assert nobody.json["error"]["code"] == "not_authenticated"
    assert "token" not in nobody.json
    assert mine.post("/push-token").status_code == 405


@pytest.mark.parametrize("user", [4, "4"])
async def test_claims_that_the_server_wants(user):
    app = application(user=lambda: user, claims={"aud": "push", "sub": "5"})
    token = app.test_client().get("/push-token").json["token"]
    assert (await JwtAuthenticator(Auth(audience="push"), SECRET)(token)).user == "4"


def test_the_user_of_flask_login():
    app = application()
    manager = flask_login.LoginManager(app)

    @manager.user_loader
    def load(user_id: str) -> flask_login.UserMixin:
        user = flask_login.UserMixin()
        user.id = user_id
        return user

    @app.post("/in")
    def log_in() -> str:
        flask_login.login_user(load("4"))
        return ""

    @app.post("/out")
    def log_out() -> str:
        flask_login.logout_user()
        return ""

    client = app.test_client()
    assert client.get("/push-token").status_code == 401
    client.post("/in")
    token = client.get("/push-token").json["token"]
    assert jwt.decode(token, options={"verify_signature": False})["sub"] == "4"
    client.post("/out")
    assert client.get("/push-token").status_code == 401


def test_without_flask_login_it_must_be_told_who(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "flask_login":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigurationError, match="give user="):
        push_blueprint(URL, SECRET)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"url": "https://push.example.com"}, "wss://push.example.com/ws"),
        ({"url": "/ws"}, "give its whole URL"),
        ({"secret": "short"}, "TRADING_PUSH_JWT_SECRET"),
        ({"ttl_s": 0}, "give 1 or more"),
    ],
)
def test_what_cannot_be_used_is_said_at_the_start(changed, said):
    options = {"url": URL, "secret": SECRET, "user": lambda: "4", **changed}
    with pytest.raises(ConfigurationError, match=said) as error:
        push_blueprint(options.pop("url"), options.pop("secret"), **options)
    assert "short" not in str(error.value)
