"""The layers of the package: imports run one way, with no circle, and sans-I/O stays so."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trading_push

PACKAGE = Path(trading_push.__file__).parent

# Each layer may import from those before it. Within one, no two packages import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "histogram", "models", "supervision", "lazy"),
    ("topics", "user_ids", "logs", "transport"),
    ("settings",),
    ("auth", "broker", "sources"),
    ("protocol",),
    ("upstream", "connections", "web", "client"),
    ("endpoints",),
    ("service", "statistics", "metrics"),
    ("factory", "testing", "reload", "flask"),
    ("server",),
    ("check",),
    ("", "asgi", "cli", "__main__"),
)


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix("__init__")
        .rstrip("."): path
        for path in PACKAGE.rglob("*.py")
    }


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it the import stands."""
    known = modules()
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            if node.module and node.module.split(".")[0] == "trading_push":
                base = node.module.removeprefix("trading_push").lstrip(".")
                for alias in node.names:
                    name = f"{base}.{alias.name}".lstrip(".")
                    found.add(name if name in known else base)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "trading_push":
                    found.add(alias.name.removeprefix("trading_push").lstrip("."))
    return found


def layer_of(module: str) -> int:
    package = module.split(".")[0]
    [layer] = [number for number, names in enumerate(LAYERS) if package in names]
    return layer


def test_imports_run_one_way():
    wrong = [
        f"{module or 'trading_push'} imports {other}"
        for module, path in modules().items()
        for other in imported(path)
        if layer_of(other) > layer_of(module)
    ]
    assert wrong == []


def test_no_two_packages_import_each_other():
    pairs = {
        (module.split(".")[0], other.split(".")[0])
        for module, path in modules().items()
        for other in imported(path)
    }
    assert sorted(pair for pair in pairs if pair[0] < pair[1] and pair[::-1] in pairs) == []


def test_there_is_no_circle():
    graph = {module: imported(path) - {module} for module, path in modules().items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join([*trail, module])}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def packages(module: str) -> set[str]:
    """What a module imports from anywhere, by its first name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("module", sorted(each for each in modules() if "protocol" in each))
def test_sans_io_never_imports_trio(module):
    assert "trio" not in packages(module)


def test_no_library_has_a_switch_over_what_is_kept_running():
    assert packages("supervision") - sys.stdlib_module_names == {"trio"}


def loaded_by(program: str) -> set[str]:
    """The modules that a fresh interpreter has after running a program."""
    code = f"{program}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


SERVER = {"sqlalchemy", "hypercorn", "starlette"}


def test_the_client_alone_loads_no_server():
    loaded = loaded_by("from trading_push.client import open_client")
    assert not SERVER & {name.split(".")[0] for name in loaded}
    assert len(loaded) <= 350


CLIENTS = {
    "trading_push.client.client": {"trio", "trio_websocket"},
    "trading_push.client.aio": {"asyncio", "websockets.asyncio.client"},
    "trading_push.client.sync": {"websockets.sync.client"},
}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_loads_no_server_and_no_library_of_another_client(client):
    loaded = loaded_by(f"import {client}")
    assert CLIENTS[client] <= loaded
    others = set().union(*CLIENTS.values()) - CLIENTS[client]
    assert not others & loaded
    assert not SERVER & {name.split(".")[0] for name in loaded}
    assert not [name for name in loaded if name.startswith("trading_push.se")]


def test_a_client_without_its_library_says_what_to_install():
    for name in ("aio", "sync"):
        program = (
            "import sys\n"
            "sys.modules['websockets.exceptions'] = None\n"
            f"try:\n    import trading_push.client.{name}\n"
            "except ImportError as error:\n    sys.exit(str(error))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stderr == (
            "this client needs the library websockets: pip install 'trading_push[aio]'\n"
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["serve", "--help"],
        ["watch", "ws://127.0.0.1:1/ws", "--token", "t"],
        ["token", "--user", "4"],
    ],
    ids=" ".join,
)
def test_a_command_loads_no_server(arguments, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    loaded = loaded_by(
        "import contextlib, io\n"
        "from trading_push.cli.commands import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        f"    main({arguments})"
    )
    assert not SERVER & {name.split(".")[0] for name in loaded}
    assert f"trading_push.cli.{arguments[0]}" in loaded or arguments == ["--help"]


def test_publishing_and_handing_out_tokens_load_no_server():
    loaded = loaded_by("from trading_push.flask import push_blueprint")
    assert not {*SERVER, "httpx"} & {name.split(".")[0] for name in loaded}
    loaded = loaded_by("from trading_push import Publisher, issue_token")
    assert not {*SERVER, "httpx"} & {name.split(".")[0] for name in loaded}


def test_the_package_alone_loads_nothing():
    loaded = loaded_by("import trading_push")
    assert {name for name in loaded if name.startswith("trading_push")} == {
        "trading_push",
        "trading_push.lazy",
    }
    assert not {"trio", "attr", "msgspec"} & loaded


@pytest.mark.parametrize("package", ["", "auth", "client", "logs", "settings", "sources.http"])
def test_what_a_package_hands_on_is_what_type_checkers_see(package):
    path = modules()[package]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    [call] = [node for node in ast.walk(block) if isinstance(node, ast.Call)]
    lazily = {
        (f"{package}.{module}".strip("."), name)
        for module, names in ast.literal_eval(call.args[1]).items()
        for name in names.split()
    }
    seen = {
        (node.module.removeprefix("trading_push."), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert lazily == seen
    [exported] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert sorted(exported) == sorted(name for _, name in seen)


def test_a_name_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="'trading_push' has no attribute 'nope'"):
        trading_push.nope  # noqa: B018


def test_only_the_link_knows_hypercorn():
    for module, path in modules().items():
        if not module.startswith("endpoints.hypercorn") and module != "server":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^(import|from) hypercorn\b", text, re.M), module
