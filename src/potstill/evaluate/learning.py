"""Learning curves from the JSON lines that a training run writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np

from potstill.errors import DataError, suggest
from potstill.evaluate.base import Result
from potstill.report.panels import Panel, Series


@dataclass(frozen=True)
class LearningCurves(Result):
    """Recorded numbers by epoch.

    Parameters
    ----------
    epochs : tuple of int
        In increasing order, each once.
    series : dict of str to tuple of float
        One value per epoch and key, NaN where a line lacked it; nested keys are joined by "/".
    """

    epochs: tuple[int, ...]
    series: dict[str, tuple[float, ...]]

    def __getitem__(self, key: str) -> tuple[float, ...]:
        if key not in self.series:
            raise DataError(f"the run recorded no '{key}'{suggest(key, self.series)}")
        return self.series[key]

    def against(self, key: str, axis: str = "seconds") -> tuple[tuple[float, ...], ...]:
        """A series over the wall clock, the steps or the epochs (Fig. 9 of the GNN paper).

        Seconds are of training and validation so far, over all resumed parts, on the clock or of
        the process. Returns x and y where both are finite.
        """
        x = tuple(map(float, self.epochs)) if axis == "epoch" else self[axis]
        pairs = zip(x, self[key], strict=True)
        good = [pair for pair in pairs if all(math.isfinite(value) for value in pair)]
        return tuple(a for a, _ in good), tuple(b for _, b in good)


def read_learning_curves(path: str | Path) -> LearningCurves:
    """Read `metrics.jsonl`, or the run folder that holds it.

    Lines without an epoch are skipped, an epoch that a resumed run wrote again counts once (the
    later line), and a torn last line, as a killed run leaves it, is ignored.

    Raises
    ------
    DataError
        If the file is absent or a line other than the last is not JSON.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: is this the folder of a training run?") from None
    rows: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        if isinstance(record, dict) and "epoch" in record:
            rows.setdefault(int(record.pop("epoch")), {}).update(_numbers(record))
    epochs = tuple(sorted(rows))
    keys = list(dict.fromkeys(key for epoch in epochs for key in rows[epoch]))
    series = {key: tuple(rows[epoch].get(key, math.nan) for epoch in epochs) for key in keys}
    return LearningCurves(epochs, series)


def _numbers(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested objects and keep what is a number."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat.update(_numbers(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = float(value)
        elif value is None:
            flat[prefix + key] = math.nan
    return flat


# -- figures -----------------------------------------------------------------------------------


def learning_panels(curves: Mapping[str, Sequence[LearningCurves]]) -> list[Panel]:
    """Force errors of the training loss and of validation against the epoch (Fig. 4).

    `curves` are those of the seeds of each strategy or model; what nobody recorded has no panel.
    """
    wanted = (
        ("train/forces", "Training set", "Force loss, RMSE + MAE (eV/Å)"),
        ("validation/forces_rmse", "Validation set", "Force RMSE (eV/Å)"),
    )
    panels = []
    for start, title, label in wanted:
        series = [s for name, runs in curves.items() for s in _learning_series(name, runs, start)]
        if series:
            panels.append(Panel("Epoch", label, series, title, y_scale="log"))
    return panels


_PROGRESS = {
    "seconds": "Wall-clock time (s)",
    "processor_seconds": "Processor time (s)",
    "steps": "Steps",
    "epoch": "Epoch",
}


def progress_panels(
    curves: Mapping[str, Sequence[LearningCurves]],
    axis: Literal["seconds", "processor_seconds", "steps", "epoch"] = "seconds",
) -> list[Panel]:
    """Validation errors against the wall clock or the steps (Fig. 9 of Ekström Kelvinius et al.).

    `curves` are those of the seeds of each strategy or model; each seed is a line of its own, since
    runs are not validated at the same moments.
    """
    panels = []
    for key, label in (
        ("validation/energy_mae", "Energy MAE (eV)"),
        ("validation/forces_mae", "Force MAE (eV/Å)"),
    ):
        series = []
        for name, runs in curves.items():
            for k, run in enumerate(run for run in runs if key in run.series):
                x, y = run.against(key, axis)
                series.append(Series(name, x, y, kind="thin" if k else "line"))
        if series:
            panels.append(Panel(_PROGRESS[axis], label, series, y_scale="log"))
    return panels


def _learning_series(name: str, runs: Sequence[LearningCurves], start: str) -> list[Series]:
    """Single runs as thin lines, and their mean with spread as far as all have come."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for run in runs:
        keys = [key for key in run.series if key == start or key.startswith(f"{start}:")]
        if keys:
            values = np.asarray(run.series[keys[0]], dtype=float)
            good = np.isfinite(values) & (values > 0)
            found.append((np.asarray(run.epochs)[good], values[good]))
    found = [(epochs, values) for epochs, values in found if len(epochs)]
    if not found:
        return []
    if len(found) == 1:
        return [Series(name, *found[0], kind="line")]
    common = reduce(np.intersect1d, [epochs for epochs, _ in found])
    table = np.array([values[np.isin(epochs, common)] for epochs, values in found])
    lines = [Series(name, epochs, values, kind="thin") for epochs, values in found]
    if len(common):
        spread = table.std(axis=0, ddof=1)
        lines.append(Series(name, common, table.mean(axis=0), y_spread=spread, kind="line"))
    return lines
