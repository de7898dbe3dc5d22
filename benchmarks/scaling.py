"""Cost per atom of native HIP-NN against atoms, neighbors, sensitivities and features.

    OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=34359738368 MALLOC_TRIM_THRESHOLD_=34359738368 \
        python benchmarks/scaling.py --threads 2 --figure docs/figures

One step of molecular dynamics (ASE's calculator, moving atoms, neighbor list) and one of training
to forces (drawing the batch, the loss, its gradient, Adam) on rattled aluminium, float32. One
number of the student below changes at a time: 4,000 atoms in dynamics, 16 x 108 in training where
atoms stay the same. The points of a panel take turns over several rounds; medians go to
`benchmarks/results/scaling.json`, and with `--figure` the processor time of all threads, which
other jobs change little, into a figure.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import (
    Step,
    Times,
    crystals,
    environment,
    in_words,
    potstill_md,
    potstill_training,
    potstill_training_set,
    timed,
    us_per_atom,
)

from potstill.core import describe_core
from potstill.evaluate.tools import machine_description
from potstill.models import HIPNN
from potstill.neighbors import build_neighbor_list
from potstill.report.panels import Drawing, Look, Panel, Series
from potstill.report.plots import write_figure
from potstill.species import SpeciesTable
from potstill.structures import Structures

RESULTS = Path(__file__).parent / "results" / "scaling.json"

STUDENT: dict[str, Any] = {
    "n_features": 24,
    "n_sensitivities": 10,
    "n_atom_layers": 2,
    "dist_soft_min": 1.9,
    "dist_soft_max": 7.0,
    "dist_hard_max": 7.5,
    "l_max": 1,
}
REPEAT, N_SYSTEMS = 10, 16

#: Cells along an edge in dynamics; structures of 108 atoms in a batch.
REPEATS = (3, 4, 5, 7, 10, 14, 20, 29)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CUTOFFS = (4.5, 5.5, 6.5, 7.5, 9.0, 10.5)
SENSITIVITIES = (5, 10, 20, 40, 80)
FEATURES = (8, 16, 24, 32, 64, 128, 256)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="per round and point")
    parser.add_argument("--panels", nargs="+", default=list(PANELS), choices=list(PANELS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, help="folder for the figure")
    return parser.parse_args()


def student(**changes: Any) -> HIPNN:
    torch.manual_seed(0)
    network = HIPNN(SpeciesTable.from_symbols(["Al"]), **STUDENT | changes).float()
    network.use_core("native")
    return network


def neighbors_within(cutoff: float) -> float:
    """Mean number of neighbors of an atom."""
    structures = Structures.from_ase(crystals(1, 3))
    return build_neighbor_list(structures, cutoff).n_pairs / structures.n_atoms


#: One step, on how many atoms, and the number that a panel varies.
Point = tuple[float, int, Step]


def both(x: float, network: HIPNN) -> dict[str, Point]:
    training = potstill_training(network, potstill_training_set(N_SYSTEMS))
    return {
        "md": (x, 4 * REPEAT**3, potstill_md(network, REPEAT)),
        "training": (x, N_SYSTEMS * 108, training),
    }


def against_atoms() -> list[dict[str, Point]]:
    points: list[dict[str, Point]] = []
    for repeat in REPEATS:
        n_atoms = 4 * repeat**3
        points.append({"md": (n_atoms, n_atoms, potstill_md(student(), repeat))})
    for n_systems in BATCHES:
        n_atoms = 108 * n_systems
        step = potstill_training(student(), potstill_training_set(n_systems))
        points.append({"training": (n_atoms, n_atoms, step)})
    return points


def against_neighbors() -> list[dict[str, Point]]:
    return [
        both(neighbors_within(cutoff), student(dist_hard_max=cutoff, dist_soft_max=cutoff - 0.5))
        for cutoff in CUTOFFS
    ]


def against_sensitivities() -> list[dict[str, Point]]:
    return [both(n, student(n_sensitivities=n)) for n in SENSITIVITIES]


def against_features() -> list[dict[str, Point]]:
    return [both(n, student(n_features=n)) for n in FEATURES]


PANELS = {
    "atoms": against_atoms,
    "neighbors": against_neighbors,
    "sensitivities": against_sensitivities,
    "features": against_features,
}


def measure(name: str, rounds: int, seconds: float) -> dict[str, list[dict[str, float]]]:
    """Microseconds per atom of all points of a panel, of dynamics and of training."""
    points = [(kind, *point) for made in PANELS[name]() for kind, point in made.items()]
    for *_, step in points:
        step()  # fills caches
    times: list[list[Times]] = [[] for _ in points]
    for _ in range(rounds):
        for found, (*_, step) in zip(times, points, strict=True):
            found.append(timed(step, seconds))
    rows: dict[str, list[dict[str, float]]] = {"md": [], "training": []}
    for found, (kind, x, n_atoms, _) in zip(times, points, strict=True):
        row = {name: x, "n_atoms": n_atoms} | us_per_atom(found, n_atoms)
        rows[kind].append(row)
        print(f"{name:13s} {x:9.1f} {kind:9s} {in_words(row)}")
    return rows


STYLES = {
    "md": Look("molecular dynamics", "#0072B2", "o"),
    "training": Look("training to forces", "#D55E00", "s", "--"),
}


def draw(panels: dict[str, Any], folder: Path) -> None:
    drawn = []
    for name, rows in panels.items():
        series = [
            Series(kind, [r[name] for r in found], [r["processor"] for r in found], joined=True)
            for kind, found in rows.items()
        ]
        label = "processor time (µs per atom)"
        drawn.append(Panel(name, label, series, x_scale="log", y_scale="log"))
    drawing = Drawing("scaling", "Cost per atom", "", drawn, n_columns=2, height=2.8)
    with tempfile.TemporaryDirectory() as scratch:
        figure = write_figure(Path(scratch), drawing, STYLES)
        (folder / figure.png.name).write_bytes(figure.png.read_bytes())


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    record = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_description(),
        "core": describe_core(),
        "threads": args.threads,
        "environment": environment(),
        "student": STUDENT,
        "us_per_atom": {name: measure(name, args.rounds, args.seconds) for name in args.panels},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {args.output}")
    if args.figure is not None:
        draw(record["us_per_atom"], args.figure)


if __name__ == "__main__":
    main()
