"""What the report of a coarse-graining study begins with: which model is best, and the bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from potstill.experiments.coarse import ENSEMBLE, MAPPED_FORCES
from potstill.experiments.results import Group, Results
from potstill.experiments.spec import Role
from potstill.metrics import METRICS, Metric
from potstill.report.panels import plain_label
from potstill.report.tables import Cell, Table, number
from potstill.report.verdicts import Comparison, Verdict, ordered_verdicts, over_metrics

#: Distances from the mapped liquid or molecule, each with its noise.
_STRUCTURE = {
    "rdf_error": "rdf_noise",
    "adf_error": "adf_noise",
    "cdf_error": "cdf_noise",
    "coordination_error": "coordination_noise",
    "internal_error": "internal_noise",
    "free_energy_error": "free_energy_noise",
}
#: Errors of forces; those against mean forces are without the noise of the others.
_FORCES = ("mean_force_rmse", "forces_rmse")
_TIME = "time_per_step_atom_us"
_COLUMNS = (*_FORCES, *_STRUCTURE, "failed_runs", _TIME)

#: A student is to be so many times faster than the ensemble, for each of its members.
_SPEEDUP = 5.0 / 8.0


@dataclass(frozen=True)
class Lead:
    """Sentences and a table that a report begins with."""

    sentences: tuple[str, ...]
    table: Table


def headlines(results: Results) -> Lead:
    """Bars that are met or missed, the best models, and the main numbers of all."""
    verdicts = [*_forces(results), *_structure(results), *_stability(results), *_speed(results)]
    verdicts += _against_controls(results)
    return Lead(ordered_verdicts(verdicts), _models(results))


def _models(results: Results) -> Table:
    """One row for each kind of model, with how many times faster than the ensemble it is."""
    metrics = results.measured(_COLUMNS)
    ensemble = _value(results.variants.get(ENSEMBLE), _TIME)
    body: list[tuple[Cell, ...]] = []
    for group in results.ordered:
        spreads = [group.spread(metric) for metric in metrics]
        if not any(spread.n for spread in spreads):
            continue
        trained = group.rows[0].run.seed >= 0
        head = (plain_label(group.strategy), group.rows[0].n_parameters or None)
        cells = [spread if spread.n else None for spread in spreads]
        faster = ensemble / _value(group, _TIME)
        faster_cell = faster if math.isfinite(faster) else None
        body.append((*head, len(group.rows) if trained else None, *cells, faster_cell))
    labels = [metric.label for metric in metrics]
    return Table(
        "table_summary",
        "All models beside one another",
        ("Model", "Parameters", "Seeds", *labels, "Times faster than all teachers"),
        tuple(body),
        "Mean ± standard deviation over seeds. Errors of forces are on the test set, those of "
        "structure are differences from the mapped trajectory. Time is that of dynamics in ASE; "
        "pair potentials are faster by far in LAMMPS.",
    )


# -- sentences -------------------------------------------------------------------------------------


def _forces(results: Results) -> list[Verdict]:
    """Best forces; networks have to beat pair potentials."""
    found = []
    measured = results.measured(_FORCES)
    for metric in measured:
        text = f"{metric.name}: {_ranking(_judged(results, metric.key), metric)}."
        # The first says most: mean forces where they are known.
        pairs = _best(_of_pairs(results), metric.key)
        networks = _best(_students(results), metric.key)
        if metric is measured[0] and pairs is not None and networks is not None:
            met = _value(networks, metric.key) < _value(pairs, metric.key)
            found.append(Verdict(text, "forces of a student better than of pair potentials", met))
        else:
            found.append(Verdict(text))
    return found


def _structure(results: Results) -> list[Verdict]:
    """Which liquids are nearest to the mapped one; a student has to keep up with the ensemble."""
    found = []
    for metric in results.measured(_STRUCTURE):
        noise = _value(_best(_judged(results, metric.key), metric.key), _STRUCTURE[metric.key])
        unit = f" {metric.unit}" if metric.unit else ""
        text = f"{metric.name}: {_ranking(_judged(results, metric.key), metric)}"
        text += f"; two samples of one liquid differ by {number(noise)}{unit}."
        student = _value(_best(_students(results), metric.key), metric.key)
        ensemble = _value(results.variants.get(ENSEMBLE), metric.key)
        if metric.key == "rdf_error" and math.isfinite(student + ensemble):
            # Without noise the distances would be smaller, and their ratio further from one.
            met = student <= max(ensemble, noise)
            found.append(Verdict(text, "g(r) of a student as near as that of all teachers", met))
        else:
            found.append(Verdict(text))
    return found


def _stability(results: Results) -> list[Verdict]:
    """Whether all runs of the students came to their end, and which did not."""
    key = "failed_runs"
    judged = _judged(results, key)
    if not judged:
        return []
    failed = [f"{_name(g)} ({number(sum(g.values(key)))})" for g in judged if any(g.values(key))]
    text = f"Runs failed of {', '.join(failed)}." if failed else "No run of any model failed."
    met = not any(any(group.values(key)) for group in _students(results))
    return [Verdict(text, "stable dynamics of all students", met)]


def _speed(results: Results) -> list[Verdict]:
    """How much faster than the ensemble the fastest student is."""
    ensemble = _value(results.variants.get(ENSEMBLE), _TIME)
    student = _best(_students(results), _TIME)
    ratio = ensemble / _value(student, _TIME)
    members = sum(len(g.rows) for g in results.ordered if g.variant.role is Role.TEACHER)
    if student is None or not math.isfinite(ratio):
        return []
    text = f"Speed: {_name(student)} is {number(ratio)} times faster than all {members} teachers."
    bar = f"a student {number(_SPEEDUP * members)} times faster than all teachers"
    return [Verdict(text, bar, ratio >= _SPEEDUP * members)]


def _against_controls(results: Results) -> list[Verdict]:
    """What each student has gained over the model of its size that had no teacher."""
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for one in results.comparisons(results.measured((*_FORCES, *_STRUCTURE))):
        if one.comparison.outcome != "unknown":
            pairs.setdefault((_name(one.ours), _name(one.theirs)), []).append(one.comparison)
    return [Verdict(over_metrics(group, *names)) for names, group in pairs.items()]


# -- models ----------------------------------------------------------------------------------------


def _students(results: Results) -> list[Group]:
    return [group for group in results.ordered if group.variant.role is Role.STUDENT]


def _of_pairs(results: Results) -> list[Group]:
    """What is judged beside the networks, pair potentials as a rule."""
    others = (group for group in results.ordered if group.variant.role is Role.OTHER)
    return [group for group in others if group.strategy not in (ENSEMBLE, MAPPED_FORCES)]


def _judged(results: Results, key: str) -> list[Group]:
    """Models with this number."""
    return [g for g in results.ordered if g.values(key) and g.strategy != MAPPED_FORCES]


def _best(groups: Sequence[Group], key: str) -> Group | None:
    found = [group for group in groups if group.values(key)]
    return min(found, key=lambda group: _value(group, key), default=None)


def _value(group: Group | None, key: str) -> float:
    """Mean over seeds; NaN where nothing was measured."""
    return math.nan if group is None else group.spread(METRICS[key]).mean


def _ranking(groups: Sequence[Group], metric: Metric) -> str:
    """The three smallest in words."""
    ranked = sorted(groups, key=lambda group: _value(group, metric.key))
    unit = f" {metric.unit}" if metric.unit else ""
    named = [f"{_name(g)} ({number(g.spread(metric).mean)}{unit})" for g in ranked[:3]]
    then = f", then {' and '.join(named[1:])}" if named[1:] else ""
    return f"smallest of {named[0]}{then}"


def _name(group: Group) -> str:
    return plain_label(group.strategy)
