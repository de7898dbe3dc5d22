"""Errors of a potential in three channels that are never mixed.

A student has an error against its teacher, an error against the reference data, and the teacher
has its own error against the reference. The first says how well knowledge was passed on, the
second what the student is worth, the third what it could be worth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ase
import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator

from potstill.errors import DataError, suggest
from potstill.evaluate.base import Result, with_calculator
from potstill.metrics import ErrorAccumulator
from potstill.models.base import PREDICTABLE, Potential
from potstill.properties import property_spec
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
    wanted = [p for p in PREDICTABLE if p in labelled and (properties is None or p in properties)]
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


_ASE_NAMES = {"atomic_energies": "energies"}


def _predict_with_ase(
    calculator: BaseCalculator, structures: Structures, properties: list[str]
) -> Properties:
    names = [p for p in properties if _ASE_NAMES.get(p, p) in calculator.implemented_properties]
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
