"""Training on reference and synthetic data: how often each is drawn and how much it weighs.

Ekström Kelvinius et al., appendix D.2. A share alpha of the samples of an epoch is synthetic,
whatever the sizes of the two sets: each is gone through in full passes, in a new order each time,
and where an epoch ends in the middle of a pass the next one goes on there. A synthetic sample
weighs r times as much in the loss as another one of its batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.errors import ConfigError
from potstill.structures import Structures
from potstill.train.data import TrainingSet
from potstill.train.settings import TrainSettings


def mixed_batches(
    structures: Structures, synthetic: Tensor | None, settings: TrainSettings, epoch: int
) -> list[Tensor]:
    """Draw the batches of an epoch, counted from 1: indices of configurations for each step.

    They depend on the seed and the epoch alone, so that a resumed run draws the same ones. There
    are as many indices in all as configurations, of which `synthetic`, (S,) bool, are synthetic.

    Raises
    ------
    ConfigError
        If a share of a set is asked for that is empty.
    """
    alpha = None if settings.mixing is None else settings.mixing.alpha
    n = structures.n_systems
    order = torch.randperm(n, generator=_generator(settings.seed, epoch))
    if alpha is None:
        return cut(structures, order, settings)
    synthetic = _origins(structures, synthetic)
    n_synthetic = round(alpha * n)
    drawn = []
    for origin, count in ((True, n_synthetic), (False, n - n_synthetic)):
        pool = (synthetic == origin).nonzero().flatten()
        if count and not len(pool):
            which = "synthetic" if origin else "reference"
            raise ConfigError(f"mixing.alpha = {alpha:g} asks for {which} data, but there are none")
        drawn.append(_in_passes(pool, count, settings.seed, epoch, origin))
    return cut(structures, torch.cat(drawn)[order], settings)


def within_steps(settings: TrainSettings, data: TrainingSet) -> TrainSettings:
    """The settings with no more epochs than have `settings.max_steps`."""
    if settings.max_steps is None:
        return settings
    per_epoch = len(mixed_batches(data.structures, data.synthetic, settings, epoch=1))
    epochs = math.ceil(settings.max_steps / per_epoch)
    return settings.model_copy(update={"epochs": min(settings.epochs, epochs)})


def cut(structures: Structures, order: Tensor, settings: TrainSettings) -> list[Tensor]:
    """Cut an order of configurations into batches, of so many or up to so many atoms."""
    if settings.batch_atoms is not None:
        return structures.batches(settings.batch_atoms, order)
    return list(order.split(settings.batch_size))


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _in_passes(pool: Tensor, count: int, seed: int, epoch: int, origin: bool) -> Tensor:
    """Samples (epoch - 1) * count onwards of an endless sequence of shuffled passes."""
    if not count:
        return pool[:0]
    start, size = (epoch - 1) * count, len(pool)
    passes = range(start // size, (start + count - 1) // size + 1)
    # Passes of the two sets are numbered alternately, away from the generators of the epochs.
    generators = [_generator(seed, -1 - (2 * k + origin)) for k in passes]
    stream = torch.cat([pool[torch.randperm(size, generator=g)] for g in generators])
    skipped = start - passes[0] * size
    return stream[skipped : skipped + count]


def origin_weights(synthetic: Tensor, r: float) -> Tensor:
    """(B,) float64 weights of the samples of a batch by their origin, Eqs. 9-11.

    Their mean is one; a synthetic sample weighs `r` times as much as another one. `synthetic`, (B,)
    bool, is that of the whole batch over all ranks; with a single origin all weigh one.
    """
    share = float(synthetic.to(torch.float64).mean()) if len(synthetic) else 0.0
    if share in (0.0, 1.0):
        return torch.ones(len(synthetic), dtype=torch.float64)
    reference = 1.0 / (1.0 - share + share * r)
    return torch.tensor([reference, r * reference], dtype=torch.float64)[synthetic.long()]


def batch_weights(
    synthetic: Tensor | None, systems: Tensor, settings: TrainSettings
) -> Tensor | None:
    """`origin_weights` of a batch; None where all samples weigh the same."""
    if settings.mixing is None or settings.mixing.r == 1.0 or synthetic is None:
        return None
    return origin_weights(synthetic[systems], settings.mixing.r)


def check_mixing(settings: TrainSettings, structures: Structures, synthetic: Tensor | None) -> None:
    """Raise ConfigError if the settings mix data of which there are none."""
    if settings.mixing is not None:
        _origins(structures, synthetic)
        mixed_batches(structures, synthetic, settings, epoch=1)


def _origins(structures: Structures, synthetic: Tensor | None) -> Tensor:
    if synthetic is None or synthetic.shape != (structures.n_systems,):
        raise ConfigError(
            "'mixing' needs synthetic data in addition to the training set: name them in "
            "data.synthetic"
        )
    return synthetic
