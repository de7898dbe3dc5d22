"""What figures show, as plain values: panels of named series, and how each model looks.

Nothing here draws, so that an evaluation can say what its figures hold without matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from typing import Literal, get_args

from numpy.typing import ArrayLike

Line = Literal["-", "--", "-.", ":"]


@dataclass(frozen=True)
class Look:
    """How series about one model are drawn."""

    label: str
    color: str
    marker: str
    line: Line = "-"


#: The fixed looks (colors of Okabe and Ito, distinct for the color-blind and in gray).
LOOKS: dict[str, Look] = {
    "student": Look("student", "#0072B2", "o"),
    "control": Look("control", "#D55E00", "s", "--"),
    "control_wf10": Look("control ($w_F$ = 10)", "#D55E00", "s", "--"),
    "control_wf30": Look("control ($w_F$ = 30)", "#E69F00", "D", "-."),
    "teacher": Look("teacher", "#222222", "*", ":"),
    "reference": Look("reference", "#888888", "P", "-"),
    "born_again": Look("born again (scheduled)", "#009E73", "^"),
    "born_again_wf10": Look("born again (to $w_F$ = 10)", "#56B4E9", "<", "-."),
    "born_again_static": Look("born again (static)", "#CC79A7", "v", "--"),
}
_SPARE = ("#8C564B", "#6A3D9A", "#B2A000", "#E377C2", "#17A589", "#A93226", "#2E4053")
_SPARE_MARKERS = ("X", ">", "h", "p", "d", "8", "H")


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Looks of all series of a report: fixed ones where known, spare ones in the given order."""
    found: dict[str, Look] = {}
    styles = zip(_SPARE, _SPARE_MARKERS, strict=True)
    spare = cycle(product(get_args(Line), styles))
    for name in dict.fromkeys(names):
        if name in LOOKS:
            found[name] = LOOKS[name]
        else:
            line, (color, marker) = next(spare)
            found[name] = Look(name.replace("_", " "), color, marker, line)
    return found


def plain_label(name: str) -> str:
    """Name of a model or strategy in tables and sentences."""
    label = LOOKS[name].label if name in LOOKS else name.replace("_", " ")
    return label.replace("$w_F$", "w_F").replace("born again", "born-again student")


Kind = Literal["points", "line", "thin", "dots", "level", "front"]


@dataclass(frozen=True)
class Series:
    """Numbers of one kind about one model, whose name decides how they look.

    Parameters
    ----------
    x, y : array_like
        (n,). A `level` is a horizontal line and needs y only.
    x_spread, y_spread : array_like, optional
        (n,) standard deviations: bars on points, a band around lines.
    kind : str
        `points` (large markers), `line`, `thin` (a faint line without legend), `dots` (a cloud),
        `level` (a horizontal line), `front` (a gray staircase, the Pareto front).
    joined : bool
        Join points by a faint line.
    """

    name: str
    x: ArrayLike
    y: ArrayLike
    x_spread: ArrayLike | None = None
    y_spread: ArrayLike | None = None
    kind: Kind = "points"
    joined: bool = False


@dataclass(frozen=True)
class Colors:
    """A quantity over both axes of a panel, as colors.

    Parameters
    ----------
    x, y : array_like
        (n + 1,) and (m + 1,) edges of the bins.
    values : array_like
        (n, m).
    top : float
        Where the scale ends; it begins at zero, or at `-top` with `signed`.
    signed : bool
        Differences, from blue (less) over white to red (more).
    """

    x: ArrayLike
    y: ArrayLike
    values: ArrayLike
    top: float
    signed: bool = False


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Parameters
    ----------
    x_label, y_label : str
        With units.
    series : sequence of Series
        What is drawn.
    title : str
        Short, above the panel, after its letter.
    x_scale, y_scale : {"linear", "log", "auto"}
        `auto` takes a logarithmic axis where values are positive and differ by more than tenfold.
    diagonal : bool
        Draw y = x, and make both axes alike.
    categories : sequence of str
        Names of the values 0, 1, ... on the y axis, from top to bottom.
    hide_categories : bool
        Do not write them, because the panel to the left does.
    from_zero : bool
        Start linear axes of values at zero: y, or x where there are categories.
    zero_line : bool
        Draw y = 0.
    notes : sequence of (float, float, str)
        Short texts beside points.
    x_ticks : sequence of (float, str)
        Places on the x axis and what they are called, instead of numbers; the axis ends there.
    colors : Colors, optional
        What lies behind the series, or is shown instead of them.
    """

    x_label: str
    y_label: str
    series: Sequence[Series]
    title: str = ""
    x_scale: Literal["linear", "log", "auto"] = "linear"
    y_scale: Literal["linear", "log", "auto"] = "linear"
    diagonal: bool = False
    categories: Sequence[str] = ()
    hide_categories: bool = False
    from_zero: bool = False
    zero_line: bool = False
    notes: Sequence[tuple[float, float, str]] = ()
    x_ticks: Sequence[tuple[float, str]] = ()
    colors: Colors | None = None


@dataclass(frozen=True)
class Drawing:
    """A figure that is yet to be drawn (`potstill.report.plots.write_figure`).

    Parameters
    ----------
    name, title, caption : str
        Name of its files; heading; what it shows, in words.
    panels : sequence of Panel
        Reports leave out a drawing whose panels hold nothing.
    n_columns : int
        Panels side by side; all of up to three if zero.
    height, width : float
        Of one panel in inches; a width of zero follows from the number of columns.
    legend : bool
        False where titles or categories name everything.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    n_columns: int = 0
    height: float = 3.3
    width: float = 0.0
    legend: bool = True

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(panel.series or panel.colors for panel in self.panels)
