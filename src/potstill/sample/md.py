"""Molecular dynamics that can be killed at any moment and resumes exactly where it stopped.

The integrator is ASE's `LangevinBAOAB`: Langevin dynamics at constant volume, Langevin-Hoover
(Quigley and Probert, J. Chem. Phys. 120, 11432 (2004)) at constant pressure, both sampling the
right ensemble. A run is a chain of segments, each a pure function from one `MDState` to the next;
before each segment the calculator is reset, so that it sees a new system and forgets neighbor
lists and starting guesses. A resumed run therefore repeats the undisturbed one bit for bit,
provided that the calculator itself is deterministic.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import ase
import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from ase.md.langevinbaoab import LangevinBAOAB

from potstill.errors import ConfigError, DivergenceError
from potstill.sample.base import (
    COLD,
    EXPLODED,
    Call,
    Job,
    Progress,
    SampledFrames,
    as_pair,
    dump_generator,
    load_generator,
    read_arrays,
    span,
    write_arrays,
)
from potstill.soundness import Connectivity, trained_distances
from potstill.structures import Structures
from potstill.units import BOLTZMANN, FS_IN_ASE_TIME, GPA

#: A cell whose volume falls or grows by these factors collapses or boils: liquids at ambient
#: pressure stay far below the second, high pressure reaches the inverse of the first at most.
_COLLAPSED, _BOILED = 1.0 / 3.0, 1.5
#: Segments that force decorrelation may wait for before a frame is taken all the same.
_LONGEST_WAIT = 20


@dataclass(frozen=True)
class MDState:
    """Everything needed to continue a run, with energy and forces at that moment.

    Parameters
    ----------
    positions, momenta : ndarray
        (N, 3), Å and ASE's unit of momentum.
    cell : ndarray
        (3, 3), Å, rows are lattice vectors.
    cell_momentum : ndarray
        Momentum of the barostat, () or (3, 3); zero at constant volume.
    generator : str
        State of the random generator, as JSON.
    step : int
        Steps since the start.
    energy : float
        eV; NaN at the start.
    forces : ndarray
        (N, 3), eV/Å; NaN at the start.
    temperature : float
        K, the thermostat's target.
    """

    positions: np.ndarray
    momenta: np.ndarray
    cell: np.ndarray
    cell_momentum: np.ndarray
    generator: str
    step: int
    energy: float
    forces: np.ndarray
    temperature: float


@dataclass(frozen=True, kw_only=True)
class MDJob(Job):
    """Frames from molecular dynamics at constant temperature, and constant pressure if given.

    Parameters
    ----------
    temperature : float or (first, last)
        K; two numbers make a linear ramp over the frames (after equilibration at the first).
    pressure : float, optional
        GPa; None keeps the cell.
    stride : float
        fs between frames.
    equilibration : float
        fs before the first stride begins.
    timestep : float
        fs.
    thermostat_time : float, optional
        fs, the inverse of Langevin's friction; None for constant energy. Such a run starts with
        the structure's own velocities where it has any.
    barostat_time : float
        fs, sets the mass of the barostat; solids' cells oscillate some five times faster.
    isotropic : bool
        At constant pressure, keep the shape of the cell.
    max_force_correlation : float, optional
        Take a frame only once the correlation of its forces with those of the last frame taken
        (between -1 and 1) is at most this; `stride` is then the least distance.
    force_nonconservative : bool
        Run at constant energy even if the calculator does not conserve it.
    allow_dissociation : bool
        Continue if the structure comes apart (`potstill.soundness`); otherwise the run ends.
    """

    kind: ClassVar[str] = "md"

    temperature: float | Sequence[float]
    pressure: float | None = None
    stride: float = 50.0
    equilibration: float = 500.0
    timestep: float = 2.0
    thermostat_time: float | None = 100.0
    barostat_time: float = 1000.0
    isotropic: bool = True
    max_force_correlation: float | None = None
    force_nonconservative: bool = False
    allow_dissociation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for value in as_pair(self.temperature):
            if not value > 0.0:
                raise ConfigError(f"the temperature of '{self.name}' must be positive: {value} K")
        for name in ("timestep", "thermostat_time", "barostat_time"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ConfigError(f"{name} of '{self.name}' must be positive")
        if self.thermostat_time is None and self.pressure is not None:
            raise ConfigError(f"'{self.name}': constant pressure needs a thermostat")
        if self.stride < self.timestep:
            raise ConfigError(
                f"the stride of '{self.name}' ({self.stride:g} fs) is shorter than its timestep "
                f"({self.timestep:g} fs)"
            )
        if self.equilibration < 0.0:
            raise ConfigError(f"the equilibration of '{self.name}' must not be negative")

    def default_name(self) -> str:
        """Name the job by temperature and pressure."""
        if self.thermostat_time is None:
            return f"nve {span(self.temperature)} K"
        name = f"md {span(self.temperature)} K"
        return name if self.pressure is None else f"{name}, {self.pressure:g} GPa"

    @property
    def steps_per_segment(self) -> int:
        """Steps of one stride."""
        return max(1, round(self.stride / self.timestep))

    @property
    def n_equilibration_segments(self) -> int:
        """Equilibration in whole strides, rounded up."""
        steps = round(self.equilibration / self.timestep)
        return -(-steps // self.steps_per_segment)

    @property
    def n_evaluations(self) -> int:
        """Calls of the calculator: one per step and one at the start of each segment."""
        return (self.n_equilibration_segments + self.n_frames) * (self.steps_per_segment + 1)

    def to_json(self) -> dict[str, Any]:
        """As of all jobs; newer settings are written only if set: older folders stay valid."""
        settings = super().to_json()
        for name in ("force_nonconservative", "allow_dissociation"):
            if not settings[name]:
                del settings[name]
        return settings

    def check(self, start: Structures, calculator: BaseCalculator | None) -> None:
        """Refuse a calculator without stress, or constraints, at constant pressure.

        Nor may a calculator whose forces are not the energy's gradient run at constant energy.
        """
        super().check(start, calculator)
        if self.thermostat_time is None and not self.force_nonconservative:
            require_conservative(calculator, f"the job '{self.name}'")
        if self.pressure is None:
            return
        where = f"the job '{self.name}' runs at constant pressure"
        if not bool(start.pbc.all()):
            raise ConfigError(f"{where}, and {start.name_of(0)} is not periodic in all directions")
        if start.fixed is not None and bool(start.fixed.any()):
            raise ConfigError(f"{where}, and {start.name_of(0)} has fixed atoms: fix the volume")
        if "stress" not in getattr(calculator, "implemented_properties", ()):
            raise ConfigError(f"{where}, and its calculator gives no stress: fix the volume")

    def target(self, segment: int) -> float:
        """Temperature in K that the thermostat is set to in a segment (counted from zero)."""
        first, last = as_pair(self.temperature)
        # Waiting for decorrelation does not lengthen a ramp: it then ends at the last temperature.
        done = segment - self.n_equilibration_segments
        if done < 0 or self.n_frames == 1:
            return first
        return first + (last - first) * min(done / (self.n_frames - 1), 1.0)

    def make(
        self, start: Structures, calculator: BaseCalculator | None, call: Call
    ) -> SampledFrames:
        """Run to the end, or resume where the files in the call's folder end."""
        history, generator = History(call.folder), call.generator()
        keep = self.thermostat_time is None
        state = history.last or first_state(start, self.target(0), generator, keep_velocities=keep)
        atoms = start.to_ase()[0]
        atoms.calc = calculator
        whole = Connectivity.of(start, trained_distances(calculator))
        while len(history.taken) < self.n_frames:
            segment = history.n_segments
            state = advance(atoms, state, self, self.target(segment), float(start.volume[0]))
            if symptom := whole.symptom(_moved(start, state), apart=not self.allow_dissociation):
                raise _diverged(self, symptom, state.step)
            history.append(state, taken=self._takes(state, segment, history))
            done = (segment + 1) * (self.steps_per_segment + 1)
            call.tell(min(done, self.n_evaluations), self.n_evaluations)
        return self._frames(start, history.taken)

    def frames_so_far(self, start: Structures, folder: Path) -> SampledFrames | None:
        """Frames that an unfinished run left in its folder; None if there are none."""
        taken = History(folder).taken
        return self._frames(start, taken) if taken else None

    def _takes(self, state: MDState, segment: int, history: History) -> bool:
        """Decide whether the end of a segment becomes a frame."""
        if segment < self.n_equilibration_segments:
            return False
        if self.max_force_correlation is None or not history.taken:
            return True
        last = history.taken[-1]
        waited = (state.step - last.step) // self.steps_per_segment
        correlation = force_correlation(state.forces, last.forces)
        return correlation <= self.max_force_correlation or waited >= _LONGEST_WAIT

    def _frames(self, start: Structures, states: Sequence[MDState]) -> SampledFrames:
        masses = start.masses.numpy()[:, None]
        frames = [
            replace(
                _moved(start, state),
                velocities=torch.from_numpy(state.momenta / masses * FS_IN_ASE_TIME),
                group=(self.name,),
                frame_id=(f"{self.name}: {state.step * self.timestep:g} fs",),
            )
            for state in states
        ]
        n = len(frames)
        pressure = torch.nan if self.pressure is None else self.pressure
        return SampledFrames(
            structures=Structures.concatenate(frames),
            temperature=torch.tensor([s.temperature for s in states], dtype=torch.float64),
            pressure=torch.full((n,), pressure, dtype=torch.float64),
            energy=torch.tensor([s.energy for s in states], dtype=torch.float64),
            job=torch.zeros(n, dtype=torch.int64),
            time=torch.tensor([s.step * self.timestep for s in states], dtype=torch.float64),
        )


def _moved(start: Structures, state: MDState) -> Structures:
    """The starting structure with positions and cell of a state."""
    positions, cell = torch.from_numpy(state.positions), torch.from_numpy(state.cell[None])
    return replace(start, positions=positions, cell=cell)


def require_conservative(calculator: BaseCalculator | None, what: str) -> None:
    """Refuse a calculator that is not `conservative`.

    Raises
    ------
    ConfigError
        Naming `what` needs it.
    """
    if not getattr(calculator, "conservative", True):
        raise ConfigError(
            f"{what} runs at constant energy, which direct forces do not conserve: use a "
            f"thermostat, or set force_nonconservative"
        )


def run_md(
    start: Structures,
    calculator: BaseCalculator,
    *,
    temperature: float | Sequence[float],
    n_frames: int,
    seed: int,
    folder: Path | str | None = None,
    progress: Progress | None = None,
    **settings: float | bool | None,
) -> SampledFrames:
    """Run molecular dynamics of one system and return its frames.

    Parameters
    ----------
    start : Structures
        One system; its own velocities are not used, new ones are drawn.
    calculator : ase calculator
        Energies, forces and, at constant pressure, stress.
    temperature : float or (first, last)
        K.
    n_frames, seed : int
        How many frames to take, and the seed of velocities and thermostat.
    folder : path, optional
        For checkpoints: the same call resumes where an earlier one stopped.
    progress : callable, optional
        Called with (calls of the calculator done, in all).
    **settings
        The other settings of `MDJob`.

    Raises
    ------
    DivergenceError
        If atoms leave the finite numbers, fuse or are ten times hotter than asked, or the
        structure comes apart.
    """
    job = MDJob(temperature=temperature, n_frames=n_frames, **settings)  # type: ignore[arg-type]
    path = None if folder is None else Path(folder)
    return job.run(start, calculator, seed=seed, folder=path, progress=progress)


# -- one segment ---------------------------------------------------------------------------------


def first_state(
    start: Structures,
    temperature: float,
    generator: np.random.Generator,
    *,
    keep_velocities: bool = False,
) -> MDState:
    """Draw Maxwell-Boltzmann momenta for one system; fixed atoms get none.

    With `keep_velocities` the structure's own are taken, if it moves.
    """
    masses = start.masses.numpy()
    fixed = ~start.free.numpy()
    momenta = draw_momenta(masses, fixed, temperature, generator)
    if keep_velocities and start.velocities is not None and bool(start.velocities.any()):
        momenta = masses[:, None] * start.velocities.numpy() / FS_IN_ASE_TIME
        momenta[fixed] = 0.0
    return MDState(
        positions=start.positions.numpy().copy(),
        momenta=momenta,
        cell=start.cell[0].numpy().copy(),
        cell_momentum=np.zeros(()),
        generator=dump_generator(generator),
        step=0,
        energy=float("nan"),
        forces=np.full((start.n_atoms, 3), np.nan),
        temperature=temperature,
    )


def draw_momenta(
    masses: np.ndarray, fixed: np.ndarray, temperature: float, generator: np.random.Generator
) -> np.ndarray:
    """(N, 3) momenta of a thermal ensemble, ASE's unit; none for fixed atoms.

    The momentum of the whole is part of the ensemble, and of that of a Langevin thermostat.
    `masses` (N,) in amu, `fixed` (N,) bool, temperature in K; the generator is drawn from for all
    atoms, fixed or not.
    """
    momenta = np.sqrt(masses * BOLTZMANN * temperature)[:, None]
    momenta = momenta * generator.normal(size=(len(masses), 3))
    momenta[fixed] = 0.0
    return momenta


def advance(
    atoms: ase.Atoms, state: MDState, job: MDJob, temperature: float, volume: float
) -> MDState:
    """Run one segment from a state, which is not changed.

    Parameters
    ----------
    atoms : ase.Atoms
        Brings species, constraints and the calculator; all else comes from the state.
    temperature : float
        K, the thermostat's target.
    volume : float
        Å³, the volume at the start of the job, from which the cell must not go far.

    Raises
    ------
    DivergenceError
        If atoms explode.
    """
    generator = load_generator(state.generator)
    limit = EXPLODED * max(temperature, COLD)
    step = state.step
    try:
        # Overflows of atoms that explode are reported below, in words.
        with np.errstate(all="ignore"):
            atoms.calc.reset()
            atoms.set_cell(state.cell)
            atoms.set_positions(state.positions, apply_constraint=False)
            atoms.set_momenta(state.momenta, apply_constraint=False)
            dynamics = _integrator(atoms, job, temperature, generator)
            if job.pressure is not None and state.step:
                dynamics.p_eps = state.cell_momentum[()]
            for _ in range(job.steps_per_segment):
                dynamics.step()
                step += 1
                _check_sane(atoms, job, limit, step, volume)
            energy = float(atoms.get_potential_energy())
            forces = atoms.get_forces(apply_constraint=False).copy()
    except DivergenceError:
        raise
    except Exception as error:
        # Calculators fail in their own ways on positions that are not finite.
        if np.isfinite(atoms.positions).all():
            raise
        raise _diverged(job, "positions are not finite", step) from error
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        raise _diverged(job, "the calculator's energy or forces are not finite", step)
    return MDState(
        positions=atoms.positions.copy(),
        momenta=atoms.get_momenta(),
        cell=atoms.cell.array.copy(),
        cell_momentum=np.array(getattr(dynamics, "p_eps", 0.0), dtype=np.float64),
        generator=dump_generator(generator),
        step=step,
        energy=energy,
        forces=forces,
        temperature=temperature,
    )


def force_correlation(forces: np.ndarray, other: np.ndarray) -> float:
    """Cosine between two sets of forces, each (N, 3); zero if one of them vanishes."""
    norm = float(np.linalg.norm(forces) * np.linalg.norm(other))
    return float((forces * other).sum()) / norm if norm > 0.0 else 0.0


def _integrator(
    atoms: ase.Atoms, job: MDJob, temperature: float, generator: np.random.Generator
) -> LangevinBAOAB:
    arguments: dict = {}
    if job.thermostat_time is not None:
        time = job.thermostat_time * FS_IN_ASE_TIME
        arguments = {"temperature_K": temperature, "T_tau": time}
    if job.pressure is not None:
        tau = job.barostat_time * FS_IN_ASE_TIME
        hottest = max(as_pair(job.temperature))
        arguments |= {
            "externalstress": -job.pressure * GPA,
            "hydrostatic": job.isotropic,
            "P_tau": tau,
            # Martyna, Tobias and Klein's choice, the same in all segments of a ramp.
            "P_mass": 3.0 * (len(atoms) + 1) * BOLTZMANN * hottest * tau**2,
        }
    with warnings.catch_warnings():
        # ASE warns that constraints are untested: fixed atoms at constant volume are.
        warnings.filterwarnings("ignore", message=".*has not been.*", category=UserWarning)
        timestep = job.timestep * FS_IN_ASE_TIME
        return LangevinBAOAB(atoms, timestep=timestep, rng=generator, **arguments)


def _check_sane(atoms: ase.Atoms, job: MDJob, limit: float, step: int, volume: float) -> None:
    """Raise `DivergenceError` if atoms are lost, far too hot, or their cell collapses."""
    kinetic = atoms.get_kinetic_energy()
    if not (np.isfinite(atoms.positions).all() and np.isfinite(kinetic)):
        raise _diverged(job, "positions or velocities are not finite", step)
    degrees = max(1, atoms.get_number_of_degrees_of_freedom())  # fixed atoms have none
    temperature = 2.0 * kinetic / (degrees * BOLTZMANN)
    if temperature > limit:
        raise _diverged(job, f"the temperature reached {temperature:.0f} K", step)
    if job.pressure is None:
        return
    ratio = atoms.get_volume() / volume
    if not _COLLAPSED < ratio < _BOILED:
        raise _diverged(job, f"the volume changed by a factor of {ratio:.2g}", step)


def _diverged(job: MDJob, what: str, step: int) -> DivergenceError:
    allow = ", or set allow_dissociation if this is intended" if "apart" in what else ""
    return DivergenceError(
        f"the job '{job.name}' exploded after {step * job.timestep:g} fs ({what}): choose a "
        f"timestep below {job.timestep:g} fs, a lower temperature or a better starting structure"
        f"{allow}"
    )


# -- checkpoints ---------------------------------------------------------------------------------


class History:
    """The segments of a run so far, one file each; without a folder they stay in memory.

    A file holds the state at the end of a segment, and whether it was taken as a frame. States
    that were not taken are removed once the next one is safe.

    Parameters
    ----------
    folder : Path, optional
        Made if it does not exist; segments in it are read.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.taken: list[MDState] = []
        self.last: MDState | None = None
        self.n_segments = 0
        self._spare: Path | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("segment_*.npz")):
            arrays = read_arrays(path)
            self._add(_state_from_arrays(arrays), taken=bool(arrays["taken"]), path=path)
            self.n_segments = int(arrays["segment"]) + 1

    def append(self, state: MDState, *, taken: bool) -> None:
        """Keep the state at the end of a segment."""
        path, spare = None, self._spare
        if self.folder is not None:
            path = self.folder / f"segment_{self.n_segments:06d}.npz"
            arrays = {name: np.array(value) for name, value in vars(state).items()}
            arrays |= {"taken": np.array(taken), "segment": np.array(self.n_segments)}
            write_arrays(path, arrays)
            if spare is not None:
                spare.unlink(missing_ok=True)
        self._add(state, taken=taken, path=path)
        self.n_segments += 1

    def _add(self, state: MDState, *, taken: bool, path: Path | None) -> None:
        self.last = state
        self._spare = None if taken else path
        if taken:
            self.taken.append(state)


def _state_from_arrays(arrays: dict[str, np.ndarray]) -> MDState:
    scalars: dict[str, Any] = {"generator": str, "step": int, "energy": float, "temperature": float}
    values = {field.name: arrays[field.name] for field in fields(MDState)}
    return MDState(**{name: scalars.get(name, np.asarray)(x) for name, x in values.items()})
