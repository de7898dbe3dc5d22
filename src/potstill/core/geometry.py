"""Geometry of batches for the kernels: pair vectors in, forces and virials out.

Between an optimizer's steps nothing but positions and cells moves. The neighbor list of a whole
data set is packed once; a batch takes its rows, and pair vectors never exist in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.core.base import array, native
from potstill.core.neighbors import CompactNeighbors, topology
from potstill.errors import ModelError
from potstill.structures import Structures


def compact_pair_vectors(
    structures: Structures,
    neighbors: CompactNeighbors,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """(E, 3) vectors of all pairs, Å: differences in float64, cast to float32 or float64.

    They are written to `out`, contiguous and of that dtype, if it is given.
    """
    _check(structures, neighbors)
    r_ij = torch.empty(neighbors.n_pairs, 3, dtype=dtype) if out is None else out
    cell = structures.cell.detach().to(torch.float64)
    offsets = neighbors.images.to(torch.float64) @ cell  # (S, n_images, 3)
    native().pair_vectors(
        *topology(structures.species, neighbors),
        array(structures.positions, torch.float64),
        array(structures.system_index, torch.int32),
        None if neighbors.image is None else neighbors.image.numpy(),
        offsets.contiguous().numpy(),
        r_ij.numpy(),
        torch.get_num_threads(),
    )
    return r_ij


def compact_forces(
    structures: Structures, neighbors: CompactNeighbors, r_ij: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Forces and virials from derivatives by the pair vectors.

    Parameters
    ----------
    structures, neighbors
        The batch.
    r_ij, gradient : Tensor
        (E, 3) Å and dE/dr_ij in eV/Å, of one dtype.

    Returns
    -------
    forces : Tensor
        (N, 3) eV/Å, float64.
    virial : Tensor
        (S, 3, 3) eV, float64: sum over pairs of r_ij outer dE/dr_ij.
    """
    _check(structures, neighbors)
    forces = torch.empty(structures.n_atoms, 3, dtype=torch.float64)
    virial = torch.empty(structures.n_systems, 3, 3, dtype=torch.float64)
    native().pair_forces(
        *topology(structures.species, neighbors),
        array(structures.atom_offsets, torch.int64),
        array(r_ij, r_ij.dtype),
        array(gradient, r_ij.dtype),
        forces.numpy(),
        virial.numpy(),
        torch.get_num_threads(),
    )
    return forces, virial


def _check(structures: Structures, neighbors: CompactNeighbors) -> None:
    if neighbors.n_local != structures.n_atoms:
        raise ModelError(
            f"the neighbor list is for {neighbors.n_local} atoms, but there are "
            f"{structures.n_atoms}"
        )
