"""Parity: predictions beside labels, a seeded sample where there are many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result, as_json
from potstill.evaluate.errors import predict_all, target_of
from potstill.properties import property_spec
from potstill.ragged import draw
from potstill.report.panels import Drawing, Panel, Series, plain_label
from potstill.structures import Properties, Structures


@dataclass(frozen=True)
class ParityPoints(Result):
    """Pairs of labels and predictions.

    Parameters
    ----------
    points : dict
        `energy` (eV/atom), `forces` (eV/Å, components), `atomic_energies` (eV), each with `label`,
        `prediction` and `n`, the number of pairs before sampling.
    """

    points: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The points by property."""
        return {name: as_json(pairs) for name, pairs in self.points.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(dict(data))


def parity_points(
    prediction: Properties,
    label: Properties,
    structures: Structures,
    *,
    max_points: int = 3000,
    seed: int = 0,
) -> ParityPoints:
    """Pairs of labels and predictions of what both have, `max_points` at most of each property."""
    points = {}
    for name in ("energy", "forces", "atomic_energies"):
        if name not in prediction or name not in label:
            continue
        present = prediction.presence(name, structures.n_systems)
        present = present & label.presence(name, structures.n_systems)
        n_atoms = structures.n_atoms_per_system.to(torch.float64)
        pair = [side[name].detach().to(torch.float64) for side in (label, prediction)]
        if property_spec(name).level == "atom":
            present = present[structures.system_index]
        elif name == "energy":
            pair = [side / n_atoms for side in pair]
        flat = torch.stack([side[present].flatten() for side in pair])
        flat = flat[:, torch.isfinite(flat).all(dim=0)]
        n = flat.shape[1]
        flat = flat[:, draw(n, max_points, seed)]
        points[name] = {"label": flat[0].tolist(), "prediction": flat[1].tolist(), "n": n}
    return ParityPoints(points)


_TITLES = {
    "forces": ("forces", "eV/Å"),
    "energy": ("energies from their mean", "eV/atom"),
    "atomic_energies": ("atomic energies from their mean", "eV"),
}


class Parity(Evaluation):
    """Predictions against labels of held-out structures."""

    name = "parity"
    title = "parity"
    result = ParityPoints
    section = "Accuracy"
    needs = "labels"

    def run(self, bench: Bench, candidate: Candidate) -> ParityPoints:
        """Predict, and draw a sample."""
        structures, labels = bench.held_out
        prediction = predict_all(candidate.predictor, structures, labels.names)
        return parity_points(prediction, labels, structures, seed=bench.settings.seed)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """One row of panels per model."""
        stored = {m: r.points for m, r in found.of(cls.name, ParityPoints).items()}
        names = [n for n in _TITLES if any(points.get(n) for points in stored.values())]
        panels = []
        for model, properties in stored.items():
            for name in names:
                title, unit = _TITLES[name]
                points = properties.get(name) or {"label": [], "prediction": []}
                label, predicted = np.array([points["label"], points["prediction"]], dtype=float)
                # large offsets would hide all structure; both sides are shifted alike
                zero = label.mean() if name != "forces" and len(label) else 0.0
                series = [Series(model, label - zero, predicted - zero, kind="dots")]
                title = f"{plain_label(model)}: {title}" if name == names[0] else title
                labels = (f"Label ({unit})", f"Prediction ({unit})")
                panels.append(Panel(*labels, series, title, diagonal=True))
        caption = (
            f"Predictions against the labels of the {target_of(found)} on held-out structures; "
            "the line is perfect agreement. Large sets are thinned by a seeded sample."
        )
        yield Drawing("parity", "Parity", caption, panels, len(names), legend=False)
