"""What `bzstream settings` shows: each setting of `bzstream.config`, read from its structs and their docstrings.

Defaults and types come from the structs, reasons from the text below each field in the module's source. Pure functions
apart from reading that source once.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect as types

from bzstream import config

__all__ = ["Section", "Setting", "as_markdown", "as_text", "settings_reference"]


class Setting(NamedTuple):
    """One setting."""

    name: str
    """`section.name`, as in error messages."""
    environment: str
    default: object
    """In plain values for JSON; None when nothing is set."""
    type: str
    """Type, unit and range in words."""
    reason: str


class Section(NamedTuple):
    """One table of the settings file."""

    name: str
    about: str
    settings: list[Setting]


def settings_reference() -> list[Section]:
    """All settings, in the order of the source."""
    reasons = _reasons(inspect.getsource(config))
    sections = []
    for section in msgspec.structs.fields(config.Settings):
        kind = section.type
        words = {field.name: _words(field.type) for field in types.type_info(kind).fields}  # type: ignore[attr-defined]
        sections.append(
            Section(
                section.name,
                _one_line(kind.__doc__ or "").partition(": ")[2],
                [
                    Setting(
                        f"{section.name}.{field.name}",
                        config.environment_name(section.name, field.name),
                        msgspec.to_builtins(field.default),
                        words[field.name],
                        reasons.get((kind.__name__, field.name), ""),
                    )
                    for field in msgspec.structs.fields(kind)
                ],
            )
        )
    return sections


def as_text(sections: list[Section]) -> Iterator[str]:
    """Lines for a terminal."""
    for section in sections:
        yield f"[{section.name}] {section.about}"
        for setting in section.settings:
            yield f"  {setting.name} = {_shown(setting.default)}    ({setting.type}; {setting.environment})"
            yield f"      {setting.reason}"
        yield ""


def as_markdown(sections: list[Section]) -> Iterator[str]:
    """The lines of docs/settings.md."""
    yield "# Settings"
    yield ""
    yield "<!-- Made by `bzstream settings --markdown` from bzstream/config.py; edit that file. -->"
    yield ""
    yield from inspect.cleandoc(config.__doc__ or "").splitlines()
    for section in sections:
        yield from ("", f"## {section.name}", "", section.about[:1].upper() + section.about[1:], "")
        yield "| setting | default | type | environment | meaning, and the reason for the default |"
        yield "|---|---|---|---|---|"
        for setting in section.settings:
            cells = (
                f"`{setting.name}`", f"`{_shown(setting.default)}`", setting.type, f"`{setting.environment}`",
                setting.reason,
            )  # fmt: skip
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _reasons(source: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the string that stands below the field."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for field, below in zip(node.body, node.body[1:], strict=False):
                match field, below:
                    case (
                        ast.AnnAssign(target=ast.Name(id=name)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ):
                        found[node.name, name] = _one_line(text)
    return found


def _words(kind: types.Type) -> str:
    """A type in an operator's words."""
    match kind:
        case types.Metadata(type=inner, extra=extra):
            unit = (extra or {}).get("unit")
            return (f"{unit}, " if unit else "") + _words(inner)
        case types.UnionType(types=members):
            return " or ".join(_words(member) for member in members if not isinstance(member, types.NoneType))
        case types.BoolType():
            return "true or false"
        case types.LiteralType(values=values):
            return " or ".join(f'"{value}"' for value in values)
        case types.VarTupleType(item_type=item):
            return f"list of: {_words(item)}"
        case types.TupleType(item_types=items):
            return f"[{', '.join(_words(item) for item in items)}]"
        case types.IntType() | types.FloatType():
            return ("whole number" if isinstance(kind, types.IntType) else "number") + _range(kind)
        case types.StrType(pattern=pattern):
            return "text" if pattern is None else f"text like {pattern}"
    raise TypeError(f"the settings have a type that has no words yet: {kind}")


def _range(kind: types.IntType | types.FloatType) -> str:
    bounds = [(kind.gt, "above"), (kind.ge, "from"), (kind.lt, "below"), (kind.le, "to")]
    return "".join(f" {word} {bound:,}" for bound, word in bounds if bound is not None)


def _shown(default: Any) -> str:
    """A default as it would stand in the settings file."""
    return "not set" if default is None else json.dumps(default)


def _one_line(text: str) -> str:
    return " ".join(text.split())
