"""Stability of molecular dynamics at constant energy: drift, explosion, dissociation, fusion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import ase
import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from ase.md.verlet import VelocityVerlet
from pydantic import Field

from potstill.errors import ConfigError, DivergenceError, PotstillError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.tools import limited_threads, set_temperature, with_calculator
from potstill.report.panels import Drawing, Panel, Series
from potstill.report.tables import Row, number, signed
from potstill.report.verdicts import Verdict
from potstill.sample.md import require_conservative, run_md
from potstill.soundness import Connectivity, closest_approach, closest_pairs, fused
from potstill.structures import Structures
from potstill.units import BOLTZMANN, FS_IN_ASE_TIME

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
        ps, when it exploded, came apart or atoms fused; None if the run is sound to its end.
    reason : str
        What happened; empty if nothing did.
    trained : dict, optional
        Shortest distances in training, where they are known.
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
    trained: dict[str, float] | None = None

    @property
    def stable(self) -> bool:
        """Whether the run reached its end."""
        return self.exploded_at is None


def run_nve(
    atoms: ase.Atoms,
    calculator: BaseCalculator,
    *,
    temperature: float,
    duration: float = 20.0,
    timestep: float = 1.0,
    thermalization: float = 1.0,
    sample_every: int = 10,
    seed: int = 0,
    force_nonconservative: bool = False,
    trained: Mapping[str, float] | None = None,
) -> NVERun:
    """Integrate Newton's equations with velocity Verlet and judge how well energy is conserved.

    Parameters
    ----------
    atoms, calculator : ase.Atoms, BaseCalculator
        Where to start.
    temperature, duration, timestep : float
        K, ps and fs.
    thermalization : float
        ps of Langevin dynamics beforehand. Zero starts from `atoms` with random velocities: a
        perfect crystal then ends up at half the temperature.
    sample_every : int
        Steps between samples of energy and distances.
    seed : int
        Of velocities and thermostat.
    force_nonconservative : bool
        Run even where the calculator's forces are not the gradient of its energy.
    trained : mapping, optional
        Shortest distance in training by pair ("Si-Si"), Å: atoms far below it have fused.

    Returns
    -------
    NVERun
        Also where the run explodes, the structure comes apart or atoms fuse: then with when and
        why. Temperatures are those of the free atoms.

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
    start = Structures.from_ase(atoms)
    record = _Record(temperature, timestep, len(atoms), trained)
    moving = with_calculator(atoms, calculator)
    if thermalization > 0.0:
        try:
            warm = run_md(
                start,
                calculator,
                temperature=temperature,
                n_frames=1,
                seed=seed,
                timestep=timestep,
                stride=max(1000.0 * thermalization, timestep),
                equilibration=0.0,
            )
        except DivergenceError as error:
            return record.judged(0.0, str(error))
        moving = with_calculator(warm.structures.to_ase()[0], calculator)
    else:
        set_temperature(moving, temperature, np.random.default_rng(seed))
    record.degrees = max(1, moving.get_number_of_degrees_of_freedom())
    if thermalization <= 0.0 and record.degrees == 3 * len(moving) > 3:
        record.degrees -= 3  # the whole is at rest
    whole = Connectivity.of(start, trained)
    record.sample(moving, 0.0)
    integrator = VelocityVerlet(moving, timestep=timestep * FS_IN_ASE_TIME)
    reason, step = "", 0
    while step < n_steps and not reason:
        stride = min(sample_every, n_steps - step)
        try:
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                integrator.run(stride)
                step += stride
                reason = record.symptom(moving)
                if not reason:
                    frame = record.sample(moving, step * timestep / 1000.0)
                    reason = whole.symptom(frame) or fused(record.shortest, trained)
        except (PotstillError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = f"the calculator or the neighbor list failed ({error})"
    return record.judged(step * timestep / 1000.0, reason)


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
    """Samples gathered along a run, and what they say."""

    asked: float
    timestep: float
    n_atoms: int
    trained: Mapping[str, float] | None
    degrees: int = 1
    time: list[float] = field(default_factory=list)
    energy: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    shortest: dict[str, float] = field(default_factory=dict)

    def sample(self, atoms: ase.Atoms, time: float) -> Structures:
        self.time.append(time)
        self.energy.append(float(atoms.get_total_energy()) / len(atoms))
        self.temperature.append(self.kinetic_temperature(atoms))
        frame = Structures.from_ase(atoms)
        for pair, distance in closest_pairs(frame).items():
            self.shortest[pair] = min(distance, self.shortest.get(pair, math.inf))
        return frame

    def kinetic_temperature(self, atoms: ase.Atoms) -> float:
        return float(2.0 * atoms.get_kinetic_energy() / (self.degrees * BOLTZMANN))

    def symptom(self, atoms: ase.Atoms) -> str:
        """Why the run counts as exploded; empty if it does not."""
        energy = float(atoms.get_total_energy()) / len(atoms)
        kinetic = self.kinetic_temperature(atoms)
        if not (np.isfinite(atoms.positions).all() and math.isfinite(energy)):
            return "positions or energy are not finite"
        change = energy - self.energy[0]
        if abs(change) > _ENERGY_LIMIT:
            return f"the total energy has moved by {change:+.3g} eV per atom"
        if kinetic > max(_HEAT_FACTOR * self.asked, _HEAT_FLOOR):
            return f"the temperature reached {kinetic:.0f} K"
        return ""

    def judged(self, end: float, reason: str) -> NVERun:
        """The result of a run that ended at `end` ps, for a reason if it was too early."""
        time, energy = np.array(self.time), 1000.0 * np.array(self.energy)
        energy = energy - energy[:1]
        slope, error, fluctuation = fit_drift(time, energy)
        duration = self.time[-1] if self.time else 0.0
        return NVERun(
            temperature=float(self.asked),
            mean_temperature=float(np.mean(self.temperature)) if self.temperature else math.nan,
            timestep=float(self.timestep),
            duration=duration,
            n_atoms=self.n_atoms,
            time=time,
            energy=energy,
            slope=slope,
            slope_error=error,
            drift=slope * duration,
            fluctuation=fluctuation,
            shortest_distances=self.shortest,
            exploded_at=end if reason else None,
            reason=reason,
            trained=None if self.trained is None else dict(self.trained),
        )


# -- the evaluation ------------------------------------------------------------------------------

#: What the student's drift should stay below, meV/atom.
AIM_DRIFT = 1.0


class NVE(Evaluation):
    """Energy conservation and stability of molecular dynamics.

    Parameters
    ----------
    duration : float
        ps.
    force_nonconservative : bool
        Run models whose forces are direct, too.
    """

    name = "nve"
    title = "energy conservation (NVE)"
    result = NVERun
    section = "Dynamics"
    needs = "structure"

    duration: float = Field(default=20.0, gt=0)
    force_nonconservative: bool = False

    def run(self, bench: Bench, candidate: Candidate) -> NVERun:
        """Run the supercell; a checkpoint on one thread, since it is too small for more."""
        with limited_threads(1 if candidate.is_checkpoint else torch.get_num_threads()):
            return run_nve(
                bench.supercell,
                candidate.calculator,
                temperature=bench.settings.temperature,
                duration=self.duration,
                timestep=bench.settings.timestep,
                seed=bench.settings.seed,
                force_nonconservative=self.force_nonconservative,
                trained=candidate.trained_on.get("shortest_distances"),
            )

    @classmethod
    def metrics(cls, result: NVERun) -> dict[str, float]:
        """Drift and its fit; of a run that did not reach its end only how far it came."""
        names = ("drift", "slope", "fluctuation") if result.stable else ()
        return {f"nve_{name}": getattr(result, name) for name in (*names, "duration")}

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Setting, fit, closest approach and outcome of the run."""
        runs = found.of(cls.name, NVERun)
        if not runs:
            return
        setting = {
            "NVE atoms": "n_atoms",
            "NVE temperature at start (K)": "temperature",
            "NVE mean temperature (K)": "mean_temperature",
            "NVE timestep (fs)": "timestep",
        }
        yield from cls.attribute_rows(runs, setting)
        yield from super().rows(found)
        errors = {m: r.slope_error for m, r in runs.items() if r.stable}
        yield Row("NVE standard error of slope (meV/atom/ps)", errors)
        near = {m: c for m, r in runs.items() if (c := _closest(r, found))}
        yield Row("NVE closest pair (Å)", {m: f"{c[0]} {c[1]:.2f}" for m, c in near.items()})
        yield Row("NVE closest over shortest in training", {m: c[2] for m, c in near.items()})
        states = {
            m: "sound" if r.stable else f"broke down after {r.exploded_at:g} ps"
            for m, r in runs.items()
        }
        yield Row("NVE run", states)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """Total energy against time, and the fitted line."""
        runs = found.of(cls.name, NVERun)
        series = []
        for model, run in runs.items():
            series.append(Series(model, run.time, run.energy, kind="thin"))
            if run.stable and math.isfinite(run.slope):
                fit = run.energy.mean() + run.slope * (run.time - run.time.mean())
                series.append(Series(model, run.time[[0, -1]], fit[[0, -1]], kind="line"))
        if series:
            first = next(iter(runs.values()))
            panel = Panel("Time (ps)", "Total energy from start (meV/atom)", series, zero_line=True)
            caption = (
                f"Total energy in NVE MD of {first.n_atoms} atoms at {first.temperature:g} K "
                f"with a timestep of {first.timestep:g} fs (thin), and the fitted drift (thick). "
                "Noise of constant width comes from the integrator."
            )
            yield Drawing("nve", "Energy conservation (NVE)", caption, [panel], width=7.0)

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Whether the student's run is sound, and only then its drift."""
        run = found.of(cls.name, NVERun).get(found.student)
        if run is None:
            return
        setting = f"{run.n_atoms} atoms, {run.temperature:g} K, timestep {run.timestep:g} fs"
        broken = run.reason or fused(run.shortest_distances, _trained(run, found))
        if broken:
            after = f" after {run.exploded_at:g} ps" if run.exploded_at is not None else ""
            text = f"The student's NVE run ({setting}) broke down{after}: {broken}."
            bar = f"stable NVE MD ({broken.split(';')[0]})"
            yield Verdict(f"{text} Its drift is meaningless.", bar, met=False)
            return
        met = abs(run.drift) < AIM_DRIFT
        error = run.slope_error * run.duration
        text = (
            f"Over {run.duration:g} ps of NVE ({setting}) the student's total energy drifts by "
            f"{signed(run.drift)}{f' ± {number(error, 2)}' if math.isfinite(error) else ''} "
            f"meV/atom (fitted slope times duration), {'below' if met else 'above'} the bar of "
            f"{AIM_DRIFT:g} meV/atom"
        )
        if closest := _closest(run, found):
            pair, distance, ratio = closest
            text += (
                f"; the closest {pair} pair was {distance:.2f} Å apart, {ratio:.2f} times the "
                "shortest in training"
            )
        bar = f"NVE drift {signed(run.drift)} meV/atom (bar {AIM_DRIFT:g})"
        yield Verdict(f"{text}.", bar, met)


def _closest(run: NVERun, found: Findings) -> tuple[str, float, float] | None:
    return closest_approach(run.shortest_distances, _trained(run, found))


def _trained(run: NVERun, found: Findings) -> Mapping[str, float] | None:
    return run.trained or found.trained_on.get("shortest_distances")
