"""Short-range priors: potentials that need no training and keep atoms apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from potstill.core import RepulsionParameters, ZblParameters
from potstill.errors import ModelError
from potstill.models.base import Edges, LocalOutput, Potential
from potstill.models.engines import NativeParts
from potstill.radial import quintic_switch
from potstill.species import SpeciesTable
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
    second derivatives. LAMMPS' `pair_style zbl` adds instead of multiplying: a constant up to
    `inner`, from there a quartic that takes energy, force and its slope to zero at the cutoff.
    Potentials fitted on top of it (SNAP's, as a rule) need that.

    Parameters
    ----------
    species_table : SpeciesTable
        Chemical elements only.
    inner, cutoff : float
        Å.
    switching : {"factor", "lammps"}
        Whether S multiplies, or LAMMPS' polynomial is added.

    Raises
    ------
    ModelError
        If the radii are out of order, the switching is unknown or a species has no atomic number.
    """

    kind = "zbl"
    traceable = True
    nuclear_charge: Tensor

    def __init__(
        self,
        species_table: SpeciesTable,
        inner: float,
        cutoff: float,
        switching: Literal["factor", "lammps"] = "factor",
    ) -> None:
        super().__init__(species_table, cutoff)
        if switching not in ("factor", "lammps"):
            raise ModelError(
                f"the switching of ZBL must be 'factor' or 'lammps', not '{switching}'"
            )
        self.switching = switching
        if not 0.0 <= inner < cutoff:
            raise ModelError(f"ZBL needs 0 <= inner < cutoff, not {inner} and {cutoff}")
        numbers = species_table.atomic_numbers
        if bool((numbers < 0).any()):
            raise ModelError("ZBL needs atomic numbers, and the species table holds beads")
        self.inner = float(inner)
        self.register_buffer("nuclear_charge", numbers.to(torch.float64))

    @property
    def reach(self) -> float:
        """The cutoff."""
        return self.cutoff

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
        inverse_length = (z_i**_POWER + z_j**_POWER) / _LENGTH
        pair = _screened_coulomb(r, inverse_length)[0]
        if self.switching == "factor":
            pair = pair * quintic_switch(r, self.inner, self.cutoff)
        else:
            pair = pair + self._added_switch(r, inverse_length)
        pair = 0.5 * COULOMB * z_i * z_j * pair
        return LocalOutput(pair.new_zeros(n_local).index_add(0, center, pair))

    def native_parts(self) -> NativeParts | None:
        """Charges and radii; native kernels know the switching factor only."""
        if self.switching != "factor":
            return None
        return NativeParts(prior=ZblParameters(self.nuclear_charge, self.inner, self.cutoff))

    def _added_switch(self, r: Tensor, inverse_length: Tensor) -> Tensor:
        """LAMMPS' S(r) = A/3 (r - inner)³ + B/4 (r - inner)⁴ + C, of a pair of unit charges."""
        width = self.cutoff - self.inner
        end = r.new_full((), self.cutoff)
        value, slope, curvature = _screened_coulomb(end, inverse_length)
        a = (-3.0 * slope + width * curvature) / width**2
        b = (2.0 * slope - width * curvature) / width**3
        c = -value + 0.5 * width * slope - width**2 * curvature / 12.0
        t = (r - self.inner).clamp(min=0.0)
        return a / 3.0 * t**3 + b / 4.0 * t**4 + c

    def hyperparameters(self) -> dict[str, Any]:
        """Both radii and the switching."""
        return {"inner": self.inner, "cutoff": self.cutoff, "switching": self.switching}

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


class PairRepulsion(Potential):
    """A repulsion for each pair of species, which keeps coarse-grained beads apart.

    `E_ij = ε_ab ((R_ab / r)^4 - 1)^3` below R_ab, and nothing from there on, where its first and
    second derivatives vanish as well. It rises as r^-12 at short distances; half of each pair's
    energy goes to each bead. `potstill.coarse.prior` finds ε and R from mapped trajectories.

    Parameters
    ----------
    species_table : SpeciesTable
        Beads or elements.
    strength, radius : sequence of sequence of float
        (n_species, n_species), symmetric: ε in eV and R in Å; zero for pairs without repulsion.

    Raises
    ------
    ModelError
        If a matrix is not symmetric, a number is negative or there is no repulsion at all.
    """

    kind = "repulsion"
    traceable = True
    exact_buffers = ("strength", "radius")
    strength: Tensor
    radius: Tensor

    def __init__(
        self,
        species_table: SpeciesTable,
        strength: Sequence[Sequence[float]] | Tensor,
        radius: Sequence[Sequence[float]] | Tensor,
    ) -> None:
        n = len(species_table)
        matrices = [torch.as_tensor(m, dtype=torch.float64).clone() for m in (strength, radius)]
        for matrix in matrices:
            if matrix.shape != (n, n) or not torch.equal(matrix, matrix.T):
                raise ModelError(f"the repulsion of {n} species needs symmetric {n} x {n} matrices")
            if not bool((torch.isfinite(matrix) & (matrix >= 0.0)).all()):
                raise ModelError("strengths and radii of a repulsion must not be negative")
        if not bool(matrices[1].any()):
            raise ModelError("a repulsion needs a radius for one pair of species at least")
        super().__init__(species_table, float(matrices[1].max()))
        self.register_buffer("strength", matrices[0])
        self.register_buffer("radius", matrices[1])

    @property
    def reach(self) -> float:
        """The cutoff."""
        return self.cutoff

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) half of the repulsion of all pairs of an atom."""
        r_ij = r_ij.to(self.dtype)
        radius = self.radius[species[edges.center], species[edges.neighbor]]
        close = (r_ij.detach().square().sum(1) < radius**2).nonzero()[:, 0]
        center, neighbor = edges.center[close], edges.neighbor[close]
        r = torch.linalg.vector_norm(r_ij[close], dim=1)
        strength = self.strength[species[center], species[neighbor]]
        pair = 0.5 * strength * ((radius[close] / r) ** 4 - 1.0) ** 3
        return LocalOutput(pair.new_zeros(n_local).index_add(0, center, pair))

    def native_parts(self) -> NativeParts:
        """Both matrices."""
        return NativeParts(prior=RepulsionParameters(self.strength, self.radius))

    def hyperparameters(self) -> dict[str, Any]:
        """Both matrices."""
        return {"strength": self.strength.tolist(), "radius": self.radius.tolist()}


def _screened_coulomb(r: Tensor, inverse_length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """φ(r/a)/r in 1/Å, its slope and its curvature."""
    value, slope, curvature = (torch.zeros_like(r * inverse_length) for _ in range(3))
    for c, d in zip(_COEFFICIENTS, _EXPONENTS, strict=True):
        k = d * inverse_length
        term = c * torch.exp(-k * r) / r
        value = value + term
        slope = slope - term * (1.0 / r + k)
        curvature = curvature + term * (2.0 / r**2 + 2.0 * k / r + k**2)
    return value, slope, curvature
