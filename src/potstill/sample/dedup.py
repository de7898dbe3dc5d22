"""Near-duplicates among frames, and choosing frames that differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from potstill.errors import ConfigError
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.structures import Structures

#: Neighbors of each species per atom, and bins of sorted distances, in a fingerprint.
_N_NEIGHBORS = 12
_N_BINS = 48


def distance_fingerprints(structures: Structures, cutoff: float = 8.0) -> Tensor:
    """Describe each system by its sorted short distances.

    For each ordered pair of species (a, b), the distances from all atoms a to their twelve
    nearest atoms b are sorted together and averaged in 48 bins of equal population. The
    description does not change with translation, rotation, the order of atoms, or the choice of
    a larger cell for the same crystal.

    Parameters
    ----------
    cutoff : float
        Å; an atom with too few neighbors within it counts the missing ones at the cutoff.

    Returns
    -------
    Tensor
        (S, n_pairs_of_species * 48) float64, Å; zero for pairs of species that a system lacks.
    """
    neighbors = build_neighbor_list(structures, cutoff)
    distance = torch.linalg.vector_norm(pair_vectors(structures, neighbors), dim=1)
    n_species = len(structures.species_table)
    other = structures.species[neighbors.neighbor]
    columns = []
    for b in torch.unique(structures.species).tolist():
        nearest = _nearest(
            neighbors.center[other == b], distance[other == b], structures.n_atoms, cutoff
        )
        columns += [_binned(structures, nearest, a) for a in range(n_species)]
    return torch.cat(columns, dim=1) if columns else torch.zeros(structures.n_systems, 0)


def _nearest(center: Tensor, distance: Tensor, n_atoms: int, cutoff: float) -> Tensor:
    """(N, 12) sorted distances from each atom to its nearest neighbors; cutoff where missing."""
    order = torch.argsort(distance, stable=True)
    order = order[torch.argsort(center[order], stable=True)]
    center, distance = center[order], distance[order]
    counts = torch.bincount(center, minlength=n_atoms)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(center)) - starts[center]
    near = rank < _N_NEIGHBORS
    result = torch.full((n_atoms, _N_NEIGHBORS), cutoff, dtype=torch.float64)
    result[center[near], rank[near]] = distance[near]
    return result


def _binned(structures: Structures, nearest: Tensor, species: int) -> Tensor:
    """(S, 48) means of the sorted rows of atoms of one species, per system."""
    result = torch.zeros(structures.n_systems, _N_BINS, dtype=torch.float64)
    offsets = structures.atom_offsets.tolist()
    for s in range(structures.n_systems):
        part = slice(offsets[s], offsets[s + 1])
        values = nearest[part][structures.species[part] == species].flatten().sort().values
        if len(values):
            # Means between equal fractions of the sorted values, by their running integral.
            running = np.concatenate([[0.0], np.cumsum(values.numpy())])
            edges = np.linspace(0, len(values), _N_BINS + 1)
            integral = np.interp(edges, np.arange(len(values) + 1), running)
            result[s] = torch.from_numpy(np.diff(integral) * _N_BINS / len(values))
    return result


def drop_duplicates(
    structures: Structures,
    energies: Tensor | None = None,
    *,
    distance_tolerance: float = 2e-3,
    energy_tolerance: float = 1e-3,
    cutoff: float = 8.0,
) -> Tensor:
    """Find the frames to keep: each that is not nearly the same as one kept before it.

    Two frames are nearly the same if they have the same composition, their sorted distances
    differ by less than `distance_tolerance` (root mean square over the fingerprint), and their
    energies per atom by less than `energy_tolerance` where both are known.

    Parameters
    ----------
    energies : Tensor, optional
        (S,) eV, NaN where unknown.
    distance_tolerance : float
        Å.
    energy_tolerance : float
        eV per atom.
    cutoff : float
        Å, how far neighbors are looked for.

    Returns
    -------
    Tensor
        int64 indices of the systems to keep, increasing.
    """
    fingerprints = distance_fingerprints(structures, cutoff)
    counts = structures.n_atoms_per_system.clamp(min=1)
    fractions = structures.composition() / counts[:, None]
    per_atom = torch.full((len(counts),), torch.nan) if energies is None else energies / counts
    kept: list[int] = []
    for s in range(structures.n_systems):
        others = torch.tensor(kept, dtype=torch.int64)
        spread = (fingerprints[others] - fingerprints[s]).square().mean(1).sqrt()
        same = (spread < distance_tolerance) & torch.isclose(
            fractions[others], fractions[s], atol=1e-9
        ).all(1)
        gap = (per_atom[others] - per_atom[s]).abs()
        same &= ~(gap > energy_tolerance)  # an unknown energy (NaN) does not tell frames apart
        if not bool(same.any()):
            kept.append(s)
    return torch.tensor(kept, dtype=torch.int64)


def farthest_points(
    fingerprints: Tensor, n: int, *, chosen: Sequence[int] = (), seed: int = 0
) -> Tensor:
    """Choose n points one by one, each as far as can be from all that were chosen before.

    Parameters
    ----------
    fingerprints : Tensor
        (S, F), for example by `distance_fingerprints`.
    chosen : sequence of int
        Points that are taken already; not returned again.
    seed : int
        Draws the first point if none is chosen.

    Returns
    -------
    Tensor
        (n,) int64 in order of choice.
    """
    size = len(fingerprints)
    if n > size - len(set(chosen)):
        raise ConfigError(f"cannot choose {n} frames of {size - len(set(chosen))}")
    start = list(chosen)
    picked = [] if start or not n else [int(np.random.default_rng(seed).integers(size))]
    nearest = torch.full((size,), torch.inf, dtype=torch.float64)

    def take(point: int) -> None:
        away = torch.linalg.vector_norm(fingerprints - fingerprints[point], dim=1)
        nearest[:] = torch.minimum(nearest, away)
        nearest[point] = -1.0

    for point in start or picked:
        take(point)
    while len(picked) < n:
        picked.append(int(nearest.argmax()))
        take(picked[-1])
    return torch.tensor(picked, dtype=torch.int64)
