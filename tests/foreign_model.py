"""A model of another package, for `model.kind: foreign_model:Springs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from potstill.models import (
    Edges,
    Hyperparameters,
    LocalOutput,
    Potential,
    StartingData,
)
from potstill.models.base import Regularizer
from potstill.species import SpeciesTable


class SpringsHyperparameters(Hyperparameters):
    """Hyper-parameters of springs.

    Parameters
    ----------
    stiffness : float
        eV.
    cutoff : float
        Å.
    """

    stiffness: float = Field(default=0.3, gt=0)
    cutoff: float = 4.0


class Springs(Potential):
    """E_i = E0 + k Σ_j (1 - r²/R²)³, with E0 taken from the training data."""

    kind = "springs"
    hyper_class = SpringsHyperparameters
    hyper: SpringsHyperparameters

    def __init__(self, species_table: SpeciesTable, *values: Any, **named: Any) -> None:
        p = SpringsHyperparameters.of(*values, **named)
        super().__init__(species_table, p.cutoff, p)
        self.strength = torch.nn.Parameter(torch.tensor(p.stiffness))
        self.zero = torch.nn.Parameter(torch.zeros(len(species_table)))

    @property
    def n_terms(self) -> int:
        return 2

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        inside = (1.0 - r_ij.to(self.dtype).square().sum(dim=1) / self.cutoff**2).clamp(min=0.0)
        pairs = edges.sum_to_centers(self.strength * inside**3, n_local)
        terms = torch.stack([self.zero[species[:n_local]], pairs], dim=1)
        return LocalOutput(terms.sum(dim=1), terms=terms)

    def initialize_from(self, data: StartingData) -> None:
        assert len(data.batches) > 0
        with torch.no_grad():
            self.zero.copy_(data.offsets)

    def regularizers(self) -> dict[str, Regularizer]:
        return {"hierarchicality": lambda terms: terms[:, 1].square()}
