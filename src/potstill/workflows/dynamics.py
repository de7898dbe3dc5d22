"""`potstill md`: molecular dynamics with a student, or with any teacher."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from ase.calculators.calculator import BaseCalculator
from pydantic import Field, model_validator

from potstill.errors import ConfigError, DivergenceError
from potstill.evaluate.lammps_md import lammps_engine, run_in_lammps
from potstill.evaluate.tools import make_calculator
from potstill.evaluate.vibrations import fastest_period
from potstill.files import write_atomically
from potstill.sample import MDJob, SampledFrames, SamplingPlan, run_plan, smallest_supercell
from potstill.sample.base import Progress
from potstill.sample.plan import scratch_folder
from potstill.sample.replicas import ReplicaRun, ReplicaSettings, run_replicas
from potstill.soundness import (
    Connectivity,
    closest_approach,
    closest_pairs,
    degrees_of_freedom,
    fused,
    trained_distances,
)
from potstill.structures import Structures
from potstill.units import AMU_PER_A3_IN_G_PER_CM3, BOLTZMANN, FS_IN_ASE_TIME
from potstill.workflows.base import (
    Display,
    Range,
    Settings,
    TeacherSettings,
    claim_folder,
    read_start,
    write_extxyz,
)


class MdConfig(Settings):
    """Settings of `potstill md`.

    Parameters
    ----------
    model : TeacherSettings
        A checkpoint, or a teacher.
    structure : str
        Starting structure: a file, or a built-in structure.
    out : str
        The folder of the trajectory.
    ensemble : {"nve", "langevin", "npt"}
        Constant energy, constant temperature, or constant temperature and pressure.
    temperature : float or (first, last)
        Temperature in K; two numbers make a ramp (not with `nve`).
    pressure : float, optional
        Pressure in GPa, only with `npt` (default 0).
    duration, equilibration : float
        In ps; equilibration is at constant temperature and is not written.
    stride : float
        Time between frames in fs.
    timestep : float
        In fs.
    thermostat_time : float
        In fs.
    n_atoms : int
        Repeat a periodic structure until it has this many atoms.
    seed : int
        Seed of velocities and thermostat.
    force_nonconservative : bool
        Allow `nve` for a model with direct forces, which do not conserve energy.
    allow_dissociation : bool
        Continue if the structure comes apart; otherwise the run ends there, as for an explosion.
    engine : {"ase", "lammps"}
        What moves the atoms. LAMMPS runs checkpoints and the teacher `lammps`, on several ranks if
        asked, and does not resume: an interrupted run begins anew.
    n_ranks : int
        MPI ranks of LAMMPS.
    n_replicas : int
        Runs at a time, each with velocities of its own, at constant volume and temperature or
        energy. They follow one another in the trajectory, as groups.
    """

    model: TeacherSettings
    structure: str
    out: str
    ensemble: Literal["nve", "langevin", "npt"] = "langevin"
    temperature: Range = (300.0, 300.0)
    pressure: float | None = None
    duration: float = Field(default=10.0, gt=0)
    equilibration: float = Field(default=1.0, ge=0)
    stride: float = Field(default=50.0, gt=0)
    timestep: float = Field(default=1.0, gt=0)
    thermostat_time: float = Field(default=100.0, gt=0)
    n_atoms: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    force_nonconservative: bool = False
    allow_dissociation: bool = False
    engine: Literal["ase", "lammps"] = "ase"
    n_ranks: int = Field(default=1, ge=1)
    n_replicas: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _replicas_are_simple(self) -> MdConfig:
        if self.n_replicas > 1 and self.engine == "lammps":
            raise ValueError("LAMMPS takes one run at a time: leave out the replicas or the engine")
        if self.n_replicas > 1 and (
            self.ensemble == "npt" or self.temperature[0] != self.temperature[1]
        ):
            raise ValueError("replicas run at constant volume and one temperature")
        return self

    @model_validator(mode="after")
    def _pressure_needs_a_barostat(self) -> MdConfig:
        if self.pressure is not None and self.ensemble != "npt":
            raise ValueError(
                f"a pressure of {self.pressure:g} GPa needs the ensemble npt, not "
                f"{self.ensemble}: give --ensemble npt, or leave out the pressure"
            )
        return self


@dataclass(frozen=True)
class MdResult:
    """The frames of a run, the files they are in, and the closest approach in a sentence."""

    frames: SampledFrames
    trajectory: Path
    thermo: Path
    closest: str


def run_dynamics(config: MdConfig, display: Display | None = None) -> MdResult:
    """Run molecular dynamics, or the rest of it, and write its trajectory.

    The folder gets `config.yaml`, `trajectory.extxyz` and `thermo.csv`.
    """
    structures = read_start(config.structure)
    if structures.n_systems > 1:
        raise ConfigError(f"{config.structure} holds {structures.n_systems} structures: choose one")
    start = smallest_supercell(structures, min_atoms=config.n_atoms)
    calculator = make_calculator(config.model.spec, config.model.args)
    production(config).check(start, calculator)  # before a folder is made
    folder, display = Path(config.out), display or Display()
    claim_folder(folder, config)
    if warning := timestep_warning(config.timestep, start, calculator):
        display.say(warning)
    return simulate(config, start, calculator, folder, display)


def timestep_warning(timestep: float, start: Structures, calculator: BaseCalculator) -> str:
    """One sentence where a timestep (fs) is too long for one system; empty if it is not.

    The rule: at most a tenth of the period of the fastest vibration at the start. Its frequency is
    the largest of the mass-weighted Hessian of the free atoms, by power iteration with finite
    differences of forces (some 25 force evaluations).
    """
    period = fastest_period(start.to_ase()[0], calculator)
    if not timestep > period / _STEPS_PER_PERIOD:
        return ""
    lightest = start.species_table.names[int(start.species[int(start.masses.argmin())])]
    return (
        f"Warning: a timestep of {timestep:g} fs is more than a tenth of the period of the fastest "
        f"vibration ({period:.3g} fs; the lightest atom is {lightest}): expect heating or an "
        f"explosion, and choose {period / _STEPS_PER_PERIOD:.2g} fs or less"
    )


#: Timesteps that the period of the fastest vibration should hold.
_STEPS_PER_PERIOD = 10.0


def simulate(
    config: MdConfig,
    start: Structures,
    calculator: BaseCalculator,
    folder: Path,
    display: Display,
) -> MdResult:
    """Run the dynamics of a config from one structure, in a folder that exists.

    A run that is interrupted or explodes leaves its trajectory up to there.
    """
    if config.n_replicas > 1:
        return _simulate_replicas(config, start, calculator, folder, display)
    job = production(config)
    if config.ensemble == "nve" and config.equilibration > 0:
        heating = replace(
            job,
            name="",
            n_frames=1,
            temperature=config.temperature[0],
            equilibration=max(0.0, 1000.0 * config.equilibration - config.stride),
            thermostat_time=config.thermostat_time,
            force_nonconservative=False,
        )
        warm = _run(heating, start, calculator, folder / "equilibration", config)
        start = warm.structures[-1]
    with display.task(f"molecular dynamics ({config.ensemble})", 1.0) as task:
        try:
            frames = _run(job, start, calculator, folder / "frames", config, task.update)
        except (KeyboardInterrupt, DivergenceError):
            # What led to an explosion is what one wants to see.
            so_far = job.frames_so_far(start, scratch_folder(folder / "frames", 0))
            if so_far is not None:
                _write(folder, so_far, calculator)
            raise
    return _write(folder, frames, calculator)


def _simulate_replicas(
    config: MdConfig,
    start: Structures,
    calculator: BaseCalculator,
    folder: Path,
    display: Display,
) -> MdResult:
    """Run all replicas; one that breaks down ends the run as an explosion does."""
    potential = getattr(calculator, "potential", calculator)
    settings = ReplicaSettings(
        temperature=config.temperature[0],
        n_frames=max(1, round(1000.0 * config.duration / config.stride)),
        stride=config.stride,
        equilibration=1000.0 * config.equilibration,
        timestep=config.timestep,
        thermostat_time=config.thermostat_time,
        seed=config.seed,
    )
    starts = start.select([0] * config.n_replicas)
    if config.ensemble == "nve":
        if config.equilibration > 0:
            warm = replace(settings, n_frames=1, stride=settings.equilibration, equilibration=0.0)
            warmed = run_replicas(starts, potential, warm, folder=folder / "equilibration")
            _refuse_breakdowns(warmed)
            starts = warmed.frames.structures
        settings = replace(settings, equilibration=0.0, thermostat_time=None)
    whole = Connectivity.of(start)

    def watch(frame: Structures) -> str:
        return whole.symptom(frame, apart=not config.allow_dissociation)

    with display.task(f"{config.n_replicas} replicas ({config.ensemble})", 1.0) as task:
        run = run_replicas(
            starts, potential, settings, folder=folder / "frames", watch=watch,
            progress=lambda done, total: task.update(done / total),
        )  # fmt: skip
    if not len(run.frames):
        _refuse_breakdowns(run)
    result = _write(folder, run.frames, calculator)  # also what led to a breakdown
    _refuse_breakdowns(run)
    return result


def _refuse_breakdowns(run: ReplicaRun) -> None:
    broken = [breakdown for breakdown in run.breakdowns if breakdown is not None]
    if broken:
        first = min(broken, key=lambda breakdown: breakdown.time)
        raise DivergenceError(
            f"{len(broken)} of {len(run.breakdowns)} replicas broke down, the first after "
            f"{first.time:g} fs ({first.reason}): choose a shorter timestep, a lower temperature "
            "or a better starting structure"
        )


def production(config: MdConfig) -> MDJob:
    """The run whose frames are kept."""
    constant_energy = config.ensemble == "nve"
    first, last = config.temperature
    if constant_energy and first != last:
        raise ConfigError("a ramp of the temperature needs a thermostat: --ensemble langevin")
    return MDJob(
        n_frames=max(1, round(1000.0 * config.duration / config.stride)),
        temperature=config.temperature,
        pressure=(config.pressure or 0.0) if config.ensemble == "npt" else None,
        stride=config.stride,
        equilibration=0.0 if constant_energy else 1000.0 * config.equilibration,
        timestep=config.timestep,
        thermostat_time=None if constant_energy else config.thermostat_time,
        force_nonconservative=config.force_nonconservative,
        allow_dissociation=config.allow_dissociation,
    )


def _run(
    job: MDJob,
    start: Structures,
    calculator: BaseCalculator,
    folder: Path,
    config: MdConfig,
    progress: Progress | None = None,
) -> SampledFrames:
    if config.engine == "lammps":
        model = config.model
        exported = folder.with_name("lammps")
        engine = lammps_engine(model.spec, model.args, exported, n_ranks=config.n_ranks)
        return run_in_lammps(job, start, engine, seed=config.seed, folder=folder)
    plan = SamplingPlan(start, [job], config.seed)
    return run_plan(plan, calculator, folder, progress, driver=config.model.spec)


def _write(folder: Path, frames: SampledFrames, calculator: BaseCalculator) -> MdResult:
    trajectory, thermo = folder / "trajectory.extxyz", folder / "thermo.csv"
    write_trajectory(trajectory, frames)
    write_thermo(thermo, frames)
    symptom = _closest(frames.structures, trained_distances(calculator))
    return MdResult(frames, trajectory, thermo, symptom)


def _closest(structures: Structures, trained: Mapping[str, float] | None) -> str:
    distances = closest_pairs(structures)
    if symptom := fused(distances, trained):
        return f"Unsound: {symptom}"
    if closest := closest_approach(distances, trained):
        pair, distance, ratio = closest
        return (
            f"Closest pair: {pair} at {distance:.2f} Å, {ratio:.2f} times the shortest in training"
        )
    if not distances:
        return ""
    pair = min(distances, key=distances.__getitem__)
    return f"Closest pair: {pair} at {distances[pair]:.2f} Å"


def write_trajectory(path: Path, frames: SampledFrames) -> None:
    """Write frames as extended XYZ: positions, velocities, time, and the energy in `info`."""
    images = frames.structures.to_ase()
    for atoms, time, energy in zip(images, frames.time, frames.energy, strict=True):
        atoms.info["time_fs"] = float(time)
        atoms.info["potential_energy"] = float(energy)
    write_extxyz(path, images, ("symbols", "positions", "momenta"))


THERMO = ("time_fs", "temperature_K", "potential_eV", "kinetic_eV", "total_eV", "density_g_cm3")


def write_thermo(path: Path, frames: SampledFrames) -> None:
    """Write time, temperature, energies and density of every frame as CSV.

    The temperature is that of the free atoms, and what is not periodic along all three axes has no
    density: its cells are empty.
    """
    structures = frames.structures
    assert structures.velocities is not None
    masses = structures.masses
    twice = masses * structures.velocities.square().sum(1) / FS_IN_ASE_TIME**2
    kinetic = structures.sum_by_system(0.5 * twice)
    degrees = degrees_of_freedom(structures).clamp(min=1.0)
    temperature = 2.0 * kinetic / (degrees * BOLTZMANN)
    mass = structures.composition() @ structures.species_table.masses
    density = AMU_PER_A3_IN_G_PER_CM3 * mass / structures.volume
    density = torch.where(structures.pbc.all(dim=1), density, torch.nan)
    total = frames.energy + kinetic
    columns = (frames.time, temperature, frames.energy, kinetic, total, density)
    rows = torch.stack(columns, dim=1).tolist()
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(THERMO)
    table.writerows(["" if math.isnan(x) else f"{x:.10g}" for x in row] for row in rows)
    write_atomically(path, text.getvalue())
