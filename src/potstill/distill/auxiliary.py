"""Terms on properties that the student reads off its features while it learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from potstill.distill.feature_losses import FEATURE_LOSSES, Rows
from potstill.distill.taps import TapNames, TapPair, resolve_taps
from potstill.distill.terms import Batch, Line, TeacherTaps, Term
from potstill.distill.transforms import make_transform
from potstill.models import Potential


class AuxiliaryTerm(Line):
    """One line of the loss on a property that the student reads off its features while it learns.

    A linear or MLP head on the student's tap predicts charges, or charges whose dipole is compared.
    The head is dropped with the transformations: the student itself predicts energies and forces
    only, from features that other teachers have shaped, too (Matin et al., outlook).

    Parameters
    ----------
    learn : {"charges", "dipole"}
        Partial charges (e); or dipoles (e·Å) of systems without periodicity and total charge, from
        charges that are shifted to sum to zero: others are left out.
    source : str
        Name of the label set.
    student_tap : str or list of str, optional
        Scalars of atoms; by default the last before the output.
    transform : {"linear", "mlp"}
        The head.
    error : {"mse", "mae"}
        Over all components in the batch.
    weight : float or Schedule
        Constant, or by epoch.
    """

    order: ClassVar[int] = 2

    learn: Literal["charges", "dipole"]
    student_tap: TapNames | None = None
    transform: Literal["linear", "mlp"] = "linear"
    error: Literal["mse", "mae"] = "mse"

    @property
    def name(self) -> str:
        """`charges:source`, as in logs."""
        return f"{self.learn}:{self.source}"

    @property
    def labels(self) -> tuple[str, ...]:
        """The property."""
        return (self.learn,)

    def bind(self, student: Potential, teachers: TeacherTaps) -> AuxiliaryHead:
        """The head on a student's tap."""
        return AuxiliaryHead(self, student)


class AuxiliaryHead(Term, nn.Module):
    """Reads a property off the student's features; raises ConfigError if the tap does not fit."""

    def __init__(self, line: AuxiliaryTerm, student: Potential) -> None:
        nn.Module.__init__(self)
        self.line: AuxiliaryTerm = line
        self.name = line.name
        self.loss = FEATURE_LOSSES[line.error]
        self.needs, spec = resolve_taps(
            line.student_tap,
            student.taps,
            student.default_tap,
            ("node_scalar",),
            owner=f"the student ({student.kind})",
            term=line.name,
        )
        self.taps = TapPair(self.needs, ())
        self.readout = make_transform(line.transform, spec.width, 1, vector=False)
        self.to(student.dtype)

    def sums(self, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """(2,) float64 sums over the batch, from the student's features and the labels."""
        structures, labels = batch.structures, batch.labels[self.line.source]
        system = structures.system_index
        x = torch.cat([values[tap] for tap in self.needs], dim=-1)
        dtype = next(self.parameters()).dtype
        charges = self.readout(x.to(dtype))[:, 0].double()
        host = batch.host or batch
        present = host.labels[self.line.source].presence(self.line.learn, structures.n_systems)
        if self.line.learn == "charges":
            rows = batch.rows(present[host.structures.system_index])
            predicted, label = charges[rows].unsqueeze(1), labels["charges"][rows].unsqueeze(1)
            weights = None if batch.weights is None else batch.weights[system[rows]]
        else:
            present = present & ~host.structures.pbc.any(dim=1)
            if host.structures.charge is not None:
                present = present & (host.structures.charge == 0)
            total, sizes = structures.sum_by_system(charges), structures.n_atoms_per_system
            neutral = charges - (total / sizes.clamp(min=1))[system]
            dipole = structures.sum_by_system(neutral.unsqueeze(1) * structures.positions)
            rows = batch.rows(present)
            predicted, label = dipole[rows], labels["dipole"][rows]
            weights = None if batch.weights is None else batch.weights[rows]
        atoms = present.to(system.device)[system]
        return self.loss.sums(predicted, label, Rows(structures, atoms, weights=weights))

    def value(self, sums: Tensor) -> Tensor:
        """Scalar loss, from sums over the whole batch."""
        return self.loss.value(sums, 1, 1)
