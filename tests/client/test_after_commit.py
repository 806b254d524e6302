"""What is published after a commit of real sessions, and what a rollback takes with it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from decimal import Decimal

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from trading_push import PayloadError, Publisher, PublishError


class Recorded(Publisher):
    """Keeps what would be sent, and looks whether the database has it by then."""

    def __init__(self, engine: Engine) -> None:
        super().__init__("http://127.0.0.1:1", "token")
        self.engine = engine
        self.sent: list[list[object]] = []
        self.error: Exception | None = None
        self.rows: list[int] = []
        self.checked_out: list[int] = []

    def _publish(self, values, timeout_s, key):
        if self.error is not None:
            raise self.error
        self.checked_out.append(self.engine.pool.checkedout())
        self.sent.append([str(each["data"], "utf-8") for each in values])
        with self.engine.connect() as connection:
            self.rows.append(connection.scalar(text("SELECT count(*) FROM trades")))


@pytest.fixture
def engine(tmp_path) -> Iterator[Engine]:
    made = create_engine(f"sqlite:///{tmp_path / 'trades.db'}")

    @event.listens_for(made, "connect")
    def _no_implicit_begin(connection, _):
        connection.isolation_level = None  # so that savepoints are real: SQLAlchemy's own advice

    @event.listens_for(made, "begin")
    def _begin(connection):
        connection.exec_driver_sql("BEGIN")

    with made.begin() as connection:
        connection.execute(text("CREATE TABLE trades (id INTEGER PRIMARY KEY)"))
    yield made
    made.dispose()


@pytest.fixture
def publisher(engine) -> Recorded:
    return Recorded(engine)


@pytest.fixture
def session(engine) -> Iterator[Session]:
    with Session(engine) as made:
        yield made


def trade(session) -> None:
    session.execute(text("INSERT INTO trades DEFAULT VALUES"))


def test_nothing_goes_out_before_the_commit_and_all_of_it_in_one_request_after(publisher, session):
    trade(session)
    publisher.after_commit(session, "alerts", {"at": Decimal("1.50")}, user=4)
    trade(session)
    publisher.after_commit(session, "alerts", 2, user=4)
    session.flush()
    assert publisher.sent == []
    session.commit()
    assert publisher.sent == [['{"at":"1.50"}', "2"]]
    assert publisher.rows == [2]
    assert publisher.checked_out == [0]  # the transaction's connection is back
    session.commit()
    trade(session)
    session.commit()
    assert len(publisher.sent) == 1


@pytest.mark.parametrize("end", ["rollback", "close", "reset", "invalidate", "begin"])
def test_nothing_goes_out_after_whatever_else_ends_it(publisher, session, end):
    if end == "begin":
        with pytest.raises(RuntimeError), session.begin():
            publisher.after_commit(session, "alerts", 1)
            raise RuntimeError
    else:
        trade(session)
        publisher.after_commit(session, "alerts", 1)
        getattr(session, end)()
    trade(session)
    session.commit()
    assert publisher.sent == []


def test_what_is_given_before_the_first_statement_counts(publisher, session):
    publisher.after_commit(session, "alerts", 1)
    trade(session)
    session.commit()
    publisher.after_commit(session, "alerts", 2)
    session.commit()  # with nothing to commit
    assert publisher.sent == [["1"], ["2"]]


@pytest.mark.parametrize("end", ["rollback", "close", "reset", "invalidate"])
def test_what_is_given_before_the_first_statement_is_rolled_back(publisher, session, end):
    publisher.after_commit(session, "alerts", 1)
    getattr(session, end)()
    trade(session)
    session.commit()
    assert publisher.sent == []


def test_a_savepoint_takes_its_own_values_along(publisher, session):
    publisher.after_commit(session, "alerts", "outer")
    with pytest.raises(RuntimeError), session.begin_nested():
        publisher.after_commit(session, "alerts", "rolled back")
        with session.begin_nested():
            publisher.after_commit(session, "alerts", "released inside it")
        raise RuntimeError
    with session.begin_nested():
        publisher.after_commit(session, "alerts", "released")
        inner = session.begin_nested()
        publisher.after_commit(session, "alerts", "inner")
        inner.rollback()
        publisher.after_commit(session, "alerts", "after it")
    assert publisher.sent == []
    session.commit()
    assert publisher.sent == [['"outer"', '"released"', '"after it"']]


def test_a_commit_with_open_savepoints(publisher, session):
    session.begin_nested()
    publisher.after_commit(session, "alerts", 1)
    session.begin_nested()
    publisher.after_commit(session, "alerts", 2)
    session.commit()
    assert publisher.sent == [["1", "2"]]


def test_a_savepoint_that_is_released_and_a_transaction_that_is_not(publisher, session):
    with session.begin_nested():
        publisher.after_commit(session, "alerts", 1)
    session.rollback()
    session.commit()
    assert publisher.sent == []


def test_a_commit_that_fails(publisher, session, engine):
    trade(session)
    publisher.after_commit(session, "alerts", 1)

    @event.listens_for(engine, "commit")
    def _fail(connection):
        raise IntegrityError("COMMIT", {}, Exception("deferred constraint"))

    with pytest.raises(IntegrityError):
        session.commit()
    event.remove(engine, "commit", _fail)
    session.rollback()
    session.commit()
    assert publisher.sent == []


@pytest.mark.parametrize("error", [PublishError("gone"), RuntimeError("a bug")])
def test_a_failure_is_logged_and_the_commit_stands(publisher, session, engine, caplog, error):
    publisher.error = error
    trade(session)
    publisher.after_commit(session, "alerts", 1)
    session.commit()
    trade(session)  # the session is of use
    session.commit()
    [record] = [each for each in caplog.records if each.name == "trading_push.client"]
    assert record.levelno == logging.WARNING
    assert str(error) in record.getMessage()
    assert session.scalar(text("SELECT count(*) FROM trades")) == 2


def test_each_thread_of_a_registry_has_its_own(publisher, engine):
    registry = scoped_session(sessionmaker(engine))

    def other() -> None:
        publisher.after_commit(registry, "alerts", "other")
        registry.rollback()
        registry.remove()

    publisher.after_commit(registry, "alerts", "own")
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    registry.commit()
    registry.remove()
    assert publisher.sent == [['"own"']]


def test_two_publishers_of_one_session(publisher, session, engine):
    other = Recorded(engine)
    publisher.after_commit(session, "alerts", 1)
    other.after_commit(session, "alerts", 2)
    publisher.after_commit(session, "alerts", 3)
    session.commit()
    assert (publisher.sent, other.sent) == ([["1", "3"]], [["2"]])


def test_flask_sqlalchemy(publisher, tmp_path):
    app, db = Flask("shop"), SQLAlchemy()
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'trades.db'}"
    db.init_app(app)

    @app.post("/<how>")
    def act(how: str) -> str:
        trade(db.session)
        publisher.after_commit(db.session, "alerts", how, user=4)
        if how == "commit":
            db.session.commit()
        elif how == "error":
            raise RuntimeError
        return how

    client = app.test_client()
    for how in ("commit", "forgotten", "error", "commit"):
        client.post(f"/{how}")
    assert publisher.sent == [['"commit"']] * 2
    assert publisher.rows == [1, 2]
    with app.app_context():
        db.engine.dispose()


def test_what_is_wrong_is_said_at_once(publisher, session):
    with pytest.raises(PayloadError):
        publisher.after_commit(session, "alerts", float("inf"))
    for wrong in (object(), sessionmaker(), None):
        with pytest.raises(TypeError, match="after_commit takes a Session"):
            publisher.after_commit(wrong, "alerts", 1)
    session.commit()
    assert publisher.sent == []
