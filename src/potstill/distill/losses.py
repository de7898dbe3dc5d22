"""Terms on labels: a property, the source of its target, an error measure and a weight.

Distillation is nothing but more of them; a control student is the same run without the teacher's.
"""

from __future__ import annotations

import builtins
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from potstill.distill.terms import Batch, Line, TeacherTaps, Term
from potstill.errors import suggest
from potstill.models import Potential
from potstill.properties import LEARNABLE, PROPERTIES, property_spec
from potstill.structures import Properties


class ErrorMeasure(ABC):
    """A measure of the differences between predictions and labels, from weighted sums of them."""

    @abstractmethod
    def sums(self, difference: Tensor, weight: Tensor) -> Tensor:
        """(k,) float64 from (n, ...) differences and their weights, of the same shape."""

    def value(self, sums: Tensor) -> Tensor:
        """Scalar: the first sum over the last, zero with zero gradient where there is nothing."""
        return sums[0] / torch.where(sums[-1] > 0, sums[-1], 1.0)


class Moments(ErrorMeasure):
    """RMSE, MAE, both together (Eq. 3 of Matin et al.) or MSE, over all components."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def sums(self, difference: Tensor, weight: Tensor) -> Tensor:
        """Of |d|, of d² and of the weights."""
        absolute, square = difference.abs(), difference.square()
        return torch.stack([(weight * absolute).sum(), (weight * square).sum(), weight.sum()])

    def value(self, sums: Tensor) -> Tensor:
        """Scalar; zero with zero gradient where there is no error or no label."""
        absolute, square, count = sums
        count = torch.where(count > 0, count, 1.0)
        if self.kind == "mse":
            return square / count
        # The square root has an infinite slope at zero: replace the argument there, not the result.
        vanishes = square <= 0
        rmse = torch.where(vanishes, 0.0, torch.sqrt(torch.where(vanishes, 1.0, square) / count))
        mae = absolute / count
        return {"rmse+mae": rmse + mae, "rmse": rmse, "mae": mae}[self.kind]


class Huber(ErrorMeasure):
    """Mean over all components of d² / 2 up to |d| = delta, and delta (|d| - delta / 2) beyond."""

    def __init__(self, delta: float) -> None:
        self.delta = delta

    def sums(self, difference: Tensor, weight: Tensor) -> Tensor:
        """Of the losses and of the weights."""
        absolute = difference.abs()
        beyond = self.delta * (absolute - 0.5 * self.delta)
        loss = torch.where(absolute <= self.delta, 0.5 * difference.square(), beyond)
        return torch.stack([(weight * loss).sum(), weight.sum()])


class VectorNorm(ErrorMeasure):
    """Mean over the atoms of the Euclidean norm of the difference: `l2mae` of the Open Catalyst."""

    def sums(self, difference: Tensor, weight: Tensor) -> Tensor:
        """Of the norms and of the weights, which are means over the three components."""
        weight = weight.mean(dim=1)
        norm = torch.linalg.vector_norm(difference, dim=1)
        return torch.stack([(weight * norm).sum(), weight.sum()])


class LossTerm(Line):
    """One line of the loss: weight x error(prediction, label).

    Parameters
    ----------
    property : str
        energy, forces, stress or atomic_energies.
    source : str
        Name of the label set the target comes from: `reference`, or a teacher's name.
    weight : float or Schedule
        Constant, or by epoch.
    error : {"rmse+mae", "rmse", "mae", "mse", "huber", "l2mae"}
        Over all components in the batch. `rmse+mae` is Eq. 3 of Matin et al.; `huber` is quadratic
        up to `delta` and linear beyond; `l2mae` is the mean length of the error vectors of forces.
    delta : float
        Of `huber`, in the unit of the property.
    per_atom : bool
        Divide energies by the number of atoms first; the paper's loss does not.
    free_atoms : bool
        Of forces: leave fixed atoms out, as the Open Catalyst Project does.
    spread : str, optional
        Name of a property (such as `forces_std`, a committee's spread) in the same source that
        lowers the weight of uncertain items to spread_scale² / (spread_scale² + spread²).
    spread_scale : float
        In the unit of `spread`.
    """

    order: ClassVar[int] = 0

    property: str = Field(json_schema_extra={"enum": list(LEARNABLE)})
    error: Literal["rmse+mae", "rmse", "mae", "mse", "huber", "l2mae"] = "rmse+mae"
    delta: float = Field(default=0.01, gt=0.0)
    per_atom: bool = False
    free_atoms: bool = False
    spread: str | None = None
    spread_scale: float = Field(default=0.1, gt=0.0)

    @field_validator("property")
    @classmethod
    def _learnable(cls, name: str) -> str:
        if name not in LEARNABLE:
            raise ValueError(f"a loss can use {', '.join(LEARNABLE)}{suggest(name, LEARNABLE)}")
        return name

    @field_validator("spread")
    @classmethod
    def _known_spread(cls, name: str | None) -> str | None:
        if name is not None and name not in PROPERTIES:
            raise ValueError(f"unknown property '{name}'{suggest(name, PROPERTIES)}")
        return name

    @model_validator(mode="after")
    def _vectors(self) -> LossTerm:
        if self.error == "l2mae" and property_spec(self.property).shape != (3,):
            raise ValueError(f"l2mae is for vectors such as forces, not for {self.property}")
        return self

    @builtins.property
    def name(self) -> str:
        """`property:source`, as in logs."""
        return f"{self.property}:{self.source}"

    @builtins.property
    def labels(self) -> tuple[str, ...]:
        """The property, and its spread."""
        return (self.property,) if self.spread is None else (self.property, self.spread)

    def bind(self, student: Potential, teachers: TeacherTaps) -> LabelTerm:
        """The term, the same for every student."""
        return LabelTerm(self)


class LabelTerm(Term):
    """The loss term of a line on labels."""

    validated = False

    def __init__(self, line: LossTerm) -> None:
        self.line: LossTerm = line
        self.name, self.needs = line.name, (line.property,)
        special = {"huber": Huber(line.delta), "l2mae": VectorNorm()}
        self.measure = special.get(line.error) or Moments(line.error)

    def sums(self, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Sums of errors over the systems that have the label."""
        line, structures = self.line, batch.structures
        rows = batch.rows(self._present(batch.host or batch))
        labels = batch.labels[line.source]
        difference = values[line.property][rows] - labels[line.property][rows]
        if line.per_atom and line.property == "energy":
            difference = difference / structures.n_atoms_per_system[rows]
        return self.measure.sums(difference, self._weights(labels, rows, difference))

    def value(self, sums: Tensor) -> Tensor:
        """The error measure."""
        return self.measure.value(sums)

    def _present(self, batch: Batch) -> Tensor:
        """(S,) or (N,) bool: which items are compared."""
        line, structures = self.line, batch.structures
        present = batch.labels[line.source].presence(line.property, structures.n_systems)
        if line.property == "stress":  # NaN where a cell is not fully periodic
            present = present & structures.pbc.all(dim=1)
        per_atom = property_spec(line.property).per_atom
        rows = present[structures.system_index] if per_atom else present
        if line.free_atoms and line.property == "forces" and structures.fixed is not None:
            rows = rows & ~structures.fixed
        return rows

    def _weights(self, labels: Properties, rows: Tensor, difference: Tensor) -> Tensor:
        """Weights of the components of `difference`, of its shape."""
        weight = torch.ones_like(difference)
        stored = labels.weights.get(self.line.property)
        if stored is not None:
            weight = weight * _like(stored[rows], difference)
        if self.line.spread is not None:
            scale = self.line.spread_scale**2
            spread = labels[self.line.spread][rows].square()
            weight = weight * _like(scale / (scale + spread), difference)
        return weight


def _like(value: Tensor, target: Tensor) -> Tensor:
    """Append axes to `value` until it broadcasts against `target`."""
    return value.reshape(*value.shape, *([1] * (target.ndim - value.ndim))).to(target.dtype)
