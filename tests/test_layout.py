"""The tests' own order: what several share stands in `harness`, and folders mirror the package."""

from __future__ import annotations

import ast
from pathlib import Path

from harness.support import TESTS

import trading_push


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_test_file_imports_from_another():
    wrong = [
        f"{path.relative_to(TESTS)} imports {name}"
        for path in TESTS.rglob("*.py")
        for name in imported(path)
        if any(part == "conftest" or part.startswith("test_") for part in name.split("."))
    ]
    assert wrong == []


def test_folders_mirror_the_package():
    package = Path(trading_push.__file__).parent
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    folders -= {Path(), Path("hard")}  # attacks, fuzz, crowds: what is hard on all of it
    assert [str(folder) for folder in sorted(folders) if not (package / folder).is_dir()] == []
