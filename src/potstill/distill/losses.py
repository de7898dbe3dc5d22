"""Loss terms: a property, the source of its target, an error measure and a weight.

Distillation is nothing but more of them; a control student is the same run without the teacher's.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from potstill.distill.schedules import WeightedTerm
from potstill.errors import ConfigError, MissingLabelError
from potstill.properties import property_spec
from potstill.structures import Properties, Structures


class LossTerm(WeightedTerm):
    """One term of the loss: weight x error(prediction, label).

    Parameters
    ----------
    property : str
        energy, forces, stress or atomic_energies.
    source : str
        Name of the label set the target comes from: `reference`, or a teacher's name.
    weight : float or Schedule
        Constant, or by epoch.
    error : {"rmse+mae", "rmse", "mae", "mse"}
        Over all components in the batch. `rmse+mae` is Eq. 3 of Matin et al.
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

    property: Literal["energy", "forces", "stress", "atomic_energies"]
    source: str = "reference"
    error: Literal["rmse+mae", "rmse", "mae", "mse"] = "rmse+mae"
    per_atom: bool = False
    free_atoms: bool = False
    spread: str | None = None
    spread_scale: float = Field(default=0.1, gt=0.0)

    @field_validator("spread")
    @classmethod
    def _known_spread(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                property_spec(name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return name

    @builtins.property
    def name(self) -> str:
        """`property:source`, as in logs."""
        return f"{self.property}:{self.source}"


@dataclass(frozen=True)
class ErrorSums:
    """Weighted sums over a batch: of |d|, of d² and of the weights. Scalars, float64."""

    absolute: Tensor
    square: Tensor
    count: Tensor

    def stacked(self) -> Tensor:
        """(3,) tensor, for one all-reduce."""
        return torch.stack([self.absolute, self.square, self.count])


def error_sums(
    term: LossTerm, prediction: Properties, labels: Properties, structures: Structures
) -> ErrorSums:
    """Sum the errors of one term over the systems that have its label.

    Parameters
    ----------
    term : LossTerm
        Which property, and how items are weighted.
    prediction, labels : Properties
        Of the batch; labels from the term's source.
    structures : Structures
        The batch.

    Returns
    -------
    ErrorSums
        Over all components of all present items.
    """
    spec = property_spec(term.property)
    present = labels.presence(term.property, structures.n_systems)
    if term.property == "stress":  # NaN where a cell is not fully periodic
        present = present & structures.pbc.all(dim=1)
    rows = present if spec.level == "system" else present[structures.system_index]
    if term.free_atoms and term.property == "forces" and structures.fixed is not None:
        rows = rows & ~structures.fixed
    difference = prediction[term.property][rows] - labels[term.property][rows]
    if term.per_atom and term.property == "energy":
        difference = difference / structures.n_atoms_per_system[rows]
    weight = _item_weights(term, labels, rows, difference)
    return ErrorSums(
        (weight * difference.abs()).sum(),
        (weight * difference.square()).sum(),
        weight.sum(),
    )


def _item_weights(term: LossTerm, labels: Properties, rows: Tensor, difference: Tensor) -> Tensor:
    """Weights of the components of `difference`, of its shape."""
    weight = torch.ones_like(difference)
    stored = labels.weights.get(term.property)
    if stored is not None:
        weight = weight * _like(stored[rows], difference)
    if term.spread is not None:
        scale = term.spread_scale**2
        weight = weight * _like(scale / (scale + labels[term.spread][rows].square()), difference)
    return weight


def _like(value: Tensor, target: Tensor) -> Tensor:
    """Append axes to `value` until it broadcasts against `target`."""
    return value.reshape(*value.shape, *([1] * (target.ndim - value.ndim))).to(target.dtype)


def error_measure(kind: str, sums: Tensor) -> Tensor:
    """RMSE + MAE (Eq. 3 of Matin et al.), or another measure, from stacked sums.

    Parameters
    ----------
    kind : str
        As `LossTerm.error`.
    sums : Tensor
        (3,) of `ErrorSums.stacked`, summed over all ranks.

    Returns
    -------
    Tensor
        Scalar; zero with zero gradient where there is no error or no label.
    """
    absolute, square, count = sums
    count = torch.where(count > 0, count, 1.0)
    if kind == "mse":
        return square / count
    # The square root has an infinite slope at zero: replace the argument there, not the result.
    vanishes = square <= 0
    rmse = torch.where(vanishes, 0.0, torch.sqrt(torch.where(vanishes, 1.0, square) / count))
    mae = absolute / count
    return {"rmse+mae": rmse + mae, "rmse": rmse, "mae": mae}[kind]


def required_signals(terms: Sequence[LossTerm]) -> dict[str, set[str]]:
    """Which properties a run needs from which source; terms that never weigh are left out."""
    needs: dict[str, set[str]] = {}
    for term in terms:
        if term.ever_active:
            signals = needs.setdefault(term.source, set())
            signals.add(term.property)
            if term.spread is not None:
                signals.add(term.spread)
    return needs


def check_signals(terms: Sequence[LossTerm], labels: Mapping[str, Properties], where: str) -> None:
    """Refuse a run whose loss terms ask for labels that are not there.

    Raises
    ------
    MissingLabelError
        Naming the term, the source and what is there instead.
    """
    for source, properties in required_signals(terms).items():
        if source not in labels:
            raise MissingLabelError(
                f"{where}: the loss asks for labels from '{source}', but there are only labels "
                f"from {', '.join(labels) or 'nowhere'}; label the structures with it first"
            )
        for name in sorted(properties):
            have = labels[source]
            if name not in have or not bool(have.presence(name, 1).any()):
                raise MissingLabelError(
                    f"{where}: the loss asks for '{name}' from '{source}', which holds only "
                    f"{', '.join(have.names) or 'nothing'}"
                )
