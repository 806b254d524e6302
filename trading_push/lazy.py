"""Public names of a package that are imported when somebody first asks for them (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazy"]


def lazy(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package.

    A client that imports one name must not load the server for it. Type checkers read the imports
    that stand beside it, under `TYPE_CHECKING`; a test holds the two together.

    Args:
        package: The package's `__name__`.
        names: The names that each of its modules defines, separated by spaces.
    """
    modules = {
        name: f"{package}.{module}" for module, defined in names.items() for name in defined.split()
    }

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__
