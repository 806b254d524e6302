"""The layers of the package: imports run one way, with no circle, and sans-I/O stays so."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import trading_push

PACKAGE = Path(trading_push.__file__).parent

# Each layer may import from those before it, and within itself without a circle.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "cli.commands",
        "client.client",
        "endpoints",
        "upstream",
        "connections",
        "protocol.messages",
        "auth.tokens",
        "settings.schema",
        "logs.emitter",
        "transport.outbound",
        "transport.origin",
        "transport.proxies",
        "settings.import_string",
        "settings.validators",
        "settings.schema",
        "settings.loading",
        "models",
        "topics",
        "logs.emitter",
    ),
    (
        "protocol.messages",
        "auth.tokens",
        "protocol.rate_limit",
        "supervision",
        "auth.revocation",
        "connections.seats",
    ),
    ("transport.base", "sources.base", "broker.base"),
    ("protocol.session", "connections.subscription", "connections.fanout"),
    ("connections.registry", "connections.heartbeat", "connections.streams"),
    (
        "connections.context",
        "upstream.batcher",
        "upstream.poller",
        "upstream.market_feed",
        "upstream.interest",
    ),
    ("connections.connection",),
    ("transport", "sources", "broker", "web"),
    ("service",),
    ("factory",),
    ("server", "asgi", "testing"),
    ("client.client",),
    ("cli.watch",),
    ("", "cli.commands", "__main__"),
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
    best, depth = len(module), -1
    for number, names in enumerate(LAYERS):
        for name in names:
            if (module == name or (name and module.startswith(f"{name}."))) and len(name) > depth:
                best, depth = number, len(name)
    assert depth >= 0, f"{module} stands in no layer"
    return best


def test_imports_run_one_way():
    wrong = [
        f"{module or 'trading_push'} imports {other}"
        for module, path in modules().items()
        for other in imported(path)
        if layer_of(other) > layer_of(module)
    ]
    assert wrong == []


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


@pytest.mark.parametrize("module", ["protocol.messages", "protocol.session"])
def test_sans_io_never_imports_trio(module):
    assert "trio" not in packages(module)


def test_no_library_has_a_switch_over_what_is_kept_running():
    assert packages("supervision") - sys.stdlib_module_names == {"trio"}


def test_the_client_imports_only_what_it_needs():
    assert imported(modules()["client.client"]) <= {
        "transport.outbound",
        "errors",
        "topics",
        "protocol.messages",
    }


def test_only_the_link_knows_hypercorn():
    allowed = {"endpoints.hypercorn.link", "server"}
    for module, path in modules().items():
        if module not in allowed:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^(import|from) hypercorn\b", text, re.M), module
