"""Training sets in memory, and the batches drawn from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from potstill.core import CompactNeighbors, compact_neighbors, select_neighbors
from potstill.errors import DataError
from potstill.features import Feature
from potstill.models import Potential
from potstill.models.base import Pairs
from potstill.neighbors import build_neighbor_list
from potstill.properties import PROPERTIES
from potstill.structures import NeighborList, Properties, SpeciesTable, Structures


@dataclass(frozen=True)
class Batch:
    """A few configurations with their neighbor list, labels and features of every source."""

    structures: Structures
    neighbors: Pairs
    labels: dict[str, Properties]
    features: dict[str, dict[str, Feature]] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """Move all tensors to a device."""
        return Batch(
            self.structures.to(device),
            # Compact lists are for kernels on the CPU.
            self.neighbors.to(device)
            if isinstance(self.neighbors, NeighborList)
            else self.neighbors,
            {source: labels.to(device) for source, labels in self.labels.items()},
            {
                source: {tap: feature.to(device) for tap, feature in taps.items()}
                for source, taps in self.features.items()
            },
        )


@dataclass(frozen=True)
class TrainingSet:
    """Structures, their neighbor list (computed once) and labels by source.

    Parameters
    ----------
    structures : Structures
        All configurations.
    labels : dict of str to Properties
        One entry per source: `reference`, and teachers by name.
    neighbors : NeighborList or CompactNeighbors, optional
        Filled in by `with_neighbors`, packed by `compacted`.
    features : dict of str to dict of str to Feature
        Stored features of teachers, by name and tap; the teacher's own choice of a tap comes last.
    """

    structures: Structures
    labels: Mapping[str, Properties]
    neighbors: Pairs | None = None
    features: Mapping[str, Mapping[str, Feature]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.structures.n_systems

    def with_species_table(self, table: SpeciesTable) -> TrainingSet:
        """The same set with species indexed as in `table`."""
        return replace(self, structures=self.structures.with_species_table(table))

    def with_neighbors(self, cutoff: float) -> TrainingSet:
        """The same set with a neighbor list that reaches `cutoff` Å."""
        if self.neighbors is not None and self.neighbors.cutoff >= cutoff:
            return self
        return replace(self, neighbors=build_neighbor_list(self.structures, cutoff))

    def compacted(self) -> TrainingSet:
        """The same set with its neighbor list packed for native kernels."""
        if not isinstance(self.neighbors, NeighborList):
            return self
        return replace(self, neighbors=compact_neighbors(self.neighbors, self.structures.n_atoms))

    def select(self, systems: Tensor) -> TrainingSet:
        """Some of the configurations."""
        return TrainingSet(
            self.structures.select(systems),
            {name: p.select(systems, self.structures) for name, p in self.labels.items()},
            self._select_neighbors(systems),
            {
                source: {tap: f.select(systems, self.structures) for tap, f in taps.items()}
                for source, taps in self.features.items()
            },
        )

    def _select_neighbors(self, systems: Tensor) -> Pairs | None:
        if isinstance(self.neighbors, CompactNeighbors):
            offsets = self.structures.atom_offsets
            return select_neighbors(self.neighbors, systems.tolist(), offsets)
        return None if self.neighbors is None else self.neighbors.select(systems, self.structures)

    def batch(self, systems: Tensor) -> Batch:
        """The given configurations as one batch."""
        if self.neighbors is None:
            raise DataError("a training set needs its neighbor list before batches are drawn")
        part = self.select(systems)
        assert part.neighbors is not None
        features = {source: dict(taps) for source, taps in part.features.items()}
        return Batch(part.structures, part.neighbors, dict(part.labels), features)

    def minus(self, baseline: Potential) -> TrainingSet:
        """Subtract what fixed potentials (offsets, prior) give from the labels of every source.

        Energies and atomic energies lose the same offsets, so that they still agree.
        """
        names = ("energy", "forces", "stress", "atomic_energies")
        predicted = baseline.predict(self.structures, properties=names)
        labels = {}
        for source, properties in self.labels.items():
            values = {
                name: value - predicted[name] if name in names else value
                for name, value in properties.values.items()
            }
            labels[source] = Properties(values, properties.present, properties.weights)
        return replace(self, labels=labels)

    def summary(self) -> list[tuple[str, str, int]]:
        """(source, property, number of configurations that have it) for labels and features."""
        labels = [
            (source, name, int(labels.presence(name, len(self)).sum()))
            for source, labels in self.labels.items()
            for name in labels.names
            if name in PROPERTIES
        ]
        features = [
            (source, f"features {tap}", int(feature.presence(len(self)).sum()))
            for source, taps in self.features.items()
            for tap, feature in taps.items()
        ]
        return labels + features


def epoch_batches(
    structures: Structures,
    *,
    batch_size: int,
    batch_atoms: int | None,
    seed: int,
    epoch: int,
) -> list[Tensor]:
    """Shuffle the configurations and cut them into batches.

    The order depends on seed and epoch alone, so that a resumed run draws the same batches.

    Returns
    -------
    list of Tensor
        Indices of configurations, one tensor per step.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(structures.n_systems, generator=generator)
    if batch_atoms is None:
        return list(order.split(batch_size))
    return structures.batches(batch_atoms, order)


def fit_offsets(structures: Structures, energy: Tensor) -> tuple[Tensor, int]:
    """Least-squares energies per species.

    Parameters
    ----------
    structures : Structures
        S systems.
    energy : Tensor
        (S,) total energies, eV; NaN entries are left out.

    Returns
    -------
    offsets : Tensor
        (n_species,) eV per atom, float64; the solution of smallest norm where the compositions do
        not determine it.
    rank : int
        Rank of the composition matrix; below n_species the offsets are not unique.
    """
    known = torch.isfinite(energy)
    composition = structures.composition()[known]
    offsets = torch.linalg.pinv(composition) @ energy[known].to(torch.float64)
    return offsets, int(torch.linalg.matrix_rank(composition))
