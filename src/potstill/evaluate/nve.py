"""Stability of molecular dynamics at constant energy: drift, explosion, closest approach."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import ase
import numpy as np
from ase.calculators.calculator import BaseCalculator
from ase.md.verlet import VelocityVerlet

from potstill.errors import ConfigError, DivergenceError, PotstillError
from potstill.evaluate.base import Result, set_temperature, with_calculator
from potstill.neighbors import build_neighbor_list, shortest_distances
from potstill.sample.md import require_conservative, run_md
from potstill.structures import Structures
from potstill.units import FS_IN_ASE_TIME

#: A run has exploded when its total energy has moved by this much, eV per atom ...
_ENERGY_LIMIT = 1.0
#: ... or when it is this many times hotter than asked, and hotter than this, K.
_HEAT_FACTOR, _HEAT_FLOOR = 5.0, 1000.0


@dataclass(frozen=True)
class NVERun(Result):
    """One run at constant number of atoms, volume and energy.

    Parameters
    ----------
    temperature : float
        Asked for, K.
    mean_temperature : float
        Over the run, K.
    timestep : float
        fs.
    duration : float
        Of what was integrated before an explosion, ps.
    n_atoms : int
    time, energy : ndarray
        (n_samples,) ps, and total energy relative to the start, meV per atom.
    slope, slope_error : float
        Least-squares slope of the total energy, meV/atom/ps, with its standard error, in which
        the correlation of successive samples is allowed for.
    drift : float
        The slope times the duration, meV per atom.
    fluctuation : float
        Root mean square around the fitted line, meV per atom.
    shortest_distances : dict of str to float
        Closest approach during the run by pair of species ("Si-Si"), Å.
    exploded_at : float or None
        ps; None if the run is sound to its end.
    reason : str
        Why it counts as exploded; empty if it does not.
    """

    derived = ("stable",)

    temperature: float
    mean_temperature: float
    timestep: float
    duration: float
    n_atoms: int
    time: np.ndarray
    energy: np.ndarray
    slope: float
    slope_error: float
    drift: float
    fluctuation: float
    shortest_distances: dict[str, float]
    exploded_at: float | None
    reason: str

    @property
    def stable(self) -> bool:
        """Whether the run reached its end."""
        return self.exploded_at is None

    def summary(self) -> str:
        """One sentence for people."""
        setting = f"{self.n_atoms} atoms, {self.temperature:g} K, {self.timestep:g} fs"
        if not self.stable:
            return f"NVE ({setting}) exploded after {self.exploded_at:g} ps: {self.reason}"
        return (
            f"NVE ({setting}): {self.slope:+.3g} ± {self.slope_error:.2g} meV/atom/ps, "
            f"{self.drift:+.3g} meV/atom over {self.duration:g} ps"
        )


def run_nve(
    atoms: ase.Atoms,
    calculator: BaseCalculator,
    *,
    temperature: float,
    duration: float = 20.0,
    timestep: float = 1.0,
    thermalization: float = 1.0,
    sample_every: int = 10,
    pair_cutoff: float = 4.0,
    seed: int = 0,
    force_nonconservative: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> NVERun:
    """Integrate Newton's equations with velocity Verlet and judge how well energy is conserved.

    Parameters
    ----------
    atoms : ase.Atoms
        Where to start.
    calculator : BaseCalculator
        Any ASE calculator.
    temperature : float
        K.
    duration : float
        ps.
    timestep : float
        fs.
    thermalization : float
        ps of Langevin dynamics beforehand. Zero starts from `atoms` with random velocities: a
        perfect crystal then ends up at half the temperature.
    sample_every : int
        Steps between samples of energy and distances.
    pair_cutoff : float
        Å; closer pairs are looked for.
    seed : int
        Of velocities and thermostat.
    force_nonconservative : bool
        Run even where the calculator's forces are not the gradient of its energy.
    progress : callable, optional
        Called with (steps done, steps in all).

    Returns
    -------
    NVERun
        Also where the run explodes: then with when and why.

    Raises
    ------
    ConfigError
        If the run is empty, or the calculator's forces are direct and nobody forced it.
    """
    if not force_nonconservative:
        require_conservative(calculator, "the NVE test")
    n_steps = round(1000.0 * duration / timestep)
    if n_steps < sample_every or temperature <= 0.0 or sample_every < 1:
        raise ConfigError(
            "an NVE run needs a positive temperature and at least one sample, not "
            f"{temperature:g} K and {n_steps} steps with a sample every {sample_every}"
        )
    try:
        moving = _start(atoms, calculator, temperature, timestep, thermalization, seed)
    except DivergenceError as error:
        return _judge(_Record([], [], [], {}), len(atoms), temperature, timestep, 0.0, str(error))
    record = _Record.start(moving, pair_cutoff)
    integrator = VelocityVerlet(moving, timestep=timestep * FS_IN_ASE_TIME)
    reason, step = "", 0
    while step < n_steps and not reason:
        stride = min(sample_every, n_steps - step)
        try:
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                integrator.run(stride)
                step += stride
                reason = _symptom(moving, record, temperature)
                if not reason:
                    record.sample(moving, step * timestep / 1000.0, pair_cutoff)
        except (PotstillError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = f"the calculator or the neighbor list failed ({error})"
        if progress is not None:
            progress(step, n_steps)
    end = step * timestep / 1000.0
    return _judge(record, len(moving), temperature, timestep, end, reason)


def fit_drift(time: np.ndarray, energy: np.ndarray) -> tuple[float, float, float]:
    """Slope of a correlated series by least squares.

    Parameters
    ----------
    time, energy : ndarray
        (n,), equally spaced in time.

    Returns
    -------
    slope, error, fluctuation : float
        The error is that of independent samples times the square root of the statistical
        inefficiency of the residuals (their autocorrelation summed to its first zero); the
        fluctuation is the root mean square of the residuals. NaN where there are too few samples.
    """
    n = len(time)
    if n < 3:
        return math.nan, math.nan, math.nan
    centered = time - time.mean()
    spread = float((centered**2).sum())
    slope = float((centered * energy).sum() / spread)
    residual = energy - energy.mean() - slope * centered
    variance = float((residual**2).sum())
    if variance == 0.0:
        return slope, 0.0, 0.0
    padded = np.fft.rfft(residual, 2 * n)
    correlation = np.fft.irfft(np.abs(padded) ** 2)[:n] / variance
    negative = np.flatnonzero(correlation < 0.0)
    first_zero = int(negative[0]) if len(negative) else n
    inefficiency = 1.0 + 2.0 * float(correlation[1:first_zero].sum())
    error = math.sqrt(variance / (n - 2) / spread * inefficiency)
    return slope, error, math.sqrt(variance / n)


@dataclass
class _Record:
    """Samples gathered along a run."""

    time: list[float]
    energy: list[float]
    temperature: list[float]
    shortest: dict[str, float]

    @classmethod
    def start(cls, atoms: ase.Atoms, pair_cutoff: float) -> _Record:
        record = cls([], [], [], {})
        record.sample(atoms, 0.0, pair_cutoff)
        return record

    def sample(self, atoms: ase.Atoms, time: float, pair_cutoff: float) -> None:
        self.time.append(time)
        self.energy.append(float(atoms.get_total_energy()) / len(atoms))
        self.temperature.append(float(atoms.get_temperature()))
        frame = Structures.from_ase(atoms)
        neighbors = build_neighbor_list(frame, pair_cutoff)
        for pair, distance in shortest_distances(frame, neighbors).items():
            self.shortest[pair] = min(distance, self.shortest.get(pair, math.inf))


def _start(
    atoms: ase.Atoms,
    calculator: BaseCalculator,
    temperature: float,
    timestep: float,
    thermalization: float,
    seed: int,
) -> ase.Atoms:
    """Atoms with velocities and calculator, thermalized."""
    if thermalization <= 0.0:
        moving = with_calculator(atoms, calculator)
        set_temperature(moving, temperature, np.random.default_rng(seed))
        return moving
    length = max(1000.0 * thermalization, timestep)
    frames = run_md(
        Structures.from_ase(atoms),
        calculator,
        temperature=temperature,
        n_frames=1,
        seed=seed,
        timestep=timestep,
        stride=length,
        equilibration=0.0,
    )
    return with_calculator(frames.structures.to_ase()[0], calculator)


def _symptom(atoms: ase.Atoms, record: _Record, temperature: float) -> str:
    """Why the run counts as exploded; empty if it does not."""
    energy = float(atoms.get_total_energy()) / len(atoms)
    kinetic = float(atoms.get_temperature())
    if not (np.isfinite(atoms.positions).all() and math.isfinite(energy)):
        return "positions or energy are not finite"
    change = energy - record.energy[0]
    if abs(change) > _ENERGY_LIMIT:
        return f"the total energy has moved by {change:+.3g} eV per atom"
    if kinetic > max(_HEAT_FACTOR * temperature, _HEAT_FLOOR):
        return f"the temperature reached {kinetic:.0f} K"
    return ""


def _judge(
    record: _Record, n_atoms: int, temperature: float, timestep: float, end: float, reason: str
) -> NVERun:
    time, energy = np.array(record.time), 1000.0 * np.array(record.energy)
    energy = energy - energy[:1]
    slope, error, fluctuation = fit_drift(time, energy)
    duration = record.time[-1] if record.time else 0.0
    return NVERun(
        temperature=float(temperature),
        mean_temperature=float(np.mean(record.temperature)) if record.temperature else math.nan,
        timestep=float(timestep),
        duration=duration,
        n_atoms=n_atoms,
        time=time,
        energy=energy,
        slope=slope,
        slope_error=error,
        drift=slope * duration,
        fluctuation=fluctuation,
        shortest_distances=record.shortest,
        exploded_at=end if reason else None,
        reason=reason,
    )
