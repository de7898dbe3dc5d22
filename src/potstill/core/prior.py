"""Short-range terms that kernels add to a model."""

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


@dataclass(frozen=True)
class BondParameters:
    """The bonds and angles of `potstill.models.bonded.Bonds`.

    Parameters
    ----------
    pairs : Tensor
        (4, n_species, n_species) float64: length, stiffness, inner and outer; zero without bond.
    angles : Tensor
        (n_angles, 5) float64: species of one end, of the vertex and the other end, cosine and
        stiffness.
    """

    pairs: Tensor
    angles: Tensor


#: Kernels add one of them.
PairPrior = ZblParameters | RepulsionParameters
