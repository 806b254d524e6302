"""Define a setting together with its description, and read the descriptions of all of them.

The table of the documentation, the sample file and `trading-push serve --help` are made from these
descriptions (see `reference`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import attrs

from trading_push.settings.validators import Validator

__all__ = ["Description", "descriptions", "section", "setting"]

_MEANING: Final = "meaning"
_UNIT: Final = "unit"
_EXAMPLE: Final = "example"
_CLASS: Final = "class"  # of a section


def setting(
    default: Any,
    validator: Validator | None,
    meaning: str,
    *,
    unit: str = "",
    example: str | None = None,
    repr: bool = True,
) -> Any:
    """Make an attrs field that is a setting.

    Args:
        default: The value if none is given; None for "not set".
        validator: Refuses a value that cannot be used.
        meaning: One or more whole sentences, for the table, the sample and the help.
        unit: In which unit it is: `s`, `bytes`, `1/s`, or none.
        example: What the sample shows of a setting without a default: the value as TOML, or whole
            lines if it is a table.
        repr: Whether the value may be shown; False for secrets.
    """
    return attrs.field(
        default=default,
        validator=validator,
        repr=repr,
        metadata={_MEANING: meaning, _UNIT: unit, _EXAMPLE: example},
    )


def section(cls: type, meaning: str = "") -> Any:
    """Make the attrs field of a section; `meaning` stands above it in the sample."""
    return attrs.field(factory=cls, metadata={_CLASS: cls, _MEANING: meaning})


@attrs.frozen
class Description:
    """What is known of one setting.

    Attributes:
        path: Its whole name, `section.name`.
        default: Its default; None if it is not set by default.
        meaning: What it means, in whole sentences.
        unit: Its unit; empty for none.
        example: What the sample shows in place of a default.
        of_section: The meaning of its section.
    """

    path: str
    default: Any
    meaning: str
    unit: str
    example: str | None
    of_section: str

    @property
    def section(self) -> str:
        """The section's name; empty for a setting outside any."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The name within its section."""
        return self.path.rpartition(".")[2]


def descriptions(root: type[attrs.AttrsInstance]) -> Iterator[Description]:
    """Describe every setting, in the order of their definitions.

    Args:
        root: The class `Settings`.
    """
    for field in attrs.fields(root):
        if _CLASS in field.metadata:
            for inner in attrs.fields(field.metadata[_CLASS]):
                yield _describe(f"{field.name}.{inner.name}", inner, field.metadata[_MEANING])
        else:
            yield _describe(field.name, field, "")


def _describe(path: str, field: attrs.Attribute[Any], of_section: str) -> Description:
    # An empty table counts as not set.
    default: Any = None if type(field.default) is attrs.Factory else field.default
    metadata = field.metadata
    return Description(
        path, default, metadata[_MEANING], metadata[_UNIT], metadata[_EXAMPLE], of_section
    )
