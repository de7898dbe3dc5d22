"""Hours that one cell of a study takes: backpropagation in PyTorch, and native kernels.

    python benchmarks/study_cells.py studies/teacher_student/al.yaml

For every size of the study a few epochs on its training set, by backpropagation in PyTorch (what a
cell took before there were kernels) and as the study trains it, in turns on one thread. The first
epoch of each is left out. `benchmarks/results/study_cells.json` gets processor time and time on the
clock per epoch, and hours per cell of the config's epochs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from potstill.config import load_config
from potstill.evaluate.tools import machine_description
from potstill.experiments.recipes import SizesStudy
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.settings import ForceGradientSettings
from potstill.workflows.data import load_parts

RESULTS = Path(__file__).parent / "results" / "study_cells.json"

WAYS: dict[str, dict[str, Any]] = {
    "backpropagation": {
        "force_gradient": ForceGradientSettings(method="backpropagation"),
        "core": "torch",
    },
    "native": {
        "force_gradient": ForceGradientSettings(method="central_difference"),
        "core": "native",
    },
}


def settings(config: SizesStudy, size: str, way: str, epochs: int) -> TrainSettings:
    """A control's training."""
    control = config.variant("control_wf10", size)
    return control.settings.model_copy(update={"epochs": epochs} | WAYS[way])


def one_run(
    run: TrainSettings, training: TrainingSet, validation: TrainingSet
) -> list[tuple[float, float]]:
    """Processor time and time on the clock of each epoch after the first, s."""
    times: list[tuple[float, float]] = []

    def note(_: dict[str, Any]) -> None:
        times.append((time.process_time(), time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        train(run, training, validation, folder, on_epoch=note)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(times)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--sizes", nargs="+", help="of the config; all by default")
    parser.add_argument("--epochs", type=int, default=2, help="that are timed in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(args.config, SizesStudy)
    parts, _ = load_parts(config.data.parts)
    training, validation = parts["train"], parts["validation"]
    sizes: dict[str, Any] = {}
    for size in args.sizes or config.sizes:
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, times in found.items():
                times += one_run(settings(config, size, way, args.epochs + 1), training, validation)
        rows = {}
        for way, times in found.items():
            processor, clock = map(statistics.median, zip(*times, strict=True))
            hours = config.common.epochs * processor / 3600.0
            rows[way] = {
                "processor_seconds_per_epoch": processor,
                "seconds_per_epoch": clock,
                "hours_per_cell": hours,
            }
            print(f"{size:10s} {way:16s} {processor:8.2f} s per epoch, {hours:7.3f} h", flush=True)
        sizes[size] = config.sizes[size] | rows
    record = {
        "command": " ".join(["python", "benchmarks/study_cells.py", *sys.argv[1:]]),
        "study": config.name,
        "epochs": config.common.epochs,
        "n_structures": len(training),
        "n_atoms": training.structures.n_atoms,
        "machine": machine_description(),
        "sizes": sizes,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
