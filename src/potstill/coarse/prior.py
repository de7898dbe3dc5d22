"""Priors of coarse-grained beads, from the structure of a mapped trajectory.

Boltzmann inversion gives what little a network needs not learn, and cannot learn where there are no
data: that beads do not fuse, and that bonds and angles hold. The network learns the rest of the
mapped forces, as it does on top of ZBL: save the prior by `potstill.checkpoint.save_potential` and
name the file in `energy: {prior: prior.pt}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from potstill.errors import ConfigError, DataError
from potstill.models import Bonds, PairRepulsion, Potential, SumPotential
from potstill.models.bonded import Angle, Bond
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.structures import Structures
from potstill.units import BOLTZMANN

#: A repulsion begins where the radial distribution has this share of its maximum ...
ONSET = 0.1
#: ... and at this share of the shortest distance it has at least so many k_B T.
NEAR, NEAR_HEIGHT = 0.9, 20.0
#: k_B T between the bonded pairs of two species and all other ones.
BARRIER = 20.0

#: Å: how far pairs are looked at, and the bins of their distances.
_R_MAX, _BIN = 10.0, 0.05
#: Neighbor lists are made for so many beads at a time.
_AT_A_TIME = 10_000


def fit_prior(
    structures: Structures,
    temperature: float,
    *,
    bonds: Sequence[tuple[str, str]] = (),
    angles: Sequence[tuple[str, str, str]] = (),
) -> Potential:
    """The repulsion of all pairs of species that are not bonded, and bonds and angles if given.

    Parameters
    ----------
    structures : Structures
        Mapped frames.
    temperature : float
        Of the trajectory, K.
    bonds, angles : sequence of tuple of str
        Names of the beads, for `fit_bonds`.

    Raises
    ------
    ConfigError, DataError
        As of `fit_repulsion` and `fit_bonds`.
    """
    if not bonds:
        if angles:
            raise ConfigError("angles are between bonds, and no bonds are given")
        return fit_repulsion(structures, temperature)
    held = fit_bonds(structures, temperature, bonds, angles)
    walls = _walls(structures, temperature, bonds)
    if not bool(walls[1].any()):  # a molecule of two beads
        return held
    repulsion = PairRepulsion(structures.species_table, *walls)
    return SumPotential({"repulsion": repulsion, "bonds": held})


def fit_repulsion(structures: Structures, temperature: float) -> PairRepulsion:
    """Invert the first occupied bins of the radial distributions.

    h(r) is the number of pairs of two species by distance over the volume of the bins (0.05 Å), the
    radial distribution but for a factor, so that single molecules have one too. The repulsion ends
    at R, where h first reaches `ONSET` times its maximum: beyond, data abound. Its strength ε fits
    `ε ((R/r)^4 - 1)^3` to `-k_B T ln(h(r) / h(R))` in the occupied bins below R by least squares,
    which the innermost ones rule. At `NEAR` times the shortest distance it is at least
    `NEAR_HEIGHT` k_B T, however few pairs there are.

    Parameters
    ----------
    structures : Structures
        Mapped frames, periodic or not.
    temperature : float
        K.

    Raises
    ------
    ConfigError
        If the temperature is not positive.
    DataError
        If no pair of any species comes within 10 Å.
    """
    walls = _walls(structures, temperature, ())
    if not bool(walls[1].any()):
        raise DataError(f"no two beads come within {_R_MAX:g} Å: there is nothing to invert")
    return PairRepulsion(structures.species_table, *walls)


def _walls(
    structures: Structures, temperature: float, bonds: Sequence[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """ε and R by pairs of species, (n, n) each; zero for bonds, which keep beads apart as well."""
    thermal = _thermal_energy(temperature)
    names = structures.species_table.names
    n, n_bins = len(names), round(_R_MAX / _BIN)
    counts = torch.zeros(n * n * n_bins, dtype=torch.float64)
    shortest = torch.full((n * n,), math.inf, dtype=torch.float64)
    for part, center, neighbor, vectors in _pairs(structures):
        r = torch.linalg.vector_norm(vectors, dim=1)
        pair = part.species[center] * n + part.species[neighbor]
        place = pair * n_bins + (r / _BIN).long().clamp(max=n_bins - 1)
        counts += torch.bincount(place, minlength=len(counts))
        shortest.scatter_reduce_(0, pair, r, "amin")
    edges = _BIN * torch.arange(n_bins + 1, dtype=torch.float64)
    density = counts.view(n, n, n_bins) / (edges[1:] ** 3 - edges[:-1] ** 3)
    bonded = {frozenset(pair) for pair in bonds}
    strength, radius = torch.zeros(2, n, n, dtype=torch.float64)
    for a in range(n):
        for b in range(a, n):
            if bool(density[a, b].any()) and frozenset((names[a], names[b])) not in bonded:
                found = _wall(density[a, b], float(shortest[a * n + b]), thermal)
                strength[a, b], radius[a, b] = found
                strength[b, a], radius[b, a] = found
    return strength, radius


def _wall(density: Tensor, closest: float, thermal: float) -> tuple[float, float]:
    """ε and R of one pair of species from h by bins, the shortest distance and k_B T."""
    centers = _BIN * (torch.arange(len(density), dtype=torch.float64) + 0.5)
    onset = ONSET * float(density.max())
    k = int((density >= onset).nonzero()[0])
    before = float(density[k - 1]) if k else 0.0
    share = (onset - before) / (float(density[k]) - before)
    radius = max(closest, float(centers[k]) - _BIN * (1.0 - share))
    inside = (density > 0.0) & (centers < radius)
    shape = ((radius / centers[inside]) ** 4 - 1.0) ** 3
    height = -thermal * torch.log(density[inside] / onset)
    least = NEAR_HEIGHT * thermal / ((radius / (NEAR * closest)) ** 4 - 1.0) ** 3
    if not len(shape):
        return least, radius
    return max(least, float((shape @ height) / (shape @ shape))), radius


def fit_bonds(
    structures: Structures,
    temperature: float,
    bonds: Sequence[tuple[str, str]],
    angles: Sequence[tuple[str, str, str]] = (),
) -> Bonds:
    """Harmonic bonds and angles with the means and variances of the mapped ones.

    `k = k_B T / σ²`, of the bond's length and of the angle's cosine. A bead is bonded to the
    nearest bead of the other species, to the nearest two where an angle has that species at both
    of its ends. Bonds end halfway to the closest pair that is not bonded; where there is none, as
    in a single molecule, between 1.5 and 2 times their length.

    Parameters
    ----------
    structures : Structures
        Mapped frames.
    temperature : float
        K.
    bonds : sequence of (str, str)
        Species.
    angles : sequence of (str, str, str)
        Species, with the vertex in the middle.

    Raises
    ------
    ConfigError
        If a name is unknown, or an angle lacks a bond.
    DataError
        If a bead has no partner, or distances do not tell which pairs are bonded: a barrier of
        `BARRIER` k_B T does not fit between them and the others.
    """
    thermal, names = _thermal_energy(temperature), structures.species_table.names
    for name in {name for kinds in (*bonds, *angles) for name in kinds} - set(names):
        raise ConfigError(f"there is no bead {name} among {', '.join(names)}")
    made = []
    for a, b in bonds:
        # The vertex of an angle sees both of its partners.
        vertex, end = (a, b) if (b, a, b) in angles else (b, a)
        partners = _Partners(structures, vertex, end, 2 if (end, vertex, end) in angles else 1)
        length, variance = float(partners.length.mean()), float(partners.length.var())
        stiffness = thermal / max(variance, 1e-6)
        longest, other = float(partners.length.max()), partners.closest_other
        alone = math.isinf(other)
        inner = 1.5 * length if alone else 0.5 * (longest + other)
        outer = 2.0 * length if alone else other
        barrier = 0.5 * stiffness * (inner - length) ** 2
        if not (inner > longest and barrier >= BARRIER * thermal):
            raise DataError(
                f"bonds {a}-{b} cannot be told from other pairs by their distance: the longest is "
                f"{longest:.2f} Å, the closest other pair {other:.2f} Å apart"
            )
        made.append(Bond((a, b), length, stiffness, inner, outer))
    bent = []
    for first, vertex, last in angles:
        sides = [_Partners(structures, vertex, first, 2 if first == last else 1)]
        if first != last:
            sides.append(_Partners(structures, vertex, last, 1))
        units = torch.cat([side.unit for side in sides], dim=1)
        cosine = (units[:, 0] * units[:, 1]).sum(1)
        stiffness = thermal / max(float(cosine.var()), 1e-6)
        bent.append(Angle((first, vertex, last), float(cosine.mean()), stiffness))
    return Bonds(structures.species_table, made, bent)


class _Partners:
    """The nearest beads of one species around all beads of another.

    `length` (n * k,) Å and `unit` (n, k, 3) of the k nearest of n beads in all frames, and the
    shortest distance of any other pair, infinite if there is none within 10 Å.
    """

    def __init__(self, structures: Structures, center: str, neighbor: str, k: int) -> None:
        names = structures.species_table.names
        a, b = names.index(center), names.index(neighbor)
        vectors, self.closest_other = [], math.inf
        for part, i, j, r_ij in _pairs(structures):
            chosen = ((part.species[i] == a) & (part.species[j] == b)).nonzero()[:, 0]
            r = torch.linalg.vector_norm(r_ij[chosen], dim=1)
            chosen = chosen[torch.argsort(r)]
            chosen = chosen[torch.argsort(i[chosen], stable=True)]  # by center, then by distance
            count = torch.bincount(i[chosen], minlength=part.n_atoms)
            if bool((count[part.species == a] < k).any()):
                raise DataError(f"a bead {center} has fewer than {k} beads {neighbor} around it")
            rank = torch.arange(len(chosen)) - (torch.cumsum(count, 0) - count)[i[chosen]]
            vectors.append(r_ij[chosen[rank < k]].view(-1, k, 3))
            rest = torch.linalg.vector_norm(r_ij[chosen[rank >= k]], dim=1).tolist()
            self.closest_other = min([self.closest_other, *rest])
        if not vectors or not any(len(part) for part in vectors):
            raise DataError(f"there are no beads {center}")
        found = torch.cat(vectors)
        length = torch.linalg.vector_norm(found, dim=2)
        self.length, self.unit = length.flatten(), found / length[..., None]


def _pairs(structures: Structures) -> Iterator[tuple[Structures, Tensor, Tensor, Tensor]]:
    """Some frames, centers, neighbors and vectors (E, 3) of their pairs, batch after batch."""
    for systems in structures.batches(_AT_A_TIME):
        part = structures.select(systems)
        pairs = build_neighbor_list(part, _R_MAX)
        yield part, pairs.center, pairs.neighbor, pair_vectors(part, pairs)


def _thermal_energy(temperature: float) -> float:
    """k_B T in eV."""
    if not temperature > 0.0:
        raise ConfigError(f"Boltzmann inversion needs a positive temperature, not {temperature} K")
    return BOLTZMANN * temperature
