"""Neighbor lists by vesin, and pair vectors from them."""

from __future__ import annotations

import numpy as np
import torch
import vesin
from torch import Tensor

from potstill.errors import DataError
from potstill.structures import NeighborList, Structures


def build_neighbor_list(structures: Structures, cutoff: float) -> NeighborList:
    """Full neighbor list of a batch, sorted by center, with all periodic images.

    Parameters
    ----------
    structures : Structures
        The batch; cells smaller than the cutoff and partial periodicity are fine.
    cutoff : float
        Å.

    Raises
    ------
    DataError
        If a position is not finite, a periodic direction has no lattice vector, or the lattice
        vectors are linearly dependent.
    """
    offsets = structures.atom_offsets.tolist()
    positions = structures.positions.detach().cpu().numpy()
    cells = structures.cell.detach().cpu().numpy()
    periodic = structures.pbc.cpu().numpy()
    centers, neighbors, shifts, counts = [], [], [], []
    for s in range(structures.n_systems):
        part = slice(offsets[s], offsets[s + 1])
        try:
            i, j, shift = system_pairs(positions[part], cells[s], periodic[s], cutoff)
        except DataError as error:
            raise DataError(f"{structures.name_of(s)}: {error}") from None
        # Lists of large systems are the largest arrays of all: no copies that change nothing.
        centers.append(i + offsets[s] if s else i)
        neighbors.append(j + offsets[s] if s else j)
        shifts.append(shift)
        counts.append(len(i))
    return NeighborList(
        center=_join(centers, (0,)),
        neighbor=_join(neighbors, (0,)),
        shifts=_join(shifts, (0, 3)),
        n_pairs_per_system=torch.tensor(counts, dtype=torch.int64),
        cutoff=float(cutoff),
    ).to(structures.positions.device)


def system_pairs(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (i, j, shift) of one system, sorted by i; int64 arrays of length E and (E, 3)."""
    box = complete_box(positions, cell, pbc, cutoff)
    if len(positions) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int64)
    calculator = vesin.NeighborList(cutoff=float(cutoff), full_list=True, sorted=True)
    i, j, shift = calculator.compute(
        points=np.ascontiguousarray(positions),
        box=box,
        periodic=np.asarray(pbc, dtype=bool),
        quantities="ijS",
    )
    return tuple(array.astype(np.int64, copy=False) for array in (i, j, shift))


def complete_box(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float
) -> np.ndarray:
    """Invertible box in which the atoms of one system can be binned.

    Lattice vectors of open directions count for nothing: vectors that make the box invertible
    take their rows. Arguments are (N, 3) Å; (3, 3) Å, rows are lattice vectors; (3,) bool; Å.

    Raises
    ------
    DataError
        If something is not finite, or there are atoms and `check_cell` refuses the cell.
    """
    if not np.isfinite(positions).all() or not np.isfinite(cell).all():
        raise DataError("positions or cell are not finite")
    if len(positions) == 0:
        return np.eye(3)
    check_cell(cell, pbc)
    box = np.where(np.asarray(pbc)[:, None], cell, 0.0)
    open_rows = [k for k in range(3) if not pbc[k]]
    if not open_rows:
        return box
    span = float(np.ptp(positions, axis=0).max(initial=0.0)) + 2.0 * cutoff + 1.0
    full = [k for k in range(3) if pbc[k]]
    _, _, basis = np.linalg.svd(box[full]) if full else (None, None, np.eye(3))
    for row, direction in zip(open_rows, basis[len(full) :], strict=True):
        box[row] = span * direction
    return box


def check_cell(cell: np.ndarray, pbc: np.ndarray) -> None:
    """Refuse periodicity (3,) that repeats nothing; rows of the (3, 3) cell are lattice vectors.

    Raises
    ------
    DataError
        If a periodic lattice vector is zero, or the periodic ones are linearly dependent.
    """
    for axis in np.flatnonzero(pbc):
        if not np.any(cell[axis]):
            raise DataError(f"periodic along lattice vector {axis + 1}, which is zero")
    periodic = cell[np.asarray(pbc, dtype=bool)]
    if len(periodic) < 2:
        return
    directions = periodic / np.linalg.norm(periodic, axis=1, keepdims=True)
    if np.linalg.svd(directions, compute_uv=False)[-1] < 1e-6:
        raise DataError("the periodic lattice vectors are linearly dependent")


def pair_vectors(structures: Structures, neighbors: NeighborList) -> Tensor:
    """(E, 3) float64 vectors r_ij = r_j - r_i + shift @ cell, differentiable in both."""
    shifts = neighbors.shifts.to(structures.positions.dtype)
    if structures.n_systems == 1:  # as in molecular dynamics: no copy of the cell per pair
        offset = shifts @ structures.cell[0]
    else:
        system = structures.system_index[neighbors.center]
        offset = torch.einsum("ek,ekd->ed", shifts, structures.cell[system])
    return (
        structures.positions[neighbors.neighbor] - structures.positions[neighbors.center] + offset
    )


def shortest_distances(structures: Structures, neighbors: NeighborList) -> dict[str, float]:
    """Shortest distance in Å per pair of species, keyed "A-B" with A before B in the table."""
    distance = torch.linalg.vector_norm(pair_vectors(structures, neighbors), dim=1)
    n = len(structures.species_table)
    first = structures.species[neighbors.center]
    second = structures.species[neighbors.neighbor]
    key = torch.minimum(first, second) * n + torch.maximum(first, second)
    shortest = torch.full((n * n,), torch.inf, dtype=torch.float64)
    shortest.scatter_reduce_(0, key.cpu(), distance.cpu(), "amin")
    names = structures.species_table.names
    return {
        f"{names[k // n]}-{names[k % n]}": float(value)
        for k, value in enumerate(shortest)
        if torch.isfinite(value)
    }


def _join(parts: list[np.ndarray], empty: tuple[int, ...]) -> Tensor:
    if len(parts) == 1:
        return torch.from_numpy(parts[0])
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(empty, np.int64))
