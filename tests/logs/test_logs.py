"""The catalogue and its way out: two languages, escaping, unbroken units, a full queue."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import os
import select
import string
import threading
import time
import unicodedata
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.support import PATIENCE_S

from trading_push import SourceError, logs
from trading_push.logs.lines import FIELD_LENGTH
from trading_push.logs.output import PROGRESS_S, Output, attached_outputs
from trading_push.logs.output import chunks as chunks_of


def fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


@pytest.mark.parametrize("event", logs.CATALOGUE)
def test_each_line_stands_in_both_languages(event):
    _, chinese, english = logs.CATALOGUE[event]
    assert fields(chinese) == fields(english)
    # The mark decides the level, so it is the same; and what is indented is so in both.
    assert chinese[0] == english[0] or (chinese[0], english[0]) == ("用", "U")
    assert not any("\u4e00" <= character <= "\u9fff" for character in english)


@given(st.text(st.characters(codec=None), max_size=100))
def test_nothing_that_is_escaped_can_leave_its_line(text):
    escaped = logs.escape(text)
    assert len(escaped) <= FIELD_LENGTH
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in escaped)
    assert "'" not in escaped.replace("\\'", "")
    assert len(escaped.splitlines()) <= 1


def test_what_is_harmless_stays_as_it_is():
    for text in ("BTCUSDT", "用户", "é", "a b", "😀", "a\\b"):
        assert logs.escape(text) == text


@pytest.mark.parametrize(
    ("seconds", "shown"), [(10.0, "10"), (0.2, "0.2"), (5, "5"), (0.25, "0.25")]
)
def test_an_interval_prints_at_its_shortest(caplog, seconds, shown):
    caplog.set_level(logging.INFO, "trading_push")
    logs.emit(logs.line("poller_started", data_type="pnl", interval=seconds))
    assert caplog.messages == [f"🔄 启动pnl数据推送线程 - 推送间隔: {shown}秒"]


def test_no_other_record_of_the_package_breaks_a_unit():
    """Also not one from a worker thread, through a logger that knows nothing of units."""
    seen: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    package = logging.getLogger("trading_push")
    handler, level = Collect(), package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    stop = threading.Event()

    def chatter() -> None:
        other = logging.getLogger("trading_push.somebody")
        while not stop.is_set():
            other.info("chatter")

    threads = [threading.Thread(target=chatter) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for number in range(300):
            logs.emit(*(logs.line("left_room", room=f"{number}") for _ in range(20)))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        package.removeHandler(handler)
        package.setLevel(level)
    assert "chatter" in seen
    for number in range(300):
        line = f"   🚪 退出房间: {number}"
        assert seen[seen.index(line) :][:20] == [line] * 20


def test_what_a_full_queue_drops_is_counted_in_a_line():
    read, write = os.pipe()
    os.set_blocking(write, False)
    stuck = 0
    with suppress(BlockingIOError):
        while True:
            stuck += os.write(write, b"-" * 4096)
    os.set_blocking(write, True)
    output = Output(write, logging.Formatter("%(message)s"), 3)

    def say(*numbers: int) -> None:
        for n in numbers:
            text = f"line {n}"
            output.handle(logging.LogRecord("trading_push.x", 20, "", 0, text, (), None))

    say(0)
    deadline = time.monotonic() + PATIENCE_S
    while output._taken < output._queued:  # until the thread has taken it, and is stuck with it
        assert time.monotonic() < deadline
        time.sleep(0.001)
    say(1, 2, 3, 4, 5, 6)
    with open(read, "rb") as pipe:
        pipe.read(stuck)
        expected = b"line 0\nline 1\nline 2\nline 3\n"
        assert pipe.read(len(expected)) == expected
        say(7, 8)
        output.end(10)
        rest = pipe.read().decode().splitlines()
    assert rest == ["⚠️ 日志输出过慢，已丢弃3行", "line 7", "line 8"]
    assert output.lost == 3


def test_what_was_dropped_counts_when_its_output_is_gone():
    before = logs.lines_dropped()
    with logs.attached():
        assert logs.lines_dropped() == before
        attached_outputs[0].lost = 5
        assert logs.lines_dropped() == before + 5
    assert logs.lines_dropped() == before + 5


def test_the_last_lines_are_waited_for_as_long_as_somebody_reads_them():
    read, write = os.pipe()
    output = Output(write, logging.Formatter("%(message)s"), 100_000)
    expected = [f"{number} {200 * '-'}" for number in range(5000)]
    output.enqueue(expected)
    found = []

    def read_slowly() -> None:
        with open(read, "rb") as pipe:
            while part := pipe.read1(65_536):
                found.append(part)
                time.sleep(0.02)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    output.end(0.05)  # far less than it takes
    reader.join(PATIENCE_S)
    assert not reader.is_alive()
    assert b"".join(found).decode().splitlines() == expected


def test_a_pipe_that_nobody_reads_is_given_up_in_time():
    read, write = os.pipe()
    output = Output(write, logging.Formatter("%(message)s"), 100_000)
    output.enqueue([200 * "-"] * 5000)
    began = time.monotonic()
    output.end(0.2)
    assert output._thread.is_alive()  # it is stuck
    assert time.monotonic() - began < 0.2 + 2 * PROGRESS_S
    os.close(read)
    output._thread.join(PATIENCE_S)
    os.close(write)


def test_what_is_written_at_once_fits_a_pipe_that_others_write_to():
    # Chinese, so that a cut anywhere else would tear a character, too.
    units = [[f"   🚪 退出房间: {n}_{line}" for line in range(n % 300)] for n in range(400)]
    chunks = list(chunks_of(units))
    assert max(map(len, chunks)) <= select.PIPE_BUF
    assert all(chunk.endswith(b"\n") for chunk in chunks)
    lines = [line for unit in units for line in unit]
    assert b"".join(chunks).decode().splitlines() == lines
    # One that fits is never divided.
    small = [[f"{n} {line}" for line in range(20)] for n in range(300)]
    for chunk in chunks_of(small):
        assert chunk.count(b" 0\n") == chunk.count(b" 19\n")


def test_whoever_listens_besides_hears_every_line(capfd):
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(f"{record.event} {record.getMessage()}")

    with logs.attached():
        logs.emit(logs.line("left_room", room="pnl_1"))
        for name in ("trading_push", "trading_push.registry"):
            ear = Ear()
            logging.getLogger(name).addHandler(ear)
            logs.emit(logs.line("left_room", room="pnl_2"))
            logging.getLogger(name).removeHandler(ear)
        logs.emit(logs.line("left_room", room="pnl_3"))
    assert heard == ["left_room    🚪 退出房间: pnl_2"] * 2
    rooms = [1, 2, 2, 3]
    assert capfd.readouterr().err.splitlines() == [f"   🚪 退出房间: pnl_{n}" for n in rooms]


def test_an_error_is_told_in_one_line():
    def told(error: BaseException) -> str:
        return logs.line("fetch_failed", user="4", data_type="pnl", error=error).fields["error"]

    assert told(ValueError("first\nsecond")) == "ValueError: first"
    assert told(SourceError("the database is away")) == "the database is away"
    assert told(RuntimeError()) == "RuntimeError"
    assert "\x1b" not in told(ValueError("\x1b[2J"))


def test_a_trace_cannot_carry_control_characters():
    try:
        raise ValueError("\x1b[2J\u202e")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    text = logs.SafeFormatter().formatException(info)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.startswith("Traceback")


FORGED = "\n✅ 用户4认证成功\r\x85\u2028   🚪 退出房间: pnl_4"


class Hostile(Exception):
    def __str__(self) -> str:
        return FORGED


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.add_note(f"a note{FORGED}")
    error.__context__ = KeyError(FORGED)
    if cause is not None:
        error.__cause__ = cause
    try:
        raise error
    except BaseException as caught:
        return caught


def faults() -> list[BaseException]:
    try:
        compile(f"'{FORGED}", f"{FORGED}.py", "exec")
    except SyntaxError as error:
        syntax = error
    return [
        raised(ValueError(FORGED)),
        raised(Hostile()),
        raised(Unspeakable(), cause=OSError(5, FORGED, f"/{FORGED}")),
        raised(ExceptionGroup(FORGED, [ValueError(FORGED), ExceptionGroup("2", [Hostile()])])),
        raised(UnicodeDecodeError("utf-8", b"x", 0, 1, FORGED)),
        raised(syntax),
        raised(ValueError(f"\ud800{FORGED}")),
    ]


@pytest.mark.parametrize("kind", ["text", "json", "file", "the application's"])
@pytest.mark.parametrize("error", faults(), ids=lambda error: type(error).__name__)
def test_nothing_that_an_exception_says_begins_a_line_of_the_log(kind, error, tmp_path, capfd):
    path = tmp_path / "log"
    heard = logging.StreamHandler()  # with a formatter that knows nothing of peers
    package = logging.getLogger("trading_push")
    said = logs.line("internal_error", address="1.2.3.4", error=error)._replace(exception=error)
    if kind == "the application's":
        package.addHandler(heard)
        logs.emit(said)
        package.removeHandler(heard)
    else:
        with logs.attached(json=kind == "json", file=path if kind == "file" else None):
            logs.emit(said)
    written = path.read_text() if kind == "file" else capfd.readouterr().err
    if kind == "json":
        [written] = written.splitlines()
        entry = json.loads(written)
        written = f"{entry['message']}\n{entry['trace']}"
    assert written.count("Traceback") >= 1
    first, *trace = written.splitlines()
    assert "连接处理出错 - 来自: 1.2.3.4" in first
    assert not [each for each in trace if each.lstrip(" |").startswith(("✅", "🚪", "用户"))], trace
    assert type(error).__name__ in written


def test_a_trace_names_every_exception_once_and_in_its_order():
    cause = raised(ValueError("the cause"))
    error = raised(RuntimeError("the end"), cause=cause)
    error.__cause__.__context__.__context__ = error  # a circle
    text = logs.SafeFormatter().formatException((type(error), error, error.__traceback__))
    places = [text.index(each) for each in ("KeyError: ", "ValueError: the cause", "direct cause")]
    assert places == sorted(places)
    assert text.count("RuntimeError: the end") == 1
    assert "in raised" in text
    for _ in range(10_000):
        error = ExceptionGroup("deeper", [error])
    assert len(logs.SafeFormatter().formatException((None, error, None)).splitlines()) < 10_000


def test_what_other_libraries_log_is_one_line(capfd):
    other = logging.getLogger("hypercorn.error")
    with logs.attached():
        other.error(f"peer %s{FORGED}", FORGED)
        try:
            raise ValueError(FORGED)
        except ValueError:
            # Another handler has formatted it before, and left its trace in the record.
            before = logging.StreamHandler(io.StringIO())
            other.handlers.insert(0, before)
            other.exception("failed")
            other.removeHandler(before)
        other.error("%d", "is no number")
    written = capfd.readouterr().err
    first, *rest, last = written.splitlines()
    assert first.startswith("peer \\x0a✅")
    assert rest[:2] == ["failed", "Traceback (most recent call last):"]
    assert not [each for each in rest if each.lstrip().startswith(("✅", "🚪"))]
    assert last == "cannot be formatted: hypercorn.error"


def test_a_token_in_an_exception_is_not_logged(capfd):
    token = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI0In0.c2lnbmF0dXJl-_9"
    error = raised(ValueError(f"cannot use {token}"), cause=KeyError(token))
    with logs.attached():
        said = logs.line("internal_error", address="-", error=error)
        logs.emit(said._replace(exception=error))
    written = capfd.readouterr().err
    assert "cannot use (token)" in written
    assert "c2ln" not in written
    assert "eyJ" not in written


@pytest.mark.parametrize("value", [[FORGED], {FORGED: 1}, FORGED.encode(), Hostile], ids=type)
def test_a_field_of_any_type_stays_in_its_line(value):
    class Odd(str):
        def __str__(self) -> str:
            return FORGED

    for each in (value, Odd("4"), type("Odd", (), {"__str__": lambda self: FORGED})()):
        text = logs.line("authenticated", user=each).fields["user"]
        assert len(text) <= FIELD_LENGTH
        assert len(f"{text}.".splitlines()) == 1


def test_what_an_application_adds_to_logging_ends_nobody():
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("a bug of the application's")

    package, broken = logging.getLogger("trading_push"), Broken()
    factory = logging.getLogRecordFactory()
    package.addHandler(broken)
    try:
        logs.emit(logs.line("shutting_down", connections=1))
        logs.emit(*2 * [logs.line("service_failed", error="bad")])
        logging.setLogRecordFactory(lambda *args: 1 / 0)
        logs.emit(logs.line("service_failed", error="bad"))
    finally:
        logging.setLogRecordFactory(factory)
        package.removeHandler(broken)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_application_s_configuration_of_logging_does_not_end_the_lines(when, capfd):
    def configure() -> None:  # on import, as Flask's documentation shows
        logging.config.dictConfig({"version": 1})

    loggers = logging.Logger.manager.loggerDict.values()
    was = {each: each.disabled for each in loggers if isinstance(each, logging.Logger)}
    try:
        if when == "before":
            configure()
        with logs.attached():
            if when == "after":
                configure()
            logs.emit(logs.line("shutting_down", connections=1))
            logs.emit(logs.line("left_room", room="a"), logs.line("left_room", room="b"))
    finally:
        for each, disabled in was.items():
            each.disabled = disabled
    assert [each[-1] for each in capfd.readouterr().err.splitlines()] == ["接", "a", "b"]


def test_no_other_library_s_logger_is_changed():
    def states() -> dict[str, tuple[object, ...]]:
        others = {
            name: each
            for name, each in logging.Logger.manager.loggerDict.items()
            if isinstance(each, logging.Logger)
            and name.split(".")[0] not in ("trading_push", "hypercorn")
        }
        return {
            name: (each.disabled, each.level, each.propagate, *each.handlers)
            for name, each in others.items()
        }

    logging.getLogger("stamina")
    before = states()
    with logs.attached():
        assert states() == before
    assert states() == before
