"""Matrices as colored fields with their numbers, such as CKA between the taps of two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine

from potstill.report.plots import STYLE, Figure, save_canvas
from potstill.report.tables import Table

#: Inches up to which fields stand side by side.
_WIDEST = 16.0


@dataclass(frozen=True)
class Heatmap:
    """One field of named rows and columns; NaN stays empty.

    Parameters
    ----------
    row_label, column_label : str
        What rows and columns are.
    signed : bool
        Gains, from blue (less) over white to red (more), instead of 0 to 1.
    marked : (str, str), optional
        Row and column of a field to frame: the pair that was distilled.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    row_label: str = "student"
    column_label: str = "teacher"
    signed: bool = False
    marked: tuple[str, str] | None = None


def write_heatmaps(
    folder: Path, name: str, title: str, caption: str, maps: Sequence[Heatmap]
) -> Figure:
    """Draw fields and write `<name>.png`, `.svg` and `.csv`.

    They stand side by side, or below one another where that is too wide.
    """
    widest = max(len(one.columns) for one in maps)
    tallest = max(len(one.rows) for one in maps)
    width, height = 2.6 + 0.42 * widest, 1.8 + 0.36 * tallest
    across = len(maps) if len(maps) * width <= _WIDEST else 1
    down = len(maps) // across
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.08)
        canvas = Canvas((across * width, down * height), layout=layout)
        FigureCanvasAgg(canvas)
        axes = canvas.subplots(down, across, squeeze=False).flatten()
        for one, axis in zip(maps, axes, strict=True):
            _draw(canvas, axis, one)
        files = save_canvas(canvas, folder, _data(name, maps))
    return Figure(name, title, caption, *files)


def _draw(canvas: Canvas, axis: Axes, one: Heatmap) -> None:
    values = np.asarray(one.values, dtype=float)
    finite = np.abs(values[np.isfinite(values)])
    top = float(finite.max(initial=1e-3)) if one.signed else 1.0
    colors = {"cmap": "RdBu_r", "vmin": -top} if one.signed else {"cmap": "viridis", "vmin": 0.0}
    field = axis.imshow(values, aspect="auto", vmax=top, **colors)  # type: ignore[arg-type]
    canvas.colorbar(field, ax=axis, fraction=0.05)
    axis.grid(False)
    axis.set_xticks(range(len(one.columns)), one.columns, rotation=60, ha="right")
    axis.set_yticks(range(len(one.rows)), one.rows)
    axis.set_xlabel(one.column_label)
    axis.set_ylabel(one.row_label)
    axis.set_title(one.title, loc="left", fontweight="bold")
    for (i, j), value in np.ndenumerate(values):
        if math.isfinite(value):
            dark = value > 0.75 * top if not one.signed else abs(value) < 0.6 * top
            color = "black" if dark else "white"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=7)
    if one.marked is not None:
        i, j = one.rows.index(one.marked[0]), one.columns.index(one.marked[1])
        corner = (j - 0.5, i - 0.5)
        frame = matplotlib.patches.Rectangle(corner, 1, 1, fill=False, edgecolor="red", lw=2)
        axis.add_patch(frame)


def _data(name: str, maps: Sequence[Heatmap]) -> Table:
    rows = tuple(
        (one.title, row, column, float(one.values[i, j]))
        for one in maps
        for i, row in enumerate(one.rows)
        for j, column in enumerate(one.columns)
    )
    return Table(name, "", ("panel", "row", "column", "value"), rows)
