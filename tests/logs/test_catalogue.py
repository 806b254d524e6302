"""The catalogue and the calls that emit from it, held together by the source alone.

`logs.emit` never raises only as long as each line that is made has its event in the catalogue, with
just the fields that the event's texts name: a field too few is a KeyError where a handler is
attached, and one too many stands in the JSON of the line and nowhere else.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import NamedTuple

import pytest

import trading_push
from trading_push.logs import CATALOGUE

PACKAGE = Path(trading_push.__file__).parent
MAKERS = {"line": 1, "traced": 2}  # `line(...)`, `logs.line(...)`, and their positional arguments
# Fields that a call may give and the texts do not name.
MORE: dict[str, set[str]] = {}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Emitted(NamedTuple):
    """One event that one call can emit."""

    at: str
    event: str
    fields: frozenset[str]


def fields_of(text: str) -> frozenset[str]:
    return frozenset(name for _, name, _, _ in Formatter().parse(text) if name is not None)


def emitted_by(source: str, name: str) -> Iterator[Emitted]:
    """What a module's calls can emit; a call that cannot be read so fails the test."""
    yield from _emitted(ast.parse(source), name, [])


def _emitted(node: ast.AST, name: str, within: list[Function]) -> Iterator[Emitted]:
    if isinstance(node, Function):
        if node.name in MAKERS:  # what it is called with is read where it is called
            return
        within = [*within, node]
    if isinstance(node, ast.Call):
        at = f"{name}:{node.lineno}"
        if (maker := _maker(node.func)) is not None:
            assert len(node.args) == MAKERS[maker], f"{at}: a line has one event"
            fields = frozenset(_keywords(node, at, within))
            if maker == "traced":  # which is given the error
                fields |= {"error"}
            yield from (Emitted(at, event, fields) for event in _texts(node.args[0], at, within))
        elif (event := _text_taken_out(node.func)) is not None:
            yield Emitted(at, event, frozenset(_keywords(node, at, within)))
    for child in ast.iter_child_nodes(node):
        yield from _emitted(child, name, within)


def _maker(function: ast.expr) -> str | None:
    if isinstance(function, ast.Attribute) and ast.unparse(function.value).endswith("logs"):
        return function.attr if function.attr in MAKERS else None
    return function.id if isinstance(function, ast.Name) and function.id in MAKERS else None


def _text_taken_out(function: ast.expr) -> str | None:
    """The event of `template("event").format`."""
    match function:
        case ast.Attribute(
            value=ast.Call(func=ast.Name(id="template"), args=[ast.Constant(value=event)]),
            attr="format",
        ):
            return str(event)
    return None


def _keywords(call: ast.Call, at: str, within: list[Function]) -> Iterator[str]:
    """The names of a call's keyword arguments; of `**name`, those of the dict that it is."""
    for keyword in call.keywords:
        if keyword.arg is not None:
            yield keyword.arg
            continue
        assert isinstance(keyword.value, ast.Name), f"{at}: ** of no name"
        [given] = _assigned(keyword.value.id, at, within)
        assert isinstance(given, ast.Dict), f"{at}: ** of no dict"
        yield from (ast.literal_eval(key) for key in given.keys if key is not None)


def _texts(value: ast.expr, at: str, within: list[Function]) -> Iterator[str]:
    """What an expression can be: a text, one of two, or a variable that was given such."""
    match value:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp(body=body, orelse=orelse):
            yield from _texts(body, at, within)
            yield from _texts(orelse, at, within)
        case ast.Name(id=name):
            for given in _assigned(name, at, within):
                yield from _texts(given, at, within)
        case _:
            raise AssertionError(f"{at}: {ast.unparse(value)} cannot be read")


def _assigned(name: str, at: str, within: list[Function]) -> list[ast.expr]:
    """What a variable of the function is given, anywhere in it."""
    assert within, f"{at}: {name} is not of a function"
    found: list[ast.expr] = []
    for node in ast.walk(within[-1]):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    found.append(node.value)
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=True)
                    found += [to for of, to in pairs if ast.unparse(of) == name]
    assert found, f"{at}: {name} is given nothing that can be read"
    return found


def emitted() -> list[Emitted]:
    return [
        each
        for path in sorted(PACKAGE.rglob("*.py"))
        for each in emitted_by(path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE)))
    ]


def test_both_languages_have_the_same_fields():
    wrong = {
        event: (chinese, english)
        for event, (_, chinese, english) in CATALOGUE.items()
        if fields_of(chinese) != fields_of(english)
    }
    assert wrong == {}


def test_every_call_names_an_event_of_the_catalogue():
    assert [each for each in emitted() if each.event not in CATALOGUE] == []


def test_every_call_has_just_the_fields_of_its_event():
    wrong = [
        (each.at, each.event, sorted(each.fields), sorted(wanted))
        for each in emitted()
        if each.event in CATALOGUE
        and each.fields - MORE.get(each.event, set())
        != (wanted := fields_of(CATALOGUE[each.event][1]))
    ]
    assert wrong == []


def test_every_event_of_the_catalogue_is_emitted():
    assert sorted(set(CATALOGUE) - {each.event for each in emitted()}) == []


def test_lines_are_made_in_no_other_way():
    """`Line` itself is called by the one function that escapes what it is given."""
    calls = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Line"
    ]
    assert len(calls) == 1, calls
    assert calls[0].startswith("logs/")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("line('a', x=1)", [("a", "x")]),
        ("logs.line('a')", [("a", "")]),
        ("def f():\n e = 'a' if x else 'b'\n line(e, x=1)", [("a", "x"), ("b", "x")]),
        ("def f():\n e, m = 'a', 1\n line(e, x=m)", [("a", "x")]),
        ("def f():\n d = {'x': 1, 'y': 2}\n line('a', z=1, **d)", [("a", "xyz")]),
        ("template('a').format(x=1)", [("a", "x")]),
        ("headline('a', x=1); other.line('a', x=1)", []),
    ],
)
def test_what_a_call_emits_is_read(source, found):
    assert [(each.event, "".join(sorted(each.fields))) for each in emitted_by(source, "")] == found


@pytest.mark.parametrize(
    "source",
    ["line(f'{x}')", "def f(e):\n line(e)", "def f(d):\n line('a', **d)", "line('a', **{'x': 1})"],
)
def test_a_call_that_cannot_be_read_fails(source):
    with pytest.raises(AssertionError):
        list(emitted_by(source, ""))
