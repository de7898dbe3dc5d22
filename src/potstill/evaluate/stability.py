"""Stability of a model's own dynamics over many runs: what failed, when, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from potstill.errors import ConfigError
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.evaluate.lammps_md import lammps_engine, run_replicas_in_lammps
from potstill.report.tables import Row, number
from potstill.report.verdicts import Verdict
from potstill.sample.base import Progress
from potstill.sample.replicas import Breakdown, ReplicaRun, ReplicaSettings, run_replicas
from potstill.soundness import (
    Connectivity,
    Liquid,
    Skeleton,
    closest_pairs,
    energy_departure,
    overheated,
)
from potstill.structures import Structures
from potstill.units import BOLTZMANN


class OwnDynamics(BaseModel):
    """Dynamics of every model, for the evaluations of trajectories and for `stability`.

    Parameters
    ----------
    n_runs : int
        Runs of each model, moved together. They start from frames of the reference trajectory,
        spread over it, or from the structure, each with velocities of its own.
    duration, equilibration : float
        ps; what fails in the equilibration has failed as well.
    stride : float
        fs between frames.
    thermostat_time : float, optional
        fs, the inverse of Langevin's friction, which slows diffusion down; `null` for constant
        energy.
    engine : {"replicas", "lammps"}
        All runs at a time in this process, or one after the other in LAMMPS, which is several
        times faster for small systems, where `pair_style potstill` runs the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_runs: int = Field(default=10, ge=1)
    duration: float = Field(default=100.0, gt=0)
    equilibration: float = Field(default=10.0, ge=0)
    stride: float = Field(default=1000.0, gt=0)
    thermostat_time: float | None = Field(default=1000.0, gt=0)
    engine: Literal["replicas", "lammps"] = "replicas"

    def settings(self, bench: Bench) -> ReplicaSettings:
        """The same with temperature, timestep and seed of a bench."""
        return ReplicaSettings(
            temperature=bench.settings.temperature,
            n_frames=max(1, round(1000.0 * self.duration / self.stride)),
            stride=self.stride,
            equilibration=1000.0 * self.equilibration,
            timestep=bench.settings.timestep,
            thermostat_time=self.thermostat_time,
            seed=bench.settings.seed,
        )

    def starts(self, bench: Bench) -> Structures:
        """Where the runs start.

        Raises
        ------
        ConfigError
            If there is neither a reference trajectory nor a structure.
        """
        reference = (bench.frames or {}).get(bench.standard)
        if reference is not None:
            places = np.linspace(0, len(reference) - 1, self.n_runs).round().astype(int)
            return reference.select(places.tolist())
        if bench.structure is None:
            raise ConfigError(
                "dynamics of the models need where to start: give a trajectory called 'reference', "
                "or a structure"
            )
        start = Structures.from_ase(bench.supercell, table=bench.structure.species_table)
        return start.select([0] * self.n_runs)

    def run(
        self,
        bench: Bench,
        candidate: Candidate,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> ReplicaRun:
        """Run a candidate's dynamics, or the rest of it.

        A run fails where positions are not finite, the temperature runs away, atoms fuse or come
        apart or, beside a reference trajectory, where the density of a liquid is lost, its energy
        becomes that of another phase, or a bond of a molecule breaks: `potstill.soundness`.
        """
        starts, settings = self.starts(bench), self.settings(bench)
        reference = (bench.frames or {}).get(bench.standard)
        trained = candidate.trained_on.get("shortest_distances")
        liquid, skeleton = Liquid(dict(trained or {})), Skeleton((), ())
        if reference is not None and bool(reference.pbc.all()):
            liquid = bench.once("liquid", lambda: Liquid.of(reference))
        elif reference is not None and not bool(reference.pbc.any()):
            liquid = bench.once("closest", lambda: Liquid(closest_pairs(reference)))
            skeleton = bench.once("skeleton", lambda: Skeleton.of(reference))
        whole = Connectivity.of(starts[0])
        hot = settings.temperature if settings.thermostat_time is not None else None

        def watch(frame: Structures) -> str:
            return (
                (overheated(frame, hot) if hot is not None else "")
                or whole.symptom(frame)
                or skeleton.symptom(frame)
                or liquid.symptom(frame)
            )

        if self.engine == "lammps":
            if folder is None:
                raise ConfigError("dynamics in LAMMPS need a folder for its files")
            engine = lammps_engine(candidate.spec, candidate.args, folder)
            run = run_replicas_in_lammps(
                starts, engine, settings, folder, watch=watch, progress=progress
            )
        else:
            run = run_replicas(
                starts, candidate.predictor, settings, folder=folder, watch=watch, progress=progress
            )
        if hot is None or reference is None or not bool(reference.pbc.all()):
            return run
        return with_departures(run, hot)


def with_departures(run: ReplicaRun, temperature: float) -> ReplicaRun:
    """The same run, failed where its potential energy becomes that of another phase."""
    found = list(run.breakdowns)
    groups, scale = np.array(run.frames.structures.group), BOLTZMANN * temperature * run.n_atoms
    for k in (k for k, breakdown in enumerate(found) if breakdown is None):
        own = np.flatnonzero(groups == f"replica {k}")
        left = energy_departure(run.frames.energy.numpy()[own], scale)
        if left is not None:
            first, change = left
            way, share = "fell" if change < 0 else "rose", abs(change) / scale
            found[k] = Breakdown(
                float(run.frames.time[own[first]]),
                f"the potential energy {way} by {number(share)} kT per atom: another phase",
            )
    return replace(run, breakdowns=tuple(found))


@dataclass(frozen=True)
class Stability(Result):
    """How many runs of a model's dynamics reached their end.

    Parameters
    ----------
    n_atoms : int
    temperature, mean_temperature : float
        Of the thermostat, and mean over the frames of all runs, K.
    timestep, thermostat_time : float
        fs; no thermostat if infinite.
    duration : float
        Of each run, with its equilibration, ps.
    survived : tuple of float
        How far each run came, ps.
    reasons : tuple of str
        What happened to each; empty for those that reached their end.
    """

    derived = ("n_failed",)

    n_atoms: int
    temperature: float
    mean_temperature: float
    timestep: float
    thermostat_time: float
    duration: float
    survived: tuple[float, ...]
    reasons: tuple[str, ...]

    @property
    def n_failed(self) -> int:
        """Runs that did not reach their end."""
        return sum(bool(reason) for reason in self.reasons)

    @property
    def time_to_failure(self) -> float:
        """Mean time to failure, ps, for failures at a constant rate; infinite without any."""
        return sum(self.survived) / self.n_failed if self.n_failed else float("inf")

    @property
    def at_least(self) -> float:
        """Time to failure that 95 % confidence leaves possible, ps, where none was seen."""
        return sum(self.survived) / 3.0  # exp(-3) = 0.05


class StabilityEvaluation(Evaluation):
    """Failures of a model's own dynamics over many runs; `dynamics` says how they are run."""

    name = "stability"
    title = "stability of dynamics"
    result = Stability
    section = "Dynamics"
    needs = "runs"
    on_request = True
    numbers: ClassVar[Mapping[str, str]] = {"failed_runs": "n_failed"}

    def run(self, bench: Bench, candidate: Candidate) -> Stability:
        """Count what failed in the candidate's runs."""
        if candidate.name not in bench.runs:
            raise ConfigError("there are no dynamics of it")
        run, settings = bench.runs[candidate.name]
        n = settings.n_frames * settings.steps_per_frame * settings.timestep
        duration = 1e-3 * (n + settings.equilibration)
        kelvin = [value for value in run.temperature if np.isfinite(value)]
        return Stability(
            n_atoms=int(run.n_atoms),
            temperature=settings.temperature,
            mean_temperature=float(np.mean(kelvin)) if kelvin else float("nan"),
            timestep=settings.timestep,
            thermostat_time=settings.thermostat_time or float("inf"),
            duration=duration,
            survived=tuple(duration if b is None else 1e-3 * b.time for b in run.breakdowns),
            reasons=tuple("" if b is None else b.reason for b in run.breakdowns),
        )

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """Setting, failures, and the time to one."""
        runs = found.of(cls.name, Stability)
        if not runs:
            return
        setting = {
            "Stability: length of a run (ps)": "duration",
            "Stability: timestep (fs)": "timestep",
            "Stability: mean temperature (K)": "mean_temperature",
        }
        yield from cls.attribute_rows(runs, setting)
        failed = {m: f"{r.n_failed} of {len(r.reasons)}" for m, r in runs.items()}
        yield Row("Runs that failed", failed)
        times = {
            m: number(r.time_to_failure) if r.n_failed else f"> {number(r.at_least)}"
            for m, r in runs.items()
        }
        yield Row("Mean time to failure (ps; > at 95 % confidence)", times)
        first = {m: next(filter(None, r.reasons), "") for m, r in runs.items()}
        if any(first.values()):
            yield Row("First failure", {m: reason for m, reason in first.items() if reason})

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Whether all of the student's runs reached their end."""
        run = found.of(cls.name, Stability).get(found.student)
        if run is None:
            return
        n = len(run.reasons)
        setting = f"{run.n_atoms} atoms, {run.temperature:g} K, timestep {run.timestep:g} fs"
        text = (
            f"{n - run.n_failed} of {n} runs of {run.duration:g} ps reached their end ({setting})"
        )
        if run.n_failed:
            first = next(filter(None, run.reasons))
            text += f"; mean time to failure {number(run.time_to_failure)} ps. The first: {first}"
        bar = f"stable dynamics in {n} runs"
        yield Verdict(f"{text}.", bar, met=not run.n_failed)
