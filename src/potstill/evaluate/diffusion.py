"""Mean-square displacement, diffusion coefficient and density of a trajectory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np
from pydantic import Field

from potstill.errors import DataError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.report.panels import Drawing, Panel, Series
from potstill.report.tables import Row, number
from potstill.report.verdicts import Verdict
from potstill.structures import Structures
from potstill.units import AMU_PER_A3_IN_G_PER_CM3

#: One Å²/fs in 10⁻⁹ m²/s.
_NM2_PER_S = 1e4

#: Below this exponent of the mean-square displacement atoms do not diffuse: 1 is diffusion, 0 a
#: crystal.
DIFFUSIVE = 0.8

#: Atoms that move by more than this part of the cell between two frames cannot be followed.
_FURTHEST = 0.4


@dataclass(frozen=True)
class Diffusion(Result):
    """Mean-square displacement and what follows from it.

    Parameters
    ----------
    lag : ndarray
        (n_lags,) time differences, fs.
    msd, error : ndarray
        (n_lags,) mean-square displacement, Å², and its standard error from blocks.
    coefficient, coefficient_error : float
        Diffusion coefficient, Å²/fs, and its standard error from blocks.
    exponent : float
        Slope of log(msd) against log(lag) over the lags of the fit: 1 for diffusion.
    fit_from : float
        Shortest lag of the fit, fs; the longest is the last.
    length : float
        Cube root of the volume, Å, which finite-size corrections need.
    n_atoms, n_frames, n_blocks : int
    of_kinds, of_kinds_error : dict of str to float
        Coefficients of the kinds of atoms or beads, Å²/fs, where there are several, and their
        standard errors.
    """

    lag: np.ndarray
    msd: np.ndarray
    error: np.ndarray
    coefficient: float
    coefficient_error: float
    exponent: float
    fit_from: float
    length: float
    n_atoms: int
    n_frames: int
    n_blocks: int
    of_kinds: dict[str, float] = field(default_factory=dict)
    of_kinds_error: dict[str, float] = field(default_factory=dict)

    @property
    def diffuses(self) -> bool:
        """Whether the displacement grows as that of a liquid."""
        return self.exponent >= DIFFUSIVE


def unwrapped(frames: Structures) -> np.ndarray:
    """(frames, N, 3) positions of a trajectory without jumps by lattice vectors, in Å.

    Every atom takes the shortest way from one frame to the next, whether or not the file wraps it.
    The motion of the whole is taken out.

    Raises
    ------
    DataError
        If atoms or cell change, or frames are too far apart to follow the atoms.
    """
    n, sizes = frames.n_systems, frames.n_atoms_per_system
    if n < 2 or bool((sizes != sizes[0]).any()):
        raise DataError("diffusion needs a trajectory of two frames or more with the same atoms")
    cells = frames.cell.numpy()
    species = frames.species.numpy().reshape(n, -1)
    if (species != species[0]).any():
        raise DataError("diffusion needs atoms in the same order in all frames: sort them by id")
    if not bool(frames.pbc.all()) or not np.allclose(cells, cells[0], rtol=1e-6, atol=1e-6):
        raise DataError(
            "diffusion needs a periodic cell that does not change: run it at constant volume"
        )
    positions = frames.positions.numpy().reshape(n, -1, 3)
    steps = np.diff(positions @ np.linalg.inv(cells[0]), axis=0)
    steps -= np.rint(steps)
    if (furthest := np.abs(steps).max()) > _FURTHEST:
        raise DataError(
            f"an atom moves by {furthest:.2f} of the cell between two frames and cannot be "
            "followed: write frames more often, or take a larger cell"
        )
    path = positions[0] + np.concatenate([np.zeros_like(steps[:1]), np.cumsum(steps, 0) @ cells[0]])
    masses = frames.masses.numpy()[: path.shape[1]]
    return path - np.einsum("i,tik->tk", masses / masses.sum(), path)[:, None]


def mean_square_displacement(path: np.ndarray, n_lags: int) -> np.ndarray:
    """(n_lags,) mean-square displacement over all atoms and origins, from lag 0 on.

    By Fourier transforms, as Calandrini et al., Collection SFN 12, 201 (2011).

    Parameters
    ----------
    path : ndarray
        (frames, N, 3) unwrapped positions, Å.
    n_lags : int
        At most the number of frames.
    """
    n = len(path)
    path = path - path.mean(axis=0)
    spectrum = np.fft.rfft(path, n=2 * n, axis=0)
    correlation = np.fft.irfft((np.abs(spectrum) ** 2).sum(axis=(1, 2)), n=2 * n)[:n_lags]
    squares = (path**2).sum(axis=(1, 2))
    ends = np.concatenate([[0.0], np.cumsum(squares)])
    lags = np.arange(n_lags)
    both = ends[n - lags] + ends[n] - ends[lags]  # squares at all origins, and at all ends
    return (both - 2.0 * correlation) / (n - lags) / path.shape[1]


def diffusion(
    frames: Structures,
    stride: float,
    *,
    n_blocks: int = 5,
    fit_from: float | None = None,
) -> Diffusion:
    """Diffusion coefficient of all atoms alike, and of each kind, by Einstein's relation.

    A periodic cell slows diffusion down: Yeh and Hummer, J. Phys. Chem. B 108, 15873 (2004), add
    2.837297 kT/(6 π η L) with the viscosity η and the length L of a cubic cell. Nothing is added
    here. A thermostat with friction slows it as well: run at constant energy, or with a
    thermostat time of some ps.

    Parameters
    ----------
    frames : Structures
        Frames of one trajectory at constant volume, in order of time, or of several one after the
        other, each a group of its own.
    stride : float
        fs between two frames.
    n_blocks : int
        Consecutive blocks of frames; lags reach to half a block. No block reaches from one
        trajectory into the next: there are at least as many blocks as trajectories.
    fit_from : float, optional
        Shortest lag of the fit, fs; a fifth of the longest one by default.

    Raises
    ------
    DataError
        As of `unwrapped`, or if there are fewer than ten frames per block.
    """
    if not stride > 0.0:
        raise DataError("diffusion needs the time between two frames, in fs")
    paths = [unwrapped(part) for part in _trajectories(frames)]
    longest = max(len(path) for path in paths)
    size = longest // max(1, n_blocks // len(paths))
    if size < 10:
        raise DataError(
            f"diffusion from {n_blocks} blocks needs {10 * n_blocks} frames or more, not "
            f"{len(frames)}"
        )
    n_lags = size // 2 + 1
    parts = [path[k : k + size] for path in paths for k in range(0, len(path) - size + 1, size)]
    n_blocks = len(parts)
    blocks = np.stack([mean_square_displacement(part, n_lags) for part in parts])
    lag, msd = stride * np.arange(n_lags), blocks.mean(axis=0)
    start = 0.2 * lag[-1] if fit_from is None else fit_from
    used = lag >= max(start, stride)
    if used.sum() < 3:
        raise DataError(f"there are fewer than three lags from {start:g} to {lag[-1]:g} fs")
    slopes = _slopes(lag[used], blocks[:, used])
    spread = math.sqrt(n_blocks) if n_blocks > 1 else math.nan
    species = frames.species.numpy()[: paths[0].shape[1]]
    of_kinds = {}
    for kind in np.unique(species) if (species != species[0]).any() else ():
        own = [mean_square_displacement(part[:, species == kind], n_lags) for part in parts]
        of_kinds[frames.species_table.names[kind]] = _slopes(lag[used], np.stack(own)[:, used])
    return Diffusion(
        lag=lag,
        msd=msd,
        error=(blocks.std(axis=0, ddof=1) if n_blocks > 1 else np.full(n_lags, np.nan)) / spread,
        coefficient=float(slopes.mean()),
        coefficient_error=float(slopes.std(ddof=1) / spread) if n_blocks > 1 else math.nan,
        exponent=float(np.polyfit(np.log(lag[used]), np.log(msd[used]), 1)[0]),
        fit_from=float(lag[used][0]),
        length=float(frames.volume[0]) ** (1.0 / 3.0),
        n_atoms=paths[0].shape[1],
        n_frames=len(frames),
        n_blocks=n_blocks,
        of_kinds={name: float(own.mean()) for name, own in of_kinds.items()},
        of_kinds_error={
            name: float(own.std(ddof=1) / spread) if n_blocks > 1 else math.nan
            for name, own in of_kinds.items()
        },
    )


def _slopes(lag: np.ndarray, msd: np.ndarray) -> np.ndarray:
    """(blocks,) diffusion coefficients from mean-square displacements (blocks, lags)."""
    return np.polyfit(lag, msd.T, 1)[0] / 6.0


def _trajectories(frames: Structures) -> list[Structures]:
    """The trajectories that lie one after the other: groups, in their order."""
    groups = frames.group or ("",) * len(frames)
    starts = [0, *(k for k in range(1, len(groups)) if groups[k] != groups[k - 1]), len(groups)]
    if len(starts) == 2:
        return [frames]
    return [frames.select(range(a, b)) for a, b in pairwise(starts) if b - a > 1]


class DiffusionEvaluation(Evaluation):
    """Mean-square displacement and diffusion coefficient of a trajectory at constant volume.

    Parameters
    ----------
    n_blocks : int
        Blocks that give the errors; the longest lag is half a block.
    fit_from : float, optional
        Shortest lag of the fit, fs; a fifth of the longest by default.
    """

    name = "diffusion"
    title = "diffusion"
    result = Diffusion
    section = "Dynamics"
    needs = "frames"
    on_request = True

    n_blocks: int = Field(default=5, ge=2)
    fit_from: float | None = Field(default=None, gt=0)

    def run(self, bench: Bench, candidate: Candidate) -> Diffusion:
        """Follow the atoms of the candidate's trajectory."""
        frames = bench.trajectory_of(candidate)
        stride = bench.stride_of(candidate)
        return diffusion(frames, stride, n_blocks=self.n_blocks, fit_from=self.fit_from)

    @classmethod
    def metrics(cls, result: Diffusion) -> dict[str, float]:
        """Coefficient and its standard error."""
        return {
            "diffusion_coefficient": _NM2_PER_S * result.coefficient,
            "diffusion_coefficient_error": _NM2_PER_S * result.coefficient_error,
        }

    @classmethod
    def against(cls, result: Diffusion, standard: Diffusion) -> dict[str, float]:
        """How many times faster atoms diffuse than in the reference."""
        times, error = _times(
            (result.coefficient, result.coefficient_error),
            (standard.coefficient, standard.coefficient_error),
        )
        return {"diffusion_speedup": times, "diffusion_speedup_error": error}

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Coefficients, also of kinds, and how many times those of the reference they are."""
        yield from super().rows(found)
        results = found.of(cls.name, Diffusion)
        standard = results.get(found.standard(results))
        for kind in dict.fromkeys(kind for r in results.values() for kind in r.of_kinds):
            own = {
                m: (r.of_kinds[kind], r.of_kinds_error[kind])
                for m, r in results.items()
                if kind in r.of_kinds
            }
            values = {m: _with_error(_NM2_PER_S * d, _NM2_PER_S * e) for m, (d, e) in own.items()}
            yield Row(f"Diffusion coefficient of {kind} (10⁻⁹ m²/s)", values)
            if standard is not None and kind in standard.of_kinds:
                theirs = standard.of_kinds[kind], standard.of_kinds_error[kind]
                times = {
                    m: _with_error(*_times(value, theirs))
                    for m, value in own.items()
                    if results[m] is not standard
                }
                yield Row(f"Diffusion of {kind}, times the reference's", times)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """Mean-square displacement against time."""
        results = found.of(cls.name, Diffusion)
        series = [
            Series(m, 1e-3 * r.lag, r.msd, y_spread=np.nan_to_num(r.error), kind="line")
            for m, r in results.items()
        ]
        caption = (
            "Mean-square displacement over all atoms and origins; bands are standard errors from "
            "blocks of the trajectories."
        )
        panel = Panel("Time (ps)", "Mean-square displacement (Å²)", series, from_zero=True)
        yield Drawing("diffusion", "Diffusion", caption, [panel])

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Say which atoms do not diffuse."""
        for model, r in found.of(cls.name, Diffusion).items():
            if not r.diffuses:
                yield Verdict(
                    f"The mean-square displacement of '{model}' grows with a power of "
                    f"{number(r.exponent, 2)} of the time: it has no diffusion coefficient (a "
                    "crystal or glass, or too short a run)."
                )


def _times(ours: tuple[float, float], theirs: tuple[float, float]) -> tuple[float, float]:
    """A ratio of two numbers with standard errors, and its own."""
    ratio = ours[0] / theirs[0]
    return ratio, math.hypot(ours[1], ratio * theirs[1]) / abs(theirs[0])


def _with_error(value: float, error: float) -> str:
    return f"{number(value)} ± {number(error, 2)}" if math.isfinite(error) else number(value)


@dataclass(frozen=True)
class Density(Result):
    """Density of a trajectory.

    Parameters
    ----------
    density, error : float
        Mean over the frames, g/cm³, and its standard error from blocks.
    volume_per_atom : float
        Å³.
    n_frames, n_blocks : int
    """

    density: float
    error: float
    volume_per_atom: float
    n_frames: int
    n_blocks: int


def density(frames: Structures, *, n_blocks: int = 5) -> Density:
    """Mean density of frames, with a standard error from consecutive blocks of them."""
    masses = frames.composition() @ frames.species_table.masses
    values = (AMU_PER_A3_IN_G_PER_CM3 * masses / frames.volume).numpy()
    n_blocks = min(n_blocks, len(values))
    means = [block.mean() for block in np.array_split(values, n_blocks)]
    return Density(
        density=float(values.mean()),
        error=float(np.std(means, ddof=1) / math.sqrt(n_blocks)) if n_blocks > 1 else math.nan,
        volume_per_atom=float((frames.volume / frames.n_atoms_per_system).mean()),
        n_frames=len(values),
        n_blocks=n_blocks,
    )


class DensityEvaluation(Evaluation):
    """Density of a trajectory; at constant pressure a property of the potential."""

    name = "density"
    title = "density"
    result = Density
    section = "Dynamics"
    needs = "frames"
    numbers: ClassVar[dict[str, str]] = {"density": "density", "density_error": "error"}

    def run(self, bench: Bench, candidate: Candidate) -> Density:
        """Take the density of the candidate's trajectory."""
        return density(bench.trajectory_of(candidate))
