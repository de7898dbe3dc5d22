"""Random strains and volume scans."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator

from potstill.errors import ConfigError
from potstill.sample.base import (
    IndependentJob,
    Maker,
    as_pair,
    gaussian_step,
    random_strain,
    span,
)
from potstill.structures import Structures


def scale_volume(structure: Structures, ratio: float) -> Structures:
    """Scale all lengths alike, so that the volume becomes `ratio` times what it was."""
    return structure.deformed(ratio ** (1.0 / 3.0) * torch.eye(3, dtype=torch.float64))


@dataclass(frozen=True, kw_only=True)
class _DeformationJob(IndependentJob):
    """What strains and volume scans share: a small rattle on top.

    Parameters
    ----------
    displacement : float
        Å, Gaussian displacements after the deformation; zero for none.
    """

    displacement: float = 0.0

    def check(self, start: Structures, calculator: BaseCalculator | None) -> None:
        """Refuse a structure that has no cell to deform."""
        if not bool(start.pbc.any()):
            raise ConfigError(
                f"the job '{self.name}' deforms a cell, and {start.name_of(0)} is not periodic"
            )

    def maker(self, start: Structures, calculator: BaseCalculator | None) -> Maker:
        """Deform the cell, then displace the atoms."""

        def make(k: int, generator: np.random.Generator) -> tuple[Structures, str]:
            moved = self._deform(start, k, generator)
            step = gaussian_step(start, self.displacement, generator)
            return replace(moved, positions=moved.positions + step), ""

        return make

    @abstractmethod
    def _deform(self, start: Structures, k: int, generator: np.random.Generator) -> Structures:
        """Deform the k-th frame."""


@dataclass(frozen=True, kw_only=True)
class StrainJob(_DeformationJob):
    """Frames with random symmetric strains.

    Parameters
    ----------
    max_strain : float
        Each of the six components is drawn evenly between plus and minus this.
    displacement : float
        Å, Gaussian displacements after the strain.
    """

    kind: ClassVar[str] = "strain"

    max_strain: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.max_strain < 0.5:
            raise ConfigError(f"max_strain must be between 0 and 0.5, not {self.max_strain}")

    def default_name(self) -> str:
        """Say how large the strains are."""
        return f"strain {100.0 * self.max_strain:g} %"

    def _deform(self, start: Structures, k: int, generator: np.random.Generator) -> Structures:
        return random_strain(start, self.max_strain, generator)


@dataclass(frozen=True, kw_only=True)
class VolumeJob(_DeformationJob):
    """A scan of volumes at fixed shape, evenly spaced.

    Parameters
    ----------
    volume : (low, high)
        Volumes relative to the start's.
    displacement : float
        Å, Gaussian displacements after the scaling.
    """

    kind: ClassVar[str] = "volume"

    volume: Sequence[float] = (0.85, 1.15)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = as_pair(self.volume)
        if not 0.0 < low <= high:
            raise ConfigError(f"volumes must be 0 < low <= high, not {low} and {high}")

    def default_name(self) -> str:
        """Say how far the volume goes."""
        return f"volume {span(self.volume)}"

    def _deform(self, start: Structures, k: int, generator: np.random.Generator) -> Structures:
        return scale_volume(start, self.spread(self.volume)[k])
