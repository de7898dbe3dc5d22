"""Figures of a study: Figs. 2 to 5 of Matin et al., Figs. 4 to 9 of Ekström Kelvinius et al.

Each is there when the runs have what it shows. Every number is a mean over seeds with its standard
deviation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potstill.evaluate.cka import CKAMatrix, similarity_gain
from potstill.evaluate.learning import learning_panels, progress_panels
from potstill.evaluate.pareto import pareto_front
from potstill.evaluate.rdf import RadialDistribution
from potstill.experiments.results import Group, Results
from potstill.experiments.tables import COSTS, S2EF_JUDGED, file_name, plain
from potstill.metrics import METRICS, metric_of
from potstill.report.heatmaps import Heatmap, write_heatmaps
from potstill.report.panels import Drawing, Look, Panel, Series, looks
from potstill.report.plots import Figure, write_figure
from potstill.report.tables import Spread

JUDGED = (
    "forces_rmse",
    "energy_per_atom_rmse",
    "mean_force_rmse",
    "rdf_error",
    "adf_error",
    "cdf_error",
    "internal_error",
    "free_energy_error",
)

#: Costs whose largest and smallest values are closer than this factor are the same.
_ALIKE = 1.05


def main_figures(
    results: Results, folder: Path, given: Mapping[str, Look] | None = None
) -> tuple[Figure, ...]:
    """Draw the analogues of Figs. 2 to 5 of Matin et al. and the seeds one by one.

    `folder` gets `<name>.png`, `.svg` and `.csv` for `pareto`, `capacity`, `learning_<size>`,
    `rdf`, `cost`, `seeds`; a figure whose numbers nobody measured is left out. `given` are looks
    that strategies have in other figures of the report.
    """
    known = looks([*results.strategies, *results.baselines]) | dict(given or {})
    known |= {name: Look(name, known[name].color, "", ":") for name in results.baselines}
    known["front"] = Look("Pareto front", "#9a9a9a", "")
    known["noise"] = Look("RDF error from noise", "#888888", "", "--")
    if results.liquid is not None:
        known.setdefault(results.liquid[0], Look(results.liquid[0], "#888888", ""))
    drawings = [
        _pareto(results),
        _capacity(results),
        *_learning(results),
        _cost(results),
        _seeds(results, known),
        *_liquids(results),
    ]
    return tuple(write_figure(folder, one, known) for one in drawings if not one.empty)


def _pareto(results: Results) -> Drawing:
    panels = []
    for metric in results.measured(COSTS):
        series = _by_strategy(results, metric.key, "forces_rmse")
        values = [value for group in results.ordered for value in group.values(metric.key)]
        if not series or (len(results.sizes) > 1 and max(values) < _ALIKE * min(values)):
            continue
        points = np.concatenate([np.column_stack([s.x, s.y]) for s in series])
        cost = points[pareto_front(points)]
        cost = cost[np.argsort(cost[:, 0])]
        series.append(Series("front", cost[:, 0], cost[:, 1], kind="front"))
        panels.append(
            Panel(
                metric.label, METRICS["forces_rmse"].label, series,
                x_scale="auto", y_scale="auto", notes=_size_notes(results, metric.key),
            )
        )  # fmt: skip
    caption = (
        "Force RMSE on the test set against the cost of molecular dynamics; lower and further left "
        "is better. Points are means over seeds, bars standard deviations; the gray line is the "
        f"Pareto front{_of_paper(results, 2)}. A cost that is the same for all sizes is left out."
    )
    return Drawing("pareto", "Accuracy against cost", caption, panels)


def _capacity(results: Results) -> Drawing:
    panels = []
    for metric in results.measured(JUDGED) if any(results.sizes) else ():
        levels = [
            Series(name, [], [values[metric.key] * metric.scale], kind="level")
            for name, values in results.baselines.items()
            if metric.key in values
        ]
        if metric.key == "rdf_error" and results.measured(["rdf_error_noise"]):
            noise = Spread.of(row.value("rdf_error_noise") for row in results.rows).mean
            levels.append(Series("noise", [], [noise], kind="level"))
        series = _by_strategy(results, "n_parameters", metric.key)
        panels.append(
            Panel("Trainable parameters", metric.label, [*series, *levels], x_scale="log")
        )
    caption = (
        "Errors against the number of trainable parameters: means over seeds, bars are standard "
        "deviations. Force and energy errors are on the test set against the reference, the RDF "
        "error is the integral of the absolute difference from the teacher's g(r) (Fig. 3 of the "
        "paper); values near the noise line cannot be told from sampling noise."
    )
    return Drawing("capacity", "Accuracy against size", caption, panels)


def _learning(results: Results) -> Iterator[Drawing]:
    for size in () if results.splits else results.sizes:
        curves = {
            group.strategy: [row.curve for row in group.rows if row.curve is not None]
            for group in results.ordered
            if group.size == size
        }
        panels = learning_panels({name: runs for name, runs in curves.items() if runs})
        caption = (
            "Force error while training: (A) the force term of the loss on the training set "
            "(RMSE + MAE, mean of the batches), (B) RMSE on the validation set. Thick: mean over "
            "seeds up to the shortest run, with a band of one standard deviation; thin: single "
            f"runs{_of_paper(results, 4)}."
        )
        yield Drawing(
            f"learning_{file_name(size)}" if size else "learning",
            f"Learning curves, size {size}" if size else "Learning curves",
            caption,
            panels,
        )


def _cost(results: Results) -> Drawing:
    panels = [
        Panel(
            "Trainable parameters", metric.label,
            _by_strategy(results, "n_parameters", metric.key), x_scale="log", from_zero=True,
        )
        for metric in results.measured(COSTS)
    ]  # fmt: skip
    caption = (
        "Cost of molecular dynamics against the number of trainable parameters"
        f"{_of_paper(results, 5)}. Models of one size have the same architecture and the same cost."
    )
    return Drawing("cost", "Cost against size", caption, panels)


def _seeds(results: Results, known: Mapping[str, Look]) -> Drawing:
    metrics = results.measured(JUDGED[:2])
    groups = [g for g in results.ordered if any(g.values(metric.key) for metric in metrics)]
    named = ((known[group.strategy].label, group.size) for group in groups)
    categories = [", ".join(filter(None, name)) for name in named]
    panels: list[Panel] = []
    for metric in metrics:
        series = []
        for k, group in enumerate(groups):
            values = metric.scale * np.array(group.values(metric.key))
            if len(values):
                # dots a little below the mean, which would hide them
                dots = np.full(len(values), k + 0.3)
                series.append(Series(group.strategy, values, dots, kind="dots"))
                mean = Spread.of(values)
                series.append(Series(group.strategy, [mean.mean], [k], x_spread=[mean.deviation]))
        panels.append(
            Panel(metric.label, "", series, x_scale="auto",
                  categories=categories, hide_categories=bool(panels))
        )  # fmt: skip
    caption = (
        "Every run as a dot, with mean and standard deviation over seeds: how much of a difference "
        "between strategies a change of seed would hide."
    )
    height = 0.9 + 0.32 * len(categories)
    title = "Spread over seeds"
    return Drawing("seeds", title, caption, panels, height=height, width=4.6, legend=False)


def _liquids(results: Results) -> Iterator[Drawing]:
    """g(r) of the reference and the teachers, and what the other models differ by, size by size."""
    liquid = results.liquid
    groups = {
        (group.size, group.strategy): [row.rdf for row in group.rows if row.rdf is not None]
        for group in results.ordered
    }
    groups = {key: runs for key, runs in groups.items() if runs}
    teachers = [runs for (_, strategy), runs in groups.items() if strategy == "teacher"]
    if not groups or (liquid is None and not teachers):
        return
    series = [Series("teacher", *_line(runs), kind="line") for runs in teachers]
    if liquid is not None:
        name, base = liquid
        r, g = base.r, base.g
        series.insert(0, Series(name, r, g, y_spread=np.nan_to_num(base.error), kind="line"))
    else:
        name, (r, g, _) = "teacher", _line(teachers[0])
    panels = [Panel("r (Å)", "g(r)", series, "Liquid", from_zero=True)]
    for size in results.sizes:
        differences = [
            Series(strategy, r, y - g, y_spread=spread, kind="line")
            for (of, strategy), runs in groups.items()
            if of == size and not (liquid is None and strategy == "teacher")
            for _, y, spread in [_line(runs)]
        ]
        if differences:
            label = f"g(r) minus {name}'s"
            panels.append(Panel("r (Å)", label, differences, size, zero_line=True))
    caption = (
        f"Radial distribution of the liquid, and its difference from {name}'s: means over seeds, "
        "bands are standard deviations"
        + (f" (of {name}: standard error from blocks of the trajectory)." if liquid else ".")
    )
    yield Drawing("rdf", "Structure of the liquid", caption, panels)


def _line(runs: Sequence[RadialDistribution]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """r, mean of g(r) and its standard deviation over seeds."""
    g = np.stack([run.g for run in runs])
    return runs[0].r, g.mean(axis=0), g.std(axis=0, ddof=1 if len(runs) > 1 else 0)


def _of_paper(results: Results, number: int) -> str:
    """Which figure of Matin et al. one is like, for studies of sizes as theirs is."""
    return f" (Fig. {number} of the paper)" if any(results.sizes) else ""


def _by_strategy(results: Results, x_key: str, y_key: str) -> list[Series]:
    """One series per strategy, one point per size: means and spreads over seeds."""
    series = []
    for strategy in results.strategies:
        points = [
            (x.mean, y.mean, x.deviation, y.deviation)
            for group, x, y in _points(results, x_key, y_key)
            if group.strategy == strategy
        ]
        if points:
            x_, y_, dx, dy = np.array(sorted(points)).T
            series.append(Series(strategy, x_, y_, dx, dy, joined=len(points) > 1))
    return series


def _points(results: Results, x_key: str, y_key: str) -> Iterator[tuple[Group, Spread, Spread]]:
    """Variants that have both metrics, and these; a potential may have no parameters to count."""
    for group in results.ordered:
        x, y = group.spread(metric_of(x_key)), group.spread(metric_of(y_key))
        if x.n and y.n and not (x_key == "n_parameters" and x.mean == 0.0):
            yield group, x, y


def _size_notes(results: Results, x_key: str) -> list[tuple[float, float, str]]:
    """The size beside the highest point of that size, where there are several sizes."""
    if len(results.sizes) < 2:
        return []
    highest: dict[str, tuple[float, float]] = {}
    for group, x, y in _points(results, x_key, "forces_rmse"):
        top = y.mean + (0.0 if math.isnan(y.deviation) else y.deviation)
        highest[group.size] = max((top, x.mean), highest.get(group.size, (-math.inf, 0.0)))
    return [(x_top, y_top, size) for size, (y_top, x_top) in highest.items()]


# -- pairs of models -------------------------------------------------------------------------------


def progress_figure(results: Results, pair: str, folder: Path, grid: str = "") -> Figure:
    """Validation errors against processor time and steps (Figs. 4, 5 and 9 of the paper).

    Of the strategies of a pair, or of the runs of a grid; beside the control.
    """
    found = {group.strategy: group for group in results.pairs.get(pair, ())}
    if grid:
        found = {str(point): group for point, group in results.grids[pair, grid].items()}
    students = list(found.values())
    seeds = {seed for student in students for seed in student.seeds}
    control = results.variants.get(students[0].variant.against[0], Group(()))
    curves = {
        name: [row.curve for row in group.rows if row.curve is not None]
        for name, group in {"control": control.at(seeds), **found}.items()
    }
    drawing = Drawing(
        f"progress_{file_name(pair)}" + (f"_{file_name(grid)}" if grid else ""),
        ", ".join([plain(pair), *filter(None, [grid])])
        + ": validation error while students are trained",
        "Against the processor time of training and validation on one thread, without the one pass "
        "of the teacher, and against steps; one line per seed.",
        [*progress_panels(curves, "processor_seconds"), *progress_panels(curves, "steps")],
        n_columns=2,
    )
    return write_figure(folder, drawing)


def grid_figure(results: Results, pair: str, grid: str, folder: Path) -> Figure | None:
    """Change of energies and forces by two options, as a field; None for other grids."""
    points = results.grids[pair, grid]
    options = list(next(iter(points)).options)
    against = next(iter(points.values())).variant.against[0]
    if len(options) != 2 or against not in results.variants:
        return None
    # Values in the order of the config; those that YAML makes unhashable are compared as text.
    first, second = (
        list(dict.fromkeys(str(point.options[key]) for point in points)) for key in options
    )
    if min(len(first), len(second)) < 2:
        return None
    maps = []
    for metric in S2EF_JUDGED:
        values = np.full((len(first), len(second)), np.nan)
        for point, group in points.items():
            one, other = (str(point.options[key]) for key in options)
            change = results.change(group, metric).change
            values[first.index(one), second.index(other)] = change
        down, across = map(plain, options)
        maps.append(Heatmap(metric.name, first, second, values, down, across, signed=True))
    return write_heatmaps(
        folder,
        f"grid_{file_name(pair)}_{file_name(grid)}",
        f"{plain(pair)}: {grid}",
        "Change against the control, as a fraction of it: blue is better. Mean over the test sets.",
        maps,
    )


def cka_figure(results: Results, student: Group, folder: Path) -> Figure | None:
    """Similarity of student and teacher before and after, and the gain (Figs. 6 to 8).

    Of the first seed that was measured; None if none was.
    """
    measured = results.similarity.get("cka", {})
    row = next((row for row in student.rows if row.run.name in measured), None)
    if row is None:
        return None
    before, after = (
        CKAMatrix.from_json(measured[row.run.name][when]) for when in ("before", "after")
    )
    known = row.taps is not None and row.taps[0] in after.first and row.taps[1] in after.second
    look: dict[str, Any] = {
        "row_label": plain(student.variant.against[0]),
        "column_label": plain(student.variant.teacher_name),
        "marked": row.taps if known else None,
    }
    shown = (
        ("before", before, False),
        ("after", after, False),
        ("similarity gain", similarity_gain(before, after), True),
    )
    pair, strategy = student.size, student.strategy
    return write_heatmaps(
        folder,
        f"cka_{file_name(pair)}_{file_name(strategy)}",
        f"{plain(pair)}, {strategy}: similarity of student and teacher",
        f"Linear CKA over {after.n_atoms} atoms of the validation set; before: the control. The "
        "framed field is the pair of taps that was distilled.",
        [
            Heatmap(title, cka.first, cka.second, cka.values, signed=signed, **look)
            for title, cka, signed in shown
        ],
    )
