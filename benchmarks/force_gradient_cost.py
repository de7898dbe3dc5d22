"""Time and peak memory of a training step: energies only, and the three gradients of a force loss.

    python benchmarks/force_gradient_cost.py --threads 2

A step is the loss and its gradient on one rattled aluminium supercell, without the optimizer. Each
point runs in a fresh process, because memory once taken is seldom given back; methods take turns
over several rounds, so that a busy machine hits all of them alike. Memory is the peak of the steps
above what the process held before the first. Numbers go to
`benchmarks/results/force_gradient_cost.json` with a description of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ase.build import bulk

from potstill.distill import LossTerm
from potstill.evaluate.base import machine_description
from potstill.models import Potential, build_model
from potstill.structures import Properties, SpeciesTable, Structures
from potstill.train import TrainingSet, TrainSettings
from potstill.train.devices import default_fabric
from potstill.train.force_gradient import ForceGradient, NetworkPasses
from potstill.train.objective import BatchLoss
from potstill.train.settings import ForceGradientSettings, ModelSettings

RESULTS = Path(__file__).parent / "results" / "force_gradient_cost.json"

#: The aluminium student of the teacher-student study, and ANI with the functions of ANI-Al.
MODELS = {
    "hipnn": ModelSettings(
        hyperparameters={
            "n_features": 24,
            "n_sensitivities": 10,
            "dist_soft_min": 1.8,
            "dist_soft_max": 7.0,
            "dist_hard_max": 7.5,
            "n_atom_layers": 2,
            "l_max": 1,
        }
    ),
    "ani": ModelSettings(
        kind="ani",
        hyperparameters={
            "radial_cutoff": 7.0,
            "angular_cutoff": 5.0,
            "eta_r": 43.9,
            "shifts_r": [1.2 + 0.18125 * k for k in range(32)],
            "eta_a": 6.5,
            "zeta": 69.4,
            "shifts_a": [1.2, 1.675, 2.15, 2.625, 3.1, 3.575, 4.05, 4.525],
            "shifts_z": [0.19634954 + 0.39269908 * k for k in range(8)],
            "hidden_widths": [96, 96, 64],
        },
    ),
}

ENERGY = LossTerm(property="energy")
FORCES = LossTerm(property="forces", weight=10.0)

#: What is compared: the terms of the loss, and how its gradient is taken.
METHODS = {
    "energies only": ((ENERGY,), ForceGradientSettings()),
    "backpropagation": ((ENERGY, FORCES), ForceGradientSettings()),
    "central difference, plain": (
        (ENERGY, FORCES),
        ForceGradientSettings(method="central_difference", folded=False),
    ),
    "central difference, folded": (
        (ENERGY, FORCES),
        ForceGradientSettings(method="central_difference", folded=True),
    ),
    "forward over reverse": (
        (ENERGY, FORCES),
        ForceGradientSettings(method="forward_over_reverse"),
    ),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    sizes = [2**k for k in range(5, 13)]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, help="powers of two")
    parser.add_argument("--precision", default="float32", choices=["float32", "float64"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds-per-point", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--timeout", type=float, default=600.0, help="s for each process")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    return parser.parse_args()


def supercell(n_atoms: int) -> TrainingSet:
    """Rattled aluminium of 4, 8, 16, ... atoms; labels are noise, on which no cost depends."""
    repeats = [1, 1, 1]
    while 4 * repeats[0] * repeats[1] * repeats[2] < n_atoms:
        repeats[repeats.index(min(repeats))] *= 2
    atoms = bulk("Al", cubic=True) * repeats
    if len(atoms) != n_atoms:
        raise SystemExit(f"sizes are 4, 8, 16, ... atoms, not {n_atoms}")
    atoms.rattle(0.1, seed=0)
    generator = torch.Generator().manual_seed(0)
    labels = {
        "energy": torch.zeros(1, dtype=torch.float64),
        "forces": torch.randn(n_atoms, 3, generator=generator, dtype=torch.float64),
    }
    return TrainingSet(Structures.from_ase(atoms), {"reference": Properties(labels)})


def make_network(model: str, precision: str) -> Potential:
    torch.manual_seed(0)
    settings = MODELS[model]
    table = SpeciesTable.from_symbols(["Al"])
    network = build_model(settings.kind, table, settings.hyperparameters)
    return network.to(getattr(torch, precision))


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Time and memory of one point, in this process."""
    torch.set_num_threads(job["threads"])
    terms, how = METHODS[job["method"]]
    network = make_network(job["model"], job["precision"])
    settings = TrainSettings(loss=terms, force_gradient=how)
    # The proxy is looked at every hundredth step: leave it out of the few that are timed.
    force_gradient = ForceGradient(how, network, watch=False)
    fabric = default_fabric()
    passes = fabric.setup_module(NetworkPasses(network))
    data = supercell(job["n_atoms"]).with_neighbors(network.cutoff + force_gradient.margin)
    batch = data.batch(torch.tensor([0]))

    def step() -> None:
        objective = BatchLoss(settings, 1, network, batch, fabric)
        gradient = force_gradient(passes, batch, objective.wanted, objective)
        network.zero_grad(set_to_none=True)
        gradient.backward(fabric, passes)

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    step()
    times, processor = [], []
    deadline = time.perf_counter() + job["seconds"]
    while len(times) < 3 or time.perf_counter() < deadline:
        started, used = time.perf_counter(), time.process_time()
        step()
        times.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return {
        "seconds": statistics.median(times),
        "fastest": min(times),
        "cpu_seconds": statistics.median(processor),  # of all threads
        "peak_bytes": resident("VmHWM") - before,
        "n_pairs": batch.neighbors.center.shape[0],
    }


def resident(field: str) -> int:
    """Bytes of one line of this process' status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def in_a_fresh_process(job: dict[str, Any], timeout: float) -> dict[str, float] | None:
    """The answer of a process of its own; None if it failed or took too long."""
    command = [sys.executable, __file__, "--point", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        print(done.stderr.strip().splitlines()[-1:], file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(model: str, n_atoms: int, rounds: dict[str, list[dict[str, float]]]) -> list[dict]:
    """One row per method: medians over rounds, and ratios to the first method there is."""
    rows = []
    for method, found in rounds.items():
        if not found:
            rows.append({"model": model, "n_atoms": n_atoms, "method": method, "failed": True})
            continue
        row = {
            "model": model,
            "n_atoms": n_atoms,
            "method": method,
            "n_pairs": found[0]["n_pairs"],
            "seconds": statistics.median(r["seconds"] for r in found),
            "fastest": min(r["fastest"] for r in found),
            "cpu_seconds": min(r["cpu_seconds"] for r in found),
            "peak_bytes": statistics.median(r["peak_bytes"] for r in found),
        }
        base = rows[0] if rows and "seconds" in rows[0] else row
        row["time_ratio"] = row["fastest"] / base["fastest"]
        row["cpu_ratio"] = row["cpu_seconds"] / base["cpu_seconds"]
        row["memory_ratio"] = row["peak_bytes"] / base["peak_bytes"]
        rows.append(row)
    return rows


def main() -> None:
    args = arguments()
    if args.point:
        print(json.dumps(measure(json.loads(args.point))))
        return
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine_description(),
        "environment": {
            name: os.environ.get(name, "not set")
            for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "OMP_WAIT_POLICY")
        },
        "threads": args.threads,
        "precision": args.precision,
        "models": {name: MODELS[name].model_dump() for name in args.models},
        "rows": [],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        for n_atoms in args.sizes:
            rounds: dict[str, list] = {method: [] for method in args.methods}
            for _ in range(args.rounds):
                for method, found in rounds.items():
                    job = {
                        "model": model,
                        "method": method,
                        "n_atoms": n_atoms,
                        "precision": args.precision,
                        "threads": args.threads,
                        "seconds": args.seconds_per_point,
                    }
                    answer = in_a_fresh_process(job, args.timeout)
                    if answer is not None:
                        found.append(answer)
            for row in summary(model, n_atoms, rounds):
                record["rows"].append(row)
                if "failed" in row:
                    print(f"{model:8s} {n_atoms:5d} {row['method']:28s} failed")
                    continue
                print(
                    f"{model:8s} {n_atoms:5d} {row['method']:28s} {1e3 * row['fastest']:9.2f} ms "
                    f"({row['time_ratio']:.2f} x; {row['cpu_ratio']:.2f} x of processor time)  "
                    f"{row['peak_bytes'] / 2**20:8.1f} MiB ({row['memory_ratio']:.2f} x)"
                )
            args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
