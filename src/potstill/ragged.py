"""Rows of batches whose systems differ in size: offsets, and the rows of some systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.properties import property_spec


@dataclass(frozen=True)
class Rows:
    """Some systems of a batch and the rows that are theirs; made by `Structures.rows`.

    Parameters
    ----------
    systems : Tensor
        (n,) int64, positions of the systems in the batch.
    atoms : Tensor
        (m,) int64, positions of all their atoms.
    starts, counts : Tensor
        (n,) int64, position of the first atom of each system, and its number of atoms.
    n_atoms : int
        Atoms of the whole batch.
    """

    systems: Tensor
    atoms: Tensor
    starts: Tensor
    counts: Tensor
    n_atoms: int

    @classmethod
    def at(cls, offsets: Tensor, systems: Tensor) -> Rows:
        """Rows of systems (indices in 0..S-1) of which s has the atoms `offsets[s:s + 2]`."""
        starts = offsets[systems]
        counts = offsets[systems + 1] - starts
        return cls(systems, expand_ranges(offsets, systems), starts, counts, int(offsets[-1]))

    def of(self, name: str) -> Tensor:
        """Positions of the values of a property."""
        return self.systems if property_spec(name).level == "system" else self.atoms


def offsets_from_counts(counts: Tensor) -> Tensor:
    """(S+1,) running sum of (S,) counts, starting at zero."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def as_indices(systems: Sequence[int] | Tensor, n_systems: int) -> Tensor:
    """Indices or a mask of systems as int64 indices in 0..S-1; negative ones count from the end.

    Raises
    ------
    IndexError
        If an index is out of range or a mask has the wrong length.
    """
    systems = torch.as_tensor(systems)
    if systems.dtype == torch.bool:
        if systems.shape != (n_systems,):
            raise IndexError(f"a mask of {tuple(systems.shape)} for {n_systems} systems")
        return systems.nonzero().flatten()
    systems = systems.to(torch.int64)
    if bool(((systems < -n_systems) | (systems >= n_systems)).any()):
        raise IndexError(f"systems {systems.tolist()[:8]} are not all among {n_systems}")
    return torch.where(systems < 0, systems + n_systems, systems)


def draw(n: int, count: int, seed: int) -> Tensor:
    """(count,) increasing random numbers below n, all if there are fewer; the same for a seed."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values


def expand_ranges(offsets: Tensor, systems: Tensor) -> Tensor:
    """Indices of all rows of the given systems, where rows of s are `offsets[s]:offsets[s+1]`."""
    starts = offsets[systems]
    counts = offsets[systems + 1] - starts
    ends = offsets_from_counts(counts)
    inside = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends[:-1], counts)
    return inside + torch.repeat_interleave(starts, counts)
