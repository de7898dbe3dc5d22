"""Short-range repulsion that kernels add to a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ZblParameters:
    """The ZBL repulsion of `potstill.models.prior.ZBL`.

    Parameters
    ----------
    charge : Tensor
        (n_species,) float64 nuclear charges.
    inner, cutoff : float
        Å.
    """

    charge: Tensor
    inner: float
    cutoff: float


@dataclass(frozen=True)
class RepulsionParameters:
    """The repulsion of `potstill.models.prior.PairRepulsion`.

    Parameters
    ----------
    strength, radius : Tensor
        (n_species, n_species) float64, symmetric: eV and Å.
    """

    strength: Tensor
    radius: Tensor


#: Kernels add one of them.
PairPrior = ZblParameters | RepulsionParameters
