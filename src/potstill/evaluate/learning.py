"""Learning curves from the JSON lines that a training run writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.errors import DataError, suggest
from potstill.evaluate.base import Result


@dataclass(frozen=True)
class LearningCurves(Result):
    """Numbers against epochs.

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

        Parameters
        ----------
        key : str
            For instance `validation/energy_mae`.
        axis : {"seconds", "processor_seconds", "steps", "epoch"}
            Seconds of training and validation so far, over all resumed parts, on the clock or of
            the process; optimizer steps.

        Returns
        -------
        x, y : tuple of float
            Where both are finite.
        """
        x = tuple(map(float, self.epochs)) if axis == "epoch" else self[axis]
        pairs = zip(x, self[key], strict=True)
        good = [pair for pair in pairs if all(math.isfinite(value) for value in pair)]
        return tuple(a for a, _ in good), tuple(b for _, b in good)

    def best(self, key: str) -> tuple[int, float]:
        """Epoch and value of the smallest recorded value.

        Raises
        ------
        DataError
            If there is no such key or no finite value.
        """
        finite = [
            (value, epoch)
            for epoch, value in zip(self.epochs, self[key], strict=True)
            if math.isfinite(value)
        ]
        if not finite:
            raise DataError(f"the run recorded no finite value of '{key}'")
        value, epoch = min(finite)
        return epoch, value


def read_learning_curves(path: str | Path) -> LearningCurves:
    """Read `metrics.jsonl`, or the run folder that holds it.

    Lines without an epoch are skipped, an epoch that a resumed run wrote again counts once (the
    later line), and a torn last line, as a killed run leaves it, is ignored.

    Parameters
    ----------
    path : path
        The file or its folder.

    Returns
    -------
    LearningCurves

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
