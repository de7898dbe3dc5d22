"""The validation pass: errors of labels, and the loss' terms on features."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import lightning_fabric
import torch
from torch import Tensor

from potstill.metrics import ErrorAccumulator
from potstill.models import Potential
from potstill.neighbors import build_neighbor_list
from potstill.structures import NeighborList
from potstill.train.data import Batch, TrainingSet
from potstill.train.features import FeatureSources
from potstill.train.objective import head_sums
from potstill.train.settings import TrainSettings

#: Atoms of a batch.
EVALUATION_ATOMS = 4096


class Validation:
    """The validation set, in batches.

    Terms on features are evaluated where the set holds the teacher's features or the teacher
    computes online. Then it does so once, here: features of atoms are kept, and those of pairs,
    which can be many times as large, are computed in every pass.

    Parameters
    ----------
    settings : TrainSettings
        Score and loss.
    network : Potential
        The student's network.
    data : TrainingSet
        Its labels without what offsets and prior give.
    features : FeatureSources
        The teachers and the heads of the terms.
    fabric : lightning_fabric.Fabric
        Each process has its share of the batches.
    """

    def __init__(
        self,
        settings: TrainSettings,
        network: Potential,
        data: TrainingSet,
        features: FeatureSources,
        fabric: lightning_fabric.Fabric,
    ) -> None:
        self.network, self.features, self.fabric = network, features, fabric
        terms = [term for term in settings.label_terms if term.ever_active]
        self.own_source = settings.score.source
        self.sources = sorted({self.own_source, *(t.source for t in terms)} & set(data.labels))
        self.names = tuple(sorted({term.property for term in terms} | {"energy", "forces"}))
        self.heads = features.heads_for(data)
        self.taps = tuple(dict.fromkeys(tap for head in self.heads for tap in head.wanted))
        data = data.with_neighbors(network.cutoff, packed=network.uses_native)
        mine = data.structures.batches(EVALUATION_ATOMS)[fabric.global_rank :: fabric.world_size]
        if self.heads and not mine:
            mine = [torch.zeros(0, dtype=torch.int64)]  # sums of zeros, in the others' shape
        self.batches = [self._completed(data.batch(systems), pairs=False) for systems in mine]

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Metrics against the score's source, against others as `metric:source`, and terms by name.

        A term is that of the whole set, not a mean over batches. What nothing in the set has is
        left out.
        """
        self.network.eval()
        accumulators = {source: ErrorAccumulator(self.fabric.device) for source in self.sources}
        sums: list[list[Tensor]] = [[] for _ in self.heads]
        for held in self.batches:
            batch = self._completed(held).to(self.fabric.device)
            structures, neighbors = batch.structures, batch.neighbors
            # One pass, unless native kernels serve, which keep their features to themselves.
            native = not isinstance(neighbors, NeighborList)
            taps = () if native else self.taps
            found = self.network.predict(structures, neighbors, self.names, taps=taps)
            for source, accumulator in accumulators.items():
                accumulator.update(found.properties, batch.labels[source], structures)
            if self.taps and native:
                neighbors = build_neighbor_list(structures, self.network.cutoff)
                found = self.network.predict(structures, neighbors, (), taps=self.taps)
            values = {tap: value.to(torch.float64) for tap, value in found.features.items()}
            for head, parts in zip(self.heads, sums, strict=True):
                parts.append(head_sums(head, values, replace(batch, neighbors=neighbors)))
        result: dict[str, float] = {}
        for source, accumulator in accumulators.items():
            accumulator.load_state(self._total(accumulator.state()))
            suffix = "" if source == self.own_source else f":{source}"
            result |= {f"{key}{suffix}": value for key, value in accumulator.compute().items()}
        for head, parts in zip(self.heads, sums, strict=True):
            total = self._total(torch.stack(parts).sum(dim=0))
            if bool(total.any()):
                result[head.term.name] = float(head.value(total))
        return result

    def _completed(self, batch: Batch, *, pairs: bool = True) -> Batch:
        return self.features.complete(batch, pairs=pairs) if self.heads else batch

    def _total(self, local: Tensor) -> Tensor:
        return cast(Tensor, self.fabric.all_reduce(local, reduce_op="sum"))
