"""What goes into a model and comes out of it: pairs, atomic energies, derivatives by pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from potstill.errors import DataError
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.structures import NeighborList, Structures

#: Å; atoms closer than this are at one place, where no potential is defined.
ONE_PLACE = 1e-3


@dataclass(frozen=True)
class Edges:
    """The pairs of a model's input, sorted by center.

    Parameters
    ----------
    center, neighbor : Tensor
        (E,) int64. Centers are local atoms (< n_local); neighbors may be ghosts.
    tags : Tensor, optional
        (N,) int64 tags of the atoms; -1 in systems without tags.
    """

    center: Tensor
    neighbor: Tensor
    tags: Tensor | None = None

    @classmethod
    def of(cls, structures: Structures, neighbors: NeighborList) -> Edges:
        """The pairs of a neighbor list, with the atoms' tags.

        A system whose tags are all zero is one without: so are untagged systems that were joined
        with tagged ones.
        """
        tags = structures.tags
        if tags is not None:
            tagged = torch.zeros(structures.n_systems, dtype=torch.bool, device=tags.device)
            tagged[structures.system_index[tags != 0]] = True
            tags = torch.where(tagged[structures.system_index], tags, -1)
        return cls(neighbors.center, neighbors.neighbor, tags)

    @property
    def n_pairs(self) -> int:
        """Number of pairs E."""
        return self.center.shape[0]

    def padded(self, n_local: int) -> tuple[Tensor, Tensor]:
        """Lay the pairs out as a rectangle: neighbor sums then become matrix products.

        Returns
        -------
        pair : Tensor
            (n_local, K) int64, index of the pair in slot k of an atom; 0 in unused slots.
        used : Tensor
            (n_local, K) bool.
        """
        # A trace would keep the width of its example.
        lay_out = _scripted_slots() if torch.jit.is_tracing() else _slots
        return lay_out(self.center, torch.as_tensor(n_local))

    def sum_to_centers(self, values: Tensor, n_local: int) -> Tensor:
        """(n_local, ...) sums over the pairs of each center, from (E, ...) values."""
        return values.new_zeros(n_local, *values.shape[1:]).index_add(0, self.center, values)

    def among_nearest(self, distance: Tensor, n_local: int, max_neighbors: int) -> Tensor:
        """Which pairs are among the nearest of either of their atoms.

        Both directions of a pair are kept or dropped together, and neighbors as far away as the
        last one that counts are kept with it: the choice knows no order of atoms.

        Parameters
        ----------
        distance : Tensor
            (E,) Å.
        n_local : int
            Number of atoms; there must be no ghosts.
        max_neighbors : int
            How many neighbors count for an atom.

        Returns
        -------
        Tensor
            (E,) bool.
        """
        pair, used = self.padded(n_local)
        if pair.shape[1] <= max_neighbors:
            return torch.ones_like(self.center, dtype=torch.bool)
        far = torch.where(used, distance.detach()[pair], torch.inf)
        # Distances that symmetry makes equal differ by rounding.
        reach = far.kthvalue(max_neighbors, dim=1).values * (1.0 + 1e-5)
        return distance <= torch.maximum(reach[self.center], reach[self.neighbor])


def _slots(center: Tensor, n_local: Tensor) -> tuple[Tensor, Tensor]:
    """As of `Edges.padded`, in what TorchScript knows."""
    rows, n_pairs = int(n_local), center.shape[0]
    counts = torch.bincount(center, minlength=rows)
    number = torch.arange(n_pairs, device=center.device)
    rank = number - (counts.cumsum(0) - counts)[center]
    width = 0
    if n_pairs > 0:
        width = int(rank.max()) + 1
    pair = torch.zeros([rows, width], dtype=torch.int64, device=center.device)
    used = torch.zeros([rows, width], dtype=torch.bool, device=center.device)
    pair[center, rank] = number
    used[center, rank] = torch.ones_like(center, dtype=torch.bool)
    return pair, used


@lru_cache
def _scripted_slots() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return cast(Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], torch.jit.script(_slots))


@dataclass(frozen=True)
class LocalOutput:
    """What a model returns.

    Parameters
    ----------
    atomic_energies : Tensor
        (n_local,) eV.
    features : dict of str to Tensor
        The taps that were asked for.
    forces : Tensor, optional
        (n_local, 3) eV/Å, of models with direct forces and of these alone.
    terms : Tensor, optional
        (n_local, T) eV, terms that sum to the atomic energies, of models that have several.
    """

    atomic_energies: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    forces: Tensor | None = None
    terms: Tensor | None = None

    @property
    def float64_terms(self) -> Tensor:
        """(n_local, T) float64; the atomic energies where there is one term."""
        terms = self.atomic_energies.unsqueeze(1) if self.terms is None else self.terms
        return terms.to(torch.float64)


def forces_from_pairs(gradient: Tensor, edges: Edges, n_atoms: int) -> Tensor:
    """(N, 3) forces from (E, 3) dE/dr_ij: F_i = sum_j dE/dr_ij - sum_j dE/dr_ji."""
    forces = gradient.new_zeros(n_atoms, 3)
    return forces.index_add(0, edges.center, gradient).index_add(0, edges.neighbor, -gradient)


def virial_from_pairs(
    gradient: Tensor, r_ij: Tensor, edges: Edges, structures: Structures
) -> Tensor:
    """(S, 3, 3) sum of r_ij outer dE/dr_ij over the pairs of each system."""
    outer = r_ij.unsqueeze(2) * gradient.unsqueeze(1)  # (E, 3, 3)
    virial = gradient.new_zeros(structures.n_systems, 3, 3)
    return virial.index_add(0, structures.system_index[edges.center], outer)


def stress_from_virial(virial: Tensor, structures: Structures) -> Tensor:
    """(S, 3, 3) stress, the symmetric part of the virial over V; NaN where not fully periodic."""
    virial = 0.5 * (virial + virial.transpose(1, 2))
    periodic = structures.pbc.all(dim=1)[:, None, None]
    # Divided by 1 and replaced afterwards: a division by NaN would leave NaN in gradients, too.
    volume = torch.where(periodic, structures.volume[:, None, None], 1.0)
    return torch.where(periodic, virial / volume, torch.nan)


def refuse_coinciding_atoms(structures: Structures, neighbors: NeighborList | None = None) -> None:
    """Refuse two atoms at one place, periodic images included.

    Parameters
    ----------
    structures : Structures
        A batch.
    neighbors : NeighborList, optional
        Of it, with any reach; built if absent.

    Raises
    ------
    DataError
        If two are closer than `ONE_PLACE`; the message names them.
    """
    if neighbors is None:
        structures = structures.to(torch.device("cpu"))
        # Short lists are slow to build: this reach is about the fastest.
        neighbors = build_neighbor_list(structures, 1.5)
    square = pair_vectors(structures, neighbors).detach().square().sum(dim=1)
    found = (square < ONE_PLACE**2).nonzero()[:, 0]
    if len(found) == 0:
        return
    i, j = int(neighbors.center[found[0]]), int(neighbors.neighbor[found[0]])
    system = int(structures.system_index[i])
    first = int(structures.atom_offsets[system])
    names = [structures.species_table.names[int(structures.species[k])] for k in (i, j)]
    raise DataError(
        f"{structures.name_of(system)}: atoms {i - first} ({names[0]}) and {j - first} "
        f"({names[1]}) are at the same position: remove one of them"
    )
