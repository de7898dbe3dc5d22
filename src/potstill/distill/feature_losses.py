"""Losses between features of student and teacher: MSE, MAE, LSP, GSP, CKA, FORK.

Each is computed in two steps, so that processes that share a batch agree with one that has all of
it: sums over the systems at hand, which add up over the processes, and the loss as a function of
the total. Sums are in float64.

Conventions, where the literature leaves a choice:

* **MSE, MAE**: mean over all components of all rows in the batch.
* **LSP**, local structure preservation (Yang et al., CVPR 2020, Eqs. 3 and 4): with
  p_ij = softmax over the pairs of center i of the similarity of z_i and z_j, the mean over the
  centers of KL(p_student || p_teacher). Pairs are those of the student's neighbor list; images
  count one by one.
* **GSP**, global structure preservation (Joshi et al., 2022): the squared difference of the
  similarities of all pairs of atoms within a system, mean over the pairs, then over the systems.
* **FORK**, relational features between neighbors (after FORK and ARK, which contrast difference
  vectors): d_ij = z_j - z_i stands for a pair, and that of the student is to be told apart by that
  of the teacher: mean over the pairs of -log softmax over i's neighbors k of
  cos(d_ij of the student, d_ik of the teacher) / 0.1, at k = j. The other neighbors are the
  negatives.
* The similarity is the cosine, so that neither width nor scale of the features matters; of vectors
  it is that of all their components, which rotations leave alone.
* **CKA** (Kornblith et al., ICML 2019, linear): 1 - |Xc^T Yc|² / (|Xc^T Xc| |Yc^T Yc|), Frobenius
  norms. Rows are the atoms (or pairs) of the whole batch, and the mean over them is subtracted.
  With fewer rows than channels it is close to one whatever the features are. Vectors have three
  rows per atom and are not centered: rotations leave it alone.
* **Weights of systems** (Ekström Kelvinius et al., Eqs. 9 to 11) are weights in these means: of the
  rows (MSE, MAE), centers (LSP), systems (GSP) and pairs (FORK) of a system; in CKA of its rows, in
  the mean that is subtracted as in the products. A system that weighs nothing counts as left out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from potstill.models import Edges
from potstill.structures import NeighborList, Structures

#: Square norm below which a feature has no direction.
_TINY = 1e-24

#: Of the softmax over neighbors in FORK, and the score of what is no neighbor.
_TEMPERATURE, _NEVER = 0.1, -1e4


@dataclass(frozen=True)
class Rows:
    """What the rows of two features belong to.

    Parameters
    ----------
    structures : Structures
        The batch.
    atoms : Tensor
        (N,) bool: the atoms that count. Losses that are not `row_wise` get the features of all
        atoms, the others only rows that count.
    pairs : NeighborList, optional
        The student's neighbors, of losses that look at them.
    weights : Tensor, optional
        (n,) float64 of the rows of the features, one value per system; all weigh one if absent.
    """

    structures: Structures
    atoms: Tensor
    pairs: NeighborList | None = None
    weights: Tensor | None = None

    def weights_of(self, features: Tensor) -> Tensor:
        """(n,) float64 weights of the rows of `features`."""
        if self.weights is not None:
            return self.weights
        return torch.ones(len(features), dtype=torch.float64, device=features.device)


class FeatureLoss(ABC):
    """A loss between features (n, F) or, of vectors, (n, 3, F)."""

    #: Whether student and teacher need the same number of channels.
    same_width: bool = False

    #: Whether it takes any rows, of atoms or pairs; otherwise it needs all atoms of the systems.
    row_wise: bool = True

    @abstractmethod
    def sums(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        """(k,) float64 that add up over parts of a batch; `rows` says what counts."""

    @abstractmethod
    def value(self, sums: Tensor, n_student: int, n_teacher: int) -> Tensor:
        """Scalar, from the sums over the whole batch and the numbers of channels."""


class _Mean(FeatureLoss):
    """A sum over how many terms it has; zero if there is nothing."""

    def value(self, sums: Tensor, n_student: int, n_teacher: int) -> Tensor:
        total, count = sums
        return total / torch.where(count > 0, count, 1.0)


class MeanDifference(_Mean):
    """Mean of a function, the square or the absolute value, of the differences."""

    same_width = True

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def sums(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        """Sum over the components and their number, both with the weights of the rows."""
        values, weights = self.function((student - teacher).double()), rows.weights
        if weights is None:
            return torch.stack([values.sum(), values.new_tensor(float(values.numel()))])
        by_row = weights * values.flatten(1).sum(dim=1)
        return torch.stack([by_row.sum(), weights.sum() * math.prod(values.shape[1:])])


class LocalStructure(_Mean):
    """LSP: divergence between softmaxes of similarities over neighbors."""

    row_wise = False

    def sums(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        """Sum of divergences and number of centers with neighbors."""
        assert rows.pairs is not None
        near = rows.atoms[rows.pairs.center]
        center, neighbor = rows.pairs.center[near], rows.pairs.neighbor[near]
        n = rows.structures.n_atoms

        def log_softmax(features: Tensor) -> Tensor:  # (E,), over the pairs of each center
            z = _directions(features)
            score = (z[center] * z[neighbor]).sum(dim=1)  # of order one
            return score - score.new_zeros(n).index_add(0, center, score.exp())[center].log()

        own, other = log_softmax(student), log_softmax(teacher)
        divergence = own.exp() * (own - other)
        count = torch.zeros(n, dtype=torch.bool, device=center.device).index_fill(0, center, True)
        weights = rows.weights_of(student)
        return torch.stack([(weights[center] * divergence).sum(), weights[count].sum()])


class GlobalStructure(_Mean):
    """GSP: difference of the similarities of all pairs of atoms of a system."""

    row_wise = False

    def sums(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        """Sum over the systems of the mean squared difference, and number of systems."""
        structures = rows.structures
        system, offsets = structures.system_index, structures.atom_offsets
        n_systems, sizes = structures.n_systems, structures.n_atoms_per_system
        slot = torch.arange(structures.n_atoms, device=system.device) - offsets[system]
        width = int(sizes.max()) if n_systems else 0

        def similarity(features: Tensor) -> Tensor:  # (S, n_max, n_max)
            z = _directions(features)
            z = torch.where(rows.atoms.unsqueeze(1), z, 0.0)
            padded = z.new_zeros(n_systems, width, z.shape[1])
            padded = padded.index_put((system, slot), z)
            return padded @ padded.transpose(1, 2)

        square = (similarity(student) - similarity(teacher)).square().sum(dim=(1, 2))
        present = torch.zeros(n_systems, dtype=torch.bool, device=system.device)
        present = present.index_fill(0, system[rows.atoms], True)
        mean = square / sizes.clamp(min=1).square()
        weights = mean.new_zeros(n_systems).index_put((system,), rows.weights_of(student))
        return torch.stack([(weights * mean).sum(), weights[present].sum()])


class RelationalContrast(_Mean):
    """FORK: the student's difference vectors between neighbors, told apart by the teacher's."""

    row_wise = False
    same_width = True

    def sums(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        """Sum over the pairs, and their number."""
        assert rows.pairs is not None
        near = rows.atoms[rows.pairs.center]
        pairs = Edges(rows.pairs.center[near], rows.pairs.neighbor[near])
        slot, used = pairs.padded(rows.structures.n_atoms)  # (N, K)

        def relations(z: Tensor) -> Tensor:  # (N, K, F)
            return _directions(z[pairs.neighbor] - z[pairs.center])[slot]

        if not pairs.n_pairs:
            nothing = 0.0 * student.double().sum()
            return torch.stack([nothing, torch.zeros_like(nothing)])
        score = relations(student) @ relations(teacher).transpose(1, 2) / _TEMPERATURE
        score = score.masked_fill(~used.unsqueeze(1), _NEVER)
        own = torch.log_softmax(score, dim=2).diagonal(dim1=1, dim2=2)  # (N, K)
        weights = rows.weights_of(student).unsqueeze(1).expand_as(own)[used]
        return torch.stack([-(weights * own[used]).sum(), weights.sum()])


class KernelAlignment(FeatureLoss):
    """One minus linear CKA."""

    def sums(self, student: Tensor, teacher: Tensor, rows: Rows) -> Tensor:
        """Number of rows, sums of x and y, and of x xᵀ, y yᵀ and x yᵀ, in one vector."""
        return _moments(student, teacher, rows.weights)

    def value(self, sums: Tensor, n_student: int, n_teacher: int) -> Tensor:
        """1 - |Xc^T Yc|² / (|Xc^T Xc| |Yc^T Yc|); zero where one of the features is constant."""
        a, b = n_student, n_teacher
        count, x, y, xx, yy, xy = sums.split([1, a, b, a * a, b * b, a * b])
        n = torch.where(count > 0, count, 1.0)

        def centered(product: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return product - (first.unsqueeze(1) * second / n).flatten()

        norms = centered(xx, x, x).square().sum() * centered(yy, y, y).square().sum()
        known = norms > _TINY
        shared = centered(xy, x, y).square().sum()
        return torch.where(known, 1.0 - shared / torch.where(known, norms, 1.0).sqrt(), 0.0)


FEATURE_LOSSES: dict[str, FeatureLoss] = {
    "mse": MeanDifference(torch.square),
    "mae": MeanDifference(torch.abs),
    "lsp": LocalStructure(),
    "gsp": GlobalStructure(),
    "cka": KernelAlignment(),
    "fork": RelationalContrast(),
}

FeatureError = Literal["mse", "mae", "lsp", "gsp", "cka", "fork"]


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two features of the same rows, (n, F) and (n, G): one minus the loss."""
    return 1.0 - float(KernelAlignment().value(_moments(x, y), x.shape[-1], y.shape[-1]))


def _moments(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    vectors = student.ndim == 3
    x, y = (z.flatten(0, 1) if vectors else z for z in (student.double(), teacher.double()))
    count, left = x.new_tensor([float(x.shape[0])]), (x, y)
    if weights is not None:
        weights = weights.repeat_interleave(3) if vectors else weights
        count, left = weights.sum(), (weights.unsqueeze(1) * x, weights.unsqueeze(1) * y)
    sums = [z.new_zeros(z.shape[1]) if vectors else z.sum(dim=0) for z in left]
    parts = [count, *sums, left[0].T @ x, left[1].T @ y, left[0].T @ y]
    return torch.cat([part.flatten() for part in parts])


def _directions(features: Tensor) -> Tensor:
    """(n, F) float64 unit vectors; of vector features (n, 3F)."""
    flat = features.double().flatten(1)
    return flat * torch.rsqrt(flat.square().sum(dim=1, keepdim=True) + _TINY)
