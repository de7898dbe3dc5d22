"""How near training comes to what the network can represent: a budget, and ten times as much.

    python benchmarks/training_budget.py --data DATA

The default HIP-NN (cutoff 5.2 Å) with the preset `student` on molybdenum of mlearn (Zuo et al., J.
Phys. Chem. A 124, 731 (2020)), whose frames are split as in `accuracy.py`. Ten times the steps of
the preset show what it leaves on the table; the last run has ten times its weight decay.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from accuracy import ELEMENTS, load

from potstill.checkpoint import load_potential
from potstill.evaluate.errors import evaluate_errors
from potstill.evaluate.tools import machine_description
from potstill.train import TrainSettings, train
from potstill.train.settings import PRESETS

STEPS: int = PRESETS["student"]["max_steps"]
DECAY: float = PRESETS["student"]["optimizer"]["weight_decay"]


def train_for(steps: int, weight_decay: float, seed: int, data: Path) -> dict[str, Any]:
    """Errors of training and test frames (eV/Å, meV/atom) and the processor time, s."""
    training, validation, test = load("Mo", data)
    settings = TrainSettings(
        preset="student",
        model={"hyperparameters": {"dist_hard_max": ELEMENTS["Mo"]["cutoff"]}},
        optimizer={"weight_decay": weight_decay},
        epochs=steps,
        max_steps=steps,
        seed=seed,
    )
    found: dict[str, Any] = {"steps": steps, "weight_decay": weight_decay, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        result = train(settings, training, validation, folder)
        potential = load_potential(result.best)[0]
        last = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])
    found |= {"epochs": result.epochs, "best_epoch": result.best_epoch}
    found["processor_seconds"] = last["processor_seconds"]
    for name, part in (("training", training), ("test", test)):
        errors = evaluate_errors(potential, part.structures, part.labels).own
        found[name] = {
            "force_rmse_eV_per_A": errors["forces_rmse"],
            "energy_rmse_meV_per_atom": 1e3 * errors["energy_per_atom_rmse"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of reference data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/training_budget.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in options.seeds:
        budgets = [(steps, DECAY) for steps in (STEPS // 4, STEPS, 10 * STEPS)]
        for steps, weight_decay in (*budgets, (STEPS, 10.0 * DECAY)):
            runs.append(train_for(steps, weight_decay, seed, options.data))
            print(runs[-1], flush=True)
    record = {
        "command": "python benchmarks/training_budget.py --data DATA",
        "machine": machine_description(),
        "runs": runs,
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
