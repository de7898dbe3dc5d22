"""Does the way the force gradient is taken matter for float32 training? Final errors over seeds.

    python studies/force_gradient/float32_training.py --data DATA/mlearn --epochs 300 --out run/f32

A small HIP-NN learns energies, forces and stress of one element of the mlearn set (Zuo et al.,
J. Phys. Chem. A 124, 731 (2020)) by backpropagation, central differences (plain and folded) and
dual numbers, with the same seeds for all. A tenth of the training file validates, the test file
tests. A killed run goes on when the same command is given again; seeds and methods may be added.
The result is `results/float32_training.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from potstill.checkpoint import load_potential
from potstill.distill import LossTerm
from potstill.evaluate.errors import evaluate_errors
from potstill.readers import read, split_by_seed
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.settings import (
    EnergySettings,
    ForceGradientSettings,
    LearningRateSettings,
    ModelSettings,
    OptimizerSettings,
)
from potstill.train.state import versions

RESULTS = Path(__file__).parent / "results" / "float32_training.json"

METHODS = {
    "backpropagation": ForceGradientSettings(method="backpropagation"),
    "plain": ForceGradientSettings(method="central_difference", folded=False),
    "folded": ForceGradientSettings(method="central_difference", folded=True),
    "forward_over_reverse": ForceGradientSettings(method="forward_over_reverse"),
}

METRICS = ("energy_per_atom_mae", "energy_per_atom_rmse", "forces_mae", "forces_rmse")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the mlearn files")
    parser.add_argument("--element", default="Mo", choices=["Mo", "Si", "Cu"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[:3], choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("run/float32_training"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def settings_for(method: str, seed: int, epochs: int) -> TrainSettings:
    return TrainSettings(
        model=ModelSettings(
            hyperparameters={
                "n_features": 16,
                "n_sensitivities": 12,
                "dist_soft_min": 1.6,
                "dist_soft_max": 5.0,
                "dist_hard_max": 5.5,
                "n_atom_layers": 2,
                "l_max": 1,
            }
        ),
        energy=EnergySettings(zero="least_squares"),
        loss=(
            LossTerm(property="energy", weight=1.0),
            LossTerm(property="forces", weight=10.0),
            LossTerm(property="stress", weight=50.0),
        ),
        optimizer=OptimizerSettings(learning_rate=2e-3),
        learning_rate=LearningRateSettings(schedule="exponential", factor=0.01 ** (1.0 / epochs)),
        epochs=epochs,
        early_stopping=None,
        precision="float32",
        seed=seed,
        force_gradient=METHODS[method],
    )


def load(path: Path) -> TrainingSet:
    structures, labels = read(path, allow_partial=True)
    return TrainingSet(structures, {"reference": labels})


def one_run(
    folder: Path, settings: TrainSettings, parts: dict[str, TrainingSet]
) -> dict[str, float] | None:
    """Test errors and seconds of one run; None if it was interrupted."""
    done = folder / "test.json"
    if done.is_file():
        return json.loads(done.read_text())
    result = train(settings, parts["train"], parts["validation"], folder)
    if result.status == "interrupted":
        return None
    potential, _ = load_potential(result.best)
    test = parts["test"]
    report = evaluate_errors(potential, test.structures, {"reference": test.labels["reference"]})
    (channel,) = report.to_json()["channels"].values()
    record = {name: channel[name] for name in METRICS} | {"seconds": result.seconds}
    done.write_text(json.dumps(record))
    return record


def compare(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Mean and standard error by method, and differences from backpropagation in their errors."""
    summary: dict[str, Any] = {}
    for method, found in runs.items():
        summary[method] = {}
        for name in (*METRICS, "seconds"):
            values = [record[name] for record in found]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            summary[method][name] = {"mean": statistics.fmean(values), "standard_error": error}
    reference = summary.get("backpropagation", {})
    for method in summary:
        for name in METRICS if reference and method != "backpropagation" else ():
            one, other = summary[method][name], reference[name]
            if one["standard_error"] is None or other["standard_error"] is None:
                continue
            spread = math.hypot(one["standard_error"], other["standard_error"])
            one["difference_in_standard_errors"] = (one["mean"] - other["mean"]) / spread
    return summary


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    known = load(args.data / f"{args.element}_train.extxyz.gz")
    split = split_by_seed(len(known), {"train": 0.9, "validation": 0.1}, 0)
    parts = {name: known.select(index) for name, index in split.items()}
    parts["test"] = load(args.data / f"{args.element}_test.extxyz.gz")
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in args.methods}
    for seed in range(args.seeds):
        for method, found in runs.items():
            settings = settings_for(method, seed, args.epochs)
            folder = args.out / f"{args.element}-{args.epochs}" / f"{method}-seed{seed}"
            record = one_run(folder, settings, parts)
            if record is None:
                raise SystemExit("interrupted: the same command goes on from here")
            found.append(record)
            print(
                f"seed {seed} {method:22s} forces {record['forces_rmse']:.4f} eV/Å, energy "
                f"{1e3 * record['energy_per_atom_rmse']:.2f} meV/atom, {record['seconds']:.0f} s",
                flush=True,
            )
    record = {
        "command": " ".join(["python", *sys.argv]).replace(str(args.data), "DATA/mlearn"),
        "element": args.element,
        "epochs": args.epochs,
        "n_seeds": args.seeds,
        "n_structures": {name: len(part) for name, part in parts.items()},
        "settings": settings_for("backpropagation", 0, args.epochs).model_dump(mode="json"),
        "versions": versions(),
        "runs": runs,
        "summary": compare(runs),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    for method, metrics in record["summary"].items():
        for name in METRICS:
            entry = metrics[name]
            error = entry["standard_error"]
            text = f"{method:22s} {name:22s} {entry['mean']:.5f}"
            text += "" if error is None else f" +- {error:.5f}"
            if "difference_in_standard_errors" in entry:
                text += f"  ({entry['difference_in_standard_errors']:+.2f} standard errors away)"
            print(text)


if __name__ == "__main__":
    main()
