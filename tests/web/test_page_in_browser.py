"""The page in a real browser: all panels have data, nothing is cut off, no word on the console."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.browser import BROWSERS, find_browser
from harness.javascript import node_modules
from harness.support import serving

from trading_push.web import pages

pytestmark = pytest.mark.browser

SCRIPT = Path(__file__).parents[1] / "harness" / "page_in_browser.mjs"
SIZES = [(390, 844), (1024, 768), (1280, 800), (1440, 900), (2560, 1440)]


@contextmanager
def demo(home: Path) -> Iterator[str]:
    """The demo as `trading-push serve` runs it; its address."""
    with serving(home, secret=None) as server:
        yield server.url.replace("ws://", "http://").removesuffix("ws")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with demo(tmp_path_factory.mktemp("demo")) as address:
        yield address


def look(url: str, **how: Any) -> dict[str, Any]:
    """Open the page, and tell what there was to see."""
    browser, node, modules = find_browser(), shutil.which("node"), node_modules()
    if browser is None:
        pytest.skip(f"no browser is installed: {', '.join(BROWSERS)}")
    if node is None or modules is None or not (modules / "playwright-core").is_dir():
        pytest.skip("npm's package `playwright-core` is not in $TESTS_NODE_MODULES")
    given = {
        **{"url": url, "modules": str(modules), "browser": browser, "width": 1440, "height": 900},
        **{"scheme": "dark", "locale": "en-GB", "reduced": False, **how},
    }
    done = subprocess.run(
        [node, str(SCRIPT), json.dumps(given)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def check(seen: dict[str, Any], url: str) -> None:
    assert seen["said"] == []
    assert seen["wider"] == []
    assert [each for each in seen["asked"] if not each.startswith((url, "data:"))] == []
    assert seen["canvases"] > 0
    # Something was marked, and no cell twice within half a second (less a frame or two).
    assert seen["marked"] > 0
    assert seen["closest"] is None or seen["closest"] > 450


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("locale", "scheme"), [("en-GB", "dark"), ("zh-CN", "light")])
def test_each_size_language_and_theme(url, size, locale, scheme):
    seen = look(url, width=size[0], height=size[1], locale=locale, scheme=scheme)
    check(seen, url)
    is_chinese = locale == "zh-CN"
    assert seen["language"] == ("zh-CN" if is_chinese else "en")
    assert seen["theme"] == scheme
    assert seen["palette"] == ("red" if is_chinese else "green")
    assert seen["connection"] == ("已连接 · 用户 4" if is_chinese else "connected · User 4")


def test_with_reduced_motion(url):
    check(look(url, reduced=True), url)


def test_the_installed_package_has_the_chart_library(url):
    assert pages._has_chart(), "build the wheel with its build requirement"
    assert "TradingView" in look(url)["text"]
