"""Report of a study: several sizes, strategies and seeds, as in Figs. 2 to 5 of Matin et al.

Every number is a mean over seeds with its standard deviation; whether students beat controls is
tested, not assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from potstill.errors import DataError
from potstill.evaluate.learning import learning_panels
from potstill.evaluate.pareto import pareto_front
from potstill.evaluate.rdf import RadialDistribution
from potstill.experiments.rows import RunRow
from potstill.metrics import METRICS, Metric, metric_of
from potstill.report.page import Section
from potstill.report.panels import LOOKS, Drawing, Look, Panel, Series, looks, plain_label
from potstill.report.plots import Figure, write_figure
from potstill.report.tables import Cell, Spread, Table
from potstill.report.verdicts import Comparison, compare, over_sizes

_ORDER = tuple(LOOKS)
_ERROR_COLUMNS = (
    "forces_rmse",
    "forces_mae",
    "forces_relative_rmse",
    "energy_per_atom_rmse",
    "energy_per_atom_mae",
    "energy_rmse",
    "stress_rmse",
    "atomic_energies_rmse",
    "forces_cosine",
    "efwt",
    "rdf_error",
    "rdf_error_reference",
)
_COST_COLUMNS = ("time_per_step_atom_us", "memory_per_atom_kib")
_COMPARED = ("forces_rmse", "energy_per_atom_rmse", "stress_rmse", "rdf_error")
_JUDGED = ("forces_rmse", "energy_per_atom_rmse", "rdf_error")

#: Costs whose largest and smallest values are closer than this factor are the same.
_ALIKE = 1.05

#: Horizontal lines: name of a published potential to its metrics.
Baselines = Mapping[str, Mapping[str, float]]

#: A potential from elsewhere, and the g(r) of its liquid.
Liquid = tuple[str, RadialDistribution]


# -- tables ------------------------------------------------------------------------------------


def sizes_tables(rows: Sequence[RunRow], baselines: Baselines | None = None) -> tuple[Table, ...]:
    """`table_errors`, `table_cost` and `table_comparisons`, as far as known, and `table_runs`.

    Raises
    ------
    DataError
        If there are no rows, or two share a name.
    """
    _check(rows)
    tables = [
        summary_table(rows, _ERROR_COLUMNS, "table_errors", "Errors on the test set", baselines)
    ]
    if _measured(rows, _COST_COLUMNS):
        tables.append(
            summary_table(rows, _COST_COLUMNS, "table_cost", "Cost of molecular dynamics")
        )
    comparisons = _comparison_table(rows)
    if comparisons.rows:
        tables.append(comparisons)
    return (*tables, _runs_table(rows))


def sizes_verdicts(rows: Sequence[RunRow]) -> tuple[str, ...]:
    """Sentences: each student against its controls, born again against its teacher.

    One for each pair of strategies and each of force error, energy error and RDF error; with
    several sizes it counts those where the first is ahead.
    """
    _check(rows)
    found: dict[tuple[str, str, str], list[tuple[str, Comparison]]] = {}
    for size, ours, theirs, comparison in _comparisons(rows):
        if comparison.metric.key in _JUDGED and comparison.outcome != "unknown":
            key = (comparison.metric.key, ours, theirs)
            found.setdefault(key, []).append((size, comparison))
    return tuple(
        over_sizes(group, plain_label(ours), plain_label(theirs))
        for (_, ours, theirs), group in found.items()
    )


def summary_table(
    rows: Sequence[RunRow],
    keys: Iterable[str],
    name: str,
    title: str,
    baselines: Baselines | None = None,
) -> Table:
    """Means and deviations over seeds of what was measured, by size and strategy."""
    metrics = [metric_of(key) for key in _measured(rows, keys)]
    body: list[tuple[Cell, ...]] = []
    for size, strategy, group in _groups(rows):
        numbers = [Spread.of(r.value(m.key) for r in group).scaled(m.scale) for m in metrics]
        head = (plain_label(strategy), size, group[0].n_parameters, len(group))
        body.append((*head, *(s if s.n else None for s in numbers)))
    for label, values in (baselines or {}).items():
        known = [values.get(m.key) for m in metrics]
        shown = [
            v * m.scale if v is not None else None for v, m in zip(known, metrics, strict=True)
        ]
        body.append((label, "published", None, None, *shown))
    columns = ("Strategy", "Size", "Parameters", "Seeds", *(m.label for m in metrics))
    return Table(name, title, columns, tuple(body), "Mean ± standard deviation over seeds.")


def _runs_table(rows: Sequence[RunRow]) -> Table:
    keys = list(dict.fromkeys(key for row in rows for key in row.metrics))
    body: list[tuple[Cell, ...]] = []
    for row in sorted(rows, key=_sort_key):
        head = (row.run.name, row.strategy, row.group, row.n_parameters, row.run.seed)
        body.append((*head, *(row.value(key) for key in keys)))
    columns = ("name", "strategy", "size", "n_parameters", "seed", *keys)
    return Table("table_runs", "Every run, in stored units", columns, tuple(body))


def _short_runs_table(rows: Sequence[RunRow]) -> Table:
    """What fits on the page; `_runs_table` has everything."""
    metrics = [METRICS[key] for key in _measured(rows, (*_COMPARED, *_COST_COLUMNS))]
    body: tuple[tuple[Cell, ...], ...] = tuple(
        (plain_label(r.strategy), r.group, r.run.seed, *(r.value(m.key) * m.scale for m in metrics))
        for r in sorted(rows, key=_sort_key)
    )
    columns = ("Strategy", "Size", "Seed", *(m.label for m in metrics))
    note = "All metrics of every run, in stored units, are in the file."
    return Table("table_runs", "Main numbers of every run", columns, body, note)


def _comparison_table(rows: Sequence[RunRow]) -> Table:
    body = []
    for size, ours, theirs, c in _comparisons(rows):
        if c.outcome == "unknown":
            continue
        spreads = (c.ours.scaled(c.metric.scale), c.theirs.scaled(c.metric.scale))
        interval = (100 * c.low, 100 * c.high) if c.tested else (None, None)
        pair = f"{plain_label(ours)} − {plain_label(theirs)}"
        head = (size, pair, c.metric.label, *spreads, 100 * c.change, *interval)
        body.append((*head, c.outcome if c.tested or c.outcome == "equal" else "one run each"))
    columns = ("Size", "Pair", "Quantity", "First", "Second", "Change (%)")
    return Table(
        "table_comparisons",
        "Student against control, born again against teacher",
        (*columns, "95 % from (%)", "95 % to (%)", "First is"),
        tuple(body),
        "Change of the mean; interval of Welch's t test over seeds. “unclear”: the interval "
        "includes zero. Intervals are not corrected for the number of comparisons.",
    )


def _comparisons(rows: Sequence[RunRow]) -> list[tuple[str, str, str, Comparison]]:
    """(size, ours, theirs, comparison) of every variant with those that it is judged by."""
    variants: dict[str, list[RunRow]] = {}
    for row in sorted(rows, key=_sort_key):
        variants.setdefault(row.variant.name, []).append(row)
    pairs = [
        (us, variants[name])
        for us in variants.values()
        for name in us[0].variant.against
        if name in variants
    ]
    pairs.sort(key=lambda p: (_strategy_key(p[0][0].strategy), _strategy_key(p[1][0].strategy)))
    metrics = [METRICS[key] for key in _measured(rows, _COMPARED)]
    return [
        (us[0].group, us[0].strategy, them[0].strategy, _compare_rows(metric, us, them))
        for us, them in pairs
        for metric in metrics
    ]


def _compare_rows(metric: Metric, us: Sequence[RunRow], them: Sequence[RunRow]) -> Comparison:
    key = metric.key
    return compare(metric, [r.value(key) for r in us], [r.value(key) for r in them])


# -- figures -----------------------------------------------------------------------------------


def sizes_figures(
    rows: Sequence[RunRow],
    folder: str | Path,
    baselines: Baselines | None = None,
    liquid: Liquid | None = None,
) -> tuple[Figure, ...]:
    """Draw the analogues of Figs. 2 to 5 of the paper and the seeds one by one.

    `folder`, made if absent, gets `<name>.png`, `.svg` and `.csv` for `pareto`, `capacity`,
    `learning_<size>`, `rdf`, `cost`, `seeds`; a figure whose numbers nobody measured is left out.

    Raises
    ------
    DataError
        If there are no rows, or two share a name.
    """
    _check(rows)
    folder, published = Path(folder), baselines or {}
    folder.mkdir(parents=True, exist_ok=True)
    known = looks([*_sorted({row.strategy for row in rows}), *published])
    known |= {name: Look(name, known[name].color, "", ":") for name in published}
    known["front"] = Look("Pareto front", "#9a9a9a", "")
    known["noise"] = Look("RDF error from noise", "#888888", "", "--")
    if liquid is not None:
        known.setdefault(liquid[0], Look(liquid[0], "#888888", ""))
    drawings = [
        *_pareto(rows),
        *_capacity(rows, published),
        *_learning(rows),
        *_cost(rows),
        *_seeds(rows, known),
        *_liquids(rows, liquid),
    ]
    return tuple(write_figure(folder, one, known) for one in drawings)


def _pareto(rows: Sequence[RunRow]) -> Iterator[Drawing]:
    panels = []
    for key in _measured(rows, _COST_COLUMNS):
        series = _by_strategy(rows, key, "forces_rmse")
        values = [row.value(key) for row in rows if math.isfinite(row.value(key))]
        if not series or (len(_sizes(rows)) > 1 and max(values) < _ALIKE * min(values)):
            continue
        points = np.concatenate([np.column_stack([s.x, s.y]) for s in series])
        cost = points[pareto_front(points)]
        cost = cost[np.argsort(cost[:, 0])]
        series.append(Series("front", cost[:, 0], cost[:, 1], kind="front"))
        panels.append(
            Panel(
                METRICS[key].label, METRICS["forces_rmse"].label, series,
                x_scale="auto", y_scale="auto", notes=_size_notes(series, rows, key),
            )
        )  # fmt: skip
    if not panels:
        return
    caption = (
        "Force RMSE on the test set against the cost of molecular dynamics; lower and further left "
        "is better. Points are means over seeds, bars standard deviations; the gray line is the "
        "Pareto front (Fig. 2 of the paper). A cost that is the same "
        "for all sizes is left out."
    )
    yield Drawing("pareto", "Accuracy against cost", caption, panels)


def _capacity(rows: Sequence[RunRow], baselines: Baselines) -> Iterator[Drawing]:
    panels = []
    for key in _measured(rows, _JUDGED):
        levels = [
            Series(name, [], [values[key] * METRICS[key].scale], kind="level")
            for name, values in baselines.items()
            if key in values
        ]
        if key == "rdf_error" and _measured(rows, ["rdf_error_noise"]):
            noise = Spread.of(row.value("rdf_error_noise") for row in rows).mean
            levels.append(Series("noise", [], [noise], kind="level"))
        series = _by_strategy(rows, "n_parameters", key)
        panels.append(
            Panel("Trainable parameters", METRICS[key].label, [*series, *levels], x_scale="log")
        )
    if not panels:
        return
    caption = (
        "Errors against the number of trainable parameters: means over seeds, bars are standard "
        "deviations. Force and energy errors are on the test set against the reference, the RDF "
        "error is the integral of the absolute difference from the teacher's g(r) (Fig. 3 of the "
        "paper); values near the noise line cannot be told from sampling noise."
    )
    yield Drawing("capacity", "Accuracy against size", caption, panels)


def _learning(rows: Sequence[RunRow]) -> Iterator[Drawing]:
    for size in _sizes(rows):
        curves = {
            strategy: [r.curve for r in group if r.curve is not None]
            for group_size, strategy, group in _groups(rows)
            if group_size == size
        }
        panels = learning_panels({name: runs for name, runs in curves.items() if runs})
        if not panels:
            continue
        caption = (
            "Force error while training: (A) the force term of the loss on the training set "
            "(RMSE + MAE, mean of the batches), (B) RMSE on the validation set. Thick: mean over "
            "seeds up to the shortest run, with a band of one standard deviation; thin: single "
            "runs (Fig. 4 of the paper)."
        )
        name = "learning_" + "".join(c if c.isalnum() else "_" for c in size)
        yield Drawing(name, f"Learning curves, size {size}", caption, panels)


def _cost(rows: Sequence[RunRow]) -> Iterator[Drawing]:
    panels = [
        Panel(
            "Trainable parameters", METRICS[key].label, _by_strategy(rows, "n_parameters", key),
            x_scale="log", from_zero=True,
        )
        for key in _measured(rows, _COST_COLUMNS)
    ]  # fmt: skip
    if not panels:
        return
    caption = (
        "Cost of molecular dynamics against the number of trainable parameters (Fig. 5 of the "
        "paper). Models of one size have the same architecture and the same cost."
    )
    yield Drawing("cost", "Cost against size", caption, panels)


def _seeds(rows: Sequence[RunRow], known: Mapping[str, Look]) -> Iterator[Drawing]:
    keys = _measured(rows, ("forces_rmse", "energy_per_atom_rmse"))
    if not keys:
        return
    groups = _groups(rows)
    categories = [f"{known[strategy].label}, {size}" for size, strategy, _ in groups]
    panels: list[Panel] = []
    for key in keys:
        series = []
        for k, (_, strategy, group) in enumerate(groups):
            values = np.array([r.value(key) * METRICS[key].scale for r in group])
            spread = Spread.of(values)
            if spread.n:
                # dots a little below the mean, which would hide them
                series.append(Series(strategy, values, np.full(len(values), k + 0.3), kind="dots"))
                series.append(Series(strategy, [spread.mean], [k], x_spread=[spread.deviation]))
        panels.append(
            Panel(METRICS[key].label, "", series, x_scale="auto",
                  categories=categories, hide_categories=bool(panels))
        )  # fmt: skip
    caption = (
        "Every run as a dot, with mean and standard deviation over seeds: how much of a difference "
        "between strategies a change of seed would hide."
    )
    height = 0.9 + 0.32 * len(categories)
    title = "Spread over seeds"
    yield Drawing("seeds", title, caption, panels, height=height, width=4.6, legend=False)


def _liquids(rows: Sequence[RunRow], liquid: Liquid | None) -> Iterator[Drawing]:
    """g(r) of the reference and the teachers, and what the other models differ by, size by size."""
    groups = {
        (size, strategy): [row.rdf for row in group if row.rdf is not None]
        for size, strategy, group in _groups(rows)
    }
    groups = {key: runs for key, runs in groups.items() if runs}
    teachers = [runs for (_, strategy), runs in groups.items() if strategy == "teacher"]
    if not groups or (liquid is None and not teachers):
        return
    name, base = liquid or ("teacher", _mean_distribution(teachers[0]))
    series = [Series("teacher", *_line(runs), kind="line") for runs in teachers]
    if liquid is not None:
        line = Series(name, base.r, base.g, y_spread=np.nan_to_num(base.error), kind="line")
        series.insert(0, line)
    panels = [Panel("r (Å)", "g(r)", series, "Liquid", from_zero=True)]
    for size in _sizes(rows):
        differences = [
            Series(strategy, base.r, y - base.g, y_spread=spread, kind="line")
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


def _mean_distribution(runs: Sequence[RadialDistribution]) -> RadialDistribution:
    return replace(runs[0], g=_line(runs)[1])


def _by_strategy(rows: Sequence[RunRow], x_key: str, y_key: str) -> list[Series]:
    """One series per strategy, one point per size: means and spreads over seeds."""
    series = []
    for strategy in _sorted({row.strategy for row in rows}):
        points = []
        for _, name, group in _groups(rows):
            x, y = _spread(group, x_key), _spread(group, y_key)
            if name == strategy and x.n and y.n:
                points.append((x.mean, y.mean, x.deviation, y.deviation))
        if points:
            x_, y_, dx, dy = np.array(sorted(points)).T
            series.append(Series(strategy, x_, y_, dx, dy, joined=len(points) > 1))
    return series


def _spread(group: Sequence[RunRow], key: str) -> Spread:
    if key == "n_parameters":
        return Spread.of([float(row.n_parameters) for row in group])
    return Spread.of(row.value(key) for row in group).scaled(METRICS[key].scale)


def _size_notes(
    series: Sequence[Series], rows: Sequence[RunRow], x_key: str
) -> list[tuple[float, float, str]]:
    """The size beside the highest point of that size, where there are several sizes."""
    notes = []
    sizes = _sizes(rows)
    for size in sizes if len(sizes) > 1 else ():
        points = []
        for strategy in {row.strategy for row in rows}:
            group = [r for r in rows if (r.group, r.strategy) == (size, strategy)]
            x, y = _spread(group, x_key), _spread(group, "forces_rmse")
            if x.n and y.n:
                points.append((y.mean + (0.0 if math.isnan(y.deviation) else y.deviation), x.mean))
        if points:
            y_top, x_top = max(points)
            notes.append((x_top, y_top, size))
    return notes


# -- the page ----------------------------------------------------------------------------------


def sizes_sections(
    rows: Sequence[RunRow],
    folder: Path,
    baselines: Baselines | None = None,
    liquid: Liquid | None = None,
) -> tuple[tuple[str, ...], list[Section]]:
    """Sentences and sections of a report; tables and figures are written into the folder.

    Parameters
    ----------
    rows : sequence of RunRow
        All runs.
    folder : path
        Made if absent.
    baselines : mapping, optional
        Published potentials: name to metrics, drawn as horizontal lines.
    liquid : (str, RadialDistribution), optional
        Name and g(r) of a potential from elsewhere.

    Raises
    ------
    DataError
        If there are no rows, or two share a name.
    """
    tables = sizes_tables(rows, baselines)
    figures = sizes_figures(rows, folder, baselines, liquid)
    for table in tables:
        table.write(folder)
    verdicts = sizes_verdicts(rows) or ("There is no pair of strategies to compare.",)
    return verdicts, [
        Section("Figures", figures=figures),
        Section("Tables", tables=tables[:-1]),
        Section("Every run", tables=(_short_runs_table(rows),)),
    ]


# -- order -------------------------------------------------------------------------------------


def _check(rows: Sequence[RunRow]) -> None:
    if not rows:
        raise DataError("a study report needs at least one run")
    names = [row.run.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two runs of the study are called '{name}': give each its own name")


def _measured(rows: Sequence[RunRow], keys: Iterable[str]) -> list[str]:
    """Keys that at least one run has a finite value of."""
    return [key for key in keys if any(math.isfinite(row.value(key)) for row in rows)]


def _sorted(strategies: Iterable[str]) -> list[str]:
    """Known strategies in the order of their looks, then the others by name."""
    return sorted(strategies, key=_strategy_key)


def _strategy_key(strategy: str) -> tuple[int, str]:
    return (_ORDER.index(strategy) if strategy in _ORDER else len(_ORDER), strategy)


def _sort_key(row: RunRow) -> tuple[int, str, int, str, int]:
    return (row.n_parameters, row.group, *_strategy_key(row.strategy), row.run.seed)


def _sizes(rows: Sequence[RunRow]) -> list[str]:
    """Labels of sizes by increasing number of parameters."""
    return list(dict.fromkeys(row.group for row in sorted(rows, key=_sort_key)))


def _groups(rows: Sequence[RunRow]) -> list[tuple[str, str, list[RunRow]]]:
    """(size, strategy, runs over seeds), small to large, in the order of strategies."""
    groups: dict[tuple[str, str], list[RunRow]] = {}
    for row in sorted(rows, key=_sort_key):
        groups.setdefault((row.group, row.strategy), []).append(row)
    order = _sizes(rows)
    return sorted(
        ((size, strategy, group) for (size, strategy), group in groups.items()),
        key=lambda g: (order.index(g[0]), _strategy_key(g[1])),
    )
