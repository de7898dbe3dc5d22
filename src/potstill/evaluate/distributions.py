"""What distributions over a trajectory share: counting by frame, errors from blocks, differences.

A distribution is a histogram over bins, normalized in its own way, with the means of consecutive
blocks of frames. Two of them on the same bins are compared by the area between them and by the
Jensen-Shannon divergence, each beside what chance alone would give, so that a difference that is
noise is called unclear.
"""

from __future__ import annotations

import base64
import math
import typing
import zlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ase
import numpy as np

from potstill.errors import DataError, suggest
from potstill.evaluate.base import Result
from potstill.neighbors import system_pairs
from potstill.report.tables import number
from potstill.structures import Structures

Array = np.ndarray

#: Draws from the block errors, for noise levels and errors of differences.
_DRAWS = 400
#: Share of the draws below the limit of noise.
_CONFIDENCE = 0.95


# -- results -------------------------------------------------------------------------------------


class Distribution(Result):
    """Base of distributions over bins: values, and the means of blocks of frames.

    Derived classes have fields `error` (like the values) and `blocks` (n_blocks, ...), the means
    of the blocks; None in files from before there were any.
    """

    error: np.ndarray
    blocks: np.ndarray | None

    @property
    @abstractmethod
    def label(self) -> str:
        """What it is the distribution of: "all", or kinds of atoms."""

    @property
    @abstractmethod
    def values(self) -> np.ndarray:
        """The values, in any shape."""

    @property
    @abstractmethod
    def measure(self) -> np.ndarray:
        """Weights of the bins in integrals, broadcast to the values."""

    @property
    def counted(self) -> np.ndarray:
        """Factors from values to shares of what was counted; the measure by default."""
        return self.measure

    @property
    @abstractmethod
    def grid(self) -> tuple[np.ndarray, ...]:
        """Where the bins are, and other numbers that must agree for a comparison."""

    def fluctuations(self, seed: int) -> np.ndarray:
        """(draws, bins) Gaussian errors of the values, with the correlations of the blocks."""
        rng = np.random.default_rng(seed)
        if self.blocks is None or len(self.blocks) < 2:
            return rng.standard_normal((_DRAWS, self.values.size)) * self.error.ravel()
        n = len(self.blocks)
        # The standard deviation of few blocks is too small on average, by c4.
        c4 = math.sqrt(2.0 / (n - 1)) * math.gamma(n / 2) / math.gamma((n - 1) / 2)
        weights = rng.standard_normal((_DRAWS, n)) / (c4 * math.sqrt(n * (n - 1)))
        return weights @ (self.blocks - self.blocks.mean(axis=0)).reshape(n, -1)


class PackedDistribution(Distribution):
    """Base of distributions over two axes, whose many blocks are packed in JSON."""

    def to_json(self) -> dict[str, Any]:
        """Plain lists; the blocks, to three digits, as base64 of compressed float16."""
        data = super().to_json()
        if self.blocks is not None:
            packed = zlib.compress(self.blocks.clip(max=6e4).astype("<f2").tobytes(), 9)
            data["blocks"] = base64.b64encode(packed).decode("ascii")
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        if data.get("blocks") is not None:
            blocks = np.frombuffer(zlib.decompress(base64.b64decode(data["blocks"])), "<f2")
            blocks = blocks.reshape(-1, *np.shape(data["error"])).astype(float)
            data = {**data, "blocks": blocks}
        return super().from_json(data)


@dataclass(frozen=True)
class Difference(Result):
    """How far two distributions, or the averages over several of them, are apart.

    Parameters
    ----------
    integrated_absolute_error, error : float
        Integral of abs(first - second), with its standard error: in Å for g(r), without a unit for
        angles (between 0 and 2). This is the total absolute error, whatever the width of bins.
    expected_from_noise, noise_limit : float
        What it would be on average, and in 19 of 20 cases at most, if both were samples of one and
        the same liquid with the stated block errors.
    relative_error : float
        The integral over that of the second distribution.
    divergence, divergence_error : float
        Jensen-Shannon divergence of the probabilities of the bins, in bits, between 0 and 1. Those
        of distances grow with r² g(r).
    divergence_noise, divergence_limit : float
        As for the integral.
    total_absolute_error : float
        Sum over bins of abs(first - second), as Matin et al. report it for g(r); it grows with the
        number of bins.
    largest : float
        Largest abs(first - second).
    """

    derived: ClassVar[tuple[str, ...]] = ("clear",)

    integrated_absolute_error: float
    error: float
    expected_from_noise: float
    noise_limit: float
    relative_error: float
    divergence: float
    divergence_error: float
    divergence_noise: float
    divergence_limit: float
    total_absolute_error: float
    largest: float

    @property
    def clear(self) -> bool:
        """Whether the distributions differ by more than chance explains."""
        return self.integrated_absolute_error > self.noise_limit

    def __str__(self) -> str:
        value, error = number(self.integrated_absolute_error, 2), number(self.error, 1)
        noise = "" if self.clear else f", unclear (noise up to {number(self.noise_limit, 2)})"
        return f"{value} ± {error}{noise}"


def compare_distributions(
    first: Distribution | Sequence[Distribution], second: Distribution | Sequence[Distribution]
) -> Difference:
    """Difference of two distributions on the same bins, or of as many pairs of them, averaged.

    Raises
    ------
    DataError
        If what they are of, or their bins, differ.
    """
    ours = [first] if isinstance(first, Distribution) else first
    theirs = [second] if isinstance(second, Distribution) else second
    parts = [_scores(a, b) for a, b in zip(ours, theirs, strict=True)]
    found, noisy, null = (np.mean([part[k] for part in parts], axis=0) for k in range(3))
    plain = np.mean([part[3] for part in parts], axis=0)
    spread = noisy.std(axis=1, ddof=1)
    limit = np.quantile(null, _CONFIDENCE, axis=1)
    return Difference(
        integrated_absolute_error=float(found[0, 0]),
        error=float(spread[0]),
        expected_from_noise=float(plain[0]),
        noise_limit=float(limit[0]),
        relative_error=float(plain[1]),
        divergence=float(found[1, 0]),
        divergence_error=float(spread[1]),
        divergence_noise=float(null[1].mean()),
        divergence_limit=float(limit[1]),
        total_absolute_error=float(plain[2]),
        largest=float(np.max([part[3][3] for part in parts])),
    )


def _scores(first: Distribution, second: Distribution) -> tuple[Array, Array, Array, Array]:
    """Integrals and divergences (2, draws): as found, with errors, of equals; and plain numbers.

    The same draws serve all distributions of a trajectory, whose errors are correlated.
    """
    if first.label != second.label or not _on_same_bins(first, second):
        raise DataError(
            f"the distributions of {first.label} and of {second.label} cannot be compared: give "
            "both the same kinds of atoms, bins and cutoffs"
        )
    x, y = first.values.reshape(1, -1), second.values.reshape(1, -1)
    measure, counted = (
        np.broadcast_to(factors, first.values.shape).ravel()
        for factors in (first.measure, first.counted)
    )
    dx, dy = (d.fluctuations(k) for k, d in enumerate((first, second)))
    middle, apart = 0.5 * (x + y), np.abs(x - y).ravel()
    noise = math.sqrt(2.0 / math.pi) * np.hypot(first.error, second.error)  # E|N(0, s)|
    whole = float((y * measure).sum())
    plain = [
        float((noise.ravel() * measure).sum()),
        float((apart * measure).sum()) / whole if whole > 0.0 else math.nan,
        float(apart.sum()),
        float(apart.max()),
    ]
    found, noisy, null = (
        _distances(a, b, measure, counted)
        for a, b in ((x, y), (x + dx, y + dy), (middle + dx, middle + dy))
    )
    return found, noisy, null, np.array(plain)


def _distances(x: Array, y: Array, measure: Array, counted: Array) -> Array:
    """(2, rows): integrals of abs(x - y), and Jensen-Shannon divergences in bits."""
    area = (np.abs(x - y) * measure).sum(axis=1)
    p, q = (np.clip(z, 0.0, None) * counted for z in (x, y))
    masses = [z.sum(axis=1, keepdims=True) for z in (p, q)]
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = (z / mass for z, mass in zip((p, q), masses, strict=True))
        middle = 0.5 * (p + q)
        terms = [np.where(z > 0.0, z * np.log2(z / middle), 0.0).sum(axis=1) for z in (p, q)]
    # What never occurs has nothing in common with what does.
    lost = ((masses[0] <= 0.0) | (masses[1] <= 0.0))[:, 0]
    return np.stack([area, np.where(lost, (area > 0.0).astype(float), 0.5 * sum(terms))])


# -- counting ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """Means of an array over consecutive blocks of frames.

    Parameters
    ----------
    means : ndarray
        (n_blocks, ...).
    sizes : ndarray
        (n_blocks,) frames.
    """

    means: np.ndarray
    sizes: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Over all frames."""
        return np.tensordot(self.sizes / self.sizes.sum(), self.means, axes=1)

    @property
    def error(self) -> np.ndarray:
        """Standard error of the mean; NaN for one block."""
        n = len(self.means)
        if n < 2:
            return np.full(self.means.shape[1:], np.nan)
        return self.means.std(axis=0, ddof=1) / math.sqrt(n)


def over_frames(
    structures: Structures,
    cutoff: float,
    n_blocks: int,
    count: Callable[[int, Array, Array, Array], Array],
) -> Blocks:
    """Block means of `count(system, vectors, center, neighbor)`, floats of one shape.

    Pairs come sorted by center, and are those of the system: its first atom is 0. All periodic
    images within the cutoff are there.
    """
    positions, cells = structures.positions.numpy(), structures.cell.numpy()
    offsets = structures.atom_offsets.tolist()
    periodic = np.ones(3, dtype=bool)
    means, sizes = [], []
    for block in np.array_split(np.arange(structures.n_systems), min(n_blocks, len(structures))):
        total: Any = 0.0
        for system in block.tolist():
            here, cell = positions[offsets[system] : offsets[system + 1]], cells[system]
            center, neighbor, shift = system_pairs(here, cell, periodic, cutoff)
            vectors = here[neighbor] - here[center] + shift @ cell
            total = total + count(system, vectors, center, neighbor)
        means.append(total / len(block))
        sizes.append(len(block))
    return Blocks(np.stack(means), np.array(sizes))


def bins_of(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Bins of values that lie between equally spaced edges, as numpy's histogram takes them."""
    n, low = len(edges) - 1, edges[0]
    bins = ((values - low) * (n / (edges[-1] - low))).astype(np.int64)
    np.clip(bins, 0, n - 1, out=bins)
    bins -= values < edges[bins]
    bins += (values >= edges[bins + 1]) & (bins < n - 1)
    return bins


def as_periodic(frames: Structures | Sequence[ase.Atoms]) -> Structures:
    """The frames of a trajectory.

    Raises
    ------
    DataError
        If there is none, or one is not periodic along all three axes.
    """
    structures = frames if isinstance(frames, Structures) else Structures.from_ase(list(frames))
    if structures.n_systems == 0:
        raise DataError("a distribution needs at least one frame of a trajectory, not an empty one")
    if not bool(structures.pbc.all()) or not bool((structures.volume > 0).all()):
        raise DataError("a distribution needs frames that are periodic along all three axes")
    return structures


@dataclass(frozen=True)
class Kinds:
    """The kinds of atoms or beads that occur in a trajectory, numbered from zero.

    Parameters
    ----------
    names : tuple of str
        In the order of the species table.
    numbers : ndarray
        (frames, n_kinds) atoms of each in every frame.
    """

    names: tuple[str, ...]
    numbers: np.ndarray
    _kind: np.ndarray
    _offsets: np.ndarray

    @classmethod
    def of(cls, structures: Structures) -> Kinds:
        """Look at all frames."""
        composition = structures.composition().numpy()
        occurring = np.flatnonzero(composition.any(axis=0))
        names = tuple(structures.species_table.names[k] for k in occurring)
        kind = np.searchsorted(occurring, structures.species.numpy())
        numbers = composition[:, occurring].astype(float)
        return cls(names, numbers, kind, structures.atom_offsets.numpy())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, system: int) -> np.ndarray:
        """Kinds of the atoms of a frame."""
        return self._kind[self._offsets[system] : self._offsets[system + 1]]

    def index(self, name: str, structures: Structures) -> int:
        """Number of a kind that is in every frame.

        Raises
        ------
        DataError
            If it is not.
        """
        if name not in self.names:
            raise DataError(f"the trajectory holds no {name}{suggest(name, self.names)}")
        kind = self.names.index(name)
        for system in np.flatnonzero(self.numbers[:, kind] == 0.0):
            raise DataError(f"{structures.name_of(int(system))} holds no {name}")
        return kind


# -- several -------------------------------------------------------------------------------------


#: Some distributions, and as many others of the same on the same bins.
Couples = tuple[list[Distribution], list[Distribution]]


@dataclass(frozen=True)
class Distributions(Result):
    """Distributions of one sort by label, such as "A-B"."""

    parts: dict[str, Distribution]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; also of older files, which hold one distribution alone."""
        if "parts" not in data:
            (_, kind) = typing.get_args(typing.get_type_hints(cls)["parts"])
            part = kind.from_json(data)
            return cls({part.label: part})
        return super().from_json(data)

    def beside(self, other: Distributions) -> Couples:
        """Those that are in both, on the same bins."""
        labels = [
            label
            for label, part in self.parts.items()
            if label in other.parts and _on_same_bins(part, other.parts[label])
        ]
        return [self.parts[k] for k in labels], [other.parts[k] for k in labels]


def _on_same_bins(first: Distribution, second: Distribution) -> bool:
    return len(first.grid) == len(second.grid) and all(map(np.array_equal, first.grid, second.grid))
