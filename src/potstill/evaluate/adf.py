"""Angles between neighbors, numbers of neighbors: what lies within the first minimum of g(r)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import ase
import numpy as np
from pydantic import Field

from potstill.errors import ConfigError, DataError, suggest
from potstill.evaluate.base import Bench, Candidate, Findings
from potstill.evaluate.distributions import (
    Array,
    Blocks,
    Distribution,
    Distributions,
    Kinds,
    as_periodic,
    bins_of,
    over_frames,
)
from potstill.evaluate.rdf import neighbor_cutoffs
from potstill.evaluate.structure import DistributionEvaluation
from potstill.report.tables import Row
from potstill.structures import Structures

#: How far neighbors reach, Å: one for all, or by pair ("A-B", in any order).
Cutoffs = float | Mapping[str, float]


def cutoff_table(cutoffs: Cutoffs, names: Sequence[str]) -> np.ndarray:
    """(n_kinds, n_kinds) Å, symmetric; of several entries for a pair the last one counts.

    Raises
    ------
    ConfigError
        If a pair has no cutoff, or there is one for kinds that do not occur.
    """
    n = len(names)
    if not isinstance(cutoffs, Mapping):
        return np.full((n, n), float(cutoffs))
    places = {f"{a}-{b}": (i, j) for i, a in enumerate(names) for j, b in enumerate(names)}
    places |= {"all": (0, 0)} if n == 1 else {}
    table = np.full((n, n), np.nan)
    for pair, cutoff in cutoffs.items():
        if pair not in places:
            raise ConfigError(f"there is a cutoff for {pair}{suggest(pair, places)}")
        i, j = places[pair]
        table[i, j] = table[j, i] = cutoff
    for i, j in np.argwhere(np.isnan(table)):
        raise ConfigError(f"there is no cutoff for {names[i]}-{names[j]}: give one, in Å")
    return table


# -- angles --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AngularDistribution(Distribution):
    """Distribution of angles between two neighbors of an atom.

    Parameters
    ----------
    angle : ndarray
        (n_bins,) middles of the bins, degrees.
    density, error : ndarray
        (n_bins,) per degree, integrating to one, and its standard error from blocks.
    cutoff : float
        How far the first neighbor's kind reaches, Å.
    n_frames, n_blocks : int
    triple : str
        "all" or "A-B-C": neighbors of kinds A and C around an atom of kind B.
    second_cutoff : float, optional
        How far the last kind reaches, Å, where it differs.
    n_angles : float, optional
        Angles per frame.
    blocks : ndarray, optional
        (n_blocks, n_bins) means of the density over the blocks.
    """

    angle: np.ndarray
    density: np.ndarray
    error: np.ndarray
    cutoff: float
    n_frames: int
    n_blocks: int
    triple: str = "all"
    second_cutoff: float | None = None
    n_angles: float | None = None
    blocks: np.ndarray | None = None

    @property
    def label(self) -> str:
        """The triple."""
        return self.triple

    @property
    def values(self) -> np.ndarray:
        """The density, per degree."""
        return self.density

    @property
    def measure(self) -> np.ndarray:
        """Width of the bins, degrees."""
        return np.array(180.0 / len(self.angle))

    @property
    def grid(self) -> tuple[np.ndarray, ...]:
        """Middles of the bins, degrees, and the cutoffs."""
        return self.angle, np.array([self.cutoff, self.second_cutoff or self.cutoff])


@dataclass(frozen=True)
class AngularDistributions(Distributions):
    """Angular distributions by triple."""

    parts: dict[str, AngularDistribution]  # type: ignore[assignment]


def angular_distributions(
    frames: Structures | Sequence[ase.Atoms],
    *,
    cutoffs: Cutoffs,
    alike: bool = False,
    n_bins: int = 90,
    n_blocks: int = 5,
) -> dict[str, AngularDistribution]:
    """Angular distributions of a trajectory: angles j-i-k between neighbors within cutoffs.

    An ideal gas gives sin(θ)/2 per radian.

    Parameters
    ----------
    frames : Structures or sequence of ase.Atoms
        Periodic frames in order of time.
    cutoffs : float or mapping
        How far neighbors reach, Å; by pair of kinds ("A-B"), or one for all. The first minimum of
        g(r) is the usual choice (`potstill.evaluate.rdf.neighbor_cutoffs`).
    alike : bool
        Take all atoms as of one kind: the only distribution is then "all".
    n_bins : int
        Bins of equal width from 0 to 180 degrees.
    n_blocks : int
        As for `radial_distributions`.

    Returns
    -------
    dict
        By "A-B-C", for neighbors of kinds A and C around an atom of kind B, without triples that
        never occur; "all" for atoms alike or of one kind.

    Raises
    ------
    ConfigError
        If a pair has no cutoff.
    DataError
        If there is no frame, a frame is not fully periodic, or no atom has two neighbors.
    """
    structures = as_periodic(frames)
    kinds = Kinds.of(structures)
    n, edges = len(kinds), np.linspace(0.0, 180.0, n_bins + 1)
    reach = cutoff_table(cutoffs, kinds.names)
    alike = alike or n == 1
    neighbors = [(0, 0)] if alike else list(combinations_with_replacement(range(n), 2))
    triples = [(a, b, c) for b in range(1 if alike else n) for a, c in neighbors]
    number = np.zeros((n, n, n), dtype=np.int64)
    for k, (a, b, c) in enumerate(triples if not alike else ()):
        number[a, b, c] = number[c, b, a] = k

    def one_frame(system: int, vectors: Array, center: Array, neighbor: Array) -> Array:
        kind = kinds[system]
        distance = np.linalg.norm(vectors, axis=1)
        near = distance <= reach[kind[center], kind[neighbor]]
        center, other = center[near], kind[neighbor[near]]
        unit = vectors[near] / distance[near, None]
        first, second = pairs_of_pairs(center)
        cosine = np.clip(np.einsum("ij,ij->i", unit[first], unit[second]), -1.0, 1.0)
        which = number[other[first], kind[center[first]], other[second]]
        bins = bins_of(np.degrees(np.arccos(cosine)), edges)
        counts = np.bincount(which * n_bins + bins, minlength=len(triples) * n_bins)
        return counts.reshape(len(triples), n_bins).astype(float)

    found = over_frames(structures, float(reach.max()), n_blocks, one_frame)
    angles = found.mean.sum(axis=1)
    if not angles.any():
        raise DataError(
            f"no atom has two neighbors within {float(reach.max()):g} Å: enlarge the cutoff"
        )
    # Frames weigh by their number of angles: normalize the average, not every frame.
    scale = (np.maximum(angles, np.finfo(float).tiny) * (edges[1] - edges[0]))[:, None]
    found = Blocks(found.means / scale, found.sizes)
    mean, error = found.mean, found.error
    result = {}
    for k, (a, b, c) in enumerate(triples):
        label = "all" if alike else "-".join(kinds.names[x] for x in (a, b, c))
        if angles[k] > 0.0:
            result[label] = AngularDistribution(
                angle=0.5 * (edges[1:] + edges[:-1]),
                density=mean[k],
                error=error[k],
                cutoff=float(reach[b, a]),
                n_frames=len(structures),
                n_blocks=len(found.means),
                triple=label,
                second_cutoff=float(reach[b, c]),
                n_angles=float(angles[k]),
                blocks=found.means[:, k],
            )
    return result


def pairs_of_pairs(center: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (a, b), a < b, of all pairs that share a center; `center` is sorted."""
    counts = np.bincount(center)
    starts = np.cumsum(counts) - counts
    pairs = [np.zeros((2, 0), int)]
    for count in np.unique(counts[counts > 1]):
        base = starts[counts == count][:, None]
        pairs.append(np.stack([(base + k).ravel() for k in np.triu_indices(count, k=1)]))
    first, second = np.concatenate(pairs, axis=1)
    return first, second


class Shells(DistributionEvaluation):
    """Base of evaluations of what lies within the first shells of neighbors.

    Parameters
    ----------
    cutoff : float, optional
        How far neighbors of all kinds reach, Å.
    cutoffs : dict of str to float
        The same by pair of kinds, "A-B". By default the first minimum of the pair's g(r), in the
        reference trajectory if there is one.
    """

    cutoff: float | None = Field(default=None, gt=0)
    cutoffs: dict[str, float] = Field(default_factory=dict)

    def reach(self, bench: Bench, candidate: Candidate) -> Cutoffs:
        """How far neighbors reach in a candidate's trajectory, Å."""
        if self.cutoff is not None:
            return self.cutoff
        name, frames = bench.standard_for(candidate)
        found = bench.once(("cutoffs", name), lambda: neighbor_cutoffs(frames))
        return found | self.cutoffs


class Adf(Shells):
    """Distributions of the angles between neighbors in molecular dynamics, by triple of kinds."""

    name = "adf"
    title = "angular distribution"
    result = AngularDistributions
    on_request = True
    symbol = "ADF"
    key = "adf"
    axes = ("Angle (°)", "Density (1/°)")
    names = "A-B-C: neighbors A and C around B."

    def run(self, bench: Bench, candidate: Candidate) -> AngularDistributions:
        """Take the distributions of the candidate's trajectory."""
        frames = self.frames_of(bench, candidate)
        cutoffs = self.reach(bench, candidate)
        return AngularDistributions(
            angular_distributions(frames, cutoffs=cutoffs, n_blocks=self.n_blocks)
        )

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Reach of the neighbors and peak of a single distribution; differences."""
        results = found.of(cls.name, AngularDistributions)
        alone = {m: r.parts["all"] for m, r in results.items() if "all" in r.parts}
        if alone:
            reach = {m: part.cutoff for m, part in alone.items()}
            yield Row("Neighbors of the angles reach to (Å)", reach)
            peaks = {m: float(part.angle[part.density.argmax()]) for m, part in alone.items()}
            yield Row("Most frequent angle (°)", peaks)
        yield from super().rows(found)


# -- coordination --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CoordinationNumbers(Distribution):
    """How many neighbors atoms have within a cutoff.

    Parameters
    ----------
    mean, mean_error : float
        Mean number of neighbors, and its standard error from blocks.
    probability, error : ndarray
        (n,) share of the atoms that have 0, 1, ... neighbors, and its standard error.
    cutoff : float
        Å.
    pair : str
        "all" or "A-B": neighbors of kind B around atoms of kind A.
    n_frames, n_blocks : int
    blocks : ndarray, optional
        (n_blocks, n) means of the probability over the blocks.
    """

    mean: float
    mean_error: float
    probability: np.ndarray
    error: np.ndarray
    cutoff: float
    pair: str
    n_frames: int
    n_blocks: int
    blocks: np.ndarray | None = None

    @property
    def label(self) -> str:
        """The pair."""
        return self.pair

    @property
    def values(self) -> np.ndarray:
        """The probability."""
        return self.probability

    @property
    def measure(self) -> np.ndarray:
        """One for every number."""
        return np.array(1.0)

    @property
    def grid(self) -> tuple[np.ndarray, ...]:
        """The numbers of neighbors, and the cutoff."""
        return np.arange(len(self.probability)), np.array([self.cutoff])


@dataclass(frozen=True)
class Coordination(Distributions):
    """Numbers of neighbors by pair."""

    parts: dict[str, CoordinationNumbers]  # type: ignore[assignment]


#: Numbers of neighbors that are told apart; more count as the last.
MOST_NEIGHBORS = 63


def coordination(
    frames: Structures | Sequence[ase.Atoms], *, cutoffs: Cutoffs, n_blocks: int = 5
) -> dict[str, CoordinationNumbers]:
    """Numbers of neighbors of every kind around atoms of every kind, and their distributions.

    The mean is the integral of 4π r² ρ g(r) up to the cutoff.

    Parameters
    ----------
    frames : Structures or sequence of ase.Atoms
        Periodic frames in order of time.
    cutoffs : float or mapping
        As for `angular_distributions`.
    n_blocks : int
        As for `radial_distributions`.

    Returns
    -------
    dict
        By "A-B", neighbors of kind B around A; "all" for atoms of one kind.

    Raises
    ------
    ConfigError
        If a pair has no cutoff.
    DataError
        If there is no frame, or a frame is not fully periodic.
    """
    structures = as_periodic(frames)
    kinds = Kinds.of(structures)
    n, reach = len(kinds), cutoff_table(cutoffs, kinds.names)
    width = MOST_NEIGHBORS + 1

    def one_frame(system: int, vectors: Array, center: Array, neighbor: Array) -> Array:
        kind = kinds[system]
        near = np.linalg.norm(vectors, axis=1) <= reach[kind[center], kind[neighbor]]
        which = center[near] * n + kind[neighbor[near]]
        numbers = np.bincount(which, minlength=n * len(kind)).reshape(-1, n)
        counts = np.zeros((n, n, width + 1))
        for b in range(n):
            at = kind * width + np.minimum(numbers[:, b], MOST_NEIGHBORS)
            counts[:, b, :width] = np.bincount(at, minlength=n * width).reshape(n, width)
            counts[:, b, width] = np.bincount(kind, numbers[:, b], n)
        return counts / np.maximum(kinds.numbers[system], 1.0)[:, None, None]

    found = over_frames(structures, float(reach.max()), n_blocks, one_frame)
    mean, error = found.mean, found.error
    return {
        label: CoordinationNumbers(
            mean=float(mean[a, b, -1]),
            mean_error=float(error[a, b, -1]),
            probability=mean[a, b, :-1],
            error=error[a, b, :-1],
            cutoff=float(reach[a, b]),
            pair=label,
            n_frames=len(structures),
            n_blocks=len(found.means),
            blocks=found.means[:, a, b, :-1],
        )
        for a in range(n)
        for b in range(n)
        for label in ["all" if n == 1 else f"{kinds.names[a]}-{kinds.names[b]}"]
    }


class CoordinationEvaluation(Shells):
    """Numbers of neighbors within the first minimum of g(r), and their distributions."""

    name = "coordination"
    title = "coordination number"
    result = Coordination
    on_request = True
    symbol = "P(n)"
    key = "coordination"
    axes = ("Neighbors n", "Share of atoms")
    names = "A-B: neighbors B around A."

    def run(self, bench: Bench, candidate: Candidate) -> Coordination:
        """Count the neighbors in the candidate's trajectory."""
        frames = self.frames_of(bench, candidate)
        cutoffs = self.reach(bench, candidate)
        return Coordination(coordination(frames, cutoffs=cutoffs, n_blocks=self.n_blocks))

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Mean numbers of neighbors; differences."""
        results = found.of(cls.name, Coordination)
        for label in dict.fromkeys(k for r in results.values() for k in r.parts):
            parts = {m: r.parts[label] for m, r in results.items() if label in r.parts}
            reach = next(iter(parts.values())).cutoff
            whose = "Neighbors" if label == "all" else f"Neighbors {label}"
            yield Row(f"{whose} within {reach:.2f} Å", {m: p.mean for m, p in parts.items()})
        yield from super().rows(found)
