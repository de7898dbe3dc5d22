"""What a loss consists of: one kind of line in settings, one kind of term at work.

A `Line` is what settings hold: a source, a weight, and what is to be compared. Bound to a student
it is a `Term`: what the student must predict for it, sums over a batch, which add up over batches
and processes, and the value that follows from the sums over all. A new kind is a module here, a
line in the union `strategies.AnyTerm` (or none: a config names a class of any package as
`{term: "module:Class"}`), and a paragraph in the docs.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from potstill.distill.schedules import Schedule
from potstill.errors import MissingLabelError
from potstill.features import Feature
from potstill.models import Potential, TapSpec
from potstill.models.base import Pairs
from potstill.structures import NeighborList, Properties, Structures


@dataclass(frozen=True)
class Batch:
    """A few configurations of a `TrainingSet` with their neighbor list, labels and features.

    `weights` are (S,) float64; those of the labels hold them, too. `host` is the same batch in the
    memory of the CPU: what is selected by a mask is looked up there, since a GPU would have to be
    waited for.
    """

    structures: Structures
    neighbors: Pairs
    labels: dict[str, Properties]
    features: dict[str, dict[str, Feature]] = field(default_factory=dict)
    weights: Tensor | None = None
    host: Batch | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Move all tensors to a device."""
        device = torch.device(device)
        return Batch(
            self.structures.to(device),
            # Compact lists are for kernels on the CPU.
            self.neighbors.to(device)
            if isinstance(self.neighbors, NeighborList)
            else self.neighbors,
            {source: labels.to(device) for source, labels in self.labels.items()},
            {
                source: {tap: feature.to(device) for tap, feature in taps.items()}
                for source, taps in self.features.items()
            },
            None if self.weights is None else self.weights.to(device),
            None if device.type == "cpu" else self.host or self,
        )

    def rows(self, mask: Tensor) -> Tensor:
        """Indices of the rows that a mask from the CPU's memory selects, on the batch's device."""
        return mask.nonzero()[:, 0].to(self.structures.cell.device, non_blocking=True)


class TeacherTaps(Protocol):
    """Where the features of teachers come from."""

    def taps_for(self, line: Any) -> tuple[Mapping[str, TapSpec], str | None]:
        """Taps for a line of the loss, and the default among them."""

    def will_ask(self, source: str, taps: Sequence[str]) -> None:
        """Note which taps of a source will be needed."""


class Line(BaseModel):
    """One line of a loss, as settings hold it.

    Parameters
    ----------
    source : str
        Whose labels or features are learned: `reference`, or a teacher's name.
    weight : float or Schedule
        Constant, or by epoch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Terms are added up in this order, whatever that of the lines is.
    order: ClassVar[int] = 3

    source: str = "reference"
    weight: float | Schedule = 1.0

    @property
    @abstractmethod
    def name(self) -> str:
        """As in logs; two lines of a loss have two names."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Properties that must be known from the source."""
        return ()

    @abstractmethod
    def bind(self, student: Potential, teachers: TeacherTaps) -> Term:
        """The term for a student's network.

        Raises
        ------
        ConfigError
            If the line does not fit the student or the teacher.
        """

    def weight_at(self, epoch: int) -> float:
        """The weight in an epoch, counted from 1."""
        return self.weight.at(epoch) if isinstance(self.weight, Schedule) else self.weight

    @property
    def schedule_end(self) -> int:
        """The epoch from which on the weight is constant."""
        return self.weight.end if isinstance(self.weight, Schedule) else 1

    @property
    def ever_active(self) -> bool:
        """Whether the weight is ever different from zero."""
        values = self.weight.values if isinstance(self.weight, Schedule) else (self.weight,)
        return any(value != 0.0 for value in values)


class CustomLine(Line):
    """A line of a kind that another package defines; its class derives from this one.

    Parameters
    ----------
    term : str
        Where the class is: "module:Class". Its other fields stand beside it in the config.
    """

    term: str

    @classmethod
    def of(cls, value: Any) -> Any:
        """Make the class's instance from a mapping with `term`; ValueError if there is none."""
        if not isinstance(value, Mapping):
            return value
        module, _, name = str(value["term"]).partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"there is no term '{value['term']}': {error}") from None
        if not (isinstance(found, type) and issubclass(found, CustomLine)):
            raise ValueError(f"'{value['term']}' is not a subclass of {__name__}.CustomLine")
        return found.model_validate(value)


class Term(ABC):
    """A loss term, named as in logs; regularizers have no line in the settings."""

    #: Predicted values that it is a function of: properties, `terms` (of the atomic energies, as a
    #: `Prediction` has them), and feature taps of the student.
    needs: tuple[str, ...] = ()

    #: Whether it depends on parameters alone. Its sums are then the same in every process.
    of_parameters: bool = False

    #: Whether its value on the validation set is recorded; errors of labels have metrics of their
    #: own.
    validated: bool = True

    #: Factor of the weight, where a share of the initial loss was asked for.
    scale: float = 1.0

    name: str
    line: Line | None

    def weight_at(self, epoch: int) -> float:
        """The weight in an epoch, counted from 1."""
        assert self.line is not None
        return self.line.weight_at(epoch) * self.scale

    @abstractmethod
    def sums(self, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """(k,) float64 that add up over batches and processes, from what is predicted."""

    @abstractmethod
    def value(self, sums: Tensor) -> Tensor:
        """Scalar, float64, from the sums over everything that counts together."""


class Terms(nn.Module):
    """All terms of a loss, in the order of the sum; their parameters are trained as well."""

    def __init__(self, terms: Iterable[Term] = ()) -> None:
        super().__init__()
        self.all = tuple(terms)
        self.members = nn.ModuleList(term for term in self.all if isinstance(term, nn.Module))

    def active(self, epoch: int) -> list[Term]:
        """Terms with a weight other than zero in an epoch."""
        return [term for term in self.all if term.weight_at(epoch) != 0.0]

    def weights(self, epoch: int) -> dict[str, float]:
        """Weights in an epoch by name, without those of regularizers."""
        return {t.name: t.weight_at(epoch) for t in self.all if t.line is not None}

    @property
    def scales(self) -> dict[str, float]:
        """Factors of weights by name, where there are any."""
        return {term.name: term.scale for term in self.all if term.scale != 1.0}

    @scales.setter
    def scales(self, scales: Mapping[str, float]) -> None:
        for term in self.all:
            term.scale = scales.get(term.name, 1.0)


def required_signals(lines: Iterable[Line]) -> dict[str, set[str]]:
    """Which properties a run needs from which source; those of zero weight are left out."""
    needs: dict[str, set[str]] = {}
    for line in lines:
        if line.ever_active and line.labels:
            needs.setdefault(line.source, set()).update(line.labels)
    return needs


def check_signals(lines: Iterable[Line], labels: Mapping[str, Properties], where: str) -> None:
    """Raise MissingLabelError if a loss asks for labels that are not there."""
    for source, properties in required_signals(lines).items():
        if source not in labels:
            raise MissingLabelError(
                f"{where}: the loss needs labels from '{source}', but there are "
                f"{'only labels from ' + ', '.join(labels) if labels else 'none'}; label the "
                "structures with it first"
            )
        for name in sorted(properties):
            if not holds(labels, source, name):
                raise MissingLabelError(
                    f"{where}: the loss needs '{name}' from '{source}', which holds only "
                    f"{', '.join(labels[source].names) or 'nothing'}"
                )


def holds(labels: Mapping[str, Properties], source: str, name: str) -> bool:
    """Whether any system has a property from a source."""
    own = labels.get(source)
    return own is not None and name in own and bool(own.presence(name, 1).any())
