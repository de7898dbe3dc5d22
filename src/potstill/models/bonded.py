"""Harmonic bonds and angles of beads, found by their species and distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.core import BondParameters
from potstill.errors import ModelError
from potstill.models.base import Edges, LocalOutput, Potential
from potstill.models.engines import NativeParts
from potstill.radial import quintic_switch
from potstill.species import SpeciesTable


@dataclass(frozen=True)
class Bond:
    """A bond between each two neighbors of certain species.

    Parameters
    ----------
    species : (str, str)
        Their names.
    length : float
        Å.
    stiffness : float
        eV/Å².
    inner, outer : float
        Å: pairs closer than `inner` are bonded, those beyond `outer` are not.
    """

    species: tuple[str, str]
    length: float
    stiffness: float
    inner: float
    outer: float


@dataclass(frozen=True)
class Angle:
    """An angle between two bonds that share a bead.

    Parameters
    ----------
    species : (str, str, str)
        Names; the vertex is the second.
    cosine : float
        Of the angle at rest.
    stiffness : float
        eV, of the cosine.
    """

    species: tuple[str, str, str]
    cosine: float
    stiffness: float


class Bonds(Potential):
    """Harmonic bonds and angles: `k/2 (r - r0)²` and `k/2 (cos θ - cos θ0)²`.

    A potential knows species and distances, and no topology. Two beads are bonded where they are of
    the right species and close: a bond's energy is multiplied by the quintic that is 1 up to
    `inner` and 0 from `outer` on, an angle's by those of both of its bonds. Between the bonded and
    all other pairs stands a barrier of about `k/2 (inner - r0)²`, which must be many k_B T high:
    `potstill.coarse.prior` sees to it.

    LAMMPS' `bond_style harmonic` (with k/2) and `angle_style cosine/squared` (with k/2) are the
    same where nothing is near a barrier.

    Parameters
    ----------
    species_table : SpeciesTable
        The species.
    bonds, angles : sequence of Bond, Angle, or of their fields
        At most one bond of each pair of species; angles are between given bonds.

    Raises
    ------
    ModelError
        If a species is unknown, a number is out of range, or an angle lacks a bond.
    """

    kind = "bonds"
    exact_buffers = ("table",)
    table: Tensor

    def __init__(
        self,
        species_table: SpeciesTable,
        bonds: Sequence[Bond | Sequence[Any]],
        angles: Sequence[Angle | Sequence[Any]] = (),
    ) -> None:
        self.bonds = tuple(b if isinstance(b, Bond) else Bond(tuple(b[0]), *b[1:]) for b in bonds)
        self.angles = tuple(
            a if isinstance(a, Angle) else Angle(tuple(a[0]), *a[1:]) for a in angles
        )
        if not self.bonds:
            raise ModelError("there are no bonds")
        super().__init__(species_table, max(bond.outer for bond in self.bonds))
        names, n = species_table.names, len(species_table)
        table = torch.zeros(4, n, n, dtype=torch.float64)  # length, stiffness, inner, outer
        for bond in self.bonds:
            what = "-".join(bond.species)
            if foreign := set(bond.species) - set(names):
                raise ModelError(f"there is no species {min(foreign)} for the bond {what}")
            if not (bond.stiffness > 0.0 and 0.0 < bond.length < bond.inner < bond.outer):
                raise ModelError(f"the bond {what} needs 0 < length < inner < outer, stiffness > 0")
            a, b = (names.index(name) for name in bond.species)
            if bool(table[:, a, b].any()):
                raise ModelError(f"there are two bonds {what}")
            values = torch.tensor([bond.length, bond.stiffness, bond.inner, bond.outer])
            table[:, a, b] = table[:, b, a] = values.double()
        for angle in self.angles:
            what = "-".join(angle.species)
            if not (angle.stiffness > 0.0 and -1.0 <= angle.cosine <= 1.0):
                raise ModelError(f"the angle {what} needs a cosine and a positive stiffness")
            for end in angle.species[::2]:
                pair = {end, angle.species[1]}
                if not any(set(bond.species) == pair for bond in self.bonds):
                    raise ModelError(f"the angle {what} has no bond {end}-{angle.species[1]}")
        self.register_buffer("table", table, persistent=False)

    @property
    def reach(self) -> float:
        """The cutoff."""
        return self.cutoff

    def forward(
        self, species: Tensor, edges: Edges, r_ij: Tensor, n_local: int, taps: Sequence[str] = ()
    ) -> LocalOutput:
        """(n_local,) halves of the bonds of a bead, and the angles at it."""
        r_ij = r_ij.to(self.dtype)
        length, stiffness, inner, outer = self.table[
            :, species[edges.center], species[edges.neighbor]
        ]
        near = (r_ij.detach().square().sum(1) < outer**2).nonzero()[:, 0]
        center, neighbor = edges.center[near], edges.neighbor[near]
        r = torch.linalg.vector_norm(r_ij[near], dim=1)
        keep = quintic_switch(r, inner[near], outer[near])
        energy = 0.25 * stiffness[near] * (r - length[near]) ** 2 * keep
        total = energy.new_zeros(n_local).index_add(0, center, energy)
        unit = r_ij[near] / r[:, None]
        for angle in self.angles:
            a, b, c = (self.species_table.names.index(name) for name in angle.species)
            at = species[center] == b
            sides = [(at & (species[neighbor] == end)).nonzero()[:, 0] for end in (a, c)]
            first, second = _pairs_at_one_center(center, sides[0], sides[1], n_local)
            if a == c:
                first, second = first[first < second], second[first < second]
            cosine = (unit[first] * unit[second]).sum(1)
            both = keep[first] * keep[second]
            energy = 0.5 * angle.stiffness * (cosine - angle.cosine) ** 2 * both
            total = total.index_add(0, center[first], energy)
        return LocalOutput(total)

    def native_parts(self) -> NativeParts:
        """Bonds by pairs of species, and angles."""
        index = self.species_table.names.index
        rows = [[*map(index, a.species), a.cosine, a.stiffness] for a in self.angles]
        angles = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
        return NativeParts(bonds=BondParameters(self.table, angles))

    def hyperparameters(self) -> dict[str, Any]:
        """Bonds and angles as lists of their fields."""
        return {
            "bonds": [[list(b.species), *astuple(b)[1:]] for b in self.bonds],
            "angles": [[list(a.species), *astuple(a)[1:]] for a in self.angles],
        }


def _pairs_at_one_center(
    center: Tensor, first: Tensor, second: Tensor, n_local: int
) -> tuple[Tensor, Tensor]:
    """All combinations of one edge of each of two sets (indices) that have the same center."""
    tables = []
    for edges in (first, second):
        edges = edges[torch.argsort(center[edges], stable=True)]
        count = torch.bincount(center[edges], minlength=n_local)
        start = torch.cumsum(count, 0) - count
        place = torch.arange(len(edges), device=edges.device) - start[center[edges]]
        width = int(count.max()) if len(edges) else 0
        table = torch.full((n_local, width), -1, dtype=torch.int64, device=edges.device)
        table[center[edges], place] = edges
        tables.append(table)
    one, other = (t.unsqueeze(axis) for t, axis in zip(tables, (2, 1), strict=True))
    one, other = torch.broadcast_tensors(one, other)
    both = (one >= 0) & (other >= 0)
    return one[both], other[both]
