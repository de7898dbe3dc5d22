"""Terms of the loss on internal features, of atoms and of pairs.

Ekström Kelvinius et al., *Accelerating Molecular Graph Neural Networks via Knowledge Distillation*,
Eqs. 2 to 6 and the strategy e2e of the full paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from potstill.distill.feature_losses import FEATURE_LOSSES, FeatureError
from potstill.distill.schedules import Schedule, WeightedTerm
from potstill.distill.transforms import Transform
from potstill.features import FeatureKind

FeatureStrategy = Literal["n2n", "e2n", "v2v", "e2e"]


@dataclass(frozen=True)
class Kinds:
    """What a strategy compares.

    Parameters
    ----------
    student : str
        Kind of the student's tap.
    teacher : tuple of str
        Kinds of the teacher's tap that fit, the best first.
    """

    student: FeatureKind
    teacher: tuple[FeatureKind, ...]


KINDS: dict[str, Kinds] = {
    "n2n": Kinds("node_scalar", ("node_scalar",)),
    "e2n": Kinds("node_scalar", ("edge_scalar",)),
    "v2v": Kinds("node_vector", ("node_vector", "edge_scalar")),
    "e2e": Kinds("edge_scalar", ("edge_scalar",)),
}


class AuxiliaryTerm(WeightedTerm):
    """One term of the loss on a property that the student reads off its features while it learns.

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
    student_tap : str, optional
        Scalars of atoms; by default the last before the output.
    transform : {"linear", "mlp"}
        The head.
    error : {"mse", "mae"}
        Over all components in the batch.
    weight : float or Schedule
        Constant, or by epoch.
    """

    learn: Literal["charges", "dipole"]
    source: str = "reference"
    student_tap: str | None = None
    transform: Literal["linear", "mlp"] = "linear"
    error: Literal["mse", "mae"] = "mse"

    @property
    def name(self) -> str:
        """`charges:source`, as in logs."""
        return f"{self.learn}:{self.source}"


class FeatureTerm(WeightedTerm):
    """One term of the loss: weight x loss(M_s(student's feature), M_t(teacher's feature)), Eq. 3.

    Parameters
    ----------
    distill : {"n2n", "e2n", "v2v", "e2e"}
        Which features meet: scalars of atoms with scalars of atoms (Eq. 4), or with those of pairs
        summed over each atom's neighbors (Eq. 5); vectors of atoms with vectors, or with scalars of
        pairs times unit vectors (Eq. 6); scalars of pairs with scalars of the same pairs.
    source : str
        Name of the teacher.
    student_tap, teacher_tap : str, optional
        Names of taps, several joined by `+`; by default the last of a fitting kind.
    student_transform, teacher_transform : {"identity", "linear", "mlp"}
        M_s and M_t. They are trained along and are no part of the student's file.
    error : {"mse", "mae", "lsp", "gsp", "cka", "fork"}
        See `potstill.distill.feature_losses`.
    weight : float or Schedule
        λ of Eq. 2, constant or by epoch.
    share : float, optional
        Multiply the weight by a factor such that the initial term is this share of the whole loss.
    """

    distill: FeatureStrategy
    source: str
    student_tap: str | None = None
    teacher_tap: str | None = None
    student_transform: Transform = "linear"
    teacher_transform: Transform = "identity"
    error: FeatureError = "mse"
    share: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> FeatureTerm:
        if self.source == "reference":
            raise ValueError("features come from a teacher: name it as the source")
        if self.distill == "v2v" and "mlp" in (self.student_transform, self.teacher_transform):
            raise ValueError(
                "an mlp of vectors would not turn with the structure: v2v takes linear or identity"
            )
        if self.distill == "e2e" and not FEATURE_LOSSES[self.error].row_wise:
            raise ValueError(f"{self.error} compares atoms: e2e takes mse, mae or cka")
        if self.share is not None:
            if not isinstance(self.weight, Schedule) and self.weight != 1.0:
                raise ValueError("give either a weight or a share, not both")
            if self.weight_at(1) == 0.0:
                raise ValueError("a share of the initial loss needs a weight in the first epoch")
        return self

    @property
    def name(self) -> str:
        """`n2n:source`, and the taps where they are named, as in logs."""
        taps = ""
        if self.student_tap is not None or self.teacher_tap is not None:
            taps = f"[{self.student_tap or 'default'}<-{self.teacher_tap or 'default'}]"
        return f"{self.distill}:{self.source}{taps}"

    @property
    def kinds(self) -> Kinds:
        """What the strategy compares."""
        return KINDS[self.distill]
