"""What other libraries, warnings and uncaught exceptions write has the log's form, too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.support import plain_hypercorn, serving

STRAY = """
import gc, logging, threading, warnings
from trading_push import logs
from pathlib import Path

class Bad:
    def __del__(self):
        raise ValueError("in del")

with logs.attached(lang="en", json=True, file=Path("log")):
    logging.getLogger("sqlalchemy.pool").warning("two\\nlines %s", 1)
    logging.getLogger("trio.serve_listeners").error("accept failed", exc_info=OSError(24, "many"))
    logging.getLogger("asyncio").critical("bad %d", "text")
    logging.error("by the root")
    warnings.warn("careful")
    Bad()
    gc.collect()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    logs.emit(logs.line("service_started"))
    logging.getLogger("quiet.library").info("not written")
"""


def run(code: str, cwd: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stderr.splitlines()


def test_every_line_is_json(tmp_path):
    lines = [json.loads(line) for line in run(STRAY, tmp_path)]
    assert [line["logger"] for line in lines] == [
        "sqlalchemy.pool",
        "trio.serve_listeners",
        "asyncio",
        "root",
        "py.warnings",
        "python",
        "python",
        "trading_push.service",
    ]
    assert "OSError" in lines[1]["trace"]
    assert "careful" in lines[4]["message"]
    assert "in del" in lines[5]["trace"]
    assert "ZeroDivisionError" in lines[6]["trace"]
    written = (tmp_path / "log").read_text().splitlines()
    assert [json.loads(line) for line in written] == lines


def test_an_application_s_own_root_is_left_alone(tmp_path):
    own = "import logging; logging.basicConfig(format='own %(message)s')\n"
    lines = run(own + STRAY, tmp_path)
    assert "own two" in lines
    assert not any("sqlalchemy" in line for line in lines)


def test_all_is_put_back(tmp_path):
    check = (
        "import logging, sys, threading, warnings\n"
        "before = (sys.unraisablehook, threading.excepthook, warnings.showwarning)\n"
        f"{STRAY}\n"
        "assert before == (sys.unraisablehook, threading.excepthook, warnings.showwarning)\n"
        "assert not logging.getLogger().handlers\n"
    )
    run(check, tmp_path)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_plain_hypercorn_s_own_lines(tmp_path, workers):
    env = {"TRADING_PUSH_LOG_FORMAT": "json"}
    with plain_hypercorn(tmp_path, "-w", workers, env=env) as server:
        server.stop()
        said = [json.loads(line) for line in server.err]
    assert sum("Running on" in line["message"] for line in said) == 1


MOVED = """
import os
from pathlib import Path
from trading_push import logs

file = Path("log")
with logs.attached(lang="en", file=file):
    for number in range(20_000):
        logs.emit(logs.line("data_stale", user=number, data_type="pnl"))
        if number == 7_000:
            while not file.stat().st_size:
                pass
            file.rename("log.1")
            while not file.exists():
                logs.emit(logs.line("service_started"))
        elif number == 14_000:
            for part in range(2, 100):
                file.rename(f"log.{part}")
                try:
                    os.mkdir("log")  # cannot be opened: the old one goes on
                    break
                except FileExistsError:
                    pass  # it had been made anew already
        elif number == 16_000:
            os.rmdir("log")
"""


def test_a_renamed_file_is_followed_and_no_line_is_lost(tmp_path):
    run(MOVED, tmp_path)
    renamed = sorted(tmp_path.glob("log.*"), key=lambda path: int(path.suffix[1:]))
    parts = [path.read_text().splitlines() for path in (*renamed, tmp_path / "log")]
    assert len(parts) >= 3
    lines = [line for part in parts for line in part if "stale" in line.lower()]
    assert len(lines) == 20_000
    assert all(str(number) in line for number, line in enumerate(lines))


def test_less_is_written_by_level_and_by_event(tmp_path):
    env = {"TRADING_PUSH_LOG_QUIET": "pushed service_started"}
    with serving(tmp_path, env=env) as server:
        server.wait_for_line("推送间隔")
        assert not any("启动交易数据" in line for line in server.err)
    with serving(tmp_path, env={"TRADING_PUSH_LOG_LEVEL": "warning"}) as server:
        server.stop()
        assert server.err == []
