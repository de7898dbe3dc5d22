"""How well directional derivatives give the gradient of a loss, by kind of structure, in float64.

    python studies/force_gradient/gradients.py --data DATA/mlearn

For HIP-NN (l_max 0 to 2, one and two interaction layers) and ANI, each trained for a few epochs on
one element of the mlearn set: the relative error of the gradient of RMSE + MAE of energy, forces
and stress of one structure at a time, against backpropagation. Structures stand in their groups,
because crystals near perfection lie where the norms of HIP-NN's tensors (l_max >= 1) and ANI's
activation bend sharply. The result is `results/gradients.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.checkpoint import load_potential
from potstill.distill import LossTerm
from potstill.models import Potential, SumPotential
from potstill.readers import read
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.devices import default_fabric
from potstill.train.force_gradient import DEFAULT_EPSILON, ForceGradient, NetworkPasses
from potstill.train.objective import BatchLoss
from potstill.train.settings import (
    EnergySettings,
    ForceGradientSettings,
    ModelSettings,
    OptimizerSettings,
    RegularizationSettings,
)
from potstill.train.signals import bind_terms
from potstill.train.state import versions

RESULTS = Path(__file__).parent / "results" / "gradients.json"

HIPNN = {
    "n_features": 12,
    "n_sensitivities": 10,
    "dist_soft_min": 1.8,
    "dist_soft_max": 4.7,
    "dist_hard_max": 5.0,
    "n_atom_layers": 2,
}
ANI = {
    "radial_cutoff": 5.0,
    "angular_cutoff": 3.5,
    "eta_r": 8.0,
    "shifts_r": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
    "eta_a": 6.0,
    "zeta": 8.0,
    "shifts_a": [1.8, 2.6],
    "shifts_z": [0.4, 1.2, 1.9, 2.7],
    "hidden_widths": [16, 12],
}
MODELS = {
    f"hipnn l_max={rank} layers={layers}": ModelSettings(
        hyperparameters=HIPNN | {"l_max": rank, "n_interaction_layers": layers}
    )
    for rank in (0, 1, 2)
    for layers in (1, 2)
} | {"ani": ModelSettings(kind="ani", hyperparameters=ANI)}

METHODS = {
    "forward over reverse": ForceGradientSettings(method="forward_over_reverse"),
    "plain": ForceGradientSettings(method="central_difference", folded=False),
    "folded": ForceGradientSettings(method="central_difference", folded=True),
}

LOSS = (
    LossTerm(property="energy", weight=1.0),
    LossTerm(property="forces", weight=10.0),
    LossTerm(property="stress", weight=50.0),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the mlearn files")
    parser.add_argument("--element", default="Mo", choices=["Mo", "Si", "Cu"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--per-group", type=int, default=10, help="structures of each group")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def trained(model: ModelSettings, data: TrainingSet, epochs: int) -> tuple[Potential, TrainingSet]:
    """A network after some epochs, in float64, and the data less its offsets."""
    settings = TrainSettings(
        model=model,
        energy=EnergySettings(zero="least_squares"),
        loss=LOSS,
        optimizer=OptimizerSettings(learning_rate=3e-3),
        epochs=epochs,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train(settings, data, data.select(torch.arange(0, len(data), 10)), folder)
        potential, _ = load_potential(result.best)
    assert isinstance(potential, SumPotential)
    offsets = SumPotential({"offsets": potential["offsets"]})
    return potential["network"].double(), data.minus(offsets)


def gradient(network: Potential, data: TrainingSet, how: ForceGradientSettings) -> Tensor:
    """(n_parameters,) gradient of the loss of all of `data` as one batch."""
    fabric = default_fabric()
    method = ForceGradient(how, network, watch=False)
    settings = TrainSettings(loss=LOSS, regularization=RegularizationSettings(l2=0.0))
    batch = data.with_neighbors(network.cutoff + method.margin).batch(torch.arange(len(data)))
    passes = fabric.setup_module(NetworkPasses(network))
    objective = BatchLoss(bind_terms(settings, network), 1, batch, fabric)
    network.zero_grad(set_to_none=True)
    method(passes, batch, objective.wanted, objective).backward(fabric, passes)
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def errors_by_group(network: Potential, data: TrainingSet, per_group: int) -> dict[str, Any]:
    """Median and largest relative error of each method in each group."""
    groups = data.structures.group or ("all",) * len(data)
    found: dict[str, Any] = {}
    for group in sorted(set(groups)):
        members = [k for k, name in enumerate(groups) if name == group]
        members = members[:: max(1, len(members) // per_group)][:per_group]
        errors: dict[str, list[float]] = {name: [] for name in METHODS}
        for k in members:
            one = data.select(torch.tensor([k]))
            exact = gradient(network, one, ForceGradientSettings(method="backpropagation"))
            for name, how in METHODS.items():
                error = (gradient(network, one, how) - exact).norm() / exact.norm()
                errors[name].append(float(error))
        found[group] = {
            name: {"median": statistics.median(e), "largest": max(e), "n_structures": len(e)}
            for name, e in errors.items()
        }
    return found


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    structures, labels = read(args.data / f"{args.element}_train.extxyz.gz", allow_partial=True)
    data = TrainingSet(structures, {"reference": labels})
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]).replace(str(args.data), "DATA/mlearn"),
        "element": args.element,
        "epochs": args.epochs,
        "epsilon": DEFAULT_EPSILON,
        "versions": versions(),
        "models": {},
    }
    for name in args.models:
        network, reduced = trained(MODELS[name], data, args.epochs)
        found = errors_by_group(network, reduced, args.per_group)
        record["models"][name] = found
        for group, methods in found.items():
            text = "  ".join(
                f"{method} {e['median']:.1e} (at most {e['largest']:.1e})"
                for method, e in methods.items()
            )
            print(f"{name:24s} {group:16s} {text}", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
