"""What is made of the descriptions of the settings, and settings that have a new name."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

import trading_push
from trading_push.errors import ConfigurationError
from trading_push.settings.definition import descriptions
from trading_push.settings.loading import load_settings
from trading_push.settings.reference import PAGE, SAMPLE, page_with_table, sample
from trading_push.settings.schema import MOVED, Limits, Polling, Settings

ROOT = Path(__file__).parent.parent
PACKAGE = Path(trading_push.__file__).parent


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TRADING_PUSH_"):
            monkeypatch.delenv(name)


# --- what is made of them ---------------------------------------------------------------------


def test_every_setting_is_described_in_whole_sentences() -> None:
    described = list(descriptions(Settings))
    assert len({each.path for each in described}) == len(described)
    for each in described:
        assert re.fullmatch(r"[A-Z].*[.]", each.meaning), each.path
        assert (each.example is not None) == (each.default is None), each.path
        assert each.unit in ("", "s", "bytes", "1/s"), each.path
        assert (each.unit == "s") == (
            each.section == "intervals" or (each.path.endswith("_s") and "_per_s" not in each.path)
        )


def test_the_page_has_the_table_that_nox_settings_writes() -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert page == page_with_table(page)


def test_the_sample_is_the_one_that_nox_settings_writes() -> None:
    written = (PACKAGE.parent / SAMPLE).read_text(encoding="utf-8")
    assert written == sample()
    assert max(map(len, written.splitlines())) <= 100


def test_the_help_of_serve_has_the_meanings_and_defaults() -> None:
    command = [sys.executable, "-m", "trading_push", "serve", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    told = " ".join(done.stdout.split())
    described = {each.path: each for each in descriptions(Settings)}
    for path in ("server.host", "server.port", "market.tape", "market.loop", "log.format"):
        assert described[path].meaning in told
    assert "takes any free one. [8000]" in told
    assert "`json`. [text]" in told


# --- names that have moved --------------------------------------------------------------------


def test_each_moved_setting_has_its_new_name() -> None:
    paths = {each.path for each in descriptions(Settings)}
    assert set(MOVED.values()) == {path for path in paths if path.startswith("polling.")}
    assert not paths & set(MOVED)


@pytest.mark.parametrize("place", ["file", "environment", "flags"])
def test_an_old_name_goes_on_working_with_one_warning(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, flags, names = None, {}, ("limits.fetches", "polling.fetches")
    if place == "file":
        config = tmp_path / "settings.toml"
        config.write_text("[limits]\nfetches = 3\nconnections = 7")
    elif place == "environment":
        monkeypatch.setenv("TRADING_PUSH_LIMITS_FETCHES", "3")
        names = ("TRADING_PUSH_LIMITS_FETCHES", "TRADING_PUSH_POLLING_FETCHES")
    else:
        flags = {"limits.fetches": "3"}
    with caplog.at_level(logging.WARNING, "trading_push"):
        settings = load_settings(config=config, flags=flags)
    assert settings.polling == Polling(fetches=3)
    [record] = caplog.records
    assert (record.name, record.levelname) == ("trading_push.settings", "WARNING")
    where = {"file": str(config), "flags": "command line"}.get(place, place)
    old, new = names
    assert record.getMessage() == f"{where}: {old} is now called {new}: rename it"


def test_without_any_handler_the_warning_is_on_standard_error(tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text("[limits]\nstale_after_s = 9\ntopic_linger_s = 9")
    command = [sys.executable, "-m", "trading_push", "token", "--user", "4"]
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment,
    )
    assert done.stderr.splitlines() == [
        f"{config}: limits.{name} is now called polling.{name}: rename it"
        for name in ("stale_after_s", "topic_linger_s")
    ]


@pytest.mark.parametrize(("old", "new"), [("file", "file"), ("file", "flags"), ("flags", "file")])
def test_both_names_at_once_are_refused(old: str, new: str, tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    tables = {"limits": old, "polling": new}
    given = [f"[{name}]\nfetches = 3" for name, place in tables.items() if place == "file"]
    config.write_text("\n".join(given))
    flags = {f"{name}.fetches": "3" for name, place in tables.items() if place == "flags"}
    with pytest.raises(ConfigurationError, match=r"limits.fetches and polling.fetches are both"):
        load_settings(config=config, flags=flags)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("limits.fetches", "0", "limits.fetches is 0: give a whole number"),
        ("limits.stale_after_s", "x", "limits.stale_after_s is 'x'"),
        ("limits.fetchs", "1", "did you mean polling.fetches?"),
    ],
)
def test_a_bad_value_is_told_by_the_name_that_was_given(name: str, value: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        load_settings(config=None, flags={name: value})
    assert says in str(error.value)


def test_an_old_name_in_code_goes_on_working_with_a_warning_for_each() -> None:
    with pytest.warns(DeprecationWarning, match="is now Polling") as told:
        limits = Limits(fetches=3, subscriptions=5, watch_linger_s=0)  # type: ignore[call-arg]
    assert [str(each.message) for each in told] == [
        "Limits(fetches=...) is now Polling(fetches=...)",
        "Limits(watch_linger_s=...) is now Polling(watch_linger_s=...)",
    ]
    assert {each.filename for each in told} == {__file__}
    settings = Settings(limits=limits)
    assert settings.polling == Polling(fetches=3, watch_linger_s=0)
    assert settings.limits == Limits(subscriptions=5)
    # No longer there, it neither warns nor contradicts a value that is given later.
    polling = attrs.evolve(settings.polling, fetches=4)
    assert attrs.evolve(settings, polling=polling).polling.fetches == 4
    assert attrs.evolve(settings.limits, subscriptions=6).subscriptions == 6


def test_both_names_in_code_are_refused() -> None:
    with pytest.warns(DeprecationWarning, match="is now Polling"):
        limits = Limits(fetches=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="are both set: keep"):
        Settings(limits=limits, polling=Polling(fetches=5))
    with (
        pytest.warns(DeprecationWarning, match="is now Polling"),
        pytest.raises(ConfigurationError, match="fetches is 0"),
    ):
        Limits(fetches=0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="fetchs"):
        Limits(fetchs=1)  # type: ignore[call-arg]
