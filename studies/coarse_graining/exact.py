"""Denoising measured where the truth is known: beads in an ideal solvent (`exact_liquid`).

    python studies/coarse_graining/exact.py --work runs/exact --out results/exact.json

For every seed and number of frames: eight teachers on the noisy mapped forces, which differ in
their initial weights and the order of frames; students of a quarter of their cost on one teacher's
forces, on the ensemble's, and on the ensemble's forces and per-bead energies; and a control, a
network of the students' size on the noisy forces themselves. All errors are RMSE against the exact
mean forces, on frames that none of them has seen, and on the frames that they were trained on.
Trained models in `--work` are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exact_liquid import ExactLiquid
from potstill.checkpoint import load_potential
from potstill.evaluate.errors import predict_all
from potstill.evaluate.tools import machine_description
from potstill.species import Species, SpeciesTable
from potstill.store import LabeledStore
from potstill.structures import Properties, Structures
from potstill.teachers.committee import CommitteeTeacher
from potstill.teachers.potential import PotentialTeacher
from potstill.train import TrainingSet, TrainSettings, train
from potstill.train.state import versions

SEEDS = (0, 1, 2)
FRAMES = (50, 200, 800)
N_TEACHERS, N_TEST = 8, 200

TABLE = SpeciesTable((Species("A", 60.0, None), Species("B", 35.0, None)))
LABELS = ("energy", "forces", "atomic_energies")

#: Settings of all trainings. There is no energy label, so that no zero of energy is fitted.
SETTINGS: dict[str, Any] = {
    "energy": {"zero": "none"},
    "optimizer": {"name": "adamw", "learning_rate": 0.005, "beta2": 0.99, "ema_decay": "auto"},
    "learning_rate": {"schedule": "one_cycle"},
    "regularization": {"l2": 0.0, "hierarchicality": 0.0},
    "score": {"weights": {"forces_rmse": 1.0}},
    "batch_size": 8,
    "early_stopping": None,
}
COMMON = {"dist_soft_min": 0.8, "dist_soft_max": 6.0, "dist_hard_max": 6.5, "n_triples": 0}
SIZES: dict[str, dict[str, Any]] = {
    "teacher": {"n_features": 24, "n_channels": 24, "l_max": 2},
    "student": {"n_features": 8, "n_channels": 8, "n_sensitivities": 8, "l_max": 1},
}
STEPS = {"teacher": 1500, "student": 3000}

#: What is learned, and from whom.
FORCES = [{"property": "forces", "weight": 100.0}]
ENERGIES = [{"property": "atomic_energies", "weight": 100.0}]
STUDENTS = {
    "control": ("reference", FORCES),
    "student of one teacher": ("teacher0", FORCES),
    "student of the ensemble": ("ensemble", FORCES),
    "student of the ensemble, energies": ("ensemble", FORCES + ENERGIES),
}


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
    folder: Path, size: str, source: str, loss: list[dict[str, Any]], seed: int, parts: Any
) -> Path:
    """Train a network if it is not there; returns the checkpoint."""
    if not (folder / "result.json").is_file():
        training, validation = parts
        settings = SETTINGS | {
            "model": {"hyperparameters": COMMON | SIZES[size]},
            "loss": [line | {"source": source} for line in loss],
            "score": SETTINGS["score"] | {"source": source},
            "epochs": math.ceil(STEPS[size] / math.ceil(len(training) / SETTINGS["batch_size"])),
            "seed": seed,
        }
        train(TrainSettings.model_validate(settings), training, validation, folder)
    return folder / "best.pt"
