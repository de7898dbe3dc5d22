"""Denoising measured where the truth is known: beads in an ideal solvent (`exact_liquid`).

    python studies/coarse_graining/exact.py --work runs/exact --out exact.json

For every seed and number of frames: eight teachers on noisy mapped forces, which differ in their
initial weights and the order of frames; students on the forces of one teacher, on the ensemble's,
and on the ensemble's forces and per-bead energies, of the teachers' size and of a smaller one; and
a control, a small network on the noisy forces themselves (a large one would be a teacher). All
errors are RMSE of force components against the exact mean forces, on new frames and on the training
frames. Of the frames of a seed the first are taken, and a fifth of them choose the best epoch.
Models in `--work` that are trained already are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exact_liquid import ExactLiquid

from potstill.evaluate.tools import machine_description
from potstill.species import Species, SpeciesTable
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.teachers import Teacher
from potstill.teachers.committee import CommitteeTeacher
from potstill.teachers.potential import PotentialTeacher
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.state import versions

SEEDS = (0, 1, 2)
FRAMES = (40, 160, 640)
N_TEACHERS, N_TEST = 8, 200

TABLE = SpeciesTable((Species("A", 60.0, None), Species("B", 35.0, None)))
LABELS = ("energy", "forces", "atomic_energies")

#: Settings of all trainings. There is no energy label, so that no zero of energy is fitted. Weight
#: decay and few radial functions (chosen once, by 160 frames of seed 0) keep networks from learning
#: the noise: without them the error of a teacher is twice as large.
SETTINGS: dict[str, Any] = {
    "energy": {"zero": "none"},
    "optimizer": {
        "name": "adamw",
        "learning_rate": 0.005,
        "weight_decay": 1.0,
        "beta2": 0.99,
        "ema_decay": "auto",
    },
    "learning_rate": {"schedule": "one_cycle"},
    "regularization": {"l2": 0.0, "hierarchicality": 0.0},
    "batch_size": 8,
    "early_stopping": None,
}
STEPS = 800
COMMON = {
    "dist_soft_min": 0.8,
    "dist_soft_max": 6.0,
    "dist_hard_max": 6.5,
    "n_sensitivities": 5,
    "n_triples": 0,
}
SIZES: dict[str, dict[str, Any]] = {
    "large": {"l_max": 2},
    "small": {"n_features": 8, "n_channels": 8, "l_max": 1},
}

#: Name of a model in the table, its size, whose labels it learns, and which.
MODELS = [("control, small", "small", "reference", ("forces",))]
for size in SIZES:
    MODELS += [
        (f"student of one teacher, {size}", size, "teacher0", ("forces",)),
        (f"student of the ensemble, {size}", size, "ensemble", ("forces",)),
        (f"the same with energies, {size}", size, "ensemble", ("forces", "atomic_energies")),
    ]


def structures_of(liquid: ExactLiquid, positions: np.ndarray) -> Structures:
    """Frames of beads, (frames, n, 3) Å, as structures."""
    n_frames, n = positions.shape[:2]
    return Structures(
        positions=torch.tensor(positions.reshape(-1, 3)),
        species=torch.tensor(liquid.kinds).repeat(n_frames),
        system_index=torch.arange(n_frames).repeat_interleave(n),
        cell=(liquid.box * torch.eye(3, dtype=torch.float64)).repeat(n_frames, 1, 1),
        pbc=torch.ones(n_frames, 3, dtype=torch.bool),
        species_table=TABLE,
        frame_id=tuple(f"exact:{k}" for k in range(n_frames)),
    )


def store_of(liquid: ExactLiquid, path: Path, n_frames: int, seed: int) -> LabeledStore:
    """Noisy labels as `reference`, and the exact mean forces as labels of `exact`."""
    if path.exists():
        return LabeledStore.open(path, "a")
    positions, noisy = liquid.sample(n_frames, seed)
    mean = np.stack([liquid.exact(frame)[1] for frame in positions])
    structures = structures_of(liquid, positions)
    store = LabeledStore.create(path, TABLE, {"seed": seed, "versions": versions()})
    store.append(structures, forces_of(noisy))
    store.begin_labels("exact", {"fingerprint": "exact", "properties": ["forces"]})
    store.write_labels("exact", 0, forces_of(mean), structures, [])
    return store


def forces_of(forces: np.ndarray) -> Properties:
    """Forces as labels."""
    return Properties({"forces": torch.tensor(forces.reshape(-1, 3))})


def fit(
    folder: Path, size: str, source: str, properties: tuple[str, ...], seed: int, parts: Any
) -> Path:
    """Train a network if it is not there; returns the checkpoint."""
    if not (folder / "result.json").is_file():
        training, validation = parts
        settings = SETTINGS | {
            "model": {"hyperparameters": COMMON | SIZES[size]},
            "loss": [{"property": name, "source": source, "weight": 1.0} for name in properties],
            "score": {"source": source, "weights": {"forces_rmse": 1.0}},
            "epochs": math.ceil(STEPS / math.ceil(len(training) / SETTINGS["batch_size"])),
            "seed": seed,
        }
        done = train(TrainSettings.model_validate(settings), training, validation, folder)
        if done.status == "interrupted":
            raise SystemExit("interrupted: the same command goes on")
    return folder / "best.pt"


def rmse(forces: torch.Tensor, truth: torch.Tensor) -> float:
    """In meV/Å, over components."""
    return 1000.0 * float((forces - truth).square().mean().sqrt())


def run(work: Path, liquid: ExactLiquid, seed: int, n_frames: int) -> dict[str, list[float]]:
    """RMSE on new frames and on the training frames, by model."""
    store = store_of(liquid, work / f"frames_{seed}.zarr", max(FRAMES), seed)
    known = TrainingSet(
        store.structures(0, n_frames),
        {name: store.labels(name, 0, n_frames) for name in store.sources},
    )
    tests = store_of(liquid, work / f"test_{seed}.zarr", N_TEST, 1000 + seed)
    sets = [
        (tests.structures(), {name: tests.labels(name) for name in tests.sources}),
        (known.structures, known.labels),
    ]
    folder = work / f"seed{seed}_frames{n_frames}"

    def parts(labels: Mapping[str, Properties]) -> tuple[TrainingSet, TrainingSet]:
        whole = replace(known, labels=labels)
        order = torch.arange(n_frames)
        return whole.select(order[order % 5 != 0]), whole.select(order[order % 5 == 0])

    def errors(teacher: Teacher) -> list[float]:
        return [
            rmse(teacher.label(frames, ("forces",))[0]["forces"], labels["exact"]["forces"])
            for frames, labels in sets
        ]

    noisy = [rmse(labels["reference"]["forces"], labels["exact"]["forces"]) for _, labels in sets]
    nothing = [rmse(torch.zeros(()), labels["exact"]["forces"]) for _, labels in sets]
    found = {"zero forces": nothing, "raw label": noisy}
    members = []
    for k in range(N_TEACHERS):
        own = (folder / f"teacher{k}", "large", "reference", ("forces",), 100 * seed + k)
        members.append(PotentialTeacher.from_checkpoint(fit(*own, parts(known.labels))))
    each = np.array([errors(member) for member in members])
    ensemble = CommitteeTeacher(members, "ensemble")
    found["one teacher (mean of 8)"] = each.mean(0).tolist()
    found["ensemble of 8"] = errors(ensemble)
    labels = dict(known.labels)
    for name, teacher in (("teacher0", members[0]), ("ensemble", ensemble)):
        labels[name] = teacher.label(known.structures, LABELS)[0]
    for name, size, source, properties in MODELS:
        place = folder / name.replace(", ", "_").replace(" ", "_")
        file = fit(place, size, source, properties, 100 * seed + 50, parts(labels))
        found[name] = errors(PotentialTeacher.from_checkpoint(file))
    return found


def table(results: dict[str, Any]) -> str:
    """Means and standard deviations over seeds, in Markdown."""
    lines = [
        f"| meV/Å | {' | '.join(f'{n} frames' for n in results)} |",
        "|---|" + "---:|" * len(results),
    ]
    for name in next(iter(next(iter(results.values())).values())):
        cells = []
        for by_seed in results.values():
            values = [found[name][0] for found in by_seed.values()]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/exact"))
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    liquid = ExactLiquid()
    results: dict[str, dict[str, Any]] = {str(n): {} for n in options.frames}
    for seed in options.seeds:
        for n_frames in options.frames:
            results[str(n_frames)][str(seed)] = run(options.work, liquid, seed, n_frames)
            if options.out is not None:
                about = {
                    "command": "python studies/coarse_graining/exact.py --work FOLDER --out FILE",
                    "machine": machine_description(),
                    "versions": versions(),
                    "liquid": asdict(liquid),
                    "settings": SETTINGS | {"steps": STEPS, "model": COMMON, "sizes": SIZES},
                    "rmse_meV_per_A": "by frames, seed, model: on new frames, on training frames",
                }
                options.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    print(table({n: by_seed for n, by_seed in results.items() if by_seed}))


if __name__ == "__main__":
    main()
