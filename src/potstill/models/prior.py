"""Short-range priors: potentials that need no training and keep atoms apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.core import ZblParameters
from potstill.errors import ModelError
from potstill.models.base import Edges, LocalOutput, NativeParts, Potential
from potstill.structures import SpeciesTable
from potstill.units import COULOMB

# Ziegler, Biersack, Littmark, "The Stopping and Range of Ions in Solids" (1985): the universal
# screening function and screening length.
_COEFFICIENTS = (0.18175, 0.50986, 0.28022, 0.02817)
_EXPONENTS = (3.19980, 0.94229, 0.40290, 0.20162)
_LENGTH = 0.46850  # Å
_POWER = 0.23


class ZBL(Potential):
    """Screened nuclear repulsion, switched off smoothly between `inner` and `cutoff`.

    `E_ij = e² Z_i Z_j / (4 π ε0 r) φ(r/a) S(r)`

    with Ziegler, Biersack and Littmark's universal screening; half of each pair's energy goes to
    each atom. S is the quintic that is 1 up to `inner` and 0 from `cutoff` on, with continuous
    second derivatives.

    Parameters
    ----------
    species_table : SpeciesTable
        Chemical elements only.
    inner, cutoff : float
        Å.
    """

    kind = "zbl"
    nuclear_charge: Tensor

    def __init__(self, species_table: SpeciesTable, inner: float, cutoff: float) -> None:
        super().__init__(species_table, cutoff)
        if not 0.0 <= inner < cutoff:
            raise ModelError(f"ZBL needs 0 <= inner < cutoff, not {inner} and {cutoff}")
        numbers = species_table.atomic_numbers
        if bool((numbers < 0).any()):
            raise ModelError("ZBL needs atomic numbers, and the species table holds beads")
        self.inner = float(inner)
        self.register_buffer("nuclear_charge", numbers.to(torch.float64))

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) half of the repulsion of all pairs of an atom."""
        r_ij = r_ij.to(self.dtype)
        close = (r_ij.detach().square().sum(1) < self.cutoff**2).nonzero()[:, 0]
        center, neighbor = edges.center[close], edges.neighbor[close]
        r = torch.linalg.vector_norm(r_ij[close], dim=1)
        z_i = self.nuclear_charge[species[center]]
        z_j = self.nuclear_charge[species[neighbor]]
        x = r * (z_i**_POWER + z_j**_POWER) / _LENGTH
        screening = torch.zeros_like(r)
        for c, d in zip(_COEFFICIENTS, _EXPONENTS, strict=True):
            screening = screening + c * torch.exp(-d * x)
        pair = 0.5 * COULOMB * z_i * z_j / r * screening * self._switch(r)
        return LocalOutput(pair.new_zeros(n_local).index_add(0, center, pair))

    def _switch(self, r: Tensor) -> Tensor:
        t = ((r - self.inner) / (self.cutoff - self.inner)).clamp(0.0, 1.0)
        return 1.0 - t**3 * (10.0 - 15.0 * t + 6.0 * t**2)

    def native_parts(self) -> NativeParts:
        """Charges and radii."""
        return NativeParts(prior=ZblParameters(self.nuclear_charge, self.inner, self.cutoff))

    def hyperparameters(self) -> dict[str, Any]:
        """Both radii."""
        return {"inner": self.inner, "cutoff": self.cutoff}

    @classmethod
    def for_species(cls, species_table: SpeciesTable) -> ZBL:
        """Choose radii from covalent radii: well inside any bond.

        The repulsion ends at 0.9 times the smallest sum of covalent radii, so that it is zero at
        ordinary distances and only acts where data are scarce.
        """
        from ase.data import covalent_radii

        smallest = min(float(covalent_radii[z]) for z in species_table.atomic_numbers.tolist())
        cutoff = 0.9 * 2.0 * smallest
        return cls(species_table, inner=math.floor(50.0 * cutoff) / 100.0, cutoff=cutoff)
