"""The main numbers of a distillation, from the files in its run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.evaluate.base import Findings, as_json
from potstill.evaluate.speed import speed_ratio
from potstill.evaluate.table import EVALUATIONS
from potstill.metrics import force_key, metric_of
from potstill.report.panels import plain_label
from potstill.report.tables import shown
from potstill.workflows.base import Stages
from potstill.workflows.report import choice, collect, verdicts


def summarize(folder: Path) -> dict[str, Any]:
    """Gather the main numbers; what was not computed is left out.

    Returns
    -------
    dict
        `verdicts` (sentences, first the bars that are missed), `problems` (what does not apply or
        was not done), `metrics` (model to numbers by the keys of `potstill.metrics.METRICS`),
        `speed_ratio` by number of atoms, `seconds` by stage, `student.pt` (the
        `model` that it is, the `reason`, and the `validation_scores` and `sound_runs` behind it).
    """
    data = collect(folder)
    summary = {
        "verdicts": list(verdicts(data.found, choice(folder))),
        "problems": list(data.found.problems),
        "metrics": as_json(metrics_of(data.found)),
        "speed_ratio": {str(n): ratio for n, ratio in speed_ratio(data.found).items()},
        "seconds": Stages(folder).seconds,
        "student.pt": choice(folder),
    }
    return {key: value for key, value in summary.items() if value}


def metrics_of(found: Findings) -> dict[str, dict[str, float]]:
    """Numbers of all evaluations by model, under the keys of `potstill.metrics.METRICS`."""
    metrics: dict[str, dict[str, float]] = {}
    for evaluation in EVALUATIONS.values():
        for model, numbers in evaluation.numbers_of(found).items():
            metrics.setdefault(model, {}).update(numbers)
    return metrics


def result_rows(found: Findings) -> list[list[str]]:
    """Rows of all evaluations for a terminal: quantity, model, value."""
    return [
        [row.label, plain_label(model), shown(value, 4)]
        for evaluation in EVALUATIONS.values()
        for row in evaluation.rows(found)
        for model, value in row.values.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    ]


def summary_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a table: quantity, model and value."""
    rows = []
    if "student.pt" in summary:
        model, scores = summary["student.pt"]["model"], summary["student.pt"]["validation_scores"]
        words = ", ".join(f"{name} {shown(score, 4)}" for name, score in scores.items())
        rows.append(["student.pt: best validation score", model, words])
    for model, metrics in summary.get("metrics", {}).items():
        for key in (
            force_key(metrics),
            force_key(metrics, "relative_rmse"),
            "energy_per_atom_rmse",
            *(k for k in metrics if "forces" not in k and "energ" not in k),
        ):
            if metrics.get(key) is not None:
                metric = metric_of(key)
                value = f"{shown(metrics[key] * metric.scale, 4)} {metric.unit}".rstrip()
                rows.append([metric.name, plain_label(model), value])
    for size, ratio in summary.get("speed_ratio", {}).items():
        rows.append([f"MD speed, {size} atoms", "student / teacher", f"{ratio:.0f} x"])
    return sorted(rows, key=lambda row: [r[0] for r in rows].index(row[0]))
