"""Molecular dynamics of many replicas of a system at a time, at constant volume.

The integrator is Langevin's in the splitting BAOAB (Leimkuhler and Matthews, J. Chem. Phys. 138,
174102 (2013)), velocity Verlet without friction. Positions of a harmonic oscillator have the right
distribution at any timestep. Every replica has random numbers of its own, so that its trajectory
does not depend on how many others there are, and one that breaks down leaves the others alone.

Atoms need no atomic numbers: beads move as well, with the masses of the species table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator

from potstill.calculators import BatchCalculator
from potstill.errors import ConfigError, PotstillError
from potstill.models import Potential
from potstill.sample.base import (
    COLD,
    EXPLODED,
    Progress,
    SampledFrames,
    dump_generator,
    load_generator,
    make_generator,
    read_arrays,
    write_arrays,
)
from potstill.structures import Structures
from potstill.units import BOLTZMANN, FS_IN_ASE_TIME

#: Å: lists of liquids at long timesteps are worth more pairs that last longer.
_SKIN = 2.0

#: Says what is wrong with the frame of a replica, or nothing.
Watch = Callable[[Structures], str]


@dataclass(frozen=True)
class ReplicaSettings:
    """How replicas move.

    Parameters
    ----------
    temperature : float
        K.
    n_frames : int
        Frames of each replica.
    stride : float
        fs between frames.
    equilibration : float
        fs before the first stride begins.
    timestep : float
        fs; 5 to 10 for beads of whole molecules.
    thermostat_time : float, optional
        fs, the inverse of the friction; None for constant energy.
    seed : int
        Of velocities and thermostat.
    """

    temperature: float
    n_frames: int
    stride: float = 1000.0
    equilibration: float = 0.0
    timestep: float = 2.0
    thermostat_time: float | None = 1000.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "n_frames", "timestep", "thermostat_time"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"the {name} of replicas must be positive, not {value}")
        if self.stride < self.timestep or self.equilibration < 0.0:
            raise ConfigError(
                f"a stride of {self.stride:g} fs is shorter than the timestep of "
                f"{self.timestep:g} fs, or the equilibration is negative"
            )

    @property
    def steps_per_frame(self) -> int:
        """Steps of one stride."""
        return max(1, round(self.stride / self.timestep))


@dataclass(frozen=True)
class Breakdown:
    """When a replica broke down, fs, and why."""

    time: float
    reason: str


@dataclass(frozen=True)
class ReplicaRun:
    """What replicas left behind.

    Parameters
    ----------
    frames : SampledFrames
        Replica after replica, each in order of time; `group` is "replica 0" and so on. Those that
        broke down have fewer. Velocities are those of the same moment.
    breakdowns : tuple of Breakdown or None
        One per replica; None if it reached the end.
    temperature : tuple of float
        Mean kinetic temperature of each over its frames, K; NaN without any.
    n_atoms : int
        Of each.
    """

    frames: SampledFrames
    breakdowns: tuple[Breakdown | None, ...]
    temperature: tuple[float, ...]
    n_atoms: int


def run_replicas(
    start: Structures,
    potential: Potential | BaseCalculator,
    settings: ReplicaSettings,
    *,
    folder: Path | None = None,
    watch: Watch | None = None,
    progress: Progress | None = None,
) -> ReplicaRun:
    """Move replicas to their end.

    Parameters
    ----------
    start : Structures
        One system for each replica, all of the same atoms in the same order. At constant energy
        their own velocities are kept, where they have any; otherwise they are drawn.
    potential : Potential or ASE calculator
        A model that knows the species, or a calculator, which takes one system after the other.
    settings : ReplicaSettings
        How they move.
    folder : Path, optional
        For the states at the end of every stride: the same call resumes where an earlier one
        stopped, and gives the same.
    watch : callable, optional
        Looks at every frame of a replica; one with a symptom is moved no more.
    progress : callable, optional
        Called with (steps done, in all).

    Raises
    ------
    ConfigError
        If the replicas are not of the same atoms, or the potential has no energy to conserve.
    DataError
        If the potential does not know a species.
    """
    sizes = start.n_atoms_per_system
    species = start.species.view(start.n_systems, -1) if bool((sizes == sizes[0]).all()) else None
    if species is None or bool((species != species[0]).any()):
        raise ConfigError("replicas must be of the same atoms in the same order")
    if settings.thermostat_time is None:
        direct = isinstance(potential, Potential) and potential.direct_forces
        if direct or not getattr(potential, "conservative", True):
            raise ConfigError("direct forces do not conserve energy: give replicas a thermostat")
    replicas = _Replicas(start, potential, settings)
    each = settings.steps_per_frame
    n_before = -(-round(settings.equilibration / settings.timestep) // each)
    frames: list[_State] = []
    for segment in range(n_before + settings.n_frames):
        path = None if folder is None else folder / f"segment_{segment:06d}.npz"
        if path is not None and path.is_file():
            replicas.load(read_arrays(path))
        else:
            replicas.advance(each)
            replicas.look(watch)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_arrays(path, replicas.dump())
        if segment >= n_before:
            frames.append(replicas.state)
        if progress is not None:
            progress((segment + 1) * each, (n_before + settings.n_frames) * each)
    return _gather(start, frames, replicas, settings)


@dataclass(frozen=True)
class _State:
    """Positions and velocities (R, n, 3), Å and Å/fs, energies (R,), and who is still moving."""

    positions: np.ndarray
    velocities: np.ndarray
    energy: np.ndarray
    sound: np.ndarray
    step: int


class _OneByOne:
    """An ASE calculator in the place of a `BatchCalculator`."""

    def __init__(self, calculator: BaseCalculator) -> None:
        self.calculator = calculator

    def forget(self) -> None:
        """Let the calculator see a new system."""
        getattr(self.calculator, "reset", lambda: None)()

    def compute(self, structures: Structures) -> dict[str, torch.Tensor]:
        """Energies and forces, system by system."""
        energy, forces = [], []
        for atoms in structures.to_ase():
            atoms.calc = self.calculator
            energy.append(float(atoms.get_potential_energy()))
            forces.append(torch.from_numpy(atoms.get_forces(apply_constraint=False).copy()))
        return {
            "energy": torch.tensor(energy, dtype=torch.float64),
            "forces": torch.cat(forces).to(torch.float64),
        }


#: What moves, of a state.
_MOVING = ("positions", "velocities", "energy")


class _Replicas:
    """Replicas on their way; those that broke down stay where they were last seen."""

    def __init__(
        self,
        start: Structures,
        potential: Potential | BaseCalculator,
        settings: ReplicaSettings,
    ) -> None:
        n = start.n_systems
        self.start = self.names = start
        self.settings = settings
        self.calculator: BatchCalculator | _OneByOne
        if isinstance(potential, Potential):
            self.start = start.with_species_table(potential.species_table)
            self.calculator = BatchCalculator(potential, _SKIN)
        else:
            self.calculator = _OneByOne(potential)
        self.generators = [make_generator(settings.seed, k) for k in range(n)]
        self.breakdowns: list[Breakdown | None] = [None] * n
        self.masses = start.masses.numpy().reshape(n, -1, 1)
        self.free = start.free.numpy().reshape(n, -1, 1)
        # Å/fs: the width of the Maxwell-Boltzmann distribution.
        kT = BOLTZMANN * settings.temperature
        self.width = np.where(self.free, np.sqrt(kT / self.masses), 0.0) * FS_IN_ASE_TIME
        own = start.velocities
        if settings.thermostat_time is None and own is not None and bool(own.any()):
            velocities = np.where(self.free, own.numpy().reshape(n, -1, 3), 0.0)
        else:
            velocities = self.width * self._normal(range(n))
        self.state = _State(
            positions=start.positions.numpy().reshape(n, -1, 3).copy(),
            velocities=velocities,
            energy=np.full(n, np.nan),
            sound=np.ones(n, dtype=bool),
            step=0,
        )

    def _normal(self, replicas: range | np.ndarray) -> np.ndarray:
        shape = self.masses.shape[1], 3
        return np.stack([self.generators[k].standard_normal(shape) for k in replicas])

    def advance(self, n_steps: int) -> None:
        """Take steps of all replicas that are sound; those that explode drop out on the way.

        Neighbor lists are made anew at the start, so that a resumed run repeats an undisturbed one.
        """
        settings, dt = self.settings, self.settings.timestep
        friction = 0.0 if settings.thermostat_time is None else 1.0 / settings.thermostat_time
        decay = math.exp(-friction * dt)
        noise = math.sqrt(1.0 - decay**2)
        moving = np.flatnonzero(self.state.sound)
        x, v = self.state.positions[moving], self.state.velocities[moving]
        self.calculator.forget()
        forces = None
        for step in range(self.state.step + 1, self.state.step + n_steps + 1):
            if not len(moving):
                break
            kick = 0.5 * dt * FS_IN_ASE_TIME**2 * self.free[moving] / self.masses[moving]
            if forces is None:
                _, forces = self._compute(moving, x)
            with np.errstate(all="ignore"):  # overflows of atoms that explode are told in words
                v = v + kick * forces
                if friction:
                    x = x + 0.5 * dt * v
                    v = decay * v + noise * self.width[moving] * self._normal(moving)
                    x = x + 0.5 * dt * v
                else:
                    x = x + dt * v
                energy, forces = self._compute(moving, x)
                v = v + kick * forces
            sound = self._sound(moving, x, v, step)
            if not sound.all():
                moving, x, v, energy = (array[sound] for array in (moving, x, v, energy))
                forces = None
        if len(moving):
            self._put(moving, x, v, energy)
        self.state = replace(self.state, step=self.state.step + n_steps)

    def _compute(self, moving: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies and forces; NaN of replicas that cannot be computed."""
        start = self.start if len(moving) == len(self.start) else self.start.select(moving.tolist())
        structures = start.with_fields(positions=torch.from_numpy(x.reshape(-1, 3)))
        try:
            found = self.calculator.compute(structures)
        except PotstillError:  # positions that are not finite, or far too large
            if len(moving) == 1:
                return np.full(1, np.nan), np.full_like(x, np.nan)
            each = [self._compute(moving[k : k + 1], x[k : k + 1]) for k in range(len(moving))]
            energies, forces = zip(*each, strict=True)
            return np.concatenate(energies), np.concatenate(forces)
        return found["energy"].cpu().numpy(), found["forces"].cpu().numpy().reshape(x.shape)

    def _sound(self, moving: np.ndarray, x: np.ndarray, v: np.ndarray, step: int) -> np.ndarray:
        """Which replicas are neither lost nor far too hot; the others are stopped."""
        with np.errstate(all="ignore"):
            kelvin = self.kelvin(v, moving)
        finite = np.isfinite(x).all(axis=(1, 2)) & np.isfinite(kelvin)
        sound = finite & (kelvin < EXPLODED * max(self.settings.temperature, COLD))
        for at in np.flatnonzero(~sound):
            hot = f"the temperature reached {kelvin[at]:.0f} K"
            self._stop(int(moving[at]), step, hot if finite[at] else "positions are not finite")
        return sound

    def kelvin(self, velocities: np.ndarray, replicas: np.ndarray) -> np.ndarray:
        """Kinetic temperatures from velocities (R, n, 3), Å/fs, of some replicas."""
        twice = (self.masses[replicas] * velocities**2).sum(axis=(1, 2)) / FS_IN_ASE_TIME**2
        degrees = np.maximum(3.0 * self.free[replicas].sum(axis=(1, 2)), 1.0)
        return twice / (degrees * BOLTZMANN)

    def _put(self, replicas: np.ndarray, x: np.ndarray, v: np.ndarray, energy: np.ndarray) -> None:
        new = {name: getattr(self.state, name).copy() for name in _MOVING}
        for name, value in zip(_MOVING, (x, v, energy), strict=True):
            new[name][replicas] = value
        self.state = replace(self.state, **new)

    def _stop(self, replica: int, step: int, reason: str) -> None:
        self.breakdowns[replica] = Breakdown(step * self.settings.timestep, reason)
        sound = self.state.sound.copy()
        sound[replica] = False
        self.state = replace(self.state, sound=sound)

    def look(self, watch: Watch | None) -> None:
        """Stop those whose frames have symptoms."""
        if watch is None:
            return
        for k in np.flatnonzero(self.state.sound).tolist():
            positions, velocities = (
                torch.from_numpy(getattr(self.state, name)[k]) for name in _MOVING[:2]
            )
            frame = self.names[k].with_fields(positions=positions, velocities=velocities)
            if reason := watch(frame):
                self._stop(k, self.state.step, reason)

    def dump(self) -> dict[str, np.ndarray]:
        """All that is needed to go on."""
        times = [np.nan if b is None else b.time for b in self.breakdowns]
        return {
            **{name: np.array(value) for name, value in vars(self.state).items()},
            "generators": np.array([dump_generator(g) for g in self.generators]),
            "times": np.array(times),
            "reasons": np.array(["" if b is None else b.reason for b in self.breakdowns]),
        }

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Inverse of `dump`."""
        self.generators = [load_generator(str(state)) for state in arrays["generators"]]
        self.breakdowns = [
            Breakdown(float(time), str(reason)) if np.isfinite(time) else None
            for time, reason in zip(arrays["times"], arrays["reasons"], strict=True)
        ]
        own = {name: arrays[name] for name in (*_MOVING, "sound")}
        self.state = _State(**own, step=int(arrays["step"]))


def _gather(
    start: Structures, frames: list[_State], replicas: _Replicas, settings: ReplicaSettings
) -> ReplicaRun:
    """Sort frames by replica and time."""
    parts, times, energies, temperatures = [], [], [], []
    for k in range(start.n_systems):
        own = [state for state in frames if state.sound[k]]
        if not own:
            temperatures.append(math.nan)
            continue
        x, v = (np.stack([getattr(state, name)[k] for state in own]) for name in _MOVING[:2])
        temperatures.append(float(np.mean([replicas.kelvin(u[None], np.array([k])) for u in v])))
        time = [state.step * settings.timestep for state in own]
        moved = start.select([k] * len(own)).with_fields(
            positions=torch.from_numpy(x.reshape(-1, 3)),
            velocities=torch.from_numpy(v.reshape(-1, 3)),
            group=(f"replica {k}",) * len(own),
            frame_id=tuple(f"replica {k}: {t:g} fs" for t in time),
        )
        parts.append(moved)
        times += time
        energies += [float(state.energy[k]) for state in own]
    structures = Structures.concatenate(parts) if parts else start.select([])
    sampled = SampledFrames.independent(structures)
    target = math.nan if settings.thermostat_time is None else settings.temperature
    sampled = replace(
        sampled,
        temperature=torch.full_like(sampled.energy, target),
        energy=torch.tensor(energies, dtype=torch.float64),
        time=torch.tensor(times, dtype=torch.float64),
    )
    n = start.n_atoms // start.n_systems
    return ReplicaRun(sampled, tuple(replicas.breakdowns), tuple(temperatures), n)
