"""Import an application's objects by their names `module:attribute`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from typing import Any

from trading_push.errors import ConfigurationError

__all__ = ["flask_app", "function", "resolve"]


def resolve(setting: str, name: str) -> Any:
    """Import what `module:attribute` names; the current directory can be imported from.

    Args:
        setting: The setting that names it, for the message of an error.
        name: The name.

    Raises:
        ConfigurationError: There is no such module or attribute, or the import raises.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # for a script, sys.path begins with the script's directory
    module_name, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise ConfigurationError(
                f"{setting} is {name!r}: there is no module {missing!r}: correct the name, or "
                "start in the directory that it is in"
            ) from None
        raise _raised(setting, f"the import of {module_name!r}", error) from error
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            alike = difflib.get_close_matches(attribute, dir(found), n=1)
            hint = f"did you mean {alike[0]!r}?" if alike else "correct the name"
            raise ConfigurationError(
                f"{setting} is {name!r}: there is no {attribute!r} in it: {hint}"
            ) from None
    return found


def function(setting: str, name: str) -> Any:
    """Import a function.

    Raises:
        ConfigurationError: As `resolve`, or it is not a function.
    """
    found = resolve(setting, name)
    if not callable(found):
        raise ConfigurationError(
            f"{setting} is {name!r}, which is a {type(found).__name__}: name a function"
        )
    return found


def flask_app(setting: str, name: str) -> Any:
    """Import a Flask application, or the function that makes it.

    Raises:
        ConfigurationError: As `resolve`; or the function raises, or gives something else.
    """
    found = resolve(setting, name)
    if isinstance(found, type) or (callable(found) and not hasattr(found, "app_context")):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise _raised(setting, f"{name!r}", error) from error
    if not callable(getattr(found, "app_context", None)):
        raise ConfigurationError(
            f"{setting} is {name!r}, which gives a {type(found).__name__}: name a Flask "
            "application, or a function that makes one"
        )
    return found


def _raised(setting: str, what: str, error: BaseException) -> ConfigurationError:
    """Tell in one line what an application's code raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    here = os.path.join(os.getcwd(), "")
    own = [each for each in frames if each.filename.startswith(here)] or frames
    where = f" ({own[-1].filename.removeprefix(here)}, line {own[-1].lineno})"
    said = str(error).strip().splitlines()[:1]
    return ConfigurationError(
        f"{setting}: {what} raises {': '.join([type(error).__name__, *said])}{where}: correct it"
    )
