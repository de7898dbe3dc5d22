"""The figures of `pareto.py`: errors of forces and of energies against cost, for each element.

python benchmarks/pareto_figure.py        # from the numbers of the last measurement
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from potstill.evaluate.pareto import pareto_front
from potstill.report.panels import Drawing, Look, Panel, Series
from potstill.report.plots import write_figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "benchmarks" / "results" / "pareto.json", ROOT / "docs" / "figures"
YARDSTICK = "eam/fs (aluminium)"

#: Label (filled in from the row), color, marker and line of each family.
STYLES = {
    "SNAP": Look("SNAP, LAMMPS {lammps}, SSE2", "#E69F00", "s"),
    "qSNAP": Look("qSNAP, LAMMPS {lammps}, SSE2", "#D55E00", "D"),
    "POD": Look("POD, LAMMPS {lammps}, SSE2", "#009E73", "^"),
    "UF3": Look("UF3, LAMMPS {lammps}, SSE2", "#B8860B", "P"),
    "ACE": Look("ACE, ace-jax {ace-jax}, native C++", "#CC79A7", "v"),
    "NEP": Look("NEP, nep-adapters {nep-adapters}, SSE2", "#8C564B", "h"),
    "published": Look("ACE as published, other machine", "#888888", "X"),
    "others": Look("front of the others", "#222222", "", ":"),
    "potstill avx512": Look("potstill {potstill}, AVX-512", "#0072B2", "o"),
    "potstill avx2": Look("potstill {potstill}, AVX2", "#56B4E9", "o", "--"),
    "potstill baseline": Look("potstill {potstill}, baseline (SSE2)", "#6A3D9A", "o", "-."),
    YARDSTICK: Look("cost of eam/fs of Al, LAMMPS {lammps}, SSE2", "#888888", "", "-."),
}


def cost_of(row: dict[str, Any]) -> float:
    """Microseconds of processors per atom and step."""
    return float(row["us_per_atom"]["processor"])


def staircase(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The front of (cost, error) as a line: what is to be had for a cost."""
    front = points[pareto_front(points)]
    x, y = front[np.argsort(front[:, 0])].T
    return np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]


def panel(title: str, found: dict[str, Any], key: str, label: str) -> Panel:
    """Errors of one kind against cost."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in sorted((row for row in found["rows"] if key in row), key=cost_of):
        families.setdefault(row["family"], []).append(row)
    series, others = [], []
    for family, rows in families.items():
        ours = rows[0]["environment"] == "potstill"
        x, y = [cost_of(row) for row in rows], [row[key] for row in rows]
        spread = [row.get(f"{key}_std", 0.0) for row in rows] if ours else None
        series.append(Series(family, x, y, y_spread=spread, joined=ours))
        others += [] if ours else list(zip(x, y, strict=True))
    if found["published"]:
        x, y = zip(*((row["us_per_atom"], row[key]) for row in found["published"]), strict=True)
        series.append(Series("published", x, y))
    series.append(Series("others", *staircase(np.array(others)), kind="line"))
    drawn = [row[key] for rows in families.values() for row in rows]
    cost = [cost_of(row) for row in found["rows"] if row["family"] == YARDSTICK]
    series.append(Series(YARDSTICK, 2 * cost, [min(drawn), max(drawn)], kind="line"))
    x_label = "µs of processor per atom and step, one thread"
    return Panel(x_label, label, series, title, "log", "log")


def draw(symbol: str, found: dict[str, Any], folder: Path) -> None:
    """Write `pareto_<symbol>.png` from what `pareto.py` keeps of an element."""
    frames = f"{symbol}, test frames ({found['labels']})"
    panels = [
        panel(frames, found, "force_rmse", "RMSE of force components (eV/Å)"),
        panel(frames, found, "energy_rmse", "RMSE of energies (meV/atom)"),
    ]
    styles = dict(STYLES)
    for row in found["rows"]:
        if look := STYLES.get(row["family"]):
            styles[row["family"]] = replace(look, label=look.label.format(**row["versions"]))
    name, title = f"pareto_{symbol}", f"Accuracy and cost: {symbol}"
    drawing = Drawing(name, title, "", panels, n_columns=2, height=4.2, width=5.2)
    with tempfile.TemporaryDirectory() as scratch:
        figure = write_figure(Path(scratch), drawing, styles)
        shutil.copy(figure.png, folder / figure.png.name)


if __name__ == "__main__":
    for symbol, found in json.loads(RESULTS.read_text()).items():
        draw(symbol, found, FIGURES)
