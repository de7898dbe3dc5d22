"""The loss of a batch as a function of what is predicted for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import lightning_fabric
import torch
from torch import Tensor

from potstill.distill.heads import AuxiliaryHead, FeatureHeads, Head
from potstill.distill.losses import error_measure, error_sums
from potstill.models import HIPNN, Potential
from potstill.models.hipnn import hierarchicality
from potstill.structures import NeighborList, Properties
from potstill.train.data import Batch
from potstill.train.settings import TrainSettings


@dataclass(frozen=True)
class LossValue:
    """A loss on a batch.

    Parameters
    ----------
    data : Tensor
        Scalar, a function of the predicted values.
    penalty : Tensor
        Scalar, a function of the parameters alone (L2).
    parts : dict of str to float
        What goes into the log; `loss` is the sum of all.
    """

    data: Tensor
    penalty: Tensor
    parts: dict[str, float]


#: From predicted values by name to the loss.
Objective = Callable[[Mapping[str, Tensor]], LossValue]


class BatchLoss:
    """The loss of Eqs. 2 and 5 of Matin et al. on one batch, as a function of predicted values.

    Parameters
    ----------
    settings : TrainSettings
        Terms of the loss, and regularization.
    epoch : int
        From 1; weights may follow a schedule.
    network : Potential
        Whose weights are penalized.
    batch : Batch
        With the labels of every source.
    fabric : lightning_fabric.Fabric
        Sums run over all its processes.
    heads : FeatureHeads, optional
        Of the terms on features; without them these are left out.
    """

    def __init__(
        self,
        settings: TrainSettings,
        epoch: int,
        network: Potential,
        batch: Batch,
        fabric: lightning_fabric.Fabric,
        heads: FeatureHeads | None = None,
    ) -> None:
        self.epoch, self.network, self.batch, self.fabric = epoch, network, batch, fabric
        self.active = [term for term in settings.label_terms if term.weight_at(epoch) != 0.0]
        self.heads = FeatureHeads() if heads is None else heads
        self.active_heads = self.heads.active(epoch)
        self.regularization = settings.regularization
        self.hierarchical = self.regularization.hierarchicality > 0 and isinstance(network, HIPNN)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the values that the loss is a function of."""
        names: list[str] = [term.property for term in self.active]
        names += ["hierarchical_energies"] if self.hierarchical else []
        names += [tap for head in self.active_heads for tap in head.wanted]
        return tuple(dict.fromkeys(names))

    def __call__(self, values: Mapping[str, Tensor]) -> LossValue:
        """The loss, with its parts for the log."""
        batch, fabric = self.batch, self.fabric
        prediction = Properties({term.property: values[term.property] for term in self.active})

        # One all-reduce for everything: sums of every error term, of every term on features, then
        # those of the regularizer.
        rows = [
            error_sums(term, prediction, batch.labels[term.source], batch.structures).stacked()
            for term in self.active
        ]
        rows += [head_sums(head, values, batch) for head in self.active_heads]
        if self.hierarchical:
            per_atom = hierarchicality(values["hierarchical_energies"])
            n_systems = per_atom.new_tensor(float(batch.structures.n_systems))
            rows.append(torch.stack([per_atom.sum(), n_systems, n_systems]))
        sums = _sum_over_ranks(torch.cat(rows), fabric).split([len(row) for row in rows])

        loss = sums[0].new_zeros(())
        parts: dict[str, float] = {}
        for term, row in zip(self.active, sums, strict=False):
            error = error_measure(term.error, row)
            loss = loss + term.weight_at(self.epoch) * error
            parts[term.name] = float(error.detach())
        for head, row in zip(self.active_heads, sums[len(self.active) :], strict=False):
            error = head.value(row)
            loss = loss + self.heads.weight(head.term, self.epoch) * error
            parts[head.term.name] = float(error.detach())
        if self.hierarchical:
            mean = sums[-1][0] / sums[-1][1]  # over configurations, of the sum over their atoms
            loss = loss + self.regularization.hierarchicality * mean
            parts["hierarchicality"] = float(mean.detach())
        penalty = loss.new_zeros(())
        if self.regularization.l2 > 0:
            weights = self.network.regularized_weights()
            penalty = sum((w.square().sum() for w in weights), start=penalty)
            parts["l2"] = float(penalty.detach())
            penalty = self.regularization.l2 * penalty
        parts["loss"] = float((loss + penalty).detach())
        # Data-parallel gradients are averaged over ranks. What depends on data is complete only in
        # the sum over ranks; the penalty is the same on each.
        return LossValue(loss * fabric.world_size, penalty, parts)


def head_sums(head: Head, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """(k,) sums of a term over a batch with its neighbor list, from the student's features."""
    if isinstance(head, AuxiliaryHead):
        labels = batch.labels[head.term.source]
        return head.sums(values, labels, batch.structures, batch.weights)
    assert isinstance(batch.neighbors, NeighborList)
    teacher = batch.features[head.term.source]
    return head.sums(values, teacher, batch.structures, batch.neighbors, batch.weights)


def _sum_over_ranks(local: Tensor, fabric: lightning_fabric.Fabric) -> Tensor:
    """Sum over ranks whose gradient reaches the local part only."""
    if fabric.world_size == 1:
        return local
    total = cast(Tensor, fabric.all_reduce(local.detach().clone(), reduce_op="sum"))
    return local + (total - local.detach())
