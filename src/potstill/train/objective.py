"""The loss of a batch as a function of what is predicted for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import lightning_fabric
import torch
from torch import Tensor

from potstill.distill.terms import Batch, Terms


@dataclass(frozen=True)
class LossValue:
    """A loss on a batch, of scalars.

    `data` is a function of the predicted values, `penalty` (L2) of the parameters alone. `parts` go
    into the log, have no graph and stay on their device; `loss` is the sum of all.
    """

    data: Tensor
    penalty: Tensor
    parts: dict[str, Tensor]


#: From predicted values by name to the loss.
Objective = Callable[[Mapping[str, Tensor]], LossValue]


class BatchLoss:
    """The loss of Eqs. 2 and 5 of Matin et al. on one batch, as a function of predicted values.

    Weights are those of the epoch, counted from 1; sums run over all processes.
    """

    def __init__(
        self, terms: Terms, epoch: int, batch: Batch, fabric: lightning_fabric.Fabric
    ) -> None:
        self.epoch, self.batch, self.fabric = epoch, batch, fabric
        self.active = terms.active(epoch)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the values that the loss is a function of."""
        return tuple(dict.fromkeys(name for term in self.active for name in term.needs))

    def __call__(self, values: Mapping[str, Tensor]) -> LossValue:
        """The loss, with its parts for the log; nothing is read back from the device."""
        rows = [term.sums(values, self.batch) for term in self.active]
        loss = self.batch.structures.cell.new_zeros(())
        penalty, parts = loss, dict[str, Tensor]()
        # One all-reduce for the sums of all terms that depend on the data.
        pairs = list(zip(self.active, rows, strict=True))
        shared = [row for term, row in pairs if not term.of_parameters]
        local = torch.cat(shared) if shared else loss.unsqueeze(0)[:0]
        totals = iter(_sum_over_ranks(local, self.fabric).split([len(row) for row in shared]))
        for term, row in pairs:
            value = term.value(row if term.of_parameters else next(totals))
            parts[term.name] = value.detach()
            weighted = term.weight_at(self.epoch) * value
            if term.of_parameters:
                penalty = penalty + weighted
            else:
                loss = loss + weighted
        parts["loss"] = (loss + penalty).detach()
        # Data-parallel gradients are averaged over ranks. What depends on data is complete only in
        # the sum over ranks; the penalty is the same on each.
        return LossValue(loss * self.fabric.world_size, penalty, parts)


def _sum_over_ranks(local: Tensor, fabric: lightning_fabric.Fabric) -> Tensor:
    """Sum over ranks whose gradient reaches the local part only."""
    if fabric.world_size == 1:
        return local
    total = cast(Tensor, fabric.all_reduce(local.detach().clone(), reduce_op="sum"))
    return local + (total - local.detach())
