"""Structure of liquids and solids: radial and angular distributions with block errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import ase
import numpy as np
from pydantic import Field

from potstill.errors import DataError, DivergenceError, suggest
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.neighbors import system_pairs
from potstill.report.panels import Drawing, Panel, Series
from potstill.report.tables import Row
from potstill.soundness import closest_pairs, fused
from potstill.structures import Structures

Array = np.ndarray


@dataclass(frozen=True)
class RadialDistribution(Result):
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
    """

    r: np.ndarray
    g: np.ndarray
    error: np.ndarray
    coordination: np.ndarray
    pair: str
    density: float
    n_frames: int
    n_blocks: int

    @property
    def bin_width(self) -> float:
        """Å."""
        return float(self.r[1] - self.r[0]) if len(self.r) > 1 else 2.0 * float(self.r[0])


@dataclass(frozen=True)
class AngularDistribution(Result):
    """Distribution of angles between two neighbors of an atom.

    Parameters
    ----------
    angle : ndarray
        (n_bins,) middles of the bins, degrees.
    density, error : ndarray
        (n_bins,) per degree, integrating to one, and its standard error from blocks.
    cutoff : float
        How far neighbors reach, Å.
    n_frames, n_blocks : int
    """

    angle: np.ndarray
    density: np.ndarray
    error: np.ndarray
    cutoff: float
    n_frames: int
    n_blocks: int


@dataclass(frozen=True)
class RadialDifference(Result):
    """How far two radial distributions are apart.

    Parameters
    ----------
    total_absolute_error : float
        Sum over bins of abs(g1 - g2), as Matin et al. report it; it grows with the number of bins.
    integrated_absolute_error : float
        The same times the width of a bin, Å: comparable between binnings.
    expected_from_noise : float
        What `integrated_absolute_error` would be, on average, if both were samples of one and the
        same liquid with the stated block errors, Å. A difference near it shows nothing.
    largest : float
        Largest abs(g1 - g2).
    """

    total_absolute_error: float
    integrated_absolute_error: float
    expected_from_noise: float
    largest: float


def radial_distribution(
    frames: Structures | Sequence[ase.Atoms],
    *,
    r_max: float = 8.0,
    n_bins: int = 160,
    pair: tuple[str, str] | None = None,
    n_blocks: int = 5,
) -> RadialDistribution:
    """Radial distribution function of a trajectory.

    All periodic images count, so `r_max` may exceed half the cell and the integral of g(r) is the
    coordination number exactly. An ideal gas of N atoms gives 1 - 1/N below the cell's length.

    Parameters
    ----------
    frames : Structures or sequence of ase.Atoms
        Periodic frames in order of time; number of atoms and volume may change.
    r_max : float
        Å.
    n_bins : int
        Bins of equal width from zero to `r_max`.
    pair : (str, str), optional
        Species of center and neighbor; all atoms alike by default.
    n_blocks : int
        Consecutive blocks whose scatter gives the error; fewer if there are fewer frames.

    Raises
    ------
    DataError
        If there is no frame, a frame is not fully periodic, or a species does not occur.
    """
    structures = _as_structures(frames)
    edges = np.linspace(0.0, r_max, n_bins + 1)
    shells = 4.0 / 3.0 * math.pi * np.diff(edges**3)
    volumes = structures.volume.numpy()
    around, among = _masks(structures, pair)

    def one_frame(system: int, vectors: Array, center: Array, neighbor: Array) -> Array:
        first, second = around[system], among[system]
        counted = first[center] & second[neighbor]
        distance = np.linalg.norm(vectors[counted], axis=1)
        neighbors = np.histogram(distance, edges)[0] / first.sum()
        return np.stack([neighbors, neighbors * volumes[system] / (second.sum() * shells)])

    table = _per_frame(structures, r_max, one_frame)  # (frames, 2, bins)
    mean, error = _block_average(table, n_blocks)
    return RadialDistribution(
        r=0.5 * (edges[1:] + edges[:-1]),
        g=mean[1],
        error=error[1],
        coordination=np.cumsum(mean[0]),
        pair="all" if pair is None else "-".join(pair),
        density=float(np.mean([m.sum() / v for m, v in zip(among, volumes, strict=True)])),
        n_frames=len(table),
        n_blocks=min(n_blocks, len(table)),
    )


def compare_radial(first: RadialDistribution, second: RadialDistribution) -> RadialDifference:
    """Absolute difference of two radial distributions on the same bins.

    Raises
    ------
    DataError
        If bins or pairs differ.
    """
    if first.pair != second.pair or not np.array_equal(first.r, second.r):
        raise DataError(
            f"radial distributions of {first.pair} up to {first.r[-1]:g} Å and of {second.pair} "
            f"up to {second.r[-1]:g} Å cannot be compared: give both the same pair, r_max and bins"
        )
    difference = np.abs(first.g - second.g)
    noise = math.sqrt(2.0 / math.pi) * np.hypot(first.error, second.error)  # E|N(0, s)|
    width = first.bin_width
    return RadialDifference(
        total_absolute_error=float(difference.sum()),
        integrated_absolute_error=float(difference.sum() * width),
        expected_from_noise=float(noise.sum() * width),
        largest=float(difference.max()),
    )


def angular_distribution(
    frames: Structures | Sequence[ase.Atoms],
    *,
    cutoff: float,
    n_bins: int = 90,
    n_blocks: int = 5,
) -> AngularDistribution:
    """Angular distribution of a trajectory: angles j-i-k between all neighbors within a cutoff.

    Parameters
    ----------
    frames : Structures or sequence of ase.Atoms
        Periodic frames in order of time.
    cutoff : float
        How far neighbors reach, Å; the first minimum of g(r) is the usual choice.
    n_bins : int
        Bins of equal width from 0 to 180 degrees.
    n_blocks : int
        As for `radial_distribution`.

    Raises
    ------
    DataError
        If there is no frame, a frame is not fully periodic, or no atom has two neighbors.
    """
    structures = _as_structures(frames)
    edges = np.linspace(0.0, 180.0, n_bins + 1)

    def one_frame(system: int, vectors: Array, center: Array, neighbor: Array) -> Array:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        first, second = _pairs_of_pairs(center)
        cosine = np.clip((unit[first] * unit[second]).sum(1), -1.0, 1.0)
        return np.histogram(np.degrees(np.arccos(cosine)), edges)[0][None].astype(float)

    table = _per_frame(structures, cutoff, one_frame)
    if not table.any():
        raise DataError(f"no atom has two neighbors within {cutoff:g} Å: enlarge the cutoff")
    # Frames weigh by their number of angles: normalize the average, not every frame.
    table = table / (table.sum(axis=2).mean() * (edges[1] - edges[0]))
    mean, error = _block_average(table, n_blocks)
    return AngularDistribution(
        angle=0.5 * (edges[1:] + edges[:-1]),
        density=mean[0],
        error=error[0],
        cutoff=float(cutoff),
        n_frames=len(table),
        n_blocks=min(n_blocks, len(table)),
    )


def _as_structures(frames: Structures | Sequence[ase.Atoms]) -> Structures:
    structures = frames if isinstance(frames, Structures) else Structures.from_ase(list(frames))
    if structures.n_systems == 0:
        raise DataError("a distribution needs at least one frame of a trajectory, not an empty one")
    if not bool(structures.pbc.all()) or not bool((structures.volume > 0).all()):
        raise DataError("a distribution needs frames that are periodic along all three axes")
    return structures


def _masks(
    structures: Structures, pair: tuple[str, str] | None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per frame, which atoms are centers and which are neighbors."""
    offsets = structures.atom_offsets.tolist()
    species = structures.species.numpy()
    names = structures.species_table.names
    masks = []
    for name in pair or ("", ""):
        if pair is not None and name not in names:
            raise DataError(f"the trajectory holds no {name}{suggest(name, names)}")
        mask = species == names.index(name) if pair is not None else np.ones(len(species), bool)
        masks.append([mask[a:b] for a, b in pairwise(offsets)])
        for system, part in enumerate(masks[-1]):
            if not part.any():
                raise DataError(f"{structures.name_of(system)} holds no {name or 'atom'}")
    return masks[0], masks[1]


def _per_frame(
    structures: Structures,
    cutoff: float,
    histogram: Callable[[int, Array, Array, Array], Array],
) -> np.ndarray:
    """Stack `histogram(system, vectors, center, neighbor)` over the frames."""
    positions, cells = structures.positions.numpy(), structures.cell.numpy()
    rows = []
    for system, (a, b) in enumerate(pairwise(structures.atom_offsets.tolist())):
        here, cell = positions[a:b], cells[system]
        center, neighbor, shift = system_pairs(here, cell, np.ones(3, dtype=bool), cutoff)
        vectors = here[neighbor] - here[center] + shift @ cell
        rows.append(histogram(system, vectors, center, neighbor))
    return np.stack(rows)


def _pairs_of_pairs(center: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (a, b), a < b, of all pairs that share a center; `center` is sorted."""
    counts = np.bincount(center)
    starts = np.cumsum(counts) - counts
    pairs = [np.zeros((2, 0), int)]
    for count in np.unique(counts[counts > 1]):
        base = starts[counts == count][:, None]
        pairs.append(np.stack([(base + k).ravel() for k in np.triu_indices(count, k=1)]))
    first, second = np.concatenate(pairs, axis=1)
    return first, second


def _block_average(table: np.ndarray, n_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis and its standard error from consecutive blocks."""
    n_blocks = min(n_blocks, len(table))
    if n_blocks < 2:
        return table.mean(axis=0), np.full(table.shape[1:], np.nan)
    means = np.stack([block.mean(axis=0) for block in np.array_split(table, n_blocks)])
    return table.mean(axis=0), means.std(axis=0, ddof=1) / math.sqrt(n_blocks)


# -- the evaluation ------------------------------------------------------------------------------


class Rdf(Evaluation):
    """Radial distribution in molecular dynamics, beside the teacher's.

    Parameters
    ----------
    r_max : float
        Å.
    n_bins : int
        Bins of equal width from zero to `r_max`.
    pair : (str, str), optional
        Species of center and neighbor; all atoms alike by default.
    """

    name = "rdf"
    title = "radial distribution"
    result = RadialDistribution
    section = "Dynamics"
    needs = "frames"

    r_max: float = Field(default=8.0, gt=0)
    n_bins: int = Field(default=160, ge=1)
    pair: tuple[str, str] | None = None

    def run(self, bench: Bench, candidate: Candidate) -> RadialDistribution:
        """Take the distribution of the candidate's trajectory."""
        frames = bench.trajectory_of(candidate)
        if symptom := fused(closest_pairs(frames), candidate.trained_on.get("shortest_distances")):
            raise DivergenceError(f"its trajectory is unsound: {symptom}")
        return radial_distribution(frames, r_max=self.r_max, n_bins=self.n_bins, pair=self.pair)

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Distance from the teacher's g(r), and what chance alone would give."""
        teacher, others = _beside_teacher(found)
        apart = {m: compare_radial(d, teacher) for m, d in others.items() if teacher}
        labels = {
            "g(r): integrated distance from the teacher's (Å)": "integrated_absolute_error",
            "g(r): distance expected from noise (Å)": "expected_from_noise",
            "g(r): sum over bins of absolute differences": "total_absolute_error",
        }
        yield from cls.attribute_rows(apart, labels)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """g(r), and its difference from the teacher's."""
        g = found.of(cls.name, RadialDistribution)
        series = [
            Series(m, d.r, d.g, y_spread=np.nan_to_num(d.error), kind="line") for m, d in g.items()
        ]
        panels = [Panel("r (Å)", "g(r)", series, "Distribution", from_zero=True)]
        teacher, others = _beside_teacher(found)
        differences = [
            Series(m, d.r, d.g - teacher.g, kind="line",
                   y_spread=np.nan_to_num(np.hypot(d.error, teacher.error)))
            for m, d in others.items() if teacher
        ]  # fmt: skip
        if differences:
            panels.append(
                Panel("r (Å)", "Difference in g(r)", differences, "Minus teacher", zero_line=True)
            )
        caption = (
            "Radial distribution in molecular dynamics, and its difference from the teacher's; "
            "bands are standard errors from blocks of the trajectories."
        )
        yield Drawing("rdf", "Radial distribution", caption, panels)


def _beside_teacher(
    found: Findings,
) -> tuple[RadialDistribution | None, dict[str, RadialDistribution]]:
    """The teacher's distribution, and those of other models on the same bins."""
    others = found.of(Rdf.name, RadialDistribution)
    teacher = others.pop(found.teacher, None)
    if teacher is None:
        return None, {}
    return teacher, {m: d for m, d in others.items() if np.array_equal(d.r, teacher.r)}


class Adf(Evaluation):
    """Distribution of the angles between neighbors in molecular dynamics.

    Parameters
    ----------
    cutoff : float, optional
        How far neighbors reach, Å; the first minimum of g(r) by default.
    """

    name = "adf"
    title = "angular distribution"
    result = AngularDistribution
    section = "Dynamics"
    needs = "frames"
    on_request = True

    cutoff: float | None = Field(default=None, gt=0)

    def run(self, bench: Bench, candidate: Candidate) -> AngularDistribution:
        """Take the distribution of the candidate's trajectory."""
        frames = bench.trajectory_of(candidate)
        cutoff = self.cutoff or first_minimum(radial_distribution(frames))
        return angular_distribution(frames, cutoff=cutoff)

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Reach of the neighbors, and where the distribution peaks."""
        results = found.of(cls.name, AngularDistribution)
        if results:
            reach = {m: r.cutoff for m, r in results.items()}
            yield Row("Neighbors of the angles reach to (Å)", reach)
            peaks = {m: float(r.angle[r.density.argmax()]) for m, r in results.items()}
            yield Row("Most frequent angle (°)", peaks)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """The distributions."""
        series = [
            Series(m, r.angle, r.density, y_spread=np.nan_to_num(r.error), kind="line")
            for m, r in found.of(cls.name, AngularDistribution).items()
        ]
        caption = (
            "Angles between neighbors in molecular dynamics; bands are standard errors from blocks."
        )
        panel = Panel("Angle (°)", "Density (1/°)", series, from_zero=True)
        yield Drawing("adf", "Angular distribution", caption, [panel])


def first_minimum(distribution: RadialDistribution) -> float:
    """Where g(r) is lowest between its highest peak and 1.6 times as far, Å."""
    r, peak = distribution.r, int(distribution.g.argmax())
    window = (r >= r[peak]) & (r <= 1.6 * r[peak])
    return float(r[window][distribution.g[window].argmin()])
