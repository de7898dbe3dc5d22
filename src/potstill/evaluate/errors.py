"""Errors of a potential in three channels that are never mixed.

A student has an error against its teacher, an error against the reference data, and the teacher
has its own error against the reference. The first says how well knowledge was passed on, the
second what the student is worth, the third what it could be worth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import ase
import lightning_fabric
import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from torch import Tensor

from potstill.errors import DataError, suggest
from potstill.evaluate.base import Result, with_calculator
from potstill.metrics import ErrorAccumulator, Estimate, S2EFAccumulator
from potstill.models.base import Potential
from potstill.properties import ASE_NAMES, LEARNABLE, property_spec
from potstill.structures import Properties, Structures

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


def evaluate_errors(
    predictor: Potential | BaseCalculator | Properties,
    structures: Structures,
    labels: Mapping[str, Properties],
    *,
    name: str = "student",
    properties: Iterable[str] | None = None,
    max_atoms: int = 4096,
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
    properties : iterable of str, optional
        Which properties to compare; by default all that the labels have.
    max_atoms : int
        Atoms per batch.

    Returns
    -------
    ErrorReport

    Raises
    ------
    DataError
        If `labels` has another key than "teacher" and "reference".
    """
    for source in set(labels) - set(SOURCES):
        raise DataError(f"no error channel for labels of '{source}'{suggest(source, SOURCES)}")
    labelled = {key for label in labels.values() for key in label.names}
    wanted = [p for p in LEARNABLE if p in labelled and (properties is None or p in properties)]
    if not isinstance(predictor, Properties):
        predictor = predict_all(predictor, structures, wanted, max_atoms=max_atoms)
    sides = {name: predictor, **labels}
    pairs = [(name, "teacher"), (name, "reference"), ("teacher", "reference")]
    pairs = [(a, b) for a, b in pairs if a in sides and b in sides]

    def channels(systems: Sequence[int] | None) -> dict[str, dict[str, float]]:
        found = {
            f"{a}-{b}": compare(_only(sides[a], wanted), sides[b], structures, systems)
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
        prediction = prediction.select(systems, structures)
        label = label.select(systems, structures)
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
        return _predict_with_ase(predictor, structures, wanted)
    device = next((p.device for p in predictor.parameters()), torch.device("cpu"))
    parts, sizes = [], []
    for systems in structures.batches(max_atoms):
        batch = structures.select(systems)
        prediction = predictor.predict(batch.to(device), properties=wanted)
        parts.append(prediction.properties.to("cpu"))
        sizes.append(batch)
    return Properties.concatenate(parts, sizes)


def gap_closed(student: float, control: float, teacher: float) -> float:
    """Fraction of the distance from control to teacher that the student has covered.

    1 means as good as the teacher, 0 as good as the control, NaN that there is no gap.
    """
    return (control - student) / (control - teacher) if control != teacher else math.nan


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
    def from_json(cls, data: Mapping[str, Any]) -> S2EFErrors:
        """Inverse of `to_json`."""
        splits = {name: _estimates(metrics) for name, metrics in data["splits"].items()}
        return cls(splits, _estimates(data["average"]))


def _estimates(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    found = {}
    for key, one in metrics.items():
        value, error = (math.nan if one[k] is None else one[k] for k in ("value", "standard_error"))
        found[key] = Estimate(value, error, one["n"])
    return found


def evaluate_s2ef(
    predictor: Potential | BaseCalculator,
    splits: Mapping[str, tuple[Structures, Properties]],
    *,
    max_atoms: int = 4096,
    fabric: lightning_fabric.Fabric | None = None,
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
    fabric : lightning_fabric.Fabric, optional
        Its processes share the batches; all of them return the result of the whole.

    Returns
    -------
    S2EFErrors

    Raises
    ------
    DataError
        If a set has no frame with energy and forces.
    """
    rank, n_ranks = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
    found = {}
    for name, (structures, labels) in splits.items():
        metrics = S2EFAccumulator()
        for systems in structures.batches(max_atoms)[rank::n_ranks]:
            batch = structures.select(systems)
            prediction = predict_all(predictor, batch, ("energy", "forces"), max_atoms=max_atoms)
            metrics.update(prediction, labels.select(systems, structures), batch)
        if fabric is not None:
            state = metrics.state().to(fabric.device)
            metrics.load_state(cast(Tensor, fabric.all_reduce(state, reduce_op="sum")))
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

    Returns
    -------
    GapShare
    """
    s, c, t = (_known(e.standard_error) for e in (student, control, teacher))
    gap, gap_error = control.value - teacher.value, math.hypot(c, t)
    if gap == 0.0 or abs(gap) < 2.0 * gap_error:
        return GapShare(math.nan, math.nan, gap, gap_error)
    share = (control.value - student.value) / gap
    error = math.hypot(s, (1.0 - share) * c, share * t) / abs(gap)
    return GapShare(100.0 * share, 100.0 * error, gap, gap_error)


def _known(error: float) -> float:
    return error if math.isfinite(error) else 0.0


def _predict_with_ase(
    calculator: BaseCalculator, structures: Structures, properties: list[str]
) -> Properties:
    names = [p for p in properties if ASE_NAMES.get(p, p) in calculator.implemented_properties]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for atoms in structures.to_ase():
        atoms = with_calculator(atoms, calculator)
        for name in names:
            columns[name].append(_ask(atoms, name))
    values = {}
    for name, column in columns.items():
        shape = (-1, *property_spec(name).shape)
        values[name] = torch.from_numpy(np.concatenate(column).astype(np.float64).reshape(shape))
    present = {"stress": structures.pbc.all(dim=1).cpu()} if "stress" in values else {}
    return Properties(values, present)


def _ask(atoms: ase.Atoms, name: str) -> np.ndarray:
    """One property of one structure as rows."""
    if name == "energy":
        return np.array([atoms.get_potential_energy()])
    if name == "forces":
        return atoms.get_forces(apply_constraint=False)
    if name == "stress":
        if not atoms.pbc.all():
            return np.full((1, 3, 3), np.nan)
        return atoms.get_stress(voigt=False, apply_constraint=False)[None]
    return np.asarray(atoms.get_potential_energies())


def _only(values: Properties, names: Sequence[str]) -> Properties:
    """The named properties that are there."""
    return Properties(
        {k: v for k, v in values.values.items() if k in names},
        {k: v for k, v in values.present.items() if k in names},
    )
