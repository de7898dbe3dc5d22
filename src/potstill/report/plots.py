"""Figures from plain numbers: what is drawn is what goes into the CSV file beside it.

A figure is a list of panels, a panel a list of named series. Who a series is about (student,
control, teacher, reference, ...) decides its color, marker and line everywhere in a report.
Legends stand above the panels, never over data. Nothing here touches matplotlib's global state for
longer than one figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from potstill.report.panels import Colors, Drawing, Line, Look, Panel, Series, looks
from potstill.report.tables import Cell, Table

#: matplotlib settings of all figures.
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "potstill",
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
    "axes.formatter.useoffset": False,
}
_DPI = 160


@dataclass(frozen=True)
class Figure:
    """A figure that has been written: name of its files, heading, what it shows, and the files."""

    name: str
    title: str
    caption: str
    png: Path
    svg: Path
    csv: Path


def write_figure(
    folder: Path, drawing: Drawing, looks_of: Mapping[str, Look] | None = None
) -> Figure:
    """Draw panels and write `<name>.png`, `.svg` and `.csv` into a folder that exists.

    `looks_of` are the looks of all series of the report; what is not in it gets spare ones.
    """
    panels, height = drawing.panels, drawing.height
    names = [series.name for panel in panels for series in panel.series]
    known = {**looks(names), **(looks_of or {})}
    n_columns = drawing.n_columns or min(len(panels), 3)
    n_rows = math.ceil(len(panels) / n_columns)
    width = drawing.width or {1: 5.6, 2: 4.3}.get(n_columns, 3.5)
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.08, wspace=0.03)
        canvas = Canvas((width * n_columns, height * n_rows + 0.4), layout=layout)
        FigureCanvasAgg(canvas)
        axes = canvas.subplots(n_rows, n_columns, squeeze=False).flatten()
        for k, (panel, axis) in enumerate(zip(panels, axes, strict=False)):
            if panel.colors is not None:
                _draw_colors(canvas, axis, panel.colors)
            _draw_panel(axis, panel, known)
            letter = f"{chr(ord('A') + k)}  " if len(panels) > 1 else ""
            title = wrap(letter + panel.title, round(10 * width), break_on_hyphens=False)
            axis.set_title("\n".join(title), loc="left", fontweight="bold")
        for axis in axes[len(panels) :]:
            axis.remove()
        if drawing.legend:
            _draw_legend(canvas, panels, known)
        files = save_canvas(canvas, folder, _data(drawing.name, panels))
    return Figure(drawing.name, drawing.title, drawing.caption, *files)


def save_canvas(canvas: Canvas, folder: Path, data: Table) -> tuple[Path, Path, Path]:
    """Write `.png`, `.svg` and `.csv` under the name of the table of what is drawn."""
    png, svg, csv = (folder / f"{data.name}.{kind}" for kind in ("png", "svg", "csv"))
    canvas.savefig(png, dpi=_DPI)
    canvas.savefig(svg, dpi=_DPI, metadata={"Date": None})
    csv.write_text(data.csv(), encoding="utf-8")
    return png, svg, csv


# -- drawing -----------------------------------------------------------------------------------


def _draw_panel(axis: Axes, panel: Panel, known: Mapping[str, Look]) -> None:
    for direction in ("x", "y"):
        if _is_log(panel, direction):
            getattr(axis, f"set_{direction}scale")("log")
            values = _finite_values(panel, direction)
            if len(values) and values.min() == values.max():
                # matplotlib widens the axis of a single value with a warning
                getattr(axis, f"set_{direction}lim")(0.5 * values[0], 2.0 * values[0])
    for series in panel.series:
        _draw_series(axis, series, known[series.name])
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)
    if panel.zero_line:
        axis.axhline(0.0, color="#555555", linewidth=0.8, zorder=1)
    if panel.categories:
        names = [""] * len(panel.categories) if panel.hide_categories else panel.categories
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(panel.categories) - 0.5, -0.5)
        axis.grid(visible=False, axis="y")
    axis.margins(*((0.06, 0.08) if panel.colors is None else (0.0, 0.0)))
    if panel.diagonal:
        _draw_diagonal(axis)
    elif panel.from_zero and panel.categories and not _is_log(panel, "x"):
        axis.set_xlim(left=0.0)
    elif panel.from_zero and not panel.categories and not _is_log(panel, "y"):
        axis.set_ylim(bottom=0.0)
    for x, y, text in panel.notes:
        axis.annotate(
            text, (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8.5,
            color="#333333",
        )  # fmt: skip
    _set_ticks(axis, panel)


def _draw_colors(canvas: Canvas, axis: Axes, colors: Colors) -> None:
    low = -colors.top if colors.signed else 0.0
    field = axis.pcolormesh(
        np.asarray(colors.x), np.asarray(colors.y), np.asarray(colors.values).T, vmin=low,
        vmax=colors.top, cmap="RdBu_r" if colors.signed else "viridis", rasterized=True,
    )  # fmt: skip
    axis.grid(visible=False)
    canvas.colorbar(field, ax=axis, fraction=0.05, extend="max" if low == 0.0 else "both")


def _draw_series(axis: Axes, series: Series, look: Look) -> None:
    x, y = np.asarray(series.x, dtype=float), np.asarray(series.y, dtype=float)
    if series.kind == "level":
        axis.axhline(float(y[0]), color=look.color, linestyle=look.line, linewidth=1.2, zorder=1.5)
        return
    if series.kind == "front":
        axis.step(x, y, where="post", color="#9a9a9a", linewidth=5, alpha=0.35, zorder=1.2)
        return
    if series.kind == "thin":
        axis.plot(x, y, color=look.color, linewidth=0.7, alpha=0.4, zorder=1.8)
        return
    if series.kind == "dots":
        many = len(x) > 300  # a cloud, drawn as a bitmap to keep the SVG small
        axis.plot(
            x, y, linestyle="none", marker="o", markersize=2.6 if many else 4.0, alpha=0.5,
            markeredgewidth=0, color=look.color, rasterized=many, zorder=2,
        )  # fmt: skip
        return
    if series.kind == "line":
        axis.plot(x, y, color=look.color, linestyle=look.line, zorder=2.5)
        if series.y_spread is not None:
            spread = np.asarray(series.y_spread, dtype=float)
            axis.fill_between(x, y - spread, y + spread, color=look.color, alpha=0.18, linewidth=0)
        return
    bars = [None if s is None else np.nan_to_num(s) for s in (series.x_spread, series.y_spread)]
    axis.errorbar(
        x, y, xerr=bars[0], yerr=bars[1], color=look.color, marker=look.marker,
        markersize=_marker_size(look), markeredgecolor="white", markeredgewidth=0.7,
        linestyle=look.line if series.joined else "none", linewidth=1.1, capsize=3,
        elinewidth=1.2, zorder=3, clip_on=False,
    )  # fmt: skip


def _marker_size(look: Look) -> float:
    return 11.0 if look.marker == "*" else 6.5


def _draw_diagonal(axis: Axes) -> None:
    low = min(axis.get_xlim()[0], axis.get_ylim()[0])
    high = max(axis.get_xlim()[1], axis.get_ylim()[1])
    axis.set_xlim(low, high)
    axis.set_ylim(low, high)
    axis.plot([low, high], [low, high], color="#555555", linewidth=0.8, zorder=1)
    axis.set_box_aspect(1.0)


def _draw_legend(canvas: Canvas, panels: Sequence[Panel], known: Mapping[str, Look]) -> None:
    """One legend above all panels, in the order of first appearance."""
    entries: dict[str, Line2D] = {}
    for panel in panels:
        for series in panel.series:
            label = known[series.name].label
            if series.kind != "thin" and label not in entries:
                entries[label] = _legend_handle(series, known[series.name])
    if len(entries) < 2:
        return
    n_columns = _legend_columns(list(entries), canvas.get_figwidth())
    canvas.legend(
        list(entries.values()), list(entries), loc="outside upper center", ncols=n_columns,
        frameon=False, handlelength=2.2, columnspacing=1.6,
    )  # fmt: skip


def _legend_handle(series: Series, look: Look) -> Line2D:
    if series.kind == "front":
        return Line2D([], [], color="#9a9a9a", linewidth=5, alpha=0.35)
    if series.kind in ("line", "level"):
        return Line2D([], [], color=look.color, linestyle=look.line)
    line: Line | Literal["none"] = look.line if series.joined else "none"
    marker = "o" if series.kind == "dots" else look.marker
    return Line2D(
        [], [], color=look.color, marker=marker, markersize=_marker_size(look), linestyle=line,
        linewidth=1.1, markeredgecolor="white", markeredgewidth=0.7,
    )  # fmt: skip


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """As many columns as fit: about 13 characters an inch, and a handle for each entry."""
    longest = max(len(label.replace("$", "")) for label in labels)
    return max(1, min(len(labels), int(width / (longest / 13.0 + 0.62))))


# -- axes --------------------------------------------------------------------------------------


def _is_log(panel: Panel, direction: str) -> bool:
    scale = getattr(panel, f"{direction}_scale")
    if scale != "auto":
        return scale == "log"
    values = _finite_values(panel, direction)
    return bool(len(values) and values.min() > 0 and values.max() > 10 * values.min())


def _finite_values(panel: Panel, direction: str) -> np.ndarray:
    """All finite coordinates of a panel along one direction."""
    parts = [s for s in panel.series if not (s.kind == "level" and direction == "x")]
    values = [np.ravel(np.asarray(getattr(s, direction), dtype=float)) for s in parts]
    joined = np.concatenate([np.zeros(0), *values])
    return joined[np.isfinite(joined)]


def _set_ticks(axis: Axes, panel: Panel) -> None:
    """Few ticks with plain numbers, also on logarithmic axes of less than a decade."""
    for direction, ticks in (("x", axis.xaxis), ("y", axis.yaxis)):
        if direction == "y" and panel.categories:
            continue
        if direction == "x" and panel.x_ticks:
            places, names = zip(*panel.x_ticks, strict=True)
            axis.set_xticks(places, names)
            if min(places) < max(places):
                axis.set_xlim(min(places), max(places))
            axis.grid(axis="x", color="#bdbdbd")
            continue
        if _is_log(panel, direction):
            limits = getattr(axis, f"get_{direction}lim")()
            ticks.set_major_locator(FixedLocator(_log_ticks(*limits)))
            ticks.set_minor_locator(NullLocator())
        elif panel.colors is not None:  # maps are narrow, and many of angles: 60 and 90 degrees
            ticks.set_major_locator(MaxNLocator(5, steps=[1, 2, 3, 6, 9, 10]))
        else:
            ticks.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=4))
        ticks.set_major_formatter(FuncFormatter(lambda value, _: _tick_text(value)))


def _log_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between two positive limits."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for step in (3, 2, 1):
        ticks = [10.0**k for k in decades if k % step == 0 and low <= 10.0**k <= high]
        if len(ticks) >= 4:
            return ticks
    for digits in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(k / 2 for k in range(2, 20))):
        ticks = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
        if len(ticks) >= 3:
            return ticks
    return [float(t) for t in MaxNLocator(nbins=4).tick_values(low, high) if low <= t <= high]


def _tick_text(value: float) -> str:
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-4:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        digits = f"{value / 10.0**exponent:.3g}"
        power = f"10^{{{exponent}}}"
        return f"${power}$" if digits == "1" else f"${digits}\\times{power}$"
    text = f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.6g}"
    return text.replace("-", "−")


# -- data --------------------------------------------------------------------------------------


def _data(name: str, panels: Sequence[Panel]) -> Table:
    """Everything that is drawn, as one long table."""
    rows: list[tuple[Cell, ...]] = []
    for k, panel in enumerate(panels):
        letter = chr(ord("A") + k)
        for series in panel.series:
            x = None if series.kind == "level" else series.x
            drawn = [
                [None] * len(np.asarray(series.y)) if v is None else np.asarray(v, float).tolist()
                for v in (x, series.x_spread, series.y, series.y_spread)
            ]
            what = (letter, panel.title, series.name, series.kind)
            for x_k, dx, y_k, dy in zip(*drawn, strict=True):
                y: Cell = panel.categories[round(y_k)] if panel.categories else y_k
                rows.append((*what, panel.x_label, x_k, dx, panel.y_label, y, dy))
        if panel.colors is not None:
            x_of, y_of = (_middles(edges) for edges in (panel.colors.x, panel.colors.y))
            start: tuple[Cell, ...] = (letter, panel.title, None, "colors", panel.x_label)
            for (i, j), value in np.ndenumerate(np.asarray(panel.colors.values, dtype=float)):
                rows.append((*start, x_of[i], None, panel.y_label, y_of[j], None, float(value)))
    columns = ["panel", "title", "series", "kind", "x quantity", "x", "x spread"]
    columns += ["y quantity", "y", "y spread"]
    if any(panel.colors is not None for panel in panels):
        columns.append("value")
        rows = [row if len(row) == len(columns) else (*row, None) for row in rows]
    return Table(name, name, tuple(columns), tuple(rows))


def _middles(edges: ArrayLike) -> list[float]:
    values = np.asarray(edges, dtype=float)
    return (0.5 * (values[1:] + values[:-1])).tolist()
