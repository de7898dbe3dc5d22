"""Frames near a potential's own minimum: what elastic constants and phonons are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from potstill.errors import ConfigError, DivergenceError
from potstill.sample.base import (
    IndependentJob,
    Maker,
    as_pair,
    gaussian_step,
    random_strain,
    span,
)
from potstill.structures import Structures


@dataclass(frozen=True, kw_only=True)
class MinimumJob(IndependentJob):
    """Small displacements and small strains of the relaxed structure, by turns.

    Molecular dynamics leaves this region out: at 300 K atoms are 0.1 Å from their sites. The
    structure is relaxed with the calculator that drives the sampling, its cell too where it is
    periodic along all axes and the calculator gives stress. Where nothing is periodic there are
    displacements only.

    Parameters
    ----------
    displacement : float or (low, high)
        Å, widths of Gaussian displacements along each axis, spread evenly.
    strain : float or (low, high)
        Each of the six components of a strain is even between plus and minus this; the sizes are
        spread evenly, and atoms follow the cell.
    fmax, max_steps : float, int
        Of the relaxation, eV/Å. Where it has not ended after so many steps, frames are made from
        where it is: some distance from the minimum does no harm.
    """

    kind: ClassVar[str] = "minimum"

    displacement: float | Sequence[float] = (0.01, 0.05)
    strain: float | Sequence[float] = (0.005, 0.03)
    fmax: float = 0.01
    max_steps: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = as_pair(self.displacement)
        if not 0.0 <= low <= high:
            raise ConfigError(f"a displacement must be 0 <= low <= high, not {low} and {high} Å")
        low, high = as_pair(self.strain)
        if not 0.0 <= low <= high < 0.5:
            raise ConfigError(f"a strain must be 0 <= low <= high < 0.5, not {low} and {high}")

    def default_name(self) -> str:
        """Say how small displacements and strains are."""
        return f"near the minimum: {span(self.displacement)} Å, strain {span(self.strain)}"

    @property
    def n_evaluations(self) -> int:
        """At least the first step of the relaxation."""
        return 1

    def maker(self, start: Structures, calculator: BaseCalculator | None) -> Maker:
        """Relax the structure, then displace its atoms and strain its cell by turns."""
        assert calculator is not None  # `check` has seen to it
        minimum = self._relaxed(start, calculator)
        widths, strains = self.spread(self.displacement), self.spread(self.strain)
        periodic = bool(start.pbc.any())

        def make(k: int, generator: np.random.Generator) -> tuple[Structures, str]:
            if periodic and k % 2:
                return random_strain(minimum, strains[k], generator), f", strain {strains[k]:.4f}"
            step = gaussian_step(minimum, widths[k], generator)
            moved = minimum.positions + step
            return replace(minimum, positions=moved), f", {widths[k]:.3f} Å"

        return make

    def _relaxed(self, start: Structures, calculator: BaseCalculator) -> Structures:
        atoms = start.to_ase()[0]
        atoms.calc = calculator
        with_cell = bool(start.pbc.all()) and "stress" in calculator.implemented_properties
        target = FrechetCellFilter(atoms) if with_cell else atoms
        BFGS(target, logfile=None).run(fmax=self.fmax, steps=self.max_steps)  # type: ignore[arg-type]
        positions, cell = (
            torch.from_numpy(atoms.get_positions()),
            torch.from_numpy(atoms.cell.array),
        )
        if not bool(torch.isfinite(positions).all()):
            raise DivergenceError(f"'{self.name}': the relaxation of {start.name_of(0)} diverged")
        return replace(start, positions=positions, cell=cell[None])
