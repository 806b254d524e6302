"""Each Python example of the pages passes `mypy --strict` as it is printed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.readme import PAGES

PYTHON = re.compile(r"^<!-- (?:tested|shown): (\w+)[^\n]*? -->\n```python\n(.*?)^```$", re.S | re.M)

# What examples import of an application of the reader's own.
SHOP = {
    "shop/__init__.pyi": "",
    "shop/app.pyi": "import flask\ndef create_app() -> flask.Flask: ...\n",
    "shop/models.pyi": (
        "from flask_sqlalchemy import SQLAlchemy\n"
        "from sqlalchemy.orm import DeclarativeBase, Mapped\n"
        "db: SQLAlchemy\n"
        "class Holding(DeclarativeBase):\n"
        "    user_id: Mapped[str]\n"
        "    asset: Mapped[str]\n"
        "    total: Mapped[str]\n"
    ),
    "shop/push.pyi": "def fetch(user_id: str, data_type: str) -> object: ...\n",
}


def examples(page: str) -> dict[str, str]:
    return {f"{name}.py": program for name, program in PYTHON.findall(PAGES[page])}


def test_every_python_block_is_found():
    fenced = sum(len(re.findall(r"^```python$", text, re.M)) for text in PAGES.values())
    assert sum(len(examples(page)) for page in PAGES) == fenced > 10


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mypy", "flask", "fastapi")),
    reason="mypy, Flask or FastAPI is not installed; `nox -s types` has them",
)
def test_every_example_is_typed(tmp_path):
    wrong = []
    for page in PAGES:
        files = examples(page)
        if not files:
            continue
        there: Path = tmp_path / page.replace("/", "-")
        (there / "shop").mkdir(parents=True)
        if "shop.py" not in files:  # which is this page's own
            for name, stub in SHOP.items():
                (there / name).write_text(stub)
        for name, program in files.items():
            (there / name).write_text(program)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary"),
                *(f"--cache-dir={tmp_path / 'cache'}", *files),
            ],
            cwd=there,
            capture_output=True,
            text=True,
        )
        wrong += [f"{page}: {line}" for line in (done.stdout + done.stderr).splitlines()]
    assert wrong == []
