"""Geometry of batches for the kernels: pair vectors in, forces and virials out.

Between an optimizer's steps nothing but positions and cells moves. The neighbor list of a whole
data set is packed once; a batch takes its rows, and pair vectors never exist in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.core.base import native
from potstill.core.hipnn import _SUFFIX, CompactNeighbors, _array, _topology
from potstill.errors import ModelError
from potstill.structures import Structures


def select_neighbors(
    neighbors: CompactNeighbors, systems: Sequence[int], atom_offsets: Tensor
) -> CompactNeighbors:
    """The neighbor lists of some systems of a batch, side by side.

    Parameters
    ----------
    neighbors : CompactNeighbors
        Of all systems.
    systems : sequence of int
        Which, in their new order.
    atom_offsets : Tensor
        (S + 1,) int64: atoms of system s are atom_offsets[s] to atom_offsets[s + 1] - 1.
    """
    offsets = atom_offsets.tolist()
    rows, near, images = [torch.zeros(1, dtype=torch.int64)], [], []
    n_atoms = n_pairs = 0
    for s in systems:
        first, last = offsets[s], offsets[s + 1]
        row = neighbors.row_ptr[first : last + 1]
        pairs = slice(int(row[0]), int(row[-1]))
        rows.append(row[1:] + (n_pairs - pairs.start))
        near.append(neighbors.neighbor[pairs] + (n_atoms - first))
        if neighbors.image is not None:
            images.append(neighbors.image[pairs])
        n_atoms += last - first
        n_pairs += pairs.stop - pairs.start
    return CompactNeighbors(
        torch.cat(rows),
        torch.cat(near) if near else neighbors.neighbor[:0],
        (torch.cat(images) if images else neighbors.image[:0])
        if neighbors.image is not None
        else None,
        neighbors.images,
        neighbors.cutoff,
    )


def repeat_neighbors(neighbors: CompactNeighbors, n_copies: int) -> CompactNeighbors:
    """The neighbor lists of copies of a batch side by side, for given pair vectors: no images."""
    n_atoms, n_pairs = neighbors.n_local, neighbors.n_pairs
    rows = [neighbors.row_ptr, *(neighbors.row_ptr[1:] + k * n_pairs for k in range(1, n_copies))]
    near = [neighbors.neighbor + k * n_atoms for k in range(n_copies)]
    images = neighbors.images.new_zeros(1, 3)
    return CompactNeighbors(torch.cat(rows), torch.cat(near), None, images, neighbors.cutoff)


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
    getattr(native(), f"pair_vectors_{_SUFFIX[dtype]}")(
        *_topology(structures.species, neighbors),
        _array(structures.positions, torch.float64),
        _array(structures.system_index, torch.int32),
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
    getattr(native(), f"pair_forces_{_SUFFIX[r_ij.dtype]}")(
        *_topology(structures.species, neighbors),
        _array(structures.atom_offsets, torch.int64),
        _array(r_ij, r_ij.dtype),
        _array(gradient, r_ij.dtype),
        forces.numpy(),
        virial.numpy(),
        torch.get_num_threads(),
    )
    return forces, virial


def _check(structures: Structures, neighbors: CompactNeighbors) -> None:
    if neighbors.n_local != structures.n_atoms:
        raise ModelError(
            f"the neighbor list is of {neighbors.n_local} atoms, and there are {structures.n_atoms}"
        )
