"""Time of GemNet-OC and GemNet-OC-small on one slab with an adsorbate.

    python benchmarks/gemnet_oc.py [--threads 1] [--rounds 5]

Platinum (111), 3 x 3 x 4 atoms, with methanol: 42 atoms, all cutoffs 12 Å, the caps of OC20, direct
and gradient forces, float32, random weights. Seconds on the clock and of processor time go to
`benchmarks/results/gemnet_oc.json`: medians and minima over rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ase.build import add_adsorbate, fcc111, molecule

from potstill.evaluate.tools import machine_description
from potstill.models import GemNetOC
from potstill.models.base import Edges
from potstill.models.gemnet_oc import PRESETS
from potstill.models.gemnet_oc.graphs import build_graphs
from potstill.neighbors import build_neighbor_list, pair_vectors
from potstill.structures import Structures

RESULTS = Path(__file__).parent / "results" / "gemnet_oc.json"


def slab() -> Structures:
    atoms = fcc111("Pt", (3, 3, 4), vacuum=8.0, periodic=True)
    add_adsorbate(atoms, molecule("CH3OH"), 2.2, "ontop")
    atoms.rattle(0.05, seed=1)
    atoms.set_tags([1] * 36 + [2] * 6)
    return Structures.from_ase(atoms)


def measure(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Seconds: median and minimum on the clock, and median of processor time."""
    call()
    clock, processor = [], []
    for _ in range(rounds):
        start = time.perf_counter(), time.process_time()
        call()
        clock.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return {
        "median": float(np.median(clock)),
        "minimum": min(clock),
        "processor": float(np.median(processor)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    structures = slab()
    neighbors = build_neighbor_list(structures, 12.0)
    r_ij = pair_vectors(structures, neighbors)
    result: dict = {"machine": machine_description(), "threads": options.threads, "models": {}}
    for name in ("gemnet_oc_small", "gemnet_oc"):
        for direct in (True, False):
            torch.manual_seed(0)
            hyperparameters = PRESETS[name] | {"direct_forces": direct}
            model = GemNetOC(structures.species_table, **hyperparameters)
            edges = Edges.of(structures, neighbors)
            graphs = build_graphs(edges, r_ij, structures.n_atoms, model.hyper)
            result["main_edges"] = graphs.main.n_edges
            result["quadruplets"] = len(graphs.quadruplets(r_ij).path_outer)

            def step(model: GemNetOC = model) -> None:
                found = model.predict(structures, neighbors, create_graph=True)
                (found["energy"].sum() + found["forces"].square().sum()).backward()

            def predict(model: GemNetOC = model) -> None:
                model.predict(structures, neighbors)

            result["models"][f"{name}, {'direct' if direct else 'gradient'} forces"] = {
                "prediction": measure(predict, options.rounds),
                "training step": measure(step, options.rounds),
            }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
