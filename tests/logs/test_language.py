"""In which language the log lines of an application are that embeds the service."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness.support import serving

# Without a handler, Python writes warnings and errors to standard error by itself.
EMBEDDING = """
import sys, trio
from trading_push import FunctionSource, Principal, Settings, logs, open_push_service
from trading_push.settings.schema import Log
from trading_push.testing import peer

def fail(user, data_type):
    raise RuntimeError("away")

async def main():
    settings = Settings(log=Log(lang=sys.argv[1]))
    async with (
        open_push_service(
            FunctionSource(fail), authenticate=lambda token: Principal(token), settings=settings
        ) as service,
        peer(service, "4") as client,
    ):
        await client.subscribe("balance")
        await trio.sleep(0.1)

if len(sys.argv) > 2:
    logs.set_language(sys.argv[2])
trio.run(main)
"""
CHINESE = "❌ 获取用户4的balance数据失败: RuntimeError: away"
ENGLISH = "❌ Fetching balance of user 4 failed: RuntimeError: away"


@pytest.mark.parametrize(
    ("args", "locale", "said"),
    [
        (["zh"], {"LANG": "en_US.UTF-8"}, CHINESE),
        (["en"], {"LANG": "zh_CN.UTF-8"}, ENGLISH),
        (["auto"], {"LANG": "en_US.UTF-8"}, ENGLISH),
        (["auto"], {"LANG": "zh_CN.UTF-8"}, CHINESE),
        (["auto"], {"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW"}, CHINESE),
        (["auto"], {"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, ENGLISH),
        (["auto"], {"LANG": "zh_CN.UTF-8", "LC_ALL": ""}, CHINESE),
        (["auto"], {}, ENGLISH),
        # What the program has chosen itself stands.
        (["auto", "zh"], {}, CHINESE),
        (["zh", "en"], {}, ENGLISH),
        (["zh", "auto"], {}, ENGLISH),
    ],
)
def test_an_embedded_service_speaks_the_language_of_its_settings(args, locale, said):
    env = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
    env.pop("LANG", None)
    done = subprocess.run(
        [sys.executable, "-c", EMBEDDING, *args],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
        env={**env, **locale, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.stderr.splitlines()[0] == said


@pytest.mark.parametrize(("locale", "said"), [("zh_CN", "启动"), ("de_DE", "Starting")])
def test_serve_may_speak_the_language_of_the_locale(locale, said, tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", locale)
    with serving(tmp_path, "--lang", "auto") as server:
        server.wait_for_line(said)
