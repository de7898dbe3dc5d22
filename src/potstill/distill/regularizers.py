"""Terms without labels: what a model wants of its energies, and small weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from potstill.distill.terms import Batch, Term
from potstill.models import Potential
from potstill.models.base import Regularizer


class _Unlabeled(Term):
    """A term without a line, its weight the same in every epoch."""

    validated = False
    line = None
    weight: float

    def weight_at(self, epoch: int) -> float:
        return self.weight


class EnergyRegularizer(_Unlabeled):
    """A penalty on the terms of the atomic energies, of `Potential.regularizers`.

    Mean over the configurations of the sum over their atoms; `penalty` takes (N, T) terms to (N,).
    """

    needs = ("terms",)

    def __init__(self, name: str, penalty: Regularizer, weight: float) -> None:
        self.name, self.penalty, self.weight = name, penalty, weight

    def sums(self, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Of the penalties, and of the configurations."""
        per_atom = self.penalty(values["terms"])
        n_systems = per_atom.new_tensor(float(batch.structures.n_systems))
        return torch.stack([per_atom.sum(), n_systems])

    def value(self, sums: Tensor) -> Tensor:
        """Penalty per configuration."""
        return sums[0] / sums[1]


class SquaredWeights(_Unlabeled):
    """L2: the sum of squares of a network's `regularized_weights`."""

    name = "l2"
    of_parameters = True

    def __init__(self, network: Potential, weight: float) -> None:
        self.network, self.weight = network, weight

    def sums(self, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """(1,) the squares, summed in float64."""
        squares = (w.square().sum() for w in self.network.regularized_weights())
        return sum(squares, start=batch.structures.cell.new_zeros(())).unsqueeze(0)

    def value(self, sums: Tensor) -> Tensor:
        """Their sum."""
        return sums[0]
