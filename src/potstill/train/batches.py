"""What one step trains on."""

from __future__ import annotations

import lightning_fabric
from torch import Tensor

from potstill.distill.terms import Batch
from potstill.train.augment import Augmentation
from potstill.train.data import TrainingSet
from potstill.train.mixing import batch_weights
from potstill.train.settings import TrainSettings
from potstill.train.signals import FeatureSources


class BatchSource:
    """Makes the batch of a step out of the indices of its configurations.

    Parameters
    ----------
    settings : TrainSettings
        How samples are weighed.
    training : TrainingSet
        With its neighbor list.
    augmentation : Augmentation, optional
        Displaces configurations.
    features : FeatureSources
        Computes features of teachers online.
    fabric : lightning_fabric.Fabric
        Each process has its share of every batch.
    """

    def __init__(
        self,
        settings: TrainSettings,
        training: TrainingSet,
        augmentation: Augmentation | None,
        features: FeatureSources,
        fabric: lightning_fabric.Fabric,
    ) -> None:
        self.settings, self.training, self.fabric = settings, training, fabric
        self.augmentation, self.features = augmentation, features

    def __call__(self, systems: Tensor, epoch: int, step: int) -> Batch:
        """The share of this process: weighed, displaced, with features, on its device."""
        mine = slice(self.fabric.global_rank, None, self.fabric.world_size)
        weights = batch_weights(self.training.synthetic, systems, self.settings)
        batch = self.training.batch(systems[mine], None if weights is None else weights[mine])
        if self.augmentation is not None:
            batch = self.augmentation(batch, epoch, step, range(len(systems))[mine])
        return self.features.complete(batch).to(self.fabric.device)
