"""Errors of a potential in three channels that are never mixed.

A student has an error against its teacher, an error against the reference data, and the teacher
has its own error against the reference. The first says how well knowledge was passed on, the
second what the student is worth, the third what it could be worth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator

from potstill.errors import DataError, suggest
from potstill.evaluate.base import Bench, Candidate, Evaluation, Findings, Result
from potstill.metrics import (
    METRICS,
    S2EF_METRICS,
    ErrorAccumulator,
    Estimate,
    S2EFAccumulator,
    force_key,
    metric_of,
)
from potstill.models.base import Potential
from potstill.properties import ASE_NAMES, LEARNABLE
from potstill.report.panels import Drawing, Panel, Series, plain_label
from potstill.report.tables import Row, number
from potstill.report.verdicts import Verdict, sentence
from potstill.report.verdicts import compare as compare_values
from potstill.structures import Properties, Structures
from potstill.teachers.ase import ask_ase_calculator

#: Sources of labels that have a channel of their own.
SOURCES = ("teacher", "reference")


@dataclass(frozen=True)
class ErrorReport(Result):
    """Metrics by channel, over everything and by group.

    Parameters
    ----------
    channels : dict
        Channel ("student-teacher", "student-reference", "teacher-reference") to metrics, by the
        keys and units of `potstill.metrics`. A channel without anything to compare is left out.
    groups : dict
        Name of a group of structures to the same.
    n_systems, n_atoms : int
        What was compared.
    """

    channels: dict[str, dict[str, float]]
    groups: dict[str, dict[str, dict[str, float]]]
    n_systems: int
    n_atoms: int

    @property
    def own(self) -> dict[str, float]:
        """Metrics of the model itself against the reference if there is one, else the teacher."""
        mine = {c: m for c, m in self.channels.items() if not c.startswith("teacher-")}
        return next((m for c, m in mine.items() if c.endswith("-reference")), {}) or next(
            iter(mine.values()), {}
        )


def evaluate_errors(
    predictor: Potential | BaseCalculator | Properties,
    structures: Structures,
    labels: Mapping[str, Properties],
    *,
    name: str = "student",
) -> ErrorReport:
    """Compare a potential with its teacher's labels and with reference labels.

    Parameters
    ----------
    predictor : Potential, BaseCalculator or Properties
        What is judged, or its predictions for all of `structures`.
    structures : Structures
        The structures; `structures.group` makes groups.
    labels : mapping
        "teacher" and "reference" to labels of `structures`; either may be left out.
    name : str
        First half of a channel's name; "control" gives "control-teacher".

    Raises
    ------
    DataError
        If `labels` has another key than "teacher" and "reference".
    """
    for source in set(labels) - set(SOURCES):
        raise DataError(f"no error channel for labels of '{source}'{suggest(source, SOURCES)}")
    labeled = {key for label in labels.values() for key in label.names}
    wanted = [name for name in LEARNABLE if name in labeled]
    if not isinstance(predictor, Properties):
        predictor = predict_all(predictor, structures, wanted)
    sides = {name: predictor, **labels}
    pairs = [(name, "teacher"), (name, "reference"), ("teacher", "reference")]
    pairs = [(a, b) for a, b in pairs if a in sides and b in sides]

    def channels(systems: Sequence[int] | None) -> dict[str, dict[str, float]]:
        found = {
            f"{a}-{b}": compare(sides[a].only(wanted), sides[b], structures, systems)
            for a, b in pairs
        }
        return {channel: metrics for channel, metrics in found.items() if metrics}

    groups: dict[str, list[int]] = {}
    for system, group in enumerate(structures.group or ()):
        groups.setdefault(group, []).append(system)
    return ErrorReport(
        channels=channels(None),
        groups={group: channels(systems) for group, systems in sorted(groups.items())},
        n_systems=structures.n_systems,
        n_atoms=structures.n_atoms,
    )


def compare(
    prediction: Properties,
    label: Properties,
    structures: Structures,
    systems: Sequence[int] | None = None,
) -> dict[str, float]:
    """Metrics of one set of values against another, over all or some systems."""
    if systems is not None:
        prediction = prediction.select(structures.rows(systems))
        label = label.select(structures.rows(systems))
        structures = structures.select(systems)
    metrics = ErrorAccumulator()
    metrics.update(prediction, label, structures)
    return metrics.compute()


def predict_all(
    predictor: Potential | BaseCalculator,
    structures: Structures,
    properties: Iterable[str] = ("energy", "forces"),
    *,
    max_atoms: int = 4096,
) -> Properties:
    """Predict properties of any number of structures in batches of bounded size.

    Parameters
    ----------
    predictor : Potential or BaseCalculator
        An ASE calculator is asked one structure at a time.
    structures : Structures
        What to predict.
    properties : iterable of str
        Any of energy, forces, stress, atomic_energies; what an ASE calculator does not implement
        is left out.
    max_atoms : int
        Atoms per batch; a larger system is a batch of its own.

    Returns
    -------
    Properties
        Of all structures, float64, on the CPU. Stress is present only where all axes are periodic.
    """
    wanted = list(properties)
    if not isinstance(predictor, Potential):
        names = [p for p in wanted if ASE_NAMES.get(p) in predictor.implemented_properties]
        values = ask_ase_calculator(predictor, structures, names, force_consistent=False)
        return Properties(values, {"stress": structures.pbc.all(dim=1).cpu()}).only(names)
    device = next((p.device for p in predictor.parameters()), torch.device("cpu"))
    parts, sizes = [], []
    for systems in structures.batches(max_atoms):
        batch = structures.select(systems)
        prediction = predictor.predict(batch.to(device), properties=wanted)
        parts.append(prediction.properties.to("cpu"))
        sizes.append(batch)
    return Properties.concatenate(parts, sizes)


# -- OC20's task ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class S2EFErrors(Result):
    """OC20's metrics of one potential; keys and units of `potstill.metrics.S2EF_METRICS`.

    Parameters
    ----------
    splits : dict
        Name of a validation set to its metrics.
    average : dict
        Mean over the sets, each weighing the same.
    """

    splits: dict[str, dict[str, Estimate]]
    average: dict[str, Estimate]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; files from before the names of `METRICS` are read, too."""

        def renamed(metrics: Mapping[str, Any]) -> dict[str, Any]:
            return {_OLD_NAMES.get(key, key): value for key, value in metrics.items()}

        splits = {name: renamed(metrics) for name, metrics in data["splits"].items()}
        return super().from_json({"splits": splits, "average": renamed(data["average"])})


_OLD_NAMES = {"force_mae": "free_forces_mae", "force_cosine": "free_forces_cosine"}


def evaluate_s2ef(
    predictor: Potential | BaseCalculator,
    splits: Mapping[str, tuple[Structures, Properties]],
    *,
    max_atoms: int = 4096,
) -> S2EFErrors:
    """Energy MAE, force MAE, force cosine and EFwT over free atoms, per set and averaged.

    Parameters
    ----------
    predictor : Potential or BaseCalculator
        What is judged.
    splits : mapping
        Name of a validation set to its structures and labels; OC20 has four.
    max_atoms : int
        Atoms per batch.

    Raises
    ------
    DataError
        If a set has no frame with energy and forces.
    """
    found = {}
    for name, (structures, labels) in splits.items():
        metrics = S2EFAccumulator()
        for systems in structures.batches(max_atoms):
            batch = structures.select(systems)
            prediction = predict_all(predictor, batch, ("energy", "forces"), max_atoms=max_atoms)
            metrics.update(prediction, labels.select(structures.rows(systems)), batch)
        found[name] = metrics.compute()
        if not found[name]:
            raise DataError(f"the set '{name}' has no frame with labels of energy and forces")
    return S2EFErrors(found, average_estimates(list(found.values())))


def average_estimates(parts: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """Mean of independent estimates of the same name, each weighing the same."""
    return {
        name: Estimate(
            float(np.mean([part[name].value for part in parts])),
            math.hypot(*[part[name].standard_error for part in parts]) / len(parts),
            sum(part[name].n for part in parts),
        )
        for name in parts[0]
    }


def estimate_over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of a metric over runs with different seeds; one run has no standard error (NaN)."""
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(np.mean(values)), error, n)


@dataclass(frozen=True)
class GapShare(Result):
    """How much of the distance from control to teacher a student has covered.

    Parameters
    ----------
    percent : float
        100 is as good as the teacher, 0 as good as the control; NaN where the gap is too small
        to speak of.
    standard_error : float
        Of the percentage, to first order; NaN where it is not known.
    gap : float
        Control minus teacher, in the unit of the metric.
    gap_error : float
        Its standard error.
    """

    derived = ("reported",)

    percent: float
    standard_error: float
    gap: float
    gap_error: float

    @property
    def reported(self) -> bool:
        """Whether the gap exceeds two standard errors."""
        return math.isfinite(self.percent)


def share_of_gap(student: Estimate, control: Estimate, teacher: Estimate) -> GapShare:
    """Share of the gap between control and teacher that is closed, in percent.

    The percentages in brackets of Ekström Kelvinius et al. A gap below two standard errors is
    noise, and a share of it as well: it is not reported. Standard errors that are unknown (NaN, a
    single run) count as zero.

    Parameters
    ----------
    student, control, teacher : Estimate
        One metric, over seeds (`estimate_over_seeds`) or over frames; higher or lower is better.
    """
    errors = [e.standard_error for e in (student, control, teacher)]
    s, c, t = (error if math.isfinite(error) else 0.0 for error in errors)
    gap, gap_error = control.value - teacher.value, math.hypot(c, t)
    if gap == 0.0 or abs(gap) < 2.0 * gap_error:
        return GapShare(math.nan, math.nan, gap, gap_error)
    share = (control.value - student.value) / gap
    error = math.hypot(s, (1.0 - share) * c, share * t) / abs(gap)
    return GapShare(100.0 * share, 100.0 * error, gap, gap_error)


# -- the evaluations -----------------------------------------------------------------------------

#: What the student should stay below: force RMSE over the standard deviation of the forces.
AIM_RELATIVE_FORCES = 0.10


def target_of(found: Findings) -> str:
    """Source of the labels that errors are quoted against: "reference" if any, else "teacher"."""
    channels = {c for r in found.of("errors", ErrorReport).values() for c in r.channels}
    return "reference" if any(c.endswith("-reference") for c in channels) else "teacher"


def errors_of(found: Findings, model: str) -> dict[str, float]:
    """Metrics of a model against the target, from any evaluation that has them."""
    wanted = f"{model}-{target_of(found)}"
    reports = found.of("errors", ErrorReport)
    for report in (reports.get(model), *reports.values()):
        if report is not None and wanted in report.channels:
            return report.channels[wanted]
    return {}


class Errors(Evaluation):
    """Errors on held-out structures."""

    name = "errors"
    title = "errors"
    result = ErrorReport
    section = "Accuracy"
    needs = "labels"

    def run(self, bench: Bench, candidate: Candidate) -> ErrorReport:
        """Compare with the labels of the held-out structures."""
        structures, labels = bench.held_out
        by_source = {bench.channel: labels}
        return evaluate_errors(candidate.predictor, structures, by_source, name=candidate.name)

    @classmethod
    def metrics(cls, result: ErrorReport) -> dict[str, float]:
        """Errors against the source of the labels."""
        return {key: value for key, value in result.own.items() if key in METRICS}

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """One row per metric, one column per channel; where atoms are fixed, free ones first."""
        channels: dict[tuple[str, str], dict[str, float]] = {}  # by model and source of labels
        for report in found.of(cls.name, ErrorReport).values():
            for channel, metrics in report.channels.items():
                model, _, source = channel.rpartition("-")
                if model != source:
                    channels.setdefault((model, source), metrics)
        several = len({source for _, source in channels}) > 1
        columns = {c: plain_label(c[0]) + f", against {c[1]}" * several for c in channels}
        parameters = {column: found.n_parameters.get(c[0]) for c, column in columns.items()}
        if any(parameters.values()):
            yield Row("Parameters", parameters)
        for key in sorted(METRICS, key=lambda key: not key.startswith("free_")):
            values = {columns[c]: metrics.get(key) for c, metrics in channels.items()}
            if any(value is not None for value in values.values()):
                scale = METRICS[key].scale
                scaled = {c: None if v is None else v * scale for c, v in values.items()}
                yield Row(METRICS[key].label, scaled)

    @classmethod
    def drawings(cls, found: Findings) -> Iterable[Drawing]:
        """Errors by group of structures, where there are several."""
        target = target_of(found)
        groups: dict[str, dict[str, dict[str, float]]] = {}
        for model, report in found.of(cls.name, ErrorReport).items():
            for group, channels in report.groups.items():
                if f"{model}-{target}" in channels and model != target:
                    groups.setdefault(group, {})[model] = channels[f"{model}-{target}"]
        if len(groups) < 2:
            return
        panels: list[Panel] = []
        metrics = [m for by_model in groups.values() for m in by_model.values()]
        for key in (force_key(metrics[0]), "energy_per_atom_rmse"):
            series = []
            for model in found.models:
                points = [
                    (by_model[model][key] * METRICS[key].scale, k)
                    for k, by_model in enumerate(groups.values())
                    if key in by_model.get(model, {})
                ]
                if points:
                    series.append(Series(model, *np.array(points, dtype=float).T))
            if series:
                panels.append(
                    Panel(METRICS[key].label, "", series, categories=list(groups), from_zero=True,
                          hide_categories=bool(panels))
                )  # fmt: skip
        caption = f"Errors against the {target} by group of held-out structures."
        height = 1.0 + 0.34 * len(groups)
        yield Drawing("groups", "Errors by group", caption, panels, height=height)

    @classmethod
    def verdicts(cls, found: Findings) -> Iterable[Verdict]:
        """Relative force error, and the comparison with each control."""
        ours = errors_of(found, found.student)
        relative = ours.get(force_key(ours, "relative_rmse"), math.nan)
        if math.isfinite(relative):
            met = relative < AIM_RELATIVE_FORCES
            whose = "reference" if target_of(found) == "reference" else "teacher's"
            atoms = ""
            if "free_forces_rmse" in ours:
                every = number(100 * ours.get("forces_relative_rmse", math.nan))
                atoms = f", over free atoms; over all, fixed ones included, {every} %"
            n = max(report.n_systems for report in found.of(cls.name, ErrorReport).values())
            share, bar = f"{number(100 * relative)} %", f"{100 * AIM_RELATIVE_FORCES:.0f} %"
            yield Verdict(
                f"On {n} held-out structures the student reproduces the {whose} forces to "
                f"{share} (RMSE over the standard deviation of the forces{atoms}), "
                f"{'below' if met else 'above'} the bar of {bar}.",
                f"relative force RMSE {share} (bar {bar})",
                met,
            )
        for control in found.controls:
            theirs = errors_of(found, control)
            for key in (force_key(ours), "energy_per_atom_rmse"):
                values = [m.get(key, math.nan) for m in (ours, theirs)]
                comparison = compare_values(METRICS[key], values[:1], values[1:])
                if comparison.outcome != "unknown":
                    yield Verdict(sentence(comparison, "student", plain_label(control)))


class S2EF(Evaluation):
    """OC20's metrics, by validation set."""

    name = "s2ef"
    title = "OC20's metrics"
    result = S2EFErrors
    section = "Accuracy"
    needs = "sets"
    on_request = True

    def run(self, bench: Bench, candidate: Candidate) -> S2EFErrors:
        """Compare with the labels of each set."""
        return evaluate_s2ef(candidate.predictor, bench.sets, max_atoms=bench.settings.batch_atoms)

    @classmethod
    def metrics(cls, result: S2EFErrors) -> dict[str, float]:
        """Averages over the sets."""
        return {key: estimate.value for key, estimate in result.average.items()}

    @classmethod
    def rows(cls, found: Findings) -> Iterable[Row]:
        """One row per set and metric, and their averages."""
        results = found.of(cls.name, S2EFErrors)
        sets = list(dict.fromkeys(name for r in results.values() for name in r.splits))
        for name in (*sets, "average"):
            parts = {
                m: {**r.splits, "average": r.average}.get(name, {}) for m, r in results.items()
            }
            for key in S2EF_METRICS:
                metric = metric_of(key)
                values = {m: p[key].value * metric.scale for m, p in parts.items() if key in p}
                if values:
                    yield Row(f"{name}: {metric.label}", values)
