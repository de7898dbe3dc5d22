"""Training sets in memory, and the batches drawn from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from potstill.core import (
    CompactNeighbors,
    build_compact_neighbors,
    compact_neighbors,
    select_neighbors,
)
from potstill.distill.terms import Batch
from potstill.errors import DataError
from potstill.features import Feature
from potstill.models import Potential
from potstill.models.base import Pairs
from potstill.neighbors import build_neighbor_list
from potstill.properties import LEARNABLE, PROPERTIES
from potstill.ragged import Rows
from potstill.species import SpeciesTable
from potstill.structures import NeighborList, Properties, Structures


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
        Filled in by `with_neighbors`.
    features : dict of str to dict of str to Feature
        Stored features of teachers, by name and tap; the teacher's own choice of a tap comes last.
    synthetic : Tensor, optional
        (S,) bool, which configurations a model has made; None where nobody said. Settings may draw
        and weigh them differently (`potstill.train.mixing`).
    """

    structures: Structures
    labels: Mapping[str, Properties]
    neighbors: Pairs | None = None
    features: Mapping[str, Mapping[str, Feature]] = field(default_factory=dict)
    synthetic: Tensor | None = None

    def __len__(self) -> int:
        return self.structures.n_systems

    def with_species_table(self, table: SpeciesTable) -> TrainingSet:
        """The same set with species indexed as in `table`."""
        return replace(self, structures=self.structures.with_species_table(table))

    def with_neighbors(self, cutoff: float, *, packed: bool = False) -> TrainingSet:
        """The same set with a neighbor list that reaches `cutoff` Å.

        Packed ones are for native kernels and take a seventh of the memory.
        """
        known = self.neighbors
        if known is None or known.cutoff < cutoff:
            build = build_compact_neighbors if packed else build_neighbor_list
            return replace(self, neighbors=build(self.structures, cutoff))
        if packed and isinstance(known, NeighborList):
            return replace(self, neighbors=compact_neighbors(known, self.structures.n_atoms))
        return self

    def select(self, systems: Tensor) -> TrainingSet:
        """Some of the configurations."""
        rows = self.structures.rows(systems)
        return TrainingSet(
            self.structures.select(rows),
            {name: labels.select(rows) for name, labels in self.labels.items()},
            self._select_neighbors(rows),
            {
                source: {tap: feature.select(rows) for tap, feature in taps.items()}
                for source, taps in self.features.items()
            },
            synthetic=None if self.synthetic is None else self.synthetic[systems],
        )

    def with_synthetic(self, others: TrainingSet) -> TrainingSet:
        """Join other configurations, marked as synthetic; neighbor lists are dropped.

        Labels and features that only one of the two has are absent in the other.
        """
        parts = (self, others)
        sizes = [part.structures for part in parts]
        empty = Properties({})
        labels = {
            source: Properties.concatenate([p.labels.get(source, empty) for p in parts], sizes)
            for source in dict.fromkeys((*self.labels, *others.labels))
        }
        features: dict[str, dict[str, Feature]] = {}
        for source in dict.fromkeys((*self.features, *others.features)):
            own, theirs = (part.features.get(source, {}) for part in parts)
            features[source] = {
                tap: Feature.concatenate(
                    [
                        own.get(tap) or theirs[tap].absent(self.structures),
                        theirs.get(tap) or own[tap].absent(others.structures),
                    ],
                    sizes,
                )
                for tap in dict.fromkeys((*own, *theirs))
            }
        marks = torch.cat([torch.full((len(part),), part is others) for part in parts])
        return TrainingSet(Structures.concatenate(sizes), labels, None, features, marks)

    def _select_neighbors(self, rows: Rows) -> Pairs | None:
        if isinstance(self.neighbors, CompactNeighbors):
            offsets = self.structures.atom_offsets
            return select_neighbors(self.neighbors, rows.systems.tolist(), offsets)
        return None if self.neighbors is None else self.neighbors.select(rows)

    def batch(self, systems: Tensor, weights: Tensor | None = None) -> Batch:
        """The given configurations as one batch, each with its weight if there are (n,) weights."""
        if self.neighbors is None:
            raise DataError("a training set needs its neighbor list before batches are drawn")
        part = self.select(systems)
        assert part.neighbors is not None
        labels = dict(part.labels)
        if weights is not None:
            labels = {k: p.weighted(weights, part.structures) for k, p in labels.items()}
        features = {source: dict(taps) for source, taps in part.features.items()}
        return Batch(part.structures, part.neighbors, labels, features, weights)

    def minus(self, baseline: Potential) -> TrainingSet:
        """Subtract what fixed potentials (offsets, prior) give from the labels of every source.

        Energies and atomic energies lose the same offsets, so that they still agree.
        """
        predicted = baseline.predict(self.structures, properties=LEARNABLE)
        labels = {}
        for source, properties in self.labels.items():
            values = {
                name: value - predicted[name] if name in LEARNABLE else value
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


def fit_offsets(
    structures: Structures, energy: Tensor, *, per_atom: bool = False
) -> tuple[Tensor, int]:
    """Least-squares energies per species.

    Parameters
    ----------
    structures : Structures
        S systems.
    energy : Tensor
        (S,) total energies, eV; NaN entries are left out.
    per_atom : bool
        Fit energies per atom, so that systems of all sizes count alike.

    Returns
    -------
    offsets : Tensor
        (n_species,) eV per atom, float64; the solution of smallest norm where the compositions do
        not determine it.
    rank : int
        Rank of the composition matrix; below n_species the offsets are not unique.
    """
    known = torch.isfinite(energy)
    composition, energy = structures.composition()[known], energy[known].to(torch.float64)
    if per_atom:
        n_atoms = composition.sum(dim=1).clamp(min=1.0)
        composition, energy = composition / n_atoms[:, None], energy / n_atoms
    offsets = torch.linalg.pinv(composition) @ energy
    return offsets, int(torch.linalg.matrix_rank(composition))
