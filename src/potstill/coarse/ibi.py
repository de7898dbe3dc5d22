"""Iterative Boltzmann inversion: pair potentials that reproduce radial distributions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.checkpoint import load_potential, save_potential
from potstill.errors import ConfigError, DataError
from potstill.files import write_atomically
from potstill.models import PairPotential
from potstill.units import BOLTZMANN

Array = np.ndarray

#: Largest logarithm of g over the target that a step takes; height of the pressure's ramp, kT.
_LONGEST, _RAMP = 1.0, 0.1
#: GPa; nearer to the target the ramp is lower.
_FAR = 0.3

RECORD = "iterations.json"


@dataclass(frozen=True)
class Measured:
    """What a simulation with a potential gave.

    Parameters
    ----------
    g : mapping of str to ndarray
        (n_bins,) radial distribution by pair of species, "A-B".
    pressure : float
        GPa.
    """

    g: Mapping[str, Array]
    pressure: float = math.nan


@dataclass(frozen=True)
class Iteration:
    """A step of the inversion.

    Parameters
    ----------
    number : int
        From 0, the potential of mean force.
    error : dict of str to float
        Integral of abs(g - target) up to the cutoff, by pair, over that of the target.
    pressure : float
        GPa.
    """

    number: int
    error: dict[str, float]
    pressure: float

    @property
    def mean_error(self) -> float:
        """Over the pairs."""
        return sum(self.error.values()) / len(self.error)


@dataclass(frozen=True)
class Inversion:
    """The problem, and how steps are taken.

    The first guess is the potential of mean force, `-kT ln g`; then (Reith, Pütz, Müller-Plathe,
    J. Comput. Chem. 24, 1624 (2003), Eq. 4)

        u <- u + step kT ln(g / g_target)

    for all pairs at once. Tables become splines by least squares with a penalty on the third
    derivative: that smooths them, and takes them to zero at the cutoff. Where g_target is below
    `least`, `PairPotential.continue_inward` takes over.

    Parameters
    ----------
    r : ndarray
        (n_bins,) middles of bins of equal width, Å.
    target : mapping of str to ndarray
        (n_bins,) g(r) by pair.
    temperature : float
        K.
    step : float
        Part of the full step; smaller ones are safer with many species.
    least : float
        Bins whose g_target is smaller say nothing.
    smoothing : float
        Length, Å, whose sixth power is the factor of the penalty: what is shorter is smoothed out.
    pressure : float, optional
        GPa. A ramp `A (1 - r / cutoff)` is added to all pairs, `A = -0.1 kT` times the sign of the
        pressure's excess, less within 0.3 GPa of the target.

    Raises
    ------
    DataError
        If a target has too few bins above `least`.
    """

    r: Array
    target: Mapping[str, Array]
    temperature: float
    step: float = 0.5
    least: float = 0.02
    smoothing: float = 0.25
    pressure: float | None = None

    def __post_init__(self) -> None:
        for pair, g in self.target.items():
            if int((g >= self.least).sum()) < 10:
                raise DataError(f"the target g(r) of {pair} is empty: check the pair and the range")

    @property
    def kT(self) -> float:
        """Thermal energy, eV."""
        return BOLTZMANN * self.temperature

    def first_guess(self, model: PairPotential) -> None:
        """Put the potentials of mean force into a model."""
        guess = {pair: -self.kT * np.log(self._filled(g)) for pair, g in self.target.items()}
        self._add(model, guess, fresh=True)

    def improve(self, model: PairPotential, found: Measured) -> None:
        """Take a step."""
        steps = {}
        for pair, target in self.target.items():
            ratio = np.log(self._filled(found.g[pair]) / self._filled(target))
            steps[pair] = self.step * self.kT * np.clip(ratio, -_LONGEST, _LONGEST)
            if self.pressure is not None:
                excess = (found.pressure - self.pressure) / _FAR
                height = -_RAMP * self.kT * min(max(excess, -1.0), 1.0)
                steps[pair] = steps[pair] + height * (1.0 - self.r / model.cutoff)
        self._add(model, steps)

    def compare(self, number: int, found: Measured, cutoff: float) -> Iteration:
        """How far g(r) is from the target."""
        near = self.r < cutoff
        error = {
            pair: float(np.abs(found.g[pair] - g)[near].sum() / g[near].sum())
            for pair, g in self.target.items()
        }
        return Iteration(number, error, found.pressure)

    def best_of(self, done: Sequence[Iteration]) -> Iteration:
        """Choose the smallest mean error; with a pressure to reach, the last iteration.

        How near the pressure is g(r) does not tell.
        """
        if self.pressure is not None:
            return done[-1]
        return min(done, key=lambda iteration: iteration.mean_error)

    def _filled(self, g: Array) -> Array:
        return np.maximum(g, 0.5 * self.least)

    def _add(self, model: PairPotential, tables: Mapping[str, Array], fresh: bool = False) -> None:
        starts = {}
        with torch.no_grad():
            for row, pair in enumerate(model.pairs):
                known = self.target[pair] >= self.least
                first = int(known.argmax())  # g may be below again in a gap between two shells
                used = (np.arange(len(self.r)) >= first) & (self.r < model.cutoff)
                weight = np.sqrt(np.clip(self.target[pair][used], self.least, 1.0))
                spline = _as_spline(model, self.r[used], tables[pair][used], weight, self.smoothing)
                before = 0.0 if fresh else model.coefficients[row].double()
                model.coefficients[row] = before + spline
                starts[pair] = float(self.r[first])
        model.continue_inward(starts)


def _as_spline(
    model: PairPotential, r: Array, values: Array, weight: Array, smoothing: float
) -> Tensor:
    """(n_knots,) coefficients of the smooth spline nearest to a table."""
    at, by = (torch.from_numpy(np.ascontiguousarray(x)) for x in (r, weight))
    first, part = model.basis(at)
    matrix = at.new_zeros(len(at), model.n_knots + 3)
    matrix.scatter_(1, first[:, None] + torch.arange(4), part)
    matrix = matrix[:, : model.n_knots] * by[:, None]
    # Both terms are integrals over r.
    width = float(r[1] - r[0])
    rows = [math.sqrt(width) * matrix, smoothing**3 * model.roughness]
    known = math.sqrt(width) * torch.from_numpy(values * weight)
    known = torch.cat([known, known.new_zeros(len(model.roughness))])
    return torch.linalg.lstsq(torch.cat(rows), known[:, None]).solution[:, 0]


def invert(
    problem: Inversion,
    model: PairPotential,
    simulate: Callable[[PairPotential, Path], Measured],
    folder: Path,
    *,
    n_iterations: int,
    tolerance: float = 0.0,
    info: Mapping[str, Any] | None = None,
    tell: Callable[[Iteration], None] = lambda iteration: None,
) -> list[Iteration]:
    """Iterate, and leave the best potential in the model.

    Parameters
    ----------
    problem : Inversion
        Target and settings.
    model : PairPotential
        In float64; its coefficients are replaced.
    simulate : callable
        Runs dynamics with the model, whose checkpoint the path is.
    folder : Path
        Gets `iteration_000.pt` and so on, and the record `iterations.json`: the same call continues
        where an earlier one stopped.
    n_iterations : int
        Simulations at most, that of the first guess included.
    tolerance : float
        Mean error at which to stop.
    info : mapping, optional
        Kept in the checkpoints.
    tell : callable, optional
        Called with every iteration.

    Raises
    ------
    ConfigError
        If the model has pairs that the target lacks.
    """
    if missing := set(model.pairs) - set(problem.target):
        raise ConfigError(f"there is no target g(r) of {', '.join(sorted(missing))}")
    record = folder / RECORD
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
    done = [Iteration(**entry) for entry in known]

    def checkpoint(number: int) -> Path:
        return folder / f"iteration_{number:03d}.pt"

    while len(done) < n_iterations and (not done or done[-1].mean_error > tolerance):
        number = len(done)
        if number:
            _load(model, checkpoint(number))
        else:
            problem.first_guess(model)
            save_potential(checkpoint(number), model, dict(info or {}))
        found = simulate(model, checkpoint(number))
        done.append(problem.compare(number, found, model.cutoff))
        tell(done[-1])
        problem.improve(model, found)
        save_potential(checkpoint(number + 1), model, dict(info or {}))
        write_atomically(record, json.dumps([asdict(entry) for entry in done], indent=2) + "\n")
    _load(model, checkpoint(problem.best_of(done).number))
    return done


def _load(model: PairPotential, path: Path) -> None:
    kept, _ = load_potential(path)
    assert isinstance(kept, PairPotential)
    with torch.no_grad():
        model.coefficients.copy_(kept.coefficients)
