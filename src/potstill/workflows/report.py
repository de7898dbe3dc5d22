"""Report of one distillation: student beside control beside teacher, collected from its folder.

| file of the run folder | what it gives |
|---|---|
| `config.yaml`, `plan.json`, `stages.json` | command, seed, counts, durations |
| `<model>/metrics.jsonl` | learning curves |
| `<model>/best.pt`, `student.pt` | numbers of parameters, teacher, license, versions |
| `evaluation/<name>.json` | model to the result of an evaluation, or to `{"error": ...}` |
| `evaluation/skipped.json`, `evaluation/roles.json` | what does not apply; what models are for |

Everything may be absent but the folder: what is not there is not reported. Rows, figures and
sentences are those of `potstill.evaluate.table.EVALUATIONS`.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from potstill.checkpoint import load_potential
from potstill.errors import DataError, PotstillError
from potstill.evaluate.base import SECTIONS, Evaluation, Findings, Role
from potstill.evaluate.elastic import ElasticScan
from potstill.evaluate.errors import ErrorReport, errors_of, target_of
from potstill.evaluate.learning import LearningCurves, learning_panels, read_learning_curves
from potstill.evaluate.nve import NVERun
from potstill.evaluate.pareto import pareto_front
from potstill.evaluate.speed import SpeedTable, speed_ratio
from potstill.evaluate.table import EVALUATIONS
from potstill.metrics import METRICS, force_key
from potstill.report.page import Fact, Page, Section, write_page
from potstill.report.panels import Drawing, Look, Panel, Series, looks, plain_label
from potstill.report.plots import write_figure
from potstill.report.tables import Table, number, rows_table, signed
from potstill.report.verdicts import Verdict, ordered_verdicts
from potstill.store import LabeledStore
from potstill.workflows.base import read_json, stored_settings
from potstill.workflows.evaluation import read_findings


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows of one run.

    Parameters
    ----------
    about : dict of str to str
        What, when, teacher, license, versions, seed: in the order of display.
    curves : dict of str to tuple of LearningCurves
        By model; several where there are several seeds.
    """

    folder: Path
    title: str
    found: Findings
    about: dict[str, str] = field(default_factory=dict)
    curves: dict[str, tuple[LearningCurves, ...]] = field(default_factory=dict)


def write_report(run: str | Path | ReportData, *, about: Mapping[str, str] | None = None) -> Path:
    """Write `report.html` and, in `report/`, its tables (CSV, Markdown) and figures.

    `run` is the folder of a run, or what has been collected from it; `about` is added to the list
    at the top, the command for instance.

    Raises
    ------
    DataError
        If there is no such folder, or a result in it is damaged.
    """
    data = run if isinstance(run, ReportData) else collect(run)
    parts = data.folder / "report"
    parts.mkdir(parents=True, exist_ok=True)
    models = dict.fromkeys((*data.found.models, *data.curves))
    known = {**looks(models), "front": Look("Pareto front", "#9a9a9a", "")}
    sections = []
    for title in SECTIONS:
        drawings = [d for e in _evaluations(title) for d in e.drawings(data.found)]
        text = ""
        if title == "Accuracy":
            drawings.append(_learning(data))
            n = max((r.n_systems for r in data.found.of("errors", ErrorReport).values()), default=0)
            text = f"Errors on {n:,} structures not used in training." if n else ""
        elif title == "Cost":
            drawings.insert(0, _pareto(data.found))
        figures = [write_figure(parts, one, known) for one in drawings if not one.empty]
        table = section_table(title, data.found)
        if table is not None:
            table.write(parts)
        sections.append(Section(title, text, tuple(figures), (table,) if table else ()))
    page = Page(
        title=data.title,
        about=tuple({**(about or {}), **data.about}.items()),
        verdicts=verdicts(data.found, choice(data.folder)) or ("Nothing has been evaluated yet.",),
        facts=tuple(_facts(data.found)),
        notes=data.found.problems,
        sections=tuple(sections),
    )
    return write_page(page, data.folder / "report.html")


def verdicts(found: Findings, chosen: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Sentences of the summary: first which bars are missed, then what was found.

    Where `student.pt` is not the student but another `model` that was `chosen`, the first sentence
    is on its bars.
    """
    lines = ordered_verdicts(_verdicts(found))
    handed_out = (chosen or {}).get("model", "")
    if handed_out in ("", found.student) or handed_out not in found.models:
        return lines
    roles = {m: found.role(m) for m in found.models}
    roles |= {found.student: Role.CONTROL, handed_out: Role.STUDENT}
    bars = [v for v in _verdicts(replace(found, roles=roles)) if v.bar]
    reason = (chosen or {}).get("reason", "was best on validation")
    first = f"student.pt is the {plain_label(handed_out)}, which {reason}. "
    return (first + "".join(ordered_verdicts(bars)[:1]), f"Of the student: {lines[0]}", *lines[1:])


def _verdicts(found: Findings) -> list[Verdict]:
    every = EVALUATIONS.values()
    return [v for e in every for v in (*_not_done(e, found), *e.verdicts(found))]


def choice(folder: Path) -> dict[str, Any]:
    """The model that a run of `distill` has copied to `student.pt`, and why; empty elsewhere."""
    return dict(read_json(folder / "choice.json", {}))


def _not_done(evaluation: type[Evaluation], found: Findings) -> Iterator[Verdict]:
    """A missed bar where something fails for the student that can be done for the teacher."""
    reason = found.failed.get(evaluation.name, {}).get(found.student)
    if reason and found.teacher in found.results.get(evaluation.name, {}):
        text = f"The {evaluation.title} of the student could not be computed: {reason}."
        yield Verdict(text, f"{evaluation.title} of the student (not done)", met=False)


def section_table(section: str, found: Findings) -> Table | None:
    """All rows of the evaluations of a section in one table."""
    name, title, note = SECTIONS[section]
    rows = [row for e in _evaluations(section) for row in e.rows(found)]
    labels = {m: plain_label(m) for m in found.models}
    teacher = found.teacher if section == "Properties" else ""
    return rows_table(name, title, rows, note, labels=labels, deviations_from=teacher)


def _evaluations(section: str) -> list[type[Evaluation]]:
    return [e for e in EVALUATIONS.values() if e.section == section]


def _facts(found: Findings) -> Iterator[Fact]:
    """Numbers of the summary box."""
    against = f"against the {target_of(found)}"
    for model in (found.student, *found.controls):
        errors = errors_of(found, model)
        key = force_key(errors)
        whose = "free atoms, " * key.startswith("free") + against
        if math.isfinite(errors.get(key, math.nan)):
            yield Fact(number(errors[key]), "eV/Å", f"force RMSE, {plain_label(model)}", whose)
        relative = errors.get(force_key(errors, "relative_rmse"), math.nan)
        if model == found.student and math.isfinite(relative):
            yield Fact(number(100 * relative), "%", "relative force RMSE, student", whose)
    if ratios := speed_ratio(found):
        n = max(ratios)
        yield Fact(number(ratios[n]), "×", "speedup over the teacher", f"{n:,} atoms")
    elastic = found.of("elastic", ElasticScan).get(found.student)
    if elastic is not None and not elastic.stable:
        yield Fact("unstable", "", "crystal, student", "; ".join(elastic.instabilities()))
    run = found.of("nve", NVERun).get(found.student)
    if run is not None and run.stable:
        note = f"in {run.duration:g} ps at {run.temperature:g} K"
        yield Fact(signed(run.drift), "meV/atom", "NVE drift, student", note)
    elif run is not None:
        yield Fact("unstable", "", "NVE, student", f"after {run.exploded_at:g} ps")


# -- figures of several evaluations ----------------------------------------------------------------


def _learning(data: ReportData) -> Drawing:
    caption = (
        "Force error while training: the force term of the loss on the training set (RMSE + MAE "
        "unless the loss was changed; mean of the batches), and the RMSE on the validation set "
        "(Fig. 4 of Matin et al.)."
    )
    return Drawing("learning", "Learning curves", caption, learning_panels(data.curves))


def _pareto(found: Findings) -> Drawing:
    """Force error against time and memory."""
    target = target_of(found)
    quoted = force_key(errors_of(found, found.student))
    errors = {m: errors_of(found, m).get(quoted, math.nan) for m in found.models}
    errors[target] = 0.0
    panels = []
    for evaluation in ("speed", "memory"):
        kind = EVALUATIONS[evaluation]
        results = found.of(evaluation, kind.result)
        costs = {m: value for m, r in results.items() for value in kind.metrics(r).values()}
        for model in found.controls:
            own, student = found.n_parameters.get(model), found.n_parameters.get(found.student)
            if own == student is not None and found.student in costs:
                costs.setdefault(model, costs[found.student])
        points = {
            m: (costs[m], errors[m])
            for m in found.models
            if m in costs and math.isfinite(errors[m]) and costs[m] > 0
        }
        if len({x for x, _ in points.values()}) < 2:
            continue  # nothing to trade: all cost the same
        table = np.array(list(points.values()))
        front = table[pareto_front(table)]
        front = front[np.argsort(front[:, 0])]
        series = [Series(m, [x], [y]) for m, (x, y) in points.items()]
        series.append(Series("front", front[:, 0], front[:, 1], kind="front"))
        (key,) = kind.metrics(next(iter(results.values())))
        labels = METRICS[key].label, METRICS[quoted].label
        panels.append(Panel(*labels, series, x_scale="auto", from_zero=True))
    caption = (
        f"Force RMSE against the {target} over the cost of molecular dynamics; lower and further "
        "left is better (Fig. 2 of Matin et al.). The error against itself is zero. Controls of "
        "the student's architecture that were not timed are drawn at its cost."
    )
    return Drawing("pareto", "Accuracy against cost", caption, panels)


# -- collecting ------------------------------------------------------------------------------------


def collect(folder: str | Path) -> ReportData:
    """Read what the folder of `potstill distill` holds.

    Raises
    ------
    DataError
        If there is no such folder, or a JSON file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: a report needs the folder of a run")
    found = read_findings(folder / "evaluation")
    student, info = _potential(folder / "student.pt", folder / "student" / "best.pt")
    curves: dict[str, tuple[LearningCurves, ...]] = {}
    parameters: dict[str, int] = {}
    if student is not None:
        parameters["student"] = student
    for part in sorted(p.parent for p in folder.glob("*/metrics.jsonl")):
        n_parameters, other = _potential(part / "best.pt")
        info = info or other
        if n_parameters is not None:
            parameters.setdefault(part.name, n_parameters)
        # A draft that only explored is no result.
        if (other.get("role") or Role.of_name(part.name)) != Role.DRAFT:
            curves[part.name] = (read_learning_curves(part),)
    stages = read_json(folder / "stages.json", {})
    trained_on = info.get("trained_on") or {}
    found = replace(found, n_parameters=parameters, trained_on=trained_on)
    about = _about(folder, stored_settings(folder), info, stages, found)
    return ReportData(folder, _title(info), found, about, curves)


def _potential(*paths: Path) -> tuple[int | None, dict[str, Any]]:
    """Number of parameters of the first file there is, and what is known of it."""
    for path in paths:
        if path.is_file():
            try:
                potential, info = load_potential(path)
            except PotstillError:
                continue  # a damaged file is not a reason to withhold all other results
            return potential.n_parameters, info
    return None, {}


# -- words -------------------------------------------------------------------------------------


def _title(info: Mapping[str, Any]) -> str:
    teacher = (info.get("teacher") or {}).get("name")
    elements = (info.get("trained_on") or {}).get("elements")
    title = f"{teacher} distilled" if teacher else "A distilled potential"
    return f"{title} for {'-'.join(elements)}" if elements else title


def _about(
    folder: Path,
    config: Mapping[str, Any],
    info: Mapping[str, Any],
    stages: Mapping[str, Any],
    found: Findings,
) -> dict[str, str]:
    teacher = info.get("teacher") or {}
    machine = next((r.machine for r in found.of("speed", SpeedTable).values()), {})
    versions = info.get("versions") or machine.get("versions") or {}
    seconds = {name: entry.get("seconds") for name, entry in stages.items() if entry}
    # config.yaml holds all settings, defaults included.
    command = f"potstill distill --config {folder / 'config.yaml'} --out another-folder"
    known = teacher.get("fingerprint")
    fingerprint = f"fingerprint {known}" if known else None
    threads = machine.get("threads")
    parts = [machine.get("gpu"), machine.get("cpu"), f"{threads} threads" if threads else None]
    entries = {
        "Repeat with": command if config else "",
        "Run": str(folder.resolve()),
        "Written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "Seed": str(config.get("seed", info.get("seed", ""))),
        "Trained on": _trained_on(info.get("trained_on") or {}),
        "Teacher": _joined([teacher.get("name"), teacher.get("level_of_theory"), fingerprint]),
        "Labels": _labels(folder / "labels.zarr"),
        "License": teacher.get("license", teacher.get("licence")),
        "Citation": teacher.get("citation"),
        "Versions": ", ".join(f"{name} {v}" for name, v in versions.items()),
        "Machine": _joined(parts),
        "Durations": ", ".join(f"{k} {v:.0f} s" for k, v in seconds.items() if v is not None),
    }
    return {name: str(text) for name, text in entries.items() if text}


def _joined(parts: Sequence[str | None]) -> str:
    return "; ".join(part for part in parts if part and part != "unknown")


def _trained_on(known: Mapping[str, Any]) -> str:
    parts = []
    if known.get("n_frames"):
        parts.append(f"{known['n_frames']:,} structures of {', '.join(known.get('elements', ()))}")
    if known.get("temperature_K"):
        parts.append("{:g} to {:g} K".format(*known["temperature_K"]))
    if known.get("density_g_cm3"):
        parts.append("{:.3g} to {:.3g} g/cm³".format(*known["density_g_cm3"]))
    return "; ".join(parts)


def _labels(path: Path) -> str:
    """Fingerprint of the label store, as far as there is one."""
    if not path.is_dir():
        return ""
    try:
        store = LabeledStore.open(path)
    except PotstillError:
        return ""
    return f"{store.n_systems:,} structures, fingerprint {store.fingerprint()}"
