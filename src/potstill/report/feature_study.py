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
from potstill.evaluate.learning import LearningCurves, progress_panels
from potstill.metrics import Estimate, Metric
from potstill.report.heatmaps import Heatmap, write_heatmaps
from potstill.report.page import Page, Section, write_page
from potstill.report.plots import Figure, write_figure
from potstill.report.tables import Cell, Spread, Table
from potstill.report.verdicts import compare

#: Metrics of the tables, by the keys of `potstill.metrics.S2EF_METRICS`.
COLUMNS = (
    Metric("energy_mae", "Energy MAE", "meV", 1e3),
    Metric("free_forces_mae", "Force MAE", "meV/Å", 1e3),
    Metric("free_forces_cosine", "Force cosine", lower_is_better=False),
    Metric("efwt", "EFwT", "%", lower_is_better=False),
)
_JUDGED = COLUMNS[:2]

_CONTROL, _TEACHER = "control", "teacher"


@dataclass(frozen=True)
class FeatureRow:
    """One trained model of a study.

    Parameters
    ----------
    name : str
        Unique name of the run.
    model, teacher : str
        What was trained, and by whom; `teacher` and `pair` are None where it was trained alone.
    pair, run : str
        Pair of models, and strategy. Runs of a grid are called `grid[option=value,...]`.
    seed, n_parameters : int
        Of the initial weights, -1 of a teacher from elsewhere; trainable numbers.
    splits, average : mapping
        Metrics by test set, and averaged over these.
    taps : (str, str), optional
        Tap of the student that learned from one of the teacher's.
    curve : LearningCurves, optional
        Of the run.
    """

    name: str
    model: str
    teacher: str | None
    pair: str | None
    run: str
    seed: int
    n_parameters: int
    splits: Mapping[str, Mapping[str, Estimate]]
    average: Mapping[str, Estimate]
    taps: tuple[str, str] | None = None
    curve: LearningCurves | None = None

    def metrics(self, split: str | None) -> Mapping[str, Estimate]:
        """Of a test set, or averaged."""
        return self.average if split is None else self.splits[split]


@dataclass(frozen=True)
class PairRuns:
    """The runs of one pair of models, by strategy; `control` and `teacher` among them."""

    name: str
    student: str
    teacher: str
    runs: dict[str, list[FeatureRow]]

    @property
    def strategies(self) -> list[str]:
        """Names of the strategies, without grids."""
        return [run for run in self.runs if run not in (_CONTROL, _TEACHER) and "[" not in run]

    def grid(self, name: str) -> dict[str, list[FeatureRow]]:
        """Runs of a grid by their options."""
        start = f"{name}["
        return {
            run.removeprefix(start)[:-1]: rows
            for run, rows in self.runs.items()
            if run.startswith(start)
        }

    @property
    def grids(self) -> list[str]:
        """Names of the grids."""
        return list(dict.fromkeys(run.split("[")[0] for run in self.runs if "[" in run))


def pairs_of(rows: Sequence[FeatureRow]) -> list[PairRuns]:
    """Sort the runs of a study by pair; each has its control and its teacher.

    Raises
    ------
    DataError
        If there are no rows.
    """
    if not rows:
        raise DataError("a study report needs at least one run")
    alone: dict[str, list[FeatureRow]] = {}
    pairs: dict[str, PairRuns] = {}
    for row in rows:
        if row.pair is None:
            alone.setdefault(row.model, []).append(row)
            continue
        assert row.teacher is not None
        pair = pairs.setdefault(row.pair, PairRuns(row.pair, row.model, row.teacher, {}))
        pair.runs.setdefault(row.run, []).append(row)
    for pair in pairs.values():
        own = {_CONTROL: alone.get(pair.student, []), _TEACHER: alone.get(pair.teacher, [])}
        found = {role: runs for role, runs in own.items() if runs}
        pair.runs.update({**found, **{k: v for k, v in pair.runs.items() if k not in found}})
    return list(pairs.values())


# -- tables ----------------------------------------------------------------------------------------


def result_table(pairs: Sequence[PairRuns], split: str | None = None) -> Table:
    """Errors of control, teacher and every strategy, and shares of the gap (Table 1 of the paper).

    Parameters
    ----------
    pairs : sequence of PairRuns
        All pairs.
    split : str, optional
        A test set; the average over all by default.
    """
    body = []
    metrics = _shown((row for p in pairs for rows in p.runs.values() for row in rows), split)
    for pair in pairs:
        named = {_CONTROL: pair.student, _TEACHER: pair.teacher}
        for run in [r for r in (_CONTROL, _TEACHER) if r in pair.runs] + pair.strategies:
            words = f"{run} ({_plain(named[run])})" if run in named else run
            body.append((_plain(pair.name), words, *_cells(pair, pair.runs[run], metrics, split)))
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


def _shown(rows: Iterable[FeatureRow], split: str | None) -> list[Metric]:
    """Metrics that say something: EFwT may be zero everywhere."""
    rows = list(rows)
    return [m for m in COLUMNS if any(value != 0.0 for value in _values(rows, m, split))]


def _cells(
    pair: PairRuns, rows: Sequence[FeatureRow], metrics: Sequence[Metric], split: str | None
) -> list[Cell]:
    """Value and share of the gap for each metric, and the verdict."""
    cells: list[Cell] = []
    own = rows[0].pair is not None
    for metric in metrics:
        text = str(Spread.of(_values(rows, metric, split)).scaled(metric.scale))
        share = _share(pair, rows, metric, split) if own else None
        if share is not None and share.reported:
            error = f" ± {share.standard_error:.0f}" if share.standard_error > 0 else ""
            text += f" ({share.percent:.0f}{error} %)"
        cells.append(text.replace("-", "−"))
    return [*cells, _verdict(pair, rows, split) if own else ""]


def _values(rows: Sequence[FeatureRow], metric: Metric, split: str | None) -> list[float]:
    found = [row.metrics(split).get(metric.key) for row in rows]
    return [estimate.value for estimate in found if estimate is not None]


def _estimate(rows: Sequence[FeatureRow], metric: Metric, split: str | None) -> Estimate | None:
    """Over seeds; of a single run, over its frames."""
    found = [e for row in rows if (e := row.metrics(split).get(metric.key)) is not None]
    if len(found) < 2:
        return found[0] if found else None
    return estimate_over_seeds([estimate.value for estimate in found])


def _share(
    pair: PairRuns, rows: Sequence[FeatureRow], metric: Metric, split: str | None
) -> GapShare | None:
    seeds = {row.seed for row in rows}
    parts = [
        _estimate(runs, metric, split)
        for runs in (rows, _at(pair, _CONTROL, seeds), _at(pair, _TEACHER, seeds))
    ]
    if any(part is None for part in parts):
        return None
    return share_of_gap(*parts)  # type: ignore[arg-type]


def _verdict(pair: PairRuns, rows: Sequence[FeatureRow], split: str | None) -> str:
    """What a strategy does to energies and forces."""
    words = []
    controls = _at(pair, _CONTROL, {row.seed for row in rows})
    for metric in _JUDGED:
        ours, theirs = _values(rows, metric, split), _values(controls, metric, split)
        if ours and theirs:
            c = compare(metric, ours, theirs)
            sign = "+" if c.change > 0 else "−"
            words.append(
                f"{metric.name.split()[0].lower()} {sign}{abs(100 * c.change):.0f} %"
                + (f" ({c.outcome})" if c.tested else "")
            )
    return ", ".join(words)


def _at(pair: PairRuns, run: str, seeds: set[int]) -> list[FeatureRow]:
    """Runs of these seeds; a teacher from elsewhere has none (-1) and belongs to all."""
    return [row for row in pair.runs.get(run, []) if row.seed in seeds or row.seed < 0]


def seed_table(pairs: Sequence[PairRuns], splits: Sequence[str]) -> Table:
    """Change of energies and forces of every student against the control of its own seed."""
    body: list[tuple[Cell, ...]] = []
    for pair in pairs:
        for run in pair.strategies:
            for row in pair.runs[run]:
                controls = _at(pair, _CONTROL, {row.seed})
                changes = [
                    100.0 * compare(m, _values([row], m, split), _values(controls, m, split)).change
                    for split in splits
                    for m in _JUDGED
                ]
                body.append((_plain(pair.name), run, row.seed, *changes))
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
            f"batches of at most {one['max_atoms']} atoms; median of {one['n_rounds']} rounds, the "
            "models taking turns. A distilled student is as fast as its control."
        )
    columns = ("Model", "Parameters", "Structures per second", "Times slower than the fastest")
    return Table("table_models", "Size and speed of the models", columns, tuple(body), note)


def grid_table(pair: PairRuns, grid: str, measured: Mapping[str, Any]) -> Table:
    """Runs of a grid, with the similarity of the tapped features before and after."""
    runs = pair.grid(grid)
    metrics = _shown((row for rows in runs.values() for row in rows), None)
    body: list[tuple[Cell, ...]] = []
    if _CONTROL in pair.runs:
        own = _at(pair, _CONTROL, {row.seed for rows in runs.values() for row in rows})
        body.append((_CONTROL, *_cells(pair, own, metrics, None), None, None, None, None))
    for options, rows in runs.items():
        similarity = _similarity(rows[0], measured)
        body.append((options, *_cells(pair, rows, metrics, None), *similarity))
    columns = (grid, *(metric.label for metric in metrics), "Against the control")
    probes = ("CKA before", "CKA after", "Energy R² of the teacher's tap", "Forces R²")
    title = f"{_plain(pair.name)}: {grid}"
    name = f"table_{_file(pair.name)}_{_file(grid)}"
    return Table(name, title, (*columns, *probes), tuple(body), _GRID_NOTE)


_GRID_NOTE = (
    "Mean over the test sets. CKA of the two taps before distillation (the control) and after; R² "
    "of linear probes on the teacher's tap (forces: their lengths, or vectors for vector features)."
)


def _similarity(row: FeatureRow, measured: Mapping[str, Any]) -> list[Cell]:
    """CKA of the distilled taps before and after, and probes of the teacher's tap."""
    cells: list[Cell] = [None, None, None, None]
    found = measured.get("cka", {}).get(row.name)
    if found is None or row.taps is None:
        return cells
    for k, when in enumerate(("before", "after")):
        matrix = CKAMatrix.from_json(found[when])
        if row.taps[0] in matrix.first and row.taps[1] in matrix.second:
            cells[k] = matrix[row.taps]
    for score in measured.get("probes", {}).get(row.teacher, []):
        if score["tap"] == row.taps[1]:
            cells[2:] = [score["energy_r2"], score["forces_r2"]]
    return cells


# -- figures ---------------------------------------------------------------------------------------


def progress_figure(pair: PairRuns, folder: Path, grid: str | None = None) -> Figure:
    """Validation errors against processor time and steps (Figs. 4, 5 and 9 of the paper).

    Of the strategies of a pair, or of the runs of a grid; beside the control.
    """
    found = {run: pair.runs[run] for run in pair.strategies} if grid is None else pair.grid(grid)
    seeds = {row.seed for rows in found.values() for row in rows}
    found = {_CONTROL: _at(pair, _CONTROL, seeds), **found}
    curves = {run: [r.curve for r in rows if r.curve is not None] for run, rows in found.items()}
    what = "" if grid is None else f"_{_file(grid)}"
    title = _plain(pair.name) if grid is None else f"{_plain(pair.name)}, {grid}"
    panels = [
        *progress_panels(curves, "processor_seconds"),
        *progress_panels(curves, "steps"),
    ]
    return write_figure(
        folder,
        f"progress_{_file(pair.name)}{what}",
        f"{title}: validation error while students are trained",
        "Against the processor time of training and validation on one thread, without the one pass "
        "of the teacher, and against steps; one line per seed.",
        panels,
        n_columns=2,
    )


def grid_figure(pair: PairRuns, grid: str, folder: Path) -> Figure | None:
    """Change of energies and forces by two options, as a field; None for other grids."""
    found: dict[tuple[str, ...], list[FeatureRow]] = {}
    for options, rows in pair.grid(grid).items():
        found[tuple(options.split(","))] = rows
    first, second = (list(dict.fromkeys(key[k] for key in found if len(key) == 2)) for k in (0, 1))
    if min(len(first), len(second)) < 2 or _CONTROL not in pair.runs:
        return None
    maps = []
    for metric in _JUDGED:
        values = np.full((len(first), len(second)), np.nan)
        for (one, other), rows in found.items():
            controls = _at(pair, _CONTROL, {row.seed for row in rows})
            c = compare(metric, _values(rows, metric, None), _values(controls, metric, None))
            values[first.index(one), second.index(other)] = c.change
        maps.append(
            Heatmap(
                metric.name,
                [key.partition("=")[2] for key in first],
                [key.partition("=")[2] for key in second],
                values,
                row_label=_plain(first[0].partition("=")[0]),
                column_label=_plain(second[0].partition("=")[0]),
                signed=True,
            )
        )
    return write_heatmaps(
        folder,
        f"grid_{_file(pair.name)}_{_file(grid)}",
        f"{_plain(pair.name)}: {grid}",
        "Change against the control, as a fraction of it: blue is better. Mean over the test sets.",
        maps,
    )


def cka_figure(
    pair: PairRuns, row: FeatureRow, measured: Mapping[str, Any], folder: Path
) -> Figure:
    """Similarity of student and teacher before and after, and the gain (Figs. 6 to 8)."""
    before, after = (
        CKAMatrix.from_json(measured["cka"][row.name][when]) for when in ("before", "after")
    )
    known = row.taps is not None and row.taps[0] in after.first and row.taps[1] in after.second
    gain = similarity_gain(before, after)
    look: dict[str, Any] = {
        "row_label": _plain(pair.student),
        "column_label": _plain(pair.teacher),
        "marked": row.taps if known else None,
    }
    maps = [
        Heatmap("before", before.first, before.second, before.values, **look),
        Heatmap("after", after.first, after.second, after.values, **look),
        Heatmap("similarity gain", gain.first, gain.second, gain.values, signed=True, **look),
    ]
    return write_heatmaps(
        folder,
        f"cka_{_file(pair.name)}_{_file(row.run)}",
        f"{_plain(pair.name)}, {row.run}: similarity of student and teacher",
        f"Linear CKA over {after.n_atoms} atoms of the validation set; before: the control. The "
        "framed field is the pair of taps that was distilled.",
        maps,
    )


# -- the page --------------------------------------------------------------------------------------


def write_feature_report(
    rows: Sequence[FeatureRow],
    measured: Mapping[str, Any],
    folder: Path,
    *,
    title: str,
    about: Mapping[str, str],
) -> Path:
    """Write `report.html` and, in `report/`, its tables (CSV, Markdown) and figures.

    Parameters
    ----------
    rows : sequence of FeatureRow
        All runs.
    measured : mapping
        As of `potstill.workflows.feature_measures.measure_features`.
    folder : Path
        Gets `report.html` and `report/`.
    title : str
        Heading of the page.
    about : mapping
        What, when, command, versions: shown as a list at the top.

    Returns
    -------
    Path
        Of `report.html`.
    """
    parts = folder / "report"
    parts.mkdir(parents=True, exist_ok=True)
    pairs = pairs_of(rows)
    splits = list(rows[0].splits)
    main = [p for p in pairs if p.strategies]
    models = model_table(measured)
    tables = [result_table(main)] if main else []
    by_split = [result_table(main, split) for split in splits] if main else []
    by_split += [seed_table(main, splits)] if main else []
    grids = [grid_table(pair, grid, measured) for pair in pairs for grid in pair.grids]
    for table in (*tables, models, *by_split, *grids):
        table.write(parts)
    progress = [progress_figure(pair, parts) for pair in main]
    ablations = [
        figure
        for pair in pairs
        for grid in pair.grids
        for figure in (progress_figure(pair, parts, grid), grid_figure(pair, grid, parts))
        if figure is not None
    ]
    similar = [
        cka_figure(pair, found[0], measured, parts)
        for pair in pairs
        for run in pair.strategies
        if (found := [r for r in pair.runs[run] if r.name in measured.get("cka", {})])
    ]
    sections = [
        Section("Results", tables=(*tables, models)),
        Section("Progress", figures=tuple(progress)),
        Section("Similarity", figures=tuple(similar)),
        Section("Ablations", figures=tuple(ablations), tables=tuple(grids)),
        Section("By test set", tables=tuple(by_split)),
    ]
    page = Page(title, tuple(about.items()), sentences(main), (), (), tuple(sections))
    return write_page(page, folder / "report.html")


def sentences(pairs: Sequence[PairRuns]) -> tuple[str, ...]:
    """For each pair: which strategies help and which do not, energies and forces apart."""
    found = []
    for pair in pairs:
        for metric in _JUDGED:
            outcomes: dict[str, list[str]] = {}
            for run in pair.strategies:
                rows = pair.runs[run]
                controls = _at(pair, _CONTROL, {row.seed for row in rows})
                c = compare(metric, _values(rows, metric, None), _values(controls, metric, None))
                if c.outcome == "unknown":
                    continue
                how = c.outcome if c.tested else f"{c.outcome} in one run"
                sign = "+" if c.change > 0 else "−"
                outcomes.setdefault(how, []).append(f"{run} ({sign}{abs(100 * c.change):.0f} %)")
            words = "; ".join(f"{how}: {', '.join(runs)}" for how, runs in outcomes.items())
            if words:
                found.append(f"{_plain(pair.name)}, {metric.name}, beside the control: {words}.")
    return tuple(found) or ("There is no strategy to compare.",)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")
