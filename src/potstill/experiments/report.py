"""The report of an experiment: one row per run, one page of sections.

A section is there when the runs have what it shows: several sizes, curves, a teacher, taps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from potstill.evaluate.errors import S2EFErrors
from potstill.evaluate.learning import read_learning_curves
from potstill.experiments.figures import (
    JUDGED,
    cka_figure,
    grid_figure,
    main_figures,
    progress_figure,
)
from potstill.experiments.headlines import Lead
from potstill.experiments.measures import Finished, stored_distribution
from potstill.experiments.results import Results, RunRow
from potstill.experiments.run import (
    RunRecord,
    finished_runs,
    property_errors,
    write_results,
)
from potstill.experiments.spec import Experiment, Role, Run, Variant
from potstill.experiments.tables import (
    COSTS,
    ERRORS,
    S2EF_JUDGED,
    comparison_table,
    grid_table,
    model_table,
    percent,
    plain,
    result_table,
    runs_tables,
    seed_table,
    summary_table,
)
from potstill.report.page import Page, Section, write_page
from potstill.report.panels import Look, plain_label
from potstill.report.tables import Table
from potstill.report.verdicts import over_sizes
from potstill.train import TrainSettings
from potstill.workflows.data import load_parts


def report_experiment(
    experiment: Experiment,
    folder: str | Path,
    *,
    command: str = "",
    on_model: Callable[[str], None] | None = None,
    others: Mapping[str, Path] | None = None,
    more: Mapping[str, Any] | None = None,
    sections: tuple[Section, ...] = (),
    lead: Callable[[Results], Lead] | None = None,
    looks: Mapping[str, Look] | None = None,
) -> dict[str, Any]:
    """Measure what has been trained so far and write tables, figures and the report page.

    `folder` is that of `run_experiment`; it gets `report.html`, `report/` and `results.json`, which
    also holds the `command` that was typed. `on_model` is told what is measured next. `others`
    are checkpoints of potentials to show beside the runs. `more` are measures that were taken
    elsewhere, `sections` stand before the others, and the page begins with what `lead` says
    instead of all comparisons. `looks` are those of the figures in `sections`.

    Returns
    -------
    dict
        What `results.json` holds: one record per trained run, measures, config, versions and
        machine.
    """
    folder = Path(folder)
    records = finished_runs(experiment, folder)
    finished = Finished(experiment, folder, records, on_model, others or {})
    measured = {name: measure.measure(finished) for name, measure in experiment.measures.items()}
    measured |= more or {}
    if others:
        measured["errors"] = {"others": _errors_of_others(finished)}
    result, about = write_results(experiment, folder, command, records, measures=measured)
    similarity = measured.get("similarity", {})
    rows = [row_of(finished, run, measured) for run in records]
    rows += [_given_teacher(*given) for given in similarity.get("teachers", {}).items()]
    rows += _others(finished, measured)
    liquid = stored_distribution(folder, "reference")
    settings: Any = experiment.measures.get("liquid")
    reference = settings.reference if settings and liquid else None
    named = (reference.name, liquid) if reference and liquid else None
    results = Results(rows, experiment.baselines, named, similarity)
    evaluated = measured.get("evaluations", {}).get("runs", {})
    keys = list(dict.fromkeys(key for numbers in evaluated.values() for key in numbers))
    sections += report_sections(results, folder / "report", keys, looks)
    if lead is None:
        sentences = verdicts(results)
    else:
        first = lead(results)
        first.table.write(folder / "report")
        sections = (Section("Models", tables=(first.table,)), *sections)
        sentences = first.sentences
    page = Page(experiment.title, tuple(about.items()), sentences, (), (), sections)
    write_page(page, folder / "report.html")
    return result


def row_of(finished: Finished, run: Run, measured: Mapping[str, Any]) -> RunRow:
    """The row of a finished run; some of what was `measured` are numbers by run."""
    record = finished.records[run]
    if record.tests is None:
        metrics = dict(record.metrics[judging_set(record)])
    else:
        metrics = {key: estimate.value for key, estimate in record.tests.average.items()}
    for found in measured.values():
        numbers = found.get("runs", {}).get(run.name, {})
        metrics |= {key: value for key, value in numbers.items() if isinstance(value, float)}
    taps = record.distilled
    return RunRow(
        run,
        record.n_parameters,
        metrics,
        record.tests,
        taps=None if taps is None else ("+".join(taps.student), "+".join(taps.teacher)),
        curve=read_learning_curves(finished.folder / run.name),
        rdf=stored_distribution(finished.folder, run.name),
    )


def judging_set(record: RunRecord) -> str:
    """The set whose errors are those of the tables: the first test set, if there is one.

    Given ones come before what was split off.
    """
    given = (name for name in record.metrics if name.startswith("test:"))
    return next(given, "test" if "test" in record.metrics else "validation")


def _given_teacher(name: str, errors: Mapping[str, Any]) -> RunRow:
    teacher = Variant(name, Role.TEACHER, name, "", TrainSettings())
    return RunRow(Run(teacher, -1), 0, tests=S2EFErrors.from_json(errors))


def _others(finished: Finished, measured: Mapping[str, Any]) -> list[RunRow]:
    """Rows of what was measured beside the runs, such as an ensemble of them."""
    numbers: dict[str, dict[str, float]] = {name: {} for name in finished.others}
    for found in measured.values():
        for name, own in found.get("others", {}).items():
            numbers.setdefault(name, {}).update(own)
    sizes = {name: potential.n_parameters for name, potential in finished.beside.items()}
    return [
        RunRow(
            Run(Variant(name, Role.OTHER, name, "", TrainSettings()), -1), sizes.get(name, 0), own
        )
        for name, own in numbers.items()
    ]


def _errors_of_others(finished: Finished) -> dict[str, dict[str, float]]:
    """Their errors on the set that tables have those of runs of."""
    data, judged = finished.experiment.data, judging_set(next(iter(finished.records.values())))
    if judged.startswith("test:"):
        structures, labels = data.tests[judged.removeprefix("test:")].read(data.source)
    else:
        part = load_parts(data.parts)[0][judged]
        structures, labels = part.structures, part.labels[data.source]
    return {name: property_errors(p, structures, labels) for name, p in finished.beside.items()}


def report_sections(
    results: Results,
    folder: str | Path,
    evaluated: list[str] | None = None,
    looks: Mapping[str, Look] | None = None,
) -> tuple[Section, ...]:
    """Sections of the page; tables and figures are written into the folder, made if absent.

    `evaluated` are metrics that evaluations have found, `looks` those of figures elsewhere.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    full, short = runs_tables(results)
    by_split: list[Table] = []
    if results.pairs:
        by_split += [result_table(results, split) for split in results.splits]
        by_split.append(seed_table(results))
    grids = tuple(grid_table(results, *grid) for grid in results.grids)
    evaluations: tuple[Table, ...] = ()
    if evaluated:
        evaluations = (summary_table(results, evaluated, "table_evaluations", "Evaluations"),)
    main = main_tables(results)
    for table in (*main, *by_split, *grids, *evaluations, full):
        table.write(folder)
    students = [student for pair in results.pairs.values() for student in pair]
    ablations = [
        figure
        for pair, grid in results.grids
        for figure in (
            progress_figure(results, pair, folder, grid),
            grid_figure(results, pair, grid, folder),
        )
    ]
    similar = [cka_figure(results, student, folder) for student in students]
    progress = [progress_figure(results, pair, folder) for pair in results.pairs]
    return (
        Section("Figures", figures=main_figures(results, folder, looks)),
        Section("Tables", tables=main),
        Section("Progress", figures=tuple(progress)),
        Section("Similarity", figures=tuple(one for one in similar if one is not None)),
        Section("Ablations", figures=tuple(a for a in ablations if a is not None), tables=grids),
        Section("By test set", tables=tuple(by_split)),
        Section("Every run", tables=(short,)),
        Section("Evaluations", tables=evaluations),
    )


def main_tables(results: Results) -> tuple[Table, ...]:
    """Errors, costs and comparisons, as far as known."""
    tables = []
    if results.pairs:
        tables.append(result_table(results))
    if not results.splits:
        title = "Errors on the test set"
        tables.append(summary_table(results, ERRORS, "table_errors", title, results.baselines))
    if results.measured(COSTS):
        tables.append(summary_table(results, COSTS, "table_cost", "Cost of molecular dynamics"))
    if (comparisons := comparison_table(results)).rows:
        tables.append(comparisons)
    if results.similarity.get("throughput"):
        tables.append(model_table(results))
    return tuple(tables)


def verdicts(results: Results) -> tuple[str, ...]:
    """Sentences: which students are better than their controls, beyond chance or not.

    One for each pair of strategies and metric, over all sizes; one for each pair of models and
    metric, over all strategies.
    """
    over: dict[tuple[str, str, str], list[tuple[str, Any]]] = {}
    for one in results.comparisons(results.measured(JUDGED)):
        if one.comparison.outcome != "unknown":
            key = (one.comparison.metric.key, one.ours.strategy, one.theirs.strategy)
            over.setdefault(key, []).append((one.ours.size, one.comparison))
    found = [
        over_sizes(group, plain_label(ours), plain_label(theirs))
        for (_, ours, theirs), group in over.items()
    ]
    for pair, students in results.pairs.items():
        for metric in S2EF_JUDGED:
            outcomes: dict[str, list[str]] = {}
            for student in students:
                c = results.change(student, metric)
                if c.outcome != "unknown":
                    how = c.outcome if c.tested else f"{c.outcome} in one run"
                    words = f"{student.strategy} ({percent(c.change)})"
                    outcomes.setdefault(how, []).append(words)
            if outcomes:
                words = "; ".join(f"{how}: {', '.join(runs)}" for how, runs in outcomes.items())
                found.append(f"{plain(pair)}, {metric.name}, compared with the control: {words}.")
    return tuple(found) or ("There is no pair of strategies to compare.",)
