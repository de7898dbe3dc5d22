"""Terms on internal features of student and teacher, of atoms and of pairs.

Ekström Kelvinius et al., *Accelerating Molecular Graph Neural Networks via Knowledge Distillation*,
Eqs. 2 to 6 and the strategy e2e of the full paper. A head holds the transformations of its line,
which are trained along with the student and are not saved with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from potstill.distill.aggregate import edges_to_nodes, edges_to_vectors, match_pairs
from potstill.distill.feature_losses import FEATURE_LOSSES, FeatureError, Rows
from potstill.distill.schedules import Schedule
from potstill.distill.taps import CHOSEN_PAIRS, TapNames, TapPair, resolve_taps
from potstill.distill.terms import Batch, Line, TeacherTaps, Term
from potstill.distill.transforms import Transform, make_transform
from potstill.errors import ConfigError
from potstill.features import Feature, FeatureKind, pairs_at, pairs_within
from potstill.models import Potential, TapSpec
from potstill.structures import NeighborList

FeatureStrategy = Literal["n2n", "e2n", "v2v", "e2e"]


class Kinds(NamedTuple):
    """Kinds of taps that a strategy compares; of the teacher's those that fit, the best first."""

    student: FeatureKind
    teacher: tuple[FeatureKind, ...]


KINDS: dict[str, Kinds] = {
    "n2n": Kinds("node_scalar", ("node_scalar",)),
    "e2n": Kinds("node_scalar", ("edge_scalar",)),
    "v2v": Kinds("node_vector", ("node_vector", "edge_scalar")),
    "e2e": Kinds("edge_scalar", ("edge_scalar",)),
}


class FeatureTerm(Line):
    """One line of the loss: weight x loss(M_s(student's feature), M_t(teacher's feature)), Eq. 3.

    Parameters
    ----------
    distill : {"n2n", "e2n", "v2v", "e2e"}
        Which features meet: scalars of atoms with scalars of atoms (Eq. 4), or with those of pairs
        summed over each atom's neighbors (Eq. 5); vectors of atoms with vectors, or with scalars of
        pairs times unit vectors (Eq. 6); scalars of pairs with scalars of the same pairs.
    source : str
        Name of the teacher.
    student_tap, teacher_tap : str or list of str, optional
        Names of taps, several joined by `+`; by default the last of a fitting kind.
    student_transform, teacher_transform : {"identity", "linear", "mlp"}
        M_s and M_t. They are trained along with the student, and its file does not hold them.
    error : {"mse", "mae", "lsp", "gsp", "cka", "fork"}
        See `potstill.distill.feature_losses`.
    weight : float or Schedule
        λ of Eq. 2, constant or by epoch.
    share : float, optional
        Multiply the weight by a factor such that the initial term is this share of the whole loss.
    """

    order: ClassVar[int] = 1

    distill: FeatureStrategy
    source: str
    student_tap: TapNames | None = None
    teacher_tap: TapNames | None = None
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
                "an mlp of vectors would break equivariance: use linear or identity with v2v"
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
        if self.student_tap is None and self.teacher_tap is None:
            return f"{self.distill}:{self.source}"
        student, teacher = (
            "+".join(tap or ("default",)) for tap in (self.student_tap, self.teacher_tap)
        )
        return f"{self.distill}:{self.source}[{student}<-{teacher}]"

    @property
    def kinds(self) -> Kinds:
        """What the strategy compares."""
        return KINDS[self.distill]

    def bind(self, student: Potential, teachers: TeacherTaps) -> FeatureHead:
        """The head between the taps of student and teacher."""
        head = FeatureHead(self, student, *teachers.taps_for(self))
        teachers.will_ask(self.source, head.taps.teacher)
        return head


class FeatureHead(Term, nn.Module):
    """The transformations and the loss of one line, between taps of student and teacher.

    Raises
    ------
    ConfigError
        If a tap is unknown or of the wrong kind, or widths differ where they must agree.
    """

    def __init__(
        self,
        line: FeatureTerm,
        student: Potential,
        teacher_taps: Mapping[str, TapSpec],
        teacher_default: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.line: FeatureTerm = line
        self.name = line.name
        self.cutoff = student.cutoff
        self.loss = FEATURE_LOSSES[line.error]
        own_taps, mine = resolve_taps(
            line.student_tap,
            student.taps,
            student.default_tap,
            (line.kinds.student,),
            owner=f"the student ({student.kind})",
            term=line.name,
        )
        their_taps, theirs = resolve_taps(
            line.teacher_tap,
            teacher_taps,
            teacher_default,
            line.kinds.teacher,
            owner=f"the teacher '{line.source}'",
            term=line.name,
        )
        self.taps = TapPair(own_taps, their_taps)
        self._student_chooses = line.distill == "e2e" and CHOSEN_PAIRS in student.taps
        self.needs = (*own_taps, CHOSEN_PAIRS) if self._student_chooses else own_taps
        fixed = [t == "identity" for t in (line.student_transform, line.teacher_transform)]
        if self.loss.same_width and all(fixed) and mine.width != theirs.width:
            raise ConfigError(
                f"{line.name}: the student's feature has {mine.width} channels and the teacher's "
                f"{theirs.width}, and {line.error} compares them one to one: use a linear "
                "transformation"
            )
        # The common space is the teacher's own where its features stay as they are.
        width = mine.width if fixed[0] and not fixed[1] else theirs.width
        vector = line.kinds.student == "node_vector"
        make = partial(make_transform, n_out=width, vector=vector)
        self.student_transform = make(line.student_transform, mine.width)
        self.teacher_transform = make(line.teacher_transform, theirs.width)
        self.widths = (mine.width if fixed[0] else width, theirs.width if fixed[1] else width)
        self.to(student.dtype)

    def sums(self, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """(k,) float64 sums over the batch; its neighbor list may reach beyond the cutoff."""
        structures, neighbors, host = batch.structures, batch.neighbors, batch.host or batch
        assert isinstance(neighbors, NeighborList)
        feature = self._joined(batch)
        # On the CPU, so that what has no features is left out without waiting for a GPU.
        there = self._joined(host).presence(structures.n_systems)[host.structures.system_index]
        system, atoms = structures.system_index, there.to(structures.cell.device)
        x = torch.cat([values[tap] for tap in self.taps.student], dim=-1)
        pairs = None
        if self.line.distill == "e2e":
            if self._student_chooses:
                rows = values[CHOSEN_PAIRS][:, 0].long()
            else:
                rows = pairs_within(structures, neighbors, self.cutoff)[1].nonzero()[:, 0]
                x = x[rows]
            own = pairs_at(structures, neighbors, rows)
            x, y, system = self._shared_pairs(x, own, feature, system)
        else:
            if feature.graph is None:
                y = feature.values
            else:
                summed = edges_to_nodes if self.line.distill == "e2n" else edges_to_vectors
                y = summed(feature, structures)
            if self.loss.row_wise:
                rows = batch.rows(there)
                x, y, system = x[rows], y[rows], system[rows]
            else:
                shape = (-1, *[1] * (y.ndim - 1))
                y = torch.where(atoms.reshape(shape), y, 0.0)  # NaN where there is none
                pairs, _ = pairs_within(structures, neighbors, self.cutoff)
        dtype = next((p.dtype for p in self.parameters()), torch.float64)
        x, y = self.student_transform(x.to(dtype)), self.teacher_transform(y.to(dtype))
        weights = None if batch.weights is None else batch.weights[system]
        return self.loss.sums(x, y, Rows(structures, atoms, pairs, weights))

    def value(self, sums: Tensor) -> Tensor:
        """Scalar loss, from sums over the whole batch."""
        return self.loss.value(sums, *self.widths)

    def _joined(self, batch: Batch) -> Feature:
        """The teacher's features side by side; those of pairs must share one graph."""
        held = batch.features[self.line.source]
        features = [held[tap] for tap in self.taps.teacher]
        first = features[0]
        if len(features) == 1:
            return first
        for other in features[1:]:
            if first.graph is not None and other.graph is not None:
                columns = zip(vars(first.graph).values(), vars(other.graph).values(), strict=True)
                if not all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in columns):
                    raise ConfigError(f"{self.name}: taps on different graphs cannot be joined")
        values = torch.cat([feature.values for feature in features], dim=-1)
        masks = [feature.present for feature in features if feature.present is not None]
        present = torch.stack(masks).all(dim=0) if masks else None
        return Feature(first.kind, values, first.graph, first.recipe, present)

    def _shared_pairs(
        self, x: Tensor, own: NeighborList, teacher: Feature, system: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the pairs that both have, and the system of each; `system` is by atom."""
        assert teacher.graph is not None
        mine, theirs = match_pairs(own, teacher.graph)
        if own.n_pairs and teacher.graph.n_pairs and not len(mine):
            raise ConfigError(
                f"{self.name}: student and teacher have no pair in common, so features of pairs "
                f"cannot be compared: give both the same cutoff and caps"
            )
        return x[mine], teacher.values[theirs], system[own.center[mine]]
