"""The report of an experiment: one row per run, measured values beside it, one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from potstill.evaluate.errors import S2EFErrors
from potstill.evaluate.learning import read_learning_curves
from potstill.experiments.measures import Finished, stored_distribution
from potstill.experiments.pairs_report import pairs_sections
from potstill.experiments.rows import RunRow
from potstill.experiments.run import finished_runs, write_results
from potstill.experiments.sizes_report import sizes_sections, summary_table
from potstill.experiments.spec import Errors, Experiment, Role, Run, Variant
from potstill.report.page import Page, Section, write_page
from potstill.train import TrainSettings


def report_experiment(
    experiment: Experiment,
    folder: str | Path,
    *,
    command: str = "",
    on_model: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure what has been trained so far and write tables, figures and the report page.

    Parameters
    ----------
    experiment : Experiment
        What was trained.
    folder : path
        As given to `run_experiment`; gets `report.html`, `report/` and `results.json`.
    command : str
        What was typed, for the record.
    on_model : callable, optional
        Told what is measured next.

    Returns
    -------
    dict
        What `results.json` holds: one record per trained run, measures, config, versions and
        machine.
    """
    folder = Path(folder)
    records = finished_runs(experiment, folder)
    finished = Finished(experiment, folder, records, on_model)
    measured = {name: measure.measure(finished) for name, measure in experiment.measures.items()}
    rows = [row_of(finished, run, measured) for run in records]
    result, about = write_results(experiment, folder, command, records, measures=measured)
    parts = folder / "report"
    parts.mkdir(exist_ok=True)
    if experiment.errors is Errors.S2EF:
        similarity = measured.get("similarity", {})
        given = similarity.get("teachers", {})
        rows += [_given_teacher(name, errors) for name, errors in given.items()]
        verdicts, sections = pairs_sections(rows, similarity, parts)
    else:
        liquid = stored_distribution(folder, "reference")
        settings: Any = experiment.measures.get("liquid")
        named = (settings.reference.name, liquid) if liquid and settings.reference else None
        verdicts, sections = sizes_sections(rows, parts, experiment.baselines, named)
    evaluated = measured.get("evaluations", {}).get("runs", {})
    if keys := dict.fromkeys(key for numbers in evaluated.values() for key in numbers):
        table = summary_table(rows, keys, "table_evaluations", "Evaluations")
        table.write(parts)
        sections.append(Section("Evaluations", tables=(table,)))
    page = Page(experiment.title, tuple(about.items()), verdicts, (), (), tuple(sections))
    write_page(page, folder / "report.html")
    return result


def row_of(finished: Finished, run: Run, measured: Mapping[str, Any]) -> RunRow:
    """The row of a finished run; some of what was `measured` are numbers by run."""
    record = finished.records[run]
    if record.tests is None:  # on the first test set
        metrics = dict(record.metrics[f"test:{next(iter(finished.experiment.data.tests))}"])
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


def _given_teacher(name: str, errors: Mapping[str, Any]) -> RunRow:
    teacher = Variant(name, Role.TEACHER, name, "", TrainSettings())
    return RunRow(Run(teacher, -1), 0, tests=S2EFErrors.from_json(errors))
