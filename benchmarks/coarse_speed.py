r"""What the dynamics of beads costs: GROMACS with all atoms, an ensemble, its student, LAMMPS.

    potstill coarse train studies/coarse_graining/reline.yaml --workers 2
    python benchmarks/coarse_speed.py --student runs/reline/STUDENT/best.pt \
        --ensemble runs/reline/ensemble.pt

One box of reline at 425 K, 2,280 atoms or 240 beads, on two cores, everything in turns:

- GROMACS with all atoms, the run of the reference (2 fs, PME) on two threads, without output but
  for a frame per ps; its own ns/day over the second half of the run;
- student and ensemble in replicas (`potstill md --n-replicas`), in one process, and two at a time;
- the student in `pair_style potstill` with Langevin's thermostat, two runs at a time of one rank
  each, and one run on two ranks, with every time step.

Numbers are medians over rounds, and the best round, which feels other jobs least. Before, LAMMPS
shows what a time step is worth: kinetic temperature and mean potential energy with the thermostat,
drift and fluctuation of the total energy without. A run that is fast and wrong is worth nothing;
`--rounds 0` measures this alone, of as many time steps as one likes.

`--settings` measures untrained students with the prior of the student instead, and a thread of
GROMACS: processor time, the least of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lammps_speed import Loop, read_loops
from pareto import ROOT

from potstill.checkpoint import load_potential
from potstill.core import instruction_set
from potstill.deploy import deploy
from potstill.deploy.lammps import lammps_data
from potstill.deploy.lammps_build import build_plugin, find_lammps
from potstill.errors import PotstillError
from potstill.evaluate.tools import machine_description, set_temperature
from potstill.models import HIPNN, MeanPotential, Potential, build_model, summands
from potstill.sample.replicas import ReplicaSettings, run_replicas
from potstill.store import LabeledStore
from potstill.structures import Structures
from potstill.units import BOLTZMANN
from potstill.workflows.lammps_check import LammpsRun

RESULTS = Path(__file__).parent / "results" / "coarse.json"
TEMPERATURE = 425.0  # K
CORES = 2
#: Of `--settings`: a student for LAMMPS, and what is changed of it, one at a time.
SMALL = {
    "dist_hard_max": 8.0,
    "l_max": 1,
    "n_features": 16,
    "n_sensitivities": 8,
    "n_channels": 8,
    "n_triples": 8,
    "n_high_sensitivities": 6,
    "n_atom_layers": 1,
}
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    *({"dist_hard_max": cutoff} for cutoff in (7.0, 10.0, 12.0)),
    *({"l_max": rank} for rank in (0, 2)),
    *({"n_features": n} for n in (8, 32)),
    {"n_channels": 16},
    {"n_sensitivities": 12},
    {"first_high_rank": 1, "n_high_sensitivities": 4},
    *({"n_atom_layers": n} for n in (0, 2)),
)
FS_PER_DAY_AND_MS = 86.4e6  # ms in a day, so that fs / ms times it is fs a day
GOALS = {"ensemble_over_student": 5.0, "gromacs_over_lammps": 100.0}

# One bead per molecule hardly moves 0.1 Å in a step of 10 fs: a wide skin lasts ten to twenty.
_BEADS = """\
units metal
atom_style atomic
read_data start.data
PAIR
neighbor SKIN bin
neigh_modify delay 0 every 1 check yes
timestep TIMESTEP
fix move all nve
fix bath all langevin TEMPERATURE TEMPERATURE 1.0 SEED
thermo_style custom step temp etotal
thermo_modify format float %.10g
"""
_SPEED = "thermo 1000000\nrun UNCOUNTED\nrun STEPS\n"
_PHYSICS = """\
run UNCOUNTED
thermo 20
run STEPS
unfix bath
run STEPS
"""


def ns_per_day(timestep: float, ms: float) -> float:
    """Of one box whose step of `timestep` fs takes `ms` milliseconds."""
    return 1e-6 * FS_PER_DAY_AND_MS * timestep / ms


def threads(n: int) -> dict[str, str]:
    """The environment of a process of so many threads."""
    return os.environ | {"OMP_NUM_THREADS": str(n)}


# -- GROMACS ---------------------------------------------------------------------------------------


def gromacs_speed(tpr: Path, n_steps: int, n_threads: int = CORES) -> float:
    """ns/day of so many steps; those of the first half are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["gmx", "mdrun", "-s", str(tpr.resolve()), "-nsteps", str(n_steps), "-noconfout"]
        command += ["-ntmpi", "1", "-ntomp", str(n_threads), "-resethway", "-cpt", "-1"]
        done = subprocess.run(
            command, cwd=folder, env=threads(n_threads), capture_output=True, text=True, check=False
        )
        log = Path(folder, "md.log")
        text = log.read_text(errors="replace") if log.is_file() else done.stderr
    found = re.search(r"^Performance:\s+(\S+)", text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"gmx mdrun has told no performance:\n{text[-2000:]}")
    return float(found[1])


def gromacs_version() -> str:
    """Version and instruction set of `gmx`."""
    text = subprocess.run(["gmx", "--version"], capture_output=True, text=True, check=True).stdout
    lines = dict(re.findall(r"^([\w ]+):\s+(\S.*)$", text, re.MULTILINE))
    return f"{lines['GROMACS version']}, {lines['SIMD instructions']}"


# -- replicas --------------------------------------------------------------------------------------


def start_of(beads: Path, n: int = 1) -> Structures:
    """Frames of the mapped trajectory, far from one another."""
    store = LabeledStore.open(beads).structures()
    return store.select(np.linspace(0, store.n_systems - 1, n + 2, dtype=int)[1:-1].tolist())


def potential_of(files: Sequence[Path]) -> Potential:
    """The potential of a checkpoint, or the mean of several."""
    loaded = {str(k): load_potential(file)[0] for k, file in enumerate(files)}
    return MeanPotential(loaded) if len(loaded) > 1 else loaded["0"]


def replicas_work(options: argparse.Namespace) -> None:
    """Print the ms that a step of one replica takes, in a process of its own."""
    potential = potential_of(options.work)
    start = start_of(options.beads, options.n_replicas)
    settings = ReplicaSettings(
        TEMPERATURE, 1, timestep=options.timesteps[-1], stride=50 * options.timesteps[-1]
    )
    run_replicas(start, potential, settings)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < options.seconds:
        run_replicas(start, potential, replace(settings, seed=count))
        count += settings.steps_per_frame
    print("ms:", 1e3 * (time.perf_counter() - began) / (count * options.n_replicas))


def replicas_speed(options: argparse.Namespace, files: Sequence[Path], n: int) -> list[float]:
    """Milliseconds per step and replica of each of `n` processes at a time."""
    command = [sys.executable, __file__, "--work", *map(str, files), "--beads", str(options.beads)]
    command += ["--seconds", str(options.seconds), "--n-replicas", str(options.n_replicas)]
    command += ["--timesteps", str(options.timesteps[-1])]

    def one(_: int) -> float:
        done = subprocess.run(command, env=threads(1), capture_output=True, text=True, check=False)
        found = re.search(r"^ms: (\S+)", done.stdout, re.MULTILINE)
        if found is None:
            raise SystemExit(f"replicas of {files[0]} failed:\n{done.stderr[-2000:]}")
        return float(found[1])

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))


# -- LAMMPS ----------------------------------------------------------------------------------------


class Beads:
    """The student in LAMMPS."""

    def __init__(
        self, options: argparse.Namespace, folder: Path, changes: dict[str, Any] | None = None
    ) -> None:
        lammps = find_lammps()
        plugin = build_plugin(lammps)
        potential, info = load_potential(options.student)
        if changes is not None:
            potential = untrained(potential, changes)
        self.names, self.skin = potential.species_table.names, options.skin
        model = deploy(potential, "lammps", folder, "student", info)[0]
        self.run = LammpsRun(lammps, plugin, model, self.names, folder)
        self.start = start_of(options.beads).to_ase()[0]
        set_temperature(self.start, TEMPERATURE, np.random.default_rng(0))
        self.n_beads = len(self.start)

    def loops(
        self,
        script: str,
        timestep: float,
        steps: int,
        uncounted: int,
        seed: int,
        n_ranks: int = 1,
    ) -> list[Loop]:
        """What LAMMPS prints of every `run` of a script."""
        run = replace(self.run, folder=self.run.folder / f"run-{seed}", n_ranks=n_ranks)
        run.folder.mkdir(parents=True, exist_ok=True)
        data = re.sub(".* xy xz yz\n", "", lammps_data(self.start, self.names)[0])
        (run.folder / "start.data").write_text(data, encoding="utf-8")
        values = {"SKIN": self.skin, "TIMESTEP": 1e-3 * timestep, "TEMPERATURE": TEMPERATURE}
        values |= {"SEED": 1000 + seed, "UNCOUNTED": uncounted, "STEPS": steps}
        for word, value in values.items():
            script = script.replace(word, str(value))
        return read_loops(run.output(script))

    def speed(self, timestep: float, steps: int, n_runs: int, n_ranks: int) -> list[Loop]:
        """So many steps of several runs at a time."""

        def one(k: int) -> Loop:
            return self.loops(_BEADS + _SPEED, timestep, steps, 100, k + 1, n_ranks)[-1]

        with ThreadPoolExecutor(n_runs) as pool:
            return list(pool.map(one, range(n_runs)))

    def physics(self, timestep: float, duration: float) -> dict[str, float | str]:
        """What the time step does to temperature and energy, over `duration` ps each."""
        steps = round(1e3 * duration / timestep)
        warm = round(5e3 / timestep)
        try:
            _, bath, free = self.loops(_BEADS + _PHYSICS, timestep, steps, warm, 1)
        except PotstillError as error:
            return {"failed": str(error)}
        potential = bath.thermo[:, 2] - self.kinetic(bath.thermo[:, 1])
        ps = 1e-3 * timestep * (free.thermo[:, 0] - free.thermo[0, 0])
        drift, _ = np.polyfit(ps, free.thermo[:, 2], 1)
        return {
            "temperature": float(bath.thermo[:, 1].mean()),
            "temperature_error": block_error(bath.thermo[:, 1]),
            "potential_meV_per_bead": 1e3 * float(potential.mean()) / self.n_beads,
            "potential_error": 1e3 * block_error(potential) / self.n_beads,
            "nve_temperature": float(free.thermo[:, 1].mean()),
            "nve_drift_meV_per_bead_and_ns": 1e6 * float(drift) / self.n_beads,
            "nve_rms_meV_per_bead": 1e3 * float(free.thermo[:, 2].std()) / self.n_beads,
            "duration_ps": duration,
        }

    def kinetic(self, kelvin: np.ndarray) -> np.ndarray:
        """Kinetic energy, eV; the center of mass has none."""
        return 1.5 * (self.n_beads - 1) * BOLTZMANN * kelvin


def untrained(potential: Potential, changes: dict[str, Any]) -> Potential:
    """A potential with a new network in the place of its own, which hardly pushes the beads."""
    (name,) = (key for key, part in potential.parts.items() if isinstance(part, HIPNN))
    hyper = {**potential[name].hyperparameters(), **SMALL, **changes}
    hyper["n_high_sensitivities"] = min(hyper["n_high_sensitivities"], hyper["n_sensitivities"])
    network = build_model("hipnn", potential.species_table, hyper).eval()
    with torch.no_grad():
        for parameter in network.energy_layers.parameters():
            parameter *= 0.01
    potential.parts[name] = network
    return potential


def block_error(values: np.ndarray, n_blocks: int = 10) -> float:
    """Standard error of a mean from blocks in time."""
    means = [block.mean() for block in np.array_split(values, n_blocks)]
    return float(np.std(means, ddof=1) / np.sqrt(n_blocks))


# -- settings ------------------------------------------------------------------------------------


def gromacs_processor(tpr: Path, n_steps: int) -> float:
    """Processor ms of a step on one thread."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    gromacs_speed(tpr, n_steps, 1)
    return 1e3 * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began) / n_steps


def settings_cost(options: argparse.Namespace) -> dict[str, Any]:
    """Processor ms of a step in LAMMPS, by what differs from the small student."""
    costs: dict[str, list[float]] = {}
    timestep = options.timesteps[-1]
    with tempfile.TemporaryDirectory() as folder:
        beads = {
            json.dumps(changes): Beads(options, Path(folder) / str(k), changes)
            for k, changes in enumerate(SETTINGS)
        }
        for k in range(options.rounds):
            print(f"round {k + 1} of {options.rounds}", flush=True)
            for name, one in beads.items():
                (loop,) = one.speed(timestep, 2000, 1, 1)
                costs.setdefault(name, []).append(1e3 * loop.times.processor)
            if shutil.which("gmx"):
                tpr = options.gromacs / "reline_425K.tpr"
                costs.setdefault("GROMACS", []).append(gromacs_processor(tpr, 1500))
    return {name: min(each) for name, each in costs.items()}


# -- all in turns ----------------------------------------------------------------------------------


def contestants(
    options: argparse.Namespace, beads: Beads | None
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What takes turns: each gives ns/day of all cores in use, and ms per step of one box."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}

    def gromacs() -> dict[str, Any]:
        speed = gromacs_speed(options.gromacs / "reline_425K.tpr", options.gromacs_steps)
        return {"ns_per_day": speed, "ms": ns_per_day(2.0, 1.0) / speed}

    def replicas(files: Sequence[Path], n: int) -> dict[str, Any]:
        each = replicas_speed(options, files, n)
        speed = sum(ns_per_day(options.timesteps[-1], ms) for ms in each)
        return {"ns_per_day": speed, "ms": statistics.mean(each)}

    def lammps(timestep: float, n_runs: int, n_ranks: int) -> dict[str, Any]:
        assert beads is not None
        # Two ranks on a busy machine wait for one another, a hundred times as long as they work.
        guess = beads.speed(timestep, 100, n_runs, n_ranks)[0].times.clock
        steps = int(np.clip(options.seconds / guess, 100, 1e3 * options.seconds / 0.1))
        loops = beads.speed(timestep, steps, n_runs, n_ranks)
        clock = [1e3 * loop.times.clock for loop in loops]
        return {
            "ns_per_day": sum(ns_per_day(timestep, ms) for ms in clock),
            "ms": statistics.mean(clock),
            "processor_ms": min(1e3 * loop.times.processor for loop in loops),
            "share": {k: v / sum(loops[0].parts.values()) for k, v in loops[0].parts.items()},
            "steps_per_build": loops[0].n_steps / max(1, loops[0].builds),
        }

    if shutil.which("gmx"):
        found["GROMACS, all atoms, 2 threads"] = gromacs
    else:
        print("There is no gmx on the path: GROMACS is left out.")
    potentials = {"student": [options.student], "ensemble": options.ensemble}
    for name, files in potentials.items():
        for n in range(1, CORES + 1) if files else ():
            label = f"{name}, replicas, {n} process{'es' if n > 1 else ''}"
            found[label] = lambda files=files, n=n: replicas(files, n)
    if beads is not None:
        for timestep in options.timesteps:
            for label, n_runs, n_ranks in (("2 runs", CORES, 1), ("2 ranks", 1, CORES)):
                found[f"student, LAMMPS, {timestep:g} fs, {label}"] = (
                    lambda t=timestep, n=n_runs, r=n_ranks: lammps(t, n, r)
                )
    return found


def in_turns(work: dict[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, Any]:
    """Medians over rounds; who comes first changes."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in work}
    names = list(work)
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(work[name]())
            last = found[name][-1]
            print(f"round {k + 1}: {name}: {last['ns_per_day']:.0f} ns/day", flush=True)
    rows = {}
    for name, results in found.items():
        speeds = [r["ns_per_day"] for r in results]
        best = max(results, key=lambda r: r["ns_per_day"])
        rows[name] = best | {
            "ns_per_day": statistics.median(speeds),
            "ns_per_day_best": max(speeds),
            "ms": statistics.median(r["ms"] for r in results),
            "ms_best": min(r["ms"] for r in results),
        }
        if "processor_ms" in best:
            rows[name]["processor_ms"] = min(r["processor_ms"] for r in results)
    return rows


def ratios_of(rows: dict[str, Any], timesteps: Sequence[float]) -> dict[str, Any]:
    """What the issue asks for: the student beside the ensemble, and beside GROMACS."""
    found: dict[str, Any] = {}

    def ratio(key: str, goal: str, fast: str, slow: str) -> None:
        if fast in rows and slow in rows:
            values = [rows[fast][k] / rows[slow][k] for k in ("ns_per_day", "ns_per_day_best")]
            found[key] = {"median": values[0], "best": values[1], "goal": GOALS[goal]}

    for n in ("1 process", "2 processes"):
        names = f"student, replicas, {n}", f"ensemble, replicas, {n}"
        ratio(f"student over ensemble, {n}", "ensemble_over_student", *names)
    for t in timesteps:
        for how in ("2 runs", "2 ranks"):
            names = f"student, LAMMPS, {t:g} fs, {how}", "GROMACS, all atoms, 2 threads"
            ratio(f"LAMMPS over GROMACS, {t:g} fs, {how}", "gromacs_over_lammps", *names)
    return found


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown for the docs."""
    lines = ["| | ns/day | best round | ms per step and box |", "|---|---:|---:|---:|"]
    for name, row in rows.items():
        speeds = f"{row['ns_per_day']:,.0f} | {row['ns_per_day_best']:,.0f}"
        lines.append(f"| {name} | {speeds} | {row['ms']:.3f} |")
    return "\n".join(lines)


def model_of(file: Path) -> dict[str, Any]:
    """Hyper-parameters and size of the network in a checkpoint."""
    network = next(part for part in summands(load_potential(file)[0]) if isinstance(part, HIPNN))
    return {"parameters": network.n_parameters} | network.hyperparameters()


# -- the command -----------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--student", type=Path, help="checkpoint")
    add("--ensemble", type=Path, nargs="+", help="checkpoint of all teachers, or of each")
    add("--beads", type=Path, help="mapped trajectory; by default beads.zarr beside the student")
    add("--gromacs", type=Path, default=ROOT.parent / "shared" / "data" / "reline")
    add("--gromacs-steps", type=int, default=12_000)
    add("--timesteps", type=float, nargs="+", default=[5.0, 10.0], help="fs; replicas: the last")
    add("--skin", type=float, default=3.0, help="Å, of LAMMPS")
    add("--n-replicas", type=int, default=10)
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=4.0, help="of a turn")
    add("--duration", type=float, default=100.0, help="ps, of each check of a time step")
    add("--settings", action="store_true", help="measure settings of untrained students")
    add("--out", type=Path, default=RESULTS)
    add("--work", type=Path, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.student is None and options.work is None:
        parser.error("the following arguments are required: --student")
    options.beads = options.beads or options.student.parents[1] / "beads.zarr"
    return options


def write(path: Path, record: dict[str, Any]) -> None:
    """Write results."""
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    options = arguments()
    if options.work:
        replicas_work(options)
        return
    if options.settings:
        record = json.loads(options.out.read_text()) if options.out.exists() else {}
        record["settings"] = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine_description(),
            "instructions": instruction_set(),
            "small": SMALL,
            "processor_ms": settings_cost(options),
        }
        write(options.out, record)
        print(json.dumps(record["settings"]["processor_ms"], indent=1))
        return
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine_description(),
        "instructions": instruction_set(),
        "threads": "one per process or rank; GROMACS two",
        "student": model_of(options.student),
        "n_replicas": options.n_replicas,
        "skin": options.skin,
        "rounds": options.rounds,
    }
    if shutil.which("gmx"):
        record["gromacs"] = gromacs_version()
    with tempfile.TemporaryDirectory() as folder:
        beads = None
        try:
            beads = Beads(options, Path(folder))
        except PotstillError as error:
            print(f"LAMMPS is left out: {error}")
        if beads is not None:
            record["lammps"] = beads.run.lammps.version
            record["n_beads"] = beads.n_beads
            record["time_steps"] = {
                f"{t:g}": beads.physics(t, options.duration) for t in (2.0, *options.timesteps)
            }
            print(json.dumps(record["time_steps"], indent=1), flush=True)
        if options.rounds:
            record["rows"] = in_turns(contestants(options, beads), options.rounds)
    record["ratios"] = ratios_of(record.get("rows", {}), options.timesteps)
    record["machine"]["load_average_at_the_end"] = os.getloadavg()[0]
    if options.out.exists() and "settings" in (old := json.loads(options.out.read_text())):
        record["settings"] = old["settings"]
    write(options.out, record)
    print(table(record.get("rows", {})))
    for name, ratio in record["ratios"].items():
        print(f"{name}: {ratio['median']:.1f} (best {ratio['best']:.1f}), goal {ratio['goal']:g}")


if __name__ == "__main__":
    main()
