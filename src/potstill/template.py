"""Commented YAML templates of settings: every key with its value and what its docstring says."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

_WIDTH = 96


def template(settings: BaseModel, free: Mapping[str, type[BaseModel]] | None = None) -> str:
    """Write settings as commented YAML that reads back as the same settings.

    What a section could hold that is absent by default stands there as a comment. `free` tells, by
    name, what keys that take any mapping usually hold.
    """
    head = [f"# {line}" for line in _wrapped(_words(type(settings)), "")]
    head.append("# Keys that you delete keep their defaults.")
    return "\n".join([*head, "", *_section(settings, 0, set(), free or {})]).rstrip() + "\n"


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of settings, and of the classes they derive from, say of each key.

    Keys that no docstring names are left out.
    """
    docs: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        text = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
        _, _, section = text.partition("Parameters\n----------\n")
        for entry in re.split(r"\n(?=\S)", section.partition("\n\n")[0]):
            head, _, body = entry.partition("\n")
            for name in re.findall(r"\w+", head.partition(" : ")[0]):
                docs[name] = " ".join(body.split())
    return docs


def _section(
    settings: BaseModel, depth: int, seen: set[type], free: Mapping[str, type[BaseModel]]
) -> Iterator[str]:
    """Lines of all keys of a section; `seen` are those that have been spelled out."""
    pad, docs = "  " * depth, field_docs(type(settings))
    for name, field in type(settings).model_fields.items():
        value, inner = getattr(settings, name), _model_of(field.annotation) or free.get(name)
        about = docs.get(name) or (_words(inner) if inner else "")
        yield from (
            f"{pad}# {line}" for line in _wrapped(f"{about} {_choices(field)}".strip(), pad)
        )
        if isinstance(value, BaseModel):
            yield f"{pad}{name}:"
            yield from _section(value, depth + 1, seen, free)
        else:
            yield from _value(name, value, pad)
            if inner is not None and inner not in seen:
                seen.add(inner)
                yield from (f"{pad}#   {line}" for line in _keys(inner, _WIDTH - len(pad)))
        if depth == 0:
            yield ""


def _value(name: str, value: Any, pad: str) -> Iterator[str]:
    """A key with plain values or a list of sections, on more lines where one is too short."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    line = f"{pad}{name}: {_flow(value)}"
    if isinstance(value, list | tuple) and (
        len(line) > _WIDTH or any(isinstance(v, BaseModel | dict) for v in value)
    ):
        yield f"{pad}{name}:"
        yield from (f"{pad}  - {_flow(entry)}" for entry in value)
    elif isinstance(value, Mapping) and len(line) > _WIDTH - 10:
        yield f"{pad}{name}:"
        for key, entry in value.items():
            yield from _value(str(key), entry, f"{pad}  ")
    else:
        yield line


def _keys(model: type[BaseModel], width: int) -> Iterator[str]:
    """One line per key of a section that is absent, or that is one of several."""
    docs = field_docs(model)
    for name, field in model.model_fields.items():
        value = (
            "..." if field.is_required() else _flow(field.get_default(call_default_factory=True))
        )
        line = f"{name}: {value}  # {docs.get(name, '')} {_choices(field)}"
        yield textwrap.shorten(line.rstrip(" #"), width, placeholder=" ...")


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The one kind of settings that a key can hold, alone, as an option, in a list or by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = {m for part in typing.get_args(annotation) if (m := _model_of(part)) is not None}
    return found.pop() if len(found) == 1 else None


def _choices(field: FieldInfo) -> str:
    """The words that a key may hold, where there are few."""
    parts = [field.annotation, *typing.get_args(field.annotation)]
    words = [w for p in parts if typing.get_origin(p) is typing.Literal for w in typing.get_args(p)]
    return f"({' | '.join(str(word) for word in words)})" if words else ""


def _words(model: type[BaseModel]) -> str:
    """The first paragraph of a class' docstring."""
    return inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0]


def _wrapped(text: str, pad: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH - len(pad) - 2, break_on_hyphens=False)


def _flow(value: Any) -> str:
    """A value on one line; strings without quotes where they read back as such."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(entry) for entry in value) + "]"
    if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value):
        return value if YAML(typ="safe", pure=True).load(value) == value else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)
