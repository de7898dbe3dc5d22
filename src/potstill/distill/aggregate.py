"""From features of pairs to features of atoms, and which pairs of two graphs are the same.

Equations are those of Ekström Kelvinius et al.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.features import Feature
from potstill.neighbors import pair_vectors
from potstill.structures import NeighborList, Structures


def edges_to_nodes(feature: Feature, structures: Structures) -> Tensor:
    """(N, F): the sum over the pairs of each center, Eq. 5."""
    assert feature.graph is not None
    total = feature.values.new_zeros(structures.n_atoms, feature.width)
    return total.index_add(0, feature.graph.center, feature.values)


def edges_to_vectors(feature: Feature, structures: Structures) -> Tensor:
    """(N, 3, F): the sum of unit vector x feature over the pairs of each center, Eq. 6.

    The unit vector points from the center to the neighbor; the result turns with the structure.
    """
    assert feature.graph is not None
    r_ij = pair_vectors(structures, feature.graph)
    unit = (r_ij / torch.linalg.vector_norm(r_ij, dim=1, keepdim=True)).to(feature.values.dtype)
    total = feature.values.new_zeros(structures.n_atoms, 3, feature.width)
    return total.index_add(0, feature.graph.center, unit.unsqueeze(2) * feature.values.unsqueeze(1))


def match_pairs(first: NeighborList, second: NeighborList) -> tuple[Tensor, Tensor]:
    """(M,) int64 rows of the pairs that two graphs of one batch have in common, in either.

    Pairs are the same by identity (i, j, shift).
    """
    columns = [
        torch.cat([g.center.unsqueeze(1), g.neighbor.unsqueeze(1), g.shifts], dim=1)
        for g in (first, second)
    ]
    _, code = torch.unique(torch.cat(columns), dim=0, return_inverse=True)
    one, other = code[: first.n_pairs], code[first.n_pairs :]
    row = code.new_full((int(code.max()) + 1 if len(code) else 0,), -1)
    row[other] = torch.arange(second.n_pairs, device=code.device)
    found = row[one]
    shared = (found >= 0).nonzero()[:, 0]
    return shared, found[shared]
