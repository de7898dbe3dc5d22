"""Show griffe the constructor of pydantic models, so that their parameters are documented.

griffe reads source code without running it, and knows the constructor of dataclasses only.
"""

from __future__ import annotations

from typing import Any

import griffe


class PydanticFields(griffe.Extension):
    """Gives each pydantic model an `__init__` with its fields, inherited ones first."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Go through a loaded package."""
        for class_ in _classes(pkg):
            if "__init__" not in class_.members and _is_model(class_):
                class_.set_member("__init__", _constructor(class_))


def _classes(owner: griffe.Module | griffe.Class) -> list[griffe.Class]:
    found = []
    for member in owner.members.values():
        if member.is_alias or not (member.is_module or member.is_class):
            continue
        if member.is_class:
            found.append(member)
        found.extend(_classes(member))
    return found


def _family(class_: griffe.Class) -> list[griffe.Class]:
    """Return the class and its bases within the package, the outermost base first."""
    return [*reversed(class_.mro()), class_]


def _is_model(class_: griffe.Class) -> bool:
    bases = [base for member in _family(class_) for base in member.bases]
    return any(getattr(base, "canonical_path", base) == "pydantic.BaseModel" for base in bases)


def _constructor(class_: griffe.Class) -> griffe.Function:
    fields = {
        name: griffe.Parameter(
            name,
            annotation=member.annotation,
            kind=griffe.ParameterKind.keyword_only,
            default=_default(member.value),
        )
        for part in _family(class_)
        for name, member in part.members.items()
        if member.is_attribute and "property" not in member.labels and member.annotation is not None
    }
    own = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
    init = griffe.Function("__init__", lineno=0, endlineno=0, parent=class_, returns="None")
    init.parameters = griffe.Parameters(own, *fields.values())
    return init


def _default(value: griffe.Expr | str | None) -> griffe.Expr | str | None:
    """What `Field(default=...)` or `Field(default_factory=...)` stands for."""
    if not isinstance(value, griffe.ExprCall) or str(value.function) != "Field":
        return value
    given = {a.name: a.value for a in value.arguments if isinstance(a, griffe.ExprKeyword)}
    if "default_factory" in given:
        return griffe.ExprCall(function=given["default_factory"], arguments=[])
    return given.get("default")
