"""The validation pass: errors of labels, and terms of the loss that have no metric of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import lightning_fabric
import torch
from torch import Tensor

from potstill.distill.terms import Batch, Terms
from potstill.metrics import ErrorAccumulator
from potstill.models import Potential
from potstill.neighbors import build_neighbor_list
from potstill.properties import LEARNABLE
from potstill.structures import NeighborList
from potstill.train.data import TrainingSet
from potstill.train.force_gradient import predict_values
from potstill.train.settings import TrainSettings
from potstill.train.signals import FeatureSources

#: Atoms of a batch.
EVALUATION_ATOMS = 4096


class Validation:
    """The validation set, in batches.

    Terms on features are evaluated where the set holds the teacher's features or the teacher
    computes online. Then it does so once, here: features of atoms are kept, and those of pairs,
    which can be many times as large, are computed in every pass. Labels are without what offsets
    and prior give. Each process has its share of the batches.
    """

    def __init__(
        self,
        settings: TrainSettings,
        network: Potential,
        data: TrainingSet,
        terms: Terms,
        features: FeatureSources,
        fabric: lightning_fabric.Fabric,
    ) -> None:
        self.network, self.features, self.fabric = network, features, fabric
        labels = [line for line in settings.label_terms if line.ever_active]
        self.own_source = settings.score.source
        self.sources = sorted({self.own_source, *(t.source for t in labels)} & set(data.labels))
        self.terms = [t for t in terms.all if t.validated and features.known_of(t, data)]
        self.wanted = tuple(dict.fromkeys(name for term in self.terms for name in term.needs))
        compared = {"energy", "forces", *(line.property for line in labels)}
        self.names = tuple(sorted(compared | (set(self.wanted) & set(LEARNABLE))))
        data = data.with_neighbors(network.cutoff, packed=network.uses_native)
        mine = data.structures.batches(EVALUATION_ATOMS)[fabric.global_rank :: fabric.world_size]
        if self.terms and not mine:
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
        sums: list[list[Tensor]] = [[] for _ in self.terms]
        for held in self.batches:
            batch = self._completed(held).to(self.fabric.device)
            structures, neighbors = batch.structures, batch.neighbors
            native = not isinstance(neighbors, NeighborList)
            taps = () if native else tuple(n for n in self.wanted if n in self.network.taps)
            found = self.network.predict(structures, neighbors, self.names, taps=taps)
            values = found.values
            for source, accumulator in accumulators.items():
                accumulator.update(found.properties, batch.labels[source], structures)
            if not self.terms:
                continue
            if native:
                # They keep their features to themselves.
                neighbors = build_neighbor_list(structures, self.network.cutoff)
                batch = replace(batch, neighbors=neighbors)
                values = predict_values(self.network, structures, neighbors, self.wanted)
            for term, parts in zip(self.terms, sums, strict=True):
                parts.append(term.sums(values, batch))
        result: dict[str, float] = {}
        for source, accumulator in accumulators.items():
            accumulator.load_state(self._total(accumulator.state()))
            suffix = "" if source == self.own_source else f":{source}"
            result |= {f"{key}{suffix}": value for key, value in accumulator.compute().items()}
        for term, parts in zip(self.terms, sums, strict=True):
            total = self._total(torch.stack(parts).sum(dim=0))
            if bool(total.any()):
                result[term.name] = float(term.value(total))
        return result

    def _completed(self, batch: Batch, *, pairs: bool = True) -> Batch:
        return self.features.complete(batch, pairs=pairs) if self.terms else batch

    def _total(self, local: Tensor) -> Tensor:
        return cast(Tensor, self.fabric.all_reduce(local, reduce_op="sum"))
