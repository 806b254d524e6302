"""The pages are true: what they print runs, what they list is what the code has, links lead there.

The README's first examples, and those of the sources, are run by `test_readme.py` and beside the
tests of what they show.
"""

from __future__ import annotations

import ast
import asyncio
import gzip
import importlib
import importlib.metadata
import inspect
import json
import os
import pkgutil
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import attrs
import click
import msgspec
import pytest
import trio

from harness.readme import PAGES, ROOT, block
from harness.support import (
    PATIENCE_S,
    SECRET,
    Process,
    client,
    plain_hypercorn,
    serving,
)

import trading_push
import trading_push.protocol
from trading_push import (
    AuthenticationError,
    CloseCode,
    ConfigurationError,
    ErrorCode,
    JwtAuthenticator,
    PushService,
    Settings,
    Statistics,
    Ticker,
    issue_token,
    load_settings,
    models,
    open_push_service,
)
from trading_push.errors import may_reconnect
from trading_push.factory import open_configured_service
from trading_push.logs import CATALOGUE
from trading_push.settings.schema import Auth, Intervals
from trading_push.sources.paper import audit
from trading_push.testing import MemoryTransport, peer
from trading_push.topics import BUILTIN_CHANNELS

BIN = Path(sys.executable).parent
PROTOCOL = PAGES["docs/protocol.md"]


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table that begins with this row."""
    [table] = re.findall(rf"^{re.escape(head)}\n(.*?)(?:\n\n|\Z)", PAGES[page], re.S | re.M)
    unescaped = [re.sub(r"\\\|", "\0", row) for row in table.splitlines()[1:]]
    return [[cell.strip().replace("\0", "|") for cell in row.split("|")[1:-1]] for row in unescaped]


def code(cell: str) -> str:
    """The first piece of code in a cell."""
    return re.findall(r"`([^`]+)`", cell)[0]


# --- links, names and files ----------------------------------------------------------------------


def without_code(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = without_code(text)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(PAGES[page])):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        if not there.exists() or (
            anchor and anchor not in anchors(there.read_text(encoding="utf-8"))
        ):
            dead.append(target)
    assert dead == []


def test_each_page_is_in_the_readme_s_table():
    pages = {each for each in PAGES if each.startswith("docs/")}
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", PAGES["README.md"].split("## Pages")[1]))
    assert linked == pages


def test_each_example_is_run_or_says_why_not():
    bare = []
    for page, text in PAGES.items():
        before = ""
        inside = False
        for line in text.splitlines():
            if line.startswith("```"):
                inside = not inside
                if inside and not re.fullmatch(r"<!-- (tested: \w+|shown: .+) -->", before):
                    bare.append(f"{page}: {before!r}")
            before = line
    assert bare == []


def settings_of(tree: type, prefix: str = "") -> Iterator[str]:
    for field in attrs.fields(tree):
        made = getattr(tree(), field.name)
        if attrs.has(type(made)):
            yield from settings_of(type(made), f"{field.name}.")
        else:
            yield prefix + field.name


def test_each_setting_that_is_named_exists():
    known = set(settings_of(Settings))
    sections = {name.split(".")[0] for name in known if "." in name}
    wrong = [
        f"{page}: {name}"
        for page, text in PAGES.items()
        if page != "CHANGELOG.md"  # which tells of old names, too
        for name in re.findall(r"`([a-z]+\.\w+)(?: = [^`]*)?`", text)
        if name.split(".")[0] in sections and name not in known
        # Those of the two tables that have a name of the user's own.
        if name not in ("intervals.TYPE", "database.queries.TYPE")
    ]
    assert wrong == []


def test_each_variable_that_is_named_is_one():
    settings = {"TRADING_PUSH_" + name.replace(".", "_").upper() for name in settings_of(Settings)}
    others = {code(row[0]) for row in rows("docs/configuration.md", "| variable | what it does |")}
    named = set(re.findall(r"TRADING_PUSH_[A-Z_]+\b", "".join(PAGES.values())))
    of_the_build = {"TRADING_PUSH_CHART_FILE"}
    assert named - settings - others == {"TRADING_PUSH_SECTION_NAME", *of_the_build}


def resolve(name: str) -> Any:
    """What a dotted name of the package stands for."""
    there: Any = importlib.import_module("trading_push")
    for part in name.split(".")[1:]:
        try:
            there = importlib.import_module(f"{there.__name__}.{part}")
        except ModuleNotFoundError:
            there = getattr(there, part)
    return there


def test_each_name_of_the_package_can_be_imported():
    loggers = {f"trading_push.{texts[0]}" for texts in CATALOGUE.values()}
    text = "".join(PAGES.values())
    names = set(re.findall(r"\btrading_push(?:\.[A-Za-z_]+)+", text)) - loggers
    assert len(names) > 5
    for name in names:
        # The library of the HTTP source is not installed everywhere.
        with suppress(ConfigurationError):
            resolve(name)


def test_each_file_that_is_named_exists():
    missing = set()
    for page in ("docs/architecture.md", "CONTRIBUTING.md"):
        for name in re.findall(r"`((?:trading_push|tests|docs|\.ci)/[\w./-]*)`", PAGES[page]):
            if not (ROOT / name).exists():
                missing.add(name)
        for name in re.findall(r"`(test_\w+\.py)`", PAGES[page]):
            if not list((ROOT / "tests").rglob(name)):
                missing.add(name)
    assert missing == set()


def test_each_package_is_in_the_table_of_packages():
    table = PAGES["docs/architecture.md"].split("## Packages")[1].split("### Layers")[0]
    named = set(re.findall(r"`trading_push/([\w/.]+)`", table))
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "trading_push").iterdir()
        if path.is_dir() or path.suffix == ".py"
    }
    # The samples that `init` writes, and what makes public names lazy.
    assert there - named - {"__pycache__/", "data/", "lazy.py"} == set()
    assert named - there == set()


def test_the_layers_are_those_that_are_held():
    [held] = [
        node.value
        for node in ast.parse((ROOT / "tests/test_imports.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "LAYERS"
    ]
    layers = [set(names) - {"", "__main__", "lazy"} for names in ast.literal_eval(held)]
    text = PAGES["docs/architecture.md"].split("### Layers")[1].split("\n## ")[0]
    assert [
        set(re.findall(r"`(\w+)`", line)) for line in re.findall(r"^\d+\. (.*)", text, re.M)
    ] == (layers)


def test_what_is_printed_goes_into_the_sdist():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = pyproject["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {page.partition("/")[0] for page in PAGES} <= set(included)


def test_the_sessions_are_nox_s():
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    sessions = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("session" in ast.unparse(each) for each in node.decorator_list)
    }
    table = rows("CONTRIBUTING.md", "| command | what it does | time |")
    named = {found[1] for row in table if (found := re.search(r"-s (\w+)", row[0]))}
    assert named == sessions


def test_the_commands_of_ci_are_printed():
    assert re.search(r"^python3 -m venv .* -s tests$", PAGES["README.md"], re.M)
    assert ".venv/bin/pip install . && .venv/bin/trading-push serve" in PAGES["README.md"]


# --- the benchmark -------------------------------------------------------------------------------


def test_the_figures_of_the_benchmark_are_those_it_found():
    from bench import report

    found = report.earlier(ROOT / "tests" / "bench" / "results")
    whole = report.markdown(found)
    page = PAGES["docs/benchmark.md"]
    [table] = re.findall(r"<!-- nox -s bench -- --table -->\n(.*?)\n\n", page, re.S)
    assert table == whole
    [some] = re.findall(
        r"<!-- some rows of: nox -s bench -- --table -->\n(.*?)\n\n", PAGES["README.md"], re.S
    )
    assert set(some.splitlines()) <= set(whole.splitlines())
    medians = [
        found["polling-sqlite"]["servers"][server][figure]["median"]
        for figure in ("core_percent", "lag_p99_ms")
        for server in ("hypercorn", "native")
    ]
    polling = page.split("## Polling")[1].split("\n## ")[0]
    printed = re.findall(r"(\d+\.\d)(?= (?:%|ms))", polling)
    assert printed == [f"{median:.1f}" for median in medians]
    [again] = re.findall(r"measured in (\w+) rounds", page)
    assert {"two": 2}[again] == found["fanout-1000"]["rounds"]
    assert {found[name]["rounds"] for name, _, _ in report.COLUMNS if name != "fanout-1000"} == {1}


# --- lists that mirror the protocol --------------------------------------------------------------


def test_error_codes():
    table = rows("docs/protocol.md", "| `code` | when | retryable |")
    printed = {code(row[0]): row[2].startswith("yes") for row in table}
    assert printed == {each.value: each.retryable for each in ErrorCode}
    assert "not valid yet" in {code(row[0]): row[2] for row in table}["bad_token"]
    assert AuthenticationError(not_yet=True).retryable


def test_close_codes():
    table = rows("docs/protocol.md", "| close code | when | come back? |")
    printed = {
        int(number): not row[2].startswith("no") for row in table for number in row[0].split(", ")
    }
    assert printed == {int(each): may_reconnect(each) for each in CloseCode}
    assert may_reconnect(4499)
    assert not may_reconnect(4500)


async def test_ops_of_requests_and_replies():
    printed = rows("docs/protocol.md", "| request | reply |")[:-1]
    table = {code(row[0]): code(row[1]) for row in printed}
    async with (
        open_push_service(authenticate=trading_push.Principal) as service,
        peer(service, "4") as four,
    ):
        refused = await four.request("nope")
        assert refused["op"] == "error"
        ops = refused["error"]["message"].partition("one of ")[2].split(", ")
        assert sorted(ops) == sorted(table)
        for op, reply in table.items():
            fields = {"auth": {"token": "4"}, "subscribe": {"args": []}}
            fields["unsubscribe"] = fields["subscribe"]
            assert (await four.request(op, **fields.get(op, {})))["op"] == reply
    tags = {
        each.__struct_config__.tag
        for module in pkgutil.iter_modules(trading_push.protocol.__path__, "trading_push.protocol.")
        for each in vars(importlib.import_module(module.name)).values()
        if isinstance(each, type) and issubclass(each, msgspec.Struct)
    } - {None}
    assert tags <= {*table.values(), "error", "notice"}


CANDLES = ["candles.SYMBOL"]


async def test_built_in_channels_and_their_payloads():
    table = {code(row[0]): row for row in rows("docs/protocol.md", "| channel | kind | `data` |")}
    assert list(table) == [*BUILTIN_CHANNELS, "fills", "ticker.SYMBOL", "ticker.*", *CANDLES]
    assert table.pop("ticker.*")[1] == "keyed"  # a list of the row above
    assert table.pop(*CANDLES)[1] == "keyed"  # see tests/upstream/test_candles.py
    assert {field.name for field in attrs.fields(Intervals)} == set(BUILTIN_CHANNELS)
    made = {
        "balance": [models.Balance],
        "positions": [models.Position],
        "pnl": [models.Pnl, models.SymbolPnl],
        "orders": [models.Order],
        "fills": [models.Fill],
        "ticker.SYMBOL": [models.Ticker],
    }
    async with (
        open_push_service(authenticate=trading_push.Principal) as service,
        peer(service, "4") as four,
    ):
        await four.subscribe(*table)
        for channel, row in table.items():
            printed = [each.split(", ") for each in re.findall(r"`\{([^}]*)\}`", row[2])]
            assert printed == [
                [field.name for field in attrs.fields(each)] for each in made[channel]
            ]
            user = None if channel.startswith("ticker") else 4
            for number in range(2):
                await service.publish(channel, number, user=user)
        await trio.testing.wait_all_tasks_blocked()
    there = {each for each in vars(models).values() if isinstance(each, type) and attrs.has(each)}
    assert there == {each for classes in made.values() for each in classes} | {models.Candle}
    kinds = {name: "events" if name == "fills" else "state" for name in table}
    assert {name: row[1] for name, row in table.items()} == kinds


def constants(node: ast.expr) -> set[str]:
    """The texts that an expression may be."""
    if isinstance(node, ast.IfExp):
        return constants(node.body) | constants(node.orelse)
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def status_reasons() -> set[str]:
    """Each reason that the package gives: to Status, to a sink's `stale`, or for later."""
    found: set[str] = set()
    for path in (ROOT / "trading_push").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id="Status"), args=[_, reason]):
                    found |= constants(reason)
                case ast.Call(func=ast.Attribute(attr="stale" | "mark_stale"), args=[reason, *_]):
                    found |= constants(reason)
                case ast.Assign(targets=[ast.Name(id="reason")], value=reason):
                    found |= constants(reason)
                case ast.Assign(targets=[ast.Subscript(value=ast.Attribute())], value=reason):
                    found |= constants(reason)
    return {each for each in found if re.fullmatch(r"[a-z_]+", each)}


def test_reasons_of_a_status():
    printed = {code(row[0]) for row in rows("docs/protocol.md", "| `reason` | when |")}
    assert printed == status_reasons()


def statuses(path: str) -> set[int]:
    """The HTTP statuses of errors that a file names."""
    tree = ast.parse((ROOT / "trading_push" / path).read_text(encoding="utf-8"))
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and type(node.value) is int and 400 <= node.value < 600
    }


def test_statuses_of_http():
    handshake = rows("docs/protocol.md", "| status | when |")
    assert {int(row[0]) for row in handshake} == statuses("endpoints/admission.py")
    publish = rows("docs/publishing.md", "| status | when |")
    of_access = statuses("web/access.py") | statuses("web/routes.py") - {404}
    assert {int(row[0]) for row in publish} == statuses("web/publish.py") | of_access | {200}


def test_parameters_and_statistics_of_a_service():
    parameters = rows("docs/embedding.md", "| parameter | what it is |")
    assert {code(row[0]) for row in parameters} == set(
        inspect.signature(open_push_service).parameters
    )
    fields = rows("docs/embedding.md", "| field | what it says |")
    assert {name for row in fields for name in re.findall(r"`(\w+)`", row[0])} == {
        field.name for field in attrs.fields(Statistics)
    }


def test_notices():
    codes = {
        node.args[0].value
        for path in (ROOT / "trading_push").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Notice")
        if node.args and isinstance(node.args[0], ast.Constant)
    }
    assert codes
    assert set(re.findall(r'"op":"notice","code":"(\w+)"', PROTOCOL)) == codes


def test_defaults_that_pages_name():
    limits = Settings().limits
    for page, text in PAGES.items():
        for name, said in re.findall(r"`limits\.(\w+)` \(([\d,]+)\)", text):
            assert float(said.replace(",", "")) == getattr(limits, name), (page, name)


def test_attacks_are_met_by_the_defaults_that_are_printed():
    limits = Settings().limits
    printed = {
        name: row[2]
        for row in rows("docs/security.md", "| Attack | What meets it | Default |")
        if row[2]
        for name in re.findall(r"`limits\.(\w+)`", row[1])[:1]
    }
    for name, said in printed.items():
        [number, *_] = re.findall(r"[\d,]+", said) or [None]
        if number is None:
            continue
        value = float(number.replace(",", ""))
        value *= 1024 if "KiB" in said else 2**20 if "MiB" in said else 1
        if name == "heartbeat_s":
            value = float(said.split("×")[1].split()[0])
        assert value == getattr(limits, name), name


# --- the log -------------------------------------------------------------------------------------


def test_lines_of_the_log():
    ordinary = rows("docs/logs.md", "| event | Chinese | English |")
    loud = rows("docs/logs.md", "| event | level | Chinese | English | what it means |")
    assert all(row[4] for row in loud)
    printed = {code(row[0]): ("INFO", *row[1:3]) for row in ordinary}
    printed |= {code(row[0]): tuple(row[1:4]) for row in loud}
    levels = {"⚠️": "WARNING", "❌": "ERROR"}
    expected = {
        event: (
            next((level for mark, level in levels.items() if texts[1].startswith(mark)), "INFO"),
            *(f"`{text.strip()}`" for text in texts[1:]),
        )
        for event, texts in CATALOGUE.items()
    }
    assert printed == expected


def test_an_unauthenticated_leave_is_logged_as_printed(tmp_path):
    async def come_and_go(url: str) -> None:
        async with client(url) as nobody:
            await nobody.socket.close(1001)

    expected = block("unauthenticated").replace("192.168.100.172", "127.0.0.1").splitlines()
    with serving(tmp_path) as server:
        asyncio.run(come_and_go(server.url))
        server.wait_for_line(expected[-1])
        assert server.stop() == 0
    assert server.err[-len(expected) :] == expected


def test_a_line_in_json_is_as_printed(tmp_path):
    async def come_and_go(url: str) -> None:
        async with client(url, 4) as four:
            await four.socket.close(1000)

    with serving(tmp_path, "--log-format", "json", "--lang", "en") as server:
        asyncio.run(come_and_go(server.url))
        server.wait_for_line('"event":"authenticated"')
        [line] = [each for each in server.err if '"event":"authenticated"' in each]
    printed, found = json.loads(block("json_line")), json.loads(line)
    assert list(printed) == list(found)
    assert {**printed, "at": 0} == {**found, "at": 0}


# --- commands and files --------------------------------------------------------------------------


def flags_of(command: str) -> list[str]:
    """What a printed `trading-push serve` is given."""
    words = shlex.split(command.splitlines()[-1])
    assert words[:2] == [".venv/bin/trading-push", "serve"]
    return words[2:]


def shell(command: str, **env: str) -> str:
    """What a printed command of `.venv/bin` prints."""
    done = subprocess.run(
        ["sh", "-c", command.replace(".venv/bin/", f"{BIN}/")],
        env={**os.environ, "TRADING_PUSH_JWT_SECRET": SECRET, **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_watch_shows_what_the_server_pushes(tmp_path):
    with serving(tmp_path) as server:
        pushed = shell(block("watch").strip() + f" {server.url} --count 6")
    assert len([json.loads(line) for line in pushed.splitlines()]) == 6


def test_a_day_is_recorded_and_played_as_printed(tmp_path):
    first = block("record").splitlines()[0]
    with serving(tmp_path) as server:
        shell(f"cd {tmp_path} && {first} {server.url} --count 6")
    with serving(tmp_path, *flags_of(block("record")), cwd=tmp_path) as server:
        assert server.stop() == 0


async def test_a_token_that_may_publish(tmp_path):
    printed = shell(block("publish_token"), XDG_DATA_HOME=str(tmp_path)).strip()
    principal = await JwtAuthenticator(Auth(), SECRET)(printed)
    assert (principal.user, principal.claims["publish"]) == ("back end", True)


def test_serve_is_told_as_printed(tmp_path):
    (tmp_path / "trading-push.toml").write_text(block("paper"))
    flags = flags_of(block("serve"))
    assert flags == ["--config", "trading-push.toml", "--host", "0.0.0.0", "--port", "8000"]
    assert flags_of(block("sql_serve")) == flags_of(block("http_serve")) == flags[:2]
    with serving(tmp_path, *flags[:4], cwd=tmp_path) as server:
        assert server.out[0].startswith("Serving on http://0.0.0.0:")
        assert server.stop() == 0
    assert audit(tmp_path / "accounts.sqlite3") == []


def test_what_is_installed_for_a_source_is_what_the_package_says():
    extras = importlib.metadata.metadata("trading_push").get_all("Provides-Extra")
    named = re.findall(r"pip install '\.\[(\w+)\]'", "".join(PAGES.values()))
    assert set(named) == set(extras or ())
    assert "pip install '.[http]'" in block("http_serve")


def test_a_setting_of_the_environment(monkeypatch):
    monkeypatch.delenv("TRADING_PUSH_CONFIG", raising=False)
    for name, value in re.findall(r"export (\w+)=(\S+)", block("environment")):
        monkeypatch.setenv(name, value)
    assert load_settings(config=None, flags={}).server.port == 9000


def test_the_flags_of_serve():
    from trading_push.cli.commands import main

    printed = {
        code(row[0]).split()[0] for row in rows("docs/configuration.md", "| flag | setting |")
    }
    serve = main.get_command(click.Context(main), "serve")
    assert serve is not None
    assert printed == {option for each in serve.params for option in each.opts}


def test_a_tape_is_played_as_printed(tmp_path):
    now_ms = 1_723_075_200_000
    with gzip.open(tmp_path / "frames.jsonl.gz", "wt") as tape:
        for step in range(200):
            data = {"e": "trade", "E": now_ms, "T": now_ms, "s": "BTCUSDT", "q": "0.5", "t": step}
            data["p"] = f"{61500 + step}.10"
            frame = {"stream": "btcusdt@trade", "data": data}
            tape.write(json.dumps({"recv_ns": now_ms * 1_000_000, "frame": frame}) + "\n")
            now_ms += 1000

    async def watch(url: str) -> str:
        async with client(url, 4) as four:
            await four.subscribe("ticker.BTCUSDT")
            push = await four.until(lambda push: push["type"] != "status")
            return str(push["data"]["last"])

    with serving(tmp_path, *flags_of(block("tape")), cwd=tmp_path) as server:
        assert re.fullmatch(r"61[56]\d\d\.10", asyncio.run(watch(server.url)))
        assert server.stop() == 0


def test_functions_are_served_as_printed(tmp_path):
    (tmp_path / "accounts.py").write_text(block("function_code"))
    (tmp_path / "trading-push.toml").write_text(block("function"))

    async def watch(url: str) -> Any:
        async with client(url, 4) as four:
            await four.subscribe("balance")
            return (await four.until(lambda push: push["type"] == "snapshot"))["data"]

    with serving(tmp_path, "--config", "trading-push.toml", cwd=tmp_path) as server:
        assert asyncio.run(watch(server.url)) == [{"asset": "USDT", "total": "100.00"}]
        assert server.stop() == 0
    namespace: dict[str, Any] = {}
    exec(compile(block("function_code"), "function.md", "exec"), namespace)
    assert namespace["fetch"]("4", "balance") == [{"asset": "USDT", "total": "100.00"}]


async def test_the_paper_exchange_is_configured_as_printed(tmp_path, monkeypatch):
    monkeypatch.delenv("TRADING_PUSH_CONFIG", raising=False)
    monkeypatch.setenv("TRADING_PUSH_JWT_SECRET", SECRET)
    (tmp_path / "trading-push.toml").write_text(block("paper"))
    settings = load_settings(config=tmp_path / "trading-push.toml", flags={})
    async with open_configured_service(settings):
        assert (tmp_path / "accounts.sqlite3").exists()
    assert settings.market.seed == 7


async def test_own_channels_are_configured_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "trading-push.toml"
    config.write_text(block("own_channels"), encoding="utf-8")
    with closing(sqlite3.connect(tmp_path / "accounts.db")) as database:
        database.execute("CREATE TABLE margins (user_id TEXT, equity TEXT, used TEXT)")
        database.execute("INSERT INTO margins VALUES ('4', '100.5', '7')")
        database.commit()
    settings = load_settings(config=config, flags={})
    async with (
        open_configured_service(settings, trading_push.Principal) as service,
        peer(service, "4") as four,
    ):
        names = [each["channel"] for each in (await four.request("channels"))["channels"]]
        assert {"margin", "alerts", "news"} < set(names)
        await four.subscribe("margin")
        assert (await four.push())["data"] == {"equity": "100.5", "used": "7"}
        await four.subscribe("news", "alerts")
        assert {(await four.push())["reason"], (await four.push())["reason"]} == {"quiet"}
        await service.publish("news", "all")
        await service.publish("alerts", "one", user=4)
        # Each channel has a sender of its own: one may be before the other.
        assert {(await four.push())["data"] for _ in range(2)} == {"all", "one"}


def test_an_application_s_own_test_is_run_as_printed(tmp_path):
    (tmp_path / "test_margin.py").write_text(block("testing"))
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\nfilterwarnings = error\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert "1 passed" in done.stdout, done.stdout


# --- deployment ----------------------------------------------------------------------------------


def hypercorn_flags(printed: str) -> list[str]:
    words = shlex.split(printed.replace("\\\n", " "))
    assert words[0].endswith("hypercorn")
    assert words[1:3] == ["--worker-class", "trio"]
    assert words[-1] == "trading_push.asgi:app"
    bind = words.index("--bind")
    assert words[bind + 1] == "127.0.0.1:8000"
    return [*words[3:bind], *words[bind + 2 : -1]]


async def see_a_ticker(url: str, **options: Any) -> None:
    async with client(url, 4, **options) as four:
        await four.subscribe("ticker.BTCUSDT")
        await four.until(lambda push: push["type"] == "snapshot")


def test_plain_hypercorn_is_started_as_printed(tmp_path):
    command = block("hypercorn").partition("\nhypercorn ")[2]
    flags = hypercorn_flags(f"hypercorn {command}")
    with plain_hypercorn(tmp_path, *flags) as server:
        asyncio.run(see_a_ticker(server.url))
        assert server.stop() == 0
        assert server.traces() == []
    unit = block("systemd")
    [started] = re.findall(r"^ExecStart=(.*?[^\\])$", unit, re.S | re.M)
    assert started.split()[1:] == ["serve", *["--config", "/etc/trading-push/trading-push.toml"]]
    keys = re.findall(r"^(\w+)=", unit, re.M)
    assert keys.count("ExecStart") == 1
    if shutil.which("systemd-analyze"):
        (tmp_path / "trading-push.service").write_text(unit.replace(started, "/bin/true"))
        done = subprocess.run(
            ["systemd-analyze", "verify", str(tmp_path / "trading-push.service")],
            capture_output=True,
            text=True,
        )
        assert "Unknown" not in done.stderr, done.stderr


def test_an_operator_s_commands_are_run_as_printed(tmp_path):
    def run(server: Process) -> list[str]:
        script = block("operate").replace("127.0.0.1:8000", f"127.0.0.1:{port_of(server)}")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "TRADING_PUSH_JWT_SECRET": SECRET}
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    async def drive(server: Process) -> None:
        async with client(server.url, 4) as four:
            assert await asyncio.to_thread(run, server) == ["4 1", "1 closed"]
            await four.socket.wait_closed()
            assert four.socket.close_code == CloseCode.KICKED

    with serving(tmp_path) as server:
        asyncio.run(drive(server))


def port_of(server: Process) -> str:
    return str(server.url.rsplit(":", 1)[1].split("/")[0])


# --- the conversations of the protocol -----------------------------------------------------------


class Accounts:
    async def fetch(self, user_id: str, data_type: str) -> Any:
        balance = {"asset": "USDT", "free": "90.00", "locked": "10.00", "total": "100.00"}
        return {"balance": [balance], "pnl": {"total": "12.50"}}.get(data_type)


async def play(four: MemoryTransport, conversation: str, **known: str) -> None:
    """Say what the client says, and expect what it is sent; channels may take turns."""
    expected: list[str] = []
    # A line that is indented goes on with the one before.
    for line in re.sub(r"\n +", "", conversation).splitlines():
        direction, message = line[:2], line[3:]
        for printed, here in known.items():
            message = message.replace(printed, here)
        if direction == "->":
            four.say_text(message)
        else:
            expected.append(re.escape(message).replace("…", ".+?"))
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + PATIENCE_S
        seen: list[str] = []
        while expected:
            [message] = await four.next()
            text = json.dumps(message, separators=(",", ":"), ensure_ascii=False)
            seen.append(text)
            found = next((each for each in expected if re.fullmatch(each, text)), None)
            assert found is not None, (text, expected)
            expected.remove(found)
    assert expected == [], seen


async def tick(service: PushService, *prices: str) -> None:
    await service.publish_many(
        ("ticker.BTCUSDT", Ticker("BTCUSDT", last=Decimal(price)), None) for price in prices
    )
    await trio.testing.wait_all_tasks_blocked()


async def test_conversations_are_as_printed(autojump_clock):
    settings = Settings(jwt_secret=SECRET)
    token = issue_token(SECRET, "4", 900)
    async with open_push_service(Accounts(), settings=settings) as service:
        async with peer(service) as four:
            await play(four, block("wire_auth"), TOKEN=token)
            await play(four, block("wire_subscribe"))
            await play(four, block("wire_unsubscribe"))
            await play(four, block("wire_channels"))
            await tick(service, "61500.10")
            reading, four.reading = four.reading, trio.Event()
            await tick(service, "61500.20", "61500.30", "61500.40")
            four.reading.set()
            four.reading = reading
            await play(four, block("wire_pushes"))
            await play(four, block("wire_symbols"))
            await play(four, block("wire_error"))
            assert four.sent == []
            for number in range(1, 4):
                await service.publish("fills", {"fill_id": f"f{number}", "price": "1"}, user=4)
            async with peer(service, "4") as again:
                await again.subscribe("fills")
                epoch = (await again.push())["epoch"]
            async with peer(service, "4") as again:
                await play(again, block("wire_resume"), EPOCH=epoch)
            assert four.sent == []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.drain)
                await play(four, block("wire_end"))
        assert four.closed_with == (1012, "service restart")
