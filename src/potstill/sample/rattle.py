"""Gaussian displacements of atoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from ase.calculators.calculator import BaseCalculator

from potstill.errors import ConfigError
from potstill.neighbors import build_neighbor_list, shortest_distances
from potstill.sample.base import IndependentJob, Maker, as_pair, gaussian_step, one_system, span
from potstill.structures import Structures

_TRIES = 100


def rattle(
    start: Structures,
    displacement: float,
    generator: np.random.Generator,
    *,
    closest: float | None = None,
) -> Structures:
    """Displace every free atom of one system by a Gaussian of width `displacement` along each axis.

    Displacements that bring two atoms closer than `closest` are drawn again. Both are in Å.

    Raises
    ------
    ConfigError
        If no displacement keeps the atoms apart.
    """
    one_system(start)
    for _ in range(_TRIES):
        step = gaussian_step(start, displacement, generator)
        moved = replace(start, positions=start.positions + step)
        if closest is None or build_neighbor_list(moved, closest).n_pairs == 0:
            return moved
    raise ConfigError(
        f"{_TRIES} random displacements of {displacement:g} Å all brought atoms of "
        f"{start.name_of(0)} closer than {closest:.2f} Å: choose a smaller displacement"
    )


def shortest_distance(structures: Structures) -> float:
    """Shortest distance in Å between two atoms (or an atom and its image); inf if there is none."""
    cutoff = 3.0
    # Beyond 20 Å atoms count as isolated.
    while cutoff < 25.0:
        neighbors = build_neighbor_list(structures, cutoff)
        if neighbors.n_pairs:
            return min(shortest_distances(structures, neighbors).values())
        cutoff *= 2.0
    return float("inf")


@dataclass(frozen=True, kw_only=True)
class RattleJob(IndependentJob):
    """Frames with Gaussian displacements.

    Parameters
    ----------
    displacement : float or (low, high)
        Å; from a range, the widths are spread evenly.
    closest : float
        Atoms come no closer than this times the shortest distance at the start.
    """

    kind: ClassVar[str] = "rattle"

    displacement: float | Sequence[float] = (0.02, 0.2)
    closest: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = as_pair(self.displacement)
        if not 0.0 <= low <= high:
            raise ConfigError(f"a displacement must be 0 <= low <= high, not {low} and {high} Å")

    def default_name(self) -> str:
        """Say how far atoms are displaced."""
        return f"rattle {span(self.displacement)} Å"

    def maker(self, start: Structures, calculator: BaseCalculator | None) -> Maker:
        """Displace the atoms by widths that grow from frame to frame."""
        closest = self.closest * shortest_distance(start)
        limit, widths = closest if np.isfinite(closest) else None, self.spread(self.displacement)
        return lambda k, generator: (
            rattle(start, widths[k], generator, closest=limit),
            f", {widths[k]:.3f} Å",
        )
