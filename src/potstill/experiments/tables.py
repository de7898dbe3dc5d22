"""Tables of a study: metrics by variant, changes beside the control, shares of the gap, every run.

Every number is a mean over seeds. The share of the gap between control and teacher that a student
closes has its standard error and is left out where the gap itself is noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from potstill.evaluate.cka import CKAMatrix
from potstill.experiments.results import Group, Results
from potstill.metrics import Metric
from potstill.report.panels import plain_label
from potstill.report.tables import Cell, Table

ERRORS = (
    "forces_rmse",
    "forces_mae",
    "mean_force_rmse",
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
COSTS = ("time_per_step_atom_us", "memory_per_atom_kib")
_COMPARED = (
    "forces_rmse",
    "mean_force_rmse",
    "energy_per_atom_rmse",
    "stress_rmse",
    "rdf_error",
    "adf_error",
    "cdf_error",
    "internal_error",
    "free_energy_error",
)

#: OC20's metrics, by the keys of `potstill.metrics.S2EF_METRICS`; the first two are judged.
S2EF_COLUMNS = (
    Metric("energy_mae", "Energy MAE", "meV", 1e3),
    Metric("free_forces_mae", "Force MAE", "meV/Å", 1e3),
    Metric("free_forces_cosine", "Force cosine", lower_is_better=False),
    Metric("efwt", "EFwT", "%", lower_is_better=False),
)
S2EF_JUDGED = S2EF_COLUMNS[:2]


# -- by size and strategy --------------------------------------------------------------------------


def summary_table(
    results: Results,
    keys: Iterable[str],
    name: str,
    title: str,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
) -> Table:
    """Means and deviations over seeds of what was measured, by size and strategy."""
    metrics = results.measured(keys)
    body: list[tuple[Cell, ...]] = []
    for group in results.ordered:
        spreads = [group.spread(metric) for metric in metrics]
        if not any(spread.n for spread in spreads):
            continue
        first = group.rows[0]
        n_seeds = len(group.rows) if first.run.seed >= 0 else None
        head = (plain_label(group.strategy), group.size, first.n_parameters or None, n_seeds)
        body.append((*head, *(spread if spread.n else None for spread in spreads)))
    for label, values in (baselines or {}).items():
        shown = [values[m.key] * m.scale if m.key in values else None for m in metrics]
        body.append((label, "published", None, None, *shown))
    columns = ("Strategy", "Size", "Parameters", "Seeds", *(m.label for m in metrics))
    return Table(name, title, columns, tuple(body), "Mean ± standard deviation over seeds.")


def comparison_table(results: Results) -> Table:
    """Every student beside each variant that it is judged by."""
    body = []
    for one in results.comparisons(results.measured(_COMPARED)):
        c = one.comparison
        if c.outcome == "unknown":
            continue
        spreads = (c.ours.scaled(c.metric.scale), c.theirs.scaled(c.metric.scale))
        interval = (100 * c.low, 100 * c.high) if c.tested else (None, None)
        pair = f"{plain_label(one.ours.strategy)} − {plain_label(one.theirs.strategy)}"
        head = (one.ours.size, pair, c.metric.label, *spreads, 100 * c.change, *interval)
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


def runs_tables(results: Results) -> tuple[Table, Table]:
    """Every run: all metrics in stored units, for the files; and what fits on the page."""
    rows = [row for group in results.ordered for row in group.rows if row.run.seed >= 0]
    keys = list(dict.fromkeys(key for row in rows for key in row.metrics))
    main = results.measured((*_COMPARED, *COSTS)) or list(S2EF_COLUMNS)
    full: list[tuple[Cell, ...]] = []
    short: list[tuple[Cell, ...]] = []
    for row in rows:
        variant, seed = row.run.variant, row.run.seed
        head = (row.run.name, variant.strategy, variant.group, row.n_parameters, seed)
        full.append((*head, *(row.metrics.get(key) for key in keys)))
        numbers = (row.value(metric.key) * metric.scale for metric in main)
        short.append((plain_label(variant.strategy), variant.group, seed, *numbers))
    columns = ("name", "strategy", "size", "n_parameters", "seed", *keys)
    labels = ("Strategy", "Size", "Seed", *(metric.label for metric in main))
    note = "All metrics of every run, in stored units, are in the file."
    return (
        Table("table_runs", "Every run, in stored units", columns, tuple(full)),
        Table("table_runs", "Main numbers of every run", labels, tuple(short), note),
    )


# -- by pair of models, as in the tables of Ekström Kelvinius et al. -------------------------------


def result_table(results: Results, split: str | None = None) -> Table:
    """Errors of control, teacher and every strategy, and shares of the gap (Table 1 of the paper).

    Of a test set, or averaged over all.
    """
    shown: list[tuple[str, str, Group]] = []
    for pair, students in results.pairs.items():
        against, teacher = students[0].variant.against[0], students[0].variant.teacher_name
        for words, name in (("control", against), ("teacher", teacher)):
            if name in results.variants:
                shown.append((pair, f"{words} ({plain(name)})", results.variants[name]))
        shown += [(pair, student.strategy, student) for student in students]
    metrics = _telling([group for _, _, group in shown], split)
    body = tuple(
        (plain(pair), words, *_cells(results, group, metrics, split))
        for pair, words, group in shown
    )
    where = "mean over the test sets" if split is None else split
    name = "table_results" if split is None else f"table_results_{file_name(split)}"
    columns = ("Pair", "Run", *(metric.label for metric in metrics), "Against the control")
    return Table(name, f"Strategies, {where}", columns, body, _NOTE)


_NOTE = (
    "Mean over seeds ± standard deviation; in brackets the share of the gap between control and "
    "teacher that is closed ± its standard error, left out where the gap is below two standard "
    "errors (over seeds; of a single run over frames). “Against the control”: MAE of "
    "energies and forces, Welch's t test over seeds at 95 %, not corrected for the number of "
    "comparisons; “unclear” where the difference is not beyond the spread over seeds."
)


def seed_table(results: Results) -> Table:
    """Change of energies and forces of every student against the control of its own seed."""
    shown = [(split, metric) for split in results.splits for metric in S2EF_JUDGED]
    body: list[tuple[Cell, ...]] = []
    for pair, students in results.pairs.items():
        for student in students:
            for row in student.rows:
                alone = Group((row,))
                changes = [100.0 * results.change(alone, m, split).change for split, m in shown]
                body.append((plain(pair), student.strategy, row.run.seed, *changes))
    columns = [f"{metric.name.split()[0]}, {split} (%)" for split, metric in shown]
    title = "Seed by seed: change against the control of the same seed"
    return Table("table_seeds", title, ("Pair", "Run", "Seed", *columns), tuple(body), digits=2)


def model_table(results: Results) -> Table:
    """Parameters and throughput of the models."""
    found = results.similarity["throughput"]
    speeds = {name: one["samples_per_second"] for name, one in found.items()}
    body = tuple(
        (plain(name), found[name]["n_parameters"], speed, max(speeds.values()) / speed)
        for name, speed in sorted(speeds.items(), key=lambda item: -item[1])
    )
    one = next(iter(found.values()))
    note = (
        f"Energies and forces of {one['n_samples']} structures, neighbor lists included, in "
        f"batches of at most {one['max_atoms']} atoms; median of {one['n_rounds']} rounds, "
        "alternating between models. A distilled student is as fast as its control."
    )
    columns = ("Model", "Parameters", "Structures per second", "Times slower than the fastest")
    return Table("table_models", "Size and speed of the models", columns, body, note)


def grid_table(results: Results, pair: str, grid: str) -> Table:
    """Runs of a grid, with the similarity of the tapped features before and after."""
    points = results.grids[pair, grid]
    metrics = _telling(points.values(), None)
    body: list[tuple[Cell, ...]] = []
    seeds = {seed for group in points.values() for seed in group.seeds}
    against = next(iter(points.values())).variant.against[0]
    if against in results.variants:
        control = results.variants[against].at(seeds)
        body.append(("control", *_cells(results, control, metrics, None), None, None, None, None))
    for point, group in points.items():
        cells = _cells(results, group, metrics, None)
        body.append((str(point), *cells, *_similarity(results, group)))
    columns = (grid, *(metric.label for metric in metrics), "Against the control")
    probes = ("CKA before", "CKA after", "Energy R² of the teacher's tap", "Forces R²")
    name = f"table_{file_name(pair)}_{file_name(grid)}"
    return Table(name, f"{plain(pair)}: {grid}", (*columns, *probes), tuple(body), _GRID_NOTE)


_GRID_NOTE = (
    "Mean over the test sets. CKA of the two taps before distillation (the control) and after; R² "
    "of linear probes on the teacher's tap (forces: their lengths, or vectors for vector features)."
)


def _telling(groups: Iterable[Group], split: str | None) -> list[Metric]:
    """Metrics that are not zero throughout, as EFwT may be."""
    groups = list(groups)
    return [m for m in S2EF_COLUMNS if any(any(g.values(m.key, split)) for g in groups)]


def _cells(
    results: Results, group: Group, metrics: Iterable[Metric], split: str | None
) -> list[Cell]:
    """Value and share of the gap for each metric, and the changes of energies and forces."""
    cells: list[Cell] = []
    judged = bool(group.variant.against)
    for metric in metrics:
        text = str(group.spread(metric, split))
        share = results.share(group, metric, split) if judged else None
        if share is not None and share.reported:
            error = f" ± {share.standard_error:.0f}" if share.standard_error > 0 else ""
            text += f" ({share.percent:.0f}{error} %)"
        cells.append(text.replace("-", "−"))
    words = []
    for metric in S2EF_JUDGED if judged else ():
        c = results.change(group, metric, split)
        if not math.isnan(c.change):
            outcome = f" ({c.outcome})" if c.tested else ""
            words.append(f"{metric.name.split()[0].lower()} {percent(c.change)}{outcome}")
    return [*cells, ", ".join(words)]


def _similarity(results: Results, group: Group) -> list[Cell]:
    """CKA of the distilled taps before and after, and probes of the teacher's tap."""
    cells: list[Cell] = [None, None, None, None]
    row = group.rows[0]
    found = results.similarity.get("cka", {}).get(row.run.name)
    if found is None or row.taps is None:
        return cells
    for k, when in enumerate(("before", "after")):
        matrix = CKAMatrix.from_json(found[when])
        if row.taps[0] in matrix.first and row.taps[1] in matrix.second:
            cells[k] = matrix[row.taps]
    for score in results.similarity.get("probes", {}).get(group.variant.teacher_name, []):
        if score["tap"] == row.taps[1]:
            cells[2:] = [score["energy_r2"], score["forces_r2"]]
    return cells


# -- words -----------------------------------------------------------------------------------------


def percent(fraction: float) -> str:
    """A change in whole percent, with its sign."""
    return f"{'+' if fraction > 0 else '−'}{abs(100 * fraction):.0f} %"


def plain(name: str) -> str:
    """A name in words."""
    return name.replace("_", " ")


def file_name(name: str) -> str:
    """A name as a part of file names."""
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")
