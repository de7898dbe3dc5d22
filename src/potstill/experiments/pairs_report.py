"""Report of a study of feature distillation, shaped as the tables of Ekström Kelvinius et al.

Every number is a mean over seeds; the share of the gap between control and teacher that a strategy
closes is given with its standard error and left out where the gap itself is noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potstill.errors import DataError
from potstill.evaluate.cka import CKAMatrix, similarity_gain
from potstill.evaluate.errors import GapShare, estimate_over_seeds, share_of_gap
from potstill.evaluate.learning import progress_panels
from potstill.experiments.rows import RunRow
from potstill.experiments.spec import GridPoint
from potstill.metrics import Estimate, Metric
from potstill.report.heatmaps import Heatmap, write_heatmaps
from potstill.report.page import Section
from potstill.report.panels import Drawing
from potstill.report.plots import Figure, write_figure
from potstill.report.tables import Cell, Spread, Table
from potstill.report.verdicts import Comparison, compare

#: Metrics of the tables, by the keys of `potstill.metrics.S2EF_METRICS`.
COLUMNS = (
    Metric("energy_mae", "Energy MAE", "meV", 1e3),
    Metric("free_forces_mae", "Force MAE", "meV/Å", 1e3),
    Metric("free_forces_cosine", "Force cosine", lower_is_better=False),
    Metric("efwt", "EFwT", "%", lower_is_better=False),
)
_JUDGED = COLUMNS[:2]


@dataclass(frozen=True)
class Pair:
    """The runs of one pair of models: control, teacher and students by strategy."""

    name: str
    control: list[RunRow]
    teacher: list[RunRow]
    students: dict[str, list[RunRow]]

    @property
    def strategies(self) -> dict[str, list[RunRow]]:
        """Students by strategy, without grids."""
        return {key: rows for key, rows in self.students.items() if rows[0].variant.point is None}

    @property
    def grids(self) -> dict[str, dict[GridPoint, list[RunRow]]]:
        """Students by grid and place in it."""
        found: dict[str, dict[GridPoint, list[RunRow]]] = {}
        for rows in self.students.values():
            if (point := rows[0].variant.point) is not None:
                found.setdefault(point.grid, {})[point] = rows
        return found

    @property
    def rows(self) -> list[RunRow]:
        """All runs."""
        return [*self.control, *self.teacher, *(r for rows in self.students.values() for r in rows)]


def pairs_of(rows: Sequence[RunRow]) -> list[Pair]:
    """Sort the runs of a study by pair; each has its control and its teacher.

    Raises
    ------
    DataError
        If there are no rows.
    """
    if not rows:
        raise DataError("a study report needs at least one run")
    variants: dict[str, list[RunRow]] = {}
    for row in rows:
        variants.setdefault(row.variant.name, []).append(row)
    pairs: dict[str, Pair] = {}
    for found in variants.values():
        one = found[0]
        if one.variant.against:
            control = variants.get(one.variant.against[0], [])
            teacher = variants.get(one.variant.teacher_name, [])
            pair = pairs.setdefault(one.group, Pair(one.group, control, teacher, {}))
            pair.students[one.strategy] = found
    return list(pairs.values())


# -- tables ----------------------------------------------------------------------------------------


def result_table(pairs: Sequence[Pair], split: str | None = None) -> Table:
    """Errors of control, teacher and every strategy, and shares of the gap (Table 1 of the paper).

    Of a test set, or averaged over all.
    """
    body = []
    metrics = _shown((row for pair in pairs for row in pair.rows), split)
    for pair in pairs:
        for name, rows in (("control", pair.control), ("teacher", pair.teacher)):
            if rows:
                words = f"{name} ({_plain(rows[0].variant.name)})"
                body.append((_plain(pair.name), words, *_cells(pair, rows, metrics, split)))
        for name, rows in pair.strategies.items():
            body.append((_plain(pair.name), name, *_cells(pair, rows, metrics, split)))
    where = "mean over the test sets" if split is None else split
    name = "table_results" if split is None else f"table_results_{_file(split)}"
    columns = ("Pair", "Run", *(metric.label for metric in metrics), "Against the control")
    return Table(name, f"Strategies, {where}", columns, tuple(body), _NOTE)


_NOTE = (
    "Mean over seeds ± standard deviation; in brackets the share of the gap between control and "
    "teacher that is closed ± its standard error, left out where the gap is below two standard "
    "errors (over seeds; of a single run over frames). “Against the control”: MAE of "
    "energies and forces, Welch's t test over seeds at 95 %, not corrected for the number of "
    "comparisons; “unclear” where the difference is not beyond the spread over seeds."
)


def _shown(rows: Iterable[RunRow], split: str | None) -> list[Metric]:
    """Metrics that say something: EFwT may be zero everywhere."""
    rows = list(rows)
    return [m for m in COLUMNS if any(value != 0.0 for value in _values(rows, m, split))]


def _cells(
    pair: Pair, rows: Sequence[RunRow], metrics: Sequence[Metric], split: str | None
) -> list[Cell]:
    """Value and share of the gap for each metric, and the verdict."""
    cells: list[Cell] = []
    own = bool(rows[0].variant.against)
    for metric in metrics:
        text = str(Spread.of(_values(rows, metric, split)).scaled(metric.scale))
        share = _share(pair, rows, metric, split) if own else None
        if share is not None and share.reported:
            error = f" ± {share.standard_error:.0f}" if share.standard_error > 0 else ""
            text += f" ({share.percent:.0f}{error} %)"
        cells.append(text.replace("-", "−"))
    return [*cells, _verdict(pair, rows, split) if own else ""]


def _metrics(row: RunRow, split: str | None) -> Mapping[str, Estimate]:
    """Of a test set, or averaged."""
    assert row.tests is not None
    return row.tests.average if split is None else row.tests.splits[split]


def _values(rows: Sequence[RunRow], metric: Metric, split: str | None) -> list[float]:
    found = [_metrics(row, split).get(metric.key) for row in rows]
    return [estimate.value for estimate in found if estimate is not None]


def _estimate(rows: Sequence[RunRow], metric: Metric, split: str | None) -> Estimate | None:
    """Over seeds; of a single run, over its frames."""
    found = [e for row in rows if (e := _metrics(row, split).get(metric.key)) is not None]
    if len(found) < 2:
        return found[0] if found else None
    return estimate_over_seeds([estimate.value for estimate in found])


def _share(
    pair: Pair, rows: Sequence[RunRow], metric: Metric, split: str | None
) -> GapShare | None:
    seeds = {row.run.seed for row in rows}
    parts = [
        _estimate(runs, metric, split)
        for runs in (rows, _at(pair.control, seeds), _at(pair.teacher, seeds))
    ]
    if any(part is None for part in parts):
        return None
    return share_of_gap(*parts)  # type: ignore[arg-type]


def _change(
    pair: Pair, rows: Sequence[RunRow], metric: Metric, split: str | None = None
) -> Comparison:
    """Runs against the controls of their seeds."""
    controls = _at(pair.control, {row.run.seed for row in rows})
    return compare(metric, _values(rows, metric, split), _values(controls, metric, split))


def _verdict(pair: Pair, rows: Sequence[RunRow], split: str | None) -> str:
    """What a strategy does to energies and forces."""
    words = []
    for metric in _JUDGED:
        c = _change(pair, rows, metric, split)
        if c.outcome != "unknown":
            sign = "+" if c.change > 0 else "−"
            words.append(
                f"{metric.name.split()[0].lower()} {sign}{abs(100 * c.change):.0f} %"
                + (f" ({c.outcome})" if c.tested else "")
            )
    return ", ".join(words)


def _at(rows: Sequence[RunRow], seeds: set[int]) -> list[RunRow]:
    """Runs of these seeds; a teacher from elsewhere has none (-1) and belongs to all."""
    return [row for row in rows if row.run.seed in seeds or row.run.seed < 0]


def seed_table(pairs: Sequence[Pair], splits: Sequence[str]) -> Table:
    """Change of energies and forces of every student against the control of its own seed."""
    body: list[tuple[Cell, ...]] = []
    for pair in pairs:
        for run, rows in pair.strategies.items():
            for row in rows:
                changes = [
                    100.0 * _change(pair, [row], m, split).change
                    for split in splits
                    for m in _JUDGED
                ]
                body.append((_plain(pair.name), run, row.run.seed, *changes))
    columns = [f"{m.name.split()[0]}, {split} (%)" for split in splits for m in _JUDGED]
    title = "Seed by seed: change against the control of the same seed"
    return Table("table_seeds", title, ("Pair", "Run", "Seed", *columns), tuple(body), digits=2)


def model_table(measured: Mapping[str, Any]) -> Table:
    """Parameters and throughput of the models."""
    found = measured.get("throughput", {})
    fastest = max((one["samples_per_second"] for one in found.values()), default=math.nan)
    body = [
        (
            _plain(name),
            one["n_parameters"],
            one["samples_per_second"],
            fastest / one["samples_per_second"],
        )
        for name, one in sorted(found.items(), key=lambda item: -item[1]["samples_per_second"])
    ]
    one = next(iter(found.values()), None)
    note = ""
    if one is not None:
        note = (
            f"Energies and forces of {one['n_samples']} structures, neighbor lists included, in "
            f"batches of at most {one['max_atoms']} atoms; median of {one['n_rounds']} rounds, "
            f"alternating between models. A distilled student is as fast as its control."
        )
    columns = ("Model", "Parameters", "Structures per second", "Times slower than the fastest")
    return Table("table_models", "Size and speed of the models", columns, tuple(body), note)


def grid_table(pair: Pair, grid: str, measured: Mapping[str, Any]) -> Table:
    """Runs of a grid, with the similarity of the tapped features before and after."""
    runs = pair.grids[grid]
    metrics = _shown((row for rows in runs.values() for row in rows), None)
    body: list[tuple[Cell, ...]] = []
    if pair.control:
        own = _at(pair.control, {row.run.seed for rows in runs.values() for row in rows})
        body.append(("control", *_cells(pair, own, metrics, None), None, None, None, None))
    for point, rows in runs.items():
        similarity = _similarity(rows[0], measured)
        body.append((str(point), *_cells(pair, rows, metrics, None), *similarity))
    columns = (grid, *(metric.label for metric in metrics), "Against the control")
    probes = ("CKA before", "CKA after", "Energy R² of the teacher's tap", "Forces R²")
    title = f"{_plain(pair.name)}: {grid}"
    name = f"table_{_file(pair.name)}_{_file(grid)}"
    return Table(name, title, (*columns, *probes), tuple(body), _GRID_NOTE)


_GRID_NOTE = (
    "Mean over the test sets. CKA of the two taps before distillation (the control) and after; R² "
    "of linear probes on the teacher's tap (forces: their lengths, or vectors for vector features)."
)


def _similarity(row: RunRow, measured: Mapping[str, Any]) -> list[Cell]:
    """CKA of the distilled taps before and after, and probes of the teacher's tap."""
    cells: list[Cell] = [None, None, None, None]
    found = measured.get("cka", {}).get(row.run.name)
    if found is None or row.taps is None:
        return cells
    for k, when in enumerate(("before", "after")):
        matrix = CKAMatrix.from_json(found[when])
        if row.taps[0] in matrix.first and row.taps[1] in matrix.second:
            cells[k] = matrix[row.taps]
    for score in measured.get("probes", {}).get(row.variant.teacher_name, []):
        if score["tap"] == row.taps[1]:
            cells[2:] = [score["energy_r2"], score["forces_r2"]]
    return cells


# -- figures ---------------------------------------------------------------------------------------


def progress_figure(pair: Pair, folder: Path, grid: str | None = None) -> Figure:
    """Validation errors against processor time and steps (Figs. 4, 5 and 9 of the paper).

    Of the strategies of a pair, or of the runs of a grid; beside the control.
    """
    found = pair.strategies
    if grid is not None:
        found = {str(point): rows for point, rows in pair.grids[grid].items()}
    seeds = {row.run.seed for rows in found.values() for row in rows}
    found = {"control": _at(pair.control, seeds), **found}
    curves = {run: [r.curve for r in rows if r.curve is not None] for run, rows in found.items()}
    what = "" if grid is None else f"_{_file(grid)}"
    title = _plain(pair.name) if grid is None else f"{_plain(pair.name)}, {grid}"
    panels = [
        *progress_panels(curves, "processor_seconds"),
        *progress_panels(curves, "steps"),
    ]
    drawing = Drawing(
        f"progress_{_file(pair.name)}{what}",
        f"{title}: validation error while students are trained",
        "Against the processor time of training and validation on one thread, without the one pass "
        "of the teacher, and against steps; one line per seed.",
        panels,
        n_columns=2,
    )
    return write_figure(folder, drawing)


def grid_figure(pair: Pair, grid: str, folder: Path) -> Figure | None:
    """Change of energies and forces by two options, as a field; None for other grids."""
    runs = pair.grids[grid]
    options = list(next(iter(runs)).options)
    if len(options) != 2 or not pair.control:
        return None
    # Values in the order of the config; those that YAML makes unhashable are compared as text.
    first, second = (
        list(dict.fromkeys(str(point.options[key]) for point in runs)) for key in options
    )
    if min(len(first), len(second)) < 2:
        return None
    maps = []
    for metric in _JUDGED:
        values = np.full((len(first), len(second)), np.nan)
        for point, rows in runs.items():
            one, other = (str(point.options[key]) for key in options)
            values[first.index(one), second.index(other)] = _change(pair, rows, metric).change
        down, across = map(_plain, options)
        maps.append(Heatmap(metric.name, first, second, values, down, across, signed=True))
    return write_heatmaps(
        folder,
        f"grid_{_file(pair.name)}_{_file(grid)}",
        f"{_plain(pair.name)}: {grid}",
        "Change against the control, as a fraction of it: blue is better. Mean over the test sets.",
        maps,
    )


def cka_figure(pair: Pair, row: RunRow, measured: Mapping[str, Any], folder: Path) -> Figure:
    """Similarity of student and teacher before and after, and the gain (Figs. 6 to 8)."""
    before, after = (
        CKAMatrix.from_json(measured["cka"][row.run.name][when]) for when in ("before", "after")
    )
    known = row.taps is not None and row.taps[0] in after.first and row.taps[1] in after.second
    gain = similarity_gain(before, after)
    look: dict[str, Any] = {
        "row_label": _plain(row.variant.against[0]),
        "column_label": _plain(row.variant.teacher_name),
        "marked": row.taps if known else None,
    }
    maps = [
        Heatmap("before", before.first, before.second, before.values, **look),
        Heatmap("after", after.first, after.second, after.values, **look),
        Heatmap("similarity gain", gain.first, gain.second, gain.values, signed=True, **look),
    ]
    return write_heatmaps(
        folder,
        f"cka_{_file(pair.name)}_{_file(row.strategy)}",
        f"{_plain(pair.name)}, {row.strategy}: similarity of student and teacher",
        f"Linear CKA over {after.n_atoms} atoms of the validation set; before: the control. The "
        "framed field is the pair of taps that was distilled.",
        maps,
    )


# -- the page --------------------------------------------------------------------------------------


def pairs_sections(
    rows: Sequence[RunRow], measured: Mapping[str, Any], folder: Path
) -> tuple[tuple[str, ...], list[Section]]:
    """Sentences and sections of a report; tables and figures are written into the folder.

    `measured` is what `potstill.experiments.measures.SimilaritySettings.measure` returns.
    """
    pairs = pairs_of(rows)
    assert rows[0].tests is not None
    splits = list(rows[0].tests.splits)
    main = [p for p in pairs if p.strategies]
    models = model_table(measured)
    tables = [result_table(main)] if main else []
    by_split = [result_table(main, split) for split in splits] if main else []
    by_split += [seed_table(main, splits)] if main else []
    grids = [grid_table(pair, grid, measured) for pair in pairs for grid in pair.grids]
    for table in (*tables, models, *by_split, *grids):
        table.write(folder)
    progress = [progress_figure(pair, folder) for pair in main]
    ablations = [
        figure
        for pair in pairs
        for grid in pair.grids
        for figure in (progress_figure(pair, folder, grid), grid_figure(pair, grid, folder))
        if figure is not None
    ]
    similar = [
        cka_figure(pair, found[0], measured, folder)
        for pair in pairs
        for rows in pair.strategies.values()
        if (found := [r for r in rows if r.run.name in measured.get("cka", {})])
    ]
    sections = [
        Section("Results", tables=(*tables, models)),
        Section("Progress", figures=tuple(progress)),
        Section("Similarity", figures=tuple(similar)),
        Section("Ablations", figures=tuple(ablations), tables=tuple(grids)),
        Section("By test set", tables=tuple(by_split)),
    ]
    return sentences(main), sections


def sentences(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """For each pair: which strategies help and which do not, energies and forces apart."""
    found = []
    for pair in pairs:
        for metric in _JUDGED:
            outcomes: dict[str, list[str]] = {}
            for run, rows in pair.strategies.items():
                c = _change(pair, rows, metric)
                if c.outcome == "unknown":
                    continue
                how = c.outcome if c.tested else f"{c.outcome} in one run"
                sign = "+" if c.change > 0 else "−"
                outcomes.setdefault(how, []).append(f"{run} ({sign}{abs(100 * c.change):.0f} %)")
            words = "; ".join(f"{how}: {', '.join(runs)}" for how, runs in outcomes.items())
            if words:
                found.append(
                    f"{_plain(pair.name)}, {metric.name}, compared with the control: {words}."
                )
    return tuple(found) or ("There is no strategy to compare.",)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")
