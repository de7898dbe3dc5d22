"""Molecular dynamics in LAMMPS: the jobs of `potstill.sample.md`, for potentials that LAMMPS runs.

The frames are those that `MDJob` gives in ASE; integrator, neighbor list and potential are LAMMPS'
own, on one or several MPI ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.checkpoint import load_potential
from potstill.deploy import deploy
from potstill.deploy.lammps import BEAD_NEIGHBORS, STYLES, lammps_data
from potstill.deploy.lammps_build import Installation, build_plugin, find_lammps
from potstill.deploy.lammps_table import lammps_table
from potstill.errors import ConfigError, DataError, DivergenceError, ModelError
from potstill.evaluate.tools import is_checkpoint
from potstill.files import write_atomically
from potstill.lammps_library import LammpsPotential
from potstill.models import PairPotential, summands
from potstill.sample.base import Progress, SampledFrames, as_pair
from potstill.sample.md import MDJob
from potstill.sample.replicas import Breakdown, ReplicaRun, ReplicaSettings, Watch
from potstill.soundness import Connectivity, kinetic_temperatures
from potstill.structures import Structures
from potstill.teachers.ase import STATED

#: LAMMPS' unit of velocity in metal units, Å/ps, in Å/fs; its unit of pressure, bar, in GPa.
_VELOCITY, BAR = 1e-3, 1e-4

SCRIPT, DATA, LOG = "in.lammps", "structure.data", "log.txt"
DUMP, ENERGIES = "dump.txt", "energies.txt"

_HEAD = """\
units metal
atom_style atomic
boundary p p p
newton on
box tilt large
read_data {data}
{commands}
{neighbors}
timestep {timestep!r}
{velocities}
thermo {every}
thermo_style custom step temp pe etotal press density
"""

_ATOM_NEIGHBORS = "neighbor 1.0 bin\nneigh_modify delay 0 every 2 check yes"

_PRODUCTION = """\
{integrator}
fix energies all print {every} "$(step) $(pe:%.15g)" file {energies} screen no
dump frames all custom {every} {dump} id xu yu zu vx vy vz
dump_modify frames sort id format float %.12g
run {steps}
"""


@dataclass(frozen=True)
class LammpsEngine:
    """A potential and a LAMMPS that runs it.

    Parameters
    ----------
    potential : LammpsPotential
        In metal units, for atoms without charges.
    lammps : Installation
        Where to run.
    n_ranks : int
        MPI ranks.
    trained : mapping, optional
        Shortest distances in training by pair, Å.
    """

    potential: LammpsPotential
    lammps: Installation
    n_ranks: int = 1
    trained: Mapping[str, float] | None = None

    def script(self, job: MDJob, start: Structures, velocities: str = "") -> str:
        """Return the first lines of a script, up to what moves the atoms."""
        table = start.species_table
        known = dict(zip(table.names, table.masses.tolist(), strict=True))
        masses = [
            f"mass {k} {known[name]!r}  # the structure's, not the potential's"
            for k, name in enumerate(self.potential.elements, 1)
            if name in known
        ]
        return _HEAD.format(
            data=DATA,
            commands="\n".join([*self.potential.commands, *masses]),
            neighbors=_ATOM_NEIGHBORS if bool((start.atomic_numbers > 0).all()) else BEAD_NEIGHBORS,
            timestep=1e-3 * job.timestep,
            velocities=velocities,
            every=job.steps_per_segment,
        )

    def run(self, folder: Path, start: Structures, script: str) -> None:
        """Run a script from a structure in a folder, unless it has run there.

        Raises
        ------
        ModelError
            If LAMMPS ends with an error.
        """
        data = lammps_data(start.to_ase()[0], self.potential.elements)[0]
        digest = hashlib.blake2b(data.encode(), digest_size=12)
        for file in self.potential.files:
            digest.update(file.read_bytes())
        script = f"# Of structure and potential {digest.hexdigest()}\n{script}"
        done = folder / LOG
        if done.is_file() and self._alike((folder / SCRIPT).read_text(encoding="utf-8"), script):
            return
        done.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / DATA, data)
        write_atomically(folder / SCRIPT, script)
        write_atomically(done, self.lammps.run(folder, SCRIPT, self.n_ranks))

    def _alike(self, one: str, other: str) -> bool:
        """Whether two scripts are the same wherever their potential's files lie."""
        for file in self.potential.files:
            place = rf'[^\s"]*/{re.escape(file.name)}\b'
            one, other = (re.sub(place, file.name, script) for script in (one, other))
        return one == other


def lammps_engine(
    spec: str, args: Mapping[str, Any], folder: Path, *, n_ranks: int = 1
) -> LammpsEngine:
    """Make LAMMPS run a student, or a potential of its own.

    Parameters
    ----------
    spec, args : str, mapping
        A checkpoint, which is exported into the folder, or "lammps" and the arguments of that
        teacher.
    folder : Path
        For the exported model.
    n_ranks : int
        MPI ranks.

    Raises
    ------
    ConfigError
        If it is neither, or LAMMPS' units are not metal.
    ModelError
        If the pair style does not run the checkpoint.
    OptionalDependencyError
        If there is no LAMMPS.
    """
    lammps = find_lammps()
    if is_checkpoint(spec):
        potential, info = load_potential(spec)
        trained = (info.get("trained_on") or {}).get("shortest_distances")
        (first, *others) = summands(potential)
        if isinstance(first, PairPotential) and not others:
            file = deploy(potential, "lammps-table", folder, "model", info)[0].resolve()
            return LammpsEngine(lammps_table(first, file), lammps, n_ranks, trained)
        file = deploy(potential, "lammps", folder, "model", info)[0].resolve()
        names = potential.species_table.names
        plugin = LammpsPotential(
            pair_style=STYLES[file.suffix],
            pair_coeff=(f'* * "{file}" {" ".join(names)}',),
            elements=tuple(names),
            before=(f'plugin load "{build_plugin(lammps)}"',),
        )
        return LammpsEngine(plugin, lammps, n_ranks, trained)
    if spec != "lammps":
        raise ConfigError(
            f"LAMMPS runs checkpoints of potstill and the teacher 'lammps', not '{spec}': run its "
            "dynamics in ASE"
        )
    own = LammpsPotential.from_args({k: v for k, v in args.items() if k not in STATED})
    if own.units != "metal" or own.atom_style != "atomic":
        raise ConfigError(
            f"dynamics in LAMMPS are in units metal and without charges, not in {own.units} with "
            f"the atom style {own.atom_style}: run them in ASE"
        )
    return LammpsEngine(own, lammps, n_ranks)


def run_in_lammps(
    job: MDJob, start: Structures, engine: LammpsEngine, *, seed: int, folder: Path
) -> SampledFrames:
    """Run a job in LAMMPS and return its frames, whose positions are unwrapped.

    Constant temperature is LAMMPS' Langevin thermostat, constant pressure its Nosé-Hoover barostat.
    A finished run is read from its folder, an interrupted one begins anew.

    Parameters
    ----------
    job : MDJob
        Waiting for decorrelated forces is not possible.
    start : Structures
        One system, periodic and without fixed atoms.
    engine : LammpsEngine
        What to run.
    seed : int
        Of velocities and thermostat.
    folder : Path
        For the files of the run, `in.lammps`, `log.txt` and `dump.txt` among them.

    Raises
    ------
    ConfigError
        If LAMMPS cannot run the job as it is.
    DivergenceError
        If LAMMPS loses atoms, or a frame holds atoms that fused or came apart.
    """
    if job.max_force_correlation is not None:
        raise ConfigError(f"the job '{job.name}' waits for decorrelated forces: run it in ASE")
    if not bool(start.pbc.all()) or (start.fixed is not None and bool(start.fixed.any())):
        raise ConfigError(
            f"the job '{job.name}' runs in LAMMPS, which takes structures that are periodic along "
            "all three axes, without fixed atoms: run it in ASE"
        )
    keep = job.thermostat_time is None and start.velocities is not None
    keep = keep and bool(start.velocities.any())  # type: ignore[union-attr]
    first, last = as_pair(job.temperature)
    velocities = "" if keep else create_velocities(first, seed)
    script = engine.script(job, start, velocities)
    before = job.n_equilibration_segments * job.steps_per_segment
    if before:
        script += f"{_integrator(job, first, first, seed)}\nrun {before}\n"
        script += "unfix move\n" + ("unfix heat\n" if "fix heat" in script else "")
    script += _PRODUCTION.format(
        integrator=_integrator(job, first, last, seed + 1),
        every=job.steps_per_segment,
        steps=job.n_frames * job.steps_per_segment,
        energies=ENERGIES,
        dump=DUMP,
    )
    try:
        engine.run(folder, start, script)
    except ModelError as error:
        if any(word in str(error) for word in ("lost", "Lost", "Non-numeric", "NaN")):
            raise DivergenceError(f"the job '{job.name}' exploded: {error}") from None
        raise
    return _frames(job, start, folder, engine.trained)


def run_replicas_in_lammps(
    start: Structures,
    engine: LammpsEngine,
    settings: ReplicaSettings,
    folder: Path,
    *,
    watch: Watch | None = None,
    progress: Progress | None = None,
) -> ReplicaRun:
    """Do what `run_replicas` does by LAMMPS, one replica after the other.

    Frames are looked at when a replica has reached its end. Finished replicas are read from the
    folder.

    Parameters
    ----------
    start : Structures
        One periodic system for each replica.
    engine : LammpsEngine
        What moves them.
    settings, watch, progress
        As of `run_replicas`.
    folder : Path
        For the files of all runs.
    """
    common = {name: value for name, value in asdict(settings).items() if name != "seed"}
    job = MDJob(allow_dissociation=True, **common)
    parts: list[SampledFrames] = []
    breakdowns: list[Breakdown | None] = []
    temperatures = []
    for k in range(len(start)):
        own = folder / f"replica_{k}"
        try:
            found = run_in_lammps(job, start[k], engine, seed=settings.seed + k, folder=own)
        except DivergenceError as error:
            breakdowns.append(Breakdown(_last_time(own, job), str(error)))
            temperatures.append(math.nan)
        else:
            sound, breakdown = _until_symptom(found, watch)
            breakdowns.append(breakdown)
            frames = found.select(range(sound))
            parts.append(_of_replica(frames, k))
            kelvin = kinetic_temperatures(frames.structures)
            temperatures.append(float(kelvin.mean()) if sound else math.nan)
        if progress is not None:
            progress(k + 1, len(start))
    none = SampledFrames.independent(start.select([]))
    frames = SampledFrames.concatenate(parts) if parts else none
    return ReplicaRun(frames, tuple(breakdowns), tuple(temperatures), len(start[0].species))


def _until_symptom(found: SampledFrames, watch: Watch | None) -> tuple[int, Breakdown | None]:
    """How many frames of a replica are sound, and what the first of the others has."""
    if watch is None:
        return len(found), None
    for at in range(len(found)):
        if reason := watch(found.structures[at]):
            return at, Breakdown(float(found.time[at]), reason)
    return len(found), None


def _last_time(folder: Path, job: MDJob) -> float:
    """How far a run that LAMMPS gave up had come, fs: its last frame."""
    file = folder / ENERGIES
    steps = np.loadtxt(file, ndmin=2)[:, 0] if file.is_file() else np.zeros(0)
    return float(steps[-1]) * job.timestep if len(steps) else 0.0


def _of_replica(frames: SampledFrames, k: int) -> SampledFrames:
    """Frames with the name of their replica."""
    named = frames.structures.with_fields(
        group=(f"replica {k}",) * len(frames),
        frame_id=tuple(f"replica {k}: {t:g} fs" for t in frames.time.tolist()),
    )
    return replace(frames, structures=named)


def lammps_seed(seed: int) -> int:
    """A seed in the range that LAMMPS takes."""
    return seed % 899999 + 1


def create_velocities(temperature: float, seed: int) -> str:
    """The command that draws velocities at a temperature, K, without motion of the whole."""
    return f"velocity all create {temperature!r} {lammps_seed(seed)} mom yes rot no dist gaussian"


def _integrator(job: MDJob, first: float, last: float, seed: int) -> str:
    """Commands that move the atoms from one temperature to another one."""
    if job.thermostat_time is None:
        return "fix move all nve"
    heat, squeeze = 1e-3 * job.thermostat_time, 1e-3 * job.barostat_time
    if job.pressure is None:
        bath = f"{first!r} {last!r} {heat!r} {lammps_seed(seed)}"
        return f"fix move all nve\nfix heat all langevin {bath}"
    bar = job.pressure / BAR
    shape = "iso" if job.isotropic else "tri"
    return f"fix move all npt temp {first!r} {last!r} {heat!r} {shape} {bar!r} {bar!r} {squeeze!r}"


def _frames(
    job: MDJob, start: Structures, folder: Path, trained: Mapping[str, float] | None
) -> SampledFrames:
    rotation = lammps_data(start.to_ase()[0], start.species_table.names)[1]
    energy = np.loadtxt(folder / ENERGIES, ndmin=2)
    energies = dict(zip(energy[:, 0].astype(int).tolist(), energy[:, 1].tolist(), strict=True))
    whole, frames, times = Connectivity.of(start, trained), [], []
    for step, cell, rows in read_dump(folder / DUMP):
        if step == job.n_equilibration_segments * job.steps_per_segment:
            continue  # the structure that production starts from
        positions, velocities = rows[:, 1:4] @ rotation, _VELOCITY * rows[:, 4:7] @ rotation
        frame = replace(
            start,
            positions=torch.from_numpy(positions),
            velocities=torch.from_numpy(velocities),
            cell=torch.from_numpy((cell @ rotation)[None]),
            group=(job.name,),
            frame_id=(f"{job.name}: {step * job.timestep:g} fs",),
        )
        if symptom := whole.symptom(frame, apart=not job.allow_dissociation):
            raise DivergenceError(
                f"the job '{job.name}' exploded after {step * job.timestep:g} fs ({symptom}): "
                f"choose a timestep below {job.timestep:g} fs or a lower temperature"
            )
        frames.append(frame)
        times.append(step)
    if len(frames) != job.n_frames:
        raise DataError(f"{folder / DUMP} holds {len(frames)} frames, not {job.n_frames}")
    n = len(frames)
    first, last = as_pair(job.temperature)
    target = torch.linspace(first, last, n, dtype=torch.float64)
    still = torch.full((n,), torch.nan, dtype=torch.float64)
    return SampledFrames(
        structures=Structures.concatenate(frames),
        temperature=still if job.thermostat_time is None else target,
        pressure=still if job.pressure is None else torch.full_like(still, job.pressure),
        energy=torch.tensor([energies[step] for step in times], dtype=torch.float64),
        job=torch.zeros(n, dtype=torch.int64),
        time=torch.tensor(times, dtype=torch.float64) * job.timestep,
    )


def read_dump(path: Path) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Step, cell (3, 3) and columns (N, columns) of every frame of a text dump of numbers.

    Positions xu, yu, zu are from the lower corner of the box.

    Raises
    ------
    DataError
        If the file ends within a frame, or is no dump.
    """
    with path.open(encoding="utf-8") as file:
        found = []
        while line := file.readline():
            if not line.startswith("ITEM: TIMESTEP"):
                raise DataError(f"{path} is not a text dump of LAMMPS: '{line[:40].strip()}'")
            step = int(file.readline())
            file.readline()
            n = int(file.readline())
            file.readline()
            bounds = np.array([[*map(float, file.readline().split()), 0.0][:3] for _ in range(3)])
            xy, xz, yz = bounds[:, 2]
            low = bounds[:, 0] - [min(0.0, xy, xz, xy + xz), min(0.0, yz), 0.0]
            high = bounds[:, 1] - [max(0.0, xy, xz, xy + xz), max(0.0, yz), 0.0]
            edges = high - low
            cell = np.array([[edges[0], 0.0, 0.0], [xy, edges[1], 0.0], [xz, yz, edges[2]]])
            names = file.readline().split()[2:]
            values = "".join(itertools.islice(file, n)).split()
            if len(values) != n * len(names):
                raise DataError(f"{path} ends within the frame of step {step}")
            rows = np.array(values, dtype=float).reshape(n, -1)
            for axis, name in enumerate(("xu", "yu", "zu")):
                if name in names:
                    rows[:, names.index(name)] -= low[axis]
            found.append((step, cell, rows))
    return found
