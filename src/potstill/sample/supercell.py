"""Supercells that are large enough."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill.errors import ConfigError
from potstill.sample.base import one_system
from potstill.structures import Structures


def smallest_supercell(
    structure: Structures,
    *,
    min_atoms: int = 1,
    min_length: float = 0.0,
    max_atoms: int | None = None,
) -> Structures:
    """Repeat a system until it is large enough, its thinnest periodic direction first.

    Parameters
    ----------
    min_atoms : int
        The least number of atoms; ignored if the system is not periodic.
    min_length : float
        Å, the least distance between opposite faces of the cell along periodic directions: an
        atom then sees no image of itself within it.
    max_atoms : int, optional
        Refuse to go beyond.

    Raises
    ------
    ConfigError
        If `max_atoms` is passed.
    """
    one_system(structure)
    heights = cell_heights(structure)[0].tolist()
    periodic = [axis for axis in range(3) if bool(structure.pbc[0, axis])]
    repeats = [1, 1, 1]

    def n_atoms() -> int:
        return structure.n_atoms * math.prod(repeats)

    while periodic:
        axis = min(periodic, key=lambda axis: (round(heights[axis] * repeats[axis], 6), axis))
        # A rounding error must not double a cell that is exactly long enough.
        long_enough = heights[axis] * repeats[axis] >= min_length - 1e-6
        if long_enough and n_atoms() >= min_atoms:
            break
        repeats[axis] += 1
        if max_atoms is not None and n_atoms() > max_atoms:
            raise ConfigError(
                f"a supercell of {structure.name_of(0)} with at least {min_atoms} atoms and "
                f"{min_length:g} Å between its faces needs {n_atoms()} atoms, more than "
                f"{max_atoms}: ask for less or raise the limit"
            )
    return structure.repeat((repeats[0], repeats[1], repeats[2]))


def cell_heights(structures: Structures) -> Tensor:
    """(S, 3) distances in Å between opposite faces of the cells; inf where not periodic."""
    a, b, c = structures.cell.unbind(1)
    normals = [torch.linalg.cross(u, v) for u, v in ((b, c), (c, a), (a, b))]
    areas = torch.stack([torch.linalg.vector_norm(normal, dim=1) for normal in normals], dim=1)
    lengths = torch.linalg.vector_norm(structures.cell, dim=2)
    # A cell with fewer than three vectors has no volume: its vectors' lengths are all there is.
    flat = structures.volume < 1e-8
    heights = torch.where(flat[:, None], lengths, structures.volume[:, None] / areas)
    return torch.where(structures.pbc, heights, torch.inf)
