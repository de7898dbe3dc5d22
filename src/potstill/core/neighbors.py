"""Neighbor lists as the kernels keep them, packed as they are built.

A list of `potstill.neighbors` takes 40 bytes per pair, and several times that while it is built.
This one takes 6, and never more: pairs are counted first, then written where they belong. The
oracle is `compact_neighbors(build_neighbor_list(...))`, which has the same pairs in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.core.base import array, call, native
from potstill.errors import DataError
from potstill.neighbors import complete_box
from potstill.structures import NeighborList, Structures


@dataclass(frozen=True)
class CompactNeighbors:
    """A neighbor list as the kernels keep it: 6 bytes per pair.

    Parameters
    ----------
    row_ptr : Tensor
        (n_local + 1,) int64: the pairs of atom i are row_ptr[i] to row_ptr[i + 1] - 1.
    neighbor : Tensor
        (E,) int32.
    image : Tensor, optional
        (E,) uint16 rows of `images`; None where all shifts are zero, or r_ij are given anyway.
    images : Tensor
        (n_images, 3) int32 whole lattice vectors.
    cutoff : float
        How far the list reaches, Å; infinite where that is not known.
    """

    row_ptr: Tensor
    neighbor: Tensor
    image: Tensor | None
    images: Tensor
    cutoff: float = math.inf

    @property
    def n_local(self) -> int:
        """Number of atoms that have neighbors listed; ghosts come after them."""
        return self.row_ptr.shape[0] - 1

    @property
    def n_pairs(self) -> int:
        """Number of pairs E."""
        return self.neighbor.shape[0]


def compact_neighbors(neighbors: NeighborList, n_local: int) -> CompactNeighbors:
    """Pack a neighbor list for the kernels.

    Parameters
    ----------
    neighbors : NeighborList
        Sorted by center, on the CPU.
    n_local : int
        Number of local atoms: all centers are below it.

    Raises
    ------
    ModelError
        If it is not sorted, or the cell shifts span more than 65536 images.
    """
    n_pairs = neighbors.n_pairs
    row_ptr = torch.empty(n_local + 1, dtype=torch.int64)
    neighbor = torch.empty(n_pairs, dtype=torch.int32)
    image = torch.empty(n_pairs, dtype=torch.uint16)
    images = torch.empty(65536, 3, dtype=torch.int32)
    lists = (neighbors.center, neighbors.neighbor, neighbors.shifts)
    arrays = [array(tensor, torch.int64) for tensor in lists]
    out = [tensor.numpy() for tensor in (row_ptr, neighbor, image, images)]
    n_images = call(native().pack_pairs, *arrays, *out)
    crossing = n_images > 1
    return CompactNeighbors(
        row_ptr,
        neighbor,
        image if crossing else None,
        images[:n_images].clone(),
        neighbors.cutoff,
    )


def build_compact_neighbors(structures: Structures, cutoff: float) -> CompactNeighbors:
    """Full neighbor list of a batch, with all periodic images.

    Parameters
    ----------
    structures : Structures
        The batch, on the CPU; cells smaller than the cutoff and partial periodicity are fine.
    cutoff : float
        Å.

    Raises
    ------
    DataError
        If a position is not finite, a periodic direction has no lattice vector, or the lattice
        vectors are linearly dependent.
    ModelError
        If the cell shifts span more than 65536 images.
    """
    positions = array(structures.positions, torch.float64)
    periodic = structures.pbc.numpy()
    systems = (
        array(structures.atom_offsets, torch.int64),
        positions,
        _boxes(structures, positions, periodic, cutoff),
        periodic.astype(np.uint8),
        float(cutoff),
    )
    row_ptr = torch.empty(structures.n_atoms + 1, dtype=torch.int64)
    shift_range = np.empty((2, 3), dtype=np.int32)
    n_threads = torch.get_num_threads()
    call(native().count_pairs, *systems, row_ptr.numpy(), shift_range, n_threads)
    axes = [torch.arange(low, high + 1, dtype=torch.int32) for low, high in shift_range.T]
    images = torch.cartesian_prod(*axes)
    n_pairs = int(row_ptr[-1])
    neighbor = torch.empty(n_pairs, dtype=torch.int32)
    image = torch.empty(n_pairs, dtype=torch.uint16) if len(images) > 1 else None
    rows = None if image is None else image.numpy()
    call(
        native().list_pairs,
        *systems,
        row_ptr.numpy(),
        shift_range,
        neighbor.numpy(),
        rows,
        n_threads,
    )
    return CompactNeighbors(row_ptr, neighbor, image, images, float(cutoff))


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


def topology(species: Tensor, neighbors: CompactNeighbors) -> tuple[Any, Any, Any]:
    """Species, row pointers and neighbors as arrays for the kernels."""
    return (
        array(species, torch.int32),
        array(neighbors.row_ptr, torch.int64),
        array(neighbors.neighbor, torch.int32),
    )


def _boxes(
    structures: Structures, positions: np.ndarray, periodic: np.ndarray, cutoff: float
) -> np.ndarray:
    """(S, 3, 3) invertible boxes."""
    cells = array(structures.cell, torch.float64)
    offsets = structures.atom_offsets.tolist()
    boxes = np.empty_like(cells)
    for s, cell in enumerate(cells):
        own = positions[offsets[s] : offsets[s + 1]]
        try:
            boxes[s] = complete_box(own, cell, periodic[s], cutoff)
        except DataError as error:
            raise DataError(f"{structures.name_of(s)}: {error}") from None
    return boxes
