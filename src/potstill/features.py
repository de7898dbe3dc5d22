"""Internal features of a model for a batch: of atoms or of pairs, which carry their identity."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from potstill.errors import DataError
from potstill.neighbors import pair_vectors
from potstill.ragged import Rows, expand_ranges, offsets_from_counts
from potstill.structures import NeighborList, Structures

#: Pairs whose distances are computed at a time: those of all pairs would need gigabytes.
_CHUNK = 4_000_000

FeatureKind = Literal["node_scalar", "node_vector", "edge_scalar"]


@dataclass(frozen=True)
class Feature:
    """A feature of a batch.

    Parameters
    ----------
    kind : {"node_scalar", "node_vector", "edge_scalar"}
        Where it lives.
    values : Tensor
        (N, F), (N, 3, F) or (E, F), any floating dtype; NaN in atoms of systems that lack it.
    graph : NeighborList, optional
        Of features of pairs, and of these alone: the pair (i, j, shift) of each row. Its cutoff is
        the distance up to which there may be pairs; caps can make them fewer.
    recipe : str
        Of features of pairs: how their graph was made, in words that are the same for the same
        graph. Without it they are good for the moment only and not stored.
    present : Tensor, optional
        (S,) bool: which systems have it; all if absent.
    """

    kind: FeatureKind
    values: Tensor
    graph: NeighborList | None = None
    recipe: str = ""
    present: Tensor | None = None

    def __post_init__(self) -> None:
        rank = 3 if self.kind == "node_vector" else 2
        if self.values.ndim != rank or (rank == 3 and self.values.shape[1] != 3):
            raise DataError(f"a {self.kind} feature cannot have shape {tuple(self.values.shape)}")
        if (self.kind == "edge_scalar") != (self.graph is not None):
            raise DataError(
                f"a {self.kind} feature {'without' if self.graph is None else 'with'} pairs: those "
                "of pairs carry their identity, others have none"
            )
        if self.graph is not None and self.graph.n_pairs != self.values.shape[0]:
            raise DataError(
                f"{self.values.shape[0]} rows of features do not belong to {self.graph.n_pairs} "
                "pairs"
            )

    @property
    def width(self) -> int:
        """Number of channels F."""
        return self.values.shape[-1]

    def presence(self, n_systems: int) -> Tensor:
        """(S,) bool: which systems have the feature."""
        if self.present is not None:
            return self.present
        return torch.ones(n_systems, dtype=torch.bool, device=self.values.device)

    def select(self, rows: Rows) -> Feature:
        """Rows of some systems of the batch that this belongs to."""
        present = None if self.present is None else self.present[rows.systems]
        if self.graph is None:
            return replace(self, values=self.values[rows.atoms], present=present)
        pairs = expand_ranges(offsets_from_counts(self.graph.n_pairs_per_system), rows.systems)
        graph = self.graph.select(rows)
        return replace(self, values=self.values[pairs], graph=graph, present=present)

    def to(self, device: torch.device | str) -> Feature:
        """Move all tensors to a device."""
        return replace(
            self,
            values=self.values.to(device),
            graph=None if self.graph is None else self.graph.to(device),
            present=None if self.present is None else self.present.to(device),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Feature], sizes: Sequence[Structures]) -> Feature:
        """Join the features of batches that follow one another."""
        present = torch.cat([p.presence(s.n_systems) for p, s in zip(parts, sizes, strict=True)])
        values = torch.cat([part.values for part in parts])
        first = parts[0]
        if first.graph is None:
            return cls(first.kind, values, present=present)
        before = itertools.accumulate((size.n_atoms for size in sizes), initial=0)
        graphs = [part.graph for part in parts if part.graph is not None]
        moves = list(zip(graphs, before, strict=False))
        graph = NeighborList(
            torch.cat([g.center + n for g, n in moves]),
            torch.cat([g.neighbor + n for g, n in moves]),
            torch.cat([g.shifts for g in graphs]),
            torch.cat([g.n_pairs_per_system for g in graphs]),
            first.graph.cutoff,
        )
        return cls(first.kind, values, graph, first.recipe, present)

    def absent(self, structures: Structures) -> Feature:
        """A feature like this one that none of the systems has."""
        present = torch.zeros(structures.n_systems, dtype=torch.bool)
        if self.graph is None:
            values = self.values.new_full((structures.n_atoms, *self.values.shape[1:]), torch.nan)
            return Feature(self.kind, values, present=present)
        none = torch.zeros(0, dtype=torch.int64)
        counts = torch.zeros(structures.n_systems, dtype=torch.int64)
        graph = NeighborList(none, none, none.new_zeros(0, 3), counts, self.graph.cutoff)
        values = self.values.new_zeros(0, self.width)
        return Feature(self.kind, values, graph, self.recipe, present)


def pairs_within(
    structures: Structures, neighbors: NeighborList, cutoff: float
) -> tuple[NeighborList, Tensor]:
    """The pairs closer than `cutoff` (Å), and where they are in the list, (E,) bool."""
    parts = []
    for first in range(0, max(neighbors.n_pairs, 1), _CHUNK):
        chunk = pairs_at(structures, neighbors, slice(first, first + _CHUNK))
        parts.append(torch.linalg.vector_norm(pair_vectors(structures, chunk), dim=1) < cutoff)
    near = torch.cat(parts)
    graph = pairs_at(structures, neighbors, near)
    return replace(graph, cutoff=min(cutoff, neighbors.cutoff)), near


def pairs_at(
    structures: Structures, neighbors: NeighborList, index: Tensor | slice
) -> NeighborList:
    """Some pairs of a list, by increasing index, mask or slice."""
    center = neighbors.center[index]
    return NeighborList(
        center,
        neighbors.neighbor[index],
        neighbors.shifts[index],
        torch.bincount(structures.system_index[center], minlength=structures.n_systems),
        neighbors.cutoff,
    )
