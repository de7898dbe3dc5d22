"""Time of a training step by backpropagation, eager and compiled by torch.compile.

    python benchmarks/compiled_training.py --threads 1

A step draws a batch of rattled aluminium cells and takes the loss of energies and forces and its
gradient, without the optimizer. Every model has its own process, in which eager and compiled steps
take turns over several rounds, so that a busy machine hits both alike. Code is made anew, in an
empty cache; a second process then times what it takes with the cache full. Numbers go to
`benchmarks/results/compiled_training.json` with a description of the machine.
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
from pathlib import Path
from typing import Any

import torch
from ase.build import bulk
from common import ANI_AL, STUDENT

from potstill.distill import LossTerm
from potstill.evaluate.tools import machine_description
from potstill.models import build_model
from potstill.species import SpeciesTable
from potstill.structures import Properties, Structures
from potstill.train import TrainingSet, TrainSettings
from potstill.train.compilation import CompiledPasses
from potstill.train.devices import default_fabric
from potstill.train.force_gradient import ForceGradient, NetworkPasses
from potstill.train.objective import BatchLoss
from potstill.train.settings import ForceGradientSettings, ModelSettings
from potstill.train.signals import bind_terms

RESULTS = Path(__file__).parent / "results" / "compiled_training.json"

#: ANI with the functions of ANI-Al, and the aluminium student of the teacher-student study.
MODELS = {
    "ani": ModelSettings(kind="ani", hyperparameters=ANI_AL),
    "hipnn": ModelSettings(hyperparameters=STUDENT),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--precision", default="float32", choices=["float32", "float64"])
    parser.add_argument("--cells", type=int, default=8, help="of 32 and 48 atoms, per batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    return parser.parse_args()


def cells(n: int) -> TrainingSet:
    """Rattled aluminium of two sizes; labels are noise, on which no cost depends."""
    frames = [bulk("Al", cubic=True) * (2, 2, 2 + k % 2) for k in range(n)]
    for k, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=k)
    structures = Structures.from_ase(frames)
    generator = torch.Generator().manual_seed(0)
    labels = {
        "energy": torch.zeros(n, dtype=torch.float64),
        "forces": torch.randn(structures.n_atoms, 3, generator=generator, dtype=torch.float64),
    }
    return TrainingSet(structures, {"reference": Properties(labels)})


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Times of one model, in this process."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    chosen = MODELS[job["model"]]
    table = SpeciesTable.from_symbols(["Al"])
    network = build_model(chosen.kind, table, chosen.hyperparameters)
    network.to(getattr(torch, job["precision"])).use_core("torch")
    settings = TrainSettings(
        loss=(LossTerm(property="energy"), LossTerm(property="forces", weight=10.0)),
        force_gradient=ForceGradientSettings(method="backpropagation"),
    )
    force_gradient = ForceGradient(settings.force_gradient, network)
    fabric = default_fabric()
    data = cells(4 * job["cells"]).with_neighbors(network.cutoff)
    generator = torch.Generator().manual_seed(0)
    ways = {"eager": NetworkPasses(network), "compiled": CompiledPasses(network)}
    passes = {name: fabric.setup_module(own) for name, own in ways.items()}

    def step(way: str, systems: torch.Tensor) -> float:
        started = time.perf_counter()
        batch = data.batch(systems)
        objective = BatchLoss(bind_terms(settings, network), 1, batch, fabric)
        gradient = force_gradient(passes[way], batch, objective.wanted, objective)
        network.zero_grad(set_to_none=True)
        gradient.backward(fabric, passes[way])
        return time.perf_counter() - started

    def draw() -> torch.Tensor:
        return torch.randperm(len(data), generator=generator)[: job["cells"]]

    first = step("compiled", draw())
    times: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(job["rounds"]):
        systems = draw()
        for way, found in times.items():
            found.append(step(way, systems))
    if not ways["compiled"].works:
        raise SystemExit("torch.compile failed")
    return {"first_step_seconds": first, **{f"{k}_seconds": v for k, v in times.items()}}


def in_a_process(job: dict[str, Any], cache: str) -> dict[str, Any]:
    """The answer of a process of its own, with its compiled code in a folder of its own."""
    command = [sys.executable, __file__, "--point", json.dumps(job)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    args = arguments()
    if args.point:
        print(json.dumps(measure(json.loads(args.point))))
        return
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_description(),
        "torch": torch.__version__,
        "environment": {
            name: os.environ.get(name, "not set")
            for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "OMP_WAIT_POLICY")
        },
        "threads": args.threads,
        "precision": args.precision,
        "cells_per_batch": args.cells,
        "models": {name: MODELS[name].model_dump() for name in args.models},
        "rows": [],
    }
    for model in args.models:
        job = {"model": model, **{k: vars(args)[k] for k in ("precision", "cells", "threads")}}
        with tempfile.TemporaryDirectory() as cache:
            cold = in_a_process(job | {"rounds": args.rounds}, cache)
            warm = in_a_process(job | {"rounds": 1}, cache)
        eager, compiled = (statistics.median(cold[f"{k}_seconds"]) for k in ("eager", "compiled"))
        row = {
            "model": model,
            "eager_seconds": eager,
            "compiled_seconds": compiled,
            "gain": eager / compiled,
            "first_step_seconds": cold["first_step_seconds"],
            "first_step_seconds_from_cache": warm["first_step_seconds"],
            "rounds": cold,
        }
        record["rows"].append(row)
        print(
            f"{model:6s} eager {1e3 * eager:8.1f} ms  compiled {1e3 * compiled:8.1f} ms "
            f"({row['gain']:.2f} x)  first step {row['first_step_seconds']:.0f} s, from the cache "
            f"{row['first_step_seconds_from_cache']:.0f} s",
            flush=True,
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
