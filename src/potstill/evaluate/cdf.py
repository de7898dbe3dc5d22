"""Combined distribution of a distance and an angle: where neighbors are, seen from another one.

The combined distribution function (CDF) of kinds A-B-C is the joint histogram of the distance r
from a center i of kind B to an atom j of kind A, and of the angle θ = j-i-k with every neighbor k
of kind C within a cutoff c of i, as TRAVIS takes it (Brehm and Kirchner, J. Chem. Inf. Model. 51,
2007 (2011)). It is divided by what an ideal gas of the same densities has:

    g(r, θ) = <n_ijk(r, θ)> / [N_B ρ_A ΔV(r) · ρ_C (4/3) π c³ · Δcos(θ)/2],   j ≠ k,

with the volume ΔV of the shell. It is the triplet distribution function g3(r, r', θ), averaged over
r' within the cutoff: 1 everywhere in an ideal gas. Far away it does not go to 1 but to the number
of neighbors k over that of the ideal gas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import ase
import numpy as np
from pydantic import Field

from potstill.errors import ConfigError, DataError, suggest
from potstill.evaluate.adf import Cutoffs, Shells, cutoff_table
from potstill.evaluate.base import Bench, Candidate, Findings
from potstill.evaluate.distributions import (
    Array,
    Distributions,
    Kinds,
    PackedDistribution,
    as_periodic,
    bins_of,
    over_frames,
)
from potstill.evaluate.structure import most_different
from potstill.report.panels import Colors, Drawing, Panel
from potstill.structures import Structures

#: Of g(r, θ), whose errors are larger by far.
_DECIMALS = 5


@dataclass(frozen=True)
class CombinedDistribution(PackedDistribution):
    """g(r, θ) of one triple of kinds.

    Parameters
    ----------
    r, angle : ndarray
        (n_r,) and (n_angles,) middles of the bins, Å and degrees.
    g, error : ndarray
        (n_r, n_angles) distribution, and its standard error from blocks.
    cutoff : float
        How far the neighbors k reach, Å.
    triple : str
        "all" or "A-B-C": distance from B to A, angle A-B-C with a neighbor C.
    n_frames, n_blocks : int
    blocks : ndarray, optional
        (n_blocks, n_r, n_angles) means over the blocks; packed in JSON, with three digits.
    """

    r: np.ndarray
    angle: np.ndarray
    g: np.ndarray
    error: np.ndarray
    cutoff: float
    triple: str
    n_frames: int
    n_blocks: int
    blocks: np.ndarray | None = None

    @property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Edges of the bins, Å and degrees."""
        width = 2.0 * self.r[0]
        return width * np.arange(len(self.r) + 1), np.linspace(0.0, 180.0, len(self.angle) + 1)

    @property
    def label(self) -> str:
        """The triple."""
        return self.triple

    @property
    def values(self) -> np.ndarray:
        """The values of g."""
        return self.g

    @property
    def measure(self) -> np.ndarray:
        """Width of the bins in r times half of that in cos(θ), Å: directions count alike."""
        r, angle = self.edges
        return np.outer(np.diff(r), -0.5 * np.diff(np.cos(np.radians(angle))))

    @property
    def counted(self) -> np.ndarray:
        """Volumes of the shells times the share of directions, Å³."""
        r, angle = self.edges
        return np.outer(_shells(r), -0.5 * np.diff(np.cos(np.radians(angle))))

    @property
    def grid(self) -> tuple[np.ndarray, ...]:
        """Middles of the bins, and the cutoff."""
        return self.r, self.angle, np.array([self.cutoff])


@dataclass(frozen=True)
class CombinedDistributions(Distributions):
    """Combined distributions by triple."""

    parts: dict[str, CombinedDistribution]  # type: ignore[assignment]


def combined_distributions(
    frames: Structures | Sequence[ase.Atoms],
    *,
    cutoffs: Cutoffs,
    r_max: float = 10.0,
    n_r: int = 40,
    n_angles: int = 18,
    triples: Sequence[str] | None = None,
    n_blocks: int = 5,
) -> dict[str, CombinedDistribution]:
    """Combined distributions of distance and angle of a trajectory, in one pass over its frames.

    The definition stands at the top of the module. Finite numbers of atoms lower it as they lower
    g(r): by 1/N for every kind that occurs twice.

    Parameters
    ----------
    frames : Structures or sequence of ase.Atoms
        Periodic frames in order of time.
    cutoffs : float or mapping
        How far the neighbors k reach, Å; by pair of kinds ("A-B"), or one for all.
    r_max : float
        Largest distance, Å.
    n_r, n_angles : int
        Bins of equal width from 0 to `r_max` and from 0 to 180 degrees.
    triples : sequence of str, optional
        Which to take, "A-B-C"; by default all.
    n_blocks : int
        As for `radial_distributions`.

    Returns
    -------
    dict
        By "A-B-C": distance from B to A, angle A-B-C; "all" for atoms of one kind. Triples that
        never occur are left out.

    Raises
    ------
    ConfigError
        If a pair has no cutoff, or a triple is not one of the kinds.
    DataError
        If there is no frame, a frame is not fully periodic, or no triple occurs.
    """
    structures = as_periodic(frames)
    kinds = Kinds.of(structures)
    n, reach = len(kinds), cutoff_table(cutoffs, kinds.names)
    places = {
        "all" if n == 1 else "-".join(kinds.names[x] for x in abc): abc
        for abc in np.ndindex(n, n, n)
    }
    for triple in triples or ():
        if triple not in places:
            raise ConfigError(f"there is no triple {triple}{suggest(triple, places)}")
    chosen = {triple: places[triple] for triple in triples or places}
    number = np.full((n, n, n), -1)
    for k, abc in enumerate(chosen.values()):
        number[abc] = k
    r, angle = np.linspace(0.0, r_max, n_r + 1), np.linspace(0.0, 180.0, n_angles + 1)
    directions = -0.5 * np.diff(np.cos(np.radians(angle)))
    a, b, c = np.array(list(chosen.values())).T
    spheres = 4.0 / 3.0 * math.pi * reach[b, c] ** 3
    volumes = structures.volume.numpy()
    size = n_r * n_angles

    def one_frame(system: int, vectors: Array, center: Array, neighbor: Array) -> Array:
        kind = kinds[system]
        distance = np.linalg.norm(vectors, axis=1)
        middle, other = kind[center], kind[neighbor]
        unit = vectors / distance[:, None]
        near = np.flatnonzero(distance <= reach[middle, other])
        within = np.flatnonzero(distance <= r_max)
        first, second = _each_with_each(center[within], center[near], len(kind))
        first, second = within[first], near[second]
        which = number[other[first], middle[first], other[second]]
        counted = (first != second) & (which >= 0)
        first, second, which = first[counted], second[counted], which[counted]
        cosine = np.clip(np.einsum("ij,ij->i", unit[first], unit[second]), -1.0, 1.0)
        bins = bins_of(distance, r)[first] * n_angles
        bins += bins_of(np.degrees(np.arccos(cosine)), angle)
        counts = np.bincount(which * size + bins, minlength=len(chosen) * size)
        numbers = kinds.numbers[system]
        ideal = numbers[a] * numbers[b] * numbers[c] * spheres / volumes[system] ** 2
        expected = ideal[:, None, None] * np.outer(_shells(r), directions)
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(counts.reshape(-1, n_r, n_angles) / expected)

    found = over_frames(structures, max(r_max, float(reach.max())), n_blocks, one_frame)
    mean, error = found.mean.round(_DECIMALS), found.error.round(_DECIMALS)
    result = {
        label: CombinedDistribution(
            r=0.5 * (r[1:] + r[:-1]),
            angle=0.5 * (angle[1:] + angle[:-1]),
            g=mean[k],
            error=error[k],
            cutoff=float(reach[b[k], c[k]]),
            triple=label,
            n_frames=len(structures),
            n_blocks=len(found.means),
            blocks=found.means[:, k],
        )
        for k, label in enumerate(chosen)
        if mean[k].any()
    }
    if not result:
        raise DataError(f"no atom has two neighbors within {float(reach.max()):g} Å")
    return result


def _shells(r: np.ndarray) -> np.ndarray:
    """Volumes between radii, Å³."""
    return 4.0 / 3.0 * math.pi * np.diff(r**3)


def _each_with_each(first: np.ndarray, second: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (a, b) of all pairs of entries with first[a] = second[b]; both are sorted, below n."""
    counts = np.bincount(second, minlength=n)
    starts = np.cumsum(counts) - counts
    repeats = counts[first]
    ends = np.cumsum(repeats)
    a = np.repeat(np.arange(len(first)), repeats)
    b = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts[first] - ends + repeats, repeats)
    return a, b


class Cdf(Shells):
    """Combined distributions of distance and angle in molecular dynamics, by triple of kinds.

    Parameters
    ----------
    r_max : float
        Å.
    n_r, n_angles : int
        Bins of equal width.
    triples : tuple of str, optional
        "A-B-C": distance from B to A, angle A-B-C. All by default.
    """

    name = "cdf"
    title = "combined distribution"
    result = CombinedDistributions
    on_request = True
    symbol = "CDF"
    unit = "Å"
    key = "cdf"
    axes = ("r (Å)", "Angle (°)")
    n_panels = 4

    r_max: float = Field(default=10.0, gt=0)
    n_r: int = Field(default=40, ge=1)
    n_angles: int = Field(default=18, ge=1)
    triples: tuple[str, ...] | None = None

    def run(self, bench: Bench, candidate: Candidate) -> CombinedDistributions:
        """Take the distributions of the candidate's trajectory."""
        found = combined_distributions(
            self.frames_of(bench, candidate),
            cutoffs=self.reach(bench, candidate),
            r_max=self.r_max,
            n_r=self.n_r,
            n_angles=self.n_angles,
            triples=self.triples,
            n_blocks=self.n_blocks,
        )
        return CombinedDistributions(found)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """Maps of reference and student side by side, and their difference."""
        results = found.of(cls.name, CombinedDistributions)
        standard, couples = cls.beside(found)
        labels = list(dict.fromkeys(k for result in results.values() for k in result.parts))
        model = found.student if found.student in couples else next(iter(couples), "")
        shown = [standard, model] if model else list(results)[:3]
        panels = []
        for label in most_different(labels, couples, cls.n_panels):
            parts = {m: results[m].parts[label] for m in shown if label in results[m].parts}
            top = max(float(np.quantile(part.g, 0.995)) for part in parts.values())
            fields = {m: (part, Colors(*part.edges, part.g, top=top)) for m, part in parts.items()}
            for name, (_, colors) in fields.items():
                panels.append(Panel(*cls.axes, [], f"{label}, {name}", colors=colors))
            if model and len(parts) == 2:
                change = parts[model].g - parts[standard].g
                limit = float(np.quantile(np.abs(change), 0.995))
                colors = Colors(*parts[model].edges, change, top=limit, signed=True)
                panels.append(Panel(*cls.axes, [], f"{label}, difference", colors=colors))
        some = f" The {cls.n_panels} of {len(labels)} triples that differ most are shown."
        caption = (
            "Combined distribution of the distance from B to A and of the angle A-B-C with a "
            "neighbor C, over that of an ideal gas." + (some if len(labels) > cls.n_panels else "")
        )
        n_columns = 3 if model else len(shown)
        yield Drawing(
            cls.name, "Combined distribution", caption, panels, n_columns, height=2.7, legend=False
        )
