"""The choice of epsilon: errors of central differences for two models, losses and precisions.

    python studies/force_gradient/epsilon.py --data DATA/mlearn

HIP-NN on molybdenum and ANI on silicon (mlearn set) are trained for some epochs; then
`potstill.workflows.epsilon` scans epsilon for each in float64 and float32, with the paper's
quadratic loss and with RMSE + MAE of energy, forces and stress. The errors are relative, of the
whole gradient over some structures, against backpropagation in float64. ANI stands there twice: its
own activation, CELU, has a second derivative that jumps; softplus is smooth. The result is
`results/epsilon.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from potstill.checkpoint import load_potential
from potstill.models import Potential, SumPotential
from potstill.readers import read
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.epsilon import scan_epsilon
from potstill.train.initialize import initial_student
from potstill.train.settings import EnergySettings, OptimizerSettings
from potstill.train.state import versions

sys.path.insert(0, str(Path(__file__).parent))
from gradients import LOSS, MODELS

RESULTS = Path(__file__).parent / "results" / "epsilon.json"

CASES = {
    "HIP-NN, Mo": ("Mo", "hipnn l_max=1 layers=1", False),
    "ANI, Si": ("Si", "ani", False),
    "ANI with softplus, Si": ("Si", "ani", True),
}
EPSILONS = {
    "float64": (1e-7, 1e-6, 3e-6, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2),
    "float32": (1e-6, 3e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the mlearn files")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--structures", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def trained(
    settings: TrainSettings, data: TrainingSet, softened: bool
) -> tuple[Potential, TrainingSet]:
    """A network after some epochs, and the data less its offsets."""
    student, rest = initial_student(settings, data)
    if softened:
        smooth(student)
    with tempfile.TemporaryDirectory() as folder:
        start = None if not softened else student
        result = train(
            settings, data, data.select(torch.arange(0, len(data), 10)), folder, initial=start
        )
        trained, _ = load_potential(result.best)
    assert isinstance(trained, SumPotential)
    if softened:
        smooth(trained)  # files hold weights, not activations
    return trained["network"], rest


def smooth(network: nn.Module) -> None:
    """Replace CELU by softplus, which has derivatives of every order."""
    for name, child in network.named_children():
        if isinstance(child, nn.CELU):
            setattr(network, name, nn.Softplus())
        smooth(child)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]).replace(str(args.data), "DATA/mlearn"),
        "epochs": args.epochs,
        "versions": versions(),
        "scans": {},
    }
    for case, (element, model, softened) in CASES.items():
        structures, labels = read(args.data / f"{element}_train.extxyz.gz", allow_partial=True)
        data = TrainingSet(structures, {"reference": labels})
        settings = TrainSettings(
            model=MODELS[model],
            energy=EnergySettings(zero="least_squares"),
            loss=LOSS,
            optimizer=OptimizerSettings(learning_rate=3e-3),
            epochs=args.epochs,
            core="torch",
        )
        network, rest = trained(settings, data, softened)
        step = max(1, len(rest) // args.structures)
        drawn = rest.select(torch.arange(0, len(rest), step)[: args.structures])
        for precision, epsilons in EPSILONS.items():
            network.to(getattr(torch, precision))
            for loss in ("quadratic", "training"):
                scan = scan_epsilon(network, drawn, settings, loss=loss, epsilons=epsilons)
                record["scans"][f"{case}, {precision}, {loss}"] = scan.to_json()
                errors = "  ".join(
                    f"{e:.0e}: {g:.1e}" for e, g in zip(epsilons, scan.gradient or (), strict=True)
                )
                print(f"{case}, {precision}, {loss}: {errors}", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
