"""Time per step and atom of molecular dynamics, and structures per second of prediction."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ase
import numpy as np
import psutil
from ase.calculators.calculator import BaseCalculator
from ase.md.verlet import VelocityVerlet

from potstill.errors import ConfigError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.tools import machine_description, repeat_to, set_temperature, with_calculator
from potstill.metrics import METRICS
from potstill.models.base import Potential
from potstill.report.panels import Drawing, Panel, Series
from potstill.report.tables import Row, number
from potstill.report.verdicts import Verdict
from potstill.structures import Structures
from potstill.units import FS_IN_ASE_TIME


@dataclass(frozen=True)
class SpeedRow(Result):
    """Timing of one calculator at one size.

    Parameters
    ----------
    name : str
        Of the calculator.
    n_atoms : int
    seconds_per_step : float
        Median over rounds.
    fastest, slowest : float
        Rounds with the least and most seconds per step.
    n_rounds, n_steps : int
        Rounds, and steps in each.
    cpu_seconds_per_step : float
        Processor time of all threads, median over rounds: on a busy machine it tells more than
        the time on the clock, if the calculator runs on one thread.
    """

    derived = ("microseconds_per_atom",)

    name: str
    n_atoms: int
    seconds_per_step: float
    fastest: float
    slowest: float
    n_rounds: int
    n_steps: int
    cpu_seconds_per_step: float = math.nan

    @property
    def microseconds_per_atom(self) -> float:
        """Time per step and atom, µs."""
        return 1e6 * self.seconds_per_step / self.n_atoms


@dataclass(frozen=True)
class SpeedTable(Result):
    """Timings of several calculators and sizes on one machine."""

    rows: tuple[SpeedRow, ...]
    timestep: float
    temperature: float
    machine: dict[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> dict[int, SpeedRow]:
        """Rows of one calculator by number of atoms."""
        return {row.n_atoms: row for row in self.rows if row.name == name}


def md_speed(
    calculators: Mapping[str, BaseCalculator],
    atoms: ase.Atoms,
    *,
    sizes: Sequence[int] = (64, 256, 1024),
    rounds: int = 5,
    seconds_per_round: float = 1.0,
    timestep: float = 1.0,
    temperature: float = 300.0,
    seed: int = 0,
) -> SpeedTable:
    """Time velocity-Verlet dynamics with several calculators, taking turns.

    The calculators alternate in every round, so that a machine that slows down or is busy for a
    while hits all of them alike; the median over rounds is reported. Two steps beforehand are not
    counted.

    Parameters
    ----------
    calculators : mapping of str to BaseCalculator
        By name.
    atoms : ase.Atoms
        The structure, repeated to each size (`repeat_to`).
    sizes : sequence of int
        Least numbers of atoms.
    rounds : int
        Turns of each calculator.
    seconds_per_round : float
        About how long a turn lasts: it sets the number of steps, from 1 to 200.
    timestep, temperature : float
        fs and K.
    seed : int
        Of the velocities.
    """
    if not calculators or not sizes or rounds < 1:
        raise ConfigError("timing needs at least one calculator, one size and one round")
    rows = []
    for n_atoms in sizes:
        start = repeat_to(atoms, n_atoms)
        runs = {}
        for name, calculator in calculators.items():
            moving = with_calculator(start, calculator)
            set_temperature(moving, temperature, np.random.default_rng(seed))
            runs[name] = VelocityVerlet(moving, timestep=timestep * FS_IN_ASE_TIME)
            _timed(runs[name], 1)  # imports, compilation, first neighbor list
        steps = {
            name: int(np.clip(seconds_per_round / _timed(run, 1)[0], 1, 200))
            for name, run in runs.items()
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(_timed(run, steps[name]))
        for name, pairs in times.items():
            clock, processor = np.array(pairs).T / steps[name]
            median, fastest, slowest = (float(f(clock)) for f in (np.median, np.min, np.max))
            counts = (rounds, steps[name], float(np.median(processor)))
            rows.append(SpeedRow(name, len(start), median, fastest, slowest, *counts))
    return SpeedTable(tuple(rows), timestep, temperature, machine_description())


@dataclass(frozen=True)
class Throughput(Result):
    """How many structures per second a potential predicts energies and forces of.

    Parameters
    ----------
    samples_per_second : float
        Median over rounds.
    fastest, slowest : float
        Rounds with the most and the fewest.
    n_samples, n_atoms, n_rounds : int
        Structures and atoms in all of them, and rounds.
    max_atoms : int
        Atoms per batch.
    machine : dict
        What it was measured on.
    """

    samples_per_second: float
    fastest: float
    slowest: float
    n_samples: int
    n_atoms: int
    n_rounds: int
    max_atoms: int
    machine: dict[str, Any] = field(default_factory=dict)


def inference_throughput(
    potentials: Mapping[str, Potential],
    structures: Structures,
    *,
    max_atoms: int = 4096,
    rounds: int = 3,
) -> dict[str, Throughput]:
    """Time predictions of energies and forces, neighbor lists included, taking turns.

    Potentials are timed on the device that each is on, in batches of `max_atoms` atoms. The median
    over rounds counts, one batch beforehand does not.
    """
    if not potentials or rounds < 1 or not len(structures):
        raise ConfigError("timing needs at least one potential, one structure and one round")
    batches = [structures.select(systems) for systems in structures.batches(max_atoms)]
    for potential in potentials.values():
        _predict(potential, batches[0])
    seconds: dict[str, list[float]] = {name: [] for name in potentials}
    for _ in range(rounds):
        for name, potential in potentials.items():
            started = time.perf_counter()
            for batch in batches:
                _predict(potential, batch)
            seconds[name].append(time.perf_counter() - started)
    n, machine = len(structures), machine_description()
    return {
        name: Throughput(
            samples_per_second=n / float(np.median(taken)),
            fastest=n / min(taken),
            slowest=n / max(taken),
            n_samples=n,
            n_atoms=structures.n_atoms,
            n_rounds=rounds,
            max_atoms=max_atoms,
            machine=machine,
        )
        for name, taken in seconds.items()
    }


def _predict(potential: Potential, batch: Structures) -> None:
    """Predict and wait: results on the CPU are there."""
    potential.predict(batch.to(potential.device)).properties.to("cpu")


def _timed(run: VelocityVerlet, steps: int) -> tuple[float, float]:
    """Seconds on the clock and of the processor, a calculator's worker process included."""
    clock, processor = time.perf_counter(), _processor_seconds()
    run.run(steps)
    return time.perf_counter() - clock, _processor_seconds() - processor


def _processor_seconds() -> float:
    times = [child.cpu_times() for child in psutil.Process().children()]
    return time.process_time() + sum(t.user + t.system for t in times)


# -- the evaluations -----------------------------------------------------------------------------


def timings(found: Findings, model: str) -> dict[int, float]:
    """µs per step and atom of a model, by number of atoms."""
    table = found.of("speed", SpeedTable).get(model)
    return {n: row.microseconds_per_atom for n, row in table.of(model).items()} if table else {}


def speed_ratio(found: Findings, fast: str = "") -> dict[int, float]:
    """How many times less time per step than the teacher a model takes, by number of atoms.

    The model is the student by default; sizes that were timed for both are given.
    """
    ours, theirs = timings(found, fast or found.student), timings(found, found.teacher)
    return {n: theirs[n] / ours[n] for n in ours if n in theirs}


class Speed(Evaluation):
    """Time per step of molecular dynamics.

    Parameters
    ----------
    sizes : tuple of int
        Numbers of atoms.
    rounds : int
        The median counts.
    """

    name = "speed"
    title = "speed"
    result = SpeedTable
    section = "Cost"
    needs = "structure"

    sizes: tuple[int, ...] = (64, 512)
    rounds: int = 3

    def run(self, bench: Bench, candidate: Candidate) -> SpeedTable:
        """Time the candidate by itself."""
        return md_speed(
            {candidate.name: candidate.calculator},
            bench.atoms,
            sizes=self.sizes,
            rounds=self.rounds,
            timestep=bench.settings.timestep,
            temperature=bench.settings.temperature,
            seed=bench.settings.seed,
        )

    @classmethod
    def metrics(cls, result: SpeedTable) -> dict[str, float]:
        """Time of the largest system."""
        row = max(result.rows, key=lambda row: row.n_atoms)
        return {"time_per_step_atom_us": row.microseconds_per_atom}

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Time by size, and how many times faster than the teacher."""
        by_model = {m: timings(found, m) for m in found.of(cls.name, SpeedTable)}
        for n in sorted({n for times in by_model.values() for n in times}):
            label = f"µs per step and atom, {n:,} atoms"
            yield Row(label, {m: times[n] for m, times in by_model.items() if n in times})
        faster = {
            m: ratios[max(ratios)]
            for m in by_model
            if m != found.teacher and (ratios := speed_ratio(found, m))
        }
        if faster:
            yield Row("Times faster than the teacher (largest common size)", faster)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """Time against size."""
        series = []
        for model in found.of(cls.name, SpeedTable):
            times = dict(sorted(timings(found, model).items()))
            series.append(Series(model, [*times], [*times.values()], joined=len(times) > 1))
        label = METRICS["time_per_step_atom_us"].label
        panel = Panel("Atoms", label, series, x_scale="auto", y_scale="auto")
        yield Drawing("speed", "Time", "Time per step and atom in ASE MD.", [panel])

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """The ratio at the largest size timed for both."""
        ratios = speed_ratio(found)
        if ratios:
            n = max(ratios)
            ours, theirs = (timings(found, m)[n] for m in (found.student, found.teacher))
            word, ratio = ("faster", ratios[n]) if ratios[n] >= 1 else ("slower", 1 / ratios[n])
            yield Verdict(
                f"In the same ASE MD of {n:,} atoms the student is {number(ratio)} times "
                f"{word} than the teacher ({number(ours)} against {number(theirs)} µs per step and "
                "atom)."
            )


class InferenceThroughput(Evaluation):
    """Structures per second in batches.

    Parameters
    ----------
    rounds : int
        The median counts.
    """

    name = "throughput"
    title = "throughput"
    result = Throughput
    section = "Cost"
    needs = "sets"
    on_request = True
    numbers: ClassVar = {"samples_per_second": "samples_per_second"}

    rounds: int = 3

    def run(self, bench: Bench, candidate: Candidate) -> Throughput:
        """Time the candidate by itself."""
        if candidate.potential is None:
            raise ConfigError("only checkpoints are timed in batches")
        structures = Structures.concatenate([structures for structures, _ in bench.sets.values()])
        potentials, max_atoms = {"": candidate.potential}, bench.settings.batch_atoms
        found = inference_throughput(
            potentials, structures, max_atoms=max_atoms, rounds=self.rounds
        )
        return found[""]
