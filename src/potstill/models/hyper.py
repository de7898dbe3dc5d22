"""Hyper-parameters of models: typed, checked when they are given, documented field by field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError, WrapValidator

from potstill.errors import ModelError, suggest


def _as_given(value: Any, check: Callable[[Any], float]) -> float:
    number = check(value)
    return value if type(value) is int else number


#: A real number that stays the integer it may be given as: fingerprints of potentials, which stores
#: of labels hold, know `6` from `6.0`.
Real = Annotated[float, WrapValidator(_as_given), PlainSerializer(lambda number: number)]


class Hyperparameters(BaseModel):
    """Hyper-parameters of one kind of model; a subclass has a field with a default for each.

    The docstring of the subclass documents them, as those of all settings do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def of(cls, *values: Any, **named: Any) -> Self:
        """Check values that are given in the order of the fields, or by name.

        Raises
        ------
        ModelError
            If one is unknown or out of range; one sentence about the first.
        """
        names = list(cls.model_fields)
        twice = [name for name, _ in zip(names, values, strict=False) if name in named]
        if len(values) > len(names) or twice:
            raise ModelError(f"too many hyper-parameters{': ' + twice[0] if twice else ''}")
        try:
            return cls(**dict(zip(names, values, strict=False)), **named)
        except ValidationError as error:
            raise ModelError(cls._in_words(error)) from None

    @classmethod
    def _in_words(cls, error: ValidationError) -> str:
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        name = ".".join(str(part) for part in first["loc"][:1])
        if first["type"] == "extra_forbidden":
            return f"unknown hyper-parameter '{name}'{suggest(name, cls.model_fields)}"
        if first["type"] == "value_error":
            return first["msg"].removeprefix("Value error, ")
        message = first["msg"]
        return f"{name}: {message[:1].lower()}{message[1:]} (it is {first['input']!r})"

    def to_json(self) -> dict[str, Any]:
        """The values as JSON has them."""
        return self.model_dump(mode="json")
