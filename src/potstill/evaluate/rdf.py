"""Radial distributions of liquids and solids, for all atoms alike or for each pair of kinds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import ase
import numpy as np
from pydantic import Field

from potstill.evaluate.base import Bench, Candidate
from potstill.evaluate.distributions import (
    Array,
    Distribution,
    Distributions,
    Kinds,
    as_periodic,
    bins_of,
    over_frames,
)
from potstill.evaluate.structure import DistributionEvaluation
from potstill.structures import Structures

#: Kinds of center and neighbor.
Pair = tuple[str, str]


@dataclass(frozen=True)
class RadialDistribution(Distribution):
    """g(r) averaged over frames.

    Parameters
    ----------
    r : ndarray
        (n_bins,) middles of the bins, Å.
    g, error : ndarray
        (n_bins,) distribution and its standard error from blocks of frames (NaN for one block).
    coordination : ndarray
        (n_bins,) mean number of neighbors up to the upper edge of the bin.
    pair : str
        "all" or "A-B": neighbors of kind B around atoms of kind A.
    density : float
        Mean number density of the neighbors' kind, 1/Å³.
    n_frames, n_blocks : int
    blocks : ndarray, optional
        (n_blocks, n_bins) means of g over the blocks.
    """

    r: np.ndarray
    g: np.ndarray
    error: np.ndarray
    coordination: np.ndarray
    pair: str
    density: float
    n_frames: int
    n_blocks: int
    blocks: np.ndarray | None = None

    @property
    def bin_width(self) -> float:
        """Å."""
        return float(self.r[1] - self.r[0]) if len(self.r) > 1 else 2.0 * float(self.r[0])

    @property
    def label(self) -> str:
        """The pair."""
        return self.pair

    @property
    def values(self) -> np.ndarray:
        """The values of g."""
        return self.g

    @property
    def measure(self) -> np.ndarray:
        """Width of the bins, Å: r counts alike near and far."""
        return np.array(self.bin_width)

    @property
    def counted(self) -> np.ndarray:
        """Volumes of the shells, Å³."""
        half = 0.5 * self.bin_width
        return 4.0 / 3.0 * math.pi * ((self.r + half) ** 3 - (self.r - half) ** 3)

    @property
    def grid(self) -> tuple[np.ndarray, ...]:
        """Middles of the bins, Å."""
        return (self.r,)


@dataclass(frozen=True)
class RadialDistributions(Distributions):
    """Radial distributions by pair."""

    parts: dict[str, RadialDistribution]  # type: ignore[assignment]


def radial_distributions(
    frames: Structures | Sequence[ase.Atoms],
    *,
    r_max: float = 8.0,
    n_bins: int = 160,
    pairs: Sequence[Pair | None] | None = None,
    n_blocks: int = 5,
) -> dict[str, RadialDistribution]:
    """Radial distribution functions of a trajectory, in one pass over its frames.

    All periodic images count, so `r_max` may exceed half the cell and the integral of g(r) is the
    coordination number exactly. An ideal gas of N atoms gives 1 - 1/N below the cell's length, and
    1 for atoms of two kinds.

    Parameters
    ----------
    frames : Structures or sequence of ase.Atoms
        Periodic frames in order of time; number of atoms and volume may change.
    r_max : float
        Å.
    n_bins : int
        Bins of equal width from zero to `r_max`.
    pairs : sequence of (str, str) or None, optional
        Kinds of center and neighbor; None among them is all atoms alike. By default every pair of
        kinds that occur.
    n_blocks : int
        Consecutive blocks whose scatter gives the error; fewer if there are fewer frames.

    Returns
    -------
    dict
        By "A-B", in the order of the species table; "all" for atoms alike or of one kind.

    Raises
    ------
    DataError
        If there is no frame, a frame is not fully periodic, or a species does not occur.
    """
    structures = as_periodic(frames)
    kinds = Kinds.of(structures)
    n, edges = len(kinds), np.linspace(0.0, r_max, n_bins + 1)
    shells = 4.0 / 3.0 * math.pi * np.diff(edges**3)
    if pairs is None:
        pairs = [None] if n == 1 else list(combinations_with_replacement(kinds.names, 2))
    select = np.zeros((len(pairs), n, n))
    for k, pair in enumerate(pairs):
        if pair is None:
            select[k] = 1.0
        else:
            select[k, kinds.index(pair[0], structures), kinds.index(pair[1], structures)] = 1.0
    # (frames, pairs) atoms that are centers and neighbors.
    around = kinds.numbers @ select.any(axis=2).T
    among = kinds.numbers @ select.any(axis=1).T
    volumes = structures.volume.numpy()

    def one_frame(system: int, vectors: Array, center: Array, neighbor: Array) -> Array:
        kind = kinds[system]
        bins = bins_of(np.linalg.norm(vectors, axis=1), edges)
        which = (kind[center] * n + kind[neighbor]) * n_bins + bins
        counts = np.bincount(which, minlength=n * n * n_bins).reshape(n, n, n_bins)
        neighbors = np.einsum("pij,ijb->pb", select, counts) / around[system][:, None]
        density = among[system][:, None] / volumes[system]
        return np.stack([neighbors, neighbors / (density * shells)])

    found = over_frames(structures, r_max, n_blocks, one_frame)  # (blocks, 2, pairs, bins)
    mean, error = found.mean, found.error
    densities = (among / volumes[:, None]).mean(axis=0)
    return {
        label: RadialDistribution(
            r=0.5 * (edges[1:] + edges[:-1]),
            g=mean[1, k],
            error=error[1, k],
            coordination=np.cumsum(mean[0, k]),
            pair=label,
            density=float(densities[k]),
            n_frames=len(structures),
            n_blocks=len(found.means),
            blocks=found.means[:, 1, k],
        )
        for k, label in enumerate("all" if pair is None else "-".join(pair) for pair in pairs)
    }


def radial_distribution(
    frames: Structures | Sequence[ase.Atoms],
    *,
    r_max: float = 8.0,
    n_bins: int = 160,
    pair: Pair | None = None,
    n_blocks: int = 5,
) -> RadialDistribution:
    """Radial distribution of one pair, or of all atoms alike: see `radial_distributions`."""
    (found,) = radial_distributions(
        frames, r_max=r_max, n_bins=n_bins, pairs=[pair], n_blocks=n_blocks
    ).values()
    return found


def first_minimum(distribution: RadialDistribution) -> float:
    """Where g(r) is lowest between its highest peak and 1.6 times as far, Å."""
    r, peak = distribution.r, int(distribution.g.argmax())
    window = (r >= r[peak]) & (r <= 1.6 * r[peak])
    return float(r[window][distribution.g[window].argmin()])


def neighbor_cutoffs(
    frames: Structures | Sequence[ase.Atoms], *, r_max: float = 12.0
) -> dict[str, float]:
    """How far neighbors of each pair of kinds reach: the first minimum of its g(r), Å.

    Parameters
    ----------
    frames : Structures or sequence of ase.Atoms
        A trajectory.
    r_max : float
        How far peak and minimum may lie, Å.
    """
    found = radial_distributions(frames, r_max=r_max, n_bins=round(20 * r_max))
    return {pair: first_minimum(g) for pair, g in found.items()}


# -- the evaluation ------------------------------------------------------------------------------


class Rdf(DistributionEvaluation):
    """Radial distributions in molecular dynamics, beside the reference's or the teacher's.

    Parameters
    ----------
    r_max : float
        Å.
    n_bins : int
        Bins of equal width from zero to `r_max`.
    pair : (str, str), optional
        Species of center and neighbor; by default every pair of species.
    """

    name = "rdf"
    title = "radial distribution"
    result = RadialDistributions
    symbol = "g(r)"
    unit = "Å"
    key = "rdf"
    axes = ("r (Å)", "g(r)")
    sums = True

    r_max: float = Field(default=8.0, gt=0)
    n_bins: int = Field(default=160, ge=1)
    pair: Pair | None = None

    def run(self, bench: Bench, candidate: Candidate) -> RadialDistributions:
        """Take the distributions of the candidate's trajectory."""
        found = radial_distributions(
            self.frames_of(bench, candidate),
            r_max=self.r_max,
            n_bins=self.n_bins,
            pairs=self.pair and [self.pair],
            n_blocks=self.n_blocks,
        )
        return RadialDistributions(found)
