"""Neighbor lists for the kernels, packed as they are built.

A list of `potstill.neighbors` takes 40 bytes per pair, and several times that while it is built.
This one takes 6, and never more: pairs are counted first, then written where they belong. The
oracle is `compact_neighbors(build_neighbor_list(...))`, which has the same pairs in another order.
"""

from __future__ import annotations

import numpy as np
import torch

from potstill.core.base import native
from potstill.core.hipnn import CompactNeighbors, _array, _call
from potstill.errors import DataError
from potstill.neighbors import complete_box
from potstill.structures import Structures


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
    positions = _array(structures.positions, torch.float64)
    periodic = structures.pbc.numpy()
    systems = (
        _array(structures.atom_offsets, torch.int64),
        positions,
        _boxes(structures, positions, periodic, cutoff),
        periodic.astype(np.uint8),
        float(cutoff),
    )
    row_ptr = torch.empty(structures.n_atoms + 1, dtype=torch.int64)
    shift_range = np.empty((2, 3), dtype=np.int32)
    n_threads = torch.get_num_threads()
    _call(native().count_pairs, *systems, row_ptr.numpy(), shift_range, n_threads)
    axes = [torch.arange(low, high + 1, dtype=torch.int32) for low, high in shift_range.T]
    images = torch.cartesian_prod(*axes)
    n_pairs = int(row_ptr[-1])
    neighbor = torch.empty(n_pairs, dtype=torch.int32)
    image = torch.empty(n_pairs, dtype=torch.uint16) if len(images) > 1 else None
    rows = None if image is None else image.numpy()
    _call(
        native().list_pairs,
        *systems,
        row_ptr.numpy(),
        shift_range,
        neighbor.numpy(),
        rows,
        n_threads,
    )
    return CompactNeighbors(row_ptr, neighbor, image, images, float(cutoff))


def _boxes(
    structures: Structures, positions: np.ndarray, periodic: np.ndarray, cutoff: float
) -> np.ndarray:
    """(S, 3, 3) invertible boxes."""
    cells = _array(structures.cell, torch.float64)
    offsets = structures.atom_offsets.tolist()
    boxes = np.empty_like(cells)
    for s, cell in enumerate(cells):
        own = positions[offsets[s] : offsets[s + 1]]
        try:
            boxes[s] = complete_box(own, cell, periodic[s], cutoff)
        except DataError as error:
            raise DataError(f"{structures.name_of(s)}: {error}") from None
    return boxes
